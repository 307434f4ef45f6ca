"""MViT for clips of any size, and what becomes of weights for another one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torchvision.models import video

from prep.errors import UsageError
from train.checkpoint import Checkpoint, save_checkpoint
from train.models import build_model
from train.mvit import fit_position_tables, pooled
from train.recipe import ModelRecipe, Recipe, recipe_from_dict
from train.weights import Weights, find_weights, load_weights

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("mvit_v1_b", "mvit_v2_s")


def _recipe(name: str, frames: int, height: int, width: int, eval_frames: int = 0) -> Recipe:
    return recipe_from_dict(
        {
            "data": {"frames": frames},
            "model": {"name": name},
            "augment": {"resize": [height, width], "crop": [height, width]},
            "eval": {"frames": eval_frames},
        }
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("clip", [(4, 32, 32), (5, 36, 52), (3, 17, 40)])
def test_clips_of_any_size_give_logits_and_gradients(name: str, clip: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    model = build_model(_recipe(name, *clip), num_classes=5)
    logits = model(torch.randn(2, 3, *clip))
    assert logits.shape == (2, 5)
    logits.sum().backward()
    unused = [key for key, weight in model.named_parameters() if weight.grad is None]
    assert unused == []


@pytest.mark.parametrize("name", NAMES)
def test_for_torchvisions_size_it_is_torchvisions_network(name: str) -> None:
    torch.manual_seed(3)
    wanted = getattr(video, name)(num_classes=5).state_dict()
    torch.manual_seed(3)
    found = build_model(_recipe(name, 16, 224, 224), num_classes=5).state_dict()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_tables_of_mvit_v2_have_the_lengths_that_torchvision_would_need() -> None:
    """Where all sizes can be halved evenly, torchvision's own formula gives the same lengths."""
    clip = (8, 64, 96)
    model = build_model(_recipe("mvit_v2_s", *clip), num_classes=5)
    assert pooled(clip, model.conv_proj) == (4, 16, 24)
    # 2 x max(queries, keys) - 1 places: in block 0 queries are 16 x 24, in the last one 2 x 3
    assert len(model.blocks[0].attn.rel_pos_h) == 31
    assert len(model.blocks[0].attn.rel_pos_w) == 47
    assert len(model.blocks[0].attn.rel_pos_t) == 7
    assert len(model.blocks[15].attn.rel_pos_h) == 3
    assert len(model.blocks[15].attn.rel_pos_w) == 5


def test_distances_are_interpolated_as_torchvision_does_when_it_runs() -> None:
    """torchvision stretches tables of distances that do not fit, in every forward pass."""
    torch.manual_seed(0)
    theirs = video.mvit_v2_s(num_classes=5).eval()
    theirs.pos_encoding.temporal_size, theirs.pos_encoding.spatial_size = 4, (16, 16)
    ours = build_model(_recipe("mvit_v2_s", 8, 64, 64), num_classes=5).eval()
    weights = Weights("w.pt", theirs.state_dict(), list("abcde"))
    report = load_weights(ours, weights, list("abcde"), ModelRecipe())
    assert report.fresh == report.skipped == []
    assert len(report.fitted) == 16 * 3  # rows, columns and frames of every block
    assert "interpolated: blocks.0.attn.rel_pos_h" in str(report)
    clips = torch.randn(1, 3, 8, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(clips), theirs(clips), rtol=1e-5, atol=1e-5)
        assert ours(clips).std() > 0


def _ramp(rows: int, columns: int) -> torch.Tensor:
    """A table of places whose channels are the row and the column, in shares of the frame."""
    row = ((torch.arange(rows) + 0.5) / rows)[:, None].expand(rows, columns)
    column = ((torch.arange(columns) + 0.5) / columns)[None].expand(rows, columns)
    return torch.stack([row.flatten(), column.flatten()], dim=1).repeat(1, 48)


def _v1_tables(rows: int, columns: int, frames: int) -> dict[str, torch.Tensor]:
    time = ((torch.arange(frames) + 0.5) / frames)[:, None].expand(frames, 96)
    return {
        "pos_encoding.spatial_pos": _ramp(rows, columns),
        "pos_encoding.temporal_pos": time,
    }


def test_places_are_interpolated_on_their_grid() -> None:
    """A place keeps its position: what stood at a share of the frame stands there afterwards."""
    model = build_model(_recipe("mvit_v1_b", 4, 32, 48), num_classes=5)
    fitted = fit_position_tables(model, _v1_tables(56, 56, 8), None, "w.pt")
    assert sorted(fitted) == ["pos_encoding.spatial_pos", "pos_encoding.temporal_pos"]
    torch.testing.assert_close(
        fitted["pos_encoding.spatial_pos"], _ramp(8, 12), rtol=0, atol=1 / 56
    )
    wanted = (torch.arange(2) + 0.5) / 2
    torch.testing.assert_close(
        fitted["pos_encoding.temporal_pos"][:, 0], wanted, rtol=0, atol=1 / 8
    )


def test_the_same_number_of_places_on_another_grid_is_interpolated_too() -> None:
    model = build_model(_recipe("mvit_v1_b", 4, 32, 48), num_classes=5)
    fitted = fit_position_tables(model, _v1_tables(12, 8, 2), (48, 32), "w.pt")
    assert sorted(fitted) == ["pos_encoding.spatial_pos"]  # 96 places on either grid
    same = fit_position_tables(model, _v1_tables(8, 12, 2), (32, 48), "w.pt")
    assert same == {}
    with pytest.raises(UsageError, match="w.pt have positions for 96 places .* no square"):
        fit_position_tables(model, _v1_tables(8, 12, 2), None, "w.pt")


def test_a_checkpoint_tells_the_size_of_its_clips(tmp_path: Path) -> None:
    recipe = _recipe("mvit_v1_b", 4, 32, 48)
    torch.manual_seed(0)
    old = build_model(recipe, num_classes=2)
    path = tmp_path / "final.pt"
    saved = Checkpoint(1, 1, old.state_dict(), None, recipe.to_toml(), ["a", "b"], {}, {})
    save_checkpoint(path, saved)
    weights = find_weights(str(path))
    assert weights.crop == (32, 48)
    new = build_model(_recipe("mvit_v1_b", 6, 48, 64), num_classes=2)
    report = load_weights(new, weights, ["b", "a"], ModelRecipe())
    assert report.fitted == ["pos_encoding.spatial_pos", "pos_encoding.temporal_pos"]
    assert "rows were permuted" in report.head
    assert new(torch.randn(1, 3, 6, 48, 64)).isfinite().all()


def test_no_other_network_is_touched() -> None:
    assert fit_position_tables(nn.Linear(2, 2), _v1_tables(4, 4, 2), None, "w.pt") == {}


def test_one_length_of_clips_serves_training_and_evaluation() -> None:
    with pytest.raises(UsageError, match=r"one length: eval.frames \(32\) must be 0, or .* \(16\)"):
        build_model(_recipe("mvit_v2_s", 16, 64, 64, eval_frames=32), num_classes=5)


def test_blocks_are_left_out_with_the_probability_asked_for() -> None:
    sections = {"model": {"name": "swin3d_t", "stochastic_depth": 0.3}}
    with torch.device("meta"):
        model = build_model(recipe_from_dict(sections), num_classes=5)
        rates = [
            layer.p for layer in model.modules() if hasattr(layer, "p") and "Stoch" in str(layer)
        ]
        assert rates == pytest.approx([0.3 * place / 11 for place in range(12)])
        sections["model"]["name"] = "r3d_18"
        with pytest.raises(UsageError, match="no effect on model.name 'r3d_18', only on MViT"):
            build_model(recipe_from_dict(sections), num_classes=5)
