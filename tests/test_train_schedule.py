from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, SequentialLR

from train.recipe import ScheduleRecipe, load_recipe
from train.schedule import Schedule, scaled_learning_rate


def _reference_rates(
    recipe: ScheduleRecipe, peak: float, steps_per_epoch: int, steps: int
) -> list[float]:
    """torchvision's references/video_classification/train.py, stepped at every iteration."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    warmup = int(steps_per_epoch * recipe.warmup_epochs)
    milestones = [int(steps_per_epoch * (m - recipe.warmup_epochs)) for m in recipe.milestones]
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scheduler = MultiStepLR(optimizer, milestones=milestones, gamma=recipe.gamma)
    if warmup:
        linear = LinearLR(optimizer, start_factor=recipe.warmup_factor, total_iters=warmup)
        scheduler = SequentialLR(optimizer, [linear, scheduler], milestones=[warmup])
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR uses a deprecated argument of its own
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    return rates


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "peak", "global_batch"), [("resnet", 0.64, 1536), ("s3d", 0.2, 768)]
)
def test_every_iteration_has_the_references_rate(name: str, peak: float, global_batch: int) -> None:
    """All 45 epochs of Kinetics-400 on the original's 64 GPUs: 240,258 videos, 5 clips of each."""
    recipe = load_recipe(name)
    assert scaled_learning_rate(recipe.optim, global_batch) == pytest.approx(peak)
    steps_per_epoch = 240_258 * recipe.data.clips_per_video // global_batch
    schedule = Schedule.from_recipe(recipe.schedule, peak, steps_per_epoch)
    steps = 45 * steps_per_epoch
    ours = [schedule.learning_rate(step) for step in range(steps)]
    wanted = _reference_rates(recipe.schedule, peak, steps_per_epoch, steps)
    off = max(abs(one - other) / other for one, other in zip(ours, wanted, strict=True))
    assert off < 1e-9


@settings(max_examples=25)
@given(
    steps_per_epoch=st.integers(1, 5),
    warmup=st.integers(0, 3),
    milestones=st.lists(st.integers(4, 12), unique=True, max_size=3),
)
def test_any_schedule_has_the_references_rates(
    steps_per_epoch: int, warmup: int, milestones: list[int]
) -> None:
    recipe = replace(
        load_recipe("resnet").schedule,
        epochs=14,
        warmup_epochs=float(warmup),
        milestones=tuple(map(float, sorted(milestones))),
    )
    schedule = Schedule.from_recipe(recipe, 0.1, steps_per_epoch)
    steps = 14 * steps_per_epoch
    ours = [schedule.learning_rate(step) for step in range(steps)]
    assert ours == pytest.approx(_reference_rates(recipe, 0.1, steps_per_epoch, steps), rel=1e-9)


@pytest.mark.parametrize(("warmup", "final"), [(2, 0.0), (1, 0.01), (0, 0.1)])
def test_the_cosine_is_pytorchs_behind_a_linear_warmup(warmup: int, final: float) -> None:
    recipe = ScheduleRecipe("cosine", 9, float(warmup), 0.01, final_factor=final)
    schedule = Schedule.from_recipe(recipe, 0.4, 5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scheduler = CosineAnnealingLR(optimizer, T_max=(9 - warmup) * 5, eta_min=0.4 * final)
    if warmup:
        linear = LinearLR(optimizer, start_factor=0.01, total_iters=warmup * 5)
        scheduler = SequentialLR(optimizer, [linear, scheduler], milestones=[warmup * 5])
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        for _ in range(45):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    assert [schedule.learning_rate(step) for step in range(45)] == pytest.approx(rates, rel=1e-6)


@pytest.mark.parametrize(
    ("epoch", "rate"),
    # of the original run, at epoch starts: torchvision's references/video_classification with its
    # README's options, LinearLR and then MultiStepLR stepped every iteration, 0.64 on 64 GPUs
    [
        (0, 0.00064),
        (1, 0.064576),
        (5, 0.32032),
        (9, 0.576064),
        (10, 0.64),
        (19, 0.64),
        (20, 0.064),
        (30, 0.0064),
        (40, 0.00064),
        (44, 0.00064),
    ],
)
def test_the_original_rates_at_epoch_starts(epoch: int, rate: float) -> None:
    recipe = load_recipe("resnet")
    steps_per_epoch = 240_000 * 5 // 1536
    peak = scaled_learning_rate(recipe.optim, 1536)
    schedule = Schedule.from_recipe(recipe.schedule, peak, steps_per_epoch)
    assert schedule.learning_rate(epoch * steps_per_epoch) == pytest.approx(rate, rel=1e-9)


def test_the_rate_follows_the_clips_of_a_step() -> None:
    optim = load_recipe("resnet").optim
    assert scaled_learning_rate(optim, 24) == pytest.approx(0.01)
    assert scaled_learning_rate(optim, 8 * 24 * 2) == pytest.approx(0.16)
