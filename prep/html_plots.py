"""Bars and plots as SVG, in a page.

Only attributes that SVG itself knows give sizes, so that the page needs no inline styles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prep.text.html import text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from prep.clip_statistics import Histogram

_WIDTH, _HEIGHT, _BELOW, _ABOVE = 400, 130, 20, 16
COLOURS = 6


def bar(parts: Sequence[tuple[str, int]], whole: int) -> str:
    """Return a bar of (colour class, count) from left to right, of a full width of `whole`."""
    left, drawn = 0.0, []
    for colour, count in parts:
        width = 100 * count / whole if whole else 0
        if count:
            drawn.append(f'<rect class="{colour}" x="{left:.3f}%" width="{max(width, 0.4):.3f}%" '
                         'height="100%"/>')  # fmt: skip
        left += width
    return f'<svg class="bar" aria-hidden="true">{"".join(drawn)}</svg>'


def legend(names: Sequence[str], colours: Mapping[str, str]) -> str:
    """Return which colour is which; nothing where there is but one."""
    if len(names) < 2:
        return ""
    items = "".join(
        f'<li><svg aria-hidden="true"><rect class="{colours[name]}" width="100%" height="100%"/>'
        f"</svg>{text(name)}</li>"
        for name in names
    )
    return f'<ul class="legend">{items}</ul>'


def plot(values: Histogram, colours: Mapping[str, str], what: str, unit: str) -> str:
    """Return a histogram, its splits stacked; every bar says its range and counts when pointed at.

    `what` begins the text that stands for the picture, such as "Duration of a clip".
    """
    names, edges = list(values.counts), values.edges
    bins = len(edges) - 1
    tallest = max(int(sum(values.counts[name][place] for name in names)) for place in range(bins))
    step, drawn = _WIDTH / bins, []
    for place in range(bins):
        parts = [(name, int(values.counts[name][place])) for name in names]
        if not any(count for _, count in parts):
            continue
        upper = float(edges[place + 1])
        to = "and more" if values.open_ended and place == bins - 1 else f"to {upper:g}"
        said = ", ".join(f"{name} {count:,}" for name, count in parts if count)
        drawn.append(f"<g><title>{float(edges[place]):g} {to} {text(unit)}: {text(said)}</title>")
        floor = float(_ABOVE + _HEIGHT)
        for name, count in parts:
            height = max(_HEIGHT * count / tallest, 1.0 if count else 0.0)
            floor -= height
            box = f'x="{(place + 0.06) * step:.2f}" y="{floor:.2f}" width="{step * 0.88:.2f}"'
            drawn.append(f'<rect class="{colours[name]}" {box} height="{height:.2f}"/>')
        drawn.append("</g>")
    said = (
        f"{what}: from {values.lowest:.4g} to {values.highest:.4g} {unit}, "
        f"median {values.median:.4g}"
    )
    return (
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_ABOVE + _HEIGHT + _BELOW}" role="img" '
        f'aria-label="{text(said)}">'
        f'<line x1="0" x2="{_WIDTH}" y1="{_ABOVE}" y2="{_ABOVE}"/>'
        f'<text x="{_WIDTH}" y="{_ABOVE - 4}" text-anchor="end">{tallest:,} clips</text>'
        f"{''.join(drawn)}"
        f'<line x1="0" x2="{_WIDTH}" y1="{_ABOVE + _HEIGHT}" y2="{_ABOVE + _HEIGHT}"/>'
        f"{_ticks(values, unit)}</svg>"
    )


def _ticks(values: Histogram, unit: str) -> str:
    bins = len(values.edges) - 1
    step = -(-bins // 4)
    places = [place for place in range(0, bins, step) if bins - place > step / 2] + [bins]
    drawn = []
    for place in places:
        anchor = "start" if place == 0 else "end" if place == bins else "middle"
        label = f"{float(values.edges[place]):g}"
        if place == bins:
            label += f"{'+' if values.open_ended else ''} {unit}"
        drawn.append(f'<text x="{place * _WIDTH / bins:.1f}" y="{_ABOVE + _HEIGHT + 14}" '
                     f'text-anchor="{anchor}">{text(label)}</text>')  # fmt: skip
    return "".join(drawn)
