"""`kprep shard`: from annotation rows and videos to a published split.

Only this module knows the order of things: plan, encode, assemble, publish. Every step's result is
in the journal before the next one relies on it, so that the same command continues after any
interruption.
"""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prep import __version__
from prep.conversion import Conversion, Pool
from prep.conversion_plan import neighbours_of, plan
from prep.errors import KprepError
from prep.ffmpeg_binary import FFmpeg, find_ffmpeg
from prep.format import Manifest, check_new_split_name
from prep.format.layout import WORK_NAME
from prep.links import refuse_links_in
from prep.local_encoders import local_encoders
from prep.open_journal import journal_of
from prep.outcome import Status
from prep.published_split import check_same
from prep.root_lock import file_lock, root_lock
from prep.root_state import (
    check_owner,
    check_places,
    check_still_new,
    existing_manifest,
    forget,
    is_planned,
    missing_folders,
    remove_own_leftovers,
)
from prep.shard_builder import ShardBuilder
from prep.sources import open_listing, open_sources, source_folders
from prep.standing_shards import altered_shards, note_on
from prep.text.plain import plain
from prep.write_errors import write_error

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from prep.journal import Journal
    from prep.options import ShardOptions
    from prep.source import Source


@dataclass
class ShardResult:
    """What a conversion came to: the manifest when the split is published, and the sums."""

    manifest: Manifest | None
    counts: dict[str, int]
    failures: dict[str, int]
    interrupted_by: int = 0
    notes: list[str] = field(default_factory=list)


def shard(options: ShardOptions, encoders: Pool | None = None) -> ShardResult:
    """Convert one split; continue where an earlier run of the same conversion ended.

    `encoders` are workers that have been started already; they are stopped when all is encoded.
    Raises UsageError when the options contradict the root or the earlier run, KprepError when the
    conversion cannot go on (a full disk, no clip at all).
    """
    check_new_split_name(options.split)
    check_places(options)
    if options.storage.local_root is not None:
        refuse_links_in(options.storage.local_root / WORK_NAME)
    ffmpeg = find_ffmpeg()
    work = options.work_root / options.split
    lock_folder = (options.storage.local_root or options.work_root) / WORK_NAME
    existing = existing_manifest(options)
    if existing is not None and options.split in existing.splits and not options.force:
        result = _already_published(options, existing)
        if not work.exists():
            return result
    check_owner(options, work)
    # after a mistake not a folder that a user made: ROOT and --work stay where they were there
    to_remove = [lock_folder, *missing_folders(options.work_root, lock_folder)]
    try:
        result = _hold_locks(options, work, lock_folder, ffmpeg, encoders)
        to_remove = [options.work_root, lock_folder]
        return result
    finally:
        for folder in to_remove:
            with contextlib.suppress(OSError):  # other splits may still be in the making
                folder.rmdir()


def _hold_locks(
    options: ShardOptions,
    work: Path,
    lock_folder: Path,
    ffmpeg: FFmpeg,
    encoders: Pool | None,
) -> ShardResult:
    """Convert while nobody else may; leave nothing behind after a mistake, or when all is done."""
    split_lock = options.work_root / f"{options.split}.lock"
    with (
        file_lock(split_lock, "another kprep is converting this split"),
        root_lock(options.storage, _made(work), lock_folder) as check_lock,
    ):
        try:
            result = _convert_locked(options, work, ffmpeg, check_lock, encoders)
            if result.manifest is not None:
                shutil.rmtree(work)
            return result
        finally:
            if not is_planned(work):
                shutil.rmtree(work, ignore_errors=True)
                for lock in (split_lock, lock_folder / "lock"):
                    lock.unlink(missing_ok=True)


def _made(work: Path) -> Path:
    try:
        for folder in (work / "staged", work / "temporary"):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(f"{error.filename}", error) from error
    return work


def _convert_locked(
    options: ShardOptions,
    work: Path,
    ffmpeg: FFmpeg,
    check_lock: Callable[[], None],
    encoders: Pool | None,
) -> ShardResult:
    """Look again, now that nobody else writes here, and do what is left to do."""
    if options.force:
        forget(options, work)
        _made(work)
    existing = existing_manifest(options)
    if existing is not None and options.split in existing.splits:
        return _already_published(options, existing)
    known_classes = existing.class_names if existing is not None else ()
    listing, notes = open_listing(options, work, known_classes)
    sources = open_sources(options, work)
    # a mistake in sources or workers must not leave a plan behind: that would bind the next command
    with (
        encoders or _pool(options, work, ffmpeg) as pool,
        journal_of(work, options.split) as journal,
    ):
        notes += plan(journal, options, listing, ffmpeg, existing)
        notes += _forget_altered_shards(journal, options)
        result = _convert(options, journal, work, ffmpeg, check_lock, sources, pool)
        result.notes = notes + result.notes
    return result


def _convert(
    options: ShardOptions,
    journal: Journal,
    work: Path,
    ffmpeg: FFmpeg,
    check_lock: Callable[[], None],
    sources: list[Source],
    encoders: Pool,
) -> ShardResult:
    builder = ShardBuilder(options, journal, work, options.storage)
    conversion = Conversion(options, journal, work, sources, builder, encoders)
    interrupted_by = conversion.run()
    notes = [note for source in sources for note in source.notes()]
    result = ShardResult(None, journal.counts(), journal.failures(), interrupted_by, notes)
    if interrupted_by or not conversion.complete():
        return result
    if not result.counts[Status.OK]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in result.failures.items())
        first = plain(next(iter(journal.first_details().values()), ""))
        raise KprepError(
            f"no row of split {options.split} gave a clip, so nothing was published "
            f"({reasons or 'no rows'}){'; the first: ' if first else ''}{first}"
        )
    journal.taken.give_up()
    result.manifest = _publish(options, journal, ffmpeg, check_lock)
    return result


def _pool(options: ShardOptions, work: Path, ffmpeg: FFmpeg) -> Pool:
    encoders = local_encoders(options)
    if options.engine == "dask":
        from prep.dask_pool import DaskPool

        folders = source_folders(options)
        return DaskPool(options.scheduler, work, folders, ffmpeg.sha256, encoders.wall_seconds)
    return encoders


def _forget_altered_shards(journal: Journal, options: ShardOptions) -> list[str]:
    """Have tars built again that an earlier run finished and that are no longer what it wrote."""
    built = {
        (options.split, number): facts
        for number, facts in journal.shards().items()
        if facts["num_clips"]
    }
    faults = altered_shards(options.storage, built, options.workers)
    journal.forget_shards(number for _, number in faults)
    return note_on(faults)


def _publish(
    options: ShardOptions, journal: Journal, ffmpeg: FFmpeg, check_lock: Callable[[], None]
) -> Manifest:
    from prep.publish import publish  # pyarrow is imported while clips are encoded, not before

    tools = {"kprep": __version__, "ffmpeg": ffmpeg.version, "ffmpeg_sha256": ffmpeg.sha256}
    names = tuple(journal.setting("class_names"))
    check_lock()
    remove_own_leftovers(options)
    existing = existing_manifest(options)
    current = existing or Manifest(options.profile, names, {}, {})
    check_still_new(options, current)
    if journal.setting("neighbours") != neighbours_of(existing):
        raise KprepError(
            f"another split of {options.root} was published meanwhile; run the same command again"
        )
    start = Manifest(current.profile, names, current.splits, current.files)
    return publish(options.storage, start, journal, tools, check_lock)


def _already_published(options: ShardOptions, manifest: Manifest) -> ShardResult:
    """Say that there is nothing to do, or that a published split does not become another one."""
    more = check_same(options, manifest)
    note = f"split {options.split} is already published in {options.root}; nothing to do"
    if options.retry:
        note += "; --retry changes no published split: convert into a new root, and merge both"
    outcomes = manifest.splits[options.split].outcomes
    return ShardResult(manifest, outcomes, {}, notes=[note, *more])
