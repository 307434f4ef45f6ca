"""One process that decodes clips from memory, a near bucket and a far one, in short turns.

    python benchmarks/stream_alone.py ROOT [--milliseconds 30] [--rounds 60]

No workers: one process reads, decodes and makes batches, so that on two cores the bucket's server
(nginx, see nginx_bucket.py) has the other one, and turns are fractions of a second, so that what
else the machine does falls on all of them. Ratios are of a turn and the turn from memory next to
it. `stream_latency.py` has the loader with its workers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY)]

from nginx_bucket import BUCKET, nginx_buckets  # noqa: E402
from results import Rounds, Table, bars, chart, in_turns, machine, parse, ratio, text, write  # noqa: E402

from prep.storage import Storage  # noqa: E402
from stream.bench import memory_baseline  # noqa: E402
from stream.clip_stream import ClipStream  # noqa: E402
from stream.options import BatchAddress, StreamOptions  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

_MEMORY = "memory"
_WARM = 3  # batches before each turn: their requests were begun long ago


class Contender:
    """One storage, and how far its sequence has been read."""

    def __init__(self, storage: Storage, asked: argparse.Namespace) -> None:
        options = StreamOptions("train", fps=Fraction(15), layout=asked.layout)
        self._stream = ClipStream(storage, options, batch_size=asked.batch)
        self._batches, self._clips = asked.batches, asked.batches * asked.batch
        if self._stream.plan.num_steps < _WARM + asked.batches:
            sys.exit(f"{asked.root} has too few clips for {_WARM + asked.batches} batches")

    def measure(self, number: int) -> dict[str, float]:
        """Return clips a second, by the clock, and milliseconds of this process's CPU a clip."""
        turns = self._stream.plan.num_steps // (_WARM + self._batches)
        epoch, turn = divmod(number, turns)
        first = turn * (_WARM + self._batches)
        for step in range(first, first + _WARM):
            self._stream[BatchAddress(epoch, step, 0)]
        begun, cpu = time.perf_counter(), time.process_time()
        for step in range(first + _WARM, first + _WARM + self._batches):
            self._stream[BatchAddress(epoch, step, 0)]
        cpu, seconds = time.process_time() - cpu, time.perf_counter() - begun
        return {"clips_per_second": self._clips / seconds, "cpu": cpu * 1000 / self._clips}


def results_table(found: Rounds) -> Table:
    """Return one row a storage."""
    base = found[_MEMORY]
    rows = [
        [
            name,
            text(one["clips_per_second"], 0),
            f"{ratio(one['clips_per_second'], base['clips_per_second']):.3f}",
            text(one["cpu"], 3),
            f"{ratio(base['cpu'], one['cpu']):.3f}",
        ]
        for name, one in found.items()
    ]
    columns = ["storage", "clips/s (low to high)", "of memory", "CPU ms a clip", "by CPU"]
    return Table(columns, rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--milliseconds", type=float, default=30, help="before each first byte")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--batches", type=int, default=8, help="of a turn")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--layout", choices=["yuv420", "rgb"], default="yuv420")
    asked = parse(parser)
    memory = memory_baseline(Storage(str(asked.root)), "train")
    if memory is None:
        sys.exit(f"{asked.root} is too large for a baseline in memory")
    with (
        tempfile.TemporaryDirectory() as folder,
        nginx_buckets(asked.root, Path(folder), asked.milliseconds) as buckets,
    ):
        options = {"skip_signature": True, "virtual_hosted_style_request": False}
        near, far = (
            Storage(f"s3://{BUCKET}", {**options, "endpoint": endpoint})
            for endpoint in (buckets.near, buckets.far)
        )
        storages = {_MEMORY: memory, "S3": near, f"S3 + {asked.milliseconds:g} ms": far}
        contenders: dict[str, Callable[[int], dict[str, float]]] = {
            name: Contender(storage, asked).measure for name, storage in storages.items()
        }
        found = in_turns(contenders, asked.rounds)
    head = (
        f"One process, batches of {asked.batch}, {asked.layout}; medians of {asked.rounds} rounds "
        f"of {asked.batches} batches; {machine()}:"
    )
    write(asked, [head, "", *results_table(found).lines()], {"rounds": found})
    if asked.chart:
        with chart(asked.chart, 1, width=7) as (axis,):
            rates = {name: one["clips_per_second"] for name, one in found.items()}
            bars(axis, rates, "clips/s", 0)


if __name__ == "__main__":
    main()
