"""What a copy of a dataset consists of, and what a destination may already hold: no I/O here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from prep.companions import wids_path
from prep.errors import DatasetError, UsageError
from prep.format import Manifest, index_path, ledger_path
from prep.format.layout import (
    CARD_PATH,
    CLASSES_PATH,
    ENERGON_FOLDER,
    MANIFEST_PATH,
    is_reserved,
)
from prep.format.manifest import no_split_error

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from prep.format import FileEntry


@dataclass(frozen=True)
class CopyPlan:
    """The files to copy, in the order in which they may appear.

    `manifest` is what the destination holds in the end; where `made_anew`, the files that speak of
    all splits (and the manifest with them) are still to be made, because the destination will not
    hold the splits that the source holds. `added` are the copied splits that it does not hold yet.
    `kept` is what the destination's manifest says of files of its published splits, where that is
    something else than what the source's says: while they are intact they stay, because readers of
    the destination go by its manifest until the last moment.
    """

    manifest: Manifest
    splits: tuple[str, ...]
    added: tuple[str, ...]
    shards: tuple[str, ...]
    companions: tuple[str, ...]
    root_files: tuple[str, ...]
    made_anew: bool
    kept: dict[str, FileEntry]

    @property
    def paths(self) -> tuple[str, ...]:
        """Every file that comes from the source."""
        return self.shards + self.companions + self.root_files


def plan_copy(
    source: Manifest, wanted: Sequence[str], existing: Manifest | None, where: str
) -> CopyPlan:
    """Plan the copy of the `wanted` splits (none: all) to a destination, named `where` in errors.

    Raises UsageError when the source lacks a wanted split, or when the destination holds another
    dataset; DatasetError when the source's manifest claims names that are not its own to give.
    """
    _check_paths(source)
    splits = _chosen(source, wanted)
    if existing is not None:
        _check_same_dataset(source, existing, splits, where)
    others = {} if existing is None else {
        name: split for name, split in existing.splits.items() if name not in splits
    }  # fmt: skip
    made_anew = {*others, *splits} != set(source.splits)
    ours = _files(source, splits, root_files=not made_anew)
    theirs = {} if existing is None else _files(existing, tuple(others), root_files=False)
    _check_apart(source, splits, existing, tuple(others), where)
    shards = tuple(shard.path for name in splits for shard in source.splits[name].shards)
    rest = sorted(ours.keys() - set(shards))
    return CopyPlan(
        manifest=replace(
            source,
            splits={**others, **{name: source.splits[name] for name in splits}},
            files={**theirs, **ours},
        ),
        splits=splits,
        added=tuple(name for name in splits if existing is None or name not in existing.splits),
        shards=shards,
        companions=tuple(path for path in rest if not is_root_file(path)),
        root_files=tuple(path for path in rest if is_root_file(path)),
        made_anew=made_anew,
        kept=_kept(source, splits, existing),
    )


def is_root_file(path: str) -> bool:
    """Whether kprep makes this file from the manifest, for all splits together."""
    return path in (CARD_PATH, CLASSES_PATH) or path.startswith(f"{ENERGON_FOLDER}/")


def identity(manifest: Manifest, splits: Iterable[str]) -> dict[str, Any]:
    """Return what tells one copy from another: the fingerprints of its splits."""
    return {"splits": {name: manifest.splits[name].fingerprint for name in sorted(splits)}}


def check_unfinished(
    found: dict[str, Any], plan: CopyPlan, existing: Manifest | None, where: str
) -> None:
    """Raise UsageError when an unfinished copy at the destination is of another dataset."""
    published = existing.splits if existing else {}
    begun = {name: print_ for name, print_ in found["splits"].items() if name not in published}
    wanted = identity(plan.manifest, plan.splits)["splits"]
    if any(wanted.get(name) != print_ for name, print_ in begun.items()):
        raise UsageError(
            f"{where} holds an unfinished copy of other clips (split {', '.join(sorted(begun))}); "
            "repeat the copy that was begun, or remove what it left"
        )


def _chosen(source: Manifest, wanted: Sequence[str]) -> tuple[str, ...]:
    for name in wanted:
        source.split(name, "the source")
    if not source.splits:
        raise no_split_error("the source", None, ())
    return tuple(sorted(set(wanted) or source.splits))


def _check_paths(source: Manifest) -> None:
    for path in source.files:
        if path == MANIFEST_PATH or is_reserved(path):
            raise DatasetError(f"the source's manifest lists {path!r}, which is no dataset's file")


def _files(manifest: Manifest, splits: Sequence[str], *, root_files: bool) -> dict[str, FileEntry]:
    """Return the files of some splits, and those that belong to none."""
    owners = _owners(manifest)
    return {
        path: entry
        for path, entry in manifest.files.items()
        if (owners[path] in splits if path in owners else root_files or not is_root_file(path))
    }


def _kept(
    source: Manifest, splits: Sequence[str], existing: Manifest | None
) -> dict[str, FileEntry]:
    """Return the destination's entries of its published splits where the source's are others."""
    theirs = existing.files if existing else {}
    return {
        path: theirs[path]
        for path, name in _owners(source).items()
        if existing and name in splits and name in existing.splits
        and theirs.get(path, source.files[path]) != source.files[path]
    }  # fmt: skip


def _check_apart(
    source: Manifest,
    splits: Sequence[str],
    existing: Manifest | None,
    others: Sequence[str],
    where: str,
) -> None:
    """Raise UsageError when a file of a copied split would replace one of another split."""
    ours = {path for path, name in _owners(source).items() if name in splits}
    for path, name in _owners(existing).items() if existing else ():
        if name in others and path in ours:
            raise UsageError(
                f"{path} belongs to split {name} of {where}, and the source has another file of "
                "that name; choose another root"
            )


def _owners(manifest: Manifest) -> dict[str, str]:
    """Return the split of every file that belongs to one."""
    owners: dict[str, str] = {}
    for name, split in manifest.splits.items():
        for shard in split.shards:
            owners |= {shard.path: name, f"{shard.path}.idx": name}
        owners |= dict.fromkeys((index_path(name), ledger_path(name), wids_path(name)), name)
    return {path: name for path, name in owners.items() if path in manifest.files}


def _check_same_dataset(
    source: Manifest, existing: Manifest, splits: Sequence[str], where: str
) -> None:
    """Raise UsageError unless the destination's splits stay what they are."""
    if source.profile != existing.profile:
        what = "; ".join(source.profile.differences(existing.profile))
        raise UsageError(
            f"{where} holds a dataset of another profile ({what}); choose another root"
        )
    if source.class_names != existing.class_names:
        raise UsageError(
            f"{where} holds a dataset of other classes ({len(existing.class_names)}, the source "
            f"has {len(source.class_names)}, or in another order); choose another root"
        )
    for name in splits:
        if name in existing.splits:
            _check_same_split(source, existing, name, where)


def _check_same_split(source: Manifest, existing: Manifest, name: str, where: str) -> None:
    ours, theirs = source.splits[name], existing.splits[name]
    same_tars = ours.shards == theirs.shards and all(
        source.files[shard.path] == existing.files[shard.path] for shard in ours.shards
    )
    if ours.fingerprint != theirs.fingerprint or not same_tars:
        raise UsageError(
            f"{where} holds another split {name} ({theirs.num_clips} clips, the source's has "
            f"{ours.num_clips}), and a published split never changes; choose another root"
        )
