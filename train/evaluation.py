"""Exact evaluation: every clip of the split is scored once, however many ranks take part.

Each rank runs the unwrapped network over its own slice, of whatever length, with no collective in
the loop; afterwards rank 0 collects (key, view, label, scores) and counts. Nothing is padded, so
nothing has to be estimated; what cannot be scored is listed by name.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from prep.errors import KprepError, UsageError
from train.distributed import World, broadcast_buffers, broadcast_text, gather_to_first
from train.models import check_logits
from train.transforms import eval_clips

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from stream.batch import ClipBatch
    from train.recipe import Recipe


@dataclass(frozen=True)
class Scores:
    """What the network says of N clips, on the CPU.

    key          N sample keys
    view         int64 (N,): which of the video's clips this is
    label        int64 (N,): the true class, -1 for none
    probability  float32 (N, C): softmax over the classes
    """

    key: list[str]
    view: torch.Tensor
    label: torch.Tensor
    probability: torch.Tensor


@dataclass(frozen=True)
class Accuracy:
    """The result of an evaluation, with the protocol that it was made by.

    Accuracies are shares in [0, 1]; `video_*` averages the probabilities of a video's clips. Top-5
    counts the best min(5, classes). `unscored` names what the loader could not score; videos
    without a label are counted in `unlabeled` and scored by nobody.
    """

    clip_top1: float
    clip_top5: float
    video_top1: float
    video_top5: float
    clips: int
    videos: int
    unlabeled: int
    protocol: str
    unscored: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Return one line for people."""
        missing = f", {len(self.unscored)} not scored" if self.unscored else ""
        missing += f", {self.unlabeled} without a label" if self.unlabeled else ""
        return (
            f"video top-1 {self.video_top1:.2%}, top-5 {self.video_top5:.2%}; "
            f"clip top-1 {self.clip_top1:.2%}, top-5 {self.clip_top5:.2%} "
            f"({self.videos} videos, {self.protocol}{missing})"
        )


def protocol(recipe: Recipe) -> str:
    """Return the protocol of evaluation, to stand beside the numbers."""
    return (
        f"{recipe.eval.clips_per_video} x {recipe.eval_frames} frames @ {recipe.data.fps:g} fps, "
        f"{recipe.eval.placement} placement, centre crop"
    )


def evaluate(
    model: torch.nn.Module,
    batches: Iterable[ClipBatch],
    recipe: Recipe,
    world: World,
    *,
    num_classes: int,
    unscored: Sequence[str] = (),
    transform_batch: Callable[[ClipBatch], ClipBatch] | None = None,
) -> Accuracy:
    """Score a split; every rank calls this and gets the same result.

    Args:
        model: the network itself, not wrapped in DDP; its mode is restored afterwards.
        batches: this rank's slice of the split, possibly empty.
        recipe: of the run.
        world: who takes part.
        num_classes: C, the classes of the manifest.
        unscored: keys of the split's clips that no rank can score.
        transform_batch: changes a decoded batch before it is prepared.

    Raises UsageError when no video of the split has a label, and KprepError when a clip arrives
    twice.
    """
    broadcast_buffers(world, model.buffers())
    scores = score_clips(
        model, batches, recipe, world.device, num_classes=num_classes, transform=transform_batch
    )
    parts = _gather_scores(world, scores)
    text = ""
    if world.is_first:
        result = count_hits(parts, protocol(recipe), sorted(unscored))
        text = json.dumps(asdict(result))
    values: dict[str, Any] = json.loads(broadcast_text(world, text))
    return Accuracy(**values)


def score_clips(
    model: torch.nn.Module,
    batches: Iterable[ClipBatch],
    recipe: Recipe,
    device: torch.device,
    *,
    num_classes: int,
    transform: Callable[[ClipBatch], ClipBatch] | None = None,
) -> Scores:
    """Run the network in eval mode over this process's batches."""
    training_modes = {module: module.training for module in model.modules()}
    model.eval()
    keys: list[str] = []
    views, labels = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    probabilities = [torch.empty(0, num_classes)]
    try:
        for raw in batches:
            batch = transform(raw) if transform else raw
            keys += batch.key
            views.append(batch.view)
            labels.append(batch.label)
            logits = forward(model, eval_input(batch, recipe, device), recipe)
            check_logits(logits, len(batch), num_classes, recipe.model.name)
            probabilities.append(logits.float().softmax(dim=1).cpu())
    finally:
        for module, training in training_modes.items():
            module.training = training
    return Scores(keys, torch.cat(views), torch.cat(labels), torch.cat(probabilities))


def eval_input(batch: ClipBatch, recipe: Recipe, device: torch.device) -> torch.Tensor:
    """Return the network's input for an evaluation batch, on the device."""
    return eval_clips(batch.video_on(device), recipe.augment)
