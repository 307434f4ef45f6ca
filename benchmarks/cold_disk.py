"""Shards on a local disk that are not in the page cache, read ahead or when they are needed.

    python benchmarks/cold_disk.py ROOT --work DIR [--shards 40] [--seconds 24] [--rounds 6]

ROOT is a local dataset with split `train`. DIR, on the disk that is measured, gets copies of its
shards under other names, so that a round reads little of it twice; it is used again by the next
run. The same loader reads them in turns:

- page cache: all shards are read before the round
- cold: they are dropped from the page cache before the round
- cold, not read ahead: likewise, and nothing is asked of the disk before it is needed

Only what the disk's own and a virtual machine's host keep is not dropped: the time of a read is
printed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

BENCHMARKS = Path(__file__).resolve().parent
sys.path[:0] = [str(BENCHMARKS.parent), str(BENCHMARKS)]

import results  # noqa: E402
from enlarged import enlarge  # noqa: E402

from prep.storage import Storage  # noqa: E402
from stream.bench import LoaderOptions, bench_loaders, table  # noqa: E402
from stream.options import StreamOptions  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

_WARM, _COLD, _WAITING = "page cache", "cold", "cold, not read ahead"
_READ_BYTES = 27_000


@dataclass
class WaitingStorage(Storage):
    """Reads when bytes are needed and not before."""

    def begin_range(
        self, path: str, start: int, end: int, *, etag: str | None = None
    ) -> Callable[[], memoryview]:
        """Return what reads bytes `[start, end)`, once."""
        return cache(partial(self.read_range, path, start, end, etag=etag))


def copied(source: Path, target: Path, shards: int) -> list[Path]:
    """Return the shards of a root of that many copies, on the disk; made where it is not there."""
    mark = target / "copied"
    if not mark.exists():
        shutil.rmtree(target, ignore_errors=True)
        enlarge(source, target, shards)
        for shard in target.glob("train/*.tar"):
            copy = shard.with_suffix(".copy")
            shutil.copyfile(shard, copy)  # `enlarge` made a link
            copy.replace(shard)
        os.sync()
        mark.touch()
    return sorted(target.glob("train/*.tar"))


def drop(shards: list[Path]) -> None:
    """Let the page cache forget the shards."""
    for shard in shards:
        descriptor = os.open(shard, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def fill(shards: list[Path]) -> None:
    """Have the page cache hold the shards."""
    for shard in shards:
        shard.read_bytes()


def read_milliseconds(shards: list[Path], count: int = 200) -> float:
    """Return the median time of a cold read of a view's bytes."""
    drop(shards)
    draw = random.Random(0)  # noqa: S311 - not for secrets
    times = []
    for _ in range(count):
        shard = draw.choice(shards)
        place = draw.randrange(max(1, shard.stat().st_size - _READ_BYTES))
        descriptor = os.open(shard, os.O_RDONLY)
        begun = time.perf_counter()
        os.pread(descriptor, _READ_BYTES, place)
        times.append(time.perf_counter() - begun)
        os.close(descriptor)
    return sorted(times)[count // 2] * 1000


def main() -> None:
    """Measure and print."""
    os.environ["PYTHONPATH"] = str(BENCHMARKS.parent)  # workers, too, are of this checkout
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="a folder on the disk to measure")
    parser.add_argument("--shards", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=24, help="measured, for each contender")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=24)
    asked = results.parse(parser)
    root = asked.work.absolute() / "copies"
    shards = copied(asked.root.absolute(), root, asked.shards)
    options = LoaderOptions(
        StreamOptions("train", frames=16, fps=Fraction(15), layout="yuv420"),
        batch=asked.batch, workers=asked.workers,
    )  # fmt: skip
    latency = read_milliseconds(shards)
    found = bench_loaders(
        {_WARM: Storage(str(root)), _COLD: Storage(str(root)), _WAITING: WaitingStorage(str(root))},
        options, seconds=asked.seconds, rounds=asked.rounds, baseline=_WARM,
        before=lambda name: fill(shards) if name == _WARM else drop(shards),
    )  # fmt: skip
    size = sum(shard.stat().st_size for shard in shards)
    head = (
        f"{len(shards)} shards, {size / 1e9:.1f} GB; a cold read of {_READ_BYTES // 1000} kB takes "
        f"{latency:.2f} ms; batch {asked.batch}, {asked.workers} workers; {results.machine()}:"
    )
    lines = [line.replace("of memory", "of page cache") for line in table(found)]
    values = {name: asdict(one) for name, one in found.items()}
    results.write(asked, [head, "", *lines], {"read_milliseconds": latency, "results": values})
    if asked.chart:
        with results.chart(asked.chart, 1, width=6) as (axis,):
            spreads = {name: one.clips_per_second for name, one in found.items()}
            rates = {name: [one.low, one.median, one.high] for name, one in spreads.items()}
            results.bars(axis, rates, "clips/s", 0)


if __name__ == "__main__":
    main()
