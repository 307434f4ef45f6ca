"""What a root holds before a conversion: a dataset, our unfinished work, or strangers' files."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from typing import TYPE_CHECKING

from prep.atomic_files import is_temporary
from prep.errors import KprepError, UsageError
from prep.format import Manifest, read_manifest
from prep.format.layout import (
    CARD_PATH,
    CLASSES_PATH,
    ENERGON_FOLDER,
    MANIFEST_PATH,
    WORK_NAME,
    is_reserved,
)
from prep.journal_reader import JOURNAL_NAME, read_setting, read_sums
from prep.links import refuse_links_in
from prep.storage import Storage
from prep.text.plain import few

if TYPE_CHECKING:
    from pathlib import Path

    from prep.options import ShardOptions

# What publishing writes before the manifest, so that a run killed there finds its own files
_PUBLISHED = ("index", "ledger", CARD_PATH, CLASSES_PATH, ENERGON_FOLDER)
_WIDS = re.compile(r"wids-[a-z0-9_]+\.json")


def existing_manifest(options: ShardOptions) -> Manifest | None:
    """Return the manifest of the root, None for a new one.

    Raises UsageError for a root of another profile, and for one that holds files that no unfinished
    conversion of ours explains.
    """
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
        raise UsageError(
            f"root {options.root} is not empty and no kprep dataset (it holds {few(strange)}); "
            "give a new folder"
        )
    return None


def _strange(options: ShardOptions) -> list[str]:
    """Return the names in a root without a manifest that no conversion of ours has begun."""
    root = options.storage.local_root
    if root is not None:
        names = {path.name for path in root.iterdir()}
    else:
        names = {info.path.split("/")[0] for info in options.storage.list()}
    begun = begun_splits(options)
    return sorted(
        name
        for name in names
        if not is_reserved(name) and name not in begun and not (begun and _is_published(name))
    )


def _is_published(name: str) -> bool:
    """Whether publishing writes something of this name before the manifest."""
    return name in _PUBLISHED or _WIDS.fullmatch(name) is not None or is_temporary(name)


def begun_splits(options: ShardOptions) -> set[str]:
    """Return the splits of this root of which the work folder has unfinished work."""
    work = options.work_root
    if not work.is_dir():
        return set()
    return {path.name for path in work.iterdir() if root_of(path) and not _owner(options, path)}


def unfinished(root: Path) -> dict[str, tuple[dict[str, int], dict[str, int]]]:
    """Return, for each split in the making, its rows by status and its failures by reason.

    Only work that is kept in the root itself is found. Nothing is written, as the root may be a
    stranger's. Raises StorageError where work is a link, DatasetError where it cannot be read.
    """
    refuse_links_in(root / WORK_NAME)
    found = {}
    for work in sorted((root / WORK_NAME).glob("*/")):
        if is_planned(work):
            found[work.name] = read_sums(work / JOURNAL_NAME)
    return found


def root_of(work: Path) -> str | None:
    """Return the root that a split's unfinished work belongs to; None where there is none."""
    root = read_setting(work / JOURNAL_NAME, "root")
    return str(root) if root else None


def is_planned(work: Path) -> bool:
    """Whether a split's work has come as far as a complete plan."""
    return read_setting(work / JOURNAL_NAME, "identity") is not None


def forget(options: ShardOptions, work: Path) -> None:
    """Throw the unfinished work on a split away; refuse when anything of it is not ours."""
    existing = existing_manifest(options)
    if existing is not None and options.split in existing.splits:
        raise UsageError(
            f"split {options.split} of {options.root} is published; --force only throws away "
            "unfinished work"
        )
    owner = root_of(work)
    if owner is None:
        return
    check_owner(options, work)
    name = re.escape(options.split)
    ours = re.compile(rf"{name}/(\.{name}-.+\.tmp|{name}-\d{{6}}\.tar(\.idx)?)")
    found = [info.path for info in options.storage.list(options.split)]
    strange = [path for path in found if not ours.fullmatch(path)]
    if strange:
        raise UsageError(
            f"{options.storage.where(strange[0])} is not kprep's, so --force removes nothing; "
            "move it away first"
        )
    for path in found:
        options.storage.delete(path)
    if options.storage.local_root is not None:
        with contextlib.suppress(OSError):
            (options.storage.local_root / options.split).rmdir()
    shutil.rmtree(work)


def check_owner(options: ShardOptions, work: Path) -> None:
    """Raise UsageError when a work folder belongs to the conversion of another root."""
    owner = _owner(options, work)
    if owner is not None:
        raise UsageError(
            f"work folder {work} belongs to the conversion into {owner}; choose another --work"
        )


def _owner(options: ShardOptions, work: Path) -> str | None:
    """Return the other root that a split's unfinished work belongs to; None where it is ours.

    Work inside a root is that root's, wherever the root was when it was begun.
    """
    root = options.storage.local_root
    if root is not None and work.parent.absolute() == root / WORK_NAME:
        return None
    owner = root_of(work)
    return None if owner is None or Storage(owner).root == options.storage.root else owner


def check_places(options: ShardOptions) -> None:
    """Raise when a source folder is missing, or root or work folder lie inside it.

    What a conversion writes must not become its own input.
    """
    from pathlib import Path

    places = [("root", options.storage.local_root), ("work folder", options.work_root)]
    for text in options.sources:
        if re.match(r"[a-z]+:", text):
            continue
        folder = Path(text)
        if not folder.is_dir():
            raise UsageError(f"source {text} is no folder; give the folder of the videos")
        for what, place in places:
            if place is not None and place.resolve() != folder.resolve() and (
                folder.resolve() in place.resolve().parents
            ):  # fmt: skip
                raise UsageError(f"{what} {place} lies inside the source {text}; choose another")


def missing_folders(*folders: Path) -> list[Path]:
    """Return those of some folders, and of all above them, that do not exist; the deepest first."""
    found = {path for folder in folders for path in (folder, *folder.parents)}
    missing = (path for path in found if not os.path.lexists(path))
    return sorted(missing, key=lambda path: len(path.parts), reverse=True)


def remove_own_leftovers(options: ShardOptions) -> None:
    """Remove what killed writers left under temporary names, where this dataset's files stand."""
    root = options.storage.local_root
    if root is None:
        return
    for folder in (
        root,
        *(root / name for name in ("index", "ledger", ENERGON_FOLDER, options.split)),
    ):
        ours = folder.is_dir() and (folder == root or not folder.is_symlink())
        for path in folder.glob(".*.tmp") if ours else ():
            if is_temporary(path.name):
                path.unlink(missing_ok=True)


def check_still_new(options: ShardOptions, manifest: Manifest | None) -> None:
    """Raise KprepError when the split was published by somebody else meanwhile."""
    if manifest is not None and options.split in manifest.splits:
        raise KprepError(f"split {options.split} of {options.root} was published meanwhile")
