"""Progress of jobs that each take long: the bytes that they have moved, by their marks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from prep.worker_marks import new_mark, read_mark

if TYPE_CHECKING:
    from pathlib import Path


class ByteCount(Protocol):
    """Where bytes are booked."""

    def add(self, count: int) -> None:
        """Book bytes that were read; a negative count takes some back."""
        ...


class JobBytes:
    """Books what running jobs have moved so far, and all of a job once it is done."""

    def __init__(self, progress: ByteCount) -> None:
        self._progress = progress
        self._running: dict[Path, int] = {}
        self._done = self._shown = 0

    def begin(self, mark: Path, num_bytes: int) -> None:
        """Follow a job of so many bytes, which writes its mark there; begun again, from 0."""
        new_mark(mark)
        self._running[mark] = num_bytes

    def end(self, mark: Path) -> None:
        """Count a job as done."""
        self._done += self._running.pop(mark)

    def book(self) -> None:
        """Tell the progress what has come since the last time."""
        moved = (min(read_mark(mark)[1], most) for mark, most in self._running.items())
        now = self._done + sum(moved)
        self._progress.add(now - self._shown)
        self._shown = now
