"""Curves for TensorBoard and Weights & Biases; `metrics.jsonl` stays the source of both.

Whenever a run is opened, what the metrics hold is drawn again from the start. So a resumed run
continues the same curves: without duplicates, and without the points of steps that were lost.
"""

from __future__ import annotations

import json
import shutil
import time
import uuid
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from prep.errors import KprepError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from train.recipe import Recipe

_SUFFIX = ".kprep"


class Curves(Protocol):
    """Somewhere that curves are drawn."""

    def add(self, entry: dict[str, Any]) -> None:
        """Draw the numbers of one line of the metrics."""

    def close(self) -> None:
        """Write what is left."""


def open_curves(recipe: Recipe, directory: Path, entries: Iterable[dict[str, Any]]) -> list[Curves]:
    """Open what the recipe asks for, and draw what the metrics hold already.

    Raises UsageError where a package is missing, and KprepError where W&B refuses.
    """
    found: list[Curves] = []
    if recipe.run.tensorboard:
        found.append(TensorBoardCurves(directory / "tensorboard"))
    if recipe.run.wandb:
        found.append(WandbCurves(recipe, directory))
    for entry in entries:
        for curves in found:
            curves.add(entry)
    return found


def scalars(entry: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of one line of the metrics, named "train/loss" and so on."""
    return {
        f"{entry['kind']}/{name}": float(value)
        for name, value in entry.items()
        if isinstance(value, int | float) and name not in ("step", "time")
    }


class TensorBoardCurves:
    """Event files in `tensorboard/`."""

    def __init__(self, directory: Path) -> None:
        """Begin anew: event files that an earlier attempt left here are deleted."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(
                "run.tensorboard needs TensorBoard: pip install 'kprep[tensorboard]'"
            ) from error
        for path in directory.glob(f"events.out.tfevents.*{_SUFFIX}"):
            path.unlink(missing_ok=True)
        # a TensorBoard that has read the old file forgets its points from step 0 on
        self._writer = SummaryWriter(
            str(directory), purge_step=0, flush_secs=10, filename_suffix=_SUFFIX
        )

    def add(self, entry: dict[str, Any]) -> None:
        """Draw the numbers of one line of the metrics."""
        moment = entry.get("time", time.time())
        for name, value in scalars(entry).items():
            self._writer.add_scalar(name, value, entry["step"], walltime=moment)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WandbCurves:
    """One run of Weights & Biases, the same over all attempts; its id stands in `wandb/id`.

    WANDB_MODE, WANDB_ENTITY and its other variables hold as usual. Offline, the attempt's
    directory replaces the one before. Online, W&B keeps every point that it was sent: what a lost
    attempt sent beyond the checkpoint stays, and is not sent a second time.
    """

    def __init__(self, recipe: Recipe, directory: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UsageError("run.wandb needs wandb: pip install 'kprep[wandb]'") from error
        folder = directory / "wandb"
        number = _run_id(folder)
        for path in folder.glob(f"offline-run-*-{number}"):
            shutil.rmtree(path, ignore_errors=True)
        try:
            self._run = wandb.init(
                project=recipe.run.wandb,
                dir=str(directory),
                id=number,
                name=directory.name,
                resume="allow",
                config=_settings(recipe),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            raise KprepError(
                f"run.wandb: Weights & Biases refused the run ({str(error).splitlines()[0]}); "
                "log in with `wandb login`, or set WANDB_MODE=offline"
            ) from error

    def add(self, entry: dict[str, Any]) -> None:
        """Draw the numbers of one line of the metrics, unless W&B is further already."""
        if entry["step"] >= self._run.step:
            self._run.log(scalars(entry), step=entry["step"])

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


def _run_id(folder: Path) -> str:
    """Return the id of the output directory's run; drawn once."""
    path = folder / "id"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
    text = path.read_text(encoding="utf-8").strip()
    if not text.isalnum():
        raise KprepError(f"{path} must hold the id of a W&B run, not {text!r}; delete it")
    return text


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as `section.key: value`."""
    nested = json.loads(json.dumps(asdict(recipe)))
    flat = {"name": nested.pop("name")}
    for section, values in nested.items():
        flat |= {f"{section}.{key}": value for key, value in values.items()}
    return flat
