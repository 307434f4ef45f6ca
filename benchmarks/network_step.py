"""Training steps of a network alone, on synthetic clips that stay on the device, in turns.

    python benchmarks/network_step.py --model r2plus1d_18 [--batch 64] [--rounds 5] [--compiled]

A step is forward, cross-entropy, backward and SGD, in bf16 with float32 weights, as
`kprep bench train` has it, without transforms. The contenders hold the same network in turns:

- contiguous: (N, C, T, H, W) in memory, which is what torchvision's reference trains
- channels last: `run.channels_last_3d=true` by PyTorch alone
- kprep's convolutions: that, with convolutions in the form of tensor cores (train/tensor_cores.py)
- kprep: that, with batch normalisation by kernels of its own (train/fused_norm.py), on a GPU

and with `--compiled` each but the first through torch.compile as well, kprep's also in the modes
of torch.compile that `--modes` names. Without a GPU it runs on the CPU, which says nothing of GPUs.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY)]

import torch  # noqa: E402
from results import Rounds, Table, bars, chart, in_turns, machine, parse, ratio, text, write  # noqa: E402
from torch.nn import functional  # noqa: E402
from torchvision.models import video  # noqa: E402

from train.compilation import compiled  # noqa: E402
from train.devices import peak_flops  # noqa: E402
from train.flops import count_flops  # noqa: E402
from train.fused_norm import use_fused_norm, why_not_fused  # noqa: E402
from train.models import TORCHVISION_MODELS, keep_channels_last  # noqa: E402
from train.tensor_cores import use_tensor_cores  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

_CLASSES = 400
_FLOOR = "contiguous"
_MODES = ("max-autotune-no-cudagraphs", "max-autotune", "reduce-overhead")
_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Contender:
    """One way to run the network; its first steps choose kernels and compile."""

    def __init__(
        self, asked: argparse.Namespace, *, last: bool, form: bool = False, norm: bool = False,
        mode: str | None = None,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        self._steps: int = asked.steps
        network = getattr(video, asked.model)(num_classes=_CLASSES).to(_DEVICE).train()
        clips = torch.randn(asked.batch, 3, *asked.clip, device=_DEVICE)
        if last:
            keep_channels_last(network)
            clips = clips.contiguous(memory_format=torch.channels_last_3d)
        if form:
            use_tensor_cores(network, pads_between=True)
        if norm:
            use_fused_norm(network, with_relu=True)
        self._clips = clips
        self._labels = torch.randint(_CLASSES, (asked.batch,), device=_DEVICE)
        self._optimizer = torch.optim.SGD(
            network.parameters(), 0.01, momentum=0.9, weight_decay=1e-4
        )
        self._network = network
        if mode == "default":
            self._network = compiled(network)  # as training has it
        elif mode is not None:
            self._network = cast("nn.Module", torch.compile(network, mode=mode))
        self._is_warm = False

    def measure(self, _: int) -> dict[str, float]:
        """Return clips a second over some steps."""
        for _ in range(0 if self._is_warm else 3):
            self._step()
        self._is_warm = True
        begun = _now()
        for _ in range(self._steps):
            self._step()
        return {"clips_per_second": self._steps * len(self._clips) / (_now() - begun)}

    def _step(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast(_DEVICE.type, dtype=torch.bfloat16):
            logits = self._network(self._clips)
        functional.cross_entropy(logits.float(), self._labels).backward()
        self._optimizer.step()


def _now() -> float:
    if _DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def contenders(asked: argparse.Namespace) -> dict[str, Callable[[int], dict[str, float]]]:
    """Return the ways to run the network, by name."""
    ways: dict[str, dict[str, Any]] = {
        _FLOOR: {"last": False},
        "channels last": {"last": True},
        "kprep's convolutions": {"last": True, "form": True},
    }
    if _DEVICE.type == "cuda":
        if reason := why_not_fused(_DEVICE, torch.bfloat16):
            sys.exit(f"kprep's batch normalisation does not run here: {reason}")
        ways["kprep"] = {"last": True, "form": True, "norm": True}
    *_, whole = ways
    if asked.compiled:
        for name in list(ways)[1:]:
            ways[f"{name}, compiled"] = {**ways[name], "mode": "default"}
    for mode in asked.modes:
        ways[f"{whole}, {mode}"] = {**ways[whole], "mode": mode}
    return {name: Contender(asked, **way).measure for name, way in ways.items()}


def results_table(found: Rounds, flops: float, peak: float | None) -> Table:
    """Return one row a contender; MFU is operations, without those on zeros, over the peak."""
    base = found[_FLOOR]["clips_per_second"]
    rows = []
    for name, measures in found.items():
        values = measures["clips_per_second"]
        middle = sorted(values)[len(values) // 2]
        mfu = f"{middle * flops / peak:.1%}" if peak else ""
        rows.append([name, text(values, 1), f"{ratio(values, base):.2f}", mfu])
    return Table(["way", "clips/s (low to high)", f"of {_FLOOR}", "MFU"], rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=TORCHVISION_MODELS, default="r2plus1d_18")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--clip", type=int, nargs=3, default=(16, 112, 112),
                        metavar=("FRAMES", "HEIGHT", "WIDTH"))  # fmt: skip
    parser.add_argument("--steps", type=int, default=10, help="of each contender and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="with torch.compile as well")
    parser.add_argument("--modes", nargs="+", default=[], choices=_MODES, metavar="MODE",
                        help=f"of torch.compile: {', '.join(_MODES)}")  # fmt: skip
    asked = parse(parser)
    torch.backends.cudnn.benchmark = True
    name = torch.cuda.get_device_name() if _DEVICE.type == "cuda" else "CPU"
    flops = count_flops(getattr(video, asked.model)(num_classes=_CLASSES), asked.clip).training
    found = in_turns(contenders(asked), asked.rounds)
    table = results_table(found, flops, peak_flops(name, "bf16"))
    frames, height, width = asked.clip
    head = (
        f"{asked.model}, {frames}x{height}x{width}, batch {asked.batch}, bf16, {flops / 1e9:.1f} "
        f"GFLOP a clip; {name}, PyTorch {torch.__version__}; medians of {asked.rounds} rounds of "
        f"{asked.steps} steps; {machine()}:"
    )
    values = {"model": asked.model, "batch": asked.batch, "device": name, "rounds": found}
    write(asked, [head, "", *table.lines()], values)
    if asked.chart:
        with chart(asked.chart, 1, width=7) as (axis,):
            bars(axis, {n: one["clips_per_second"] for n, one in found.items()}, "clips/s", 0)


if __name__ == "__main__":
    main()
