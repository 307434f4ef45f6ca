"""What a run says about the datasets that it reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from stream.loader import ClipLoader
    from train.recipe import AugmentRecipe


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


def describe_enlarged(
    sizes: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]], augment: AugmentRecipe
) -> list[str]:
    """Return a line where clips are stored smaller than training resizes them to; else nothing.

    Args:
        sizes: height and width of each stored clip in pixels.
        augment: of the recipe.
    """
    boxes = augment.crop_area[1] > 0  # cut from the stored frame and resized to `crop`
    wanted = min(augment.crop) if boxes else augment.short_side or min(augment.resize)
    sides = np.minimum(*sizes)
    if not len(sides) or sides.min() >= wanted:
        return []
    line = (
        f"{np.count_nonzero(sides < wanted)} of {len(sides)} clips are stored with a short side of "
        f"{sides.min()} pixels or more, and enlarged to {wanted}, which costs accuracy; convert "
        f"them with a short side of {wanted} (kprep shard --profile general has 256)"
    )
    return [line]
