"""A recipe: everything that decides a training run, as one TOML file.

Sections of the file are the dataclasses below, their keys the fields; what a file leaves out has
the default that stands here. Names that do not exist and values of another type are refused.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from prep.errors import UsageError
from train.protocol import check_crops
from train.recipe_checks import check_ranges, check_together
from train.toml_values import check_known, nearest, toml_value, typed

if TYPE_CHECKING:
    from collections.abc import Sequence

RECIPES_DIRECTORY = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class DataRecipe:
    """Which clips are drawn, and how many at a time."""

    frames: int = 16
    """Frames of a clip."""
    fps: float = 15.0
    """Frames a second of a clip; at most the dataset's stored rate. MViT's recipes want 7.5."""
    clips_per_video: int = 1
    """Clips that every video gives in an epoch of training."""
    batch_size: int = 8
    """Clips that one rank takes through the model at a time."""
    accumulate: int = 1
    """Batches whose gradients are summed up before one optimiser step."""
    workers: int = 4
    """Processes of each rank that read and decode; 0 decodes in the training process."""
    layout: Literal["yuv420", "rgb"] = "yuv420"
    """What workers hand over: "yuv420" (half the bytes, converted on the device) or "rgb"."""
    short: Literal["skip", "pad"] = "skip"
    """Videos shorter than a clip: "skip" leaves them out, "pad" repeats their last frame."""
    grouping: Literal["spread", "together"] = "spread"
    """Clips of one video are "spread" over the epoch, or stand "together": fewer bytes are read."""
    shuffle_block: int = 1
    """Neighbours in a shard that stay together, for longer reads; 1 shuffles perfectly."""
    bad_clips: Literal["raise", "substitute"] = "raise"
    """A damaged clip ends the run ("raise"), or another one takes its place ("substitute")."""
    bad_clip_limit: int = 100
    """Different damaged clips, over all ranks, that a run bears before it ends."""
    cache_dir: str = ""
    """Directory of a local disk that keeps clips for all processes and runs that name it."""
    cache_limit: str = ""
    """What the cache may occupy, such as "500GB"; with `cache_dir`."""
    storage_patience_seconds: float = 600.0
    """How long a store that fails is waited for, since the last byte that arrived."""
    prefetch_batches: int = 2
    """Batches that each worker prepares ahead."""


@dataclass(frozen=True)
class ModelRecipe:
    """The network."""

    name: str = "r2plus1d_18"
    """One of torchvision's video models, "tiny", or `package.module:function`."""
    freeze_batchnorm: bool = False
    """Leave BatchNorm's statistics, scale and shift as they are at the start."""
    sync_batchnorm: bool = False
    """Compute BatchNorm's statistics over all ranks (CUDA only)."""
    freeze: tuple[str, ...] = ()
    """Patterns of weights that are not trained, such as "layer1.*"; their BatchNorm is frozen."""
    stochastic_depth: float = -1.0
    """Probability that MViT's or Swin3D's last block is left out, the others less; -1: its own."""
    new_head: bool = False
    """Draw a new classifier for `--weights` of as many, but other, classes."""
    remap_classes: bool = False
    """Take the classifier's rows of `--weights` by class name; draw those of names they lack."""
    ema_decay: float = 0.0
    """Decay a step of a moving average of the weights, which is then evaluated; 0: none."""


@dataclass(frozen=True)
class OptimRecipe:
    """The optimiser and the loss."""

    name: Literal["sgd", "adamw"] = "sgd"
    """"sgd" or "adamw"."""
    lr: float = 0.01
    """Learning rate for `lr_batch` clips a step; the rate used is lr * B / lr_batch."""
    lr_batch: int = 24
    """Clips a step that `lr` is meant for."""
    momentum: float = 0.9
    """Momentum of SGD."""
    beta2: float = 0.999
    """Decay of AdamW's second moment; the first moment's is 0.9."""
    weight_decay: float = 1e-4
    """Weight decay, on all weights but those of `no_decay`."""
    no_decay: tuple[str, ...] = ()
    """Kinds of weights without decay: "norm", "bias" and "position" (tables and class tokens)."""
    layer_decay: float = 1.0
    """Factor of the learning rate from each block to the one before it; 1: all blocks alike."""
    head_rate: float = 1.0
    """Learning rate of the classifier, as a multiple of the others."""
    label_smoothing: float = 0.0
    """Share of a label's weight that is spread over all classes, below 1."""
    clip_grad_norm: float = 0.0
    """Largest norm of all gradients together; longer ones are shortened. 0: no limit."""


@dataclass(frozen=True)
class ScheduleRecipe:
    """How long, and the learning rate at every step."""

    name: Literal["multistep", "cosine"] = "multistep"
    """After warm-up: a factor at each milestone, or half a cosine down to `final_factor`."""
    epochs: int = 45
    """Epochs of training."""
    warmup_epochs: float = 0.0
    """Epochs over which the rate rises in a line from `warmup_factor` of itself."""
    warmup_factor: float = 0.001
    """Share of the learning rate at the first step of the warm-up."""
    milestones: tuple[float, ...] = ()
    """Epochs, counted from the start of training, at which the rate is multiplied by `gamma`."""
    gamma: float = 0.1
    """Factor at each milestone."""
    final_factor: float = 0.0
    """Share of the learning rate at the end of the cosine."""


@dataclass(frozen=True)
class AugmentRecipe:
    """From a decoded clip to the network's input; pairs are height and width in pixels."""

    resize: tuple[int, int] = (128, 171)
    """Size that every frame is resized to, whatever its shape (bilinear, no antialias)."""
    short_side: int = 0
    """Size of the short side that frames are resized to, their aspect kept; 0: `resize`."""
    round_resized: bool = False
    """Round levels after the resize, as torchvision's `weights.transforms()` do on uint8 clips."""
    crop: tuple[int, int] = (112, 112)
    """Size of the crop: at random in training, the centre in evaluation."""
    crop_area: tuple[float, float] = (0.0, 0.0)
    """In training, shares of a frame's area from which a random box is resized to `crop`; 0: no."""
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    """Width over height between which that box is drawn."""
    flip: float = 0.5
    """Probability of a horizontal flip in training. 0 where left and right have a meaning."""
    mean: tuple[float, float, float] = (0.43216, 0.394666, 0.37645)
    """Subtracted from red, green and blue in [0, 1]."""
    std: tuple[float, float, float] = (0.22803, 0.22145, 0.216989)
    """Divides red, green and blue after that."""
    mixup: float = 0.0
    """Alpha of mixup's Beta(alpha, alpha) for pairs of clips; 0: none."""
    cutmix: float = 0.0
    """Alpha of CutMix likewise; with both, each pair takes one of them, at even odds."""
    rand_operations: int = 0
    """Operations of RandAugment for a training clip, all its frames alike; 0: none."""
    rand_magnitude: int = 9
    """Strength of RandAugment, from 0 to 30."""
    rand_probability: float = 1.0
    """Probability that a drawn operation of RandAugment is applied."""
    erase: float = 0.0
    """Probability that a box of a clip is erased, in all its frames (after normalisation)."""


@dataclass(frozen=True)
class EvalRecipe:
    """The protocol of evaluation, and how often."""

    frames: int = 0
    """Frames of a clip; 0: as in training."""
    clips_per_video: int = 1
    """Clips of every video, over which its scores are averaged."""
    placement: Literal["even", "middle", "torchvision"] = "even"
    """"even" touches both ends, "middle" of as many equal parts, "torchvision" (one: the first)."""
    crops: Literal[1, 3] = 1
    """Crops of every clip: the centre one, or 3 along the side that leaves more room."""
    average: Literal["probabilities", "logits"] = "probabilities"
    """What is averaged over a video's clips and crops."""
    bad_clip_limit: int = 100
    """Different damaged videos, over all ranks, that an evaluation bears; one more ends the run."""
    batch_size: int = 0
    """Clips that one rank takes through the model at a time; 0: as in training."""
    every_epochs: int = 1
    """Epochs from one evaluation to the next; the last epoch is always evaluated."""


@dataclass(frozen=True)
class RunRecipe:
    """Numerics, seeds, and what is written down."""

    seed: int = 0
    """Decides the order, the clips, the augmentation and the first weights."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """"float32", or convolutions and products in "bf16" or "fp16" (with scaled gradients)."""
    compile: bool = False
    """Compile the network with torch.compile for training; evaluation runs it as it is."""
    channels_last_3d: bool = False
    """Keep activations as (N, T, H, W, C) in memory, C in multiples of 8: faster on NVIDIA GPUs."""
    deterministic: bool = False
    """Refuse operations that do not give the same result twice (PyTorch's switch)."""
    log_every_steps: int = 20
    """Steps from one log line to the next."""
    keep_checkpoints: int = 3
    """Checkpoints that are kept, the newest ones; the best one is kept besides."""
    checkpoint_steps: int = 0
    """Optimiser steps from one checkpoint to the next within an epoch; 0: only after epochs."""
    checkpoint_minutes: float = 0.0
    """Minutes from one checkpoint to the next within an epoch; 0: only after epochs."""
    on_nan: Literal["stop", "rollback"] = "stop"
    """A loss that is not finite: "stop", or "rollback" to the last checkpoint and skip the step."""
    max_loss: float = 0.0
    """A loss of one step and rank above this is treated as one that is not finite; 0: no limit."""
    max_rollbacks: int = 3
    """Times that a run rolls back before it stops all the same."""
    tensorboard: bool = False
    """Draw the curves for TensorBoard too, in the output directory."""
    wandb: str = ""
    """Project of Weights & Biases that the curves are sent to; "": none."""
    profile_steps: int = 0
    """Steps that a trace is written of, at the beginning of the run; 0: none."""


@dataclass(frozen=True)
class Recipe:
    """One training run."""

    name: str = "recipe"
    """For people; names the output directory when none is given."""
    data: DataRecipe = field(default_factory=DataRecipe)
    model: ModelRecipe = field(default_factory=ModelRecipe)
    optim: OptimRecipe = field(default_factory=OptimRecipe)
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    augment: AugmentRecipe = field(default_factory=AugmentRecipe)
    eval: EvalRecipe = field(default_factory=EvalRecipe)
    run: RunRecipe = field(default_factory=RunRecipe)

    def __post_init__(self) -> None:
        """Refuse values that no run can be made of; UsageError names the key.

        Values that Python code brings become those that `to_toml` writes and a checkpoint keeps.
        """
        object.__setattr__(self, "name", typed(self.name, str, "name", "recipe"))
        for section in _SECTIONS:
            values = getattr(self, section)
            plain = _typed(section, vars(values), "recipe")
            object.__setattr__(self, section, replace(values, **plain))
        _check_finite(self)
        check_ranges(self)
        check_crops(self)
        check_together(self)

    @property
    def eval_frames(self) -> int:
        """Frames of a clip in evaluation."""
        return self.eval.frames or self.data.frames

    def to_toml(self) -> str:
        """Return the whole recipe, defaults included, as a file that `load_recipe` reads."""
        lines = [f"name = {toml_value(self.name)}"]
        for section in _SECTIONS:
            values = getattr(self, section)
            lines += ["", f"[{section}]"]
            lines += [f"{f.name} = {toml_value(getattr(values, f.name))}" for f in fields(values)]
        return "\n".join(lines) + "\n"


_SECTIONS: dict[str, type[Any]] = {
    "data": DataRecipe,
    "model": ModelRecipe,
    "optim": OptimRecipe,
    "schedule": ScheduleRecipe,
    "augment": AugmentRecipe,
    "eval": EvalRecipe,
    "run": RunRecipe,
}


def load_recipe(name_or_path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """Load a recipe by its name or file, then apply `section.key=value` overrides in order.

    The value of an override is written as in TOML; a string needs no quotes. Raises UsageError
    for a recipe, section or key that does not exist (with the nearest one that does), a value of
    another type, and a value out of range.
    """
    path = _recipe_path(name_or_path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"recipe {path} is not TOML: {error}") from error
    values.setdefault("name", path.stem)
    for override in overrides:
        _apply_override(values, override)
    return recipe_from_dict(values, where=str(path))


def override_recipe(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """Apply `section.key=value` overrides in order; raises as `load_recipe`."""
    values = tomllib.loads(recipe.to_toml())
    for override in overrides:
        _apply_override(values, override)
    return recipe_from_dict(values, where="--set")


def parse_recipe(text: str, where: str) -> Recipe:
    """Parse what `Recipe.to_toml` wrote; `where` is named in errors."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"recipe in {where} is not TOML: {error}") from error
    return recipe_from_dict(values, where=where)


def recipe_from_dict(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """Build a recipe from nested dictionaries, type-checked; `where` is named in errors."""
    recipe = Recipe()
    for key, value in values.items():
        if key == "name":
            recipe = replace(recipe, name=typed(value, str, "name", where))
            continue
        check_known(key, [*_SECTIONS, "name"], "section", where)
        if not isinstance(value, dict):
            raise UsageError(f"{key} in {where} must be a section [{key}], not {value!r}")
        recipe = replace(recipe, **{key: _section(key, value, where)})
    return recipe


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with kprep."""
    return sorted(path.stem for path in RECIPES_DIRECTORY.glob("*.toml"))


def recipe_differences(old: Recipe, new: Recipe) -> list[str]:
    """Return `section.key: old -> new` for every setting in which two recipes differ."""
    return [
        f"{section}.{entry.name}: {before} -> {after}"
        for section in _SECTIONS
        for entry in fields(_SECTIONS[section])
        if (before := getattr(getattr(old, section), entry.name))
        != (after := getattr(getattr(new, section), entry.name))
    ]


def _recipe_path(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.suffix == ".toml" or len(path.parts) > 1:
        return path
    if path.name not in recipe_names():
        raise UsageError(
            f"recipe {path.name!r} does not exist (your own are files that end in .toml); "
            f"{nearest(path.name, recipe_names())}"
        )
    return RECIPES_DIRECTORY / f"{path.name}.toml"


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not (equals and dot and name):
        raise UsageError(f"--set {override!r} must be section.key=value, such as optim.lr=0.1")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # model.name=r3d_18
    check_known(section, list(_SECTIONS), "section", "--set")
    hints = get_type_hints(_SECTIONS[section])
    check_known(name, list(hints), f"key in [{section}]", "--set")
    typed(value, hints[name], f"{section}.{name}", "--set")
    values.setdefault(section, {})
    if isinstance(values[section], dict):
        values[section] = {**values[section], name: value}


def _section(section: str, values: dict[str, Any], where: str) -> Any:
    kind = _SECTIONS[section]
    hints = get_type_hints(kind)
    for key in values:
        check_known(key, list(hints), f"key in [{section}]", where)
    return kind(**_typed(section, values, where))


def _typed(section: str, values: dict[str, Any], where: str) -> dict[str, Any]:
    hints = get_type_hints(_SECTIONS[section])
    return {
        key: typed(value, hints[key], f"{section}.{key}", where) for key, value in values.items()
    }


def _check_finite(recipe: Recipe) -> None:
    for section, kind in _SECTIONS.items():
        for entry in fields(kind):
            value = getattr(getattr(recipe, section), entry.name)
            parts = value if isinstance(value, tuple) else (value,)
            if not all(math.isfinite(part) for part in parts if isinstance(part, float)):
                raise UsageError(f"{section}.{entry.name} ({value}) must be finite")
