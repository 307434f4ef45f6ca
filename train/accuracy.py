"""From scores to accuracies: counting only, the same for any spread of clips over ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from prep.errors import UsageError
from train.scores import VideoScores, complete_videos, join_videos, sorted_clips

if TYPE_CHECKING:
    from collections.abc import Sequence

    from train.recipe import Recipe
    from train.scores import Scores

_NAMED = 3
_CHUNK = 4096


@dataclass(frozen=True)
class Accuracy:
    """The result of an evaluation, with the protocol that it was made by.

    Accuracies are shares in [0, 1]. `video_*` counts videos, by the mean over their clips and
    crops; `clip_*` counts clips, by the mean over their crops. Top-5 counts the best min(5,
    classes). `mean_class_top1` is the mean over the classes that occur of their video top-1.

    A video counts only with all its clips: `unscored` names those that are too short, damaged, or
    lack one of their clips, and none of their clips counts. Videos without a label are counted in
    `unlabeled` and in no accuracy.
    """

    clip_top1: float
    clip_top5: float
    video_top1: float
    video_top5: float
    mean_class_top1: float
    clips: int
    videos: int
    unlabeled: int
    protocol: str
    unscored: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Return one line for people."""
        return (
            f"video top-1 {self.video_top1:.2%}, top-5 {self.video_top5:.2%}; "
            f"clip top-1 {self.clip_top1:.2%}, top-5 {self.clip_top5:.2%} "
            f"({self.videos} videos; {self.protocol}{self.left_out})"
        )

    @property
    def left_out(self) -> str:
        """Return a clause on the videos that entered no accuracy; "" where there are none."""
        missing = f"; not scored: {some_of(self.unscored)}" if self.unscored else ""
        return missing + (f"; {self.unlabeled} without a label" if self.unlabeled else "")


def some_of(names: Sequence[str]) -> str:
    """Return how many names there are, and the first of them."""
    more = ", …" if len(names) > _NAMED else ""
    return f"{len(names)} ({', '.join(names[:_NAMED])}{more})"


def count_hits(
    parts: Sequence[Scores], recipe: Recipe, protocol: str, unscored: Sequence[str]
) -> tuple[Accuracy, VideoScores]:
    """Turn the scores of all ranks into accuracies and the scores of all videos.

    A video is all clips of one key. Raises UsageError when no video has a label, and what
    `sorted_clips` raises.
    """
    expected = recipe.eval.clips_per_video
    clips, partial = complete_videos(sorted_clips(parts), expected)
    videos = join_videos(clips, expected, recipe.eval.average)
    has_label = videos.label >= 0
    # a loader may still name what was damaged in an earlier epoch and is whole again
    missing = sorted({*unscored, *partial} - set(videos.key))
    if not has_label.any():
        reasons = f"{len(videos.key)} have none, {len(missing)} were not scored"
        if partial:
            reasons += f", {len(partial)} of them for want of all {expected} clips"
        raise UsageError(
            f"no video of the evaluation split could be scored against a label ({reasons}); "
            "evaluate a split that has labels, or train with --val-split none"
        )
    clip_ranks = label_ranks(clips.score, clips.label)[clips.label >= 0]
    video_ranks = label_ranks(videos.probability, videos.label)[has_label]
    accuracy = Accuracy(
        clip_top1=_share(clip_ranks, 1),
        clip_top5=_share(clip_ranks, 5),
        video_top1=_share(video_ranks, 1),
        video_top5=_share(video_ranks, 5),
        mean_class_top1=_mean_of_classes(videos.label[has_label], video_ranks == 0),
        clips=len(clip_ranks),
        videos=len(video_ranks),
        unlabeled=int((~has_label).sum()),
        protocol=protocol,
        unscored=missing,
    )
    return accuracy, videos


def label_ranks(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return how many classes stand before each row's label; equal scores in class order.

    Args:
        scores: (N, C), finite.
        labels: int64 (N,); the result of a row without a label, -1, has no meaning.

    Returns:
        int64 (N,).
    """
    ranks = torch.empty(len(labels), dtype=torch.int64)
    classes = torch.arange(scores.shape[1])
    for first in range(0, len(labels), _CHUNK):
        rows, own = scores[first : first + _CHUNK], labels[first : first + _CHUNK, None]
        reached = rows.gather(1, own.clamp(min=0))
        before = (rows > reached) | ((rows == reached) & (classes < own))
        ranks[first : first + _CHUNK] = before.sum(dim=1)
    return ranks


def _share(ranks: torch.Tensor, best: int) -> float:
    return (ranks < best).double().mean().item()


def _mean_of_classes(labels: torch.Tensor, hits: torch.Tensor) -> float:
    videos = torch.bincount(labels)
    right = torch.bincount(labels, weights=hits.double())
    present = videos > 0
    return (right[present] / videos[present]).mean().item()
