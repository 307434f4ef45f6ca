"""What the network says of clips, and how the ranks' shares of it come together on rank 0."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from prep.errors import DatasetError, KprepError
from train.distributed import World, gather_to_first

if TYPE_CHECKING:
    from collections.abc import Sequence

# Rows that are turned into float64 at a time: 4,096 x 400 classes are 13 MB.
_CHUNK = 4096


@dataclass(frozen=True)
class Scores:
    """What the network says of N clips, on the CPU.

    key    N sample keys
    view   int64 (N,): which of the video's clips this is
    label  int64 (N,): the true class, -1 for none
    score  float32 (N, C): probabilities or logits, by `eval.average`; the mean over the crops
    """

    key: list[str]
    view: torch.Tensor
    label: torch.Tensor
    score: torch.Tensor


@dataclass(frozen=True)
class VideoScores:
    """What the network says of V videos, in the order of their keys, on the CPU.

    key          V sample keys, each once
    label        int64 (V,): the true class, -1 for none
    probability  float64 (V, C): of the classes, by all clips and crops of the video
    clips        clips that each video was scored by
    """

    key: list[str]
    label: torch.Tensor
    probability: torch.Tensor
    clips: int

    @property
    def prediction(self) -> torch.Tensor:
        """Most probable class, int64 (V,); the first of equals."""
        return torch.from_numpy(self.probability.numpy().argmax(axis=1))


def gather_scores(world: World, scores: Scores) -> list[Scores]:
    """Return the scores of all ranks on rank 0, [] elsewhere; as tensors, without pickle."""
    keys = gather_keys(world, scores.key)
    views = gather_to_first(world, scores.view)
    labels = gather_to_first(world, scores.label)
    values = gather_to_first(world, scores.score)
    return [
        Scores(key, view, label, score)
        for key, view, label, score in zip(keys, views, labels, values, strict=True)
    ]


def gather_keys(world: World, keys: Sequence[str]) -> list[list[str]]:
    """Return the keys of every rank on rank 0, [] elsewhere."""
    return [tensor_to_keys(part) for part in gather_to_first(world, keys_to_tensor(keys))]


def keys_to_tensor(keys: Sequence[str]) -> torch.Tensor:
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


def sorted_clips(parts: Sequence[Scores]) -> Scores:
    """Return the clips of all parts in the order of (key, view), however they were spread.

    Raises KprepError when a (key, view) occurs twice or a score is not finite, and DatasetError
    for a label that is no class.
    """
    keys = [key for part in parts for key in part.key]
    views = torch.cat([part.view for part in parts])
    places = views.tolist()
    order = sorted(range(len(keys)), key=lambda row: (keys[row], places[row]))
    clips = Scores(
        [keys[row] for row in order],
        views[order],
        torch.cat([part.label for part in parts])[order],
        torch.cat([part.score for part in parts])[order],
    )
    _check_clips(clips)
    return clips


def _check_clips(clips: Scores) -> None:
    named = zip(clips.key, clips.view.tolist(), strict=True)
    for before, after in itertools.pairwise(named):
        if before == after:
            raise KprepError(
                f"clip {after[0]} (view {after[1]}) was scored twice; "
                "the ranks' slices must not overlap: check their rank and world size"
            )
    lost = (~clips.score.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if lost:
        raise KprepError(
            f"the network's scores of {len(lost)} clips are not finite, of {clips.key[lost[0]]} "
            "the first; evaluate an earlier checkpoint, or in float32 if run.precision is another"
        )
    classes = clips.score.shape[1]
    unknown = (clips.label >= classes).nonzero().flatten().tolist()
    if unknown:
        raise DatasetError(
            f"clip {clips.key[unknown[0]]} has label {int(clips.label[unknown[0]])} of {classes} "
            "classes"
        )


def complete_videos(clips: Scores, clips_per_video: int) -> tuple[Scores, list[str]]:
    """Return the clips of the videos that have all of them, and the keys of the other videos.

    Takes clips in the order of (key, view).
    """
    kept: list[int] = []
    partial: list[str] = []
    for key, group in itertools.groupby(range(len(clips.key)), key=clips.key.__getitem__):
        rows = list(group)
        if len(rows) == clips_per_video:
            kept += rows
        else:
            partial.append(key)
    chosen = Scores(
        [clips.key[row] for row in kept], clips.view[kept], clips.label[kept], clips.score[kept]
    )
    return chosen, partial


def join_videos(clips: Scores, clips_per_video: int, average: str) -> VideoScores:
    """Average the clips of each video.

    Args:
        clips: all clips of every video, in the order of (key, view).
        clips_per_video: rows of one video.
        average: "probabilities", or "logits": the softmax is then taken of their mean.
    """
    videos = len(clips.key) // clips_per_video
    mean = torch.empty(videos, clips.score.shape[1], dtype=torch.float64)
    for first in range(0, videos, _CHUNK):
        rows = clips.score[first * clips_per_video : (first + _CHUNK) * clips_per_video]
        grouped = rows.double().reshape(-1, clips_per_video, rows.shape[1])
        mean[first : first + _CHUNK] = grouped.mean(dim=1)
    if average == "logits":
        mean = mean.softmax(dim=1)
    return VideoScores(
        clips.key[::clips_per_video], clips.label[::clips_per_video], mean, clips_per_video
    )
