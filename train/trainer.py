"""The trainer: it owns the loop and wires data, model, optimiser, evaluation and checkpoints."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from prep.errors import DatasetError, KprepError, UsageError
from train.checkpoint import (
    Checkpoint,
    check_class_names,
    checkpoint_path,
    load_checkpoint,
    rotate_checkpoints,
    save_checkpoint,
)
from train.distributed import LossExchange
from train.evaluation import Accuracy, evaluate
from train.models import build_model, run_model, set_training
from train.optim import build_optimizer, load_optimizer_state
from train.progress import Meter, MetricsFile, log
from train.random_state import gather_random_states, restore_random_states
from train.recipe import parse_recipe, recipe_differences
from train.schedule import Schedule, scaled_learning_rate
from train.transforms import train_clips, video_on

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from stream.batch import ClipBatch
    from train.distributed import World
    from train.recipe import Recipe


class Loader(Protocol):
    """What the trainer needs of `stream.clip_loader`'s result."""

    @property
    def class_names(self) -> list[str]: ...
    @property
    def steps_per_epoch(self) -> int: ...
    @property
    def global_batch(self) -> int: ...
    @property
    def num_clips(self) -> int: ...
    @property
    def unscored(self) -> list[str]: ...

    def __iter__(self) -> Iterator[ClipBatch]: ...
    def set_epoch(self, epoch: int) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Trainer:
    """One training run, as one of its ranks sees it.

    Args:
        recipe: what to do.
        world: who takes part, from `joined_world`.
        train_loader: this rank's training batches; None only evaluates.
        val_loader: this rank's slice of the evaluation clips; None trains without evaluation.
        output: directory for `checkpoints/`, `metrics.jsonl`, `recipe.toml` and `final.pt`.
        transform_batch: changes every decoded batch before augmentation (experiments and tests).
    """

    def __init__(
        self,
        recipe: Recipe,
        world: World,
        train_loader: Loader | None,
        val_loader: Loader | None,
        output: Path,
        *,
        transform_batch: Callable[[ClipBatch], ClipBatch] | None = None,
    ) -> None:
        self.recipe = recipe
        self.world = world
        self.output = output
        self.class_names = _class_names(train_loader, val_loader)
        self._train_loader = train_loader
        self._val_loader = val_loader
        self._transform = transform_batch
        self._log = log.info if world.is_first else log.debug
        self.epoch = 0
        self.step = 0
        self.model = self._build_model()
        self._wrapped: nn.Module = self.model
        if world.size > 1 and train_loader is not None:
            self._wrapped = _distributed(self.model, world)
        self._optimizer = build_optimizer(self.model, recipe)
        self._losses = LossExchange(world)
        self._metrics: MetricsFile | None = None
        self._last_loss = math.nan

    def fit(self) -> dict[str, float]:
        """Train up to the recipe's last epoch; return the final metrics.

        Raises KprepError, on all ranks, when the loss is no longer finite, and DatasetError for
        clips without a label.
        """
        loader = self._training_loader()
        schedule = self._schedule(loader)
        self._open_output()
        self._announce(loader, schedule)
        meter = Meter(loader.global_batch)
        accuracy: Accuracy | None = None
        while self.epoch < self.recipe.schedule.epochs:
            self._train_epoch(loader, schedule, meter)
            self._save(loader)
            accuracy = self.evaluate() if self._is_evaluated() else None
        if accuracy is None and self._val_loader is not None:
            accuracy = self.evaluate()  # resumed after the last epoch
        self._save_final()
        return self._final_metrics(accuracy)

    def evaluate(self) -> Accuracy:
        """Score the evaluation split exactly; the same result on every rank."""
        loader = self._val_loader
        if loader is None:
            raise UsageError("there is no evaluation split; name one with --val-split")
        accuracy = evaluate(
            self.model,
            loader,
            self.recipe,
            self.world,
            num_classes=len(self.class_names),
            unscored=loader.unscored,
            transform_batch=self._transform,
        )
        self._log("after %d epochs: %s", self.epoch, accuracy)
        if self._metrics is not None:
            self._metrics.write("eval", epochs=self.epoch, step=self.step, **asdict(accuracy))
        return accuracy

    def test(self) -> dict[str, float]:
        """Evaluate without training; return the metrics."""
        return self._final_metrics(self.evaluate())

    def restore(self, path: Path, *, weights_only: bool = False) -> None:
        """Go on from a checkpoint, or only take its network.

        Raises UsageError when it belongs to other classes or another network, and what the stream
        raises when the clips would no longer be the same sequence.
        """
        saved = load_checkpoint(path)
        check_class_names(saved.class_names, self.class_names, path)
        try:
            self.model.load_state_dict(saved.model)
        except RuntimeError as error:
            raise UsageError(
                f"checkpoint {path} holds another network than {self.recipe.model.name!r}: "
                f"{str(error).splitlines()[-1].strip()}"
            ) from error
        self.epoch, self.step = saved.epoch, saved.step
        if not weights_only:
            self._restore_training(saved, path)

    def _restore_training(self, saved: Checkpoint, path: Path) -> None:
        if saved.optimizer is None:
            raise UsageError(
                f"checkpoint {path} holds only the network; resume from one in checkpoints/"
            )
        old = parse_recipe(saved.recipe, str(path))
        if old.optim.name != self.recipe.optim.name:
            raise UsageError(
                f"checkpoint {path} holds the state of {old.optim.name}, and optim.name is "
                f"{self.recipe.optim.name!r}; resume with the same optimiser"
            )
        self._training_loader().load_state_dict(saved.loader)
        load_optimizer_state(self._optimizer, saved.optimizer)
        restore_random_states(saved.rng, self.world)
        self._log("resumed from %s: %d epochs, %d steps", path, self.epoch, self.step)
        for change in recipe_differences(old, self.recipe):
            self._log("changed since that checkpoint: %s", change)

    def _train_epoch(self, loader: Loader, schedule: Schedule, meter: Meter) -> None:
        """Train on every batch of the loader's epoch."""
        loader.set_epoch(self.epoch)
        set_training(self.model, freeze_batchnorm=self.recipe.model.freeze_batchnorm)
        meter.start()
        batches = meter.timed(loader)
        rate = schedule.learning_rate(self.step)
        while (loss := self._optimizer_step(batches, rate)) is not None:
            self.step += 1
            meter.add_step()
            self._take_losses(self._losses.post(loss), meter)
            if self._is_logged(loader, meter):
                self._report(meter, rate)
            rate = schedule.learning_rate(self.step)
        self._take_losses(self._losses.flush(), meter)
        if meter.has_losses:
            self._report(meter, schedule.learning_rate(self.step - 1))
        self.epoch += 1

    def _is_logged(self, loader: Loader, meter: Meter) -> bool:
        """Whether a log line is due; an epoch's last step is reported with the epoch."""
        is_due = self.step % self.recipe.run.log_every_steps == 0
        return is_due and self.step % loader.steps_per_epoch != 0 and meter.has_losses

    def _optimizer_step(self, batches: Iterator[ClipBatch], rate: float) -> torch.Tensor | None:
        """Sum up the gradients of a step's batches, change the weights, return the mean loss.

        Returns None, and changes nothing, when the epoch has no more batches.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        accumulate = self.recipe.data.accumulate
        total: torch.Tensor | None = None
        for position, batch in enumerate(islice(batches, accumulate), start=1):
            with nullcontext() if position == accumulate else self._without_sync():
                loss = self._loss(batch) / accumulate
                loss.backward()  # type: ignore[no-untyped-call]
            total = loss.detach() if total is None else total + loss.detach()
        if total is not None:
            self._optimizer.step()
        return total

    def _without_sync(self) -> AbstractContextManager[None]:
        """Keep gradients on this rank until the step's last batch."""
        if isinstance(self._wrapped, DistributedDataParallel):
            return self._wrapped.no_sync()
        return nullcontext()

    def _loss(self, raw: ClipBatch) -> torch.Tensor:
        """Return the mean cross-entropy of one batch, a float32 scalar on the device."""
        batch = self._transform(raw) if self._transform else raw
        _check_labels(batch, len(self.class_names))
        device, recipe = self.world.device, self.recipe
        clips = train_clips(video_on(batch, device), recipe.augment, recipe.run.seed, self.epoch)
        logits = run_model(self._wrapped, clips, recipe, len(self.class_names))
        return functional.cross_entropy(
            logits.float(),
            batch.label.to(device, non_blocking=True),
            label_smoothing=recipe.optim.label_smoothing,
        )

    def _take_losses(self, steps: list[list[float]], meter: Meter) -> None:
        """Count losses that arrived; stop every rank where one of them is not finite."""
        for losses in steps:
            lost = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
            if lost:
                self._losses.flush()
                raise KprepError(
                    f"the loss is not finite on rank {', '.join(map(str, lost))}, seen at step "
                    f"{self.step} of epoch {self.epoch}; lower optim.lr "
                    f"({self.recipe.optim.lr:g}), lengthen schedule.warmup_epochs "
                    f"({self.recipe.schedule.warmup_epochs:g}), or resume with other settings"
                )
            meter.add_loss(sum(losses) / len(losses))

    def _report(self, meter: Meter, rate: float) -> None:
        values = meter.report()
        self._last_loss = values["loss"]
        self._log(
            "epoch %d step %d: loss %.4f, lr %.3g, %.1f clips/s, %.0f %% waiting for data",
            self.epoch,
            self.step,
            values["loss"],
            rate,
            values["clips_per_second"],
            100 * values["data_wait_share"],
        )
        if self._metrics is not None:
            self._metrics.write("train", epoch=self.epoch, step=self.step, lr=rate, **values)

    def _build_model(self) -> nn.Module:
        """Draw the first weights, equal on all ranks, and leave each rank its own generator."""
        run = self.recipe.run
        if self.recipe.model.sync_batchnorm and self.world.device.type != "cuda":
            raise UsageError(
                "model.sync_batchnorm needs CUDA; on a CPU add --set model.sync_batchnorm=false"
            )
        torch.manual_seed(run.seed)
        model = build_model(self.recipe, len(self.class_names)).to(self.world.device)
        if run.channels_last_3d:
            model = model.to(memory_format=torch.channels_last_3d)
        # dropout and its like must not be the same on every rank
        torch.manual_seed((run.seed + 1 + self.world.rank) % 2**63)
        return model

    def _schedule(self, loader: Loader) -> Schedule:
        peak = scaled_learning_rate(self.recipe.optim, loader.global_batch)
        return Schedule.from_recipe(self.recipe.schedule, peak, loader.steps_per_epoch)

    def _announce(self, loader: Loader, schedule: Schedule) -> None:
        optim = self.recipe.optim
        self._log(
            "%s: %d clips x %d frames, %d classes; %d process(es) on %s; %d steps an epoch",
            self.recipe.model.name,
            loader.num_clips,
            self.recipe.data.frames,
            len(self.class_names),
            self.world.size,
            self.world.device.type,
            loader.steps_per_epoch,
        )
        self._log(
            "learning rate %g = %g x %d / %d (factor %.4g: clips a step / optim.lr_batch)",
            schedule.peak,
            optim.lr,
            loader.global_batch,
            optim.lr_batch,
            loader.global_batch / optim.lr_batch,
        )

    def _training_loader(self) -> Loader:
        if self._train_loader is None:
            raise UsageError("there is no training split; name one with --train-split")
        return self._train_loader

    def _is_evaluated(self) -> bool:
        is_due = self.epoch % self.recipe.eval.every_epochs == 0
        return self._val_loader is not None and (
            is_due or self.epoch == self.recipe.schedule.epochs
        )

    def _open_output(self) -> None:
        if not self.world.is_first:
            return
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            (self.output / "recipe.toml").write_text(self.recipe.to_toml(), encoding="utf-8")
            metrics = self.output / "metrics.jsonl"
            self._metrics = MetricsFile(metrics, keep_until_step=self.step)
        except OSError as error:
            raise UsageError(f"--output {self.output} cannot be written: {error}") from error

    def _save(self, loader: Loader) -> None:
        """Write the epoch's checkpoint on rank 0; every rank calls this."""
        rng = gather_random_states(self.world)
        if not self.world.is_first:
            return
        directory = self.output / "checkpoints"
        checkpoint = self._checkpoint(self._optimizer.state_dict(), loader.state_dict(), rng)
        save_checkpoint(checkpoint_path(directory, self.epoch), checkpoint)
        rotate_checkpoints(directory, self.recipe.run.keep_checkpoints)

    def _save_final(self) -> None:
        """Write the trained network alone, for evaluation and use elsewhere."""
        if self.world.is_first:
            save_checkpoint(self.output / "final.pt", self._checkpoint(None, {}, {}))

    def _checkpoint(
        self,
        optimizer: dict[str, Any] | None,
        loader: dict[str, Any],
        rng: dict[str, torch.Tensor],
    ) -> Checkpoint:
        return Checkpoint(
            epoch=self.epoch,
            step=self.step,
            model=self.model.state_dict(),
            optimizer=optimizer,
            recipe=self.recipe.to_toml(),
            class_names=self.class_names,
            loader=loader,
            rng=rng,
        )

    def _final_metrics(self, accuracy: Accuracy | None) -> dict[str, float]:
        metrics = {"epochs": self.epoch, "steps": self.step, "loss": self._last_loss}
        if accuracy is not None:
            names = ("clip_top1", "clip_top5", "video_top1", "video_top5")
            metrics |= {name: getattr(accuracy, name) for name in names}
        return metrics


def _class_names(train_loader: Loader | None, val_loader: Loader | None) -> list[str]:
    """Return the names of the classes, which both loaders must agree on."""
    loaders = [loader for loader in (train_loader, val_loader) if loader is not None]
    if not loaders:
        raise UsageError("there is neither a training nor an evaluation split")
    names = list(loaders[0].class_names)
    if any(list(loader.class_names) != names for loader in loaders):
        raise UsageError("the training and the evaluation split have different class lists")
    if not names:
        raise DatasetError("the dataset's manifest lists no classes; convert it with labels")
    return names


def _check_labels(batch: ClipBatch, num_classes: int) -> None:
    """Raise DatasetError, naming the first clip, when a training clip has no usable label."""
    wrong = ((batch.label < 0) | (batch.label >= num_classes)).nonzero().flatten().tolist()
    if wrong:
        label = int(batch.label[wrong[0]])
        what = "has no label" if label < 0 else f"has label {label} of {num_classes} classes"
        raise DatasetError(
            f"clip {batch.key[wrong[0]]} {what}; train on a split whose clips are all labelled"
        )


def _distributed(model: nn.Module, world: World) -> DistributedDataParallel:
    device_ids = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids)
