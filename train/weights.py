"""Weights to begin with: torchvision's, a state dict in a file, or a checkpoint of ours."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torchvision.models import get_weight

from prep.errors import KprepError, UsageError
from train.agreement import rank_0_first
from train.checkpoint import FORMAT, load_checkpoint, why_unreadable
from train.inflate import inflate_swin
from train.mvit import fit_position_tables
from train.param_groups import head_names
from train.recipe import parse_recipe

if TYPE_CHECKING:
    from collections.abc import Collection

    from torchvision.models import WeightsEnum

    from train.distributed import World
    from train.recipe import ModelRecipe

# What DDP and torch.compile put before every name.
_PREFIXES = ("module.", "_orig_mod.")
_LISTED = 8


@dataclass(frozen=True)
class Weights:
    """A network's tensors by name.

    `class_names` stand in the order of the network's outputs, `crop` is the height and width of the
    clips it was trained on; None where the file does not say. `is_averaged` says whether they are a
    moving average, as far as that is known.
    """

    source: str
    tensors: dict[str, torch.Tensor]
    class_names: list[str] | None
    crop: tuple[int, int] | None = None
    is_averaged: bool = False


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors; names as in the network.

    loaded   taken over
    skipped  in the file, of no use to the network, or of a head for other classes
    fresh    in the network, not in the file: as drawn at random
    head     what happened to the classifier, for people
    fitted   loaded, but interpolated to the size of the clips: MViT's position tables
    drawn    classes whose rows of the classifier were drawn at random
    is_averaged  whether the weights are a moving average
    """

    loaded: list[str]
    skipped: list[str]
    fresh: list[str]
    head: str
    fitted: list[str] = field(default_factory=list)
    drawn: list[str] = field(default_factory=list)
    is_averaged: bool = False

    def __str__(self) -> str:
        """Return one line that names what was not loaded."""
        parts = [f"{len(self.loaded)} tensors loaded", self.head]
        lists = (
            ("interpolated", self.fitted),
            ("skipped", self.skipped),
            ("drawn at random", self.fresh),
        )
        for what, names in lists:
            if names:
                parts.append(f"{what}: {_some(names)}")
        return "; ".join(parts)


def find_weights(name: str) -> Weights:
    """Read weights by a file's path or by a name of torchvision's.

    Args:
        name: a file with a state dict (alone, or below "model" or "state_dict"), a checkpoint of
            ours (its averaged weights where it has them), or such as
            "R2Plus1D_18_Weights.KINETICS400_V1", taken from torch's hub cache or downloaded to it.

    Raises UsageError when there is no such file or name, or the download fails.
    """
    path = Path(name)
    if path.is_file():
        return _from_file(path)
    if "Weights." not in name:
        raise UsageError(
            f"--weights {name} is neither a file nor a name of torchvision's, "
            "such as R2Plus1D_18_Weights.KINETICS400_V1"
        )
    try:
        found: WeightsEnum = get_weight(name)
    except (ValueError, AttributeError, KeyError) as error:
        raise UsageError(f"--weights {name}: torchvision has no such weights: {error}") from error
    return _from_torchvision(name, found)


def _from_torchvision(name: str, found: WeightsEnum) -> Weights:
    cached = Path(torch.hub.get_dir()) / "checkpoints" / found.url.rpartition("/")[2]
    try:
        tensors = found.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # no network, not the bytes of the hash, or no weights
        if cached.is_file():
            raise KprepError(
                f"--weights {name}: {cached} cannot be read as tensors only "
                f"({why_unreadable(error)}); delete it, and it is downloaded again"
            ) from error
        raise UsageError(
            f"--weights {name}: {cached} is not there, and cannot be downloaded ({error}); "
            f"put {found.url} there by hand"
        ) from error
    return Weights(name, dict(tensors), list(found.meta["categories"]))


def _from_file(path: Path) -> Weights:
    try:
        # torchvision's reference scripts save their options in one: it has values and runs nothing
        with torch.serialization.safe_globals([argparse.Namespace]):
            values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no weights can raise anything
        raise KprepError(
            f"--weights {path} cannot be read as tensors only ({why_unreadable(error)}); save its "
            "state dict alone, torch.save(checkpoint['model'], FILE), and give that file"
        ) from error
    if isinstance(values, dict) and values.get("format") == FORMAT:
        saved = load_checkpoint(path)
        crop = parse_recipe(saved.recipe, str(path)).augment.crop
        tensors, is_averaged = saved.ema or saved.model, bool(saved.ema)
        return Weights(str(path), tensors, saved.class_names, crop, is_averaged)
    for key in ("model", "state_dict"):
        if isinstance(values, dict) and isinstance(values.get(key), dict):
            values = values[key]
    if not isinstance(values, dict) or not values or not _all_tensors(values):
        raise UsageError(f"--weights {path} holds no state dict: names and tensors")
    return Weights(str(path), dict(values), None)


def _all_tensors(values: dict[Any, Any]) -> bool:
    return all(isinstance(value, torch.Tensor) for value in values.values())


def _with_names_of(own: Collection[str], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Take prefixes off all names until one of the network's is among them, or none is left."""
    while not any(name in own for name in tensors):
        bare = {_without_prefix(name): tensor for name, tensor in tensors.items()}
        if bare.keys() == tensors.keys():
            break
        tensors = bare
    return tensors


def _without_prefix(name: str) -> str:
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def load_weights(
    model: nn.Module, weights: Weights, class_names: list[str], recipe: ModelRecipe
) -> LoadReport:
    """Put weights into a freshly drawn network.

    Everything below the classifier must fit; MViT's position tables are interpolated to its clips,
    and a Swin's weights for images inflated to a Swin3D.
    The classifier, the network's last linear layer or 3-D convolution, keeps its random weights
    where the number of classes differs, or `model.new_head` says so; its rows are permuted where
    the same names stand in another order, and taken by name with `model.remap_classes`.

    Raises UsageError when a tensor below the classifier is missing or of another shape, and, with
    the difference, when there are as many classes but others.
    """
    named = _with_names_of(model.state_dict().keys(), weights.tensors)
    weights = replace(weights, tensors=named)
    if (inflated := inflate_swin(model, weights.tensors)) is not None:
        weights = replace(weights, tensors=inflated)
    own = model.state_dict()
    head = _chosen_head(model, weights, class_names, recipe)
    fitted = fit_position_tables(model, weights.tensors, weights.crop, weights.source)
    names = head_names(model)
    body = {name: value for name, value in weights.tensors.items() if name not in names}
    loaded = {name: value for name, value in (body | fitted | head.tensors).items() if name in own}
    _check_body(own, loaded, names, weights.source)
    model.load_state_dict(loaded, strict=False)
    return LoadReport(
        loaded=sorted(loaded),
        skipped=sorted(weights.tensors.keys() - loaded.keys()),
        fresh=sorted(own.keys() - loaded.keys()),
        head=head.note,
        fitted=sorted(fitted),
        drawn=head.drawn,
        is_averaged=weights.is_averaged,
    )


def begin_with(
    name: str,
    model: nn.Module,
    class_names: list[str],
    world: World,
    recipe: ModelRecipe,
    *,
    must_be_whole: bool = False,
) -> LoadReport | None:
    """Find and load weights on every rank.

    Raises, on all ranks, what any of them raises; UsageError also for a classifier that is not all
    of the weights' where it `must_be_whole`, because it is only evaluated.
    """
    report: LoadReport | None = None

    def load() -> None:
        nonlocal report
        report = load_weights(model, find_weights(name), class_names, recipe)
        if must_be_whole and (report.fresh or report.drawn):
            raise UsageError(
                f"--weights {name} cannot be evaluated on these classes: {report.head}; "
                "train first, or use a dataset of the classes of these weights"
            )

    rank_0_first(world, load)
    return report


@dataclass(frozen=True)
class _Head:
    """What the classifier takes from weights: tensors by name, a note, and the rows drawn anew."""

    tensors: dict[str, torch.Tensor]
    note: str
    drawn: list[str] = field(default_factory=list)


def _chosen_head(
    model: nn.Module, weights: Weights, class_names: list[str], recipe: ModelRecipe
) -> _Head:
    own, names = model.state_dict(), head_names(model)
    saved = {name: weights.tensors[name] for name in names if name in weights.tensors}
    if recipe.remap_classes:
        return _remapped(weights, class_names, {name: own[name] for name in names}, saved)
    fits = all(name in saved and saved[name].shape == own[name].shape for name in names)
    if recipe.new_head or not fits:
        shared = len(set(weights.class_names or ()) & set(class_names))
        hint = f" ({shared} of them are the weights' too: model.remap_classes keeps their rows)"
        note = f"a new head for {len(class_names)} classes"
        return _Head({}, note + (hint if shared and not recipe.new_head else ""))
    if weights.class_names is None:
        return _Head(saved, "the file names no classes: their order is taken on trust")
    order = _row_order(weights.class_names, class_names, weights.source)
    if order == list(range(len(order))):
        return _Head(saved, "the same classes")
    rows = {name: tensor[order] for name, tensor in saved.items()}
    return _Head(rows, "the same classes in another order: the head's rows were permuted")


def _remapped(
    weights: Weights,
    class_names: list[str],
    own: dict[str, torch.Tensor],
    saved: dict[str, torch.Tensor],
) -> _Head:
    """Return the classifier with the weights' rows where the class has exactly the same name."""
    old = weights.class_names
    if old is None:
        raise UsageError(
            f"--weights {weights.source} names no classes, so model.remap_classes cannot tell "
            "which row is whose; begin with a checkpoint of kprep, or torchvision's weights"
        )
    places = {name: place for place, name in enumerate(old)}
    taken = [row for row, name in enumerate(class_names) if name in places]
    _check_width(own, saved, weights.source)
    shapes = [tensor.shape[:1] == (len(old),) for tensor in saved.values()]
    if not taken or len(saved) < len(own) or not all(shapes):
        raise UsageError(
            f"--weights {weights.source}: model.remap_classes finds no row for any of the "
            "dataset's classes; for a head that is trained anew set model.new_head=true instead"
        )
    order = [places[class_names[row]] for row in taken]
    rows = {name: tensor.clone() for name, tensor in own.items()}
    for name, tensor in rows.items():
        tensor[taken] = saved[name][order].to(tensor)
    drawn = [name for name in class_names if name not in places]
    unused = sorted(places.keys() - set(class_names))
    note = f"{len(taken)} of the head's {len(class_names)} rows taken by name"
    note += f"; rows drawn at random: {_some(drawn)}; rows not used: {_some(unused)}"
    return _Head(rows, note, drawn)


def _check_width(own: dict[str, torch.Tensor], saved: dict[str, torch.Tensor], source: str) -> None:
    """Refuse rows of a classifier that takes other features."""
    wrong = [
        f"{name} {list(tensor.shape)} for {list(own[name].shape)}"
        for name, tensor in saved.items()
        if tensor.shape[1:] != own[name].shape[1:]
    ]
    if wrong:
        raise UsageError(
            f"--weights {source}: model.remap_classes cannot take rows of a head of another width "
            f"({_some(wrong)}); set model.name to the network it is of, or model.new_head=true"
        )


def _row_order(saved: list[str], present: list[str], source: str) -> list[int]:
    """Return, for each present class, its place among the saved ones."""
    missing = sorted(set(present) - set(saved))
    extra = sorted(set(saved) - set(present))
    if missing or extra or len(saved) != len(present):
        raise UsageError(
            f"--weights {source} is for {len(saved)} other classes: it lacks {_some(missing)}; "
            f"the dataset lacks {_some(extra)}; to take the rows of the names in common add "
            "--set model.remap_classes=true, for a head that is trained anew "
            "--set model.new_head=true"
        )
    places = {name: place for place, name in enumerate(saved)}
    return [places[name] for name in present]


def _check_body(
    own: dict[str, torch.Tensor], loaded: dict[str, torch.Tensor], head: list[str], source: str
) -> None:
    missing = [name for name in own if name not in loaded and name not in head]
    wrong = [
        f"{name} {list(tensor.shape)} for {list(own[name].shape)}"
        for name, tensor in loaded.items()
        if tensor.shape != own[name].shape
    ]
    if missing or wrong:
        raise UsageError(
            f"--weights {source} is of another network: missing {_some(missing)}; "
            f"of another shape {_some(wrong)}; set model.name to the network it is of"
        )


def _some(names: list[str]) -> str:
    """Return the first names of a list, and how many there are besides."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return (", ".join(names[:_LISTED]) or "nothing") + more
