"""What the pictures of a clip are, found in another way: opened as mp4, decoded from the start."""

from __future__ import annotations

import zlib
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from enlarged import original_key
from peers.task import FPS, SPLIT

from prep.format import read_manifest
from prep.storage import Storage
from stream.color import frame_bytes
from stream.decode import ClipDecoder
from stream.index import load_index
from stream.reads import ClipBytes
from stream.sampling import frame_offsets

if TYPE_CHECKING:
    from collections import Counter
    from pathlib import Path

    from stream.order import Int64


class Truth:
    """Knows every clip of a dataset."""

    def __init__(self, source: Path, frames: int) -> None:
        self._storage = Storage(str(source))
        self._index = load_index(self._storage, read_manifest(self._storage), SPLIT)
        self._rows = {self._index.key(row): row for row in range(len(self._index))}
        self._rate_of = {
            int(row): rate for rate, rows in self._index.rates().items() for row in rows
        }
        self._frames = frames
        self._usable: int = sum(
            bool(self._index.num_frames[row] > self._offsets(row)[-1]) for row in range(len(self))
        )

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self._rows)

    @property
    def index_path(self) -> Path:
        """The index as a file that can be mapped."""
        return self._index.path

    @property
    def video_bytes(self) -> int:
        """Bytes of all mp4 files."""
        return int(self._index.video_bytes.sum())

    def check_pictures(self, contender: str, pictures: list[list[Any]]) -> int:
        """Compare (key, start, crc32) with the truth; return their number, SystemExit if wrong."""
        for key, start, crc32 in pictures:
            if self._crc32(key if key in self._rows else original_key(key), start) != crc32:
                raise SystemExit(f"{contender} gives other pictures than {key} has at {start}")
        return len(pictures)

    def check_keys(self, contender: str, keys: Counter[str], times: int) -> int:
        """Return how many views an epoch lacks, short clips apart.

        SystemExit when it gives what is not there, or more often.
        """
        for key, count in keys.items():
            if key not in self._rows or count > times:
                raise SystemExit(f"{contender} gives {key} {count} times in an epoch, not {times}")
        return self._usable * times - keys.total()

    def _offsets(self, row: int) -> Int64:
        return frame_offsets(self._frames, Fraction(FPS), self._rate_of[row])

    def _crc32(self, key: str, start: int) -> int:
        row = self._rows[key]
        clip = self._index.clip(row)
        body = self._storage.read_range(
            clip.shard, clip.video_offset, clip.video_offset + clip.video_bytes
        )
        wanted = start + self._offsets(row)
        out = np.empty((self._frames, frame_bytes(clip.height, clip.width)), dtype=np.uint8)
        container = replace(clip, codec_config=None)
        ClipDecoder().decode(container, ClipBytes({}, body), wanted, out)
        return zlib.crc32(out)
