"""What an evaluation leaves on disk: one directory, complete or not there.

summary.json     accuracies, protocol, worst confusions, videos without a score
classes.csv      one line for each class
confusion.csv    videos by true class (lines) and predicted class (columns)
videos.parquet   one row for each video: key, label, prediction, clips, probabilities
source.json      of one without training: the weights, the fingerprint of the clips, the protocol
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
from contextlib import suppress
from dataclasses import asdict
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from prep.storage import sync_path
from train.confusion import class_results, confusion_matrix, worst_confusions

if TYPE_CHECKING:
    from collections.abc import Iterable

    from train.accuracy import Accuracy
    from train.scores import VideoScores

SOURCE_NAME = "source.json"


def source_text(weights: str, clips: str, protocol: str) -> str:
    """Return the text of source.json: what an evaluation without training is a result of."""
    # a file of this name elsewhere is another one
    place = str(Path(weights).resolve()) if Path(weights).is_file() else weights
    return json.dumps({"weights": place, "clips": clips, "protocol": protocol}, indent=1) + "\n"


def place_of_test(directory: Path, source: str) -> Path:
    """Return the first of DIRECTORY, DIRECTORY-2, … that no result of another source stands in."""
    numbered = (directory.with_name(f"{directory.name}-{number}") for number in count(2))
    return next(place for place in chain([directory], numbered) if _is_free(place, source))


def _is_free(place: Path, source: str) -> bool:
    if not place.exists():
        return True
    with suppress(FileNotFoundError, UnicodeDecodeError):  # whose result it is nobody knows
        return (place / SOURCE_NAME).read_text(encoding="utf-8") == source
    return False


def write_evaluation(
    directory: Path,
    accuracy: Accuracy,
    scores: VideoScores,
    class_names: list[str],
    extra: dict[str, str] | None = None,
) -> None:
    """Write all files of an evaluation, in place of what an earlier one left in `directory`.

    `extra` holds further files: their names and texts. Raises OSError when they cannot be written.
    """
    texts = {
        "summary.json": json.dumps(summary(accuracy, scores, class_names), indent=1) + "\n",
        "classes.csv": _classes_csv(scores, class_names),
        "confusion.csv": _confusion_csv(scores, class_names),
        **(extra or {}),
    }
    directory.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(directory)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    for name, text in texts.items():
        (temporary / name).write_text(text, encoding="utf-8")
    _write_videos(temporary / "videos.parquet", accuracy, scores, class_names)
    for path in temporary.iterdir():
        sync_path(path)
    sync_path(temporary)
    if directory.exists():
        directory.rename(directory.with_name(f".{directory.name}.{os.getpid()}.old"))
    temporary.rename(directory)
    sync_path(directory.parent)
    _remove_leftovers(directory)


def summary(accuracy: Accuracy, scores: VideoScores, class_names: list[str]) -> dict[str, Any]:
    """Return what stands in summary.json."""
    confusions = [
        {
            "label": class_names[pair.label],
            "prediction": class_names[pair.prediction],
            "videos": pair.videos,
            "of": pair.of,
        }
        for pair in worst_confusions(confusion_matrix(scores))
    ]
    return {**asdict(accuracy), "classes": len(class_names), "worst_confusions": confusions}


def _classes_csv(scores: VideoScores, class_names: list[str]) -> str:
    worst: dict[int, tuple[int, int]] = {}
    for pair in worst_confusions(confusion_matrix(scores), most=len(class_names) ** 2):
        worst.setdefault(pair.label, (pair.prediction, pair.videos))
    rows: list[list[object]] = [
        ["label", "name", "videos", "top1", "top5", "predicted", "taken_for", "taken_for_videos"]
    ]
    for result in class_results(scores):
        other, videos = worst.get(result.label, (None, 0))
        shares = [
            count / result.videos if result.videos else "" for count in (result.top1, result.top5)
        ]
        name = "" if other is None else class_names[other]
        rows.append(
            [result.label, class_names[result.label], result.videos, *shares, result.predicted,
             name, videos]
        )  # fmt: skip
    return _csv(rows)


def _confusion_csv(scores: VideoScores, class_names: list[str]) -> str:
    matrix = confusion_matrix(scores).tolist()
    lines = ([name, *row] for name, row in zip(class_names, matrix, strict=True))
    return _csv([["", *class_names], *lines])


def _csv(rows: Iterable[Iterable[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _write_videos(
    path: Path, accuracy: Accuracy, scores: VideoScores, class_names: list[str]
) -> None:
    """Write the rows in the order of their keys; probabilities are float32."""
    names = pa.array(class_names, pa.string())
    labels = scores.label.tolist()
    label = pa.array([None if value < 0 else value for value in labels], pa.int32())
    prediction = pa.array(scores.prediction.tolist(), pa.int32())
    flat = pa.array(scores.probability.float().flatten().numpy())
    columns = {
        "key": pa.array(scores.key, pa.string()),
        "label": label,
        "label_name": names.take(label),
        "prediction": prediction,
        "prediction_name": names.take(prediction),
        "clips": pa.array([scores.clips] * len(scores.key), pa.int32()),
        "probabilities": pa.FixedSizeListArray.from_arrays(flat, len(class_names)),
    }
    about = {"protocol": accuracy.protocol, "classes": json.dumps(class_names)}
    table = pa.table(columns).replace_schema_metadata(about)
    pq.write_table(
        table,
        path,
        compression="zstd",
        use_dictionary=["label_name", "prediction_name"],
        use_byte_stream_split=["probabilities.list.element"],
    )


def _remove_leftovers(directory: Path) -> None:
    """Remove what a killed writer left of this evaluation; only rank 0 of a run writes."""
    form = re.compile(rf"\.{re.escape(directory.name)}\.\d+\.(tmp|old)")
    for path in directory.parent.iterdir():
        if form.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def abandon_evaluations(directory: Path, epoch: int) -> None:
    """Move the evaluations after more than `epoch` epochs into `abandoned/`.

    For a run that goes back: they are not of its own way. Raises OSError.
    """
    abandoned = directory / "abandoned"
    for path in list(directory.glob("epoch-*")):
        number = path.name.removeprefix("epoch-")
        if number.isdecimal() and int(number) > epoch:
            abandoned.mkdir(exist_ok=True)
            shutil.rmtree(abandoned / path.name, ignore_errors=True)
            path.replace(abandoned / path.name)
