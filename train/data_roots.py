"""What a run says about the datasets that it reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stream.loader import ClipLoader


def describe_roots(loader: ClipLoader, split: str) -> list[str]:
    """Return a line for each root, and one where class lists differ; nothing for a single root."""
    roots = loader.roots
    if len(roots) == 1 and roots[0].weight == 1:
        return []
    lines = []
    for number, root in enumerate(roots):
        what = f"{root.num_clips} clips"
        if root.is_left_out:
            what = f"left out, it has no split {split!r}"
        elif root.weight != 1:
            what += f", weight {float(root.weight):g}: {root.num_draws} draws an epoch"
        lines.append(f"{split} {number}/: {root.root}: {what}")
    counts = [root.num_classes for root in roots]
    if len(roots) > 1 and set(counts) != {len(loader.class_names)}:
        numbers = " + ".join(map(str, counts))
        lines.append(f"classes of {numbers}, joined by name: {len(loader.class_names)}")
    return lines
