"""Line charts as SVG text: no script, no library, sizes in the units of its view box."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_WIDTH, _HEIGHT = 520, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 28, 30, 34
_MOST_POINTS = 1000
_TICKS = 5


@dataclass(frozen=True)
class Line:
    """A named line of points (x, y); points that are not finite are left out."""

    name: str
    points: Sequence[tuple[float, float]]


def line_chart(title: str, lines: Sequence[Line], x_title: str) -> str:
    """Return one chart; "" when there is nothing to draw.

    A line of more than 1,000 points is drawn by the means of neighbours.
    """
    drawn = [Line(line.name, _thinned(_finite(line.points))) for line in lines]
    drawn = [line for line in drawn if line.points]
    if not drawn:
        return ""
    points = [point for line in drawn for point in line.points]
    x_ticks = ticks(min(x for x, _ in points), max(x for x, _ in points))
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points))
    name = html.escape(title)
    parts = [
        f"<figure><figcaption>{name}</figcaption>",
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name}">',
        *_grid(x_ticks, y_ticks, x_title),
        *(_path(number, line, x_ticks, y_ticks) for number, line in enumerate(drawn)),
        *(_key(number, line.name) for number, line in enumerate(drawn)),
        "</svg></figure>",
    ]
    return "".join(parts)


def ticks(least: float, most: float) -> list[float]:
    """Return round numbers, about five of them, from at most `least` to at least `most`.

    Neighbours are 1, 2 or 5 times a power of ten apart.
    """
    if most <= least:
        room = abs(least) * 0.1 or 1.0
        least, most = least - room, most + room
    power = 10.0 ** math.floor(math.log10((most - least) / _TICKS))
    step = next(f * power for f in (1, 2, 5, 10) if (most - least) / (f * power) <= _TICKS)
    first, last = math.floor(least / step), math.ceil(most / step)
    return [number * step for number in range(first, last + 1)]


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    group = -(-len(points) // _MOST_POINTS)
    if group <= 1:
        return list(points)
    groups = [points[first : first + group] for first in range(0, len(points), group)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _place(x: float, y: float, x_ticks: list[float], y_ticks: list[float]) -> tuple[float, float]:
    across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
    up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
    return (
        _LEFT + across * (_WIDTH - _LEFT - _RIGHT),
        _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM),
    )


def _grid(x_ticks: list[float], y_ticks: list[float], x_title: str) -> list[str]:
    parts = []
    for value in y_ticks:
        _, y = _place(x_ticks[0], value, x_ticks, y_ticks)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" '
                     f'y2="{y:.1f}"/><text class="y" x="{_LEFT - 8}" y="{y + 4:.1f}">'
                     f"{_number(value)}</text>")  # fmt: skip
    for value in x_ticks:
        x, _ = _place(value, y_ticks[0], x_ticks, y_ticks)
        parts.append(
            f'<text class="x" x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}">{_number(value)}</text>'
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="x" x="{middle}" y="{_HEIGHT - 3}">{html.escape(x_title)}</text>')
    return parts


def _path(number: int, line: Line, x_ticks: list[float], y_ticks: list[float]) -> str:
    places = [_place(x, y, x_ticks, y_ticks) for x, y in line.points]
    if len(places) == 1:
        return (
            f'<circle class="s{number} dot" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3"/>'
        )
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline class="s{number}" points="{text}"/>'


def _key(number: int, name: str) -> str:
    x = _LEFT + number * 112
    return (
        f'<line class="s{number}" x1="{x}" x2="{x + 14}" y1="14" y2="14"/>'
        f'<text x="{x + 19}" y="18">{html.escape(name)}</text>'
    )


def _number(value: float) -> str:
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.3g}"
    return f"{round(value, 6):,}".removesuffix(".0")
