"""The index: `index/<split>.parquet`, one ClipRecord a row, sorted by shard and offset."""

from __future__ import annotations

import io
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from prep.errors import DatasetError
from prep.format.clip_record import ClipRecord
from prep.format.layout import MAX_PIXELS
from prep.parquet import read_parquet

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_COLUMNS = {
    "key": pa.string(),
    "shard": pa.dictionary(pa.int32(), pa.string()),
    "label": pa.int32(),
    "num_frames": pa.int32(),
    "fps_num": pa.int32(),
    "fps_den": pa.int32(),
    "width": pa.int32(),
    "height": pa.int32(),
    "entry_offset": pa.int64(),
    "entry_bytes": pa.int64(),
    "video_offset": pa.int64(),
    "video_bytes": pa.int64(),
    "content_hash": pa.binary(16),
    "crc32": pa.uint32(),
    "video_id": pa.string(),
    "start_seconds": pa.float64(),
    "end_seconds": pa.float64(),
    "source": pa.dictionary(pa.int32(), pa.string()),
    "short": pa.bool_(),
    "codec_config": pa.dictionary(pa.int32(), pa.binary()),
    "gop_frames": pa.int32(),
    "gop_offsets": pa.list_(pa.field("element", pa.int64(), nullable=False)),
    "gop_crc32": pa.list_(pa.field("element", pa.uint32(), nullable=False)),
}
_NULLABLE = ("codec_config", "gop_frames", "gop_offsets", "gop_crc32")
_DICTIONARIES = ("shard", "source", "codec_config")


def index_schema() -> pa.Schema:
    """Return the Arrow schema of an index."""
    return pa.schema(
        [pa.field(name, kind, nullable=name in _NULLABLE) for name, kind in _COLUMNS.items()]
    )


def index_table(records: Iterable[ClipRecord]) -> pa.Table:
    """Return the rows of an index as an Arrow table."""
    rows = list(records)
    schema = index_schema()
    arrays = [
        pa.array([getattr(row, field.name) for row in rows], type=field.type) for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def write_index(tables: Iterable[pa.Table]) -> bytes:
    """Return the Parquet file of an index; each table becomes one row group (a shard's rows)."""
    sink = io.BytesIO()
    schema = index_schema()
    integers = [name for name, kind in _COLUMNS.items() if pa.types.is_integer(kind)]
    encodings = dict.fromkeys(integers, "DELTA_BINARY_PACKED")
    encodings["gop_offsets.list.element"] = "DELTA_BINARY_PACKED"
    with pq.ParquetWriter(
        sink,
        schema,
        compression="zstd",
        column_encoding=encodings,
        use_dictionary=list(_DICTIONARIES),
    ) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=max(1, table.num_rows))
    return sink.getvalue()


def read_index(data: bytes, where: str, num_rows: int | None = None) -> pa.Table:
    """Parse the Parquet file of an index, of `num_rows` rows where the manifest says how many.

    Raises DatasetError, which names `where`, when it is not one, or one that exhausts memory.
    """
    try:
        table = read_parquet(data, list(_COLUMNS), where, num_rows)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{where} is not a Parquet file: {error}") from error
    missing = [name for name in _COLUMNS if name not in table.column_names]
    if missing:
        raise DatasetError(f"{where} lacks the columns {', '.join(missing)}")
    try:
        table = table.select(list(_COLUMNS)).cast(index_schema())
        table.validate(full=True)
    except (pa.ArrowException, ValueError) as error:
        raise DatasetError(
            f"{where} has a column of another type, or text that is no UTF-8: {error}"
        ) from error
    _check_ranges(table, where)
    return table


def _check_ranges(table: pa.Table, where: str) -> None:
    """Refuse rows that no writer makes: a stranger's index must not make a reader misbehave."""
    import pyarrow.compute as pc

    for field in index_schema():
        if not field.nullable and table[field.name].null_count:
            raise DatasetError(f"{where}: column {field.name} lacks values")
    at_least = {
        "label": -1, "num_frames": 1, "fps_num": 1, "fps_den": 1, "width": 1, "height": 1,
        "entry_offset": 0, "entry_bytes": 1, "video_offset": 0, "video_bytes": 1, "gop_frames": 1,
    }  # fmt: skip
    for name, low in at_least.items():
        smallest = pc.min(table[name]).as_py()
        if smallest is not None and smallest < low:
            raise DatasetError(f"{where}: column {name} holds {smallest}, below {low}")
    at_most = dict.fromkeys(("width", "height", "num_frames"), 1 << 24)
    # so that the sum of two is an int64 too
    at_most |= dict.fromkeys(
        ("entry_offset", "entry_bytes", "video_offset", "video_bytes"), 1 << 60
    )
    for name, high in at_most.items():
        largest = pc.max(table[name]).as_py()
        if largest is not None and largest > high:
            raise DatasetError(f"{where}: column {name} holds {largest}, which no clip has")
    pixels = pc.multiply(table["width"].cast("int64"), table["height"].cast("int64"))
    most = pc.max(pixels).as_py()
    if most is not None and most > MAX_PIXELS:
        raise DatasetError(
            f"{where} has a clip of {most:,} pixels, where at most {MAX_PIXELS:,} are read"
        )


def iter_records(table: pa.Table) -> Iterator[ClipRecord]:
    """Yield the rows of an index."""
    names = [field.name for field in fields(ClipRecord)]
    for batch in table.to_batches(max_chunksize=4096):
        columns: dict[str, list[Any]] = {name: batch.column(name).to_pylist() for name in names}
        for values in zip(*(columns[name] for name in names), strict=True):
            row = dict(zip(names, values, strict=True))
            for name in ("gop_offsets", "gop_crc32"):
                row[name] = None if row[name] is None else tuple(row[name])
            yield ClipRecord(**row)
