"""The order of an epoch as a function with random access: no list, no generator state.

A position of the epoch maps to a (clip, view) through a keyed permutation, so that any process can
ask for any position at the cost of that position. The permutation is our own and versioned: a
library's random stream may change between releases, ours must give the same epoch for ever.

Construction: a Feistel network of mixed modulus over Z_a x Z_b with a * b >= N, cycle-walked into
[0, N) (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). Round function:
the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014); keys from SHAKE-256.
"""

from __future__ import annotations

import hashlib
import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from prep.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

ORDER_VERSION = 1
MOST_POSITIONS = 10**12
"""Of an epoch, clips x views: far from where 64-bit arithmetic ends."""

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]
Grouping = Literal["spread", "together"]

_ROUNDS = 12
_TABLE_SIZE = 1024  # up to here a sorted table of hashes is cheaper and better mixed


def check_positions(count: int) -> None:
    """Raise UsageError for an epoch that is too long for exact arithmetic."""
    if count > MOST_POSITIONS:
        raise UsageError(
            f"{count} clips x views an epoch must be at most {MOST_POSITIONS}; ask for fewer views"
        )


def derive_keys(count: int, *parts: int | str) -> UInt64:
    """Return `count` uint64 keys that depend on every part and on their order."""
    # an integer of whatever kind, such as NumPy's, is the number that it stands for
    plain = [
        part if type(part) is int or isinstance(part, str) else int(operator.index(part))
        for part in parts
    ]
    text = "\0".join(f"{type(part).__name__}:{part}" for part in plain)
    digest = hashlib.shake_256(f"kprep order {ORDER_VERSION}\0{text}".encode()).digest(8 * count)
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def mix(values: UInt64) -> UInt64:
    """Return SplitMix64's finaliser of each value: a bijection of uint64 that mixes all bits."""
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values = values ^ (values >> np.uint64(27))
    values = values * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Permutation:
    """A keyed bijection of [0, size), evaluated at any positions, and its inverse."""

    def __init__(self, size: int, *key_parts: int | str) -> None:
        if size < 1:
            raise ValueError(f"size ({size}) must be at least 1")
        self.size = size
        self._keys = derive_keys(_ROUNDS, size, *key_parts)
        self._rows = math.isqrt(size - 1) + 1
        self._columns = -(-size // self._rows)
        self._table: Int64 | None = None
        if size <= _TABLE_SIZE:
            self._table = np.argsort(_hashes(size, self._keys), kind="stable").astype(np.int64)

    def __call__(self, positions: Int64) -> Int64:
        """Return what stands at each position; int64 of the same shape."""
        if self._table is not None:
            return self._table[positions]
        return self._walk(positions, inverse=False)

    def inverse(self, items: Int64) -> Int64:
        """Return the position at which each item stands."""
        if self._table is not None:
            return np.argsort(self._table, kind="stable")[items]
        return self._walk(items, inverse=True)

    def _walk(self, values: Int64, *, inverse: bool) -> Int64:
        """Apply the network until every value is back in the domain; at most a row is outside."""
        found = self._network(values.astype(np.uint64), inverse=inverse)
        outside = np.flatnonzero(found >= self.size)
        while outside.size:
            found[outside] = self._network(found[outside], inverse=inverse)
            outside = outside[found[outside] >= self.size]
        return found.astype(np.int64)

    def _network(self, values: UInt64, *, inverse: bool) -> UInt64:
        rows, columns = np.uint64(self._rows), np.uint64(self._columns)
        high, low = values // columns, values % columns
        rounds = range(_ROUNDS)
        for number in reversed(rounds) if inverse else rounds:
            key = self._keys[number]
            if number % 2 == 0:
                shift = mix(low ^ key) % rows
                high = (high + (rows - shift if inverse else shift)) % rows
            else:
                shift = mix(high ^ key) % columns
                low = (low + (columns - shift if inverse else shift)) % columns
        return high * columns + low


def _hashes(size: int, keys: UInt64) -> UInt64:
    """Return `size` different values for each pair of keys, in (..., 2): a table by their order."""
    places = np.arange(size, dtype=np.uint64)
    return mix(mix(places ^ keys[..., :1]) ^ keys[..., 1:2])


def permuted(domains: Sequence[tuple[int, tuple[int | str, ...]]], places: list[int]) -> list[int]:
    """Return what stands at one place of each of several permutations.

    That is `Permutation(size, *key_parts)(place)` of each `(size, key_parts)`, those that are
    tables together: so far less is done for each.
    """
    small = [number for number, (size, _) in enumerate(domains) if size <= _TABLE_SIZE]
    found: dict[int, int] = {}
    if small:
        keys = np.stack([derive_keys(2, domains[n][0], *domains[n][1]) for n in small])
        rows = _hashes(max(domains[number][0] for number in small), keys)
        for number, row in zip(small, rows, strict=True):
            found[number] = int(row[: domains[number][0]].argsort()[places[number]])
    for number, (size, parts) in enumerate(domains):
        if number not in found:
            found[number] = int(Permutation(size, *parts)(np.array([places[number]]))[0])
    return [found[number] for number in range(len(domains))]


@dataclass(frozen=True)
class EpochOrder:
    """One epoch's sequence of (clip, view): `num_clips * clips_per_video` positions.

    `grouping` "spread" scatters a video's views over the epoch, "together" puts them side by side.
    `shuffle_block` keeps runs of that many neighbours of the index together, so that reads are
    longer; 1 shuffles perfectly. Where the runs are cut moves from epoch to epoch.
    """

    fingerprint: str
    num_clips: int
    seed: int
    epoch: int
    clips_per_video: int = 1
    grouping: Grouping = "spread"
    shuffle_block: int = 1

    def __len__(self) -> int:
        """Return the number of positions."""
        return self.num_clips * self.clips_per_video

    def __call__(self, positions: Int64) -> tuple[Int64, Int64]:
        """Return the clip in [0, num_clips) and the view at each position, both int64."""
        if self.grouping == "together":
            clips = self._shuffled(positions // self.clips_per_video, self.num_clips)
            return clips, positions % self.clips_per_video
        items = self._shuffled(positions, len(self))
        return items % self.num_clips, items // self.num_clips

    def _shuffled(self, positions: Int64, size: int) -> Int64:
        parts = (self.fingerprint, self.seed, self.epoch)
        block = min(self.shuffle_block, size)
        if block == 1:
            return Permutation(size, "items", *parts)(positions)
        # Blocks of a rotated ring: only the last one, `rest` long, is not full. Positions before
        # the place where it was shuffled to, inside it, and behind it are told apart by arithmetic.
        count, rest = -(-size // block), size % block or block
        shuffle = Permutation(count, "blocks", *parts)
        place = int(shuffle.inverse(np.array([count - 1]))[0])
        begin = place * block
        behind = positions >= begin + rest
        shifted = np.where(behind, positions - rest + block, positions)
        start = shuffle(shifted // block) * block
        rotation = int(derive_keys(1, "rotation", *parts)[0] % np.uint64(size))
        found: Int64 = (start + shifted % block + rotation) % size
        return found


@dataclass(frozen=True)
class BatchPlan:
    """How an epoch's positions are dealt to optimiser steps, ranks and micro-batches.

    Step b is positions `[b * B, (b + 1) * B)` with B = world_size * batch_size * accumulate; a
    rank's contiguous part of it is cut, in order, into `accumulate` micro-batches. Training leaves
    the tail out (`drop_last`); evaluation covers it, with uneven and possibly empty parts.
    """

    num_positions: int
    world_size: int
    batch_size: int
    accumulate: int = 1
    drop_last: bool = True

    @property
    def global_batch(self) -> int:
        """Clips an optimiser step, over all ranks and micro-batches."""
        return self.world_size * self.batch_size * self.accumulate

    @property
    def num_steps(self) -> int:
        """Optimiser steps an epoch, the same on every rank."""
        if self.drop_last:
            return self.num_positions // self.global_batch
        return -(-self.num_positions // self.global_batch)

    @property
    def num_left_out(self) -> int:
        """Positions at the end of the epoch that no step holds."""
        return self.num_positions - self.num_steps * self.global_batch if self.drop_last else 0

    def positions(self, step: int, micro: int, rank: int) -> Int64:
        """Return the positions of one rank's micro-batch; empty past the end of an evaluation."""
        first = step * self.global_batch + (rank * self.accumulate + micro) * self.batch_size
        return np.arange(first, min(first + self.batch_size, max(first, self.num_positions)))
