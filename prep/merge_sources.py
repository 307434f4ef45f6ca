"""The roots that a new root is made of: manifests, indices and ledgers, each checked by sha256."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from prep.errors import DatasetError, UsageError
from prep.format import Manifest, foreign_settings, index_path
from prep.format.manifest import no_split_error, read_manifest_bytes
from prep.merge_plan import Clip
from prep.open_index import open_index, open_ledger

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from prep.format import Split
    from prep.storage import Storage

_LONGEST_KEY = 90  # names in a tar have at most 100 bytes, extension included


@dataclass(frozen=True)
class SourceRoot:
    """One root; `digest` is the sha256 of its manifest, which speaks of every byte in it."""

    storage: Storage
    manifest: Manifest
    digest: str
    indices: dict[str, pa.Table]
    ledgers: dict[str, pa.Table]


def open_sources(roots: Sequence[Storage], splits: frozenset[str] | None) -> list[SourceRoot]:
    """Read what the roots hold of some splits (None: all); refuse roots that do not fit together.

    Raises UsageError when profiles differ or a split is nowhere, DatasetError for damage.
    """
    sources = [_open(storage, splits) for storage in roots]
    first = sources[0]
    for source in sources[1:]:
        if source.manifest.profile != first.manifest.profile:
            what = "; ".join(source.manifest.profile.differences(first.manifest.profile))
            raise UsageError(
                f"{source.storage.root} is of another profile than {first.storage.root} ({what}); "
                "clips are not encoded again, so merge roots of one profile"
            )
    known = {name for source in sources for name in source.manifest.splits}
    unknown = sorted((splits or set()) - known)
    if unknown or not known:
        where = first.storage.root if len(sources) == 1 else "the source"
        raise no_split_error(where, unknown[0] if unknown else None, known)
    return sources


def clips_of(number: int, source: SourceRoot) -> Iterator[Clip]:
    """Yield the clips of a root as the plan knows them."""
    names = source.manifest.class_names
    for split in sorted(source.indices):
        table = source.indices[split]
        names_of = ("key", "label", "content_hash", "entry_bytes", "fps_num", "fps_den")
        columns = [table[name].to_pylist() for name in names_of]
        for row, (key, label, content_hash, size, *rate) in enumerate(zip(*columns, strict=True)):
            name = names[label] if label >= 0 else None
            yield Clip(number, split, row, key, name, content_hash, size, _rate(*rate))


@cache
def _rate(num: int, den: int) -> Fraction:
    return Fraction(num, den)


def _open(storage: Storage, splits: frozenset[str] | None) -> SourceRoot:
    manifest, data = read_manifest_bytes(storage)
    names = [name for name in sorted(manifest.splits) if splits is None or name in splits]
    indices, ledgers = {}, {}
    for name in names:
        indices[name] = open_index(storage, manifest, name)
        _check_index(indices[name], manifest, name, storage.where(index_path(name)))
        ledgers[name] = open_ledger(storage, manifest, name)
        if manifest.is_foreign and foreign_rules(name, manifest.splits[name])["keys"] == "shard":
            for tables in (indices, ledgers):
                tables[name] = _with_flat_keys(tables[name], storage.root)
    return SourceRoot(storage, manifest, hashlib.sha256(data).hexdigest(), indices, ledgers)


def foreign_rules(name: str, split: Split) -> dict[str, Any]:
    """Return how `kprep index` read the tars of a split; DatasetError where that is not known."""
    found = foreign_settings(name, split)
    if found is None:
        raise DatasetError(
            f"manifest.json: split {name} has no settings.foreign, though somebody else encoded "
            "its clips; get the manifest from another copy, or index the tars again"
        )
    return found


def flat_key(key: str) -> str:
    """Return the name that a sample of somebody else's tars gets in a tar of ours.

    Where keys repeat from shard to shard, those of the index stand behind the shard's path:
    `train/00000/000000001` becomes `train-00000-000000001`.
    """
    return key.replace("/", "-")


def _with_flat_keys(table: pa.Table, where: str) -> pa.Table:
    """Rename the keys of an index or ledger; UsageError when two become one or one is too long."""
    keys = [key if key is None else flat_key(key) for key in table["key"].to_pylist()]
    named = [key for key in keys if key is not None]
    longest = max(named, key=len, default="")
    if len(set(named)) != len(named) or len(longest) > _LONGEST_KEY:
        raise UsageError(
            f"{where}: its keys cannot become names in other tars (two would be one, or "
            f"{longest[:40]!r}… is too long)"
        )
    at = table.schema.get_field_index("key")
    return table.set_column(at, table.schema.field(at), pa.array(keys, pa.string()))


def _check_index(table: pa.Table, manifest: Manifest, split: str, where: str) -> None:
    """Raise DatasetError for rows that point outside the dataset."""
    sizes = {
        shard.path: manifest.files[shard.path].bytes for shard in manifest.splits[split].shards
    }
    paths = table["shard"].cast("string")
    strange = set(pc.unique(paths).to_pylist()) - set(sizes)
    highest = pc.max(table["label"]).as_py()
    if strange:
        raise DatasetError(f"{where} has rows of {min(strange)}, which the split does not have")
    ends = pc.add(table["entry_offset"], table["entry_bytes"]).to_pylist()
    for path, end in zip(paths.to_pylist(), ends, strict=True):
        if end > sizes[path]:
            raise DatasetError(
                f"{where} has a clip that ends at byte {end:,} of {path}, which has {sizes[path]:,}"
            )
    if highest is not None and highest >= len(manifest.class_names):
        raise DatasetError(
            f"{where} has label {highest}, the manifest {len(manifest.class_names)} classes"
        )
