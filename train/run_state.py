"""What a run has reached, and how it is saved and gone back to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prep.errors import UsageError
from train.agreement import LossNotFiniteError, raise_together
from train.checkpoint import (
    Checkpoint,
    check_class_names,
    load_checkpoint,
    naming_checkpoint,
)
from train.distributed import broadcast_text
from train.ema import WeightAverage
from train.models import is_finite
from train.optim import load_optimizer_state
from train.random_state import gather_random_states, restore_random_states
from train.recipe import parse_recipe, recipe_differences
from train.weights import begin_with

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

    from train.distributed import World
    from train.loader import Loader
    from train.output import RunOutput
    from train.recipe import DataRecipe, Recipe

# The settings that an evaluation's result depends on; the network is the checkpoint's.
_EVALUATED_WITH = (
    "data.frames", "data.fps", "data.short", "augment.resize", "augment.short_side",
    "augment.round_resized", "augment.crop", "augment.mean", "augment.std", "eval.frames",
    "eval.clips_per_video", "eval.placement", "eval.crops", "eval.average", "run.precision",
)  # fmt: skip


class RunState:
    """The network of a run, all that its training goes on from, and how far it has come.

    Args:
        recipe: what to do.
        given: the recipe's data before `keep_global_batch`.
        world: who takes part.
        class_names: in label order.
        model: the network itself, not wrapped in DDP.
        optimizer: over its weights.
        scaler: of fp16's gradients.
        files: where checkpoints are written.
        say: shows one line, a format string and its values, on rank 0.
    """

    def __init__(
        self,
        recipe: Recipe,
        given: DataRecipe,
        world: World,
        class_names: list[str],
        *,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        files: RunOutput,
        say: Callable[..., None],
    ) -> None:
        self.model = model
        self.epoch = 0
        """Epochs that are complete."""
        self.step = 0
        """Optimiser steps that are complete, over the whole training."""
        decay = recipe.model.ema_decay
        self.average = WeightAverage(model, decay) if decay else None
        self.is_averaged = False
        """Whether what is evaluated is more than the last weights."""
        self.left_out: set[int] = set()
        """Optimiser steps that are not made when they come (again)."""
        self.rollbacks = 0
        """How often the run went back to a checkpoint."""
        self.optimizer = optimizer
        self._recipe, self._given, self._world = recipe, given, world
        self._class_names = class_names
        self._scaler = scaler
        self._files = files
        self._say = say
        self._saved_step = 0

    @property
    def evaluated(self) -> torch.nn.Module:
        """The network that is evaluated: the moving average, where there is one."""
        return self.average.model if self.average else self.model

    def note_step(self) -> None:
        """Take the weights of the step that is complete into their average."""
        if self.average is not None:
            self.average.update(self.step)
        self.is_averaged = self.average is not None

    def is_epoch_complete(self, loader: Loader) -> bool:
        """Return whether no step of the next epoch was made."""
        return self.step == self.epoch * loader.steps_per_epoch

    def restore(self, path: Path, loader: Loader | None) -> None:
        """Go on from a checkpoint, with the clips of `loader`; without one, take its network only.

        A network that is only evaluated has the averaged weights where the checkpoint has some.
        Raises UsageError when it belongs to other classes or another network, and what the stream
        raises when the clips would no longer be the same sequence.
        """
        saved = load_checkpoint(path)
        check_class_names(saved.class_names, self._class_names, path)
        network = saved.model if loader is not None else saved.ema or saved.model
        try:
            self.model.load_state_dict(network)
            if self.average is not None:  # a run that kept none begins with its weights
                self.average.model.load_state_dict(saved.ema or saved.model)
        except RuntimeError as error:
            raise UsageError(
                f"checkpoint {path} holds another network than {self._recipe.model.name!r}: "
                f"{str(error).splitlines()[-1].strip()}"
            ) from error
        is_taken = self.average is not None or loader is None
        self.is_averaged = bool(saved.ema) and is_taken
        self.epoch, self.step, self._saved_step = saved.epoch, saved.step, saved.step
        self._files.place = str(path)
        old = parse_recipe(saved.recipe, str(path))
        if loader is not None:
            self._restore_training(saved, old, path, loader)
        else:
            self._say_changes(old, path)

    def start_from(self, name: str, *, must_be_whole: bool) -> None:
        """Begin with weights that are not a run of ours to go on with: see `begin_with`."""
        report = begin_with(
            name,
            self.model,
            self._class_names,
            self._world,
            self._recipe.model,
            must_be_whole=must_be_whole,
        )
        self._say("weights from %s: %s", name, report)
        self.is_averaged = report is not None and report.is_averaged
        if self.average is not None:
            self.average.model.load_state_dict(self.model.state_dict())

    def _say_changes(self, old: Recipe, path: Path) -> None:
        """Name the settings that make the result another than an evaluation of the run itself."""
        for change in recipe_differences(old, self._recipe):
            if change.partition(":")[0] in _EVALUATED_WITH:
                self._say("changed since checkpoint %s: %s", path, change)

    def _restore_training(self, saved: Checkpoint, old: Recipe, path: Path, loader: Loader) -> None:
        if saved.optimizer is None:
            raise UsageError(
                f"checkpoint {path} holds only the network; resume from checkpoints/epoch-*.pt, or "
                "begin a new run with --weights"
            )
        if old.optim.name != self._recipe.optim.name:
            raise UsageError(
                f"checkpoint {path} holds the state of {old.optim.name}, and optim.name is "
                f"{self._recipe.optim.name!r}; resume with the same optimiser"
            )
        loader.load_state_dict(saved.loader)
        with naming_checkpoint(path):
            load_optimizer_state(self.optimizer, saved.optimizer)
            if saved.scaler and self._recipe.run.precision == "fp16":
                self._scaler.load_state_dict(saved.scaler)
            restore_random_states(saved.rng, self._world)
        # a checkpoint that is gone back to does not know of it
        self.left_out |= set(saved.left_out)
        self.rollbacks = max(self.rollbacks, saved.rollbacks)
        self._say("resumed from %s: %d epochs, %d steps", path, self.epoch, self.step)
        for change in recipe_differences(old, self._recipe):
            self._say("changed since that checkpoint: %s", change)

    def save(self, loader: Loader) -> None:
        """Write a checkpoint; every rank calls this, between two steps.

        Raises LossNotFiniteError, on all ranks, where it would hold weights that are lost.
        """
        networks = [self.model, *([self.average.model] if self.average else [])]
        # rank 0's are saved; BatchNorm's statistics are each rank's own until the next step
        lost = self._world.is_first and not all(map(is_finite, networks))
        if broadcast_text(self._world, "lost" if lost else ""):
            what = "the weights, or BatchNorm's statistics, are not finite"
            raise_together(self._world, self.not_finite(self.step, what, loader))
        # the loader has handed out a step that is not trained on yet
        place = {"epoch": self.epoch, "step": self.step - self.epoch * loader.steps_per_epoch}
        checkpoint = self._checkpoint(
            self.optimizer.state_dict(),
            {**loader.state_dict(), **place},
            gather_random_states(self._world),
        )
        is_complete = self.is_epoch_complete(loader)
        self._files.save(checkpoint, step=None if is_complete else self.step)
        self._saved_step = self.step

    def save_within_epoch(self, loader: Loader) -> None:
        """Write a checkpoint of the complete steps, unless it is there already."""
        if self.step != self._saved_step:
            self.save(loader)

    def save_network(self, *, best: bool) -> None:
        """Write the network alone: the best so far, or the final one; every rank calls this."""
        self._files.save_network(self._checkpoint(None, {}, {}), best=best)

    def place_before(self, lost_step: int, loader: Loader) -> str:
        """Return the newest checkpoint without the update that lost a step's loss, or ""."""
        # the loss of step s is that of the weights after step s - 1, whose update may be the cause
        return self._files.newest_before(lost_step - 1, loader.steps_per_epoch)

    def not_finite(self, step: int, what: str, loader: Loader) -> LossNotFiniteError:
        """Return what is said where the loss of a step is lost; every rank calls this."""
        place, recipe = self.place_before(step, loader), self._recipe
        good = f"the last good checkpoint is {place}" if place else "there is no checkpoint yet"
        return LossNotFiniteError(
            step,
            f"{what}, at step {step} of epoch {self.epoch}; {good}; lower optim.lr "
            f"({recipe.optim.lr:g}), lengthen schedule.warmup_epochs "
            f"({recipe.schedule.warmup_epochs:g}), or resume with other settings",
        )

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
            recipe=self._recipe.to_toml(),
            class_names=self._class_names,
            loader=loader,
            rng=rng,
            ema=self.average.model.state_dict() if self.average else None,
            scaler=self._scaler.state_dict() if optimizer is not None else {},
            given=[self._given.batch_size, self._given.accumulate],
            left_out=sorted(self.left_out),
            rollbacks=self.rollbacks,
        )
