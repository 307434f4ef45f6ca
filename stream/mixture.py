"""Several roots in one epoch: pure arithmetic from clip counts and weights to draws.

A draw is one turn of a clip, with all of its `clips_per_video` views. Weight w of a root with n
clips gives each clip `floor(w)` draws, and `floor((w - floor(w)) * n + 1/2)` of them one more: the
same number every epoch, other clips each epoch, none of them twice in one. The draws of all roots,
one root behind the other, are what the epoch's order shuffles. So one root of weight 1 has exactly
the order that it has alone, and any position is computed at the cost of that position.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

from stream.order import EpochOrder, Grouping, Int64


@dataclass(frozen=True)
class Share:
    """What one root brings into every epoch.

    fingerprint  of its split
    num_clips    its clips that are long enough
    weight       draws of each clip an epoch, above 0
    """

    fingerprint: str
    num_clips: int
    weight: Fraction = Fraction(1)

    @property
    def draws_of_all(self) -> int:
        """Draws that every clip has in every epoch."""
        return math.floor(self.weight)

    @property
    def num_chosen(self) -> int:
        """Clips that an epoch chooses for one draw more; a half counts up."""
        return math.floor((self.weight - self.draws_of_all) * self.num_clips + Fraction(1, 2))

    @property
    def num_draws(self) -> int:
        """Draws an epoch."""
        return self.draws_of_all * self.num_clips + self.num_chosen


@dataclass(frozen=True)
class Mixture:
    """The epochs of several roots; clips are counted through, one root behind the other."""

    shares: tuple[Share, ...]
    seed: int = 0
    clips_per_video: int = 1
    grouping: Grouping = "spread"
    shuffle_block: int = 1

    @cached_property
    def num_draws(self) -> int:
        """Draws an epoch, over all roots."""
        return sum(share.num_draws for share in self.shares)

    @property
    def num_positions(self) -> int:
        """Positions of every epoch: draws times views."""
        return self.num_draws * self.clips_per_video

    @cached_property
    def fingerprint(self) -> str:
        """The split's own for one root of weight 1; else a digest of all and the weights."""
        if [share.weight for share in self.shares] == [1]:
            return self.shares[0].fingerprint
        parts = [f"{share.fingerprint} {share.weight}\n" for share in self.shares]
        return hashlib.sha256("".join(["kprep mixture 1\n", *parts]).encode()).hexdigest()

    def order(self, epoch: int) -> MixtureOrder:
        """Return the sequence of an epoch."""
        return MixtureOrder(self, epoch)


@dataclass(frozen=True)
class MixtureOrder:
    """One epoch's sequence of (clip, view), with random access.

    Draw d of a clip has the views `d * clips_per_video` and on, so that no two turns of a clip in
    an epoch are the same.
    """

    mixture: Mixture
    epoch: int

    def __len__(self) -> int:
        """Return the number of positions."""
        return self.mixture.num_positions

    def __call__(self, positions: Int64) -> tuple[Int64, Int64]:
        """Return the clip, counted through all roots, and the view at each position, both int64."""
        mixture = self.mixture
        draws, views = EpochOrder(
            fingerprint=mixture.fingerprint,
            num_clips=mixture.num_draws,
            seed=mixture.seed,
            epoch=self.epoch,
            clips_per_video=mixture.clips_per_video,
            grouping=mixture.grouping,
            shuffle_block=mixture.shuffle_block,
        )(positions)
        clips, numbers = self.clips_of(draws)
        return clips, numbers * mixture.clips_per_video + views

    def clips_of(self, draws: Int64) -> tuple[Int64, Int64]:
        """Return each draw's clip, counted through all roots, and which draw of that clip it is."""
        shares = self.mixture.shares
        counts = np.array([share.num_clips for share in shares], dtype=np.int64)
        ends = np.cumsum([share.num_draws for share in shares])
        roots = np.searchsorted(ends, draws, side="right")
        inside = draws - np.concatenate([[0], ends])[roots]
        numbers, clips = np.divmod(inside, counts[roots])
        for root, share in enumerate(shares):
            if not share.num_chosen:
                continue
            chosen = np.flatnonzero((roots == root) & (numbers == share.draws_of_all))
            clips[chosen] = self._chosen(root, clips[chosen])
        return clips + (np.cumsum(counts) - counts)[roots], numbers

    def _chosen(self, root: int, places: Int64) -> Int64:
        """Return the clips, counted in their root, that this epoch chooses for a draw more.

        Runs of `shuffle_block` neighbours are chosen together, so that reads stay long.
        """
        mixture = self.mixture
        clips, _ = EpochOrder(
            fingerprint=f"{mixture.fingerprint} chosen of root {root}",
            num_clips=mixture.shares[root].num_clips,
            seed=mixture.seed,
            epoch=self.epoch,
            shuffle_block=mixture.shuffle_block,
        )(places)
        return clips
