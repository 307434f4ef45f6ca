"""What a run says: log lines for people, and the values of every report for programs.

The trainer tells a `Reporter` what it does; where that is shown is decided here.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from train.progress import Meter, log

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from stream.batch import ClipBatch
    from train.accuracy import Accuracy
    from train.distributed import World
    from train.loader import Loader
    from train.output import RunOutput
    from train.recipe import Recipe
    from train.schedule import Schedule


class Reporter:
    """Says what one run does; all ranks call it, rank 0 shows and writes.

    Args:
        recipe: of the run.
        world: who takes part.
        files: where the values of reports go.
    """

    def __init__(self, recipe: Recipe, world: World, files: RunOutput) -> None:
        self._recipe = recipe
        self._world = world
        self._files = files
        self._say = log.info if world.is_first else log.debug
        self._meter = Meter(0)
        self._steps_per_epoch = 1
        self._last_loss = math.nan

    def say(self, text: str, *values: Any) -> None:
        """Show one line, a format string and its values, on rank 0."""
        self._say(text, *values)

    def begin(self, loader: Loader, schedule: Schedule, num_classes: int) -> None:
        """Say what is about to be trained, and start measuring."""
        self._meter = Meter(loader.global_batch)
        self._steps_per_epoch = loader.steps_per_epoch
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
        self.say(
            "learning rate %g = %g x %d / %d (factor %.4g: clips a step / optim.lr_batch)",
            schedule.peak,
            optim.lr,
            loader.global_batch,
            optim.lr_batch,
            loader.global_batch / optim.lr_batch,
        )

    def timed(self, batches: Iterable[ClipBatch]) -> Iterator[ClipBatch]:
        """Yield the batches of an epoch; time counts from here, and waits are measured."""
        self._meter.start()
        return self._meter.timed(batches)

    def add_loss(self, loss: float) -> None:
        """Count the loss of a step, the mean over all ranks; it may arrive steps later."""
        self._meter.add_loss(loss)

    def add_step(self, epoch: int, step: int, rate: float) -> None:
        """Count one optimiser step; report when that is due.

        An epoch's last step is reported by `end_epoch`, with the losses that are on their way.
        """
        self._meter.add_step()
        is_due = step % self._recipe.run.log_every_steps == 0
        if is_due and step % self._steps_per_epoch != 0:
            self._report(epoch, step, rate)

    def end_epoch(self, epoch: int, step: int, rate: float) -> None:
        """Report what the epoch's last steps left."""
        self._report(epoch, step, rate)

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

    def _report(self, epoch: int, step: int, rate: float) -> None:
        if not self._meter.has_losses:
            return
        values = self._meter.report()
        self._last_loss = values["loss"]
        self.say(
            "epoch %d step %d: loss %.4f, lr %.3g, %.1f clips/s, %.0f %% waiting for data",
            epoch,
            step,
            values["loss"],
            rate,
            values["clips_per_second"],
            100 * values["data_wait_share"],
        )
        self._files.write("train", epoch=epoch, step=step, lr=rate, **values)
