"""Random draws that are a function of the clip, the epoch and the seed, and of nothing else.

No generator is advanced, so the draws are the same on any number of ranks, in any batch, and after
a resume.
"""

from __future__ import annotations

import hashlib
import random
from typing import NamedTuple


class ClipDraw(NamedTuple):
    """What the draws for one clip depend on."""

    seed: int
    """Of the run."""
    epoch: int
    """Counted from 0."""
    key: str
    """Of the sample."""
    view: int
    """Which of the video's clips this is."""

    def digest(self, person: str, num_bytes: int) -> bytes:
        """Return uniform bytes, independent for every use that has a name (`person`) of its own."""
        # integers hold no separator, and the key comes last: no two clips share a message
        message = f"{self.seed}/{self.epoch}/{self.view}/{self.key}".encode()
        return hashlib.blake2b(message, digest_size=num_bytes, person=person.encode()).digest()

    def generator(self, purpose: str) -> random.Random:
        """Return a generator of its own for a purpose, such as "box"."""
        seed = int.from_bytes(self.digest(f"kprep {purpose} 1", 32), "little")
        return random.Random(seed)  # noqa: S311 - not for secrets
