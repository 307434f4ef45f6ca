"""`kprep shard --dry-run`: what a conversion would read, write and take, from a measured sample."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from prep.conversion import encode_job
from prep.conversion_plan import plan
from prep.ffmpeg_binary import find_ffmpeg
from prep.folder_source import FolderSource
from prep.open_journal import journal_of
from prep.pending_rows import JournalRows
from prep.remote_sources import MirrorSource
from prep.root_state import check_places, existing_manifest
from prep.sources import open_listing, open_sources
from prep.temporary import temporary_folder
from prep.worker_pool import Job, WorkerPool, usable_cores

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prep.journal import Journal
    from prep.options import ShardOptions
    from prep.source import Candidate, Offer, Source
from prep.text.plain import plain

_SAMPLE_CLIPS = 8


@dataclass(frozen=True)
class Estimate:
    """What a conversion would come to. Without a sampled clip its time and disk are unknown.

    `expected_clips` are the pending rows that a folder has files for, or all of them where a
    remote source is asked. `refused` are the rows that fail by the list alone, by reason: how many,
    and what is wrong with the first. `archives` are the mirror's, with bytes where it tells them.
    """

    num_rows: int
    refused: dict[str, tuple[int, str]]
    expected_clips: int
    num_shards: int
    workers: int
    sampled: int
    seconds_per_clip: float
    bytes_per_clip: float
    archives: tuple[tuple[str, int | None], ...]
    notes: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Time of encoding with all workers busy."""
        return self.seconds_per_clip * self.expected_clips

    @property
    def output_bytes(self) -> float:
        """Bytes of the finished split."""
        return self.bytes_per_clip * self.expected_clips

    @property
    def peak_bytes(self) -> float:
        """Most that root and work folder hold at a time: the split once, and one shard twice."""
        return self.output_bytes * (1 + 1 / max(1, self.num_shards))

    @property
    def network_bytes(self) -> int:
        """Bytes of the archives whose size is known."""
        return sum(size or 0 for _, size in self.archives)


def estimate(options: ShardOptions) -> Estimate:
    """Plan in a temporary folder and encode a few clips; nothing of it stays."""
    with temporary_folder("kprep-dry-run-") as name:
        work = Path(name)
        for folder in ("staged", "temporary"):
            (work / folder).mkdir()
        check_places(options)
        existing = existing_manifest(options)
        options = dataclasses.replace(options, work=work)
        known_classes = existing.class_names if existing is not None else ()
        listing, notes = open_listing(options, work, known_classes)
        with journal_of(work, options.split) as journal:
            notes += plan(journal, options, listing, find_ffmpeg(), existing)
            sources = open_sources(options, work)
            return _measure(options, journal, work, sources, tuple(notes))


def _measure(
    options: ShardOptions,
    journal: Journal,
    work: Path,
    sources: list[Source],
    notes: tuple[str, ...],
) -> Estimate:
    workers = options.workers or usable_cores()
    offers = _sample(journal, sources)
    begun = time.monotonic()
    made: list[int] = []
    with WorkerPool("encode", workers, options.wall_seconds) as pool:
        for offer in offers:
            pool.submit(Job(None, encode_job(options, work, offer)))
        while pool.unfinished:
            made += [
                result["video_bytes"] for _, result in pool.results(0.1) if "video_bytes" in result
            ]
    elapsed = time.monotonic() - begun
    for offer in offers:
        offer.release()
    details = journal.first_details()
    mirrors = [source for source in sources if isinstance(source, MirrorSource)]
    return Estimate(
        num_rows=sum(journal.counts().values()),
        refused={
            reason: (count, plain(details.get(reason, "")))
            for reason, count in journal.failures().items()
        },
        expected_clips=_expected(journal, sources),
        num_shards=journal.planned_shards(),
        workers=workers,
        sampled=len(made),
        seconds_per_clip=elapsed / len(made) if made else 0.0,
        bytes_per_clip=sum(made) / len(made) if made else 0.0,
        archives=tuple(entry for source in mirrors for entry in source.mirror.archive_sizes()),
        notes=notes,
    )


def _sample(journal: Journal, sources: list[Source]) -> list[Offer]:
    """Take the first offers with files of the first source that has any."""
    for source in sources:
        rows = _rows(journal, source.name)
        found = (offer for offer in source.offers(rows) if _has_file(offer.candidates))
        sample = list(islice(found, _SAMPLE_CLIPS))
        if sample:
            return sample
    return []


def _rows(journal: Journal, source: str = "") -> JournalRows:
    return JournalRows(journal, source, lambda: None, lambda: True)


def _expected(journal: Journal, sources: list[Source]) -> int:
    rows = _rows(journal)
    folders = [source for source in sources if isinstance(source, FolderSource)]
    if len(folders) < len(sources):
        return journal.counts()["pending"]
    return sum(
        any(
            row.segment is not None and _has_file(folder.candidates(row.segment, rows))
            for folder in folders
        )
        for row in journal.pending()
    )


def _has_file(candidates: Iterable[Candidate]) -> bool:
    """Return whether any is there: a list of paths names files that a folder may not have."""
    return any(one.path.exists() for one in candidates)
