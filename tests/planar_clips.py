"""Planar clips and recipes that clips are prepared by, in as many ways as there are."""

from __future__ import annotations

import torch

from stream import ClipBatch

SIZES = ((38, 50), (64, 36), (38, 50), (20, 454), (26, 34))
SETTINGS = {
    "resnet": (),
    "same size": ("augment.resize=[38, 50]", "eval.crops=1"),
    "short side": ("augment.short_side=28", "eval.crops=1"),
    "boxes": ("augment.crop_area=[0.1, 1]", "eval.crops=1"),
    "rounded boxes": (
        "augment.crop_area=[0.1, 1]",
        "augment.round_resized=true",
        "eval.crops=1",
    ),
}


def batch_of(sizes: tuple[tuple[int, int], ...], frames: int) -> ClipBatch:
    """Return random planar clips; those that are smaller than the largest are padded."""
    generator = torch.Generator().manual_seed(7)
    count, most = len(sizes), max(height * width * 3 // 2 for height, width in sizes)
    return ClipBatch(
        video=torch.randint(256, (count, frames, most), dtype=torch.uint8, generator=generator),
        size=torch.tensor(sizes),
        label=torch.arange(count),
        key=[f"clip{number}" for number in range(count)],
        start_frame=torch.zeros(count, dtype=torch.int64),
        view=torch.arange(count),
        layout="yuv420",
    )
