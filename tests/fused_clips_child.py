"""Prints by how much train/fused_clips.py is off what PyTorch makes of clips on a CPU, as JSON.

A program of its own: see triton_device.py.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from triton_device import choose_device

DEVICE = choose_device()

from planar_clips import SETTINGS, SIZES, batch_of  # noqa: E402

from stream import yuv420_to_rgb_planes  # noqa: E402
from train import clip_kernels, eval_transforms, transforms  # noqa: E402
from train.eval_transforms import eval_clips  # noqa: E402
from train.fused_clips import Cut, cut_clips  # noqa: E402
from train.recipe import load_recipe  # noqa: E402
from train.transforms import train_clips  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    from stream import ClipBatch


def wrong_levels() -> int:
    """Count levels of all chroma, each with 16 of luma, that are not the exact ones."""
    generator = torch.Generator().manual_seed(3)
    chroma = torch.arange(65536)
    luma = torch.randint(256, (4, 512 * 512), generator=generator)
    luma[0, :256], luma[0, 256:512] = 0, 255
    planes = [luma, (chroma % 256).expand(4, -1), (chroma // 256).expand(4, -1)]
    video = torch.cat(planes, dim=1).to(torch.uint8)
    cut = Cut(0, (512, 512), (0, 512, 0, 512), (512, 512), 0, 0)
    black, level = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)
    found = cut_clips(video[None].to(DEVICE), [cut], (512, 512), black, level, is_rounded=False)
    wanted = yuv420_to_rgb_planes(video, 512, 512).transpose(0, 1).float()
    return int(((found[0].cpu() - wanted).abs() > 1e-3).sum())


def errors() -> dict[str, list[float]]:
    """Return the largest error, and the share of values that are off by half a level and more."""
    found = {}
    batch = batch_of(SIZES, 2)
    for name, settings in SETTINGS.items():
        small = ("augment.resize=[30, 44]", "augment.crop=[24, 26]", "eval.crops=3", *settings)
        recipe = load_recipe("resnet", small)
        makes: dict[str, Callable[[ClipBatch], torch.Tensor]] = {
            "training": lambda given, recipe=recipe: train_clips(given, recipe.augment, 5, 1),
            "evaluation": lambda given, recipe=recipe: eval_clips(given, recipe),
        }
        for kind, make in makes.items():
            error = (in_one_pass(make, batch) - make(batch)).abs()
            found[f"{kind}, {name}"] = [float(error.max()), float((error > 0.009).float().mean())]
    return found


def in_one_pass(make: Callable[[ClipBatch], torch.Tensor], batch: ClipBatch) -> torch.Tensor:
    """Let the kernel do it, which only a GPU's clips would get."""
    asked = []

    def goes(given: ClipBatch) -> bool:
        asked.append(given)
        return True

    for module in (transforms, eval_transforms):
        module.goes_in_one_pass = goes  # type: ignore[attr-defined]
    result = make(replace(batch, video=batch.video.to(DEVICE))).cpu()
    for module in (transforms, eval_transforms):
        module.goes_in_one_pass = lambda _: False  # type: ignore[attr-defined]
    assert len(asked) == 1
    return result


def main() -> None:
    """Print all of it."""
    if DEVICE == "cpu":
        clip_kernels._BLOCK = 1 << 16  # the interpreter takes as long for any
    print(json.dumps({"levels": wrong_levels(), "errors": errors()}))


if __name__ == "__main__":
    main()
