"""`kprep info`: what a dataset holds, from its manifest and index alone."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow.compute as pc

from prep.format import index_path, ledger_path, read_index, read_manifest
from prep.ledger import read_ledger

if TYPE_CHECKING:
    from pathlib import Path

    from prep.format import Manifest
    from prep.storage import Storage


@dataclass(frozen=True)
class SplitInfo:
    """The sums of one split. `failures` counts rows by reason."""

    name: str
    num_clips: int
    num_rows: int
    outcomes: dict[str, int]
    failures: dict[str, int]
    num_short: int
    num_shards: int
    bytes: int
    hours: float
    clips_by_label: dict[int, int]


@dataclass(frozen=True)
class DatasetInfo:
    """What a dataset holds."""

    root: str
    manifest: Manifest
    splits: tuple[SplitInfo, ...]


def dataset_info(storage: Storage) -> DatasetInfo:
    """Read manifest, indices and ledgers; raise DatasetError where they are damaged."""
    manifest = read_manifest(storage)
    splits = tuple(_split(storage, manifest, name) for name in sorted(manifest.splits))
    return DatasetInfo(storage.root, manifest, splits)


def write_ledger_csv(storage: Storage, path: Path) -> None:
    """Write the ledgers of all splits as one CSV, with a first column `split`."""
    manifest = read_manifest(storage)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        for number, name in enumerate(sorted(manifest.splits)):
            where = ledger_path(name)
            ledger = read_ledger(storage.read(where), storage.where(where))
            if not number:
                writer.writerow(["split", *ledger.column_names])
            for batch in ledger.to_batches(max_chunksize=4096):
                columns = [column.to_pylist() for column in batch.columns]
                writer.writerows((name, *values) for values in zip(*columns, strict=True))


def _split(storage: Storage, manifest: Manifest, name: str) -> SplitInfo:
    split = manifest.splits[name]
    path = index_path(name)
    index = read_index(storage.read(path), storage.where(path))
    seconds = pc.divide(
        pc.multiply(index["num_frames"].cast("float64"), index["fps_den"].cast("float64")),
        index["fps_num"].cast("float64"),
    )
    path = ledger_path(name)
    ledger = read_ledger(storage.read(path), storage.where(path))
    failed = ledger.filter(pc.equal(ledger["status"], "failed"))
    return SplitInfo(
        name=name,
        num_clips=split.num_clips,
        num_rows=split.num_rows,
        outcomes=split.outcomes,
        failures=_tally(failed["reason"]),
        num_short=pc.sum(index["short"].cast("int64")).as_py() or 0,
        num_shards=len(split.shards),
        bytes=sum(manifest.files[shard.path].bytes for shard in split.shards),
        hours=(pc.sum(seconds).as_py() or 0.0) / 3600,
        clips_by_label={int(label): count for label, count in _tally(index["label"]).items()},
    )


def _tally(column: object) -> dict[str, int]:
    counted = pc.value_counts(column)
    pairs = [(entry["values"].as_py(), entry["counts"].as_py()) for entry in counted]
    return dict(sorted(pairs, key=lambda pair: (-pair[1], str(pair[0]))))
