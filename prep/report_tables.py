"""The tables of the report page, as HTML."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from prep.html_plots import bar, legend
from prep.outcome import EXPLANATIONS, Reason
from prep.source_terms import source_meaning
from prep.text.html import text
from prep.text.plain import setting_text
from prep.text.quantities import size_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prep.info import DatasetInfo
    from prep.profile import EncodingProfile

_FEW_CLASSES = 40
_ENDS = 8  # of the classes, where there are many
_MOST_CLASSES = 2000


def table(head: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; `head` gives each column's name and class, the cells are HTML already."""
    names = "".join(f'<th scope="col" class="{kind}">{text(name)}</th>' for name, kind in head)
    kinds = [kind for _, kind in head]
    lines = []
    for row in rows:
        cells = zip(kinds, row, strict=True)
        lines.append("".join(f'<td class="{kind}">{cell}</td>' for kind, cell in cells))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<div class="scroll"><table><thead><tr>{names}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def splits_table(info: DatasetInfo) -> str:
    """Return clips, hours, bytes and shards of each split."""
    head = [("split", ""), ("clips", "number"), ("hours", "number"), ("size", "number"),
            ("shards", "number")]  # fmt: skip
    rows = [
        [text(split.name), f"{split.num_clips:,}", f"{split.hours:,.2f}",
         text(size_text(split.bytes)), f"{split.num_shards:,}"]
        for split in info.splits
    ]  # fmt: skip
    return table(head, rows)


def picture_sizes(sizes: Sequence[tuple[str, dict[str, int]]], colours: dict[str, str]) -> str:
    """Return the most frequent picture sizes with their clips by split."""
    most = max((sum(counts.values()) for _, counts in sizes), default=0)
    rows = [
        [text(size), bar([(colours[name], counts[name]) for name in counts], most),
         f"{sum(counts.values()):,}"]
        for size, counts in sizes
    ]  # fmt: skip
    head = [("width x height", ""), ("", "chart"), ("clips", "number")]
    return f'<div class="panel"><h3>Picture size</h3>{table(head, rows)}</div>'


def class_balance(info: DatasetInfo, colours: dict[str, str]) -> str:
    """Return clips by class: all of them where they are few, else their curve and its ends."""
    names = info.manifest.class_names
    if not names:
        return '<section id="classes"><h2>Classes</h2><p class="panel">No labels.</p></section>'
    counts = np.array([split.clips_by_class for split in info.splits]).reshape(-1, len(names))
    total = counts.sum(axis=0)
    order = np.argsort(-total, kind="stable")
    body = legend(list(colours), colours)
    if len(names) <= _FEW_CLASSES:
        body += _class_table(info, counts, order, colours)
    else:
        shown = order[:_MOST_CLASSES]
        rest = f" (the first {_MOST_CLASSES:,})" if len(order) > len(shown) else ""
        body += (
            f'{_curve(total[order])}<div class="panels"><div><h3>Most clips</h3>'
            f"{_class_table(info, counts, order[:_ENDS], colours)}</div><div><h3>Fewest clips</h3>"
            f"{_class_table(info, counts, order[-_ENDS:], colours)}</div></div>"
            f"<details><summary>All {len(names):,} classes{rest}</summary>"
            f"{_class_table(info, counts, shown, colours)}</details>"
        )  # fmt: skip
    few, most = int(total.min()), int(total.max())
    spread = f"{few:,} to {most:,} clips a class, median {float(np.median(total)):,g}"
    if few == most:
        spread = f"{few:,} clips in each of them"
    spread = f"{len(names):,} classes; {spread}. Press a class to see its clips."
    return (
        f'<section id="classes"><h2>Classes</h2><p class="soft small">{spread}</p>'
        f'<div class="panel">{body}</div></section>'
    )


def _class_table(
    info: DatasetInfo, counts: np.ndarray, order: np.ndarray, colours: dict[str, str]
) -> str:
    most = int(counts.sum(axis=0).max())
    rows = []
    for label in order.tolist():
        parts = [(colours[split.name], int(counts[number, label]))
                 for number, split in enumerate(info.splits)]  # fmt: skip
        name = text(info.manifest.class_names[label])
        button = f'<button type="button" data-class="{label}" dir="auto">{name}</button>'
        rows.append([button, bar(parts, most), *(f"{count:,}" for _, count in parts)])
    head = [("class", "name"), ("", "chart"), *((split.name, "number") for split in info.splits)]
    return table(head, rows)


def _curve(counts: np.ndarray) -> str:
    """Return the clips of all classes, the largest first, as one picture."""
    width, height = 1000, 140
    tallest = max(1, int(counts.max()))
    points = [
        f"{width * place / len(counts):.1f},{height - height * count / tallest:.1f} "
        f"{width * (place + 1) / len(counts):.1f},{height - height * count / tallest:.1f}"
        for place, count in enumerate(counts.tolist())
    ]
    return (
        f'<svg class="plot" viewBox="0 0 {width} {height + 20}" role="img" '
        f'aria-label="Clips of each class, from {int(counts.max()):,} to {int(counts.min()):,}">'
        f'<polygon class="s0" points="0,{height} {" ".join(points)} {width},{height}"/>'
        f'<text x="0" y="{height + 15}">largest: {int(counts.max()):,} clips</text>'
        f'<text x="{width}" y="{height + 15}" text-anchor="end">smallest: {int(counts.min()):,}'
        "</text></svg>"
    )


def failures_table(info: DatasetInfo, colours: dict[str, str]) -> str:
    """Return what became of the annotation rows: outcomes by split, failures by reason."""
    kinds = {"ok": "s2", "failed": "lost", "duplicate": "s5", "pending": "void"}
    rows = [
        [
            text(split.name),
            bar([(kinds[kind], split.outcomes.get(kind, 0)) for kind in kinds], split.num_rows),
            f"{split.num_rows:,}",
            *(f"{split.outcomes.get(kind, 0):,}" for kind in kinds),
        ]
        for split in info.splits
    ]
    head = [("split", ""), ("", "chart"), ("rows", "number"), *((kind, "number") for kind in kinds)]
    body = f'<div class="panel">{legend(list(kinds), kinds)}{table(head, rows)}</div>'
    return (
        '<section id="rows"><h2>What became of the annotation rows</h2>'
        f"{body}{_reasons(info, colours)}</section>"
    )


def _reasons(info: DatasetInfo, colours: dict[str, str]) -> str:
    totals: dict[str, int] = {}
    for split in info.splits:
        for reason, count in split.failures.items():
            totals[reason] = totals.get(reason, 0) + count
    if not totals:
        return ""
    most = max(totals.values())
    rows = []
    for reason in sorted(totals, key=lambda name: (-totals[name], name)):
        parts = [(colours[split.name], split.failures.get(reason, 0)) for split in info.splits]
        meaning = EXPLANATIONS[Reason(reason)] if reason in set(Reason) else ""
        counts = [f"{count:,}" for _, count in parts]
        rows.append([text(reason), text(meaning), bar(parts, most), *counts])
    head = [("reason", "name"), ("meaning", "name"), ("", "chart"),
            *((split.name, "number") for split in info.splits)]  # fmt: skip
    shown = f"{legend(list(colours), colours)}{table(head, rows)}"
    return f'<h2>Failures by reason</h2><div class="panel">{shown}</div>'


def profile_list(profile: EncodingProfile) -> str:
    """Return the fields of the encoding profile."""
    values = profile.to_json()
    values["fps"] = f"{float(profile.fps):g}"
    return _list({name.replace("_", " "): str(value) for name, value in values.items()})


def provenance_table(info: DatasetInfo) -> str:
    """Return each split's sources, tools and settings."""
    panels = []
    for split in info.splits:
        entry = info.manifest.splits[split.name]
        facts = {f"source {name}": f"{count:,} clips{source_meaning(name)}"
                 for name, count in split.sources.items()}  # fmt: skip
        facts |= {name.replace("_", " "): value for name, value in entry.tools.items()}
        facts |= {
            name.replace("_", " "): setting_text(value)
            for name, value in entry.settings.items()
            if value not in (None, [], "")
        }
        facts["fingerprint"] = entry.fingerprint
        panels.append(f'<div class="panel"><h3>{text(split.name)}</h3>{_list(facts)}</div>')
    return f'<div class="panels">{"".join(panels)}</div>'


def _list(facts: dict[str, str]) -> str:
    items = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in facts.items())
    return f'<dl class="facts-list">{items}</dl>'
