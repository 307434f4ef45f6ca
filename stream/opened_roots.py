"""The datasets behind a stream: each with its own storage, manifest, index and pinned versions."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from prep.errors import UsageError
from prep.format import read_manifest
from prep.format.manifest import no_split_error
from prep.storage import Storage
from stream.index import load_index
from stream.joined import IndexPart, JoinedIndex, JoinedReader, ShardsByFullName
from stream.mixture import Share
from stream.pins import shared_versions
from stream.reads import ClipReader
from stream.sampling import too_slow

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prep.format import Manifest
    from prep.format.manifest import Split
    from stream.cache import ClipCache
    from stream.index import ClipIndex
    from stream.order import Int64


@dataclass(frozen=True)
class WeightedStorage:
    """A root that a stream reads, and how often an epoch of training draws its clips."""

    storage: Storage
    weight: Fraction = Fraction(1)


@dataclass(frozen=True)
class OpenedRoot:
    """A root whose manifest and index were read.

    `split` and `index` are None where an evaluation leaves the root out, since it lacks the split.
    """

    storage: Storage
    weight: Fraction
    manifest: Manifest
    split: Split | None
    index: ClipIndex | None

    @property
    def num_rows(self) -> int:
        """Rows of its index."""
        return 0 if self.index is None else len(self.index)

    def shard_bytes(self) -> dict[str, int]:
        """Return the size of each shard of the split, as the manifest says."""
        shards = self.split.shards if self.split is not None else ()
        return {shard.path: self.manifest.files[shard.path].bytes for shard in shards}


def open_roots(
    given: Storage | Sequence[Storage | WeightedStorage], split: str, *, evaluation: bool
) -> list[OpenedRoot]:
    """Read the manifest and the index of each root.

    A training needs the split in every root; an evaluation in one of them at least: where it draws
    no clip by weight, a root without it is only left out.
    """
    if not isinstance(split, str):
        raise UsageError(f"split ({split!r}) must be the name of one split")
    opened = []
    for one in given if isinstance(given, list | tuple) else [given]:
        if not isinstance(one, Storage | WeightedStorage):
            raise UsageError(f"{one!r} must be a prep.storage.Storage; `clip_loader` takes paths")
        root = one if isinstance(one, WeightedStorage) else WeightedStorage(one)
        manifest = read_manifest(root.storage)
        found = manifest.splits.get(split)
        index = load_index(root.storage, manifest, split) if found is not None else None
        weight = Fraction(1) if evaluation else root.weight
        opened.append(OpenedRoot(root.storage, weight, manifest, found, index))
    lacking = [one for one in opened if one.split is None]
    if lacking and (not evaluation or len(lacking) == len(opened)):
        first = lacking[0]
        raise no_split_error(first.storage.root, split, first.manifest.splits)
    return opened


def index_of(roots: Sequence[OpenedRoot], labels: Sequence[Int64]) -> ClipIndex | JoinedIndex:
    """Return one index over all roots, with the rows of one behind those of the other.

    `labels` are those of `join_class_lists`. One root's index is returned as it is.
    """
    if len(roots) == 1 and roots[0].index is not None:
        return roots[0].index
    return JoinedIndex(
        [
            IndexPart(number, root.storage.where(""), root.index, names)
            for number, (root, names) in enumerate(zip(roots, labels, strict=True))
            if root.index is not None
        ]
    )


def reader_of(
    roots: Sequence[OpenedRoot],
    index: ClipIndex | JoinedIndex,
    cache: ClipCache | None,
    *,
    rank: int,
    world_size: int,
) -> ClipReader | JoinedReader:
    """Pin the versions of all shards and return what reads them; every rank must call this."""
    readers = []
    for root in roots:
        if root.split is None:
            continue
        storage = root.storage
        versions = shared_versions(storage, root.shard_bytes(), rank=rank, world_size=world_size)
        if not isinstance(index, JoinedIndex):
            return ClipReader(storage, versions, cache)
        versions = {storage.where(path): etag for path, etag in versions.items()}
        readers.append(ClipReader(ShardsByFullName(storage), versions, cache))
    assert isinstance(index, JoinedIndex)  # noqa: S101 - for the type checker
    return JoinedReader(index, readers)


def too_slow_error(roots: Sequence[OpenedRoot], fps: Fraction) -> UsageError:
    """Return what is said where a root has clips of fewer frames a second than `fps`."""
    opened = [(root.storage.root, root.index) for root in roots if root.index is not None]
    root, index = next(it for it in opened if min(it[1].rates(), default=fps) < fps)
    slow = {rate: rows for rate, rows in index.rates().items() if rate < fps}
    lowest = min(slow)
    count, key = sum(map(len, slow.values())), index.key(int(slow[lowest][0]))
    said = too_slow(fps, lowest, all_clips=count == len(index))
    return UsageError(f"{root}: {count} of {len(index)} clips, such as {key}: {said}")


def shares_of(roots: Sequence[OpenedRoot], rows: Int64) -> tuple[Share, ...]:
    """Return what each root brings into an epoch; `rows` are those in the order, ascending."""
    ends = np.cumsum([root.num_rows for root in roots])
    counts = np.diff(np.searchsorted(rows, ends), prepend=0)
    return tuple(
        Share(root.split.fingerprint if root.split is not None else "", int(count), root.weight)
        for root, count in zip(roots, counts, strict=True)
    )


def check_shares(
    roots: Sequence[OpenedRoot], shares: Sequence[Share], split: str, frames: int, fps: Fraction
) -> None:
    """Raise UsageError for a root that training would never draw from."""
    for root, share in zip(roots, shares, strict=True):
        if not share.num_clips:
            raise too_short_error(f"{split} of {root.storage.root}", frames, fps)
        if not share.num_draws:
            raise UsageError(
                f"weight ({float(share.weight):g}) of {root.storage.root} gives none of its "
                f"{share.num_clips} clips an epoch; raise it, or leave the root out"
            )


@dataclass(frozen=True)
class RootSummary:
    """What a root brings into an epoch.

    root        where it is
    weight      1 in an evaluation
    num_clips   that are long enough
    num_draws   turns of its clips an epoch, each of `clips_per_video` views
    is_left_out whether an evaluation does without it, since it lacks the split
    num_classes of its own class list
    """

    root: str
    weight: Fraction
    num_clips: int
    num_draws: int
    is_left_out: bool
    num_classes: int


def summarise(roots: Sequence[OpenedRoot], shares: Sequence[Share]) -> list[RootSummary]:
    """Return what each root brings into an epoch."""
    return [
        RootSummary(
            root.storage.root,
            root.weight,
            share.num_clips,
            share.num_draws,
            root.split is None,
            len(root.manifest.class_names),
        )
        for root, share in zip(roots, shares, strict=True)
    ]


def too_short_error(split: str, frames: int, fps: Fraction) -> UsageError:
    """Return what is said where no clip is long enough."""
    return UsageError(
        f"no clip of split {split} has {frames} frames at {float(fps):g} fps; "
        "ask for fewer frames, or let short clips be padded: short='pad' of clip_loader, "
        "--set data.short=pad of kprep train"
    )
