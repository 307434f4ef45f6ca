"""Exact evaluation: every clip of the split is scored once, however many ranks take part.

Each rank runs the unwrapped network over its own slice, of whatever length, with no collective in
the loop; afterwards rank 0 collects (key, view, label, scores) and counts. Nothing is padded, so
nothing has to be estimated; what cannot be scored is listed by name.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from prep.errors import KprepError, UsageError
from train.agreement import raise_together
from train.distributed import World, broadcast_buffers, broadcast_text, gather_to_first
from train.models import run_model
from train.transforms import eval_clips, video_on

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
    weights = ", averaged weights" if recipe.model.ema_decay else ""
    return (
        f"{recipe.eval.clips_per_video} x {recipe.eval_frames} frames @ {recipe.data.fps:g} fps, "
        f"{recipe.eval.placement} placement, centre crop{weights}"
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

    Raises, on all ranks, what `batches` raises on any of them; UsageError when no video of the
    split has a label, and KprepError when a clip arrives twice.
    """
    broadcast_buffers(world, model.buffers())
    scores, error = None, None
    try:
        scores = score_clips(
            model, batches, recipe, world.device, num_classes=num_classes, transform=transform_batch
        )
    except Exception as caught:  # noqa: BLE001 - the other ranks wait for this one
        error = caught
    raise_together(world, error)
    assert scores is not None  # noqa: S101 - for the type checker: there was no error
    parts = _gather_scores(world, scores)
    text = ""
    if world.is_first:
        result = count_hits(parts, protocol(recipe), sorted(unscored))
        text = json.dumps(asdict(result))
    values: dict[str, Any] = json.loads(broadcast_text(world, text))
    return Accuracy(**values)


@torch.inference_mode()
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
            clips = eval_clips(video_on(batch, device), recipe.augment)
            logits = run_model(model, clips, recipe, num_classes)
            probabilities.append(logits.float().softmax(dim=1).cpu())
    finally:
        for module, training in training_modes.items():
            module.training = training
    return Scores(keys, torch.cat(views), torch.cat(labels), torch.cat(probabilities))


def _gather_scores(world: World, scores: Scores) -> list[Scores]:
    """Return the scores of all ranks on rank 0, nothing elsewhere; as tensors, without pickle."""
    keys = gather_to_first(world, keys_to_tensor(scores.key))
    views = gather_to_first(world, scores.view)
    labels = gather_to_first(world, scores.label)
    probabilities = gather_to_first(world, scores.probability)
    return [
        Scores(tensor_to_keys(key), view, label, probability)
        for key, view, label, probability in zip(keys, views, labels, probabilities, strict=True)
    ]


def keys_to_tensor(keys: list[str]) -> torch.Tensor:
    """Return keys as uint8 (N, longest), padded with zero bytes; no key holds one."""
    encoded = [key.encode() for key in keys]
    longest = max(map(len, encoded), default=0)
    padded = b"".join(key.ljust(longest, b"\0") for key in encoded)
    if not padded:
        return torch.empty((len(keys), longest), dtype=torch.uint8)
    return torch.frombuffer(bytearray(padded), dtype=torch.uint8).view(len(keys), longest)


def tensor_to_keys(tensor: torch.Tensor) -> list[str]:
    """Invert `keys_to_tensor`, whatever the width that was padded to."""
    return [row.tobytes().rstrip(b"\0").decode() for row in tensor.numpy()]


def count_hits(parts: Sequence[Scores], protocol_text: str, unscored: list[str]) -> Accuracy:
    """Turn the scores of all ranks into accuracies.

    A video is all clips of one key. The result does not depend on how clips are spread over parts.
    Raises UsageError when nothing has a label, and KprepError when a (key, view) occurs twice.
    """
    clips = sorted(
        (
            (key, int(view), int(label), part.probability[row])
            for part in parts
            for row, (key, view, label) in enumerate(
                zip(part.key, part.view, part.label, strict=True)
            )
        ),
        key=lambda clip: clip[:2],
    )
    _refuse_repeats([clip[:2] for clip in clips])
    videos = {key: label for key, _, label, _ in clips}
    labeled = [clip for clip in clips if clip[2] >= 0]
    if not labeled:
        raise UsageError(
            "no video of the evaluation split could be scored against a label; "
            "evaluate a split that has labels, or train with --val-split none"
        )
    labels = torch.tensor([label for _, _, label, _ in labeled])
    probability = torch.stack([scores for _, _, _, scores in labeled]).double()
    video_probability, video_labels = _mean_by_video(
        [clip[0] for clip in labeled], probability, labels
    )
    clip_top1, clip_top5 = _top_shares(probability, labels)
    video_top1, video_top5 = _top_shares(video_probability, video_labels)
    return Accuracy(
        clip_top1=clip_top1,
        clip_top5=clip_top5,
        video_top1=video_top1,
        video_top5=video_top5,
        clips=len(labeled),
        videos=len(video_labels),
        unlabeled=sum(label < 0 for label in videos.values()),
        protocol=protocol_text,
        unscored=unscored,
    )


def _refuse_repeats(clips: list[tuple[str, int]]) -> None:
    """Raise KprepError where two neighbours of a sorted list are the same clip."""
    for before, after in itertools.pairwise(clips):
        if before == after:
            raise KprepError(
                f"clip {after[0]} (view {after[1]}) was scored twice; "
                "the ranks' slices must not overlap: check their rank and world size"
            )


def _mean_by_video(
    keys: list[str], probability: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Average the rows of each key; rows of one key stand together.

    Returns:
        float64 (videos, C) and int64 (videos,).
    """
    starts = [row for row, key in enumerate(keys) if row == 0 or keys[row - 1] != key]
    lengths = torch.tensor([b - a for a, b in itertools.pairwise([*starts, len(keys)])])
    video = torch.repeat_interleave(torch.arange(len(starts)), lengths)
    sums = torch.zeros(len(starts), probability.shape[1], dtype=probability.dtype)
    return sums.index_add_(0, video, probability) / lengths[:, None], labels[starts]


def _top_shares(probability: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Return the shares of rows whose label is the best, and among the best min(5, C)."""
    best = probability.topk(min(5, probability.shape[1]), dim=1).indices == labels[:, None]
    return best[:, 0].double().mean().item(), best.any(dim=1).double().mean().item()
