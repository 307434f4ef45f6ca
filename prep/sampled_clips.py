"""Clips to look at: their bytes are read and checked here, and drawn by worker processes.

A decoder can die, or never end, over a hostile video: that costs the one clip its picture.
"""

from __future__ import annotations

import base64
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prep.clip_sprite import Sprite
from prep.errors import StorageError, error_from_text
from prep.temporary import temporary_folder
from prep.worker_marks import how_it_ended
from prep.worker_pool import Job, WorkerPool, usable_cores

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from prep.storage import Storage

FRAMES_A_CLIP = 12
_MOST_BYTES = 1 << 26  # of one clip that is only looked at; some twenty lie on the disk at a time
_CPU_SECONDS = 60  # of drawing one clip: few bytes can decode for hours
_WALL_SECONDS = 20.0 * _CPU_SECONDS  # of a clip that waits for something; a loaded machine is slow
_THREADS = 8
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class SampledClip:
    """A clip to look at: its row of the index, and its picture or what is wrong with it."""

    split: str
    row: dict[str, Any]
    sprite: Sprite | None
    problem: str = ""


def look_at_clips(
    storage: Storage,
    rows: Sequence[tuple[str, dict[str, Any]]],
    progress: Callable[[int, int], None],
) -> list[SampledClip]:
    """Read and draw clips, given as split and row of its index; return them in that order.

    Raises StorageError where a store cannot be reached, or the temporary directory is full.
    """
    count = usable_cores()
    with (
        temporary_folder("kprep-report-") as folder,
        ThreadPoolExecutor(_THREADS) as threads,
        WorkerPool("draw_clip", count, _WALL_SECONDS, ahead=1) as pool,
    ):
        looks = _Looks(storage, rows, Path(folder), pool, progress)
        for first in range(0, len(rows), _THREADS):
            while not pool.wants_jobs:  # so that few clips are on the disk at a time
                looks.book()
            for number in threads.map(looks.fetch, range(first, min(first + _THREADS, len(rows)))):
                looks.draw(number)
        while pool.unfinished:
            looks.book()
    return [looks.found[number] for number in range(len(rows))]


@dataclass
class _Looks:
    """The clips under way; `found` has those that are done, by their number."""

    storage: Storage
    rows: Sequence[tuple[str, dict[str, Any]]]
    folder: Path
    pool: WorkerPool
    progress: Callable[[int, int], None]
    found: dict[int, SampledClip] = field(default_factory=dict)

    def fetch(self, number: int) -> tuple[int, str]:
        """Put a clip's bytes into a file; return its number, and what is wrong with the clip."""
        row = self.rows[number][1]
        if row["video_bytes"] > _MOST_BYTES:
            return number, "is too large to be shown"
        start = row["video_offset"]
        try:
            data = self.storage.read_range(row["shard"], start, start + row["video_bytes"])
        except StorageError as error:
            # a store out of reach ends the report; a shard that is missing or short does not
            cause = error.__cause__
            if self.storage.local_root is None and not isinstance(cause, FileNotFoundError | None):
                raise
            return number, f"cannot be read from {row['shard']}"
        if zlib.crc32(data) != row["crc32"]:
            return number, "is damaged: its crc32 differs from the index"
        self._stage(number, data)
        return number, ""

    def _stage(self, number: int, data: memoryview) -> None:
        try:
            self._file(number).write_bytes(data)
        except OSError as error:
            raise StorageError(
                f"{self.folder.parent} cannot hold the clips that are to be drawn "
                f"({error.strerror}); set TMPDIR to a folder with more room"
            ) from error

    def draw(self, fetched: tuple[int, str]) -> None:
        """Have a clip drawn that was fetched."""
        number, problem = fetched
        if problem:
            self._done(number, None, problem)
            return
        values = {
            "video": str(self._file(number)),
            "num_frames": self.rows[number][1]["num_frames"],
            "most": FRAMES_A_CLIP,
            "cpu_seconds": _CPU_SECONDS,
        }
        self.pool.submit(Job(number, values, attempts=1))  # another try would end like the first

    def book(self) -> None:
        """Take what the workers have answered by now."""
        for job, result in self.pool.results(_POLL_SECONDS):
            self._file(job.tag).unlink()
            if "data" in result:
                sprite = Sprite(**{**result, "data": base64.b64decode(result["data"])})
                self._done(job.tag, sprite, "")
            else:
                self._done(job.tag, None, _problem(result))

    def _file(self, number: int) -> Path:
        return self.folder / str(number)

    def _done(self, number: int, sprite: Sprite | None, problem: str) -> None:
        self.found[number] = SampledClip(*self.rows[number], sprite, problem)
        self.progress(len(self.found), len(self.rows))


def _problem(result: dict[str, Any]) -> str:
    if "problem" in result:
        return str(result["problem"])
    if "crashed" in result:
        how = how_it_ended(result["crashed"], _CPU_SECONDS)
    elif "stalled" in result:
        how = result["stalled"]
    elif "raised" in result:
        how = str(error_from_text(result["raised"]))
    else:
        how = result["error"].strip().splitlines()[-1]
    return f"could not be decoded ({how})"
