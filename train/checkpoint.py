"""Checkpoints: one file each, complete or not there, readable without pickle."""

from __future__ import annotations

import json
import os
import pickle  # for its exception: nothing is read with it
import re
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch

from prep.errors import KprepError, UsageError
from prep.storage import sync_path

if TYPE_CHECKING:
    from collections.abc import Iterator

FORMAT = "kprep-checkpoint-1"
_NAME = re.compile(r"epoch-(\d{4,})(?:-step-(\d{8,}))?\.pt")
BEST_NAME = "best.pt"
ABANDONED_NAME = "abandoned"
_LEFT_OVER = re.compile(r"\.(?:epoch-\d{4,}(?:-step-\d{8,})?|best)\.pt\.\d+\.tmp")
# such as "Unsupported global: GLOBAL pathlib.PosixPath was not an allowed global by default."
_REFUSED = re.compile(r"GLOBAL (\S+)")

_RNG_DIMENSIONS = 2  # of a tensor of random states: a row of bytes for each rank
_KINDS: dict[str, type | tuple[type, ...]] = {
    "epoch": int, "step": int, "model": dict, "optimizer": (dict, NoneType), "recipe": str,
    "class_names": list, "loader": dict, "rng": dict, "ema": (dict, NoneType), "scaler": dict,
    "given": list, "left_out": list, "rollbacks": int,
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on, as tensors, numbers and text.

    epoch        epochs that are complete: training goes on with this one
    step         optimiser steps that are complete
    model        the network's `state_dict`, without DDP's prefix
    optimizer    the optimiser's `state_dict`; None where only the network was kept
    recipe       the recipe as TOML
    class_names  names of the classes, in the order of the network's outputs
    loader       the training loader's state
    rng          states of the ranks' random generators, uint8 (ranks, bytes), by device type
    ema          `state_dict` of the averaged network; None where the recipe keeps none
    scaler       state of fp16's gradient scaler; {} for other precisions
    given        `data.batch_size` and `data.accumulate` that the run was given, before they were
                 changed for its number of ranks; [] where nobody wrote them down
    left_out     optimiser steps that are not made when they come (again), see `run.on_nan`
    rollbacks    how often the run went back to a checkpoint
    """

    epoch: int
    step: int
    model: dict[str, Any]
    optimizer: dict[str, Any] | None
    recipe: str
    class_names: list[str]
    loader: dict[str, Any]
    rng: dict[str, torch.Tensor]
    ema: dict[str, Any] | None = None
    scaler: dict[str, Any] = field(default_factory=dict)
    given: list[int] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    rollbacks: int = 0


def checkpoint_path(directory: Path, epoch: int, step: int | None = None) -> Path:
    """Return the path of the checkpoint that is written when `epoch` epochs are complete.

    `step` is given for one in mid-epoch: the optimiser steps that are complete since the start.
    """
    middle = "" if step is None else f"-step-{step:08d}"
    return directory / f"epoch-{epoch:04d}{middle}.pt"


def checkpoints_in(directory: Path) -> list[Path]:
    """Return the checkpoints of a directory, oldest first; [] where there is no directory."""
    if not directory.is_dir():
        return []
    return sorted(filter(_place, directory.iterdir()), key=_place)


def checkpoint_before(directory: Path, step: int, steps_per_epoch: int) -> Path | None:
    """Return the newest checkpoint of fewer than `step` optimiser steps, else the newest of all.

    None where there is none.
    """
    found = checkpoints_in(directory)
    before = [path for path in found if _steps(path, steps_per_epoch) < step] or found
    return before[-1] if before else None


def _steps(path: Path, steps_per_epoch: int) -> int:
    epochs, step = _place(path)
    return step or epochs * steps_per_epoch


def _place(path: Path) -> tuple[int, ...]:
    """Return what checkpoints are ordered by, epochs and steps of their names; () for others."""
    match = _NAME.fullmatch(path.name)
    return (int(match[1]), int(match[2] or 0)) if match else ()


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint so that it appears complete or not at all, also when power fails.

    Raises KprepError when it cannot be written.
    """
    values = {**vars(checkpoint), "format": FORMAT, "loader": json.dumps(checkpoint.loader)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save(values, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_path(path.parent)
    except (OSError, RuntimeError) as error:
        # where a write fails, torch's writer raises an error of its own in closing the file
        inner = error.__context__
        cause = inner if isinstance(inner, OSError) else error
        raise KprepError(f"checkpoint {path} cannot be written: {cause}") from error
    finally:
        temporary.unlink(missing_ok=True)


def rotate_checkpoints(directory: Path, keep: int) -> None:
    """Delete all checkpoints of a directory but the newest `keep`, and what killed writers left.

    Only one process at a time writes into a directory.
    """
    for path in checkpoints_in(directory)[:-keep]:
        path.unlink(missing_ok=True)
    for path in directory.iterdir():
        if _LEFT_OVER.fullmatch(path.name):
            path.unlink(missing_ok=True)


def abandon_checkpoints(directory: Path, epoch: int, step: int | None = None) -> list[Path]:
    """Move the checkpoints beyond that of `checkpoint_path` into `abandoned/`; return them there.

    For a run that goes back to an older one: the newest is what it goes on with, and rotation
    keeps, so none of the way that it left may stand before its own. `best.pt` is moved likewise.
    """
    place, best = _place(checkpoint_path(directory, epoch, step)), directory / BEST_NAME
    beyond = [path for path in checkpoints_in(directory) if _place(path) > place]
    if _place_of_best(best) > place:
        beyond.append(best)
    abandoned = directory / ABANDONED_NAME
    if beyond:
        abandoned.mkdir(exist_ok=True)
    return [path.replace(abandoned / path.name) for path in beyond]


def _place_of_best(path: Path) -> tuple[int, ...]:
    """Return the place of `best.pt`, which is written after an epoch; () without a good one."""
    try:
        return (load_checkpoint(path, in_place=True).epoch, 0)
    except KprepError:
        return ()


def load_checkpoint(path: Path, *, in_place: bool = False) -> Checkpoint:
    """Read a checkpoint onto the CPU; `in_place` leaves tensors in the file until they are used.

    Raises UsageError where there is no file or it is none of kprep's, and KprepError where it is
    damaged, or has other fields than ours. Nothing in the file is executed (`weights_only=True`).
    `in_place` does not look for damage within the tensors.
    """
    if not path.is_file():
        raise UsageError(f"checkpoint {path} does not exist")
    try:
        if not in_place:
            _check_bytes(path)
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=in_place)
    except Exception as error:  # bytes that are no checkpoint can raise anything
        raise KprepError(
            f"checkpoint {path} cannot be read ({why_unreadable(error)}); resume from an older one"
        ) from error
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise UsageError(f"{path} is not a checkpoint of kprep")
    with naming_checkpoint(path):
        found = Checkpoint(**{**values, "loader": json.loads(values["loader"])})
        _check_kinds(found)
    return found


def why_unreadable(error: Exception) -> str:
    """Say why `torch.load` read no tensors, without its paragraphs of advice and their colours."""
    if found := _REFUSED.search(str(error)):
        return f"it holds {found[1]}, and only tensors, numbers and text are read"
    if isinstance(error, pickle.UnpicklingError):
        return "it holds more than tensors, numbers and text, or is not written by torch.save"
    return str(error).partition("\n")[0] or type(error).__name__


@contextmanager
def naming_checkpoint(path: Path) -> Iterator[None]:
    """Within the block what a checkpoint's values cannot be used for becomes a KprepError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise KprepError(
            f"checkpoint {path} is of another version of kprep, or damaged ({error})"
        ) from error


def _check_bytes(path: Path) -> None:
    """Raise where a byte is not as it was written: torch.load reads altered tensors as they are."""
    with zipfile.ZipFile(path) as archive:
        altered = archive.testzip()
    if altered is not None:
        raise ValueError(f"{altered} in it is altered")


def _check_kinds(checkpoint: Checkpoint) -> None:
    """Raise TypeError where a field is not of the kind that it is written as."""
    for name, kind in _KINDS.items():
        value = getattr(checkpoint, name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{name} is of type {type(value).__name__}")
    ranks = checkpoint.rng.values()
    if not all(isinstance(rows, torch.Tensor) and rows.dim() == _RNG_DIMENSIONS for rows in ranks):
        raise TypeError("rng holds no states by rank")
    if not all(isinstance(name, str) for name in checkpoint.class_names):
        raise TypeError("class_names holds no names")
    if not all(type(step) is int for step in checkpoint.left_out):
        raise TypeError("left_out holds no steps")


def find_checkpoint(resume: str, directory: Path) -> Path | None:
    """Return the file that `--resume` means, or None when training starts from the beginning.

    "auto" is the newest checkpoint in `directory`, if there is one; anything else is a file, or a
    run's output directory, whose newest checkpoint is meant.
    """
    if resume == "auto":
        found = checkpoints_in(directory)
        return found[-1] if found else None
    path = Path(resume)
    if not path.is_dir():
        return path
    found = checkpoints_in(path / "checkpoints") or checkpoints_in(path)
    if not found:
        raise UsageError(f"--resume {path}: there is no checkpoint in this directory")
    return found[-1]


def check_class_names(saved: list[str], present: list[str], path: Path) -> None:
    """Raise UsageError, naming the first difference, when a dataset's classes are not the saved."""
    if saved == present:
        return
    if len(saved) != len(present):
        difference = f"it has {len(saved)} classes, the dataset {len(present)}"
    else:
        index = next(i for i in range(len(saved)) if saved[i] != present[i])
        difference = f"its class {index} is {saved[index]!r}, the dataset's {present[index]!r}"
    raise UsageError(
        f"checkpoint {path} was trained on other classes: {difference}; "
        "use a dataset with the same class list in the same order"
    )
