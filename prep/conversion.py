"""The encoding and assembling of one planned split, from the journal's point of view."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING, Any

from prep.errors import KprepError
from prep.format import Sidecar, shard_path
from prep.outcome import Outcome, Reason, Status
from prep.progress import Progress
from prep.publish import annotated_end
from prep.worker_pool import Job, WorkerPool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from prep.folder_source import FolderSource
    from prep.journal import Journal, Row
    from prep.options import ShardOptions


_COMMIT_ROWS = 256


class Conversion:
    """The encoding and assembling of one planned split."""

    def __init__(
        self, options: ShardOptions, journal: Journal, work: Path, source: FolderSource
    ) -> None:
        self.options = options
        self.journal = journal
        self.work = work
        self.source = source
        self._signal = 0
        self._labels = {name: index for index, name in enumerate(journal.setting("class_names"))}
        self._pending = journal.pending_by_shard()
        counts = journal.counts()
        total = sum(counts.values())
        self.progress = Progress(total, done=total - counts[Status.PENDING])

    def run(self) -> int:
        """Encode what is pending and assemble what is complete; return the signal that ended it."""
        workers = self.options.workers or len(os.sched_getaffinity(0))
        wall = self.options.wall_seconds + 30.0  # the worker's own limit comes first
        with (
            _signals(self),
            WorkerPool("encode", workers, wall) as encoders,
            WorkerPool("assemble", 1, 24 * 3600.0) as assembler,
        ):
            try:
                self._settle_known(assembler)
                while self._encode(encoders, assembler) and not self._signal:
                    pass
                self._drain(encoders, assembler)
            finally:
                self.journal.commit()
                self.progress.close()
        return self._signal

    def complete(self) -> bool:
        """Whether every planned shard stands, so that the split can be published."""
        return len(self.journal.shards()) == self.journal.planned_shards()

    def interrupt(self, number: int) -> None:
        """Take no new work; a second signal ends at once."""
        if self._signal:
            raise KeyboardInterrupt
        self._signal = number

    def _settle_known(self, assembler: WorkerPool) -> None:
        """Assemble shards whose rows were all settled before this run began."""
        built = self.journal.shards()
        for number in range(self.journal.planned_shards()):
            if number not in built:
                self._assemble_if_complete(number, assembler)

    def _encode(self, encoders: WorkerPool, assembler: WorkerPool) -> bool:
        """Go through the pending rows once; return whether any was there."""
        any_pending = False
        for row in self.journal.pending():
            if self._signal:
                break
            any_pending = True
            self._submit(row, encoders, assembler)
            if row.row % _COMMIT_ROWS == 0:  # rows without a file come in long runs
                self.journal.commit()
            while not encoders.wants_jobs and not self._signal:
                self._book(encoders, assembler)
        self._drain(encoders, assembler)
        return any_pending

    def _drain(self, encoders: WorkerPool, assembler: WorkerPool) -> None:
        while encoders.unfinished or assembler.unfinished:
            self._book(encoders, assembler)

    def _submit(self, row: Row, encoders: WorkerPool, assembler: WorkerPool) -> None:
        if row.segment is None:
            raise ValueError(f"row {row.row} is pending without a segment")
        candidates = self.source.candidates(row.segment)
        if not candidates:
            self._settle(row, Outcome(Status.FAILED, Reason.MISSING), None, assembler)
            return
        values = {
            "profile": self.options.profile.to_json(),
            "cpu_seconds": self.options.cpu_seconds,
            "wall_seconds": self.options.wall_seconds,
            "min_seconds": self.options.min_seconds,
            "work": str(self.work),
            "shard": row.shard,
            "candidates": [
                {
                    "path": str(candidate.path),
                    "source": candidate.source,
                    "start": candidate.start_seconds,
                    "end": candidate.end_seconds,
                }
                for candidate in candidates
            ],
        }
        encoders.submit(Job(row, values))

    def _book(self, encoders: WorkerPool, assembler: WorkerPool) -> None:
        """Store what has been answered by now."""
        for job, result in encoders.results(0.05):
            self._settle(job.tag, *_outcome(result), assembler)
            self.journal.commit()
        for job, result in assembler.results(0.0):
            self._store_shard(job.tag, result)

    def _settle(
        self, row: Row, outcome: Outcome, facts: dict[str, Any] | None, assembler: WorkerPool
    ) -> None:
        self.journal.record(row.row, outcome, facts)
        self.progress.advance(failed=outcome.status == Status.FAILED)
        if row.shard is not None:
            self._pending[row.shard] -= 1
            self._assemble_if_complete(row.shard, assembler)

    def _assemble_if_complete(self, number: int, assembler: WorkerPool) -> None:
        if self._pending[number] or self.journal.unfinished_rows(
            number, finish=self.options.finish
        ):
            return
        rows = self.journal.shard_rows(number)
        target = self.options.root / shard_path(self.options.split, number)
        if not rows:  # no clip, no tar; its places stay empty
            self.journal.record_shard(number, {"num_clips": 0}, {})
            return
        clips = [self._clip(row) for row in rows]
        assembler.submit(Job((number, rows), {"target": str(target), "clips": clips}))

    def _clip(self, row: Row) -> dict[str, Any]:
        in_tar = (
            "entry_offset" in row.facts
        )  # a shard that is built again has its clips in the old tar
        place = self.options.root / shard_path(self.options.split, row.shard or 0)
        staged = self.work / "staged" / row.facts["pack"]
        return {
            "row": row.row,
            "key": row.key,
            "file": str(place if in_tar else staged),
            "offset": row.facts["video_offset" if in_tar else "pack_offset"],
            "bytes": row.facts["video_bytes"],
            "content_hash": row.facts["content_hash"],
            "sidecar": self._sidecar(row).to_bytes().decode("ascii"),
        }

    def _sidecar(self, row: Row) -> Sidecar:
        segment, profile = row.segment, self.options.profile
        if segment is None or row.key is None:
            raise ValueError(f"row {row.row} has a clip but no segment")
        return Sidecar(
            key=row.key,
            video_id=segment.video_id,
            split=segment.split,
            label=segment.label or "",
            label_index=self._labels.get(segment.label or "", -1),
            start_seconds=float(segment.start_seconds),
            end_seconds=float(annotated_end(row)),
            num_frames=row.facts["num_frames"],
            fps_num=profile.fps.numerator,
            fps_den=profile.fps.denominator,
            width=row.facts["width"],
            height=row.facts["height"],
            source=row.facts["source"],
            profile=profile.name,
            extra=segment.extra,
        )

    def _store_shard(self, tag: tuple[int, list[Row]], result: dict[str, Any]) -> None:
        number, rows = tag
        _check_fatal(result)
        if "lost" in result:  # staged bytes are gone: these rows are encoded again
            for row in result["lost"]:
                self.journal.record(row, Outcome(Status.PENDING))
                self.progress.retreat()
            self._pending[number] += len(result["lost"])
            self.journal.commit()
            return
        places = {key: place for key, *place in result["places"]}
        clips = {}
        for row in rows:
            entry_offset, entry_bytes, video_offset = places[str(row.key)]
            clips[row.row] = {
                **row.facts,
                "entry_offset": entry_offset,
                "entry_bytes": entry_bytes,
                "video_offset": video_offset,
            }
        facts = {name: result[name] for name in ("bytes", "sha256", "md5", "num_clips")}
        self.journal.record_shard(number, facts, clips)
        for row in rows:  # only now: the tar has them and the journal knows it
            (self.work / "staged" / row.facts["pack"]).unlink(missing_ok=True)


def _outcome(result: dict[str, Any]) -> tuple[Outcome, dict[str, Any] | None]:
    _check_fatal(result)
    if "crashed" in result:
        return Outcome(Status.FAILED, Reason.CRASHED, result["crashed"]), None
    if "stalled" in result:
        return Outcome(Status.FAILED, Reason.STALLED, result["stalled"]), None
    if result["status"] == "ok":
        facts = {name: value for name, value in result.items() if name not in ("status", "detail")}
        return Outcome(Status.OK, None, result["detail"]), facts
    return Outcome(Status.FAILED, Reason(result["reason"]), result["detail"]), None


def _check_fatal(result: dict[str, Any]) -> None:
    if "fatal" in result:
        raise KprepError(f"{result['fatal']}; make room, then run the same command again")
    if "error" in result:
        raise KprepError(f"a worker failed; this is a fault in kprep:\n{result['error']}")


@contextlib.contextmanager
def _signals(conversion: Conversion) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the run after the clips in flight."""

    def handler(number: int, _: object) -> None:
        conversion.interrupt(number)

    try:
        previous = {
            number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)
        }
    except ValueError:  # not the main thread: the caller's signals are not ours
        previous = {}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
