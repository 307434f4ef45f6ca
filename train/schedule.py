"""The learning rate at every step, as a function of the step alone: nothing to save or restore."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train.recipe import OptimRecipe, ScheduleRecipe


def scaled_learning_rate(optim: OptimRecipe, global_batch: int) -> float:
    """Return the learning rate for `global_batch` clips a step, by the linear rule.

    Source: Goyal et al., "Accurate, Large Minibatch SGD" (2017), section 2.1.
    """
    return optim.lr * global_batch / optim.lr_batch


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then milestones or half a cosine; every unit is an optimiser step.

    Milestones are the same as torchvision's reference: `SequentialLR` of a `LinearLR` and a
    `MultiStepLR`, each stepped at every iteration; the cosine is PyTorch's `CosineAnnealingLR` in
    its place. Milestones are given from the start of training here; the reference subtracts the
    warm-up because its second scheduler starts to count after it.
    """

    peak: float
    """Learning rate after warm-up."""
    warmup_steps: int
    """Steps from the first one to the first at the peak."""
    warmup_factor: float
    """Share of the peak at step 0."""
    milestones: tuple[int, ...]
    """Steps at which the rate is multiplied by `gamma`; none acts before warm-up ends."""
    gamma: float
    """Factor at each milestone."""
    cosine_steps: int = 0
    """Steps from the first one to the end of the cosine; 0: milestones instead."""
    final_factor: float = 0.0
    """Share of the peak at the end of the cosine."""

    @classmethod
    def from_recipe(cls, recipe: ScheduleRecipe, peak: float, steps_per_epoch: int) -> Schedule:
        """Turn the recipe's epochs into steps."""
        return cls(
            peak=peak,
            warmup_steps=round(recipe.warmup_epochs * steps_per_epoch),
            warmup_factor=recipe.warmup_factor,
            milestones=tuple(round(epoch * steps_per_epoch) for epoch in recipe.milestones),
            gamma=recipe.gamma,
            cosine_steps=recipe.epochs * steps_per_epoch if recipe.name == "cosine" else 0,
            final_factor=recipe.final_factor,
        )

    def learning_rate(self, step: int) -> float:
        """Return the rate of optimiser step `step`, counted from 0 over the whole training."""
        if step < self.warmup_steps:
            done = step / self.warmup_steps
            return self.peak * (self.warmup_factor + (1 - self.warmup_factor) * done)
        if self.cosine_steps:
            done = (step - self.warmup_steps) / max(1, self.cosine_steps - self.warmup_steps)
            left = (1 + math.cos(math.pi * min(1.0, done))) / 2
            return self.peak * (self.final_factor + (1 - self.final_factor) * left)
        passed = sum(milestone <= step for milestone in self.milestones)
        return float(self.peak * self.gamma**passed)
