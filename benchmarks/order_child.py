"""One measurement of order.py in a process of its own, so that its peak memory is its own.

    python order_child.py CONTENDER CLIPS VIEWS PERCENT BATCH

Prints JSON: seconds and CPU seconds from nothing to the first batch of positions after PERCENT of
the epoch (or to the finished plan), and the peak of resident memory in bytes, with the interpreter
and its imports.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

if TYPE_CHECKING:
    from collections.abc import Callable

_Batch = list[tuple[int, int]]


def kprep(clips: int, views: int) -> Callable[[int, int], _Batch]:
    import numpy as np

    from stream.order import EpochOrder

    def first(start: int, batch: int) -> _Batch:
        order = EpochOrder("benchmark", clips, seed=0, epoch=0, clips_per_video=views)
        found = order(np.arange(start, start + batch))
        return list(zip(*(part.tolist() for part in found), strict=True))

    return first


def numpy(clips: int, views: int) -> Callable[[int, int], _Batch]:
    import numpy as np

    def first(start: int, batch: int) -> _Batch:
        items = np.random.default_rng(0).permutation(clips * views)[start : start + batch]
        return [(item % clips, item // clips) for item in items.tolist()]

    return first


def torch(clips: int, views: int) -> Callable[[int, int], _Batch]:
    import torch

    def first(start: int, batch: int) -> _Batch:
        generator = torch.Generator().manual_seed(0)
        items = torch.randperm(clips * views, generator=generator)[start : start + batch]
        return [(item % clips, item // clips) for item in items.tolist()]

    return first


def sampler(clips: int, views: int) -> Callable[[int, int], _Batch]:
    from torch.utils.data import DistributedSampler

    def first(start: int, batch: int) -> _Batch:
        dataset: Any = range(clips * views)
        order = iter(DistributedSampler(dataset, num_replicas=1, rank=0, seed=0))
        return [(i % clips, i // clips) for i in itertools.islice(order, start, start + batch)]

    return first


def buffer(clips: int, views: int) -> Callable[[int, int], _Batch]:
    import random

    from webdataset.filters import _shuffle

    def first(start: int, batch: int) -> _Batch:
        items = _shuffle(iter(range(clips * views)), bufsize=1000, rng=random.Random(0))  # noqa: S311
        return [(i % clips, i // clips) for i in itertools.islice(items, start, start + batch)]

    return first


def plan(clips: int, views: int) -> Callable[[int, int], _Batch]:
    from stream.plan_splits import SyntheticSplit
    from stream.planning import PlanOptions, make_plan

    def whole(_: int, __: int) -> _Batch:
        made = make_plan(
            SyntheticSplit(clips), PlanOptions(nodes=128, gpus=8, clips_per_video=views)
        )
        return [(made.steps_per_epoch, made.clips)]

    return whole


def peak_bytes() -> int:
    """Return the high water mark of this program; getrusage's can be that of its parent."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    name = sys.argv[1]
    clips, views, percent, batch = (int(value) for value in sys.argv[2:])
    makers = {"kprep": kprep, "numpy": numpy, "torch": torch, "sampler": sampler,
              "buffer": buffer, "plan": plan}  # fmt: skip
    first = makers[name](clips, views)
    begun, cpu = time.perf_counter(), time.process_time()
    found = first(clips * views * percent // 100, batch)
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    measured = {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak_bytes()}
    print(json.dumps({**measured, "positions": found[:3]}))


if __name__ == "__main__":
    main()
