"""One optimiser step: batches in, changed weights and the mean loss out."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from prep.errors import DatasetError, UsageError
from train.compilation import compiled, compiler_errors
from train.hooks import transformed
from train.mixing import erase_clips, mix_clips
from train.models import check_all_used, run_model
from train.optim import set_learning_rate
from train.precision import gradient_scaler
from train.prefetch import DeviceCopies
from train.transforms import train_clips, video_on

if TYPE_CHECKING:
    from collections.abc import Callable

    from stream.batch import ClipBatch
    from train.recipe import Recipe


class OptimizerStep:
    """Turns a step's batches into a change of the weights.

    Args:
        wrapped: the network, in DDP where there are several ranks.
        optimizer: over its weights.
        recipe: of the run.
        device: that clips are prepared on.
        num_classes: C.
        transform: changes every decoded batch before augmentation.
    """

    def __init__(
        self,
        wrapped: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        recipe: Recipe,
        device: torch.device,
        *,
        num_classes: int,
        transform: Callable[[ClipBatch], ClipBatch] | None,
    ) -> None:
        self.scaler = gradient_scaler(recipe.run.precision, device)
        """The state of fp16's scaling; it does nothing for other precisions."""
        self._network = compiled(wrapped) if recipe.run.compile else wrapped
        # a hook may change the clips as they come from the loader, on the CPU
        self._copies = DeviceCopies(torch.device("cpu") if transform else device)
        self._wrapped = wrapped
        self._optimizer = optimizer
        self._recipe = recipe
        self._device = device
        self._num_classes = num_classes
        self._transform = transform

    def prepare(self, batches: list[ClipBatch]) -> list[ClipBatch]:
        """Start copying a step's first clips to the device; for `run`, once all ranks go on."""
        return self._copies.start(batches)

    def run(self, batches: list[ClipBatch], rate: float, epoch: int) -> torch.Tensor:
        """Sum up the gradients of a step's batches, change the weights, return the mean loss.

        Takes the batches out of the list, so that none is kept longer than it is needed.
        """
        set_learning_rate(self._optimizer, rate)
        self._optimizer.zero_grad(set_to_none=True)
        losses, count = [], len(batches)
        for number_left in reversed(range(count)):
            with self._without_sync() if number_left else nullcontext():
                losses.append(self._backward(self._copies.take(batches), epoch, count))
        if isinstance(self._wrapped, DistributedDataParallel):
            check_all_used(self._wrapped.module)
        if self._recipe.optim.clip_grad_norm:
            self.scaler.unscale_(self._optimizer)
            weights = [
                weight for group in self._optimizer.param_groups for weight in group["params"]
            ]
            nn.utils.clip_grad_norm_(weights, self._recipe.optim.clip_grad_norm)
        self.scaler.step(self._optimizer)
        self.scaler.update()
        return torch.stack(losses).sum()

    def _backward(self, batch: ClipBatch, epoch: int, count: int) -> torch.Tensor:
        """Add the gradients of one of `count` batches; return its share of the mean loss."""
        with compiler_errors():
            loss = self._loss(batch, epoch) / count
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _without_sync(self) -> AbstractContextManager[None]:
        """Keep gradients on this rank until the step's last batch."""
        if isinstance(self._wrapped, DistributedDataParallel):
            return self._wrapped.no_sync()
        return nullcontext()

    def _loss(self, raw: ClipBatch, epoch: int) -> torch.Tensor:
        """Return the mean cross-entropy of one batch, a float32 scalar on the device."""
        batch = raw
        if self._transform:  # others were checked as they came
            batch = transformed(self._transform, raw)
            check_batch_labels(batch, self._num_classes)
        recipe, seed = self._recipe, self._recipe.run.seed
        clips = train_clips(video_on(batch, self._device), recipe.augment, seed, epoch)
        clips = erase_clips(clips, batch, recipe.augment, seed, epoch)
        clips, target = mix_clips(
            clips,
            batch.label.to(self._device, non_blocking=True),
            batch,
            recipe.augment,
            seed,
            epoch,
            self._num_classes,
        )
        logits = run_model(self._network, clips, recipe, self._num_classes)
        if not logits.requires_grad:
            raise UsageError(
                f"model.name {recipe.model.name!r} returned logits that depend on no weight that "
                "is trained; it must not detach() them or compute them under no_grad()"
            )
        return functional.cross_entropy(
            logits.float(), target, label_smoothing=recipe.optim.label_smoothing
        )


def check_batch_labels(batch: ClipBatch, num_classes: int) -> None:
    """Raise DatasetError, naming the first clip, when a training clip has no usable label."""
    wrong = ((batch.label < 0) | (batch.label >= num_classes)).nonzero().flatten().tolist()
    if wrong:
        label = int(batch.label[wrong[0]])
        what = "has no label" if label < 0 else f"has label {label} of {num_classes} classes"
        raise DatasetError(
            f"clip {batch.key[wrong[0]]} {what}; train on a split whose clips are all labelled"
        )
