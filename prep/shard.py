"""`kprep shard`: from annotation rows and videos to a published split.

Only this module knows the order of things: plan, encode, assemble, publish. Every step's result is
in the journal before the next one relies on it, so that the same command continues after any
interruption.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prep import __version__
from prep.annotation_labels import kinetics_class_list, without_case
from prep.conversion import Conversion, Pool
from prep.errors import KprepError, UsageError
from prep.ffmpeg_binary import FFmpeg, find_ffmpeg
from prep.format import Manifest, check_new_split_name
from prep.format.layout import WORK_NAME
from prep.journal import Journal
from prep.journal_reader import JOURNAL_NAME
from prep.local_encoders import local_encoders
from prep.local_files import refuse_links_in
from prep.outcome import Reason, Status
from prep.root_lock import file_lock, root_lock
from prep.root_state import (
    check_owner,
    check_places,
    check_still_new,
    existing_manifest,
    forget,
    is_planned,
    remove_leftovers,
)
from prep.shard_builder import ShardBuilder
from prep.sources import open_listing, open_sources, source_folders
from prep.standing_shards import altered_shards, note_on
from prep.text.plain import plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prep.annotations import Listing
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
    try:
        return _hold_locks(options, work, lock_folder, ffmpeg, encoders)
    finally:
        for folder in (options.work_root, lock_folder):
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
        raise UsageError(f"cannot make {error.filename}: {error.strerror}") from error
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
        first = next(iter(first_details(journal).values()), "")
        raise KprepError(
            f"no row of split {options.split} gave a clip, so nothing was published "
            f"({reasons or 'no rows'}){'; the first: ' if first else ''}{first}"
        )
    journal.taken.give_up()
    result.manifest = _publish(options, journal, ffmpeg, check_lock)
    return result


def first_details(journal: Journal) -> dict[str, str]:
    """Return, for each reason that rows failed for, what the first of them with a detail says."""
    found: dict[str, str] = {}
    for row in journal.all_rows() if journal.failures() else ():
        if row.outcome.reason is not None and row.outcome.detail:
            found.setdefault(str(row.outcome.reason), plain(row.outcome.detail))
    return found


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
    remove_leftovers(options)
    existing = existing_manifest(options)
    current = existing or Manifest(options.profile, names, {}, {})
    check_still_new(options, current)
    if journal.setting("neighbours") != _neighbours(existing):
        raise KprepError(
            f"another split of {options.root} was published meanwhile; run the same command again"
        )
    start = Manifest(current.profile, names, current.splits, current.files)
    return publish(options.storage, start, journal, tools, check_lock)


def _settings(options: ShardOptions, annotations_sha256: str) -> dict[str, Any]:
    """Return what decides the bytes of a split; a run with other settings is another conversion."""
    return {
        "annotations_sha256": annotations_sha256,
        "seed": options.seed,
        "clips_per_shard": options.clips_per_shard or options.profile.usual_clips_per_shard,
        "limit": options.limit,
        "classes": sorted(options.classes),
        "min_seconds": options.min_seconds,
    }


def _already_published(options: ShardOptions, manifest: Manifest) -> ShardResult:
    """Say that there is nothing to do, or that a published split does not become another one."""
    published = manifest.splits[options.split]
    sha256 = str(published.settings.get("annotations_sha256"))
    different = [
        f"{name}: {published.settings.get(name)}, now {value}"
        for name, value in _settings(options, sha256).items()
        if published.settings.get(name) != value
    ]
    if different:
        raise UsageError(
            f"split {options.split} of {options.root} is published and never changes "
            f"({'; '.join(different)}); convert into a new root"
        )
    note = f"split {options.split} is already published in {options.root}; nothing to do"
    if options.retry:
        note += "; --retry changes no published split: convert into a new root, and merge both"
    return ShardResult(manifest, published.outcomes, {}, notes=[note])


@contextlib.contextmanager
def journal_of(work: Path, split: str) -> Iterator[Journal]:
    """Open the journal of a split for the length of a block.

    Raises KprepError where it is not what was written to it, or cannot be written now.
    """
    path = work / JOURNAL_NAME
    try:
        with contextlib.closing(Journal(path, split)) as journal:
            if damage := journal.damage():
                raise sqlite3.DatabaseError(damage)
            yield journal
    except sqlite3.OperationalError as error:
        raise KprepError(
            f"{path} cannot be written ({error}); see that there is room and that the disk is "
            "sound, then run the same command again"
        ) from error
    except sqlite3.Error as error:
        raise KprepError(
            f"{path} is damaged ({error}), so the unfinished work on split {split} is lost; begin "
            f"anew with --force, and if that is refused, remove {work} and the split's folder first"
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
    class_list = list(options.class_list) if options.class_list else None
    identity = {
        **settings,
        "class_list": class_list,
        "profile": options.profile.to_json(),
        "ffmpeg_sha256": ffmpeg.sha256,
    }
    known = journal.setting("identity")
    if known is not None and known != identity:
        changed = "; ".join(
            f"{name} was {known.get(name)}, is {value}"
            for name, value in identity.items()
            if known.get(name) != value
        )
        raise UsageError(
            f"split {options.split} in {options.root} was begun differently: {changed}; repeat the "
            "first command, choose a new root, or throw the unfinished work away with --force"
        )
    if known is None or not _fits_neighbours(journal, options, existing):
        _plan_anew(journal, options, listing, existing, settings)
        journal.set("identity", identity)  # last: from here on the plan is complete
    journal.use_sources(list(options.sources))
    journal.reopen(_reasons_to_retry(options))
    return list(listing.notes)


def _plan_anew(
    journal: Journal,
    options: ShardOptions,
    listing: Listing,
    existing: Manifest | None,
    settings: dict[str, Any],
) -> None:
    journal.forget_plan()
    journal.set("root", options.root)
    journal.plan(
        listing,
        seed=options.seed,
        clips_per_shard=settings["clips_per_shard"],
        limit=options.limit,
        classes=options.classes,
        taken_keys=_taken_keys(options, existing),
    )
    _check_classes(options, journal.labels())
    if not sum(journal.counts().values()):
        raise UsageError(_nothing_to_do(options, listing))
    journal.set("class_names", _class_names(journal, options, existing))
    journal.set("neighbours", _neighbours(existing))
    journal.set("settings", settings)


def _neighbours(existing: Manifest | None) -> dict[str, str]:
    """Return the fingerprints of the splits that are published already, by name."""
    return {name: split.fingerprint for name, split in existing.splits.items()} if existing else {}


def _fits_neighbours(journal: Journal, options: ShardOptions, existing: Manifest | None) -> bool:
    """Whether the plan stands beside the splits that were published since it was made.

    Their classes are taken over; tars that are built already get the new class numbers. False
    where it does not surely stand, but nothing is encoded, so that a new plan costs nothing.
    Raises UsageError where it does not stand and clips would be lost.
    """
    neighbours = _neighbours(existing)
    if journal.setting("neighbours") == neighbours:
        return True
    if not journal.counts()[Status.OK]:
        return False
    taken = _taken_keys(options, existing)
    shared = next((key for key in journal.planned_keys() if key in taken), None)
    if shared is not None:
        raise UsageError(
            f"clip {shared} of split {options.split} is in another split of {options.root} too, "
            "which was published meanwhile; throw the unfinished work away with --force to plan "
            "this split beside it"
        )
    names = list(_class_names(journal, options, existing))
    if names != journal.setting("class_names"):
        journal.forget_shards(journal.shards())
        journal.set("class_names", names)
    journal.set("neighbours", neighbours)
    return True


def _reasons_to_retry(options: ShardOptions) -> tuple[Reason, ...]:
    """Return those that were asked for; else what may have passed, unless it is to be finished."""
    if options.retry or options.finish:
        return options.retry
    return tuple(reason for reason in Reason if reason.retryable)


def _check_classes(options: ShardOptions, labels: list[str]) -> None:
    unknown = sorted(options.classes - set(labels))
    if unknown:
        way = "; give labels with commas in a --classes-file" if "," in "".join(labels) else ""
        for label in labels:
            if without_case(label) == without_case(unknown[0]):
                way = f"; there it is {label!a}"
        raise UsageError(
            f"--classes {unknown[0]!r} is no label of the list ({len(labels)} labels){way}"
        )


def _nothing_to_do(options: ShardOptions, listing: Listing) -> str:
    wanted = " of these classes" if options.classes else ""
    other = f"; {listing.other_splits} rows are of other splits" if listing.other_splits else ""
    if listing.path.is_dir() and not options.classes:
        return f"source {listing.path} has no videos"
    return f"{listing.path} has no row of split {options.split}{wanted}{other}"


def _taken_keys(options: ShardOptions, existing: Manifest | None) -> frozenset[str]:
    """Return the keys of the other splits: a key is unique in a dataset."""
    keys: set[str] = set()
    if existing is None:
        return frozenset(keys)
    from prep.open_index import open_index

    for split in existing.splits:
        table = open_index(options.storage, existing, split)
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
        row = journal.first_with_label(label)
        if label not in known and row:
            what = f"label {label!r} (row {row} of the list)"
            if options.annotations is None and Path(options.sources[0]).is_dir():
                what = f"class folder {label!r}"
            raise UsageError(
                f"{what} is not among the {len(known)} classes of "
                f"{'--class-list' if options.class_list else options.root}; correct it, or convert "
                "all splits into a new root with a --class-list that has it"
            )
    return tuple(known)
