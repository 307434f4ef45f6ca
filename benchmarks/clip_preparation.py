"""From decoded clips on the device to the network's input, in turns; what a step takes besides.

    python benchmarks/clip_preparation.py [--size 128 170] [--batch 64] [--rounds 5]

Random planar clips, which stay on the device, become float32 in the crop of the recipe "resnet":
conversion to RGB, resize, flip, crop, normalisation. The contenders:

- torchvision: its transforms on RGB clips, one by one, as its reference trains
- PyTorch: what kprep does where Triton does not work, from planar YUV
- PyTorch, compiled: the same through torch.compile, with `--compiled`
- kprep: one kernel, from planar YUV (train/clip_kernels.py), on a GPU
- copy: as many bytes as kprep reads and writes, copied once; the floor

The time is the device's for one batch after the other, and the host's to start them.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY)]

import torch  # noqa: E402
from results import Rounds, Table, bars, chart, in_turns, machine, parse, ratio, text, write  # noqa: E402
from torchvision import transforms as tv  # noqa: E402

from stream import ClipBatch, yuv420_to_rgb_planes  # noqa: E402
from train import transforms  # noqa: E402
from train.fused_clips import why_not_cut  # noqa: E402
from train.recipe import AugmentRecipe  # noqa: E402
from train.transforms import train_clips  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_RECIPE = AugmentRecipe()


def random_batch(asked: argparse.Namespace) -> ClipBatch:
    """Return planar clips of one size on the device."""
    height, width = asked.size
    shape = (asked.batch, asked.frames, height * width * 3 // 2)
    return ClipBatch(
        video=torch.randint(256, shape, dtype=torch.uint8, device=_DEVICE),
        size=torch.tensor([[height, width]] * asked.batch),
        label=torch.zeros(asked.batch, dtype=torch.int64),
        key=[f"clip{number}" for number in range(asked.batch)],
        start_frame=torch.zeros(asked.batch, dtype=torch.int64),
        view=torch.zeros(asked.batch, dtype=torch.int64),
        layout="yuv420",
    )


class Contender:
    """One way to prepare a batch; its first batches choose kernels and compile."""

    def __init__(self, prepare: Callable[[], object], asked: argparse.Namespace) -> None:
        self._prepare, self._batches = prepare, asked.batches
        self._is_warm = False

    def measure(self, _: int) -> dict[str, float]:
        """Return milliseconds a batch: the device's, and the host's until all are started."""
        for _ in range(0 if self._is_warm else 3):
            self._prepare()
        self._is_warm = True
        begun = _now()
        for _ in range(self._batches):
            self._prepare()
        started = time.perf_counter() - begun
        together = _now() - begun
        return {"ms": together * 1000 / self._batches, "host": started * 1000 / self._batches}


def _now() -> float:
    if _DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def torchvisions(pixels: torch.Tensor) -> list[torch.Tensor]:
    """Prepare RGB clips (N, T, 3, H, W) as torchvision's reference does."""
    change = tv.Compose([
        tv.ConvertImageDtype(torch.float32),
        tv.Resize(_RECIPE.resize, antialias=False),
        tv.RandomHorizontalFlip(_RECIPE.flip),
        tv.Normalize(mean=_RECIPE.mean, std=_RECIPE.std),
        tv.RandomCrop(_RECIPE.crop),
    ])  # fmt: skip
    return [change(clip).permute(1, 0, 2, 3) for clip in pixels]


def contenders(asked: argparse.Namespace) -> dict[str, Callable[[int], dict[str, float]]]:
    """Return the ways to prepare a batch, by name."""
    batch = random_batch(asked)
    pixels = yuv420_to_rgb_planes(batch.video, *asked.size)
    number = iter(range(10**9))

    def ours() -> torch.Tensor:
        return train_clips(batch, _RECIPE, seed=0, epoch=next(number))

    def in_passes() -> torch.Tensor:
        with patch.object(transforms, "goes_in_one_pass", return_value=False):
            return ours()

    ways: dict[str, Callable[[], object]] = {
        "torchvision": lambda: torchvisions(pixels),
        "PyTorch": in_passes,
    }
    if asked.compiled:
        converted = torch.compile(yuv420_to_rgb_planes)
        resized = torch.compile(transforms.resize_clips)

        def in_compiled_passes() -> torch.Tensor:
            with (
                patch.object(transforms, "yuv420_to_rgb_planes", converted),
                patch.object(transforms, "resize_clips", resized),
            ):
                return in_passes()

        ways["PyTorch, compiled"] = in_compiled_passes
    if _DEVICE.type == "cuda":
        if reason := why_not_cut(_DEVICE):
            sys.exit(reason)
        ways["kprep"] = ours
    both = batch.video.numel() + asked.batch * asked.frames * 12 * _RECIPE.crop[0] * _RECIPE.crop[1]
    source = torch.empty(both // 2, dtype=torch.uint8, device=_DEVICE)
    ways["copy"] = source.clone
    return {name: Contender(prepare, asked).measure for name, prepare in ways.items()}


def results_table(found: Rounds) -> Table:
    """Return one row a contender."""
    base = found["torchvision"]["ms"]
    rows = [
        [name, text(one["ms"]), text(one["host"]), f"{1 / ratio(one['ms'], base):.1f}"]
        for name, one in found.items()
    ]
    columns = ["way", "ms a batch (low to high)", "of it until all is started", "x torchvision"]
    return Table(columns, rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, nargs=2, default=(128, 170),
                        metavar=("HEIGHT", "WIDTH"), help="of the decoded frames")  # fmt: skip
    parser.add_argument("--batches", type=int, default=20, help="of each contender and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="with torch.compile as well")
    asked = parse(parser)
    name = torch.cuda.get_device_name() if _DEVICE.type == "cuda" else "CPU"
    found = in_turns(contenders(asked), asked.rounds)
    head = (
        f"{asked.batch} clips, {asked.frames}x{asked.size[0]}x{asked.size[1]} to "
        f"{_RECIPE.crop[0]}x{_RECIPE.crop[1]}; {name}, PyTorch {torch.__version__}; medians of "
        f"{asked.rounds} rounds of {asked.batches} batches; {machine()}:"
    )
    write(asked, [head, "", *results_table(found).lines()], {"device": name, "rounds": found})
    if asked.chart:
        with chart(asked.chart, 1, width=7) as (axis,):
            bars(axis, {name: one["ms"] for name, one in found.items()}, "ms a batch")


if __name__ == "__main__":
    main()
