"""Parquet files from bytes: read by this thread alone, and none that was made to exhaust memory.

`pyarrow.parquet.read_table` reads through pools of threads. On a loaded machine one of them can
still hold Python objects when the interpreter ends, which aborts the process after all its work is
done ("terminate called without an active exception"; one run in 60 of a script that does nothing
else). Without the pools there is no such thread, and the CPU time is the same.

A thousand million equal rows fit into a few kilobytes of Parquet. So what a file takes in memory is
summed from its footer before a row is read; texts, whose repetition no footer tells, are read as
dictionaries and measured before they are written out. A footer can lie: so one column of one row
group is read at a time, and what it took is counted before the next, which leaves at most one of
them too many.
"""

from __future__ import annotations

import itertools
import sys
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from prep.errors import DatasetError
from prep.text.quantities import size_text

if TYPE_CHECKING:
    from collections.abc import Sequence

ALWAYS_BYTES = 256 << 20  # that any file may take in memory
MOST_EXPANSION = 100  # times the file's own size; indices and ledgers take 2 to 15 times it
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "INT96": 12}
_CODE_BYTES = 4  # of a text in a dictionary


def forgo_pandas() -> None:
    """Keep pyarrow from importing pandas, where it is installed: 0.4 s of CPU time for nothing.

    It does so, once in a process, when the first array is made of Python values. What really needs
    pandas (`to_pandas`) still imports it afterwards.
    """
    if "pandas" in sys.modules:
        return
    finder = _NoPandas()
    sys.meta_path.insert(0, finder)
    try:
        pa.array([0])
    finally:
        sys.meta_path.remove(finder)


class _NoPandas(MetaPathFinder):
    """Finds everything but pandas where all the others look."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name=name)


def read_parquet(
    data: bytes, columns: Sequence[str], where: str, num_rows: int | None = None
) -> pa.Table:
    """Return those of the columns that a Parquet file has, once each.

    Raises pyarrow's errors, OSError included, where it is none; DatasetError, before a row is read,
    where it has other than `num_rows` rows or would take too much memory by its footer, and as soon
    as it does take too much; MemoryError where this process gets no memory to read it.
    """
    try:
        return _read(data, columns, where, num_rows)
    except (MemoryError, OSError) as error:
        if isinstance(error, MemoryError) or "DCtx create failed" in str(error):  # zstd's way
            raise MemoryError(f"{where}: {error}") from error
        raise


def _read(data: bytes, columns: Sequence[str], where: str, num_rows: int | None) -> pa.Table:
    with pq.ParquetFile(pa.BufferReader(data), pre_buffer=False) as file:
        footer, schema = file.metadata, file.schema_arrow
    if num_rows is not None and footer.num_rows != num_rows:
        raise DatasetError(
            f"{where} has {footer.num_rows} rows, the manifest says {num_rows}; run `kprep verify`"
        )
    once = [name for name in columns if schema.get_field_index(name) >= 0]  # -1 also where twice
    schema = pa.schema([schema.field(name) for name in once])
    leaves = [
        number
        for number in range(footer.num_columns)
        if footer.schema.column(number).path.partition(".")[0] in schema.names
    ]
    limit = max(ALWAYS_BYTES, MOST_EXPANSION * len(data))
    _check_size(_claimed_bytes(footer, leaves), limit, len(data), where)
    texts = [footer.schema.column(number).path for number in leaves
             if footer.schema.column(number).physical_type == "BYTE_ARRAY"]  # fmt: skip
    chunks: dict[str, list[pa.Array]] = {name: [] for name in schema.names}
    num_bytes = 0
    with pq.ParquetFile(
        pa.BufferReader(data), metadata=footer, read_dictionary=texts, pre_buffer=False
    ) as file:
        for group, field in itertools.product(range(footer.num_row_groups), schema):
            column = _read_column(file, group, field.name)
            num_bytes += column.nbytes + _text_bytes(column)
            _check_size(num_bytes, limit, len(data), where)
            plain = column if pa.types.is_dictionary(field.type) else _plain(column)
            chunks[field.name] += plain.chunks
    found = [pa.chunked_array(some) if (some := chunks[field.name]) else
             pa.chunked_array([], field.type) for field in schema]  # fmt: skip
    return pa.Table.from_arrays(found, names=schema.names)


def _read_column(file: pq.ParquetFile, group: int, name: str) -> pa.ChunkedArray:
    return file.read_row_group(group, columns=[name], use_threads=False).column(name)


def _claimed_bytes(footer: Any, leaves: Sequence[int]) -> int:
    """Return what the values of some leaf columns take, texts in dictionaries, by the footer."""
    total = 0
    for group in map(footer.row_group, range(footer.num_row_groups)):
        for number in leaves:
            column, described = group.column(number), footer.schema.column(number)
            width = _WIDTHS.get(described.physical_type, _CODE_BYTES)
            if described.physical_type == "FIXED_LEN_BYTE_ARRAY":
                width = described.length
            values = max(column.num_values, group.num_rows)
            total += values * width + max(column.total_uncompressed_size, 0)
    return total


def _text_bytes(column: pa.ChunkedArray) -> int:
    """Return the bytes of a column's texts, each as often as it stands there."""
    if not pa.types.is_dictionary(column.type):
        return 0
    import pyarrow.compute as pc  # slow to import, and only readers need it

    lengths = (pc.binary_length(chunk.dictionary).take(chunk.indices) for chunk in column.chunks)
    return sum(pc.sum(each).as_py() or 0 for each in lengths)


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not pa.types.is_dictionary(column.type):
        return column
    decoded = [chunk.dictionary_decode() for chunk in column.chunks]
    return pa.chunked_array(decoded, column.type.value_type)


def _check_size(num_bytes: int, limit: int, file_bytes: int, where: str) -> None:
    if num_bytes > limit:
        raise DatasetError(
            f"{where} would take {size_text(num_bytes)} of memory, which no real file of "
            f"{size_text(file_bytes)} does; it was made to exhaust memory, so use another copy"
        )
