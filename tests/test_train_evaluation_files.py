"""What an evaluation leaves on disk, and the page: data of strangers is shown, never run."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_train_evaluation import _count

from prep.errors import KprepError
from train.charts import Line, line_chart, ticks
from train.confusion import (
    ClassResult,
    Confusion,
    class_results,
    confusion_matrix,
    worst_confusions,
)
from train.distributed import World
from train.evaluation_files import source_text, write_evaluation
from train.output import RunOutput
from train.recipe import Recipe
from train.report_page import read_metrics, report_page

if TYPE_CHECKING:
    from pathlib import Path

    from train.accuracy import Accuracy
    from train.scores import VideoScores

CPU = World(0, 1, torch.device("cpu"), None)
NAMES = ["run", "</script><script>alert(1)</script>", 'a "quoted", name', "=cmd|' /C calc'!A0"]


def _evaluation() -> tuple[Accuracy, VideoScores]:
    """Six videos: run is taken twice for class 1; one has no label."""
    rows = [(0, [0.6, 0.2, 0.1, 0.1]), (0, [0.2, 0.6, 0.1, 0.1]), (0, [0.1, 0.7, 0.1, 0.1]),
            (1, [0.1, 0.7, 0.1, 0.1]), (2, [0.4, 0.3, 0.2, 0.1]), (-1, [0.1, 0.1, 0.7, 0.1])]  # fmt: skip
    named = [(f"v{n}", 0, label, scores) for n, (label, scores) in enumerate(rows)]
    return _count(named, 1, ("<b>short",))


def test_classes_and_confusions_by_hand() -> None:
    _, videos = _evaluation()
    matrix = confusion_matrix(videos)
    assert matrix.tolist() == [[1, 2, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert class_results(videos) == [
        ClassResult(0, videos=3, top1=1, top5=3, predicted=2),
        ClassResult(1, videos=1, top1=1, top5=1, predicted=3),
        ClassResult(2, videos=1, top1=0, top5=1, predicted=0),
        ClassResult(3, videos=0, top1=0, top5=0, predicted=0),
    ]
    assert worst_confusions(matrix) == [Confusion(0, 1, 2, 3), Confusion(2, 0, 1, 1)]
    assert worst_confusions(matrix, most=1) == [Confusion(0, 1, 2, 3)]


def test_the_files_hold_what_was_counted(tmp_path: Path) -> None:
    accuracy, videos = _evaluation()
    write_evaluation(tmp_path / "epoch-0001", accuracy, videos, NAMES)
    folder = tmp_path / "epoch-0001"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-0001"]
    rows = pq.read_table(folder / "videos.parquet").to_pylist()
    assert [row["key"] for row in rows] == ["v0", "v1", "v2", "v3", "v4", "v5"]
    assert [row["label"] for row in rows] == [0, 0, 0, 1, 2, None]
    assert [row["prediction"] for row in rows] == [0, 1, 1, 1, 0, 2]
    assert {row["clips"] for row in rows} == {1}
    assert (rows[1]["label_name"], rows[1]["prediction_name"]) == (NAMES[0], NAMES[1])
    assert rows[5]["label_name"] is None
    assert rows[0]["probabilities"] == pytest.approx([0.6, 0.2, 0.1, 0.1])
    about = pq.read_schema(folder / "videos.parquet").metadata
    assert json.loads(about[b"classes"]) == NAMES
    assert about[b"protocol"] == b"by hand"
    with (folder / "classes.csv").open(newline="") as file:
        first, *_, last = csv.DictReader(file)
    assert (first["name"], float(first["top1"])) == ("run", pytest.approx(1 / 3))
    assert (first["taken_for"], first["taken_for_videos"]) == (NAMES[1], "2")
    assert (last["name"], last["videos"], last["top1"], last["taken_for"]) == (
        NAMES[3],
        "0",
        "",
        "",
    )
    with (folder / "confusion.csv").open(newline="") as file:
        table = list(csv.reader(file))
    assert table[0] == ["", *NAMES]
    assert [row[0] for row in table[1:]] == NAMES
    assert [[int(cell) for cell in row[1:]] for row in table[1:]] == confusion_matrix(
        videos
    ).tolist()
    found = json.loads((folder / "summary.json").read_text())
    assert (found["protocol"], found["unscored"], found["unlabeled"]) == (
        "by hand",
        ["<b>short"],
        1,
    )
    assert found["worst_confusions"][0] == {
        "label": "run",
        "prediction": NAMES[1],
        "videos": 2,
        "of": 3,
    }


def test_an_evaluation_is_replaced_whole_and_left_overs_are_removed(tmp_path: Path) -> None:
    accuracy, videos = _evaluation()
    for left in (".a.123.tmp", ".a.77.old", ".b.123.tmp"):
        (tmp_path / left).mkdir()
    write_evaluation(tmp_path / "a", accuracy, videos, NAMES, {"published.json": "{}"})
    assert (tmp_path / "a" / "published.json").read_text() == "{}"
    write_evaluation(tmp_path / "a", accuracy, videos, NAMES)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.123.tmp", "a"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "classes.csv", "confusion.csv", "summary.json", "videos.parquet",
    ]  # fmt: skip


def test_a_writer_that_is_killed_leaves_the_old_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracy, videos = _evaluation()
    write_evaluation(tmp_path / "a", accuracy, videos, NAMES)
    before = (tmp_path / "a" / "videos.parquet").read_bytes()

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("train.evaluation_files.pq.write_table", die)
    with pytest.raises(KeyboardInterrupt):
        write_evaluation(tmp_path / "a", accuracy, videos, NAMES)
    assert (tmp_path / "a" / "videos.parquet").read_bytes() == before


def test_a_directory_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "evaluation").write_text("a file")
    accuracy, videos = _evaluation()
    with pytest.raises(KprepError, match=r"evaluation .*/evaluation/x cannot be written"):
        RunOutput(tmp_path, CPU, Recipe()).save_evaluation("x", accuracy, videos, NAMES)


def test_results_of_other_weights_clips_or_protocols_are_kept(tmp_path: Path) -> None:
    accuracy, videos = _evaluation()
    output = RunOutput(tmp_path / "run", CPU, Recipe())
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "final.pt").touch()

    def save(weights: object, clips: str = "0", protocol: str = "by hand") -> str:
        extra = {"source.json": source_text(str(weights), clips, protocol)}
        page = output.save_evaluation("test-val-final", accuracy, videos, NAMES, extra=extra)
        assert page.exists()
        return page.parent.name

    first, other = tmp_path / "a" / "final.pt", tmp_path / "b" / "final.pt"
    assert save(first) == "test-val-final"
    assert save(other) == "test-val-final-2"
    assert save(first, clips="1") == "test-val-final-3"
    assert save(first, protocol="another") == "test-val-final-4"
    assert save(other) == "test-val-final-2"
    assert save(tmp_path / "b" / ".." / "a" / "final.pt") == "test-val-final"
    (tmp_path / "run/evaluation/test-val-final-2/source.json").unlink()
    assert save(other) == "test-val-final-5"


class _Reader(HTMLParser):
    """Collects a page's elements, its texts and what it would load or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[dict[str, str | None]] = []
        self.texts: list[str] = []
        self.loads: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "script":
            self.scripts.append(values)
        self.loads += [str(values[name]) for name in ("src", "href", "srcset") if name in values]
        assert not any(name.startswith("on") for name in values)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


METRICS = [
    {"kind": "train", "step": step, "loss": 2 - step / 20, "lr": 0.1, "clips_per_second": 9.0}
    for step in range(1, 11)
] + [
    {
        "kind": "eval",
        "step": 10,
        "video_top1": 0.4,
        "video_top5": 1.0,
        "clip_top1": 0.4,
        "clip_top5": 1.0,
    }
]


def _data_of(page: str) -> dict[str, object]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_page_is_self_contained_and_shows_names_as_text() -> None:
    accuracy, videos = _evaluation()
    title = 'run "x": <img src=x onerror=alert(1)> {{data}}'
    page = report_page(title, accuracy, videos, NAMES, METRICS)
    reader = _Reader(page)
    assert len(reader.scripts) == 2  # the data, and the page's own
    assert reader.loads == []
    assert "://" not in page
    assert "default-src 'none'" in page
    assert title in reader.texts
    data = _data_of(page)
    assert data["names"] == NAMES
    assert data["accuracy"]["unscored"] == ["<b>short"]
    assert data["cells"] == [[0, 0, 1], [0, 1, 2], [1, 1, 1], [2, 0, 1]]
    assert data["worst"] == [[0, 1, 2, 3], [2, 0, 1, 1]]
    assert data["classes"][0] == [3, 1, 3, 2]
    assert page.count("<svg") == 4
    assert {"training loss", "video top-1", "clip top-5", "clips/s"} <= set(reader.texts)
    assert report_page("t", accuracy, videos, NAMES, []).count("<svg") == 0


@given(st.lists(st.text(), min_size=4, max_size=4, unique=True))
def test_any_names_survive_the_page(names: list[str]) -> None:
    accuracy, videos = _evaluation()
    page = report_page("t", accuracy, videos, names, [])
    assert len(_Reader(page).scripts) == 2
    assert _data_of(page)["names"] == names


def test_metrics_that_a_crash_cut_off_are_read_as_far_as_they_go(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"kind": "train", "step": 1}\n[1]\n{"kind": "tr')
    assert read_metrics(path) == [{"kind": "train", "step": 1}]


def test_charts_leave_out_what_is_not_finite_and_thin_what_is_many() -> None:
    assert line_chart("t", [Line("a", []), Line("b", [(1, float("nan"))])], "x") == ""
    many = line_chart("t", [Line("a", [(n, n % 7) for n in range(5000)])], "x")
    points = re.findall(r'points="([^"]*)"', many)
    assert [len(line.split()) for line in points] == [1000]
    assert "<circle" in line_chart("t", [Line("a", [(3, 3)])], "x")
    assert "&lt;b&gt;" in line_chart("<b>", [Line("<b>", [(1, 2)])], "x")
    assert "<b>" not in line_chart("<b>", [Line("<b>", [(1, 2)])], "<b>")


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e6))
def test_ticks_are_round_few_and_around_the_values(least: float, room: float) -> None:
    most = least + room
    found = ticks(least, most)
    assert found[0] <= least + 1e-9
    assert found[-1] >= most - 1e-9 * abs(most)
    assert 2 <= len(found) <= 8
    mantissa = float(f"{found[1] - found[0]:.6e}".partition("e")[0])
    assert min(abs(mantissa - round_one) for round_one in (1, 2, 5)) < 1e-5


def test_the_page_works_with_700_classes() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = [
        (f"v{n}", 0, n % 700, torch.rand(700, generator=generator).tolist()) for n in range(2100)
    ]
    accuracy, videos = _count(rows)
    page = report_page("t", accuracy, videos, [f"class {n}" for n in range(700)], METRICS)
    assert sum(count for _, _, count in _data_of(page)["cells"]) == 2100
    assert len(page) < 400_000
