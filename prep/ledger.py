"""The ledger: `ledger/<split>.parquet`, one row per annotation row, whose counts always add up."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from prep.errors import DatasetError
from prep.outcome import Status
from prep.parquet import read_parquet
from prep.text.plain import storable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from prep.journal import Row

SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("key", pa.string()),
        pa.field("video_id", pa.string()),
        pa.field("start_seconds", pa.float64()),
        pa.field("end_seconds", pa.float64()),
        pa.field("label", pa.string()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string(), nullable=False),
        pa.field("source", pa.string()),
        pa.field("seconds", pa.float64()),
        pa.field("short", pa.bool_()),
    ]
)
_ROWS_A_GROUP = 20_000


def write_ledger(rows: Iterable[Row]) -> bytes:
    """Return the Parquet file of the ledger."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, SCHEMA, compression="zstd") as writer:
        for group in _groups(rows):
            writer.write_table(pa.Table.from_pylist(group, schema=SCHEMA))
    return sink.getvalue()


def write_ledger_table(table: pa.Table) -> bytes:
    """Return the Parquet file of a ledger that is a table already; equal rows, equal bytes."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, SCHEMA, compression="zstd") as writer:
        for start in range(0, table.num_rows, _ROWS_A_GROUP):
            group = table.slice(start, _ROWS_A_GROUP).combine_chunks()
            writer.write_table(group)
    return sink.getvalue()


def read_ledger(data: bytes, where: str, num_rows: int | None = None) -> pa.Table:
    """Parse a ledger, of `num_rows` rows where the manifest says how many.

    Raises DatasetError, which names `where`, when it is not one, or one that exhausts memory.
    """
    try:
        table = read_parquet(data, SCHEMA.names, where, num_rows)
        table = table.select(SCHEMA.names).cast(SCHEMA)
        table.validate(full=True)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise DatasetError(f"{where} is not a ledger: {error}") from error
    import pyarrow.compute as pc  # slow to import, and only readers need it

    strange = set(pc.unique(table["status"]).to_pylist()) - set(Status)
    if strange:
        raise DatasetError(f"{where} is not a ledger: it has the status {min(map(repr, strange))}")
    return table


def _groups(rows: Iterable[Row]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    for row in rows:
        group.append(_values(row))
        if len(group) == _ROWS_A_GROUP:
            yield group
            group = []
    if group:
        yield group


def _values(row: Row) -> dict[str, Any]:
    segment = row.segment
    return {
        "row": row.row,
        "key": row.key,
        "video_id": segment and storable(segment.video_id),
        "start_seconds": segment and segment.start_seconds,
        "end_seconds": segment and segment.end_seconds,
        "label": segment and segment.label,
        "status": str(row.outcome.status),
        "reason": row.outcome.reason and str(row.outcome.reason),
        "detail": storable(row.outcome.detail),
        "source": row.facts.get("source"),
        "seconds": row.facts.get("seconds"),
        "short": row.facts.get("short"),
    }
