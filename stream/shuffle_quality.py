"""How well an order shuffles: what its batches hold, against perfect shuffling.

Two statistics, each measured on batches of the real order:

- class repeats: pairs of clips of a batch that share a label, over the pairs expected when labels
  are drawn at random. 1 is perfect; 5 means that a batch sees its classes five times too often.
- company: the share of a batch's clips whose next neighbour of the index is in the batch too.
  Neighbours that are kept together by `shuffle_block` meet again in every epoch, so this is the
  part of a batch that is the same company each time. Perfect shuffling gives about B / N.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from stream.order import Int64


@dataclass(frozen=True)
class ShuffleQuality:
    """Statistics of batches of one size.

    batch_clips     clips a batch
    batches         batches that were measured
    class_repeats   pairs with one label over the pairs expected at random; None without labels,
                    and where a batch of one clip has no pairs
    company         share of clips with their next neighbour of the index in the same batch
    company_ideal   the same under perfect shuffling
    """

    batch_clips: int
    batches: int
    class_repeats: float | None
    company: float
    company_ideal: float


def measure(
    rows: Int64, labels: Int64, *, clips: int, views: int, same_class_share: float
) -> ShuffleQuality:
    """Measure batches of an order.

    Args:
        rows: int64 (batches, clips a batch): the index row at each position.
        labels: int64, the same shape: its label, -1 for none.
        clips: clips of the split.
        views: views of each clip an epoch; they share row and label, as chance has it.
        same_class_share: chance that two clips of the split share a label.
    """
    batches, size = rows.shape
    pairs = batches * size * (size - 1) / 2
    repeats = None
    if same_class_share > 0 and pairs and int(labels.min()) >= 0:
        repeats = _equal_pairs(labels) / (pairs * same_class_share)
    return ShuffleQuality(
        batch_clips=size,
        batches=batches,
        class_repeats=repeats,
        company=_with_neighbour(rows) / max(1, rows.size),
        company_ideal=_chance_of_neighbour(clips, views, size),
    )


def _equal_pairs(labels: Int64) -> int:
    """Return how many pairs inside a row have one label: the sum of n (n - 1) / 2."""
    total = 0
    for batch in labels:
        counts = np.unique(batch, return_counts=True)[1]
        total += int(np.sum(counts * (counts - 1) // 2))
    return total


def _with_neighbour(rows: Int64) -> int:
    return sum(int(np.isin(batch + 1, batch).sum()) for batch in rows)


def _chance_of_neighbour(clips: int, views: int, size: int) -> float:
    """Return the chance that a batch's other clips hold one of the neighbour's `views` places.

    Drawn without replacement: the last of the N clips has no neighbour.
    """
    positions = clips * views
    if size >= positions:
        return (clips - 1) / clips
    others = np.arange(views)
    absent = np.prod(np.maximum(positions - size - others, 0) / (positions - 1 - others))
    return float((1 - absent) * (clips - 1) / clips)
