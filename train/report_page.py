"""One self-contained HTML page: the curves of a run and the confusion matrix of an evaluation.

Whatever comes from data (names of classes, keys) reaches the page as JSON and is shown as text:
a class that is named like a tag is shown as its name.
"""

from __future__ import annotations

import html
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prep.text.html import script_json
from train.charts import Line, line_chart
from train.confusion import class_results, confusion_matrix, worst_confusions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from train.accuracy import Accuracy
    from train.scores import VideoScores

_TEMPLATE = Path(__file__).parent / "report_page.html"


def report_page(
    title: str,
    accuracy: Accuracy,
    scores: VideoScores,
    class_names: list[str],
    metrics: Sequence[dict[str, Any]],
) -> str:
    """Return the page as HTML.

    Args:
        title: what was evaluated, in a few words.
        accuracy: its result.
        scores: of all videos.
        class_names: in label order.
        metrics: the lines of `metrics.jsonl`, so far; [] where nothing was trained.
    """
    parts = {
        "title": html.escape(title),
        "charts": "".join(_charts(metrics)),
        "data": script_json(_data(accuracy, scores, class_names)),
    }
    template = _TEMPLATE.read_text(encoding="utf-8")
    # in one pass: what is filled in is never searched again
    return re.sub(r"\{\{(title|charts|data)\}\}", lambda match: parts[match[1]], template)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl` that are whole; [] where there is no such file."""
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            value = json.loads(line)
        except ValueError:  # cut off by a crash
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def _charts(metrics: Sequence[dict[str, Any]]) -> list[str]:
    train = [line for line in metrics if line.get("kind") == "train"]
    scored = [line for line in metrics if line.get("kind") == "eval"]
    accuracies = [
        Line(name.replace("_top", " top-"), _points(scored, name, 100))
        for name in ("video_top1", "video_top5", "clip_top1", "clip_top5")
    ]
    return [
        line_chart("Loss", [Line("training loss", _points(train, "loss"))], "step"),
        line_chart("Accuracy, %", accuracies, "step"),
        line_chart("Learning rate", [Line("learning rate", _points(train, "lr"))], "step"),
        line_chart(
            "Clips a second, data wait included",
            [Line("clips/s", _points(train, "clips_per_second"))],
            "step",
        ),
    ]


def _points(
    lines: Sequence[dict[str, Any]], name: str, factor: float = 1
) -> list[tuple[float, float]]:
    return [
        (float(line["step"]), factor * float(line[name]))
        for line in lines
        if isinstance(line.get("step"), int) and isinstance(line.get(name), int | float)
    ]


def _data(accuracy: Accuracy, scores: VideoScores, class_names: list[str]) -> dict[str, Any]:
    """Return what the page's script draws; of the matrix, the cells that are not zero."""
    matrix = confusion_matrix(scores)
    cells = [[row, column, int(matrix[row, column])] for row, column in matrix.nonzero().tolist()]
    return {
        "accuracy": asdict(accuracy),
        "names": class_names,
        "classes": [
            [result.videos, result.top1, result.top5, result.predicted]
            for result in class_results(scores)
        ],
        "cells": cells,
        "worst": [list(asdict(pair).values()) for pair in worst_confusions(matrix)],
    }
