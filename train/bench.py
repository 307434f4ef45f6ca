"""How fast a recipe trains here: the network, the loader, and both together, in turns."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import count, islice
from typing import TYPE_CHECKING

import torch

from prep.errors import UsageError
from stream.bench_measure import Spread
from train.determinism import determinism
from train.devices import peak_flops
from train.distributed import joined_world
from train.flops import count_flops
from train.models import draw_model, set_training, why_no_kernels
from train.optim import build_optimizer
from train.run import training_loader
from train.schedule import scaled_learning_rate
from train.step import OptimizerStep
from train.transforms import video_on, why_slow_clips

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stream.batch import ClipBatch
    from train.loader import Loader
    from train.recipe import Recipe


_KEPT = 4


@dataclass(frozen=True)
class TrainBench:
    """Clips a second of each contender, over rounds, and what follows.

    network   one step after the other on clips that stay on the device: transforms, network,
              optimiser
    loader    batches taken and thrown away, once those are gone that were ready before
    training  both together, as `kprep train` runs them, once the queues are as they stay
    wait      share of training's time that was spent waiting for a batch
    ratio     training over network, round by round: 1 when data costs nothing
    gflops    a clip, forward and backward; 0 where the network cannot be counted
    mfu       of training: operations over the most that the device can do; None when not known
    slower    says what could have kprep's kernels but has none here, and why
    """

    device: str
    network: Spread
    loader: Spread
    training: Spread
    wait: Spread
    ratio: Spread
    gflops: float
    mfu: float | None
    slower: str | None


def bench_train(
    recipe: Recipe, data: str, *, split: str, steps: int, rounds: int, device: str | None = None
) -> TrainBench:
    """Measure in one process; `steps` optimiser steps a contender and round.

    Before them, training and the loader take as many steps as can be ready in the workers' queues;
    the loader is measured over twice as many as that, if `steps` are fewer.

    Nothing is written. The learning rate is the recipe's peak: the weights that come out are of no
    use. Raises what training raises.
    """
    with joined_world(device) as world, determinism(recipe):
        if world.size > 1:
            raise UsageError("kprep bench train measures one process; start it without torchrun")
        loader = training_loader(recipe, data, split, world)
        model = draw_model(recipe, len(loader.class_names), world)
        flops = _training_flops(model, recipe)
        step = OptimizerStep(
            model, build_optimizer(model, recipe), recipe, world.device,
            num_classes=len(loader.class_names), transform=None,
        )  # fmt: skip
        set_training(model, freeze_batchnorm=recipe.model.freeze_batchnorm)
        runner = _Runner(recipe, loader, step, world.device, steps)
        found = runner.rounds(rounds)
        slower = [why_no_kernels(recipe, model, world.device), why_slow_clips(recipe, world.device)]
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
    peak = peak_flops(name, recipe.run.precision)
    training = Spread.of(found["training"])
    pairs = zip(found["training"], found["network"], strict=True)
    return TrainBench(
        device=name,
        network=Spread.of(found["network"]),
        loader=Spread.of(found["loader"]),
        training=training,
        wait=Spread.of(found["wait"]),
        ratio=Spread.of([together / alone for together, alone in pairs]),
        gflops=flops / 1e9,
        mfu=training.median * flops / peak if peak and flops else None,
        slower="; ".join(filter(None, slower)) or None,
    )


def _training_flops(model: torch.nn.Module, recipe: Recipe) -> int:
    try:
        return count_flops(model, (recipe.data.frames, *recipe.augment.crop)).training
    except Exception:  # noqa: BLE001 - a user's network may be of any kind
        return 0


class _Runner:
    """The three contenders over one loader and one network."""

    def __init__(
        self,
        recipe: Recipe,
        loader: Loader,
        step: OptimizerStep,
        device: torch.device,
        steps: int,
    ) -> None:
        self._recipe, self._loader, self._step = recipe, loader, step
        self._device, self._steps = device, steps
        data = recipe.data
        self._ready = -(-data.workers * data.prefetch_batches // data.accumulate)
        """Steps whose batches can be waiting in the workers' queues."""
        self._rate = scaled_learning_rate(recipe.optim, loader.global_batch)
        self._stream = _batches(loader)
        # several, as their clips can differ in size, and with it what preparing them costs
        self._kept = [self._on_device(self._take()) for _ in range(_KEPT)]

    def rounds(self, rounds: int) -> dict[str, list[float]]:
        """Return clips a second of each contender, and training's share of waiting, by round."""
        contenders = {"network": self._network, "loader": self._alone, "training": self._training}
        found: dict[str, list[float]] = {name: [] for name in (*contenders, "wait")}
        self._network()  # kernels are chosen, and compiled where the recipe says so
        for number in range(rounds):
            names = list(contenders)
            for name in names if number % 2 == 0 else reversed(names):
                steps, seconds, waited = contenders[name]()
                found[name].append(steps * self._loader.global_batch / seconds)
                if name == "training":
                    found["wait"].append(waited / seconds)
        return found

    def _network(self) -> tuple[int, float, float]:
        """Return steps, seconds, and seconds of waiting for a batch."""
        begun = self._now()
        for number in range(self._steps):
            kept = self._kept[number % len(self._kept)]
            self._step.run(list(kept), self._rate, 0)  # which empties the list
        return self._steps, self._now() - begun, 0.0

    def _alone(self) -> tuple[int, float, float]:
        for _ in range(self._ready):
            self._take()
        steps = max(self._steps, 2 * self._ready)  # workers deliver in bursts
        begun = self._now()
        for _ in range(steps):
            self._take()
        return steps, self._now() - begun, 0.0

    def _training(self) -> tuple[int, float, float]:
        waited, begun = 0.0, self._now()
        for number in range(-self._ready, self._steps):
            if number == 0:
                waited, begun = 0.0, self._now()
            before = time.perf_counter()
            batches = self._take()
            waited += time.perf_counter() - before
            batches = self._step.prepare(batches)
            self._step.run(batches, self._rate, 0)
        return self._steps, self._now() - begun, waited

    def _take(self) -> list[ClipBatch]:
        return list(islice(self._stream, self._recipe.data.accumulate))

    def _on_device(self, batches: list[ClipBatch]) -> list[ClipBatch]:
        return [video_on(batch, self._device) for batch in batches]

    def _now(self) -> float:
        """Return the time at which the device has done all that it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _batches(loader: Loader) -> Iterator[ClipBatch]:
    """Yield batches without end.

    Refers to no runner: in a cycle of references, torch's workers are not told that they can end,
    and whoever drops the loader waits 5 seconds for each.
    """
    for epoch in count():
        loader.set_epoch(epoch)
        yield from loader


def table(bench: TrainBench) -> list[str]:
    """Return a Markdown table and what it means."""
    lines = ["| way | clips/s (low to high) |", "|---|---|"]
    for name in ("network", "loader", "training"):
        one: Spread = getattr(bench, name)
        lines.append(f"| {name} | {one.median:.1f} ({one.low:.1f} to {one.high:.1f}) |")
    mfu = f", model FLOP utilisation {bench.mfu:.1%}" if bench.mfu is not None else ""
    work = f"{bench.gflops:.4g} GFLOP a clip{mfu}; " if bench.gflops else ""
    return [
        *lines,
        "",
        *([bench.slower] if bench.slower else []),
        (
            f"{work}training reaches {bench.ratio.median:.2f} of the network alone and waits for "
            f"data {bench.wait.median:.1%} of the time"
        ),
    ]
