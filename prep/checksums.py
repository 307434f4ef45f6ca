"""The hash that names a clip's content: part of the format."""

from __future__ import annotations

import hashlib


def content_hash(data: bytes) -> bytes:
    """Return the 16 bytes of BLAKE2b-128 of a video payload: `content_hash` of the index."""
    return hashlib.blake2b(data, digest_size=16).digest()
