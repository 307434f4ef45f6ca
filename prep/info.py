"""What a dataset holds, from its manifest, indices and ledgers alone."""

from __future__ import annotations

import csv
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

from prep.atomic_files import text_output
from prep.clip_statistics import class_counts, clip_seconds
from prep.dataset_card import tally_rows
from prep.format import read_manifest
from prep.open_index import open_index, open_ledger
from prep.source_terms import term_lines

if TYPE_CHECKING:
    import pyarrow as pa

    from prep.format import Manifest
    from prep.storage import Storage


@dataclass(frozen=True)
class SplitInfo:
    """The sums of one split.

    `outcomes` counts rows by status, `failures` failed rows by reason and `sources` clips by
    source. `clips_by_class` stands in label order; `num_unlabelled` clips have no class.
    """

    name: str
    num_clips: int
    num_rows: int
    outcomes: dict[str, int]
    failures: dict[str, int]
    sources: dict[str, int]
    num_short: int
    num_shards: int
    bytes: int
    hours: float
    clips_by_class: tuple[int, ...]
    num_unlabelled: int


@dataclass(frozen=True)
class DatasetInfo:
    """What a dataset holds."""

    root: str
    manifest: Manifest
    splits: tuple[SplitInfo, ...]

    def terms(self) -> list[str]:
        """Return what is known of the terms of the dataset's sources, a sentence or two each."""
        return term_lines({source for split in self.splits for source in split.sources})


def dataset_info(storage: Storage) -> DatasetInfo:
    """Read manifest, indices and ledgers; raise DatasetError where they are damaged."""
    manifest = read_manifest(storage)
    splits = tuple(
        split_info(
            manifest,
            name,
            open_index(storage, manifest, name),
            open_ledger(storage, manifest, name),
        )
        for name in sorted(manifest.splits)
    )
    return DatasetInfo(storage.root, manifest, splits)


def split_info(manifest: Manifest, name: str, index: pa.Table, ledger: pa.Table) -> SplitInfo:
    """Sum up one split from its index and its ledger."""
    split = manifest.splits[name]
    tally = tally_rows(ledger)
    counts = class_counts(index, len(manifest.class_names)).tolist()
    return SplitInfo(
        name=name,
        num_clips=split.num_clips,
        num_rows=split.num_rows,
        outcomes=split.outcomes,
        failures=tally.failures,
        sources=tally.sources,
        num_short=pc.sum(index["short"].cast("int64")).as_py() or 0,
        num_shards=len(split.shards),
        bytes=sum(manifest.files[shard.path].bytes for shard in split.shards),
        hours=float(np.sum(clip_seconds(index))) / 3600,
        clips_by_class=tuple(counts[:-1]),
        num_unlabelled=counts[-1],
    )


def write_ledger_csv(storage: Storage, out: Path | IO[str]) -> None:
    """Write the ledgers of all splits as one CSV, with a first column `split`."""
    with text_output(out) if isinstance(out, Path) else nullcontext(out) as file:
        _write_rows(storage, csv.writer(file))


def _write_rows(storage: Storage, writer: Any) -> None:
    manifest = read_manifest(storage)
    for number, name in enumerate(sorted(manifest.splits)):
        ledger = open_ledger(storage, manifest, name)
        if not number:
            writer.writerow(["split", *ledger.column_names])
        for batch in ledger.to_batches(max_chunksize=4096):
            columns = [column.to_pylist() for column in batch.columns]
            writer.writerows((name, *values) for values in zip(*columns, strict=True))
