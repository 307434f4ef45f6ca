"""What `kprep index` finds in a root besides tars: whose it is, and what of it has to go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prep import companions
from prep.errors import UsageError
from prep.foreign_publish import companions_of, has_our_card
from prep.format import read_manifest
from prep.format.layout import CARD_PATH, CLASSES_PATH, MANIFEST_PATH
from prep.index_marker import read_marker

if TYPE_CHECKING:
    from collections.abc import Collection

    from prep.storage import Storage


def refuse_overwriting(
    storage: Storage, splits: dict[str, list[str]], found: Collection[str], *, force: bool
) -> None:
    """Raise UsageError where `kprep index` would overwrite a file that is not its own to write.

    `splits` are the tars of each split that is indexed now, `found` all files below the root.
    """
    if MANIFEST_PATH in found:
        if not force:
            raise UsageError(
                f"{storage.where(MANIFEST_PATH)} exists, so this is a dataset already; check it "
                "with `kprep verify`, or index its tars anew with --force"
            )
        if not read_manifest(storage).is_foreign:
            raise UsageError(
                f"{storage.root} was made by `kprep shard`; mend it with `kprep verify --repair`, "
                f"or remove {MANIFEST_PATH} if it is to be indexed as somebody else's"
            )
    ours = {*companions.energon_files({}), CLASSES_PATH, *companions_of(splits)}
    begun = read_marker(storage)
    left = set(begun.files) & set(found) if begun is not None else set()
    strange = sorted(left - ours - {CARD_PATH, *left_behind(storage, splits, found)})
    if strange:
        raise UsageError(
            f"{storage.where(strange[0])} is of a `kprep index` that was interrupted and had other "
            "tars or splits; run that command again, or remove the file"
        )
    there = sorted((ours & set(found)) - left)
    if there and not force:
        raise UsageError(
            f"{storage.where(there[0])} exists and would be overwritten"
            + (f", as would {len(there) - 1} more files" if len(there) > 1 else "")
            + "; move it away, or allow it with --force"
        )


def left_behind(
    storage: Storage, splits: dict[str, list[str]], found: Collection[str]
) -> tuple[str, ...]:
    """Return what kprep made for splits and tars that are gone, by the manifest that still stands.

    So is what a run was killed in removing, whose manifest no longer lists it.
    """
    begun = read_marker(storage)
    made = set(begun.gone) if begun is not None else set()
    if MANIFEST_PATH in found:
        old = read_manifest(storage)
        tars = {name: [shard.path for shard in split.shards] for name, split in old.splits.items()}
        made |= companions_of(tars) & set(old.files)
    return tuple(sorted((made - companions_of(splits)) & set(found)))


def is_our_card(storage: Storage) -> bool:
    """Whether README.md is kprep's, by the manifest or by a run that was interrupted before it."""
    if not storage.exists(MANIFEST_PATH):
        begun = read_marker(storage)
        return begun is not None and begun.card
    return has_our_card(read_manifest(storage))
