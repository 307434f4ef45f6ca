"""Parquet files from bytes, read by this thread alone.

`pyarrow.parquet.read_table` reads through pools of threads. On a loaded machine one of them can
still hold Python objects when the interpreter ends, which aborts the process after all its work is
done ("terminate called without an active exception"; one run in 60 of a script that does nothing
else). Without the pools there is no such thread, and the CPU time is the same.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq


def read_parquet(data: bytes) -> pa.Table:
    """Return the table of a Parquet file; pyarrow's errors, OSError included, where it is none."""
    with pq.ParquetFile(pa.BufferReader(data), pre_buffer=False) as file:
        return file.read(use_threads=False)
