"""`kprep shard`: from annotation rows and videos to a published split.

Only this module knows the order of things: plan, encode, assemble, publish. Every step's result is
in the journal before the next one relies on it, so that the same command continues after any
interruption.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prep import __version__
from prep.annotations import ClassFolders, KineticsCsv
from prep.conversion import Conversion
from prep.errors import KprepError, UsageError
from prep.ffmpeg_binary import FFmpeg, find_ffmpeg
from prep.folder_source import FolderSource
from prep.format import Manifest, check_split_name, read_index, read_manifest
from prep.format.layout import MANIFEST_PATH, index_path
from prep.journal import Journal
from prep.outcome import Reason, Status
from prep.publish import publish
from prep.storage import Storage, remove_leftovers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from prep.options import ShardOptions

WORK_NAME = ".kprep-work"


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
    listing = _listing(options)
    settings = _settings(options, listing.sha256)
    existing = _existing(options)
    if existing is not None and options.split in existing.splits:
        return _already_published(options, existing, settings)
    work = (options.work or options.root / WORK_NAME) / options.split
    _make_folders(options, work)
    with _lock(work), _journal(work, options.split) as journal:
        notes = _plan(journal, options, listing, settings, ffmpeg, existing)
        source = FolderSource(options.source)
        conversion = Conversion(options, journal, work, source)
        interrupted_by = conversion.run()
        result = ShardResult(None, journal.counts(), journal.failures(), interrupted_by, notes)
        if not interrupted_by and conversion.complete():
            if not result.counts[Status.OK]:
                raise KprepError(
                    f"no row of split {options.split} gave a clip, so nothing was published "
                    f"({_reasons(result.failures)})"
                )
            result.manifest = _publish(options, journal, ffmpeg)
    if result.manifest is not None:
        _clean_up(work)
    return result


def _publish(options: ShardOptions, journal: Journal, ffmpeg: FFmpeg) -> Manifest:
    """Add the split to the root's manifest as it is now: another split may have come meanwhile."""
    tools = {"kprep": __version__, "ffmpeg": ffmpeg.version, "ffmpeg_sha256": ffmpeg.sha256}
    names = tuple(journal.setting("class_names"))
    with _root_lock(options.root):
        remove_leftovers(options.root / options.split)
        current = _existing(options) or Manifest(options.profile, names, {}, {})
        if current.class_names not in ((), names):
            raise KprepError(
                f"{options.root} got other classes while split {options.split} was being made; "
                "convert this split into a new root"
            )
        start = Manifest(current.profile, names, current.splits, current.files)
        return publish(Storage(str(options.root)), start, journal, tools)


def _reasons(failures: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in failures.items()) or "no rows"


def _listing(options: ShardOptions) -> KineticsCsv | ClassFolders:
    if options.annotations is not None:
        return KineticsCsv(options.annotations, options.split)
    if not options.source.is_dir():
        raise UsageError(f"source {options.source} is no folder; give the folder of the videos")
    return ClassFolders(options.source, options.split)


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
    root = options.root
    if not root.exists():
        return None
    if not root.is_dir():
        raise UsageError(f"root {root} is a file; give a folder for the dataset")
    if (root / MANIFEST_PATH).exists():
        manifest = read_manifest(Storage(str(root)))
        if manifest.profile != options.profile:
            different = "; ".join(options.profile.differences(manifest.profile))
            raise UsageError(
                f"root {root} holds a dataset of profile {manifest.profile.name} ({different}); "
                "use that profile or another root"
            )
        return manifest
    ours = {WORK_NAME, options.split, *_begun(root)}
    strange = sorted(path.name for path in root.iterdir() if path.name not in ours)
    if strange or ((root / options.split).exists() and not _begun(root) and options.work is None):
        named = ", ".join(strange[:3] or [options.split]) + (", …" if len(strange) > 3 else "")
        raise UsageError(
            f"root {root} is not empty and no kprep dataset (it holds {named}); give a new folder"
        )
    return None


def _begun(root: Path) -> set[str]:
    """Return the splits that have been begun under the root's own work folder."""
    work = root / WORK_NAME
    return {path.name for path in work.iterdir()} if work.is_dir() else set()


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
    try:
        options.root.mkdir(parents=True, exist_ok=True)
        for name in ("staged", "temporary"):
            (work / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make {error.filename}: {error.strerror}") from error


@contextlib.contextmanager
def _lock(work: Path) -> Iterator[None]:
    """Keep a second run of the same split out."""
    with (work / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another kprep is converting this split (it holds {work}/lock); wait for it to end"
            ) from None
        yield


@contextlib.contextmanager
def _root_lock(root: Path) -> Iterator[None]:
    """Wait until no other split is being published in this root."""
    descriptor = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _journal(work: Path, split: str) -> Iterator[Journal]:
    journal = Journal(work / "journal.sqlite", split)
    try:
        yield journal
    finally:
        journal.close()


def _plan(
    journal: Journal,
    options: ShardOptions,
    listing: KineticsCsv | ClassFolders,
    settings: dict[str, Any],
    ffmpeg: FFmpeg,
    existing: Manifest | None,
) -> list[str]:
    """Make the plan on the first run; on a later one see that it is the same conversion."""
    identity = {**settings, "profile": options.profile.to_json(), "ffmpeg_sha256": ffmpeg.sha256}
    known = journal.setting("identity")
    if known is None:
        taken = _taken_keys(options, existing)
        journal.plan(
            listing,
            seed=options.seed,
            clips_per_shard=settings["clips_per_shard"],
            limit=options.limit,
            classes=options.classes,
            taken_keys=taken,
        )
        if not sum(journal.counts().values()):
            raise UsageError(_nothing_to_do(options, listing))
        journal.set("class_names", _class_names(journal, options, existing))
        journal.set("settings", settings)
        journal.set("identity", identity)  # last: from here on the plan is complete
    elif known != identity:
        changed = [f"{name} was {known.get(name)}, is {value}" for name, value in identity.items()
                   if known.get(name) != value]  # fmt: skip
        raise UsageError(
            f"split {options.split} in {options.root} was begun differently: {'; '.join(changed)}; "
            "repeat the first command, or choose a new root"
        )
    journal.reopen([reason for reason in Reason if reason.retryable or reason in options.retry])
    return _left_out(listing)


def _nothing_to_do(options: ShardOptions, listing: KineticsCsv | ClassFolders) -> str:
    if isinstance(listing, KineticsCsv):
        other = f"; {listing.other_splits} rows are of other splits" if listing.other_splits else ""
        return f"{listing.path} has no row of split {options.split}{other}"
    return f"source {options.source} has no videos" + (
        "" if not options.classes else " of these classes"
    )


def _left_out(listing: KineticsCsv | ClassFolders) -> list[str]:
    if isinstance(listing, ClassFolders) and listing.left_out:
        what = ", ".join(f"{count} {suffix}" for suffix, count in sorted(listing.left_out.items()))
        return [f"left out as no videos by their extension: {what}"]
    if isinstance(listing, KineticsCsv) and listing.other_splits:
        return [f"{listing.other_splits} rows of the list are of other splits"]
    return []


def _taken_keys(options: ShardOptions, existing: Manifest | None) -> frozenset[str]:
    """Return the keys of the other splits: a key is unique in a dataset."""
    if existing is None:
        return frozenset()
    storage = Storage(str(options.root))
    keys: set[str] = set()
    for split in existing.splits:
        path = index_path(split)
        keys.update(read_index(storage.read(path), storage.where(path))["key"].to_pylist())
    return frozenset(keys)


def _class_names(
    journal: Journal, options: ShardOptions, existing: Manifest | None
) -> tuple[str, ...]:
    """Return the class names in label order: the dataset's, those given, or the list's, sorted."""
    found = journal.labels()
    known = options.class_list or (existing.class_names if existing else ()) or tuple(found)
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
