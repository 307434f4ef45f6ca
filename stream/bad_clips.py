"""Clips whose content is damaged: what stands in for them, and the account that is kept of them.

A bad clip is one whose bytes fail their crc32, or do not decode, also after one fresh and uncached
read. Storage that cannot be reached never makes one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from prep.errors import DatasetError
from stream.order import derive_keys

if TYPE_CHECKING:
    from collections.abc import Iterable

Policy = Literal["raise", "substitute"]

MOST_SUBSTITUTES = 16
"""Substitutes of one position that may be bad themselves before that is an error."""


class BadClip(NamedTuple):
    """A clip that could not be used.

    key     of the sample
    shard   path of its shard
    offset  of its video payload, in bytes from the start of the shard
    reason  one sentence, with the place of the damage where it is known
    """

    key: str
    shard: str
    offset: int
    reason: str


def substitute(
    fingerprint: str, seed: int, epoch: int, position: int, attempt: int, num_clips: int
) -> int:
    """Return which clip of the order, in [0, num_clips), stands in at a position of an epoch.

    `attempt` is 1 for the first substitute and counts on while substitutes are bad too. Nothing
    else enters, so that every rank, worker and rerun draws the same.
    """
    keys = derive_keys(1, "substitute", fingerprint, seed, epoch, position, attempt)
    return int(keys[0] % np.uint64(num_clips))


@dataclass
class BadClipSummary:
    """The bad clips that a rank met since its loader was made.

    occurrences  how often one was met: each view and epoch counts
    clips        the different ones, by key
    limit        how many different ones are borne
    """

    limit: int
    occurrences: int = 0
    clips: dict[str, BadClip] = field(default_factory=dict)

    def add(self, found: Iterable[BadClip]) -> None:
        """Count what was met; raise DatasetError as `count`."""
        met = list(found)
        self.occurrences += len(met)
        self.count(met)

    def count(self, found: Iterable[BadClip]) -> None:
        """Keep the different ones; raise DatasetError when there are more than the limit."""
        for clip in found:
            self.clips.setdefault(clip.key, clip)
        if len(self.clips) > self.limit:
            last = next(reversed(self.clips.values()))
            raise DatasetError(
                f"{len(self.clips)} different clips are bad, more than bad_clip_limit "
                f"({self.limit}): {self._keys()}; the last: {last.reason}"
            )

    def __str__(self) -> str:
        """Return one line, with the first ten keys."""
        if not self.clips:
            return "no bad clips"
        return f"{len(self.clips)} bad clips, met {self.occurrences} times: {self._keys()}"

    def _keys(self) -> str:
        return ", ".join(list(self.clips)[:10]) + (", …" if len(self.clips) > 10 else "")
