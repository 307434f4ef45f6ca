"""The seeded shuffle that decides which shard has which clip: a keyed hash of the clip's key."""

from __future__ import annotations

import hashlib


def place(key: str, seed: int) -> bytes:
    """Return 16 bytes by which clips are sorted; a function of key and seed alone."""
    return hashlib.blake2b(key.encode(), digest_size=16, key=str(seed).encode()).digest()
