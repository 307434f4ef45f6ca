"""`kprep train --check-weights NAME`: published weights under their own protocol, on a dataset.

The network keeps the classes that it was published with. Labels of the dataset are translated by
name, so a dataset may have its classes in another order, or only some of them: the network still
decides among all of its own.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prep.errors import UsageError
from train.agreement import rank_0_first
from train.evaluation import evaluate
from train.evaluation_files import SOURCE_NAME, source_text
from train.loader import fingerprint
from train.models import draw_model
from train.output import RunOutput
from train.progress import log
from train.transforms import why_slow_clips
from train.weights import find_weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stream.batch import ClipBatch
    from train.accuracy import Accuracy
    from train.distributed import World
    from train.loader import Loader
    from train.published import Published
    from train.recipe import Recipe


@dataclass(frozen=True)
class Comparison:
    """An accuracy that was measured here, beside the published one; shares in [0, 1].

    `is_published_file` is false where the file's sha256 is not the one in its name: then these are
    not the published weights.
    """

    weights: str
    level: str
    top1: float
    top5: float
    published_top1: float
    published_top5: float
    videos: int
    classes_present: int
    classes: int
    is_published_file: bool
    protocol: str

    def __str__(self) -> str:
        """Return a table for people, in percent."""
        lines = [f"{self.weights}: {self.protocol}", f"{'':14}measured   published   difference"]
        for name, measured, published in (
            ("top-1", self.top1, self.published_top1),
            ("top-5", self.top5, self.published_top5),
        ):
            error = math.sqrt(measured * (1 - measured) / max(self.videos, 1))
            lines.append(
                f"{self.level} {name:8} {100 * measured:8.2f}    {100 * published:8.2f}"
                f"     {100 * (measured - published):+8.2f}   (standard error {100 * error:.2f})"
            )
        if self.classes_present < self.classes:
            lines.append(
                f"the dataset has {self.classes_present} of the {self.classes} classes; the "
                "published accuracy is over all of them"
            )
        if not self.is_published_file:
            lines.append("NOT the published weights: the file's sha256 is not the one in its name")
        return "\n".join(lines)


def check_weights(
    recipe: Recipe, published: Published, loader: Loader, output: Path, world: World, name: str
) -> Comparison:
    """Evaluate published weights on a split; every rank calls this.

    Args:
        recipe: from `published_recipe`.
        published: from `find_published`.
        loader: this rank's slice of the split.
        output: the result goes to `output`/evaluation/`name`/.
        world: who takes part.
        name: of the evaluation.

    Raises UsageError when the dataset has classes that the weights do not know, or the weights
    cannot be had.
    """
    labels = label_map(loader.class_names, published.class_names, published.name)
    model = draw_model(recipe, len(published.class_names), world)
    _load(published.name, model, world)
    notice = why_slow_clips(recipe, world.device)
    if notice and world.is_first:
        log.info("%s", notice)
    frames = _ShortSides()
    accuracy, videos = evaluate(
        model,
        loader,
        recipe,
        world,
        num_classes=len(published.class_names),
        transform_batch=lambda batch: frames.note(with_labels(batch, labels)),
    )
    result = _compare(accuracy, published, len(loader.class_names))
    files = RunOutput(output, world, recipe)
    text = json.dumps(asdict(result), indent=1) + "\n"
    source = source_text(published.name, fingerprint(loader), accuracy.protocol)
    extra = {"published.json": text, SOURCE_NAME: source}
    page = files.save_evaluation(name, accuracy, videos, published.class_names, extra=extra)
    if world.is_first:
        log.info("%s", result)
        log.info("%d videos%s", accuracy.videos, accuracy.left_out)
        frames.warn(recipe)
        log.info("written to %s", page.parent)
    return result


def _load(name: str, model: torch.nn.Module, world: World) -> None:
    def load() -> None:
        tensors = find_weights(name).tensors
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            text = str(error).splitlines()[-1].strip()
            raise UsageError(
                f"--check-weights {name}: the file is of another network: {text}"
            ) from error

    rank_0_first(world, load)


def label_map(present: Sequence[str], known: Sequence[str], source: str) -> torch.Tensor:
    """Return, for each class of the dataset, its label among the weights' classes: int64.

    Raises UsageError, with the names, when the weights do not know a class.
    """
    places = {name: place for place, name in enumerate(known)}
    strange = [name for name in present if name not in places]
    if strange:
        close = difflib.get_close_matches(strange[0], known, n=1)
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise UsageError(
            f"--data has classes that {source} does not know: {strange[0]!r}{more}"
            + (f" (the nearest that it knows is {close[0]!r})" if close else "")
            + f"; give a dataset of its {len(known)} classes, or of some of them"
        )
    return torch.tensor([places[name] for name in present], dtype=torch.int64)


def with_labels(batch: ClipBatch, labels: torch.Tensor) -> ClipBatch:
    """Translate the labels of a batch; -1, for none, stays."""
    translated = labels[batch.label.clamp(min=0)]
    return replace(batch, label=torch.where(batch.label < 0, batch.label, translated))


class _ShortSides:
    """The smallest frames that came, to say where the protocol wants larger ones."""

    def __init__(self) -> None:
        self.least: int | None = None

    def note(self, batch: ClipBatch) -> ClipBatch:
        if len(batch):
            least = int(batch.size.min())
            self.least = least if self.least is None else min(self.least, least)
        return batch

    def warn(self, recipe: Recipe) -> None:
        wanted = recipe.augment.short_side or min(recipe.augment.resize)
        if self.least is not None and self.least < wanted:
            log.info(
                "the dataset's frames have a short side of %d, and the protocol enlarges them to "
                "%d: expect less than published",
                self.least, wanted,
            )  # fmt: skip


def _compare(accuracy: Accuracy, published: Published, classes_present: int) -> Comparison:
    values: dict[str, Any] = asdict(accuracy)
    level = published.protocol.level
    return Comparison(
        weights=published.name,
        level=level,
        top1=values[f"{level}_top1"],
        top5=values[f"{level}_top5"],
        published_top1=published.top1,
        published_top5=published.top5,
        videos=accuracy.videos,
        classes_present=classes_present,
        classes=len(published.class_names),
        is_published_file=_is_published_file(published),
        protocol=accuracy.protocol,
    )


def _is_published_file(published: Published) -> bool:
    path = Path(torch.hub.get_dir()) / "checkpoints" / published.file_name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(published.sha256_prefix)
