"""What a run says: lines and a bar for people, the values of every report for programs.

The trainer tells a `Reporter` what it does; where that is shown is decided here.
"""

from __future__ import annotations

import math
import resource
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Self

import torch

from train.accuracy import some_of
from train.devices import peak_flops
from train.flops import count_flops
from train.profiling import StepProfiler
from train.progress import Meter, log
from train.progress_bar import ProgressBar, wants_bar
from train.random_state import kept_random_state

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from stream.batch import ClipBatch
    from train.accuracy import Accuracy
    from train.distributed import World
    from train.loader import Loader
    from train.output import RunOutput
    from train.recipe import Recipe
    from train.schedule import Schedule


class Reporter:
    """Says what one run does; all ranks call it, rank 0 shows and writes.

    While entered it may own the terminal's last line; leaving it finishes curves and traces.

    Args:
        recipe: of the run.
        world: who takes part.
        files: where the values of reports go.
        directory: of the output, for traces.
    """

    def __init__(self, recipe: Recipe, world: World, files: RunOutput, directory: Path) -> None:
        self._recipe = recipe
        self._world = world
        self._files = files
        self._meter = Meter(0)
        self._num_steps = self._steps_per_epoch = 1
        self._training_flops: int | None = None
        self._last_loss = math.nan
        self._bar: ProgressBar | None = None
        profiled = recipe.run.profile_steps if world.is_first else 0
        self._profiler = StepProfiler(profiled, directory, self.say)

    def __enter__(self) -> Self:
        """Begin to show the run."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the terminal as it was, and finish the files."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._profiler.stop()
        self._files.close()

    def say(self, text: str, *values: Any) -> None:
        """Show one line, a format string and its values, on rank 0."""
        (log.info if self._world.is_first else log.debug)(text, *values)

    def begin(
        self, loader: Loader, schedule: Schedule, model: torch.nn.Module, num_classes: int
    ) -> None:
        """Say what is about to be trained."""
        self._meter = Meter(loader.global_batch)
        self._steps_per_epoch = loader.steps_per_epoch
        self._num_steps = self._recipe.schedule.epochs * loader.steps_per_epoch
        optim, world = self._recipe.optim, self._world
        self.say(
            "%s: %d clips x %d frames, %d classes; %d process(es) on %s; %d steps an epoch",
            self._recipe.model.name,
            loader.num_clips,
            self._recipe.data.frames,
            num_classes,
            world.size,
            world.device.type,
            loader.steps_per_epoch,
        )
        self._say_left_out(loader)
        self.say(
            "learning rate %g = %g x %d / %d (factor %.4g: clips a step / optim.lr_batch)",
            schedule.peak,
            optim.lr,
            loader.global_batch,
            optim.lr_batch,
            loader.global_batch / optim.lr_batch,
        )
        if world.is_first:
            self._announce_work(model)

    def _say_left_out(self, loader: Loader) -> None:
        """Say which clips of the split have no part in an epoch."""
        if short := loader.unscored:
            self.say(
                "%s of %d clips are too short for %d frames at %g fps and stay out (data.short)",
                some_of(short),
                loader.num_clips + len(short),
                self._recipe.data.frames,
                self._recipe.data.fps,
            )
        if loader.num_left_out:
            self.say("%d clip(s) of an epoch fill no step, others each epoch", loader.num_left_out)

    def start(self, step: int) -> None:
        """Draw the bar where there is a terminal: `step` steps of the run are complete."""
        if self._world.is_first and wants_bar():
            self._bar = ProgressBar()
            self._bar.start(self._num_steps, step)

    def timed(self, batches: Iterable[ClipBatch], step: int) -> Iterator[ClipBatch]:
        """Yield the batches of an epoch; time counts from here, and waits are measured."""
        self._profiler.start(step)
        self._meter.start()
        return self._meter.timed(batches)

    def scoring(self, batches: Iterable[ClipBatch], num_batches: int) -> Iterator[ClipBatch]:
        """Yield the `num_batches` batches of an evaluation on this rank."""
        return iter(batches) if self._bar is None else self._bar.count_scored(batches, num_batches)

    def add_loss(self, loss: float) -> None:
        """Count the loss of a step, the mean over all ranks; it may arrive steps later."""
        self._meter.add_loss(loss)

    def add_step(self, epoch: int, step: int, rate: float) -> None:
        """Count one optimiser step; report when that is due.

        An epoch's last step is reported by `end_epoch`, with the losses that are on their way.
        """
        self._meter.add_step()
        self._profiler.add_step(step)
        if self._bar is not None:
            self._bar.show_step(step, f"epoch {epoch + 1}/{self._recipe.schedule.epochs}")
        is_due = step % self._recipe.run.log_every_steps == 0
        if is_due and step % self._steps_per_epoch != 0:
            self._report(epoch, step, rate, is_line=self._bar is None)

    def end_epoch(self, epoch: int, step: int, rate: float) -> None:
        """Report what the epoch's last steps left."""
        self._report(epoch, step, rate, is_line=True)

    def evaluation(self, epochs: int, step: int, accuracy: Accuracy) -> None:
        """Write down the accuracy after `epochs` epochs and `step` steps."""
        self._files.write("eval", epochs=epochs, step=step, **asdict(accuracy))

    def final_metrics(self, epochs: int, step: int, accuracy: Accuracy | None) -> dict[str, float]:
        """Return the metrics that a whole run ends with."""
        metrics = {"epochs": epochs, "steps": step, "loss": self._last_loss}
        if accuracy is not None:
            names = ("clip_top1", "clip_top5", "video_top1", "video_top5")
            metrics |= {name: getattr(accuracy, name) for name in names}
        return metrics

    def _announce_work(self, model: torch.nn.Module) -> None:
        """Say what a clip costs and what the device could do."""
        clip_shape = (self._recipe.data.frames, *self._recipe.augment.crop)
        try:
            with kept_random_state():
                flops = count_flops(model, clip_shape)
        except Exception as error:  # noqa: BLE001 - a user's network can raise anything
            text = str(error).partition("\n")[0] or type(error).__name__
            self.say("operations of the network cannot be counted: %s", text)
            return
        self._training_flops = flops.training
        peak, name = self._peak(), _device_name(self._world.device)
        if peak is None:
            unknown = f"no model FLOP utilisation: the peak of {name} is not known"
        else:
            unknown = f"at most {peak / 1e12:g} TFLOP/s on {name} in {self._recipe.run.precision}"
        self.say("%s x %d x %d x %d: %s; %s", "clip of 3", *clip_shape, flops, unknown)

    def _peak(self) -> float | None:
        return peak_flops(_device_name(self._world.device), self._recipe.run.precision)

    def _report(self, epoch: int, step: int, rate: float, *, is_line: bool) -> None:
        if not self._meter.has_losses:
            return
        values = self._meter.report()
        self._last_loss = values["loss"]
        a_device = values["clips_per_second"] / self._world.size
        peak = self._peak()
        mfu = a_device * self._training_flops / peak if self._training_flops and peak else None
        memory = _peak_memory_bytes(self._world.device)
        news = _news(values, mfu)
        if self._bar is not None:
            self._bar.show_news(news)
        if is_line:
            seconds = (self._num_steps - step) * values["seconds_per_step"]
            self.say(
                "epoch %d/%d step %d: %s, lr %.3g, %s, %s left",
                epoch + 1,
                self._recipe.schedule.epochs,
                step,
                news,
                rate,
                f"{memory / 2**30:.1f} GiB",
                format_seconds(seconds),
            )
        values |= {"peak_memory_bytes": memory}
        self._files.write("train", epoch=epoch, step=step, lr=rate, **values, mfu=mfu)


def _news(values: dict[str, float], mfu: float | None) -> str:
    parts = [
        f"loss {values['loss']:.4f}",
        f"{values['clips_per_second']:.1f} clips/s",
        f"{values['data_wait_share']:.0%} waiting for data",
    ]
    if mfu is not None:
        parts.append(f"{mfu:.1%} MFU")
    return ", ".join(parts)


def format_seconds(seconds: float) -> str:
    """Return a time as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"


def _peak_memory_bytes(device: torch.device) -> int:
    """Return the most that tensors took on the device, or this process took of the CPU's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
