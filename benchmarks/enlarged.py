"""A dataset that lists another one's clips again and again: large to a reader, small on the disk.

Shards are hard links under other names, so source and target share a file system.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from prep.companions import energon_files
from prep.format import Shard, Split, read_index, read_manifest, split_fingerprint, write_index
from prep.storage import Storage

if TYPE_CHECKING:
    from pathlib import Path

INDEX = "index/train.parquet"


def enlarge(source: Path, target: Path, shards: int, clips_per_shard: int | None = None) -> None:
    """Make a root of `shards` shards that lists the clips of split `train` of `source`.

    Each shard is one of the source's in turn, with all its clips once, or with as many rows as
    asked for (its clips over and over). Clip `key` is called `key_NN_NNNNN`.
    """
    table = read_index(Storage(str(source)).read(INDEX), "index")
    target.joinpath("train").mkdir(parents=True)
    target.joinpath("index").mkdir()
    manifest = read_manifest(Storage(str(source)))
    taken = list(itertools.islice(itertools.cycle(manifest.splits["train"].shards), shards))
    tables = []
    listed = []
    files: dict[str, Any] = {}
    for number, shard in enumerate(taken):
        path = f"train/train-{number:06d}.tar"
        for ending in ("", ".idx"):
            os.link(source / (shard.path + ending), target / (path + ending))
            files[path + ending] = vars(manifest.files[shard.path + ending])
        rows = [row for row, one in enumerate(table["shard"].to_pylist()) if one == shard.path]
        if clips_per_shard is not None:
            rows = list(itertools.islice(itertools.cycle(rows), clips_per_shard))
        tables.append(_renamed(table.take(rows), path, number))
        listed.append(Shard(path, len(rows), None if clips_per_shard is None else shard.num_clips))
    _publish(source, target, tables, listed, files)


def original_key(key: str) -> str:
    """Return what a clip of an enlarged dataset is called in its source."""
    return key[: -len("_NN_NNNNN")]


def _renamed(rows: pa.Table, path: str, number: int) -> pa.Table:
    keys = [f"{key}_{number:02d}_{place:05d}" for place, key in enumerate(rows["key"].to_pylist())]
    rows = rows.set_column(0, rows.schema.field("key"), pa.array(keys))
    return rows.set_column(1, rows.schema.field("shard"), _one_path(path, len(keys)))


def _one_path(path: str, count: int) -> pa.Array:
    return pa.array([path] * count).dictionary_encode()


def _publish(
    source: Path, target: Path, tables: list[pa.Table], shards: list[Shard], files: dict[str, Any]
) -> None:
    """Write index, companions for Megatron-Energon, and the manifest."""
    whole = pa.concat_tables(tables)
    count = whole.num_rows
    split = Split(split_fingerprint(whole), count, count, {"ok": count}, tuple(shards))
    for path, data in {INDEX: write_index(tables), **energon_files({"train": split})}.items():
        target.joinpath(path).parent.mkdir(exist_ok=True)
        target.joinpath(path).write_bytes(data)
        files[path] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    values: dict[str, Any] = json.loads((source / "manifest.json").read_text())
    entry = {
        **values["splits"]["train"],
        "shards": [one.to_json() for one in shards],
        "num_clips": count,
        "num_rows": count,
        "outcomes": {"ok": count},
        "fingerprint": split.fingerprint,
    }
    values |= {"splits": {"train": entry}, "files": files}
    (target / "manifest.json").write_text(json.dumps(values))
