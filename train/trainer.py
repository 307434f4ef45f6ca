"""The trainer: it owns the loop and wires data, model, optimiser, evaluation and checkpoints."""

from __future__ import annotations

import signal
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from prep.errors import DatasetError, UsageError
from stream.loader import ClipLoader
from train.agreement import (
    Agreed,
    LossNotFiniteError,
    Status,
    StatusExchange,
    lost_losses,
    raise_together,
    raising_together,
)
from train.bad_clips import SharedBadClips
from train.evaluation import evaluate
from train.evaluation_files import SOURCE_NAME, source_text
from train.hooks import check_hook
from train.loader import Loader, common_class_names, fingerprint
from train.models import distribute, draw_model, set_training, why_no_kernels
from train.optim import build_optimizer, describe_groups
from train.output import RunOutput
from train.protocol import check_clips, check_training_clips
from train.random_state import kept_random_state
from train.reporting import Reporter
from train.run_state import RunState
from train.schedule import Schedule, scaled_learning_rate
from train.self_check import check_first_convolution
from train.signals import InterruptedBySignalError, SignalWatch
from train.step import OptimizerStep, check_batch_labels
from train.transforms import why_slow_clips

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from stream.batch import ClipBatch
    from train.accuracy import Accuracy
    from train.distributed import World
    from train.recipe import Recipe
    from train.scores import VideoScores


class Trainer:
    """One training run, as one of its ranks sees it.

    Args:
        recipe: what to do.
        world: who takes part, from `joined_world`.
        train_loader: this rank's training batches; None only evaluates.
        val_loader: this rank's slice of the evaluation clips; None trains without evaluation.
        output: directory for `checkpoints/`, `metrics.jsonl`, `recipe.toml` and `final.pt`.
        transform_batch: changes every decoded batch before augmentation (experiments and tests).
        given: the recipe before `keep_global_batch`; None where that changed nothing.
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
        given: Recipe | None = None,
    ) -> None:
        self.recipe = recipe
        self.world = world
        self.output = output
        self.class_names = common_class_names(train_loader, val_loader)
        check_hook(transform_batch)
        is_transformed = transform_batch is not None
        if isinstance(train_loader, ClipLoader):
            check_training_clips(train_loader, recipe, is_transformed=is_transformed)
        if isinstance(val_loader, ClipLoader):  # before an epoch is trained
            check_clips(val_loader.stream.options, recipe, is_transformed=is_transformed)
        self._train_loader = train_loader
        self._val_loader = val_loader
        self._transform = transform_batch
        model = draw_model(recipe, len(self.class_names), world)
        wrapped: torch.nn.Module = model
        if world.size > 1 and train_loader is not None:
            wrapped = distribute(model, world)
        optimizer = build_optimizer(model, recipe)
        self._step = OptimizerStep(
            wrapped,
            optimizer,
            recipe,
            world.device,
            num_classes=len(self.class_names),
            transform=transform_batch,
        )
        self._exchange = StatusExchange(world)
        self._signals = SignalWatch()
        self._files = RunOutput(output, world, given or recipe)
        self._reporter = Reporter(recipe, world, self._files, output)
        self._log = self._reporter.say
        limit = recipe.data.bad_clip_limit
        self._bad_clips = SharedBadClips(world, limit, self._log, self._files.write)
        self._state = RunState(
            recipe,
            (given or recipe).data,
            world,
            self.class_names,
            model=model,
            optimizer=optimizer,
            scaler=self._step.scaler,
            files=self._files,
            say=self._log,
        )

    @property
    def model(self) -> torch.nn.Module:
        """The network itself, not wrapped in DDP."""
        return self._state.model

    @property
    def epoch(self) -> int:
        """Epochs that are complete."""
        return self._state.epoch

    @property
    def step(self) -> int:
        """Optimiser steps that are complete, over the whole training."""
        return self._state.step

    def fit(self) -> dict[str, float]:
        """Train up to the recipe's last epoch; return the final metrics.

        Raises, on all ranks at the same step: KprepError when the loss is no longer finite; and,
        after a checkpoint of the last complete step, InterruptedBySignalError for a signal and
        what any rank's loader raises.
        """
        loader = self._training_loader()
        schedule = self._schedule(loader)
        self._open_files()
        self._reporter.begin(loader, schedule, self.model, len(self.class_names))
        if groups := describe_groups(self._state.optimizer):
            self._log("%s", groups)
        self._check_arithmetic()
        with self._signals, self._reporter:
            self._reporter.start(self.step)
            accuracy = self._evaluate_when_due() if self.step else None
            while self.epoch < self.recipe.schedule.epochs:
                try:
                    self._train_epoch(loader, schedule)
                except LossNotFiniteError as error:
                    self._roll_back(error)
                    continue
                accuracy = self._evaluate_when_due()
            if accuracy is None and self._val_loader is not None:
                accuracy, _ = self.evaluate()  # resumed after the last epoch
            self._state.save_network(best=False)
            self._bad_clips.end(self.step)
        return self._reporter.final_metrics(self.epoch, self.step, accuracy)

    def evaluate(self) -> tuple[Accuracy, VideoScores | None]:
        """Score the evaluation split exactly: see `train.evaluation.evaluate`."""
        loader = self._val_loader
        if loader is None:
            raise UsageError("there is no evaluation split; name one with --val-split")
        with kept_random_state():
            accuracy, videos = evaluate(
                self._state.evaluated,
                self._reporter.scoring(self._until_signal(loader), loader.steps_per_epoch),
                self.recipe,
                self.world,
                num_classes=len(self.class_names),
                unscored=lambda: loader.unscored,
                damaged=loader.bad_clip_summary().clips.values,
                num_videos=loader.num_videos,
                is_averaged=self._state.is_averaged,
                transform_batch=self._transform,
            )
        self._log("after %d epochs: %s", self.epoch, accuracy)
        return accuracy, videos

    def _until_signal(self, batches: Loader) -> Iterator[ClipBatch]:
        """Yield the batches; raise when a signal comes, also in the wait for one of them."""
        iterator = self._signals.wait_for(lambda: iter(batches))
        while iterator is not None:
            batch = self._signals.wait_for(lambda: next(iterator, None))
            if self._signals.received or batch is None:
                break
            yield batch
        if self._signals.received:
            raise self._interrupted(self._signals.received)

    def test(self, name: str, weights: str) -> dict[str, float]:
        """Evaluate without training, write `evaluation/NAME/`, and return the metrics.

        `weights` says which they are; NAME gets a number where it holds a result of others.
        """
        self._say_what_is_slow()
        accuracy, videos = self.evaluate()
        source = source_text(weights, fingerprint(self._val_loader), accuracy.protocol)
        page = self._files.save_evaluation(
            name, accuracy, videos, self.class_names, extra={SOURCE_NAME: source}
        )
        self._log("written to %s", page.parent)
        return self._reporter.final_metrics(self.epoch, self.step, accuracy)

    def restore(self, path: Path, *, weights_only: bool = False) -> None:
        """Go on from a checkpoint, or only take its network.

        Raises UsageError when it belongs to other classes or another network, and what the stream
        raises when the clips would no longer be the same sequence.
        """
        self._state.restore(path, None if weights_only else self._training_loader())

    def start_from(self, name: str) -> None:
        """Begin with weights that are not a run of ours to go on with: see `find_weights`.

        Raises UsageError, on all ranks.
        """
        self._state.start_from(name, must_be_whole=self._train_loader is None)

    def _train_epoch(self, loader: Loader, schedule: Schedule) -> None:
        """Train on the batches of the loader's epoch, from its place on, and save the result."""
        loader.set_epoch(self.epoch)
        set_training(self.model, freeze_batchnorm=self.recipe.model.freeze_batchnorm)
        batches = self._reporter.timed(loader, self.step)
        last = (self.epoch + 1) * loader.steps_per_epoch
        while self.step < last:
            fetched = self._agreed_batches(batches)
            rate = schedule.learning_rate(self.step)
            self._state.step += 1
            if self.step in self._state.left_out:
                continue
            self._exchange.add_loss(self.step, self._step.run(fetched, rate, self.epoch))
            self._state.note_step()
            self._reporter.add_step(self.epoch, self.step, rate)
        self._await_losses()
        self._reporter.end_epoch(self.epoch, self.step, schedule.learning_rate(self.step - 1))
        self._state.epoch += 1
        self._state.save(loader)

    def _agreed_batches(self, batches: Iterator[ClipBatch]) -> list[ClipBatch]:
        """Return this rank's batches of the next step, when all ranks have theirs.

        Raises on all ranks when one of them cannot go on or was asked to end; writes a checkpoint
        of the complete steps when one is due.
        """
        fetched, error = self._fetch(batches)
        run = self.recipe.run
        due = bool(run.checkpoint_steps) and self.step % run.checkpoint_steps == 0
        self._exchange.post(
            Status(
                failed=error is not None,
                signal=self._signals.received,
                checkpoint=due or self._files.is_checkpoint_late(),
                bad_clips=self._bad_clips.note(fetched),
            )
        )
        prepared = self._step.prepare(fetched)
        agreed = self._exchange.read()
        self._take_losses(agreed)
        too_many = self._bad_clips.agree(*agreed.bad_clips, self.step)
        if agreed.failed or agreed.signal or agreed.checkpoint or too_many:
            self._await_losses()
            self._state.save_within_epoch(self._training_loader())
        if agreed.failed:
            raise_together(self.world, error)
        if too_many is not None or agreed.signal:
            raise_together(self.world, too_many or self._interrupted(agreed.signal))
        return prepared

    def _fetch(self, batches: Iterator[ClipBatch]) -> tuple[list[ClipBatch], Exception | None]:
        """Return the batches of a step, or the error that this rank met."""
        accumulate = self.recipe.data.accumulate
        try:
            with kept_random_state():
                found = self._signals.wait_for(lambda: list(islice(batches, accumulate)))
            if found is None:
                return [], None  # a signal came, which ends the step on all ranks
            if self._transform is None:
                for batch in found:
                    check_batch_labels(batch, len(self.class_names))
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must know
            return [], error
        if len(found) < accumulate:
            return [], DatasetError(f"the loader ended early, after step {self.step}")
        return found, None

    def _await_losses(self) -> None:
        """Wait for the losses of all steps so far; all ranks do so at the same step."""
        self._exchange.post(Status(), drain=True)
        self._take_losses(self._exchange.read())

    def _take_losses(self, agreed: Agreed) -> None:
        """Count losses that arrived; raise on every rank where one of them is lost."""
        for step, losses in agreed.losses:
            what = lost_losses(losses, self.recipe.run.max_loss)
            if what:
                raise_together(
                    self.world, self._state.not_finite(step, what, self._training_loader())
                )
            self._reporter.add_loss(sum(losses) / len(losses))

    def _roll_back(self, error: LossNotFiniteError) -> None:
        """Go back to the last good checkpoint, or raise where the recipe does not want that.

        The step that was lost and the one before it, which may have spoilt the weights, are left
        out when they come again: repeated exactly, they would be lost again.
        """
        run, state = self.recipe.run, self._state
        place = state.place_before(error.step, self._training_loader())
        if run.on_nan == "stop" or not place or state.rollbacks >= run.max_rollbacks:
            raise error
        state.rollbacks += 1
        state.left_out |= {error.step - 1, error.step}
        self._exchange.forget()
        self._log("rolled back (%d of %d): %s", state.rollbacks, run.max_rollbacks, error)
        self.restore(Path(place))
        self._open_files()

    def _interrupted(self, number: int) -> InterruptedBySignalError:
        name = signal.Signals(number).name
        place = self._files.place
        return InterruptedBySignalError(
            number,
            f"stopped by {name} after step {self.step}; "
            + (
                f"the checkpoint is {place}; go on with --resume auto" if place else "nothing saved"
            ),
        )

    def _open_files(self) -> None:
        self._files.open(self.step, self.epoch, in_epoch=not self._is_epoch_complete())

    def _schedule(self, loader: Loader) -> Schedule:
        peak = scaled_learning_rate(self.recipe.optim, loader.global_batch)
        return Schedule.from_recipe(self.recipe.schedule, peak, loader.steps_per_epoch)

    def _check_arithmetic(self) -> None:
        run, data = self.recipe.run, self.recipe.data
        clip = (data.frames, *self.recipe.augment.crop)
        with raising_together(self.world, Exception):
            off = check_first_convolution(self.model, run.precision, clip, self.world.device)
        if off is not None:
            self._log(
                "first convolution in %s: off by %.2f %%, as it should", run.precision, 100 * off
            )
        if notice := why_no_kernels(self.recipe, self.model, self.world.device):
            self._log("%s", notice)
        self._say_what_is_slow()

    def _say_what_is_slow(self) -> None:
        if notice := why_slow_clips(self.recipe, self.world.device):
            self._log("%s", notice)

    def _training_loader(self) -> Loader:
        if self._train_loader is None:
            raise UsageError("there is no training split; name one with --train-split")
        return self._train_loader

    def _evaluate_when_due(self) -> Accuracy | None:
        """Evaluate after an epoch whose turn it is, unless the metrics hold the result."""
        epochs = self.epoch if self._is_epoch_complete() else 0
        is_due = epochs % self.recipe.eval.every_epochs == 0
        is_due = epochs > 0 and (is_due or epochs == self.recipe.schedule.epochs)
        if self._val_loader is None or not is_due or self._files.is_evaluated(self.step):
            return None
        accuracy, videos = self.evaluate()
        if self._files.is_best(accuracy.video_top1):
            self._state.save_network(best=True)
        name = f"epoch-{self.epoch:04d}"
        self._files.save_evaluation(name, accuracy, videos, self.class_names, step=self.step)
        self._reporter.evaluation(self.epoch, self.step, accuracy)
        return accuracy

    def _is_epoch_complete(self) -> bool:
        return self._state.is_epoch_complete(self._training_loader())
