"""Numbers of many clips at once, from the columns of an index: no loop over its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pyarrow as pa

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
_MOST_BINS = 32
_NICE = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Histogram:
    """Counts of values in bins of one width.

    Bin i of a split is `counts[split][i]`, of values in `[edges[i], edges[i + 1])`; the last one
    holds everything from its lower edge on where `open_ended` is set. `median`, `lowest` and
    `highest` are of all splits together.
    """

    edges: Float64
    counts: dict[str, Int64]
    open_ended: bool
    lowest: float
    median: float
    highest: float


def column(table: pa.Table, name: str) -> npt.NDArray[Any]:
    """Return a numeric column as an array."""
    values: npt.NDArray[Any] = table[name].combine_chunks().to_numpy(zero_copy_only=False)
    return values


def clip_seconds(table: pa.Table) -> Float64:
    """Return the duration of each clip of an index, float64 (N,)."""
    frames = column(table, "num_frames").astype(np.float64)
    seconds: Float64 = frames * column(table, "fps_den") / column(table, "fps_num")
    return seconds


def class_counts(table: pa.Table, num_classes: int) -> Int64:
    """Return the clips of each class, int64 (num_classes + 1,); the last one counts no class.

    Labels beyond the class list, which only a damaged index has, count as no class.
    """
    labels = column(table, "label").astype(np.int64)
    inside = (labels >= 0) & (labels < num_classes)
    return np.bincount(np.where(inside, labels, num_classes), minlength=num_classes + 1)


def histogram(values: Mapping[str, Float64]) -> Histogram | None:
    """Count the values of each split in bins whose edges are round numbers: 8 to 32 of them.

    The bins end at the 99th percentile's; what lies far beyond is in the last one. None where
    there are no values.
    """
    everything = np.concatenate([np.empty(0), *values.values()])
    if not everything.size:
        return None
    low, middle, high = (float(value) for value in np.percentile(everything, (0, 50, 100)))
    usual = float(np.percentile(everything, 99))
    # 2 x: a short tail is shown as it is
    end = high if high - low <= 2 * (usual - low) else usual
    # the square root is the usual rule; few values in many bins are a comb
    step = _step((end - low) / (np.clip(np.sqrt(everything.size), 8, _MOST_BINS) - 2), end)
    first = float(np.floor(low / step))
    edges = np.asarray(
        (first + np.arange(max(1, int(np.floor(end / step) - first) + 1) + 1)) * step, np.float64
    )
    last = len(edges) - 2
    counts = {
        name: np.bincount(
            np.clip(np.floor(np.asarray(part) / step) - first, 0, last).astype(np.int64),
            minlength=last + 1,
        )
        for name, part in values.items()
    }
    return Histogram(edges, counts, bool(high >= edges[-1]), low, middle, high)


def _step(rough: float, end: float) -> float:
    """Return the smallest of 1, 2, 2.5 and 5 times a power of ten that is not below `rough`."""
    if rough <= abs(end) * 1e-9:  # all alike
        rough = abs(end) / 10 or 1.0
    power = float(10.0 ** np.floor(np.log10(rough)))
    return next(power * factor for factor in _NICE if power * factor >= rough * (1 - 1e-9))


def frequent(values: Mapping[str, Int64], most: int) -> list[tuple[int, dict[str, int]]]:
    """Return the `most` most frequent values with their counts by split, the most frequent first.

    Equal counts stand in the order of the values. There must be at least one split.
    """
    distinct, counts = np.unique(np.concatenate([*values.values()]), return_counts=True)
    chosen = np.argsort(-counts, kind="stable")[:most]
    by_split = {
        name: np.bincount(np.searchsorted(distinct, part), minlength=len(distinct))[chosen].tolist()
        for name, part in values.items()
    }
    return [
        (value, {name: found[place] for name, found in by_split.items()})
        for place, value in enumerate(distinct[chosen].tolist())
    ]
