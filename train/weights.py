"""Weights to begin with: torchvision's, a state dict in a file, or a checkpoint of ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torchvision.models import get_weight

from prep.errors import KprepError, UsageError
from train.agreement import raise_together
from train.checkpoint import FORMAT, load_checkpoint
from train.param_groups import head_names

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

    from train.distributed import World

# What DDP and torch.compile put before every name.
_PREFIXES = ("module.", "_orig_mod.")
_LISTED = 8


@dataclass(frozen=True)
class Weights:
    """A network's tensors by name.

    `class_names` stand in the order of the network's outputs; None where the file has none.
    """

    source: str
    tensors: dict[str, torch.Tensor]
    class_names: list[str] | None


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors; names as in the network.

    loaded   taken over
    skipped  in the file, of no use to the network, or of a head for other classes
    fresh    in the network, not in the file: as drawn at random
    head     what happened to the classifier, for people
    """

    loaded: list[str]
    skipped: list[str]
    fresh: list[str]
    head: str

    def __str__(self) -> str:
        """Return one line that names what was not loaded."""
        parts = [f"{len(self.loaded)} tensors loaded", self.head]
        for what, names in (("skipped", self.skipped), ("drawn at random", self.fresh)):
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
        tensors = found.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, or not the bytes of the hash
        raise UsageError(
            f"--weights {name}: {cached} is not there, and cannot be downloaded ({error}); "
            f"put {found.url} there by hand"
        ) from error
    return Weights(name, dict(tensors), list(found.meta["categories"]))


def _from_file(path: Path) -> Weights:
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no weights can raise anything
        text = str(error).partition("\n")[0] or type(error).__name__
        raise KprepError(f"--weights {path} cannot be read as tensors only ({text})") from error
    if isinstance(values, dict) and values.get("format") == FORMAT:
        saved = load_checkpoint(path)
        return Weights(str(path), saved.ema or saved.model, saved.class_names)
    for key in ("model", "state_dict"):
        if isinstance(values, dict) and isinstance(values.get(key), dict):
            values = values[key]
    if not isinstance(values, dict) or not values or not _all_tensors(values):
        raise UsageError(f"--weights {path} holds no state dict: names and tensors")
    return Weights(str(path), {_bare(name): tensor for name, tensor in values.items()}, None)


def _all_tensors(values: dict[Any, Any]) -> bool:
    return all(isinstance(value, torch.Tensor) for value in values.values())


def _bare(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def load_weights(
    model: nn.Module, weights: Weights, class_names: list[str], *, new_head: bool = False
) -> LoadReport:
    """Put weights into a freshly drawn network.

    Everything below the classifier must fit. The classifier, the network's last linear layer or
    3-D convolution, keeps its random weights where the number of classes differs, or `new_head`
    says so; its rows are permuted where the same names stand in another order.

    Raises UsageError when a tensor below the classifier is missing or of another shape, and, with
    the difference, when there are as many classes but others.
    """
    own = model.state_dict()
    head = head_names(model)
    tensors = dict(weights.tensors)
    fits = all(name in tensors and tensors[name].shape == own[name].shape for name in head)
    note = f"a new head for {len(class_names)} classes"
    if new_head or not fits:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in head}
    elif weights.class_names is None:
        note = "the file names no classes: their order is taken on trust"
    else:
        order = _row_order(weights.class_names, class_names, weights.source)
        note = "the same classes"
        if order != list(range(len(order))):
            note = "the same classes in another order: the head's rows were permuted"
            tensors |= {name: tensors[name][order] for name in head}
    loaded = {name: tensor for name, tensor in tensors.items() if name in own}
    _check_body(own, loaded, head, weights.source)
    model.load_state_dict(loaded, strict=False)
    return LoadReport(
        loaded=sorted(loaded),
        skipped=sorted(weights.tensors.keys() - loaded.keys()),
        fresh=sorted(own.keys() - loaded.keys()),
        head=note,
    )


def begin_with(
    name: str, model: nn.Module, class_names: list[str], world: World, *, new_head: bool
) -> LoadReport | None:
    """Find and load weights on every rank, rank 0 first: only one of them downloads.

    Raises, on all ranks, what any of them raises.
    """
    report: LoadReport | None = None
    for first in (True, False):
        error: Exception | None = None
        try:
            if world.is_first == first:
                weights = find_weights(name)
                report = load_weights(model, weights, class_names, new_head=new_head)
        except KprepError as caught:
            error = caught
        raise_together(world, error)
    return report


def _row_order(saved: list[str], present: list[str], source: str) -> list[int]:
    """Return, for each present class, its place among the saved ones."""
    missing = sorted(set(present) - set(saved))
    extra = sorted(set(saved) - set(present))
    if missing or extra or len(saved) != len(present):
        raise UsageError(
            f"--weights {source} is for {len(saved)} other classes: it lacks {_some(missing)}; "
            f"the dataset lacks {_some(extra)}; for a head that is trained anew add "
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
