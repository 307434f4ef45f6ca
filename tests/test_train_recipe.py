from __future__ import annotations

import ast
import signal
from dataclasses import fields, replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st

import train.recipe as recipe_module
from prep.errors import UsageError
from train.models import build_model
from train.optim import build_optimizer
from train.recipe import (
    DataRecipe,
    OptimRecipe,
    Recipe,
    load_recipe,
    parse_recipe,
    recipe_differences,
    recipe_from_dict,
    recipe_names,
)


def test_the_resnet_recipe_is_torchvisions() -> None:
    recipe = load_recipe("resnet")
    assert recipe.model.name == "r2plus1d_18"
    assert (recipe.data.frames, recipe.data.fps, recipe.data.clips_per_video) == (16, 15, 5)
    # 0.01 for 24 clips is 0.64 for the original's 64 GPUs x 24 clips
    assert recipe.optim.lr * 64 * 24 / recipe.optim.lr_batch == pytest.approx(0.64)
    assert (recipe.optim.name, recipe.optim.momentum, recipe.optim.weight_decay) == (
        "sgd",
        0.9,
        1e-4,
    )
    assert recipe.schedule.milestones == (20, 30, 40)
    assert (recipe.schedule.epochs, recipe.schedule.warmup_epochs) == (45, 10)
    assert (recipe.schedule.warmup_factor, recipe.schedule.gamma) == (0.001, 0.1)
    assert (recipe.augment.resize, recipe.augment.crop) == ((128, 171), (112, 112))
    assert recipe.augment.flip == 0.5
    assert recipe.augment.mean == (0.43216, 0.394666, 0.37645)
    assert recipe.augment.std == (0.22803, 0.22145, 0.216989)
    assert (recipe.eval.clips_per_video, recipe.eval.placement) == (5, "torchvision")


def test_the_s3d_recipe_is_torchvisions() -> None:
    recipe = load_recipe("s3d")
    assert (recipe.data.frames, recipe.data.batch_size, recipe.eval_frames) == (64, 12, 128)
    assert recipe.optim.lr * 64 * 12 / recipe.optim.lr_batch == pytest.approx(0.2)
    assert (recipe.augment.resize, recipe.augment.crop) == ((256, 256), (224, 224))
    assert recipe.model.sync_batchnorm


WEIGHTS = {
    "resnet": "R2Plus1D_18_Weights",
    "resnet_modern": "R3D_18_Weights",
    "mvit": "MViT_V2_S_Weights",
    "swin3d": "Swin3D_T_Weights",
    "swin3d_modern": "Swin3D_B_Weights",
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_clips_are_evaluated_as_torchvision_evaluates_its_weights(name: str) -> None:
    recipe, weights = load_recipe(name), _default_weights(WEIGHTS[name])
    preset = weights.transforms()
    resize = [recipe.augment.short_side] if recipe.augment.short_side else recipe.augment.resize
    assert list(resize) == preset.resize_size
    assert list(recipe.augment.crop) == preset.crop_size
    assert list(recipe.augment.mean) == preset.mean
    assert list(recipe.augment.std) == preset.std
    text = weights.meta["_docs"]
    for what, value in (
        ("frame_rate", f"{recipe.data.fps:g}"),
        ("clips_per_video", recipe.eval.clips_per_video),
        ("clip_len", recipe.eval_frames),
    ):
        assert f"`{what}={value}`" in text
    assert recipe.eval.placement == "torchvision"


def _default_weights(name: str) -> object:
    return getattr(torchvision.models.video, name).DEFAULT


def test_transformers_have_the_published_settings() -> None:
    mvit, swin = load_recipe("mvit"), load_recipe("swin3d")
    # the papers: 1.6e-3 for 512 clips; 1e-3 for the head and 1e-4 below it, for 64
    assert mvit.optim.lr * 512 / mvit.optim.lr_batch == pytest.approx(1.6e-3)
    assert swin.optim.lr * 64 / swin.optim.lr_batch == pytest.approx(1e-4)
    assert swin.optim.head_rate == 10
    assert (mvit.schedule.epochs, mvit.schedule.warmup_epochs) == (200, 30)
    assert (swin.schedule.epochs, swin.schedule.warmup_epochs) == (30, 2.5)
    assert (mvit.augment.mixup, mvit.augment.cutmix, mvit.augment.erase) == (0.8, 1.0, 0.25)
    assert (mvit.optim.no_decay, swin.optim.no_decay) == (("norm", "bias"), ("norm", "position"))


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_builds_its_network(name: str) -> None:
    recipe = load_recipe(name)
    with torch.device("meta"):
        model = build_model(replace(recipe, model=replace(recipe.model, sync_batchnorm=False)), 7)
    groups = build_optimizer(model, recipe).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_written_back_is_the_same(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert parse_recipe(recipe.to_toml(), "test") == recipe


@given(
    name=st.text(st.characters(exclude_categories=["Cs"])),
    lr=st.floats(0, 1e6),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_values_survive_toml(name: str, lr: float, seed: int) -> None:
    recipe = Recipe(name=name)
    recipe = replace(recipe, optim=replace(recipe.optim, lr=lr), run=replace(recipe.run, seed=seed))
    assert parse_recipe(recipe.to_toml(), "test") == recipe


NUMBERS = [
    ("optim.lr", np.logspace(-3, -2, 3)[1]),
    ("optim.lr", np.float32(0.1)),
    ("optim.lr", torch.tensor(0.5)),
    ("data.fps", Fraction(15, 2)),
    ("data.cache_dir", Path("/cache")),
    ("run.seed", np.int64(3)),
    ("run.seed", signal.SIGUSR1),
    ("run.compile", np.array([1]).all()),
    ("eval.crops", np.int64(3)),
    ("optim.name", np.str_("adamw")),
    ("schedule.milestones", np.arange(1, 3)),
    ("augment.resize", [np.int16(130), 180]),
]


@pytest.mark.parametrize(("key", "value"), NUMBERS, ids=lambda value: type(value).__name__)
def test_what_python_code_brings_survives_toml(key: str, value: Any) -> None:
    """Else no checkpoint of the run could be resumed or exported."""
    section, _, name = key.partition(".")
    given = Recipe(data=DataRecipe(cache_dir="other", cache_limit="1GB"))
    recipe = replace(given, **{section: replace(getattr(given, section), **{name: value})})
    assert parse_recipe(recipe.to_toml(), "test") == recipe
    wanted = str(value) if name == "cache_dir" else value
    wanted = tuple(value) if isinstance(value, list | np.ndarray) else wanted
    found = getattr(getattr(recipe, section), name)
    assert found == wanted
    assert type(found) in (bool, int, float, str, tuple)


@pytest.mark.parametrize("value", ["fast", None, True, Decimal("0.1"), np.zeros(2)])
def test_what_is_no_number_is_refused_in_python_too(value: Any) -> None:
    with pytest.raises(UsageError, match=r"optim\.lr in recipe must be of type float, not "):
        Recipe(optim=OptimRecipe(lr=value))


def test_overrides_apply_in_order_and_strings_need_no_quotes() -> None:
    overrides = ["optim.lr=1", "optim.lr=0.5", "model.name=r3d_18", "schedule.milestones=[1, 2.5]"]
    recipe = load_recipe("resnet", overrides)
    assert (recipe.optim.lr, recipe.model.name) == (0.5, "r3d_18")
    assert recipe.schedule.milestones == (1, 2.5)
    assert recipe_differences(load_recipe("resnet"), recipe) == [
        "model.name: r2plus1d_18 -> r3d_18",
        "optim.lr: 0.01 -> 0.5",
        "schedule.milestones: (20.0, 30.0, 40.0) -> (1.0, 2.5)",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning=1", "'learning' .* no key in \\[optim\\]"),
        ("optim.momentun=0.5", "did you mean 'momentum'"),
        ("optm.lr=1", "did you mean 'optim'"),
        ("optim.lr", "section.key=value"),
        ("lr=1", "section.key=value"),
        ("optim.lr=fast", "optim.lr in .* must be of type float, not 'fast'"),
        ("optim.lr=-1", "optim.lr \\(-1.0\\) must be at least 0"),
        ("optim.lr=nan", "optim.lr \\(nan\\) must be finite"),
        ("optim.lr=inf", "optim.lr \\(inf\\) must be finite"),
        (f"optim.lr=1{400 * '0'}", "optim.lr \\(inf\\) must be finite"),
        ("data.fps=inf", "data.fps \\(inf\\) must be finite"),
        ("augment.mean=[nan, 0, 0]", "augment.mean \\(\\(nan, 0.0, 0.0\\)\\) must be finite"),
        ("augment.mixup=inf", "augment.mixup \\(inf\\) must be finite"),
        ("augment.mixup=1e300", "augment.mixup .* from 0 to 1000000"),
        ("schedule.warmup_epochs=inf", "schedule.warmup_epochs \\(inf\\) must be finite"),
        ("schedule.warmup_epochs=1e300", "schedule.warmup_epochs .* from 0 to 1000000000"),
        ("schedule.milestones=[1, nan]", "schedule.milestones .* must be finite"),
        ("schedule.milestones=[-5]", "schedule.milestones \\[-5.0\\] must be epochs from 0"),
        ("schedule.milestones=[1e300]", "schedule.milestones .* must be epochs from 0"),
        ("eval.crops=3.0", "eval.crops in .* must be 1 or 3, not 3.0"),
        ("eval.crops=true", "eval.crops in .* must be 1 or 3, not True"),
        ("optim.name=sdg", "optim.name in .* must be 'sgd' or 'adamw', not 'sdg'"),
        ("data.frames=16.5", "data.frames in .* must be of type int"),
        ("data.frames=true", "data.frames in .* must be of type int"),
        ("data.frames=0", "data.frames \\(0\\) must be at least 1"),
        ("data.fps=0", "data.fps .* above 0"),
        ("augment.crop=[112]", "augment.crop in .* list of 2 int"),
        ("augment.crop=[200, 112]", "augment.crop .* must fit into augment.resize"),
        ("augment.std=[1, 1, 0]", "augment.std"),
        ("augment.short_side=100", "augment.crop .* must fit into augment.short_side 100"),
        ("augment.crop_area=[0.5, 0.1]", "augment.crop_area .* the smaller one first"),
        ("augment.crop_area=[0, 1]", "augment.crop_area .* above 0"),
        ("augment.crop_ratio=[2, 1]", "augment.crop_ratio .* smaller one first"),
        ("augment.rand_magnitude=31", "augment.rand_magnitude \\(31\\) must be from 0 to 30"),
        ("run.precision=fp8", "'float32' or 'bf16' or 'fp16'"),
    ],
)
def test_a_wrong_override_is_refused_with_a_clear_sentence(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_recipe("resnet", [override])


def test_adamw_must_forget_the_second_moment() -> None:
    with pytest.raises(UsageError, match=r"optim.beta2 \(1.0\) must be below 1"):
        load_recipe("mvit", ["optim.beta2=1"])
    assert load_recipe("resnet", ["optim.beta2=1"]).optim.name == "sgd"  # which has none


def test_labels_must_have_a_part_in_the_loss() -> None:
    with pytest.raises(UsageError, match=r"optim.label_smoothing \(1.0\) must be below 1"):
        load_recipe("resnet", ["optim.label_smoothing=1"])


def test_unknown_recipes_and_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'resnet'"):
        load_recipe("resnt")
    with pytest.raises(UsageError, match="cannot be read"):
        load_recipe(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[optim\nlr = 1")
    with pytest.raises(UsageError, match=r"broken.toml is not TOML"):
        load_recipe(broken)
    with pytest.raises(UsageError, match=r"'optimizer' in .* did you mean 'optim'"):
        recipe_from_dict({"optimizer": {}})
    with pytest.raises(UsageError, match="must be a section"):
        recipe_from_dict({"optim": 3})


def test_a_file_of_ones_own_is_named_after_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[optim]\nlr = 2\n")
    recipe = load_recipe(path)
    assert (recipe.name, recipe.optim.lr) == ("mine", 2.0)
    assert isinstance(recipe.optim.lr, float)


def _documented_fields() -> set[str]:
    tree = ast.parse(Path(recipe_module.__file__).read_text())
    found = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            for entry, after in zip(node.body, node.body[1:], strict=False):
                has_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                if (
                    isinstance(entry, ast.AnnAssign)
                    and isinstance(entry.target, ast.Name)
                    and has_text
                ):
                    found.add(f"{node.name}.{entry.target.id}")
    return found


def test_every_setting_has_a_description_and_stands_in_the_documentation() -> None:
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    documented = _documented_fields()
    for section, kind in recipe_module._SECTIONS.items():
        for entry in fields(kind):
            assert f"{kind.__name__}.{entry.name}" in documented
            assert f"`{section}.{entry.name}`" in page
