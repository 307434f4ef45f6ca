"""What an optimiser step can do besides the plain one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train_trainer import CPU, _batch, _fit_ranks, _recipe, _trainer, _weights
from torch import nn
from torch.nn import functional

from prep.errors import KprepError, UsageError
from train.checkpoint import checkpoints_in, load_checkpoint
from train.clip_random import ClipDraw
from train.ema import WeightAverage
from train.launch import launch
from train.mixing import Mix, draw_erasure, draw_mix, erase_clips, mix_clips
from train.precision import gradient_scaler
from train.recipe import AugmentRecipe
from train.self_check import check_first_convolution

if TYPE_CHECKING:
    from pathlib import Path

CROP = (112, 112)


def test_gradients_are_shortened_to_the_limit(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, _recipe("optim.clip_grad_norm=0.01", "optim.name=sgd"))
    trainer._step.run([_batch([0, 1, 2, 3])], 0.1, 0)
    gradients = [weight.grad for weight in trainer.model.parameters()]
    norm = torch.linalg.vector_norm(torch.stack([grad.norm() for grad in gradients]))
    assert norm == pytest.approx(0.01, rel=1e-4)


def test_the_average_of_the_weights_is_the_sum_by_hand() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    average = WeightAverage(model, 0.3)
    wanted = model[0].weight.item()
    for step in range(1, 5):
        with torch.no_grad():
            model[0].weight.fill_(step)
            model[1].running_mean.fill_(step)
            model[1].num_batches_tracked.fill_(step)
        average.update(step)
        decay = min(0.3, (1 + step) / (10 + step))  # 2/11, 3/12, 4/13, then the limit
        wanted = decay * wanted + (1 - decay) * step
    assert average.model[0].weight.item() == pytest.approx(wanted, rel=1e-6)
    assert average.model[1].num_batches_tracked == 4
    assert average.model[1].running_mean.item() == pytest.approx(wanted, rel=0.1)
    assert not any(weight.requires_grad for weight in average.model.parameters())


def test_a_weight_under_two_names_is_averaged_once() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    model[1].weight = model[0].weight
    nn.init.zeros_(model[0].weight)
    average = WeightAverage(model, 0.9)
    nn.init.ones_(model[0].weight)
    average.update(10**6)
    assert average.model[0].weight.item() == average.model[1].weight.item() == pytest.approx(0.1)


def test_the_average_is_evaluated_and_saved_beside_the_weights(tmp_path: Path) -> None:
    recipe = _recipe("model.ema_decay=0.9", "run.checkpoint_steps=5", "run.keep_checkpoints=9")
    whole = _trainer(tmp_path, recipe)
    whole.fit()
    saved = load_checkpoint(tmp_path / "final.pt")
    assert not torch.equal(saved.ema["0.weight"], saved.model["0.weight"])
    resumed = _trainer(tmp_path / "b", recipe)
    resumed.restore(checkpoints_in(tmp_path / "checkpoints")[0])
    resumed.fit()
    again = load_checkpoint(tmp_path / "b" / "final.pt")
    torch.testing.assert_close(saved.ema, again.ema, rtol=0, atol=0)
    # a network whose averaged head always says class 1 scores what class 1's share is: 1/3
    head = [name for name in whole._state.average.model.state_dict() if name.endswith("bias")][-1]
    whole._state.average.model.state_dict()[head].copy_(torch.tensor([0.0, 1e6, 0.0]))
    whole._val_loader = type(whole._train_loader)(CPU, 4)
    accuracy, _ = whole.evaluate()
    assert accuracy.video_top1 == pytest.approx(1 / 3)
    assert accuracy.protocol.endswith("averaged weights")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_trains_like_float32(tmp_path: Path, precision: str) -> None:
    frozen = ("model.freeze_batchnorm=true", "optim.name=sgd", "schedule.epochs=1")
    losses = []
    for name in ("float32", precision):
        trainer = _trainer(tmp_path / name, _recipe(*frozen, f"run.precision={name}"))
        losses.append(trainer.fit()["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    scaler = load_checkpoint(checkpoints_in(tmp_path / precision / "checkpoints")[-1]).scaler
    assert bool(scaler) == (precision == "fp16")


def test_the_scale_of_gradients_is_resumed(tmp_path: Path) -> None:
    recipe = _recipe("run.precision=fp16", "schedule.epochs=1", "model.freeze_batchnorm=true",
                     "optim.name=sgd")  # fmt: skip
    first = _trainer(tmp_path / "first", recipe)
    scaler = first._step.scaler
    start = scaler.get_scale()
    scaler.load_state_dict({**scaler.state_dict(), "scale": start / 512})  # as overflows leave it
    first.fit()
    path = checkpoints_in(tmp_path / "first" / "checkpoints")[-1]
    second = _trainer(tmp_path / "second", recipe)
    second.restore(path)
    assert second._step.scaler.state_dict() == load_checkpoint(path).scaler
    assert second._step.scaler.get_scale() == scaler.get_scale() < start


def test_gradients_that_overflow_leave_the_weights_alone() -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = gradient_scaler("fp16", torch.device("cpu"))
    scaler.scale(weight * float("inf")).backward()
    scaler.step(optimizer)
    before = scaler.get_scale()
    scaler.update()
    assert weight.item() == 1
    assert scaler.get_scale() == before / 2


def test_the_step_runs_the_compiled_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def compiled(model: nn.Module) -> Any:
        return lambda clips: calls.append(len(clips)) or model(clips)

    monkeypatch.setattr(torch, "compile", compiled)
    trainer = _trainer(tmp_path, _recipe("run.compile=true", "schedule.epochs=1"))
    trainer.fit()
    assert calls == [4] * 6


def test_wrong_convolutions_are_found_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, state = _recipe("run.precision=bf16"), torch.get_rng_state()
    trainer = _trainer(tmp_path, recipe)
    state = torch.get_rng_state()
    error = check_first_convolution(trainer.model, "bf16", (4, 16, 16), CPU.device)
    assert 0 < error < 0.01
    assert torch.equal(torch.get_rng_state(), state)
    assert check_first_convolution(trainer.model, "float32", (4, 16, 16), CPU.device) is None
    assert check_first_convolution(nn.Linear(3, 3), "bf16", (4, 16, 16), CPU.device) is None
    right = nn.Conv3d.forward

    def wrong(layer: nn.Conv3d, clips: torch.Tensor) -> torch.Tensor:
        result = right(layer, clips)
        return result.roll(1, dims=2) if result.dtype == torch.bfloat16 else result

    monkeypatch.setattr(nn.Conv3d, "forward", wrong)
    with pytest.raises(KprepError, match=r"off by .* in bf16 .*run.precision=float32"):
        trainer.fit()


def _mixed(alphas: AugmentRecipe, numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    batch = _batch(numbers)
    clips = torch.stack([torch.full((3, 2, 16, 16), float(number)) for number in numbers])
    return mix_clips(clips, batch.label, batch, alphas, 3, 1, 3)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_labels_are_shared_as_pixels_are(mixup: float, cutmix: float) -> None:
    recipe = AugmentRecipe(resize=(20, 20), crop=(16, 16), mixup=mixup, cutmix=cutmix)
    numbers = [number for pair in range(20) for number in (3 * pair, 3 * pair + 1)]  # labels 0, 1
    clips, shares = _mixed(recipe, numbers)
    means = clips.mean(dim=(1, 2, 3, 4))
    for pair in range(20):
        low, high = means[2 * pair] - 3 * pair, means[2 * pair + 1] - 3 * pair
        # the first clip's pixels were `number`, its neighbour's `number + 1`
        torch.testing.assert_close(
            shares[2 * pair], torch.tensor([1 - low, low, 0]), atol=1e-4, rtol=0
        )
        torch.testing.assert_close(
            shares[2 * pair + 1], torch.tensor([1 - high, high, 0]), atol=1e-4, rtol=0
        )
    values = {len(clip.unique()) for clip in clips}
    assert (2 in values) == bool(cutmix)  # CutMix leaves two levels in a clip, mixup one


def test_pairs_are_the_same_in_any_even_batch() -> None:
    recipe = AugmentRecipe(resize=(20, 20), crop=(16, 16), mixup=0.8, cutmix=1.0)
    clips, shares = _mixed(recipe, list(range(8)))
    for first in range(0, 8, 2):
        alone, share = _mixed(recipe, [first, first + 1])
        assert torch.equal(alone, clips[first : first + 2])
        assert torch.equal(share, shares[first : first + 2])
    with pytest.raises(UsageError, match=r"data.batch_size \(3\) must be even"):
        _recipe("augment.mixup=0.2", "data.batch_size=3")


def test_without_alphas_nothing_is_mixed() -> None:
    batch, clips = _batch([0, 1]), torch.rand(2, 3, 2, 16, 16)
    found, labels = mix_clips(clips, batch.label, batch, AugmentRecipe(), 0, 0, 3)
    assert found is clips
    assert labels is batch.label
    smoothed = functional.cross_entropy(torch.zeros(2, 3), labels, label_smoothing=0.1)
    assert smoothed == pytest.approx(1.0986, abs=1e-3)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**63 - 1), key=st.text(), alpha=st.floats(0.05, 4))
def test_boxes_and_shares_stay_inside(seed: int, key: str, alpha: float) -> None:
    for name in ("mixup", "cutmix"):
        recipe = AugmentRecipe(**{name: alpha})
        mix = draw_mix(ClipDraw(seed, 0, key, 0), recipe, CROP)
        assert mix == draw_mix(ClipDraw(seed, 0, key, 0), recipe, CROP)
        assert 0 <= mix.share <= 1
        assert (mix.box is None) == (name == "mixup")
    for box in (mix.box, draw_erasure(ClipDraw(seed, 0, key, 0), 1.0, CROP)):
        top, bottom, left, right = box or (0, 0, 0, 0)
        assert 0 <= top <= bottom <= 112
        assert 0 <= left <= right <= 112


def test_mixes_and_erasures_are_what_they_have_always_been() -> None:
    # Golden: a change here changes every resumed run; give the draws a new version instead.
    clip = ClipDraw(7, 3, "abc_000001_000011", 1)
    assert draw_mix(clip, AugmentRecipe(mixup=0.2), CROP) == Mix(0.9996477802410132, None)
    cut = Mix(0.9159757653061225, (2, 36, 0, 31))
    assert draw_mix(clip, AugmentRecipe(cutmix=1.0), CROP) == cut
    assert draw_erasure(clip, 1.0, CROP) == (71, 95, 53, 93)


def test_erased_boxes_have_torchvisions_areas_and_the_probability_asked_for() -> None:
    boxes = [draw_erasure(ClipDraw(0, 0, str(number), 0), 0.25, CROP) for number in range(2000)]
    found = [box for box in boxes if box is not None]
    # 5 standard deviations of a binomial: sqrt(2000 * 0.25 * 0.75) = 19.4
    assert abs(len(found) - 500) < 5 * 19.4
    areas = [(b - t) * (r - le) / (112 * 112) for t, b, le, r in found]
    assert min(areas) > 0.015
    assert max(areas) < 0.34


def test_the_same_box_is_erased_in_all_frames() -> None:
    batch = _batch([0, 1, 2, 3])
    clips = torch.ones(4, 3, 5, 16, 16)
    recipe = AugmentRecipe(resize=(20, 20), crop=(16, 16), erase=1.0)
    erased = erase_clips(clips, batch, recipe, seed=1, epoch=0)
    assert (erased == 0).any(dim=(1, 2, 3)).any(dim=1).all()
    assert torch.equal(erased, erased[:, :1, :1].expand_as(erased))
    untouched = erase_clips(torch.ones(4, 3, 5, 16, 16), batch, replace(recipe, erase=0.0), 1, 0)
    assert untouched.all()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_two_ranks_mix_erase_clip_and_average_as_one_does(tmp_path: Path) -> None:
    everything = (
        "model.freeze_batchnorm=true", "optim.name=sgd", "augment.mixup=0.2", "augment.cutmix=1.0",
        "augment.erase=0.5", "augment.rand_operations=3", "augment.crop_area=[0.3, 1]",
        "optim.clip_grad_norm=0.5", "optim.layer_decay=0.8", "model.ema_decay=0.9",
        "schedule.name=cosine", "schedule.epochs=1",
    )  # fmt: skip
    alone = _trainer(tmp_path / "one", _recipe(*everything, "data.batch_size=8"))
    alone.fit()
    two = (*everything, "data.batch_size=2", "data.accumulate=2")
    launch(2, _fit_ranks, str(tmp_path / "two"), two)
    saved = load_checkpoint(tmp_path / "two" / "final.pt")
    torch.testing.assert_close(_weights(alone), saved.model, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        alone._state.average.model.state_dict(), saved.ema, rtol=1e-4, atol=1e-6
    )
