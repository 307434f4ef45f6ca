"""What the workers that read shards share: the mark that tells the parent how far they are.

A decoder can die, or never end, over a hostile video. Before each clip the worker writes down which
one it begins; the parent reads that when the worker is gone, names the clip, and goes on behind it.
"""

from __future__ import annotations

import os
import signal
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prep.write_errors import write_errors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CPU_SECONDS = 600  # for one clip: a 10-minute full-HD video decodes in about 200
_NO_CLIP = -1
_FORM = struct.Struct("<qq")


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Let SIGPROF end this process if the block takes more CPU time."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def how_it_ended(how: str, cpu_seconds: float) -> str:
    """Say what ended a worker: `how` is that of the pool, such as `signal 27`."""
    if how == f"signal {int(signal.SIGPROF)}":
        return f"more than {cpu_seconds} s of CPU time"
    return f"{how}: killed" if how == f"signal {int(signal.SIGKILL)}" else how


class Mark:
    """A small file: the offset of the clip that is being decoded, and the bytes read so far."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY)
        self._bytes = 0
        self._write(_NO_CLIP)

    def add_bytes(self, count: int) -> None:
        """Book what was read."""
        self._bytes += count
        self._write(_NO_CLIP)

    @contextmanager
    def clip(self, offset: int) -> Iterator[None]:
        """Mark a clip as being decoded; past its CPU time, SIGPROF ends this process."""
        self._write(offset)
        try:
            with cpu_limit(CPU_SECONDS):
                yield
        finally:
            self._write(_NO_CLIP)

    def close(self) -> None:
        os.close(self._file)

    def _write(self, offset: int) -> None:
        os.pwrite(self._file, _FORM.pack(offset, self._bytes), 0)


def new_mark(path: Path) -> None:
    """Make the file of a mark."""
    with write_errors(path):
        path.write_bytes(_FORM.pack(_NO_CLIP, 0))


def read_mark(path: Path) -> tuple[int | None, int]:
    """Return the offset of the clip that is being decoded, None for none, and the bytes read."""
    offset, count = _FORM.unpack(path.read_bytes())
    return None if offset == _NO_CLIP else offset, count
