"""Results of all rounds as JSON values, Markdown and a chart."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import results

from stream.bench_measure import Spread

if TYPE_CHECKING:
    from pathlib import Path

_COLUMNS = (
    "storage", "loader", "clips/s (low to high)", "of memory", "MB/s", "CPU ms a clip",
    "requests a clip", "kB a clip", "first batch: cold, warm", "imports", "memory",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One contender over one storage."""

    contender: str
    place: str
    views: int
    together: bool

    @property
    def loader(self) -> str:
        """What the contender is called, with the way it takes several views of a video."""
        if self.views == 1:
            return self.contender
        return f"{self.contender}, {'together' if self.together else 'spread'}"


@dataclass
class Measured:
    """What was found of a cell: a value a round, and the rounds that failed, with the reason.

    requests_per_clip and bytes_per_clip are of a whole epoch from the bucket, opening included.
    """

    cell: Cell
    rounds: list[dict[str, Any]] = field(default_factory=list)
    of_memory: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    requests_per_clip: float | None = None
    bytes_per_clip: float | None = None

    def spread(self, name: str) -> Spread:
        """Return a value over the rounds that did not fail."""
        return Spread.of([one[name] for one in self.rounds])

    def to_json(self) -> dict[str, Any]:
        """Return every round and the medians."""
        names = [name for name in (self.rounds[0] if self.rounds else {}) if name != "pictures"]
        return {
            **asdict(self.cell),
            "requests_per_clip": self.requests_per_clip,
            "bytes_per_clip": self.bytes_per_clip,
            "failures": self.failures,
            "of_memory": asdict(Spread.of(self.of_memory)) if self.of_memory else None,
            **{name: asdict(self.spread(name)) for name in names},
            "rounds": [{name: one[name] for name in names} for one in self.rounds],
        }


def markdown(found: list[Measured], titles: dict[str, str]) -> list[str]:
    """Return a table for each number of views, and what failed below it."""
    lines = []
    for views in sorted({one.cell.views for one in found}):
        some = [one for one in found if one.cell.views == views and one.rounds]
        rows = [_row(one, titles[one.cell.place]) for one in some]
        lines += ["", f"{views} view{'s' * (views > 1)} a video:", ""]
        lines += results.Table(_COLUMNS, rows).lines()
    failed = [one for one in found if one.failures]
    lines += [""] * bool(failed)
    for one in failed:
        rounds = len(one.failures) + len(one.rounds)
        lines.append(f"- {one.cell.loader}, {titles[one.cell.place]}: {len(one.failures)} of "
                     f"{rounds} rounds failed ({one.failures[0]})")  # fmt: skip
    return lines[1:]


def _row(one: Measured, storage: str) -> list[str]:
    rates = [found["clips_per_second"] for found in one.rounds]
    per_clip = None if one.cell.place == "cache" else one.bytes_per_clip
    first, warm = (one.spread(f"{name}first_batch_seconds").median for name in ("", "warm_"))
    from_bucket = one.cell.place in ("near", "far")
    return [
        storage,
        one.cell.loader,
        results.text(rates, 0),
        f"{Spread.of(one.of_memory).median:.2f}" if one.of_memory else "",
        "" if per_clip is None else f"{Spread.of(rates).median * per_clip / 1e6:.1f}",
        f"{one.spread('cpu_ms_per_clip').median:.2f}",
        "" if one.requests_per_clip is None or not from_bucket else f"{one.requests_per_clip:.3f}",
        "" if per_clip is None else f"{per_clip / 1000:.1f}",
        # the baseline fills its memory first
        f"{warm:.3f} s" if one.cell.place == "memory" else f"{first:.2f} s, {warm:.3f} s",
        f"{one.spread('imports_seconds').median:.1f} s",
        # the baseline's own copy of the dataset is in its memory
        "" if one.cell.place == "memory" else f"{one.spread('memory_bytes').median / 1e6:.0f} MB",
    ]


def chart(found: list[Measured], titles: dict[str, str], path: Path) -> None:
    """Draw clips a second, a panel for each storage, one view a video; and what is read a clip."""
    some = [one for one in found if one.cell.views == 1 and one.rounds]
    rates: dict[str, dict[str, list[float]]] = {}
    for one in some:
        panel = rates.setdefault(one.cell.place, {})
        panel[one.cell.loader] = [round_["clips_per_second"] for round_ in one.rounds]
    baseline = rates.pop("memory", {})
    sizes = {
        one.cell.loader: [one.bytes_per_clip / 1000]
        for one in some
        if one.bytes_per_clip and one.cell.place != "cache"
    }
    panels = len(rates) + bool(sizes)
    with results.chart(path, panels, columns=3, width=4, height=2.4) as axes:
        for axis, (place, panel) in zip(axes, rates.items(), strict=False):
            results.bars(axis, panel, "clips/s", 0)
            axis.set_title(titles[place])
            for values in baseline.values():
                axis.axvline(Spread.of(values).median, color="#000000", linestyle=":")
        if sizes:
            results.bars(axes[-1], sizes, "kB read a clip", 0)
