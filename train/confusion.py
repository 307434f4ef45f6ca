"""Which classes are recognised and which are taken for which: counts of videos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from train.accuracy import label_ranks

if TYPE_CHECKING:
    from train.scores import VideoScores


@dataclass(frozen=True)
class ClassResult:
    """What became of the videos of one class.

    label       index of the class
    videos      with this label that were scored
    top1, top5  those whose label was the best, among the best min(5, classes)
    predicted   videos, of any class, that were taken for this one
    """

    label: int
    videos: int
    top1: int
    top5: int
    predicted: int


@dataclass(frozen=True)
class Confusion:
    """Videos of class `label` that were taken for `prediction`, out of `of` with that label."""

    label: int
    prediction: int
    videos: int
    of: int


def confusion_matrix(scores: VideoScores) -> torch.Tensor:
    """Return int64 (C, C): rows are the true classes, columns the predicted ones."""
    classes = scores.probability.shape[1]
    labeled = scores.label >= 0
    cells = scores.label[labeled] * classes + scores.prediction[labeled]
    return torch.bincount(cells, minlength=classes * classes).view(classes, classes)


def class_results(scores: VideoScores) -> list[ClassResult]:
    """Return one result for each class, in label order; classes without videos included."""
    matrix = confusion_matrix(scores)
    labeled = scores.label >= 0
    ranks = label_ranks(scores.probability, scores.label)[labeled]
    top5 = torch.bincount(scores.label[labeled][ranks < 5], minlength=len(matrix))
    columns = (matrix.sum(dim=1), matrix.diagonal(), top5, matrix.sum(dim=0))
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [ClassResult(label, *row) for label, row in enumerate(rows)]


def worst_confusions(matrix: torch.Tensor, most: int = 50) -> list[Confusion]:
    """Return the pairs with the most videos; of equal ones, the larger share of its class first."""
    videos = matrix.sum(dim=1).tolist()
    wrong = matrix.clone().fill_diagonal_(0)
    found = [
        Confusion(label, prediction, int(wrong[label, prediction]), videos[label])
        for label, prediction in wrong.nonzero().tolist()
    ]
    found.sort(key=lambda pair: (-pair.videos, pair.of, pair.label, pair.prediction))
    return found[:most]
