"""A split as a map from batch addresses to batches: what every worker process runs."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from prep.errors import BadClipError, DatasetError, UsageError
from prep.storage import stop_waiting
from stream.bad_clips import MOST_SUBSTITUTES, BadClip, substitute
from stream.batch import ClipBatch
from stream.batch_memory import Room, fresh_room, private_room, rgb_of_planar, widened
from stream.cache import ClipCache, disk_space, parse_bytes
from stream.class_lists import join_class_lists
from stream.color import frame_bytes
from stream.decode import ClipDecoder, check_even
from stream.mixture import Mixture
from stream.opened_roots import (
    OpenedRoot,
    WeightedStorage,
    check_shares,
    index_of,
    open_roots,
    reader_of,
    shares_of,
    too_short_error,
    too_slow_error,
)
from stream.options import BatchAddress
from stream.order import BatchPlan, Int64, check_positions
from stream.placed_clips import PlacedClips
from stream.ranges import ClipRequest, joined_views
from stream.reads import PendingClip
from stream.topology import rank_and_size
from stream.whole_numbers import whole_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prep.format import Manifest
    from prep.format.manifest import Split
    from prep.storage import Storage
    from stream.decode import UInt8
    from stream.index import IndexedClip
    from stream.options import StreamOptions

_CLIPS_AHEAD = 48  # whose reads a process has begun


class _Item(NamedTuple):
    """One clip of a batch: the epoch's position, what the index says, view and start frame."""

    position: int
    clip: IndexedClip
    view: int
    start: int


_Begun = tuple[list[_Item], list[PendingClip]]


class ClipStream(Dataset[ClipBatch]):
    """One rank's view of a split: `stream[BatchAddress(epoch, step, micro)]` is a ClipBatch.

    Holds no position and no generator: any process can compute any batch. Over several roots, keys
    are called `N/key` and class lists are joined by name. Raises UsageError for an unknown
    split and for options that the split cannot serve, DatasetError for a damaged index.
    """

    def __init__(
        self,
        storage: Storage | Sequence[Storage | WeightedStorage],
        options: StreamOptions,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        cache_dir: str | Path | None = None,
        cache_limit: int | str | None = None,
    ) -> None:
        self.options = options
        self.rank, world_size = rank_and_size(rank, world_size)
        batch_size = whole_number("batch_size", batch_size, least=1)
        accumulate = whole_number("accumulate", accumulate, least=1)
        self.roots: list[OpenedRoot] = open_roots(
            storage, options.split, evaluation=options.mode == "eval"
        )
        lists = [root.manifest.class_names for root in self.roots]
        self.class_names, labels = join_class_lists(lists)
        self.index = index_of(self.roots, labels)
        self.placed = self._place_clips()
        shares = shares_of(self.roots, self.rows)
        if options.mode == "train":
            check_shares(self.roots, shares, options.split, options.frames, options.fps)
        self.mixture = Mixture(
            shares,
            options.seed,
            options.clips_per_video,
            options.grouping,
            options.shuffle_block,
        )
        check_positions(self.mixture.num_positions)
        self.plan = BatchPlan(
            num_positions=self.mixture.num_positions,
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
        self._reader = reader_of(
            self.roots,
            self.index,
            self._cache(cache_dir, cache_limit),
            rank=self.rank,
            world_size=world_size,
        )
        self._decoder: ClipDecoder | None = None
        self._expected: BatchAddress | None = None
        self._ahead: deque[tuple[BatchAddress, _Begun]] = deque()

    @property
    def storage(self) -> Storage:
        """Where the first root is."""
        return self.roots[0].storage

    @property
    def manifest(self) -> Manifest:
        """The first root's manifest."""
        return self.roots[0].manifest

    @property
    def split(self) -> Split:
        """The split in the first root that has it."""
        return next(root.split for root in self.roots if root.split is not None)

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what belongs to this process: its decoder and its reads."""
        return {**self.__dict__, "_decoder": None, "_expected": None, "_ahead": deque()}

    def _cache(self, directory: str | Path | None, limit: int | str | None) -> ClipCache | None:
        if (directory is None) != (limit is None):
            raise UsageError("cache_dir and cache_limit must be given together, or neither")
        if directory is None or limit is None:
            return None
        if not isinstance(directory, str | os.PathLike):
            raise UsageError(f"cache_dir ({directory!r}) must be a directory's path")
        needed = disk_space(self.index.video_bytes[self.rows])
        return ClipCache(Path(directory), parse_bytes(limit), needed)

    def _place_clips(self) -> PlacedClips:
        options, rates = self.options, self.index.rates()
        if any(rate < options.fps for rate in rates):
            raise too_slow_error(self.roots, options.fps)
        placed = PlacedClips(options, rates, self.index.num_frames)
        if not len(placed.rows):
            raise too_short_error(options.split, options.frames, options.fps)
        return placed

    @property
    def rows(self) -> Int64:
        """Index rows of the clips in the order, ascending."""
        return self.placed.rows

    def __len__(self) -> int:
        """Return the number of batches an epoch on this rank."""
        return self.plan.num_steps * self.plan.accumulate

    def most_batch_bytes(self) -> int:
        """Return the bytes of the largest video tensor that a batch of this split can have."""
        heights, widths = (sizes[self.rows] for sizes in self.index.sizes)
        if self.options.layout == "yuv420":
            frame = frame_bytes(1, int((heights * widths).max()))
        else:
            frame = int(heights.max()) * int(widths.max()) * 3
        return self.plan.batch_size * self.options.frames * frame

    def __getitem__(self, address: BatchAddress) -> ClipBatch:
        """Read and decode one batch.

        Raises UsageError for an address that the epoch does not have; BadClipError when a clip is
        damaged and the policy is "raise", or too many of its substitutes are damaged too;
        StorageError when bytes cannot be had.
        """
        return self.batch(address, fresh_room)

    def batch(self, address: BatchAddress, room: Room) -> ClipBatch:
        """Read and decode one batch into memory that `room` gives; see `__getitem__`."""
        address = self._checked(address)
        try:
            planar, kept, bad = self._decode(address.epoch, self._reads(address), room)
        except BaseException:  # the reads that are still under way must not wait for the storage
            self._ahead.clear()
            stop_waiting()
            raise
        clips = [item.clip for item in kept]
        sizes = [(clip.height, clip.width) for clip in clips]
        return ClipBatch(
            video=planar if self.options.layout == "yuv420" else rgb_of_planar(planar, sizes, room),
            size=torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2),
            label=torch.tensor([clip.label for clip in clips], dtype=torch.int64),
            key=[clip.key for clip in clips],
            start_frame=torch.tensor([item.start for item in kept], dtype=torch.int64),
            view=torch.tensor([item.view for item in kept], dtype=torch.int64),
            layout=self.options.layout,
            bad_clips=tuple(bad),
        )

    def _checked(self, address: Any) -> BatchAddress:
        if not isinstance(address, tuple) or len(address) != len(BatchAddress._fields):
            raise UsageError(
                f"{address!r} must be a BatchAddress(epoch, step, micro), as a sampler hands them "
                "out; iterate over a `clip_loader` instead"
            )
        epoch, step, micro = address
        return BatchAddress(
            whole_number("epoch", epoch, least=0),
            whole_number("step", step, least=0, most=self.plan.num_steps - 1),
            whole_number("micro", micro, least=0, most=self.plan.accumulate - 1),
        )

    def _reads(self, address: BatchAddress) -> _Begun:
        """Return the batch's clips, on their way; of batches in turn, begin the next too."""
        if self._ahead and self._ahead[0][0] == address:
            begun = self._ahead.popleft()[1]
        else:
            self._ahead.clear()
            begun = self._begin(address)
        in_turn, self._expected = self._expected == address, self._following(address)
        if in_turn:
            self._begin_next(address)
        return begun

    def _begin_next(self, address: BatchAddress) -> None:
        """Begin the batches behind `address`: one at least, small ones until they make up for it.

        While they are read, what is in front of them is decoded; a batch of a few clips alone would
        be decoded long before a far store, or a disk, has answered.
        """
        last = self._ahead[-1][0] if self._ahead else address
        while not self._ahead or sum(len(begun[0]) for _, begun in self._ahead) < _CLIPS_AHEAD:
            following = self._following(last)
            if following is None:
                return
            self._ahead.append((following, self._begin(following)))
            last = following

    def _begin(self, address: BatchAddress) -> _Begun:
        positions = self.plan.positions(address.step, address.micro, self.rank).tolist()
        rows, views = self.items(address)
        items = self._items(address.epoch, positions, rows.tolist(), views.tolist())
        requests = joined_views([self._request(item) for item in items])
        return items, self._reader.begin(requests)

    def _following(self, address: BatchAddress) -> BatchAddress | None:
        """Return which batch this process gets next: torch deals them to its workers in turn."""
        worker = get_worker_info()
        place = address.step * self.plan.accumulate + address.micro
        place += worker.num_workers if worker is not None else 1
        step, micro = divmod(place, self.plan.accumulate)
        return BatchAddress(address.epoch, step, micro) if step < self.plan.num_steps else None

    def _items(
        self, epoch: int, positions: list[int], rows: list[int], views: list[int]
    ) -> list[_Item]:
        clips = [self.index.clip(row) for row in rows]
        starts = self.placed.start_frames(epoch, clips, views)
        return list(map(_Item, positions, clips, views, starts))

    def items(self, address: BatchAddress) -> tuple[Int64, Int64]:
        """Return the index rows and views of a batch; no video is touched."""
        positions = self.plan.positions(address.step, address.micro, self.rank)
        if self.options.mode == "eval":
            views = self.options.clips_per_video
            return self.rows[positions // views], positions % views
        clips, views_at = self.mixture.order(address.epoch)(positions)
        return self.rows[clips], views_at

    def _request(self, item: _Item) -> ClipRequest:
        clip = item.clip
        check_even(clip.height, clip.width, clip.key)
        return ClipRequest(clip, self.placed.frames(clip, item.start))

    def _decode(
        self, epoch: int, begun: _Begun, room: Room
    ) -> tuple[torch.Tensor, list[_Item], list[BadClip]]:
        """Decode each clip while those behind it are still being read.

        Returns:
            uint8 (N, T, F), planar YUV; the items that it holds; what was bad.
        """
        items, reads = begun
        clips = [pending.request.clip for pending in reads]
        longest = max((frame_bytes(clip.height, clip.width) for clip in clips), default=0)
        shape = (len(items), self.options.frames, longest)
        planar = room(shape) if self.options.layout == "yuv420" else private_room(shape)
        pixels = planar.numpy()  # once: torch's own calls cost more than the rest of a clip's steps
        kept: list[_Item | None] = list(items)
        bad: list[BadClip] = []
        first = 0
        waiting = deque(reads)
        while waiting:
            pending = waiting.popleft()
            numbers = range(first, first + pending.request.views)
            try:
                self._decode_clip(
                    pending, pixels[first : numbers.stop].reshape(-1, pixels.shape[2])
                )
            except BadClipError as error:
                if self.options.bad_clips == "raise":
                    raise
                if len(numbers) > 1:
                    # each by itself: what becomes of a view must not depend on its neighbours
                    alone = self._reader.begin([self._request(items[number]) for number in numbers])
                    waiting.extendleft(reversed(alone))
                    continue
                found_bad = _bad_clip(pending, error)
                # an evaluation names a clip once, whose views are all lost for one reason
                if self.options.mode == "train" or all(b.key != found_bad.key for b in bad):
                    bad.append(found_bad)
                planar, kept[first] = self._replace(epoch, items[first], planar, first, bad)
                pixels = planar.numpy()
            first = numbers.stop
        found = [item for item in kept if item is not None]
        if len(found) < len(kept):
            planar = planar[[number for number, item in enumerate(kept) if item is not None]]
        return planar, found, bad

    def _decode_clip(self, pending: PendingClip, pixels: UInt8) -> None:
        """Write a request's frames into `pixels`, uint8 (frames, F), and zeros behind each."""
        if self._decoder is None:
            self._decoder = ClipDecoder()
        used = frame_bytes(pending.request.clip.height, pending.request.clip.width)
        self._decoder.decode_request(pending, pixels[:, :used])
        pixels[:, used:] = 0

    def _replace(
        self, epoch: int, item: _Item, planar: torch.Tensor, number: int, bad: list[BadClip]
    ) -> tuple[torch.Tensor, _Item | None]:
        """Put a substitute at place `number`; in evaluation, which never substitutes, nothing."""
        if self.options.mode == "eval":
            return planar, None
        for attempt in range(1, MOST_SUBSTITUTES + 1):
            drawn = substitute(
                self.mixture.fingerprint, self.options.seed, epoch, item.position, attempt,
                self.mixture.num_draws,
            )  # fmt: skip
            clips, _ = self.mixture.order(epoch).clips_of(np.array([drawn]))
            other = self._items(epoch, [item.position], self.rows[clips].tolist(), [item.view])[0]
            pending = self._reader.begin([self._request(other)])[0]
            clip = pending.request.clip
            planar = widened(planar, frame_bytes(clip.height, clip.width))
            try:
                self._decode_clip(pending, planar[number].numpy())
            except BadClipError as error:
                bad.append(_bad_clip(pending, error))
                continue
            return planar, other
        raise BadClipError(
            f"{MOST_SUBSTITUTES} substitutes for one clip are bad too, the last: {bad[-1].reason}"
        )

    @property
    def unscored(self) -> list[str]:
        """Keys of the clips that are too short to be in the order."""
        return [self.index.key(int(row)) for row in self.placed.left_out]


def _bad_clip(pending: PendingClip, error: BadClipError) -> BadClip:
    clip = pending.request.clip
    return BadClip(clip.key, clip.shard, clip.video_offset, str(error))


def check_all_labelled(stream: ClipStream) -> None:
    """Raise DatasetError when a clip of the split has no label, which training needs."""
    missing = np.flatnonzero(stream.index.labels[stream.rows] < 0)
    if len(missing):
        key = stream.index.key(int(stream.rows[missing[0]]))
        raise DatasetError(
            f"split {stream.options.split} has {len(missing)} clips without a label, "
            f"{key} the first"
        )
