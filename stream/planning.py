"""A training run on paper: steps, bytes, requests, memory, shuffling, before it is paid for.

The numbers come from the loader's own order, sampling and GOP arithmetic, run on a sample of an
epoch; nothing is read but the manifest and the index.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from prep.errors import UsageError
from stream.order import BatchPlan, EpochOrder, Grouping, check_positions
from stream.plan_cache import CachePlan, plan_cache
from stream.plan_reads import ReadSample, sample_reads
from stream.sampling import MOST_FRAMES, frame_offsets, too_slow
from stream.shuffle_quality import ShuffleQuality, measure
from stream.whole_numbers import whole_number

if TYPE_CHECKING:
    from stream.order import Int64
    from stream.plan_splits import PlannedSplit

_QUALITY_POSITIONS = 100_000
_MAX_RANK_BATCHES = 512
_MOST = 10**9  # of anything that is counted
_MOST_GLOBAL_BATCH = 10**7

# Measured (docs/planning.md): PSS of one rank alone on a machine; ranks that share a node share
# library pages, so that sums are upper bounds
MAIN_PROCESS_BYTES = 550_000_000
FORK_SERVER_BYTES = 250_000_000
WORKER_PROCESS_BYTES = 120_000_000
ROW_BYTES = 40
"""Bytes a clip of the split in each process: row, starts, rate, shard and codec numbers (int64)."""
S3_REQUESTS_PER_SECOND = 5500
"""GETs a second that Amazon S3 documents for one prefix before it answers 503."""


@dataclass(frozen=True)
class PlanOptions:
    """The run to plan.

    nodes, gpus             machines, and GPUs (ranks) on each
    workers                 loader processes a rank
    batch, accumulate       clips a micro-batch, micro-batches an optimiser step
    clips_per_second        of all GPUs together
    cache_limit_bytes       of each node's cache; None: no cache
    price_per_1000_requests and price_per_gb (10^9 bytes): in any currency
    """

    nodes: int = 1
    gpus: int = 1
    workers: int = 8
    batch: int = 24
    epochs: int = 45
    clips_per_second: float = 600.0
    frames: int = 16
    fps: Fraction = Fraction(15)
    clips_per_video: int = 5
    accumulate: int = 1
    shuffle_block: int = 1
    grouping: Grouping = "spread"
    seed: int = 0
    layout: Literal["rgb", "yuv420"] = "yuv420"
    prefetch_batches: int = 2
    cache_limit_bytes: int | None = None
    price_per_1000_requests: float = 0.0004
    price_per_gb: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values that have no meaning."""
        whole_number("frames", self.frames, least=1, most=MOST_FRAMES)
        for name in ("nodes", "gpus", "batch", "epochs", "clips_per_video", "accumulate",
                     "shuffle_block", "prefetch_batches"):  # fmt: skip
            whole_number(name, getattr(self, name), least=1, most=_MOST)
        step = self.world_size * self.batch * self.accumulate
        whole_number("nodes x gpus x batch x accumulate", step, most=_MOST_GLOBAL_BATCH)
        whole_number("seed", self.seed)
        whole_number("workers", self.workers, least=0, most=_MOST)
        if self.cache_limit_bytes is not None:
            whole_number("cache_limit_bytes", self.cache_limit_bytes, least=1, most=_MOST**2)
        for name in ("price_per_1000_requests", "price_per_gb"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} ({getattr(self, name)}) must be a number, at least 0")
        if not 0 < self.clips_per_second < math.inf:
            raise UsageError(f"clips_per_second ({self.clips_per_second}) must be a number above 0")
        if self.fps <= 0:
            raise UsageError(f"fps ({self.fps}) must be above 0")

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.nodes * self.gpus


@dataclass(frozen=True)
class ReadPlan:
    """Bytes and requests of a run without a cache; rates are at the given clips a second.

    `alone_*` are what views would take that are not read together with the rest of their batch;
    `clip_share` is the part of a view's clip that its bytes are.
    """

    bytes_per_clip: float
    requests_per_clip: float
    clip_share: float
    alone_bytes_per_clip: float
    alone_requests_per_clip: float
    bytes_per_second: float
    requests_per_second: float
    bytes_per_second_node: float
    requests_per_second_node: float
    bytes_per_epoch: float
    requests_per_epoch: float
    bytes_run: float
    requests_run: float
    cost_epoch: float
    cost_run: float


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of main memory, with all workers' queues full.

    batch_bytes    of a decoded micro-batch
    batches        decoded micro-batches a rank: workers x (prefetch + 1) + 2
    rank_bytes     processes, batches, and 40 bytes a clip in each process
    node_bytes     gpus x rank_bytes + the index, which is mapped once
    """

    batch_bytes: int
    batches: int
    rank_bytes: int
    index_bytes: int
    node_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a run takes. Parts are None when `problems` says why there is no run.

    `problems` stop the run, `warnings` do not.
    """

    clips: int
    clips_too_short: int
    global_batch: int
    steps_per_epoch: int
    steps_run: int
    left_out_per_epoch: int
    epoch_seconds: float
    run_seconds: float
    sample: ReadSample | None
    reads: ReadPlan | None
    cache: CachePlan | None
    memory: MemoryPlan | None
    shuffle_step: ShuffleQuality | None
    shuffle_rank: ShuffleQuality | None
    problems: tuple[str, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def make_plan(split: PlannedSplit, options: PlanOptions) -> Plan:
    """Simulate a run on a split; what cannot work is in the plan's `problems`, not raised.

    Raises UsageError for numbers that no run has.
    """
    check_positions(split.num_rows * options.clips_per_video)
    offsets, problems = _offsets(split, options)
    spans = {rate: int(found[-1]) + 1 for rate, found in offsets.items()}
    placed = (0, 0, 0) if problems else split.place(spans)
    clips = placed[0]
    too_short = 0 if problems else split.num_rows - clips
    if not problems and not clips:
        more = " or a higher fps" if any(options.fps < rate for rate in spans) else ""
        problems.append(
            f"none of the {split.num_rows} clips has {options.frames} frames at "
            f"{float(options.fps):g} fps; ask for fewer frames{more}"
        )
    batches = BatchPlan(
        num_positions=clips * options.clips_per_video,
        world_size=options.world_size,
        batch_size=options.batch,
        accumulate=options.accumulate,
    )
    if clips and not batches.num_steps:
        problems.append(
            f"{batches.num_positions} clips an epoch cannot fill a batch of {batches.global_batch} "
            "(ranks x batch x accumulate); make it smaller"
        )
    if problems:
        return _no_plan(clips, too_short, batches, problems)
    return _plan(split, options, batches, placed, offsets)


def _offsets(split: PlannedSplit, options: PlanOptions) -> tuple[dict[Fraction, Int64], list[str]]:
    """Return each stored rate's frame offsets, and what is wrong with the rates."""
    offsets, problems = {}, []
    for rate, count in split.rates().items():
        if rate < options.fps:
            said = too_slow(options.fps, rate, all_clips=count == split.num_rows)
            problems.append(f"{count} of {split.num_rows} clips: {said}")
        else:
            offsets[rate] = frame_offsets(options.frames, options.fps, rate)
    return offsets, problems


def _no_plan(clips: int, too_short: int, batches: BatchPlan, problems: list[str]) -> Plan:
    return Plan(
        clips=clips,
        clips_too_short=too_short,
        global_batch=batches.global_batch,
        steps_per_epoch=0,
        steps_run=0,
        left_out_per_epoch=batches.num_positions,
        epoch_seconds=0.0,
        run_seconds=0.0,
        sample=None,
        reads=None,
        cache=None,
        memory=None,
        shuffle_step=None,
        shuffle_rank=None,
        problems=tuple(problems),
        warnings=(),
    )


def _plan(
    split: PlannedSplit,
    options: PlanOptions,
    batches: BatchPlan,
    placed: tuple[int, int, int],
    offsets: dict[Fraction, Int64],
) -> Plan:
    clips, split_bytes, disk_bytes = placed
    order = EpochOrder(
        fingerprint=split.fingerprint,
        num_clips=clips,
        seed=options.seed,
        epoch=0,
        clips_per_video=options.clips_per_video,
        grouping=options.grouping,
        shuffle_block=options.shuffle_block,
    )
    sample = sample_reads(split, order, batches, offsets, gap=split.gap_bytes)
    reads = _reads(sample, batches, options)
    step_rows, step_labels = _batches(split, order, batches, whole_steps=True)
    rank_rows, rank_labels = _batches(split, order, batches, whole_steps=False)
    share, views = split.same_class_share(), options.clips_per_video
    epoch_seconds = batches.num_steps * batches.global_batch / options.clips_per_second
    cache = plan_cache(
        clips=clips,
        split_bytes=split_bytes,
        disk_bytes=disk_bytes,
        views=views,
        grouping=options.grouping,
        nodes=options.nodes,
        epochs=options.epochs,
        limit_bytes=options.cache_limit_bytes,
        requests_per_view=reads.requests_per_clip,
        bytes_per_view=reads.bytes_per_clip,
    )
    return Plan(
        clips=clips,
        clips_too_short=split.num_rows - clips,
        global_batch=batches.global_batch,
        steps_per_epoch=batches.num_steps,
        steps_run=batches.num_steps * options.epochs,
        left_out_per_epoch=batches.num_left_out,
        epoch_seconds=epoch_seconds,
        run_seconds=epoch_seconds * options.epochs,
        sample=sample,
        reads=reads,
        cache=cache,
        memory=_memory(split, sample, options),
        shuffle_step=measure(
            step_rows, step_labels, clips=clips, views=views, same_class_share=share
        ),
        shuffle_rank=measure(
            rank_rows, rank_labels, clips=clips, views=views, same_class_share=share
        ),
        problems=(),
        warnings=tuple(_warnings(split, options, clips, reads)),
    )


def _reads(sample: ReadSample, batches: BatchPlan, options: PlanOptions) -> ReadPlan:
    size, requests = sample.bytes / sample.clips, sample.requests / sample.clips
    per_epoch = batches.num_steps * batches.global_batch
    rate, epochs = options.clips_per_second, options.epochs
    cost = per_epoch * (
        requests / 1000 * options.price_per_1000_requests + size / 1e9 * options.price_per_gb
    )
    return ReadPlan(
        bytes_per_clip=size,
        requests_per_clip=requests,
        clip_share=sample.bytes / sample.clip_bytes,
        alone_bytes_per_clip=sample.alone_bytes / sample.clips,
        alone_requests_per_clip=sample.alone_requests / sample.clips,
        bytes_per_second=size * rate,
        requests_per_second=requests * rate,
        bytes_per_second_node=size * rate / options.nodes,
        requests_per_second_node=requests * rate / options.nodes,
        bytes_per_epoch=size * per_epoch,
        requests_per_epoch=requests * per_epoch,
        bytes_run=size * per_epoch * epochs,
        requests_run=requests * per_epoch * epochs,
        cost_epoch=cost,
        cost_run=cost * epochs,
    )


def _memory(split: PlannedSplit, sample: ReadSample, options: PlanOptions) -> MemoryPlan:
    pixels = 2 if options.layout == "rgb" else 1  # RGB is 3 bytes a pixel, 4:2:0 is 1.5
    batch = options.batch * options.frames * sample.largest_frame_bytes * pixels
    workers = options.workers
    batches = workers * (options.prefetch_batches + 1) + 2 if workers else 2
    processes = MAIN_PROCESS_BYTES
    if workers:
        processes += FORK_SERVER_BYTES + workers * WORKER_PROCESS_BYTES
    rank = processes + batches * batch + (workers + 1) * split.num_rows * ROW_BYTES
    return MemoryPlan(
        batch_bytes=batch,
        batches=batches,
        rank_bytes=rank,
        index_bytes=split.index_bytes,
        node_bytes=options.gpus * rank + split.index_bytes,
    )


def _batches(
    split: PlannedSplit, order: EpochOrder, plan: BatchPlan, *, whole_steps: bool
) -> tuple[Int64, Int64]:
    """Return index rows and labels of batches spread over the epoch: of steps, or of ranks."""
    size = plan.global_batch if whole_steps else plan.batch_size
    total = plan.num_steps * (plan.global_batch // size)
    count = min(total, max(1, _QUALITY_POSITIONS // size), _MAX_RANK_BATCHES)
    first = np.arange(count, dtype=np.int64) * total // count * size
    clips, _ = order((first[:, None] + np.arange(size)).reshape(-1))
    rows = split.rows(clips)
    return rows.reshape(count, size), split.labels(rows).reshape(count, size)


def _warnings(split: PlannedSplit, options: PlanOptions, clips: int, reads: ReadPlan) -> list[str]:
    found = []
    if clips < split.num_rows:
        found.append(
            f"{split.num_rows - clips} of {split.num_rows} clips are too short for "
            f"{options.frames} frames at {float(options.fps):g} fps and stay out"
        )
    if reads.requests_per_second > S3_REQUESTS_PER_SECOND:
        found.append(
            f"{reads.requests_per_second:,.0f} requests a second are above the "
            f"{S3_REQUESTS_PER_SECOND:,} that S3 promises for one prefix; expect 503s until it has "
            "split the prefix, or use a cache or --grouping together"
        )
    if options.shuffle_block >= options.batch > 1:
        found.append(
            f"shuffle_block ({options.shuffle_block}) fills a rank's batch ({options.batch}) with "
            "neighbours that meet again in every epoch"
        )
    return found
