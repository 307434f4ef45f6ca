"""`kprep shard`: from annotation rows and videos to a published split.

Only this module knows the order of things: plan, encode, assemble, publish. Every step's result is
in the journal before the next one relies on it, so that the same command continues after any
interruption.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prep import __version__
from prep.annotations import kinetics_class_list
from prep.conversion import Conversion, Pool
from prep.errors import KprepError, UsageError
from prep.ffmpeg_binary import FFmpeg, find_ffmpeg
from prep.format import Manifest, check_split_name, index_path, read_index, read_manifest
from prep.format.layout import MANIFEST_PATH
from prep.journal import Journal
from prep.options import WORK_NAME, ShardOptions
from prep.outcome import Reason, Status
from prep.publish import publish
from prep.root_lock import LOCK_NAME, bucket_lock, publish_lock, split_lock
from prep.shard_builder import ShardBuilder
from prep.sources import open_listing, open_sources
from prep.storage import remove_leftovers
from prep.worker_pool import WorkerPool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from prep.annotations import Listing


@dataclass
class ShardResult:
    """What a conversion came to: the manifest when the split is published, and the sums."""

    manifest: Manifest | None
    counts: dict[str, int]
    failures: dict[str, int]
    interrupted_by: int = 0
    notes: list[str] = field(default_factory=list)


def shard(options: ShardOptions) -> ShardResult:
    """Convert one split; continue where an earlier run of the same conversion ended.

    Raises UsageError when the options contradict the root or the earlier run, KprepError when the
    conversion cannot go on (a full disk, no clip at all).
    """
    check_split_name(options.split)
    ffmpeg = find_ffmpeg()
    work = options.work_root / options.split
    if options.force:
        _forget(options, work)
    existing = _existing(options)
    published = existing is not None and options.split in existing.splits
    if not published:
        _make_folders(options, work)
    known_classes = existing.class_names if existing is not None else ()
    listing, notes = open_listing(options, work, known_classes)
    settings = _settings(options, listing.sha256)
    if existing is not None and published:
        result = _already_published(options, existing, settings)
        if work.exists():  # a run was killed between publishing and cleaning up
            with split_lock(work), bucket_lock(options.storage, work):
                pass
            _clean_up(work)
        return result
    with (
        split_lock(work),
        bucket_lock(options.storage, work),
        journal_of(work, options.split) as journal,
    ):
        notes += plan(journal, options, listing, ffmpeg, existing)
        result = _convert(options, journal, work, ffmpeg)
        result.notes = notes + result.notes
    if result.manifest is not None:
        _clean_up(work)
    return result


def _convert(options: ShardOptions, journal: Journal, work: Path, ffmpeg: FFmpeg) -> ShardResult:
    sources = open_sources(options, work)
    builder = ShardBuilder(options, journal, work, options.storage)
    encoders = _pool(options, work, ffmpeg)
    conversion = Conversion(options, journal, work, sources, builder, encoders)
    interrupted_by = conversion.run()
    notes = [note for source in sources for note in source.notes()]
    result = ShardResult(None, journal.counts(), journal.failures(), interrupted_by, notes)
    if interrupted_by or not conversion.complete():
        return result
    if not result.counts[Status.OK]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in result.failures.items())
        raise KprepError(
            f"no row of split {options.split} gave a clip, so nothing was published "
            f"({reasons or 'no rows'})"
        )
    result.manifest = _publish(options, journal, ffmpeg)
    return result


def _pool(options: ShardOptions, work: Path, ffmpeg: FFmpeg) -> Pool:
    wall = options.wall_seconds + 30.0  # the worker's own limit comes first
    if options.engine == "dask":
        from prep.dask_pool import DaskPool

        return DaskPool(options.scheduler, work, ffmpeg.sha256, wall)
    return WorkerPool("encode", options.workers or len(os.sched_getaffinity(0)), wall)


def _publish(options: ShardOptions, journal: Journal, ffmpeg: FFmpeg) -> Manifest:
    """Add the split to the root's manifest as it is now: another split may have come meanwhile."""
    tools = {"kprep": __version__, "ffmpeg": ffmpeg.version, "ffmpeg_sha256": ffmpeg.sha256}
    names = tuple(journal.setting("class_names"))
    storage = options.storage
    with publish_lock(storage):
        if storage.local_root is not None:
            remove_leftovers(storage.local_root / options.split)
        current = _existing(options) or Manifest(options.profile, names, {}, {})
        if current.class_names not in ((), names):
            raise KprepError(
                f"{options.root} got other classes while split {options.split} was being made; "
                "convert this split into a new root"
            )
        start = Manifest(current.profile, names, current.splits, current.files)
        return publish(storage, start, journal, tools)


def _settings(options: ShardOptions, annotations_sha256: str) -> dict[str, Any]:
    """Return what decides the bytes of a split; a run with other settings is another conversion."""
    small = options.profile.short_side_px <= 128
    return {
        "annotations_sha256": annotations_sha256,
        "seed": options.seed,
        "clips_per_shard": options.clips_per_shard or (4000 if small else 1000),
        "limit": options.limit,
        "classes": sorted(options.classes),
        "min_seconds": options.min_seconds,
    }


def _existing(options: ShardOptions) -> Manifest | None:
    """Return the manifest of the root, None for a new one; refuse a root that is something else."""
    storage, root = options.storage, options.storage.local_root
    if root is not None:
        if not root.exists():
            return None
        if not root.is_dir():
            raise UsageError(f"root {root} is a file; give a folder for the dataset")
    if storage.exists(MANIFEST_PATH):
        manifest = read_manifest(storage)
        if manifest.profile != options.profile:
            different = "; ".join(options.profile.differences(manifest.profile))
            raise UsageError(
                f"root {options.root} holds a dataset of profile {manifest.profile.name} "
                f"({different}); use that profile or another root"
            )
        return manifest
    strange = _strange(options)
    if strange:
        named = ", ".join(strange[:3]) + (", …" if len(strange) > 3 else "")
        raise UsageError(
            f"root {options.root} is not empty and no kprep dataset (it holds {named}); "
            "give a new folder"
        )
    return None


def _strange(options: ShardOptions) -> list[str]:
    """Return the names in a root without a manifest that no conversion of ours has begun."""
    work, root = options.work_root, options.storage.local_root
    begun = {path.name for path in work.iterdir()} if work.is_dir() else set()
    if root is not None:
        names = {path.name for path in root.iterdir()}
    else:
        names = {info.path.split("/")[0] for info in options.storage.list()}
    return sorted(names - begun - {WORK_NAME, LOCK_NAME})


def _forget(options: ShardOptions, work: Path) -> None:
    """Throw an unfinished conversion of this split away; refuse anything that is not one."""
    existing = _existing(options)
    if existing is not None and options.split in existing.splits:
        raise UsageError(
            f"split {options.split} of {options.root} is published; --force only throws away "
            "unfinished work"
        )
    if not (work / "journal.sqlite").exists():
        return
    with split_lock(work):
        for info in list(options.storage.list(options.split)):
            options.storage.delete(info.path)
        shutil.rmtree(work)


def _already_published(
    options: ShardOptions, manifest: Manifest, settings: dict[str, Any]
) -> ShardResult:
    published = manifest.splits[options.split]
    different = [
        f"{name}: {published.settings.get(name)}, now {value}"
        for name, value in settings.items()
        if published.settings.get(name) != value
    ]
    if different:
        raise UsageError(
            f"split {options.split} of {options.root} is published and never changes "
            f"({'; '.join(different)}); convert into a new root"
        )
    note = f"split {options.split} is already published in {options.root}; nothing to do"
    return ShardResult(manifest, published.outcomes, {}, notes=[note])


def _make_folders(options: ShardOptions, work: Path) -> None:
    local = options.storage.local_root
    folders = [work / "staged", work / "temporary", *([local] if local else [])]
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make {error.filename}: {error.strerror}") from error


@contextlib.contextmanager
def journal_of(work: Path, split: str) -> Iterator[Journal]:
    """Open the journal of a split for the length of a block."""
    path = work / "journal.sqlite"
    try:
        journal = Journal(path, split)
        try:
            yield journal
        finally:
            journal.close()
    except sqlite3.Error as error:
        raise KprepError(
            f"{path} cannot be written ({error}); make room, then run the same command again"
        ) from error


def plan(
    journal: Journal,
    options: ShardOptions,
    listing: Listing,
    ffmpeg: FFmpeg,
    existing: Manifest | None,
) -> list[str]:
    """Make the plan on the first run; on a later one see that it is the same conversion.

    Returns what the list has to say. Raises UsageError when it is another conversion.
    """
    settings = _settings(options, listing.sha256)
    identity = {**settings, "profile": options.profile.to_json(), "ffmpeg_sha256": ffmpeg.sha256}
    known = journal.setting("identity")
    if known is None:
        journal.forget_plan()
        journal.plan(
            listing,
            seed=options.seed,
            clips_per_shard=settings["clips_per_shard"],
            limit=options.limit,
            classes=options.classes,
            taken_keys=_taken_keys(options, existing),
        )
        if not sum(journal.counts().values()):
            raise UsageError(_nothing_to_do(options, listing))
        journal.set("class_names", _class_names(journal, options, existing))
        journal.set("settings", settings)
        journal.set("identity", identity)  # last: from here on the plan is complete
    elif known != identity:
        changed = "; ".join(
            f"{name} was {known.get(name)}, is {value}"
            for name, value in identity.items()
            if known.get(name) != value
        )
        raise UsageError(
            f"split {options.split} in {options.root} was begun differently: {changed}; repeat the "
            "first command, choose a new root, or throw the unfinished work away with --force"
        )
    journal.reopen([reason for reason in Reason if reason.retryable or reason in options.retry])
    return list(listing.notes)


def _nothing_to_do(options: ShardOptions, listing: Listing) -> str:
    wanted = " of these classes" if options.classes else ""
    other = f"; {listing.other_splits} rows are of other splits" if listing.other_splits else ""
    if listing.path.is_dir() and not options.classes:
        return f"source {listing.path} has no videos"
    return f"{listing.path} has no row of split {options.split}{wanted}{other}"


def _taken_keys(options: ShardOptions, existing: Manifest | None) -> frozenset[str]:
    """Return the keys of the other splits: a key is unique in a dataset."""
    keys: set[str] = set()
    for split in existing.splits if existing else ():
        path = index_path(split)
        table = read_index(options.storage.read(path), options.storage.where(path))
        keys.update(str(key) for key in table["key"].to_pylist())
    return frozenset(keys)


def _class_names(
    journal: Journal, options: ShardOptions, existing: Manifest | None
) -> tuple[str, ...]:
    """Return the class names in label order: the dataset's, those given, or the list's, sorted."""
    found = journal.labels()
    listed = tuple(kinetics_class_list(found))
    known = options.class_list or (existing.class_names if existing else ()) or listed
    if existing and existing.class_names and known != existing.class_names:
        raise UsageError(f"--class-list differs from the classes of {options.root}; leave it out")
    for label in found:
        if label not in known:
            row = journal.first_with_label(label)
            raise UsageError(
                f"label {label!r} (row {row} of the list) is not among the {len(known)} classes of "
                f"{'--class-list' if options.class_list else options.root}; correct the list, or "
                "convert into a new root"
            )
    return tuple(known)


def _clean_up(work: Path) -> None:
    """Remove what only an unfinished conversion needs."""
    shutil.rmtree(work)
    with contextlib.suppress(OSError):  # other splits may still be in the making
        work.parent.rmdir()
