"""A seeded sample of clips that shows every class: which rows of the indices to look at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prep.clip_statistics import Int64


def sample_rows(labels: Mapping[str, Int64], count: int, seed: int) -> dict[str, Int64]:
    """Draw up to `count` clips; return the rows of each split's index, ascending.

    Every class of every split gives its first clip before any gives its second: rare classes are
    seen too. Which ones depends on the labels and the seed alone.

    Args:
        labels: each split's label column, int (N,).
        count: how many clips in all.
        seed: of the draw.
    """
    splits = sorted(labels)
    label = np.concatenate([np.empty(0, np.int64), *(labels[name] for name in splits)])
    split = np.repeat(np.arange(len(splits)), [len(labels[name]) for name in splits])
    draw = np.random.default_rng(seed).permutation(len(label))
    order = np.lexsort((draw, label, split))  # groups side by side, each in its drawn order
    starts = np.flatnonzero(
        np.r_[True, (np.diff(label[order]) != 0) | (np.diff(split[order]) != 0)][: len(label)]
    )
    sizes = np.diff(np.r_[starts, len(label)])
    turn = np.arange(len(label)) - np.repeat(starts, sizes)
    chosen = order[np.lexsort((draw[order], turn))[:count]]
    offsets = np.cumsum([0, *(len(labels[name]) for name in splits)])
    return {
        name: np.sort(chosen[split[chosen] == number]) - offsets[number]
        for number, name in enumerate(splits)
    }
