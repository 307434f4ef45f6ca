"""How fast a dataset streams: loaders over several storages, in turn, round after round."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from prep.errors import UsageError
from prep.format import index_path, read_manifest
from prep.format.layout import MANIFEST_PATH
from stream.bench_measure import (
    CountingStorage,
    MemoryStorage,
    Spread,
    cpu_seconds,
    own_processes,
    pss_bytes,
)
from stream.clip_stream import ClipStream
from stream.loader import ClipLoader
from stream.options import BatchAddress, StreamOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prep.storage import Storage
    from stream.batch import ClipBatch

_EPOCH_CLIPS = 50_000
_SETTLE_SECONDS = 0.2
_COUNTED_CLIPS = 200
BASELINE_LIMIT_BYTES = 4_000_000_000


@dataclass(frozen=True)
class LoaderOptions:
    """How the loaders of a bench are set up; `prefetch` counts batches a worker prepares ahead."""

    stream: StreamOptions
    batch: int = 24
    workers: int = 2
    prefetch: int = 2


@dataclass(frozen=True)
class LoaderResult:
    """What one loader did.

    clips_per_second, bytes_per_second and cpu_ms_per_clip are of the rounds; CPU is that of this
    process and the loader's workers. `ratio` is clips a second over the baseline's, round by round.
    first_batch_seconds: from opening the root, workers included; warm_first_batch_seconds: a new
    epoch with the workers up. memory_bytes: PSS of this process and the workers, queues full. The
    first loader of a process has the fork server's start and memory on its account.
    """

    clips_per_second: Spread
    bytes_per_second: Spread
    cpu_ms_per_clip: Spread
    ratio: Spread | None
    requests_per_clip: float
    bytes_per_clip: float
    first_batch_seconds: float
    warm_first_batch_seconds: float
    memory_bytes: int


@dataclass
class _Contender:
    """A loader that is kept open, its endless batches, and what was measured of it."""

    loader: ClipLoader
    batches: Iterator[ClipBatch]
    processes: set[int] = field(default_factory=set)
    epoch: int = 0
    first_batch: float = 0.0
    warm_first_batch: float = 0.0
    memory: int = 0
    requests_per_clip: float = 0.0
    bytes_per_clip: float = 0.0
    clip_rates: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)


def memory_baseline(storage: Storage, split: str) -> MemoryStorage | None:
    """Return a split held in memory; None when it is above 4 GB."""
    manifest = read_manifest(storage)
    shards = [shard.path for shard in manifest.splits[split].shards]
    if sum(manifest.files[path].bytes for path in shards) > BASELINE_LIMIT_BYTES:
        return None
    return MemoryStorage.hold(storage, [MANIFEST_PATH, index_path(split), *shards])


def bench_loaders(
    storages: dict[str, Storage],
    options: LoaderOptions,
    *,
    seconds: float,
    rounds: int = 5,
    baseline: str | None = None,
    before: Callable[[str], None] | None = None,
) -> dict[str, LoaderResult]:
    """Measure one loader over each storage, in turn, `rounds` times.

    Each gets `seconds` in all, after its queues have been emptied of what it prepared while others
    ran. Small splits are given more views, so that an epoch does not end within a round. `before`
    is called with the storage's name before each of its rounds. Raises UsageError for a time that
    does not end.
    """
    if not 0 < seconds < math.inf:
        raise UsageError(f"seconds ({seconds}) must be a number above 0")
    contenders: dict[str, _Contender] = {}
    for name, storage in storages.items():
        contenders[name] = _open(storage, options)
    for number in range(rounds):
        names = list(contenders)
        for name in names if number % 2 == 0 else reversed(names):
            if before is not None:
                before(name)
            _round(contenders[name], options, seconds / rounds)
    reference = None if baseline is None else contenders[baseline].clip_rates
    return {name: _result(one, reference) for name, one in contenders.items()}


def _open(storage: Storage, options: LoaderOptions) -> _Contender:
    """Start a loader alone: time to its first batch, its memory, its requests."""
    others = own_processes()
    listed = read_manifest(storage).split(options.stream.split, storage.root).num_clips
    begun = time.perf_counter()
    stream = _stream(storage, options, listed)
    if len(stream) < _EPOCH_CLIPS // options.batch:  # some clips are too short
        stream = _stream(storage, options, len(stream.rows))
    loader = ClipLoader(stream, num_workers=options.workers, prefetch_batches=options.prefetch)
    one = _Contender(loader, iter(loader))
    next(one.batches)
    one.first_batch = time.perf_counter() - begun
    for _ in range(_queued(options)):
        next(one.batches)
    time.sleep(_SETTLE_SECONDS)
    one.processes = {os.getpid(), *(own_processes() - others)}
    one.memory = pss_bytes(one.processes)
    _restart(one)
    begun = time.perf_counter()
    next(one.batches)
    one.warm_first_batch = time.perf_counter() - begun
    one.requests_per_clip, one.bytes_per_clip = _count(storage, stream, options)
    return one


def _stream(storage: Storage, options: LoaderOptions, clips: int) -> ClipStream:
    """Open a root with so many views of each of its clips that an epoch is long."""
    views = -(-max(_EPOCH_CLIPS, options.batch) // max(1, clips))
    longer = replace(options.stream, clips_per_video=max(views, options.stream.clips_per_video))
    return ClipStream(storage, longer, batch_size=options.batch)


def _queued(options: LoaderOptions) -> int:
    """Return how many batches can stand finished while nobody takes any."""
    return options.workers * options.prefetch + 1


def _restart(one: _Contender) -> None:
    one.epoch += 1
    one.loader.set_epoch(one.epoch)
    one.batches = iter(one.loader)


def _take(one: _Contender) -> int:
    """Take a batch, of the next epoch where one ends; return its clips."""
    batch = next(one.batches, None)
    if batch is None:
        _restart(one)
        batch = next(one.batches)
    return len(batch)


def _round(one: _Contender, options: LoaderOptions, seconds: float) -> None:
    time.sleep(_SETTLE_SECONDS)  # the loader before fills its queues
    for _ in range(_queued(options)):
        _take(one)
    clips, cpu, begun = 0, cpu_seconds(one.processes), time.perf_counter()
    while True:
        clips += _take(one)
        wall = time.perf_counter() - begun
        if wall >= seconds:
            break
    one.clip_rates.append(clips / wall)
    one.cpu_ms.append((cpu_seconds(one.processes) - cpu) * 1000 / clips)


def _count(storage: Storage, stream: ClipStream, options: LoaderOptions) -> tuple[float, float]:
    """Return requests and bytes a clip of a short pass in this process."""
    counting = (
        storage
        if isinstance(storage, MemoryStorage)
        else CountingStorage(storage.root, storage.options, storage.retry)
    )
    alone = ClipStream(counting, stream.options, batch_size=options.batch)
    counting.requests = counting.bytes_read = clips = 0
    steps = min(alone.plan.num_steps, -(-_COUNTED_CLIPS // options.batch))
    for step in reversed(range(steps)):  # out of turn, so that nothing is read ahead and not used
        clips += len(alone[BatchAddress(0, step, 0)])
    return counting.requests / clips, counting.bytes_read / clips


def _result(one: _Contender, reference: list[float] | None) -> LoaderResult:
    ratios = None
    if reference is not None:
        ratios = Spread.of(
            [mine / other for mine, other in zip(one.clip_rates, reference, strict=True)]
        )
    return LoaderResult(
        clips_per_second=Spread.of(one.clip_rates),
        bytes_per_second=Spread.of([rate * one.bytes_per_clip for rate in one.clip_rates]),
        cpu_ms_per_clip=Spread.of(one.cpu_ms),
        ratio=ratios,
        requests_per_clip=one.requests_per_clip,
        bytes_per_clip=one.bytes_per_clip,
        first_batch_seconds=one.first_batch,
        warm_first_batch_seconds=one.warm_first_batch,
        memory_bytes=one.memory,
    )


def table(results: dict[str, LoaderResult]) -> list[str]:
    """Return a Markdown table."""
    lines = [
        (
            "| storage | clips/s (low to high) | of memory | MB/s | CPU ms a clip "
            "| requests a clip | bytes a clip | first batch, warm | memory |"
        ),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in results.items():
        rate, ratio = one.clips_per_second, one.ratio
        lines.append(
            f"| {name} | {rate.median:.0f} ({rate.low:.0f} to {rate.high:.0f}) "
            f"| {'' if ratio is None else f'{ratio.median:.2f}'} "
            f"| {one.bytes_per_second.median / 1e6:.1f} | {one.cpu_ms_per_clip.median:.2f} "
            f"| {one.requests_per_clip:.2f} | {one.bytes_per_clip:.0f} "
            f"| {one.first_batch_seconds:.2f} s, {one.warm_first_batch_seconds:.3f} s "
            f"| {one.memory_bytes / 1e6:.0f} MB |"
        )
    return lines
