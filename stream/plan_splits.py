"""What a plan needs to know of a split: a stored one, or a synthetic one that holds no arrays."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Protocol

import numpy as np

from prep.format import read_manifest
from stream.cache import disk_space
from stream.index import IndexedClip, load_index
from stream.order import Int64, derive_keys, mix
from stream.ranges import REMOTE_GAP_BYTES
from stream.sampling import num_starts

if TYPE_CHECKING:
    from prep.storage import Storage

# A synthetic clip is what profile `small` makes of a ten-second Kinetics clip
_FRAMES, _GOP_FRAMES, _FPS = 150, 16, Fraction(15)
_WIDTH, _HEIGHT = 170, 128
_MEAN_BYTES = 180_000
_NUM_CLASSES = 400
_CLIPS_PER_SHARD = 4000
_TAR_BYTES = 2048  # headers, sidecar and padding between two clips
_INDEX_ROW_BYTES = 165  # Arrow file of 240,000 rows with GOP columns: 39.6 MB
_KEYFRAME_FRAMES = 4  # a keyframe is about as large as four other frames


class PlannedSplit(Protocol):
    """Random access to the rows of a split, and which of them are in the training order."""

    @property
    def fingerprint(self) -> str:
        """What the order depends on."""

    @property
    def num_rows(self) -> int:
        """Clips of the split."""

    @property
    def num_shards(self) -> int:
        """Shards of the split."""

    @property
    def index_bytes(self) -> int:
        """Bytes of the mapped index."""

    @property
    def gap_bytes(self) -> int:
        """Gap between two ranges that the loader reads over to save a request."""

    def rates(self) -> dict[Fraction, int]:
        """Return the stored frame rates and how many clips have each."""

    def place(self, spans: dict[Fraction, int]) -> tuple[int, int, int]:
        """Leave clips shorter than their rate's span out; return the others' number and bytes.

        `spans` gives, for each rate, the frames from the first to the last wanted one. Bytes are
        those of the clips alone, without the tars' headers and sidecars, and then the disk space
        that a cache needs for them.
        """

    def rows(self, clips: Int64) -> Int64:
        """Return the index rows of clips counted in the order's range; call `place` first."""

    def rate(self, row: int) -> Fraction:
        """Return the stored frame rate of a row."""

    def clip(self, row: int) -> IndexedClip:
        """Return a row."""

    def labels(self, rows: Int64) -> Int64:
        """Return label indices, int64."""

    def same_class_share(self) -> float:
        """Return the chance that two clips of the split, drawn with replacement, share a label."""


class StoredSplit:
    """A split of a dataset; only its manifest and index are read."""

    def __init__(self, storage: Storage, name: str) -> None:
        manifest = read_manifest(storage)
        split = manifest.split(name, storage.root)
        self.gap_bytes = 0 if storage.local_root is not None else REMOTE_GAP_BYTES
        self._index = load_index(storage, manifest, name)
        self._bytes = self._index.video_bytes
        self.fingerprint = split.fingerprint
        self.num_shards = len(split.shards)
        self.num_rows = len(self._index)
        self.index_bytes = self._index.path.stat().st_size
        self._by_rate = self._index.rates()
        self._rates = list(self._by_rate)
        self._rate_of = np.zeros(self.num_rows, dtype=np.int64)
        for number, rows in enumerate(self._by_rate.values()):
            self._rate_of[rows] = number
        self._labels = self._index.labels

    def rates(self) -> dict[Fraction, int]:
        """Return the stored frame rates and how many clips have each."""
        return {rate: len(rows) for rate, rows in self._by_rate.items()}

    def place(self, spans: dict[Fraction, int]) -> tuple[int, int, int]:
        """Leave clips shorter than their rate's span out; return number, bytes and disk space."""
        starts = np.zeros(self.num_rows, dtype=np.int64)
        frames = self._index.num_frames
        for rate, rows in self._by_rate.items():
            starts[rows] = num_starts(frames[rows], spans[rate])
        self._rows = np.flatnonzero(starts > 0)
        sizes = self._bytes[self._rows]
        return len(self._rows), int(sizes.sum()), disk_space(sizes)

    def rows(self, clips: Int64) -> Int64:
        """Return the index rows of clips counted in the order's range."""
        found: Int64 = self._rows[clips]
        return found

    def rate(self, row: int) -> Fraction:
        """Return the stored frame rate of a row."""
        return self._rates[int(self._rate_of[row])]

    def clip(self, row: int) -> IndexedClip:
        """Return a row."""
        return self._index.clip(row)

    def labels(self, rows: Int64) -> Int64:
        """Return label indices, int64."""
        return self._labels[rows]

    def same_class_share(self) -> float:
        """Return the chance that two clips of the split, drawn with replacement, share a label."""
        counts = np.unique(self._labels, return_counts=True)[1]
        return float(np.sum((counts / max(1, self.num_rows)) ** 2))


@dataclass(frozen=True)
class SyntheticSplit:
    """A made-up split of ten-second clips: every row is computed when it is asked for.

    Clips have 150 frames at 15 fps, keyframes every 16, 170x128 pixels and 180 kB on average (from
    0.5 to 1.5 times that, evenly), 4,000 in a shard, in 400 classes: mixed as `kprep shard` mixes
    them, or one class after the other (`sorted_by_class`).
    """

    num_rows: int
    sorted_by_class: bool = False
    fingerprint: str = field(default="synthetic", init=False)

    @property
    def num_shards(self) -> int:
        """Shards of the split."""
        return -(-self.num_rows // _CLIPS_PER_SHARD)

    @property
    def gap_bytes(self) -> int:
        """Gap between two ranges that is read over: as from a bucket."""
        return REMOTE_GAP_BYTES

    @property
    def index_bytes(self) -> int:
        """Bytes of the mapped index."""
        return self.num_rows * _INDEX_ROW_BYTES

    def rates(self) -> dict[Fraction, int]:
        """Return the one stored frame rate."""
        return {_FPS: self.num_rows}

    def place(self, spans: dict[Fraction, int]) -> tuple[int, int, int]:
        """Return number, bytes and disk space of the clips in the order: all or none."""
        clips = self.num_rows if spans[_FPS] <= _FRAMES else 0
        overhead = disk_space(np.full(1000, _MEAN_BYTES)) // 1000 - _MEAN_BYTES
        return clips, clips * _MEAN_BYTES, clips * (_MEAN_BYTES + overhead)

    def rows(self, clips: Int64) -> Int64:
        """Return the rows: every clip is in the order."""
        return clips

    def rate(self, row: int) -> Fraction:  # noqa: ARG002 - all rows are alike
        """Return the stored frame rate."""
        return _FPS

    def clip(self, row: int) -> IndexedClip:
        """Return a row, with GOPs that share its bytes by their frames."""
        offsets = np.cumsum([0, *_gop_weights()]) * self._bytes(row)
        return IndexedClip(
            row=row,
            key=f"synthetic{row:09d}",
            shard=f"train/train-{row // _CLIPS_PER_SHARD:06d}.tar",
            label=int(self.labels(np.array([row]))[0]),
            num_frames=_FRAMES,
            width=_WIDTH,
            height=_HEIGHT,
            video_offset=self._offset(row),
            video_bytes=self._bytes(row),
            crc32=0,
            codec_config=b"synthetic",
            gop_frames=_GOP_FRAMES,
            gop_offsets=offsets.astype(np.int64),
            gop_crc32=np.zeros(len(offsets) - 1, dtype=np.int64),
        )

    def _bytes(self, row: int) -> int:
        """Return a clip's bytes; those of rows 2n and 2n + 1 add up to twice the mean."""
        part = int(_hash(np.array([row // 2]), "bytes")[0] % np.uint64(1001)) / 1000 - 0.5
        return round(_MEAN_BYTES * (1 + (part if row % 2 == 0 else -part)))

    def _offset(self, row: int) -> int:
        """Return where a clip's bytes begin in its shard, one clip close behind the other."""
        place = row % _CLIPS_PER_SHARD
        before = place // 2 * 2 * _MEAN_BYTES + (self._bytes(row - 1) if place % 2 else 0)
        return before + (place + 1) * _TAR_BYTES

    def labels(self, rows: Int64) -> Int64:
        """Return label indices, int64."""
        if self.sorted_by_class:
            return rows * _NUM_CLASSES // self.num_rows
        return (_hash(rows, "label") % np.uint64(_NUM_CLASSES)).astype(np.int64)

    def same_class_share(self) -> float:
        """Return the chance that two clips share a label."""
        return 1 / _NUM_CLASSES


def _hash(rows: Int64, what: str) -> np.typing.NDArray[np.uint64]:
    return mix(rows.astype(np.uint64) ^ derive_keys(1, "synthetic", what)[0])


def _gop_weights() -> list[float]:
    """Return each GOP's share of a synthetic clip's bytes."""
    weights = [
        _KEYFRAME_FRAMES - 1 + min(_GOP_FRAMES, _FRAMES - first)
        for first in range(0, _FRAMES, _GOP_FRAMES)
    ]
    return [weight / sum(weights) for weight in weights]
