"""What the report page shows: sums, warnings, and a seeded sample of clips with their pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from prep.clip_sample import sample_rows
from prep.clip_statistics import Histogram, Int64, clip_seconds, column, frequent, histogram
from prep.dataset_warnings import Finding, find_warnings
from prep.format import read_manifest
from prep.info import DatasetInfo, split_info
from prep.open_index import open_index, open_ledger
from prep.sampled_clips import look_at_clips

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import pyarrow as pa

    from prep.sampled_clips import SampledClip
    from prep.storage import Storage

_SIZES_SHOWN = 10
_SIDE_BITS = 25  # read_index refuses sides above 2^24
_SHOWN = ("key", "video_id", "shard", "label", "num_frames", "fps_num", "fps_den", "width",
          "height", "video_offset", "video_bytes", "crc32", "source", "short",
          "start_seconds", "end_seconds")  # fmt: skip


@dataclass(frozen=True)
class Report:
    """Everything that the page shows."""

    info: DatasetInfo
    findings: list[Finding]
    seconds: Histogram | None
    bytes: Histogram | None
    sizes: list[tuple[str, dict[str, int]]]
    clips: list[SampledClip]


def make_report(
    storage: Storage,
    *,
    samples: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Report:
    """Read manifest, indices and ledgers, and the bytes of at most `samples` clips.

    A sampled clip that cannot be read or decoded is in the report as such. Raises DatasetError
    where the index is damaged, StorageError where a store cannot be reached.
    """
    manifest = read_manifest(storage)
    names = sorted(manifest.splits)
    tables = {name: open_index(storage, manifest, name) for name in names}
    splits = tuple(
        split_info(manifest, name, tables[name], open_ledger(storage, manifest, name))
        for name in names
    )
    labels = {name: column(table, "label").astype(np.int64) for name, table in tables.items()}
    chosen = sample_rows(labels, samples, seed)
    rows = [
        (name, row)
        for name in names
        for row in tables[name].select(list(_SHOWN)).take(chosen[name]).to_pylist()
    ]
    np.random.default_rng(seed).shuffle(rows)  # splits and classes side by side
    return Report(
        info=DatasetInfo(storage.root, manifest, splits),
        findings=find_warnings(manifest, tables),
        seconds=histogram({name: clip_seconds(table) for name, table in tables.items()}),
        bytes=histogram(
            {name: column(table, "video_bytes") / 1000.0 for name, table in tables.items()}
        ),
        sizes=_sizes(tables),
        clips=look_at_clips(storage, rows, progress),
    )


def _sizes(tables: Mapping[str, pa.Table]) -> list[tuple[str, dict[str, int]]]:
    """Return the most frequent picture sizes with their clips by split."""
    if not tables:
        return []
    packed: dict[str, Int64] = {
        name: (column(table, "width").astype(np.int64) << _SIDE_BITS) + column(table, "height")
        for name, table in tables.items()
    }
    return [
        (f"{size >> _SIDE_BITS} x {size & ((1 << _SIDE_BITS) - 1)}", counts)
        for size, counts in frequent(packed, _SIZES_SHOWN)
    ]
