"""The reads of a sample of batches, by the loader's own order, jitter and GOP arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stream.ranges import REMOTE_GAP_BYTES, ByteRange, ClipRequest, batch_ranges
from stream.sampling import num_starts, training_start

if TYPE_CHECKING:
    from fractions import Fraction

    from stream.order import BatchPlan, EpochOrder, Int64
    from stream.plan_splits import PlannedSplit

_SAMPLED_CLIPS = 4000


@dataclass(frozen=True)
class ReadSample:
    """What reading a sample of one epoch's micro-batches takes.

    Every number but `largest_frame_bytes` is a sum over the sample. `bytes` and `requests` are what
    the loader reads; `alone_*` are what the same views take when each is read by itself, and
    `clip_bytes` the bytes of their whole clips.
    """

    batches: int
    clips: int
    whole_epoch: bool
    bytes: int
    requests: int
    alone_bytes: int
    alone_requests: int
    clip_bytes: int
    largest_frame_bytes: int


def sample_reads(
    split: PlannedSplit,
    order: EpochOrder,
    plan: BatchPlan,
    offsets: dict[Fraction, Int64],
    *,
    gap: int = REMOTE_GAP_BYTES,
    clips: int = _SAMPLED_CLIPS,
) -> ReadSample:
    """Plan the reads of micro-batches spread evenly over an epoch, all of them when they are few.

    `offsets` gives, for each stored rate, the frames of a view counted from its start; ranges of a
    batch at most `gap` bytes apart are one request. At least one micro-batch and otherwise at most
    `clips` clips are looked at.
    """
    total = plan.num_steps * plan.accumulate * plan.world_size
    count = min(total, max(1, clips // plan.batch_size))
    read: list[ByteRange] = []
    alone: list[ByteRange] = []
    taken = clip_bytes = largest = 0
    for number in range(count):
        positions = plan.positions(*_address(number * total // count, plan))
        requests = [
            view_request(split, order, int(clip), int(view), offsets)
            for clip, view in zip(*order(positions), strict=True)
        ]
        read += batch_ranges(requests, gap=gap)
        alone += [part for request in requests for part in request.ranges]
        for clip in (request.clip for request in requests):
            clip_bytes += clip.video_bytes
            largest = max(largest, clip.height * clip.width * 3 // 2)
        taken += len(requests)
    return ReadSample(
        batches=count,
        clips=taken,
        whole_epoch=count == total,
        bytes=_size(read),
        requests=len(read),
        alone_bytes=_size(alone),
        alone_requests=len(alone),
        clip_bytes=clip_bytes,
        largest_frame_bytes=largest,
    )


def _address(number: int, plan: BatchPlan) -> tuple[int, int, int]:
    """Return step, micro-batch and rank of an epoch's micro-batch, counted rank after rank."""
    step, inside = divmod(number, plan.accumulate * plan.world_size)
    rank, micro = divmod(inside, plan.accumulate)
    return step, micro, rank


def view_request(
    split: PlannedSplit, order: EpochOrder, clip: int, view: int, offsets: dict[Fraction, Int64]
) -> ClipRequest:
    """Return the frames of a view of the order's clip number `clip`, jitter included."""
    row = int(split.rows(np.array([clip]))[0])
    record, frames = split.clip(row), offsets[split.rate(row)]
    starts = int(num_starts(np.array([record.num_frames]), int(frames[-1]) + 1)[0])
    start = training_start(order.seed, order.epoch, record.key, view, starts)
    return ClipRequest(record, start + frames)


def _size(ranges: list[ByteRange]) -> int:
    return sum(part.end - part.start for part in ranges)
