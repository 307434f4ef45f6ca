from __future__ import annotations

import sys
import types

import pytest
import torch
import torchvision
from torch import nn

from prep.errors import UsageError
from train.distributed import World
from train.models import (
    TORCHVISION_MODELS,
    build_model,
    draw_model,
    model_names,
    run_model,
    set_training,
)
from train.recipe import Recipe, recipe_from_dict


def _recipe(name: str, **model: object) -> Recipe:
    sections: dict[str, dict[str, object]] = {"model": {"name": name, **model}}
    if name.startswith("mvit"):
        sections["augment"] = {"resize": [256, 256], "crop": [224, 224]}
    return recipe_from_dict(sections)


def test_the_names_are_all_of_torchvisions_video_models() -> None:
    listed = torchvision.models.list_models(module=torchvision.models.video)
    assert sorted(TORCHVISION_MODELS) == sorted(listed)


@pytest.mark.parametrize("name", model_names())
def test_the_head_has_the_datasets_classes(name: str) -> None:
    with torch.device("meta"):  # shapes only: swin3d_b has 88 million weights
        model = build_model(_recipe(name), num_classes=7)
    last = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv3d)][-1]
    outputs = last.out_features if isinstance(last, nn.Linear) else last.out_channels
    assert outputs == 7


def test_tiny_is_tiny_and_takes_any_size() -> None:
    recipe = _recipe("tiny")
    model = build_model(recipe, num_classes=4)
    assert sum(weight.numel() for weight in model.parameters()) < 120_000
    logits = run_model(model, torch.randn(2, 3, 8, 36, 36), recipe, num_classes=4)
    assert logits.shape == (2, 4)


def test_channels_last_and_bf16_change_the_form_and_not_the_answer() -> None:
    plain = _recipe("tiny")
    fast = recipe_from_dict(
        {"model": {"name": "tiny"}, "run": {"channels_last_3d": True, "precision": "bf16"}}
    )
    model = build_model(plain, num_classes=4).eval()
    clips = torch.randn(2, 3, 8, 36, 36)
    wanted = run_model(model, clips, plain, num_classes=4)
    found = run_model(model, clips, fast, num_classes=4)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, atol=0.05, rtol=0.05)


def test_a_network_with_2d_convolutions_takes_channels_last(
    user_module: types.ModuleType,
) -> None:
    def build(num_classes: int) -> nn.Module:
        by_frame = nn.Sequential(nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(5, num_classes))
        return nn.Sequential(nn.Conv3d(3, 4, (2, 3, 3)), nn.Flatten(2, 3), by_frame)

    user_module.build = build
    recipe = recipe_from_dict(
        {"model": {"name": "users_models:build"}, "run": {"channels_last_3d": True}}
    )
    world = World(0, 1, torch.device("cpu"), None)
    spatiotemporal, _, (spatial, *_) = draw_model(recipe, 4, world)
    assert spatiotemporal.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert spatial.weight.is_contiguous()


def test_frozen_batchnorm_keeps_statistics_and_weights() -> None:
    model = build_model(_recipe("tiny", freeze_batchnorm=True), num_classes=4)
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm3d))
    set_training(model, freeze_batchnorm=True)
    assert model.training
    model(torch.randn(2, 3, 8, 36, 36)).sum().backward()
    assert torch.equal(norm.running_mean, torch.zeros_like(norm.running_mean))
    assert norm.weight.grad is None
    model = build_model(_recipe("tiny"), num_classes=4)
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm3d))
    set_training(model, freeze_batchnorm=False)
    model(torch.randn(2, 3, 8, 36, 36))
    assert not torch.equal(norm.running_mean, torch.zeros_like(norm.running_mean))


@pytest.fixture
def user_module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("users_models")
    module.linear = lambda num_classes: nn.Sequential(nn.Flatten(), nn.Linear(24, num_classes))
    module.wrong_head = lambda num_classes: nn.Sequential(nn.Flatten(), nn.Linear(24, 400))
    module.no_classes = nn.Flatten
    module.no_module = lambda num_classes: num_classes
    monkeypatch.setitem(sys.modules, "users_models", module)
    return module


class _Pair(nn.Module):
    def forward(self, clips: torch.Tensor) -> tuple[torch.Tensor, None]:
        return clips.mean((2, 3, 4)), None


@pytest.mark.usefixtures("user_module")
def test_a_users_own_model_is_built_and_its_output_checked() -> None:
    clips = torch.zeros(2, 3, 2, 2, 2)
    recipe = _recipe("users_models:linear")
    model = build_model(recipe, num_classes=5)
    assert run_model(model, clips, recipe, num_classes=5).shape == (2, 5)
    recipe = _recipe("users_models:wrong_head")
    model = build_model(recipe, num_classes=5)
    with pytest.raises(UsageError, match=r"returned a tensor of shape \(2, 400\)"):
        run_model(model, clips, recipe, num_classes=5)
    recipe = _recipe("users_models:pair")
    with pytest.raises(UsageError, match=r"returned a tuple; .* logits of shape \(2, 3\)"):
        run_model(_Pair(), clips, recipe, num_classes=3)


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("r2plus1_18", "did you mean 'r2plus1d_18'"),
        ("no_such_package:net", "cannot be imported"),
        (":net", "'' is no name of a module"),
        (".models:net", "'.models' is no name of a module"),
        ("users_models:liner", "did you mean 'linear'"),
        ("users_models:no_classes", "num_classes=..."),
        ("users_models:no_module", r"must return a torch.nn.Module"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_model(_recipe(name), num_classes=5)
