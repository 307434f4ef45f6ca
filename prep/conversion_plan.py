"""What a conversion is: its plan, and whether what was begun is the same one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prep.annotation_labels import kinetics_class_list, without_case
from prep.errors import UsageError
from prep.outcome import Reason, Status
from prep.text.plain import few

if TYPE_CHECKING:
    from prep.annotations import Listing
    from prep.ffmpeg_binary import FFmpeg
    from prep.format import Manifest
    from prep.journal import Journal
    from prep.options import ShardOptions


def settings_of(options: ShardOptions, annotations_sha256: str) -> dict[str, Any]:
    """Return what decides the bytes of a split; a run with other settings is another conversion."""
    return {
        "annotations_sha256": annotations_sha256,
        "seed": options.seed,
        "clips_per_shard": options.clips_per_shard or options.profile.usual_clips_per_shard,
        "limit": options.limit,
        "classes": sorted(options.classes),
        "min_seconds": options.min_seconds,
    }


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
    settings = settings_of(options, listing.sha256)
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
            _changed(options, name, known.get(name), value)
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


def lists_differ(was: list[str], now: list[str]) -> str:
    """Return by what a list of classes differs from that of a conversion, begun or published."""
    if not (was and now):
        return f"was {'given' if was else 'not given'}, is {'given' if now else 'not given'}"
    if set(was) == set(now):
        return "has the same classes in another order"
    gone = [name for name in was if name not in now]
    new = [name for name in now if name not in was]
    parts = [f"{few(names)} {what}" for names, what in ((gone, "missing"), (new, "new")) if names]
    return f"has other classes: {'; '.join(parts)}"


def _changed(options: ShardOptions, name: str, was: Any, now: Any) -> str:
    """Return what is said of a setting that differs; of a profile the fields that do."""
    if name == "profile" and isinstance(was, dict):
        different = "; ".join(options.profile.differences_from_json(was))
        return f"profile was {was.get('name')} ({different})"
    if name == "class_list":
        return f"--class-list {lists_differ(was or [], now or [])}"
    return f"{name} was {was}, is {now}"


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
    journal.set("neighbours", neighbours_of(existing))
    journal.set("settings", settings)


def neighbours_of(existing: Manifest | None) -> dict[str, str]:
    """Return the fingerprints of the splits that are published already, by name."""
    return {name: split.fingerprint for name, split in existing.splits.items()} if existing else {}


def _fits_neighbours(journal: Journal, options: ShardOptions, existing: Manifest | None) -> bool:
    """Whether the plan stands beside the splits that were published since it was made.

    Their classes are taken over; tars that are built already get the new class numbers. False
    where it does not surely stand, but nothing is encoded, so that a new plan costs nothing.
    Raises UsageError where it does not stand and clips would be lost.
    """
    neighbours = neighbours_of(existing)
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
