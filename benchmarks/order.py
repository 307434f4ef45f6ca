"""The order of an epoch: planning 10 million clips x 5 views, and resuming anywhere in it.

    python benchmarks/order.py [--clips 10000000] [--views 5] [--rounds 5] [--chart FILE.png]

Each measurement is a process of its own: seconds from nothing to the first batch of positions after
0 %, 50 % and 90 % of the epoch, imports not counted, and its peak of resident memory, imports
counted (torch's are some 200 MB).

- kprep: its order is a function, so only the batch asked for is computed
- numpy, torch: one permutation of all positions, as most samplers have
- DistributedSampler: torch's own, which also makes a Python list of it
- shuffle buffer: webdataset's shuffle over 1,000 samples; to resume it goes over everything before,
  here numbers alone, in a real run the samples themselves. It mixes neighbours only

Beside them the whole of `kprep plan` for 1,024 ranks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY)]

from results import COLOURS, Rounds, Table, chart, in_turns, machine, parse, text, write  # noqa: E402

from stream.bench_measure import Spread  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_PLACES = (0, 50, 90)
_NAMES = {
    "kprep": "kprep",
    "numpy": "numpy permutation",
    "torch": "torch.randperm",
    "sampler": "DistributedSampler",
    "buffer": "shuffle buffer",
}


def child(name: str, asked: argparse.Namespace, percent: int) -> dict[str, Any]:
    """Run one measurement."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("order_child.py")), name,
         *map(str, (asked.clips, asked.views, percent, asked.batch))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it was killed; is there enough memory?"]
        sys.exit(f"{name} ended with {done.returncode}: {last[0]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def contender(name: str, asked: argparse.Namespace) -> Callable[[int], dict[str, float]]:
    """Return a contender: seconds to the first batch at each place, and peak bytes."""

    def round_of(_: int) -> dict[str, float]:
        found = {percent: child(name, asked, percent) for percent in _PLACES}
        return {
            **{f"seconds_{percent}": one["seconds"] for percent, one in found.items()},
            "peak_bytes": max(one["peak_bytes"] for one in found.values()),
        }

    return round_of


def planned(asked: argparse.Namespace) -> Callable[[int], dict[str, float]]:
    """Return the contender that plans a whole run."""

    def round_of(_: int) -> dict[str, float]:
        one = child("plan", asked, 0)
        return {name: one[name] for name in ("seconds", "cpu_seconds", "peak_bytes")}

    return round_of


def table(found: Rounds) -> Table:
    """Return the table, in milliseconds and MB."""
    rows = []
    for name, one in found.items():
        if name != "plan":
            times = [one[f"seconds_{percent}"] for percent in _PLACES]
            cells = [text([value * 1000 for value in values], 1) for values in times]
            rows.append([_NAMES[name], *cells, f"{Spread.of(one['peak_bytes']).median / 1e6:,.0f}"])
    places = [f"first batch at {percent} %, ms" for percent in _PLACES]
    return Table(["order", *places, "peak memory, MB"], rows)


def draw(path: Path, found: Rounds) -> None:
    """Draw the times at the three places, on a logarithmic scale, and peak memory."""
    names = [name for name in found if name != "plan"]
    with chart(path, 2, width=5.4, height=3.4) as (times, memory):
        for number, percent in enumerate(_PLACES):
            middles = [Spread.of(found[name][f"seconds_{percent}"]).median for name in names]
            places = [place + (number - 1) * 0.26 for place in range(len(names))]
            times.barh(places, middles, height=0.24, color=COLOURS[number], label=f"at {percent} %")
        times.set_xscale("log")
        times.set_xlabel("seconds to the first batch")
        times.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.17), ncols=3)
        peaks = [Spread.of(found[name]["peak_bytes"]).median / 1e6 for name in names]
        memory.barh(range(len(names)), peaks, height=0.6, color=COLOURS[0])
        memory.set_xlabel("peak memory, MB")
        memory.set_xlim(0, max(peaks) * 1.2)
        for place, peak in enumerate(peaks):
            memory.annotate(f"{peak:,.0f}", (peak, place), xytext=(5, 0), va="center",
                            textcoords="offset points", fontsize=9)  # fmt: skip
        for axis in (times, memory):
            axis.set_yticks(range(len(names)), [_NAMES[name] for name in names])
            axis.invert_yaxis()
            axis.grid(visible=False, axis="y")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=10_000_000)
    parser.add_argument("--views", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1536, help="positions: 64 ranks x 24")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--leave-out", nargs="+", choices=list(_NAMES)[1:], default=[])
    asked = parse(parser)
    if min(asked.clips, asked.views, asked.batch, asked.rounds) < 1:
        parser.error("clips, views, batch and rounds must be at least 1")
    ways = {name: contender(name, asked) for name in _NAMES if name not in asked.leave_out}
    found = in_turns({**ways, "plan": planned(asked)}, asked.rounds)
    plan = found["plan"]
    caption = (
        f"{machine()}; {asked.clips:,} clips x {asked.views} views, batch {asked.batch}; "
        f"medians of {asked.rounds} rounds"
    )
    planning = (
        f"Planning the whole run on 1,024 ranks: {text(plan['seconds'])} s "
        f"({text(plan['cpu_seconds'])} s of CPU time), peak "
        f"{Spread.of(plan['peak_bytes']).median / 1e6:.0f} MB."
    )
    write(asked, [caption, "", *table(found).lines(), "", planning],
          {"machine": machine(), "rounds": found})  # fmt: skip
    if asked.chart:
        draw(asked.chart, found)


if __name__ == "__main__":
    main()
