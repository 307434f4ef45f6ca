"""What the benchmarks share: contenders in turns, medians and spread, a table and a chart.

Every benchmark takes the same three options: `--json FILE` (every round of every contender),
`--markdown FILE` (what it prints) and `--chart FILE.png` (needs matplotlib, of the extra `bench`).
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stream.bench_measure import Spread

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Mapping, Sequence

# Okabe and Ito's palette, told apart with any colour vision, without its yellow (pale on white)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

Rounds = dict[str, dict[str, list[float]]]
"""contender -> measure -> one value a round"""


@dataclass(frozen=True)
class Table:
    """A Markdown table: every cell is text already."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def lines(self) -> list[str]:
        """Return the lines of the table."""
        filled = [self.columns, ["---"] * len(self.columns), *self.rows]
        return [f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in filled]


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Add the options of the results, parse, and refuse files that could not be written later."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round here too")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table here too")
    parser.add_argument("--chart", type=Path, metavar="FILE.png", help="draw a chart (matplotlib)")
    asked = parser.parse_args()
    for path in (asked.json, asked.markdown, asked.chart):
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"{path} cannot be written: {path.parent} is no directory")
    if asked.chart is not None:
        if asked.chart.suffix != ".png":
            parser.error(f"chart ({asked.chart}) must end in .png")
        if find_spec("matplotlib") is None:
            parser.error("a chart needs matplotlib: pip install 'kprep[bench]', or leave --chart")
    return asked


def in_turns(contenders: Mapping[str, Callable[[int], dict[str, float]]], rounds: int) -> Rounds:
    """Call every contender once a round with the round's number; who begins changes each time.

    A contender returns its measures by name.
    """
    found: Rounds = {name: {} for name in contenders}
    for number in range(rounds):
        names = list(contenders)
        for name in names if number % 2 == 0 else reversed(names):
            for measure, value in contenders[name](number).items():
                found[name].setdefault(measure, []).append(value)
    return found


def text(values: list[float], digits: int = 2) -> str:
    """Return `1.08 (1.07 to 1.09)`: the median, and least and greatest where rounds differ."""
    spread = Spread.of(values)
    middle, low, high = (
        f"{value:,.{digits}f}" for value in (spread.median, spread.low, spread.high)
    )
    return middle if low == high else f"{middle} ({low} to {high})"


def ratio(values: list[float], baseline: list[float]) -> float:
    """Return the median over rounds of a contender's value over the baseline's of that round."""
    return Spread.of([one / other for one, other in zip(values, baseline, strict=True)]).median


def machine() -> str:
    """Return the day and the machine, as a table's caption needs them."""
    day, load = time.strftime("%Y-%m-%d"), os.getloadavg()[0]
    return f"{day}, {os.cpu_count()} cores, {platform.machine()}, load {load:.1f}"


def write(asked: argparse.Namespace, lines: Sequence[str], values: Mapping[str, Any]) -> None:
    """Print the lines; write them and the values where the options say."""
    print("\n".join(lines))
    if asked.markdown:
        asked.markdown.write_text("\n".join(lines) + "\n")
    if asked.json:
        asked.json.write_text(json.dumps(values, indent=1) + "\n")


@contextlib.contextmanager
def chart(
    path: Path, panels: int, *, columns: int = 0, width: float = 5.0, height: float = 4.0
) -> Iterator[Any]:
    """Yield an array of `panels` axes, inches each; save them as a PNG at the end.

    They stand side by side, or `columns` in a row.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    columns = columns or panels
    rows = -(-panels // columns)
    size = (width * columns, height * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False)
    axes = grid.ravel()
    for axis in axes[:panels]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    for axis in axes[panels:]:
        axis.set_visible(False)
    yield axes[:panels]
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def bars(axis: Any, results: Mapping[str, list[float]], label: str, digits: int = 2) -> None:
    """Draw one horizontal bar a contender, its median written beside it, least to greatest a line.

    The first contender stands on top.
    """
    spreads = [Spread.of(values) for values in results.values()]
    middles = [spread.median for spread in spreads]
    beyond = [
        [spread.median - spread.low for spread in spreads],
        [spread.high - spread.median for spread in spreads],
    ]
    colours = [COLOURS[number % len(COLOURS)] for number in range(len(spreads))]
    axis.barh(range(len(spreads)), middles, xerr=beyond, color=colours, height=0.6, capsize=3)
    axis.set_yticks(range(len(spreads)), list(results))
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    axis.set_xlabel(label)
    axis.set_xlim(0, max(spread.high for spread in spreads) * 1.25)
    for place, spread in enumerate(spreads):
        axis.annotate(
            f"{spread.median:,.{digits}f}", (spread.high, place), xytext=(5, 0),
            textcoords="offset points", va="center", fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
