"""Building the tars of a conversion from staged clips, in a process beside the encoders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from prep.conversion import check_fatal
from prep.format import Sidecar, shard_path
from prep.worker_pool import Job, WorkerPool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from prep.journal import Journal, Row
    from prep.options import ShardOptions
    from prep.storage import Storage

_WALL_SECONDS = 24 * 3600.0


class ShardBuilder:
    """Hands complete shards to the tar writer and books what it made."""

    def __init__(
        self, options: ShardOptions, journal: Journal, work: Path, storage: Storage
    ) -> None:
        self.options = options
        self.journal = journal
        self.work = work
        self.storage = storage
        self._labels = {name: index for index, name in enumerate(journal.setting("class_names"))}
        self._pool = WorkerPool("assemble", 1, _WALL_SECONDS, ahead=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.stop()

    def get_ready(self) -> None:
        """Start the tar writer and import what publishes, because a shard will soon be complete.

        Both take a while, which is lost where it comes first or last: the encoders wait then.
        """
        self._pool.start_ahead(1)
        import pyarrow.compute  # noqa: F401 - half of pyarrow's time

        import prep.publish  # noqa: F401

    @property
    def unfinished(self) -> int:
        """Number of shards in the making."""
        return self._pool.unfinished

    def build(self, number: int) -> None:
        """Have the tar of a shard written, all of whose rows are settled."""
        rows = self.journal.shard_rows(number)
        if not rows:  # no clip, no tar; its places stay empty
            self.journal.record_shard(number, {"num_clips": 0}, {})
            return
        values = {
            "root": self.storage.root,
            "options": self.storage.options,
            "path": shard_path(self.options.split, number),
            "work": str(self.work / "temporary"),
            "clips": [self._clip(row) for row in rows],
        }
        self._pool.submit(Job((number, rows), values))

    def book(self, timeout_seconds: float) -> Iterator[list[tuple[int, int]]]:
        """Store what has been built; yield the (row, shard) of staged clips that are lost.

        Waits at most `timeout_seconds` where nothing has been.
        """
        for job, result in self._pool.results(timeout_seconds):
            check_fatal(result)
            number, rows = job.tag
            if "lost" in result:
                yield [(row, number) for row in result["lost"]]
            else:
                self._store(number, rows, result)

    def _store(self, number: int, rows: list[Row], result: dict[str, Any]) -> None:
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
        names = ("bytes", "sha256", "md5", "etag", "num_clips", "index_bytes", "index_sha256")
        self.journal.record_shard(number, {name: result[name] for name in names}, clips)
        for row in rows:  # only now: the tar has them and the journal knows it
            (self.work / "staged" / row.facts["pack"]).unlink(missing_ok=True)

    def _clip(self, row: Row) -> dict[str, Any]:
        """Say where a clip is: in its pack, or, when a shard is built again, in the old tar."""
        built = "entry_offset" in row.facts
        return {
            "row": row.row,
            "key": row.key,
            "file": None if built else str(self.work / "staged" / row.facts["pack"]),
            "offset": row.facts["video_offset" if built else "pack_offset"],
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
            end_seconds=float(row.annotated_end()),
            num_frames=row.facts["num_frames"],
            fps_num=profile.fps.numerator,
            fps_den=profile.fps.denominator,
            width=row.facts["width"],
            height=row.facts["height"],
            source=row.facts["source"],
            profile=profile.name,
            extra=segment.extra,
        )
