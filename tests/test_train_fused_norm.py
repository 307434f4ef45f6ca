"""Batch normalisation by kprep's kernels: same results and gradients, in the layers meant for it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import video
from triton_device import found_by

from train import fused_norm, models, triton_support
from train.distributed import World
from train.flops import count_flops
from train.fused_norm import restore_norm, use_fused_norm, why_not_fused
from train.models import draw_model, set_training, why_no_kernels
from train.recipe import load_recipe
from train.tensor_cores import restore_layers, use_tensor_cores

pytestmark = pytest.mark.usefixtures("one_thread")

CUDA = torch.device("cuda")
REDUCED = ("run.channels_last_3d=true", "run.precision=bf16")


def _kinds(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model.modules()]


def test_results_gradients_and_statistics_are_pytorchs_and_no_clips_are_copied() -> None:
    """The kernels run by Triton's interpreter, each by itself and compiled."""
    found = found_by("fused_norm_child.py")
    assert len(found["errors"]) == len(found["reduced"]) == 2 + 6 + 4 + 1
    assert all(error < 3e-5 for error in found["errors"].values()), found
    assert all(error < 0.05 for error in found["reduced"].values()), found
    assert found["copies"] == 0
    assert found["lost"] == [], "what is not a number must stay so"


def test_every_plain_layer_gets_it_with_the_relu_behind_it() -> None:
    model = video.r2plus1d_18(num_classes=3)
    before = _kinds(model)
    use_tensor_cores(model, pads_between=True)
    use_fused_norm(model, with_relu=True)
    after = _kinds(model)
    assert before.count("BatchNorm3d") == after.count("_FusedBatchNorm3d") == 37
    # those that stand behind a sum stay
    assert (before.count("ReLU"), after.count("ReLU"), after.count("_DoneReLU")) == (34, 8, 26)
    restore_norm(model)
    restore_layers(model)
    assert _kinds(model) == before


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm3d(4, affine=False),
        nn.BatchNorm3d(4, track_running_stats=False),
        nn.BatchNorm3d(4, momentum=None),
        nn.SyncBatchNorm(4),
        nn.BatchNorm2d(4),
        type("Own", (nn.BatchNorm3d,), {})(4),
        nn.BatchNorm3d(4).bfloat16(),
    ],
    ids=repr,
)
def test_other_layers_stay_as_they_are(norm: nn.Module) -> None:
    model = nn.Sequential(norm, nn.ReLU())
    before = _kinds(model)
    use_fused_norm(model, with_relu=True)
    assert _kinds(model) == before


class _Reading(nn.Sequential):
    """Uses what its layers give each other."""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        middle = self[0](clips)
        return self[1](middle) + middle


@pytest.mark.parametrize("known", [True, False])
def test_a_relu_stays_where_something_else_may_look_before_it(*, known: bool) -> None:
    layers = (nn.BatchNorm3d(8), nn.ReLU())
    model = _Reading(*layers) if known else nn.Sequential(*layers)
    plain = copy.deepcopy(model).eval()
    use_fused_norm(model, with_relu=known)
    assert _kinds(model)[1:] == ["_FusedBatchNorm3d", "ReLU"]
    clips = torch.randn(2, 8, 2, 4, 4)
    assert torch.equal(model.eval()(clips), plain(clips))


@pytest.mark.parametrize(
    "clips",
    [
        torch.randn(2, 8, 3, 4, 4),  # channels first
        torch.randn(2, 8, 3, 4, 4).double().to(memory_format=torch.channels_last_3d),
        torch.randn(2, 8, 3, 4, 4).to(memory_format=torch.channels_last_3d)[:, :7],
    ],
    ids=["contiguous", "float64", "seven channels"],
)
def test_clips_that_the_kernels_do_not_take_go_to_pytorch(clips: torch.Tensor) -> None:
    plain = nn.Sequential(nn.BatchNorm3d(clips.shape[1]), nn.ReLU()).to(clips.dtype)
    changed = copy.deepcopy(plain)
    use_fused_norm(changed, with_relu=True)
    assert torch.equal(changed(clips), plain(clips))
    for name, value in plain.state_dict().items():
        assert torch.equal(changed.state_dict()[name], value), name


def test_one_value_a_channel_is_still_refused() -> None:
    model = nn.Sequential(nn.BatchNorm3d(8))
    use_fused_norm(model, with_relu=False)
    with pytest.raises(ValueError, match="more than 1 value"):
        model(torch.randn(1, 8, 1, 1, 1))


def test_frozen_layers_keep_their_statistics() -> None:
    plain = nn.Sequential(nn.BatchNorm3d(8), nn.ReLU())
    changed = copy.deepcopy(plain)
    use_fused_norm(changed, with_relu=True)
    clips = torch.randn(2, 8, 3, 4, 4).to(memory_format=torch.channels_last_3d)
    for model in (plain, changed):
        set_training(model, freeze_batchnorm=True)
    assert torch.equal(changed(clips), plain(clips))
    assert int(changed[0].num_batches_tracked) == 0


def test_operations_are_counted_as_before() -> None:
    plain = video.r3d_18(num_classes=5)
    changed = copy.deepcopy(plain)
    use_tensor_cores(changed, pads_between=True)
    use_fused_norm(changed, with_relu=True)
    assert count_flops(changed, (8, 24, 24)) == count_flops(plain, (8, 24, 24))


@pytest.mark.parametrize(("own", "given"), [(8, 16), (7, 8), (16, 8)])
@pytest.mark.parametrize("training", [True, False])
def test_another_number_of_channels_is_still_refused(
    own: int, given: int, *, training: bool
) -> None:
    model = nn.Sequential(nn.BatchNorm3d(own), nn.ReLU())
    use_tensor_cores(model, pads_between=True)
    use_fused_norm(model, with_relu=True)
    clips = torch.randn(2, given, 2, 4, 4).to(memory_format=torch.channels_last_3d)
    with pytest.raises(RuntimeError, match=f"should contain {given} elements not {own}"):
        model.train(training)(clips)


def test_a_machine_without_a_gpu_says_so() -> None:
    assert why_not_fused(torch.device("cpu"), torch.bfloat16) == "there is no CUDA device"
    recipe = load_recipe("tiny", REDUCED)
    assert why_no_kernels(recipe, nn.BatchNorm3d(8), torch.device("cpu")) is None  # none are missed


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device that says it is a GPU."""
    why_not_fused.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(triton_support, "find_spec", lambda _: True)
    return CUDA


def test_a_layer_that_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch, gpu: torch.device
) -> None:
    for off, reason in (
        (0.004, None),
        (0.5, "Triton's results are off by 50.0%"),
        (float("nan"), "Triton's results are off by nan%"),
    ):
        why_not_fused.cache_clear()
        monkeypatch.setattr(fused_norm, "_error_of_a_layer", lambda *_, off=off: off)
        assert why_not_fused(gpu, torch.bfloat16) == reason
    why_not_fused.cache_clear()


def test_the_reason_for_triton_not_to_work_is_its_last_line(
    monkeypatch: pytest.MonkeyPatch, gpu: torch.device
) -> None:
    def fail(*_: object) -> float:
        raise RuntimeError("at 2:2:\n  x = 1\n  ^\nFailed to find C compiler.\n")

    monkeypatch.setattr(fused_norm, "_error_of_a_layer", fail)
    wanted = "Triton failed with RuntimeError: Failed to find C compiler."
    assert why_not_fused(gpu, torch.bfloat16) == wanted
    why_not_fused.cache_clear()


@pytest.mark.parametrize("spoilt", [0, 1, 2, 3])
def test_a_trial_notices_what_is_not_a_number(monkeypatch: pytest.MonkeyPatch, spoilt: int) -> None:
    """PyTorch stands in for the kernels; one result or gradient of it is spoilt."""

    def normalised(
        clips: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, *, relu: bool
    ) -> tuple[torch.Tensor, None]:
        assert relu
        given = [clips, weight, bias]
        if spoilt in range(3):
            given[spoilt] = given[spoilt] * 1.0
            given[spoilt].register_hook(lambda gradient: gradient * float("nan"))
        found = nn.functional.batch_norm(
            given[0].float(), None, None, given[1], given[2], training=True, eps=eps
        ).relu()
        return found.to(clips.dtype) * (1.0 if spoilt < 3 else float("nan")), None

    cpu = torch.device("cpu")
    monkeypatch.setattr(fused_norm, "_normalised", normalised)
    assert not fused_norm._error_of_a_layer(cpu, torch.bfloat16) <= 0.02


@pytest.mark.parametrize("reason", [None, "Triton is not installed"])
@pytest.mark.parametrize("settings", [REDUCED, REDUCED[:1], REDUCED[1:]])
def test_networks_on_a_gpu_in_reduced_precision_get_it_where_it_works(
    monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...], reason: str | None
) -> None:
    monkeypatch.setattr(nn.Module, "to", lambda self, *_: self)  # there need not be one
    monkeypatch.setattr(models, "why_not_fused", lambda *_: reason)
    recipe = load_recipe("tiny", settings)
    model = draw_model(recipe, 4, World(0, 1, CUDA, None))
    works = settings == REDUCED and reason is None
    assert ("_FusedBatchNorm3d" in _kinds(model)) == works
    assert ("_DoneReLU" in _kinds(model)) == works
    notice = why_no_kernels(recipe, model, CUDA)
    assert bool(notice) == (settings == REDUCED and reason is not None)
    if notice is not None:
        training = Path(__file__).parent.parent / "docs/training.md"
        said = notice.replace(str(reason), "…")
        assert f"`{said}`" in training.read_text().replace("\n", " ")
    assert why_no_kernels(recipe, nn.LayerNorm(4), CUDA) is None
