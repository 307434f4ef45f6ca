"""Random access to the clips of a split: any frames of any clip, by its key."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from prep.errors import UsageError
from prep.storage import RetryPolicy, Storage
from stream.batch_memory import private_room, rgb_of_planar
from stream.color import frame_bytes
from stream.decode import ClipDecoder, check_even
from stream.opened_roots import open_roots, reader_of
from stream.ranges import ClipRequest
from stream.roots import DataRoot, check_patience, data_roots
from stream.whole_numbers import whole_number

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from fractions import Fraction

    import torch

    from stream.batch import Layout
    from stream.decode import UInt8
    from stream.index import ClipIndex, IndexedClip
    from stream.order import Int64
    from stream.reads import ClipReader
    from stream.roots import RootLike

_PATIENCE_SECONDS = 60.0  # someone may be sitting before it
_ROUNDING_SECONDS = 1e-6  # 2 / 15 as a float is less than frame 2 begins at


@dataclass(frozen=True)
class StoredClip:
    """What the index says of a clip.

    key         sample key
    label       index into the class names, -1 for none
    class_name  its text; None where there is no label
    num_frames  frames that are stored, numbered from 0
    fps         stored frames a second
    height      of a frame, in pixels
    width       of a frame, in pixels
    """

    key: str
    label: int
    class_name: str | None
    num_frames: int
    fps: Fraction
    height: int
    width: int

    @property
    def seconds(self) -> float:
        """Length of the clip, in seconds."""
        return float(self.num_frames / self.fps)


class StoredClips:
    """The clips of a split, to be looked up by key and decoded in any part.

    Reads only the groups of pictures that hold the frames asked for, and checks their bytes, as the
    loader does. One thread at a time; a worker process that gets a copy reads for itself.
    """

    def __init__(
        self,
        root: RootLike,
        *,
        split: str,
        storage_options: dict[str, Any] | None = None,
        storage_patience_seconds: float = _PATIENCE_SECONDS,
    ) -> None:
        """Open a split of a dataset.

        Args:
            root: a directory, `s3://bucket/prefix`, `gs://…` or `https://…`.
            split: name of the split.
            storage_options: of the object store's client, see prep.storage.Storage.
            storage_patience_seconds: how long to wait for a store that fails.

        Raises:
            UsageError: the dataset has no such split.
            DatasetError: the root is no dataset, or its index is damaged.
            StorageError: the root cannot be read.
        """
        check_patience(storage_patience_seconds)
        one = _one_root(root)
        options = one.options_or(storage_options or {})
        storage = Storage(one.root, options, RetryPolicy(storage_patience_seconds))
        opened = open_roots(storage, split, evaluation=True)
        self.root = one.root
        self.split = split
        self.class_names: tuple[str, ...] = tuple(opened[0].manifest.class_names)
        index = opened[0].index
        assert index is not None  # noqa: S101 - open_roots refuses a single root without the split
        self._index: ClipIndex = index
        reader = reader_of(opened, index, None, rank=0, world_size=1)
        self._reader: ClipReader = reader  # type: ignore[assignment]  # of one root
        self._decoder: ClipDecoder | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave this process's decoder behind."""
        return {**self.__dict__, "_decoder": None}

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self._index)

    def __iter__(self) -> Iterator[StoredClip]:
        """Iterate over the clips in the order of the index."""
        return (self._described(row) for row in range(len(self)))

    def __contains__(self, key: object) -> bool:
        """Whether a clip has this key."""
        return isinstance(key, str) and self._index.row_of(key) is not None

    def __getitem__(self, key: str) -> StoredClip:
        """Return what the index says of a clip. Raises UsageError for a key that no clip has."""
        return self._described(self._row(key))

    def frames(self, key: str, frames: Iterable[int], *, layout: Layout = "rgb") -> torch.Tensor:
        """Decode frames of a clip.

        Args:
            key: of the clip.
            frames: numbers from 0 to num_frames - 1, in any order; one can stand more than once.
            layout: "rgb" or "yuv420", see ClipBatch.

        Returns:
            uint8: (T, height, width, 3), or (T, height * width * 3 // 2) for "yuv420", in the
            order of `frames`.

        Raises:
            UsageError: no clip has the key, or it lacks one of the frames.
            BadClipError: the clip is damaged.
            DatasetError: its pictures have an odd size.
            StorageError: its bytes cannot be had.
        """
        if layout not in ("rgb", "yuv420"):
            raise UsageError(f"layout ({layout!r}) must be rgb or yuv420")
        clip = self._index.clip(self._row(key))
        check_even(clip.height, clip.width, clip.key)
        wanted = _frame_numbers(clip, frames)
        planar = private_room((1, len(wanted), frame_bytes(clip.height, clip.width)))
        if len(wanted):
            self._decode(ClipRequest(clip, wanted), planar[0].numpy())
        if layout == "yuv420":
            return planar[0]
        return rgb_of_planar(planar, [(clip.height, clip.width)], private_room)[0]

    def frames_at(
        self, key: str, seconds: Iterable[float], *, layout: Layout = "rgb"
    ) -> torch.Tensor:
        """Decode the frames that are shown at given times of a clip, counted from its beginning.

        A time within a microsecond before a frame begins is that frame's. Otherwise as `frames`.
        Raises UsageError for a time outside the clip, too.
        """
        clip = self[key]
        times = [float(time) for time in seconds]
        for time in times:
            if not 0 <= time < clip.seconds:
                raise UsageError(
                    f"time ({time:g}) of clip {key} must be from 0 to below its length, "
                    f"{clip.seconds:g} seconds"
                )
        last = clip.num_frames - 1
        numbers = [min(last, math.floor((time + _ROUNDING_SECONDS) * clip.fps)) for time in times]
        return self.frames(key, numbers, layout=layout)

    def _row(self, key: str) -> int:
        row = self._index.row_of(key) if isinstance(key, str) else None
        if row is None:
            raise UsageError(f"{self.root} has no clip {key!r} in split {self.split}")
        return row

    def _described(self, row: int) -> StoredClip:
        clip = self._index.clip(row)
        return StoredClip(
            key=clip.key,
            label=clip.label,
            class_name=self.class_names[clip.label] if clip.label >= 0 else None,
            num_frames=clip.num_frames,
            fps=self._index.rate(row),
            height=clip.height,
            width=clip.width,
        )

    def _decode(self, request: ClipRequest, out: UInt8) -> None:
        if self._decoder is None:
            self._decoder = ClipDecoder()
        self._decoder.decode_request(self._reader.begin([request])[0], out)


def _one_root(root: RootLike | Sequence[Any]) -> DataRoot:
    roots = data_roots(root)
    if len(roots) != 1:
        raise UsageError(f"root ({root!r}) must be one root, not {len(roots)}")
    return roots[0]


def _frame_numbers(clip: IndexedClip, frames: Iterable[int]) -> Int64:
    most = clip.num_frames - 1
    numbers = [whole_number(f"frame of {clip.key}", one, least=0, most=most) for one in frames]
    return np.array(numbers, dtype=np.int64)
