"""Groups of weights with rates and decays of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from test_train_trainer import _batch, _recipe, _trainer, _weights
from torch import nn
from torchvision.models import video

from prep.errors import UsageError
from train.checkpoint import checkpoints_in, load_checkpoint
from train.models import TORCHVISION_MODELS, tiny
from train.optim import build_optimizer, load_optimizer_state, set_learning_rate
from train.param_groups import parameter_groups, rate_scales, weight_blocks, weight_kinds
from train.recipe import OptimRecipe, load_recipe, recipe_from_dict

if TYPE_CHECKING:
    from pathlib import Path

# Blocks counted in torchvision's definitions: stem and head, and what is between them.
BLOCKS = {
    "r3d_18": 2 + 8,
    "mc3_18": 2 + 8,
    "r2plus1d_18": 2 + 8,
    "s3d": 3 + 9 + 1,
    "mvit_v1_b": 2 + 16,
    "mvit_v2_s": 2 + 16,
    "swin3d_t": 2 + (2 + 2 + 6 + 2) + 3,
    "swin3d_s": 2 + (2 + 2 + 18 + 2) + 3,
    "swin3d_b": 2 + (2 + 2 + 18 + 2) + 3,
}
# (where it stands, of which kind it is) of some weights: block 1, -1 (last) and so on
EXAMPLES = {
    "r3d_18": {"stem.1.weight": (0, "norm"), "layer1.1.conv1.0.weight": (2, "weight"),
               "layer4.1.conv2.1.bias": (8, "norm"), "fc.bias": (-1, "bias")},
    "s3d": {"features.5.branch0.0.weight": (3, "weight"), "classifier.1.bias": (-1, "bias")},
    "mvit_v1_b": {"pos_encoding.spatial_pos": (0, "position"), "conv_proj.bias": (0, "bias"),
                  "blocks.0.norm1.weight": (1, "norm"), "norm.weight": (-1, "norm"),
                  "pos_encoding.class_token": (0, "position"), "head.1.weight": (-1, "weight")},
    "mvit_v2_s": {"blocks.3.attn.rel_pos_h": (4, "position"),
                  "blocks.3.attn.pool_q.norm_act.0.bias": (4, "norm")},
    "swin3d_t": {"features.0.0.attn.relative_position_bias_table": (1, "position"),
                 "features.1.reduction.weight": (3, "weight"), "patch_embed.norm.bias": (0, "norm"),
                 "features.6.1.mlp.3.bias": (15, "bias"), "norm.bias": (-1, "norm")},
}  # fmt: skip


@pytest.mark.parametrize("name", TORCHVISION_MODELS)
def test_each_network_is_a_row_of_blocks(name: str) -> None:
    with torch.device("meta"):
        model = getattr(video, name)(num_classes=5)
    blocks, kinds = weight_blocks(model), weight_kinds(model)
    assert len(blocks) == BLOCKS[name]
    names = [weight for weight, _ in model.named_parameters()]
    assert sorted(weight for block in blocks for weight in block) == sorted(names) == sorted(kinds)
    for weight, (place, kind) in EXAMPLES.get(name, {}).items():
        assert weight in blocks[place]
        assert kinds[weight] == kind
    scales = rate_scales(model, 0.5, 3.0)
    heads = [weight for weight, scale in scales.items() if scale == 3]
    assert [len(model.get_parameter(weight)) for weight in heads] == [5, 5]
    assert scales[names[0]] == 0.5 ** (BLOCKS[name] - 1)


class _Own(nn.Module):
    """A user's network: everything below one child, with a table of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Module()
        self.net.pos_embed = nn.Parameter(torch.zeros(4, 2))
        self.net.embed = nn.Linear(2, 2)
        self.net.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2)) for _ in "ab"
        )
        self.net.norm = nn.LayerNorm(2)
        self.net.fc = nn.Linear(2, 3)


def test_a_network_of_ones_own_is_taken_apart_by_its_children() -> None:
    blocks = weight_blocks(_Own())
    assert blocks == [
        ["net.pos_embed", "net.embed.weight", "net.embed.bias"],
        ["net.blocks.0.0.weight", "net.blocks.0.0.bias", "net.blocks.0.1.weight", "net.blocks.0.1.bias"],
        ["net.blocks.1.0.weight", "net.blocks.1.0.bias", "net.blocks.1.1.weight", "net.blocks.1.1.bias"],
        ["net.norm.weight", "net.norm.bias", "net.fc.weight", "net.fc.bias"],
    ]  # fmt: skip
    with pytest.raises(UsageError, match=r"optim.layer_decay \(0.5\) needs a network with several"):
        rate_scales(nn.Linear(2, 3), 0.5, 1.0)
    assert rate_scales(nn.Linear(2, 3), 1.0, 2.0) == {"weight": 2.0, "bias": 2.0}


@pytest.mark.parametrize("name", ["resnet", "s3d"])
def test_the_seeds_recipes_have_one_group_with_decay_on_everything(name: str) -> None:
    """As in the reference: SGD(model.parameters(), lr, momentum, weight_decay)."""
    recipe = load_recipe(name)
    with torch.device("meta"):
        model = getattr(video, recipe.model.name)(num_classes=5)
    (group,) = build_optimizer(model, recipe).param_groups
    assert len(group["params"]) == len(list(model.parameters()))
    assert (group["weight_decay"], group["momentum"], group["lr_scale"]) == (1e-4, 0.9, 1)
    assert (group["nesterov"], group["dampening"]) == (False, 0)


def test_groups_have_their_rate_and_decay_and_the_schedule_scales_them() -> None:
    optim = OptimRecipe(
        weight_decay=0.1, layer_decay=0.5, head_rate=4.0, no_decay=("norm", "bias", "position")
    )
    model = _Own()
    model.net.embed.weight.requires_grad = False
    groups = parameter_groups(model, optim)
    found = {name: (g["lr_scale"], g["weight_decay"]) for g in groups for name, _ in g["params"]}
    assert found["net.pos_embed"] == (0.125, 0.0)
    assert found["net.blocks.0.1.weight"] == (0.25, 0.1)
    assert found["net.blocks.1.1.bias"] == (0.5, 0.0)
    assert found["net.norm.weight"] == (1.0, 0.0)
    assert found["net.fc.weight"] == (4.0, 0.1)
    assert "net.embed.weight" not in found
    optimizer = build_optimizer(model, recipe_from_dict({"optim": {"layer_decay": 0.5}}))
    set_learning_rate(optimizer, 0.2)
    assert {group["lr"] for group in optimizer.param_groups} == {0.2, 0.1, 0.05, 0.025}


def test_a_step_moves_each_block_by_its_own_rate(tmp_path: Path) -> None:
    """One step of plain SGD: the change is the rate times the gradient of the same batch."""
    settings = ("optim.name=sgd", "optim.momentum=0", "optim.weight_decay=0")
    trainer = _trainer(tmp_path, _recipe(*settings, "optim.layer_decay=0.5", "optim.head_rate=3"))
    before = _weights(trainer)
    trainer._step.run([_batch([0, 1, 2, 3])], 0.1, 0)
    scales = rate_scales(trainer.model, 0.5, 3.0)
    assert set(scales.values()) == {3.0, 0.5, 0.25, 0.125, 0.0625}
    for name, weight in trainer.model.named_parameters():
        moved = before[name] - 0.1 * scales[name] * weight.grad
        torch.testing.assert_close(weight.detach(), moved, rtol=1e-5, atol=1e-7)


GROUPED = ("optim.layer_decay=0.7", 'optim.no_decay=["norm"]', "run.checkpoint_steps=5")


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_groups_are_saved_and_restored(tmp_path: Path, name: str) -> None:
    recipe = _recipe(*GROUPED, f"optim.name={name}", "run.keep_checkpoints=9")
    whole = _trainer(tmp_path / "a", recipe)
    whole.fit()
    resumed = _trainer(tmp_path / "b", recipe)
    resumed.restore(checkpoints_in(tmp_path / "a" / "checkpoints")[0])
    resumed.fit()
    torch.testing.assert_close(_weights(whole), _weights(resumed), rtol=0, atol=0)


def test_momenta_follow_the_names_into_other_groups(tmp_path: Path) -> None:
    """Resumed with other groups, and other settings, every weight has its own momentum back."""
    old = _trainer(tmp_path / "a", _recipe(*GROUPED))
    old.fit()
    path = checkpoints_in(tmp_path / "a" / "checkpoints")[-1]
    changed = _recipe(
        'optim.no_decay=["norm", "bias"]', "optim.weight_decay=0.3", "schedule.epochs=3"
    )
    new = _trainer(tmp_path / "b", changed)
    new.restore(path)
    assert len(new._state.optimizer.param_groups) != len(old._state.optimizer.param_groups)
    for name, weight in new.model.named_parameters():
        kept = old._state.optimizer.state[old.model.get_parameter(name)]["exp_avg"]
        assert torch.equal(new._state.optimizer.state[weight]["exp_avg"], kept)
    assert {group["weight_decay"] for group in new._state.optimizer.param_groups} == {0.0, 0.3}
    assert not any("lr_scale" not in group for group in new._state.optimizer.param_groups)
    frozen = _trainer(tmp_path / "c", _recipe('model.freeze=["0.*"]', "schedule.epochs=3"))
    frozen.restore(path)
    assert frozen.model.get_parameter("0.weight") not in frozen._state.optimizer.state
    new.fit()


def test_a_state_of_another_network_is_refused(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, _recipe("schedule.epochs=1"))
    trainer.fit()
    state = load_checkpoint(checkpoints_in(tmp_path / "checkpoints")[-1]).optimizer
    other = build_optimizer(tiny(7), _recipe())
    with pytest.raises(UsageError, match=r"exp_avg of 14.weight has shape \[3, 32\], .* \[7, 32\]"):
        load_optimizer_state(other, state)
    for group in state["param_groups"]:
        del group["param_names"]
    with pytest.raises(UsageError, match="holds no names of weights"):
        load_optimizer_state(other, state)


def test_unknown_kinds_are_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="'norms' in optim.no_decay .* did you mean 'norm'"):
        load_recipe("resnet", ['optim.no_decay=["norms"]'])
