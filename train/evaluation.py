"""Exact evaluation: every clip of the split is scored once, however many ranks take part.

Each rank runs the unwrapped network over its own slice, of whatever length, with no collective in
the loop; afterwards rank 0 collects (key, view, label, scores) and counts. Nothing is padded, so
nothing has to be estimated; what cannot be scored is listed by name.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from prep.errors import KprepError
from stream.loader import ClipLoader
from train.accuracy import Accuracy, count_hits
from train.agreement import raising_together
from train.bad_clips import check_damage
from train.distributed import World, broadcast_buffers, broadcast_text
from train.eval_transforms import eval_clips
from train.hooks import check_hook, transformed
from train.models import run_model
from train.protocol import check_clips, protocol
from train.scores import Scores, VideoScores, gather_keys, gather_scores
from train.transforms import video_on

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from stream.bad_clips import BadClip
    from stream.batch import ClipBatch
    from train.recipe import Recipe


def evaluate(
    model: torch.nn.Module,
    batches: Iterable[ClipBatch],
    recipe: Recipe,
    world: World,
    *,
    num_classes: int,
    unscored: Callable[[], Sequence[str]] | None = None,
    damaged: Callable[[], Iterable[BadClip]] | None = None,
    num_videos: int | None = None,
    is_averaged: bool = False,
    transform_batch: Callable[[ClipBatch], ClipBatch] | None = None,
) -> tuple[Accuracy, VideoScores | None]:
    """Score a split; every rank calls this.

    Args:
        model: the network itself, not wrapped in DDP; its mode is restored afterwards.
        batches: this rank's slice of the split, possibly empty: a `stream.ClipLoader`, which must
            give the clips of the recipe's protocol, or any batches.
        recipe: of the run.
        world: who takes part.
        num_classes: C, the classes of the manifest.
        unscored: returns the keys of the split's clips that this rank knows it cannot score; it is
            asked after the last batch, since damage is found only by reading. None: what a
            ClipLoader says, else nothing; so for the next two.
        damaged: returns those among them that are damaged, likewise.
        num_videos: of the whole split, which must all be scored or unscored.
        is_averaged: whether the network's weights are a moving average.
        transform_batch: changes a decoded batch before it is prepared.

    Returns:
        The accuracy, the same on every rank; the scores of all videos on rank 0, None elsewhere.

    Raises, on all ranks, what `batches` raises on any of them; UsageError for a ClipLoader of other
    clips and when no video of the split has a label, DatasetError when more than
    `eval.bad_clip_limit` videos are damaged, and KprepError when a clip arrives twice or a video
    not at all.
    """
    check_hook(transform_batch)
    loader = batches if isinstance(batches, ClipLoader) else None
    broadcast_buffers(world, model.buffers())
    with raising_together(world, Exception):
        if loader is not None:
            options = loader.stream.options
            check_clips(options, recipe, is_transformed=transform_batch is not None)
        scores = score_clips(
            model, batches, recipe, world.device, num_classes=num_classes, transform=transform_batch
        )
    if loader is not None:
        damaged = damaged or loader.bad_clip_summary().clips.values
        unscored = unscored or (lambda: loader.unscored)
        num_videos = loader.num_videos if num_videos is None else num_videos
    check_damage(world, damaged() if damaged else (), recipe.eval.bad_clip_limit)
    parts = gather_scores(world, scores)
    unfit = list(unscored()) if unscored else []
    missing = {key for keys in gather_keys(world, unfit) for key in keys}
    text, videos = "", None
    with raising_together(world, Exception):
        if world.is_first:
            how = protocol(recipe, is_averaged=is_averaged)
            accuracy, videos = count_hits(parts, recipe, how, sorted(missing))
            _check_complete(accuracy, num_videos or 0)
            text = json.dumps(asdict(accuracy))
    values: dict[str, Any] = json.loads(broadcast_text(world, text))
    return Accuracy(**values), videos


@torch.no_grad()  # what a network keeps of an inference-mode forward, no backward could use
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
    scores = [torch.empty(0, num_classes)]
    try:
        for raw in batches:
            batch = transformed(transform, raw) if transform else raw
            keys += batch.key
            views.append(batch.view)
            labels.append(batch.label)
            scores.append(_score_batch(model, video_on(batch, device), recipe, num_classes))
    finally:
        for module, training in training_modes.items():
            module.training = training
    return Scores(keys, torch.cat(views), torch.cat(labels), torch.cat(scores))


def _score_batch(
    model: torch.nn.Module, batch: ClipBatch, recipe: Recipe, num_classes: int
) -> torch.Tensor:
    """Return float32 (N, C) on the CPU: the mean over the crops, which pass one after the other."""
    total = torch.zeros(len(batch), num_classes, device=batch.video.device)
    clips = eval_clips(batch, recipe)
    for crop in clips:
        logits = run_model(model, crop, recipe, num_classes).float()
        total += logits if recipe.eval.average == "logits" else logits.softmax(dim=1)
    return (total / len(clips)).cpu()


def _check_complete(accuracy: Accuracy, num_videos: int) -> None:
    found = accuracy.videos + accuracy.unlabeled + len(accuracy.unscored)
    if found < num_videos:
        raise KprepError(
            f"{num_videos - found} of the split's {num_videos} videos were neither scored nor "
            "found unfit; the ranks' slices must cover it: check their rank and world size"
        )
