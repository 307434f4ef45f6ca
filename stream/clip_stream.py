"""A split as a map from batch addresses to batches: what every worker process runs."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from prep.errors import DatasetError, UsageError
from prep.format import Manifest, read_manifest
from stream.batch import ClipBatch, Layout
from stream.color import frame_bytes, yuv420_to_rgb
from stream.decode import ClipDecoder, check_even
from stream.index import ClipIndex, load_index
from stream.order import BatchPlan, EpochOrder, Grouping, Int64
from stream.reads import ClipReader, ClipRequest, pin_versions
from stream.sampling import (
    Placement,
    evaluation_starts,
    frame_offsets,
    num_starts,
    training_start,
)

if TYPE_CHECKING:
    from prep.storage import Storage

Mode = Literal["train", "eval"]
Short = Literal["skip", "pad"]


class BatchAddress(NamedTuple):
    """Names one rank's micro-batch: everything that is in it follows from this and the options."""

    epoch: int
    step: int
    micro: int


@dataclass(frozen=True)
class StreamOptions:
    """What decides a stream's sequence of clips and their form."""

    split: str
    mode: Mode = "train"
    frames: int = 16
    fps: Fraction = Fraction(15)
    clips_per_video: int = 1
    grouping: Grouping = "spread"
    shuffle_block: int = 1
    seed: int = 0
    short: Short = "skip"
    placement: Placement = "even"
    layout: Layout = "rgb"

    def __post_init__(self) -> None:
        """Refuse values that have no meaning."""
        for name in ("frames", "clips_per_video", "shuffle_block"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.fps <= 0:
            raise UsageError(f"fps ({self.fps}) must be above 0")
        choices = {
            "mode": ("train", "eval"),
            "grouping": ("spread", "together"),
            "short": ("skip", "pad"),
            "placement": ("even", "torchvision"),
            "layout": ("rgb", "yuv420"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} ({getattr(self, name)!r}) must be {' or '.join(allowed)}")


class ClipStream(Dataset[ClipBatch]):
    """One rank's view of a split: `stream[BatchAddress(epoch, step, micro)]` is a ClipBatch.

    Holds no position and no generator: any process can compute any batch. Raises DatasetError for
    an unknown split or a damaged index, UsageError for options that the split cannot serve.
    """

    def __init__(
        self,
        storage: Storage,
        options: StreamOptions,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
    ) -> None:
        self.storage = storage
        self.options = options
        self.rank = rank
        self.manifest: Manifest = read_manifest(storage)
        if options.split not in self.manifest.splits:
            known = ", ".join(sorted(self.manifest.splits)) or "none"
            raise UsageError(f"{storage.root} has no split {options.split!r}; it has {known}")
        self.split = self.manifest.splits[options.split]
        self.index: ClipIndex = load_index(storage, self.manifest, options.split)
        self._place_clips()
        self.plan = BatchPlan(
            num_positions=len(self.rows) * options.clips_per_video,
            world_size=world_size,
            batch_size=batch_size,
            accumulate=accumulate,
            drop_last=options.mode == "train",
        )
        if options.mode == "train" and self.plan.num_steps == 0:
            raise UsageError(
                f"{self.plan.num_positions} clips an epoch cannot fill a batch of "
                f"{self.plan.global_batch} (world_size x batch_size x accumulate); make it smaller"
            )
        sizes = {shard.path: self.manifest.files[shard.path].bytes for shard in self.split.shards}
        self._reader = ClipReader(storage, pin_versions(storage, sizes))
        self._decoder: ClipDecoder | None = None

    def _place_clips(self) -> None:
        """Find every clip's number of valid starts, and which clips are in the order."""
        options = self.options
        self._offsets: dict[int, Int64] = {}
        self._rate_of = np.zeros(len(self.index), dtype=np.int64)
        starts = np.zeros(len(self.index), dtype=np.int64)
        for number, (rate, rows) in enumerate(self.index.rates().items()):
            offsets = frame_offsets(options.frames, options.fps, rate)
            self._offsets[number] = offsets
            self._rate_of[rows] = number
            starts[rows] = num_starts(self.index.num_frames[rows], int(offsets[-1]) + 1)
        self.too_short: Int64 = np.flatnonzero(starts == 0)
        if options.short == "pad":
            starts = np.maximum(starts, 1)
        self.starts: Int64 = starts
        self.rows: Int64 = np.flatnonzero(starts > 0)
        if not len(self.rows):
            raise UsageError(
                f"no clip of split {options.split} has {options.frames} frames at "
                f"{float(options.fps):g} fps; ask for fewer frames, or short='pad'"
            )

    def __len__(self) -> int:
        """Return the number of batches an epoch on this rank."""
        return self.plan.num_steps * self.plan.accumulate

    def __getitem__(self, address: BatchAddress) -> ClipBatch:
        """Read and decode one batch; raises BadClipError and StorageError (see ClipReader)."""
        rows, views = self.items(address)
        starts = [self.start(address.epoch, int(row), int(view))
                  for row, view in zip(rows, views, strict=True)]  # fmt: skip
        requests = [
            ClipRequest(self.index.clip(int(row)), self._frames(int(row), start))
            for row, start in zip(rows, starts, strict=True)
        ]
        video = self._decode(requests)
        clips = [request.clip for request in requests]
        return ClipBatch(
            video=video,
            size=torch.tensor(
                [(clip.height, clip.width) for clip in clips], dtype=torch.int64
            ).reshape(-1, 2),
            label=torch.tensor([clip.label for clip in clips], dtype=torch.int64),
            key=[clip.key for clip in clips],
            start_frame=torch.tensor(starts, dtype=torch.int64),
            view=torch.from_numpy(views.astype(np.int64)),
            layout=self.options.layout,
        )

    def items(self, address: BatchAddress) -> tuple[Int64, Int64]:
        """Return the index rows and views of a batch; no video is touched."""
        positions = self.plan.positions(address.step, address.micro, self.rank)
        if self.options.mode == "eval":
            views = self.options.clips_per_video
            return self.rows[positions // views], positions % views
        clips, views_at = self._order(address.epoch)(positions)
        return self.rows[clips], views_at

    def _order(self, epoch: int) -> EpochOrder:
        return EpochOrder(
            fingerprint=self.split.fingerprint,
            num_clips=len(self.rows),
            seed=self.options.seed,
            epoch=epoch,
            clips_per_video=self.options.clips_per_video,
            grouping=self.options.grouping,
            shuffle_block=self.options.shuffle_block,
        )

    def start(self, epoch: int, row: int, view: int) -> int:
        """Return the start frame of a view of a clip."""
        options, starts = self.options, int(self.starts[row])
        if options.mode == "eval":
            placed = evaluation_starts(options.clips_per_video, starts, options.placement)
            return int(placed[view])
        return training_start(options.seed, epoch, self.index.key(row), view, starts)

    def _frames(self, row: int, start: int) -> Int64:
        """Return the frame indices of a clip; past the end the last frame repeats (short="pad")."""
        frames = start + self._offsets[int(self._rate_of[row])]
        return np.minimum(frames, int(self.index.num_frames[row]) - 1)

    def _decode(self, requests: list[ClipRequest]) -> torch.Tensor:
        if self._decoder is None:
            self._decoder = ClipDecoder()
        sizes = [(request.clip.height, request.clip.width) for request in requests]
        for request, size in zip(requests, sizes, strict=True):
            check_even(*size, request.clip.key)
        payloads = self._reader.read(requests)
        longest = max((frame_bytes(*size) for size in sizes), default=0)
        planar = torch.empty((len(requests), self.options.frames, longest), dtype=torch.uint8)
        pixels = planar.numpy()
        for number, (request, payload) in enumerate(zip(requests, payloads, strict=True)):
            used = frame_bytes(*sizes[number])
            self._decoder.decode(request.clip, payload, request.frames, pixels[number, :, :used])
            pixels[number, :, used:] = 0
        return planar if self.options.layout == "yuv420" else _to_rgb(planar, sizes)

    @property
    def unscored(self) -> list[str]:
        """Keys of the clips that are too short to be in the order."""
        if self.options.short == "pad":
            return []
        return [self.index.key(int(row)) for row in self.too_short]


def _to_rgb(planar: torch.Tensor, sizes: list[tuple[int, int]]) -> torch.Tensor:
    """Convert each clip; clips of several sizes stand in the upper left of the largest."""
    height = max((size[0] for size in sizes), default=0)
    width = max((size[1] for size in sizes), default=0)
    shape = (len(sizes), planar.shape[1], height, width, 3)
    alike = len(set(sizes)) <= 1
    video = (
        torch.empty(shape, dtype=torch.uint8) if alike else torch.zeros(shape, dtype=torch.uint8)
    )
    for number, (rows, columns) in enumerate(sizes):
        video[number, :, :rows, :columns] = yuv420_to_rgb(planar[number], rows, columns)
    return video


def check_labels(stream: ClipStream) -> None:
    """Raise DatasetError when a clip of the split has no label, which training needs."""
    missing = np.flatnonzero(stream.index.labels[stream.rows] < 0)
    if len(missing):
        key = stream.index.key(int(stream.rows[missing[0]]))
        raise DatasetError(
            f"split {stream.options.split} has {len(missing)} clips without a label, "
            f"{key} the first"
        )
