"""The comparison of loaders, tiny: the same clips and pixels from all, and every form of report."""

import argparse
import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import REPOSITORY
from stream_datasets import make_dataset

BENCHMARKS = REPOSITORY / "benchmarks"
sys.path.append(str(BENCHMARKS))

import nginx_bucket  # noqa: E402
from peers import processes  # noqa: E402
from peers.report import Cell, Measured, chart, markdown  # noqa: E402
from peers.truth import Truth  # noqa: E402
from stream_peers import Bench, incomplete  # noqa: E402

COPIES = 40
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
TITLES = {"local": "local disk", "far": "S3 + 30 ms"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_dataset(
        tmp_path_factory.mktemp("peers"), count=11
    )  # one is too short for 16 frames


@pytest.fixture(scope="module")
def results(root, tmp_path_factory) -> tuple[dict, str, Path]:
    """JSON, what was printed, and the folder of the files."""
    folder = tmp_path_factory.mktemp("out")
    command = [sys.executable, BENCHMARKS / "stream_peers.py", root, "--work", root.parent / "work",
               "--copies", COPIES, "--rounds", 1, "--seconds", 0.2, "--batch", 10, "--timeout", 300,
               "--milliseconds", 5, "--storages", "local", "far",
               "--json", folder / "found.json", "--markdown", folder / "found.md"]  # fmt: skip
    if HAS_MATPLOTLIB:
        command += ["--chart", folder / "found.png"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True,
                          timeout=1200, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text()), done.stdout, folder


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_all_loaders_give_the_clips_of_the_dataset(results):
    found, printed, _ = results
    installed = {name for name in processes.CONTENDERS if f"{name} is not installed" not in printed}
    assert installed >= {"kprep", "webdataset", "megatron-energon"}  # of the development setup
    places = {"local", "far"} if nginx_bucket.available() else {"local"}
    ways = {(one["contender"], one["place"]) for one in found["results"]}
    assert ways == {(name, place) for name in installed for place in places}
    for one in found["results"]:
        assert one["failures"] == [], one
        # a batch is 10 views; the program ends when a picture is another than the mp4's
        assert 0 < one["checked_pictures"]["median"] <= 10
        assert one["cpu_ms_per_clip"]["median"] > 0
    # an epoch has every clip as often as it is listed, and no other
    assert {name["way"][0] for name in found["counted"]} == (
        installed if "far" in places else set()
    )
    assert all(one["left_out"] == 0 for one in found["counted"]), found["counted"]


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_the_reports_hold_every_loader(results):
    found, printed, folder = results
    text = (folder / "found.md").read_text()
    assert text.strip() in printed
    rows = [line for line in text.splitlines() if line.startswith(("| local disk", "| S3"))]
    assert len(rows) == len(found["results"])
    if HAS_MATPLOTLIB:
        assert (folder / "found.png").read_bytes().startswith(b"\x89PNG")


def test_other_pictures_and_other_keys_are_refused(root):
    truth = Truth(root, 16)
    key, short = next(iter(truth._rows)), 1
    right = truth._crc32(key, 2)
    assert truth.check_pictures("one", [[key, 2, right]]) == 1
    assert (
        truth.check_pictures("one", [[f"{key}_03_00017", 2, right]]) == 1
    )  # an enlarged dataset's
    with pytest.raises(SystemExit, match=f"one gives other pictures than {key} has at 3"):
        truth.check_pictures("one", [[key, 3, right]])
    assert truth.check_keys("one", Counter({key: 2}), 3) == 3 * (len(truth) - short) - 2
    with pytest.raises(SystemExit, match="4 times in an epoch, not 3"):
        truth.check_keys("one", Counter({key: 4}), 3)
    with pytest.raises(SystemExit, match="gives nobody"):
        truth.check_keys("one", Counter({"nobody": 1}), 3)


def test_a_loader_that_hangs_is_ended_and_one_that_fails_is_quoted(tmp_path, monkeypatch):
    script = tmp_path / "child.py"
    monkeypatch.setattr(processes, "CHILD", script)
    children = processes.Children(tmp_path, timeout_seconds=0.5)
    script.write_text("import time; time.sleep(600)")
    with pytest.raises(processes.ChildFailedError, match=r"hung: 0\.5 s"):
        children.run(SimpleNamespace(contender="litdata", to_json=lambda: "{}"))
    children = processes.Children(tmp_path, timeout_seconds=60)
    script.write_text("raise ValueError('no such bucket')")
    with pytest.raises(
        processes.ChildFailedError, match="exit status 1: ValueError: no such bucket"
    ):
        children.prepare("litdata", tmp_path, tmp_path, 1)


def test_a_dataset_may_take_longer_to_write_than_a_loader_to_be_measured(tmp_path, monkeypatch):
    script = tmp_path / "child.py"
    script.write_text(
        "import pathlib, sys, time\ntime.sleep(0.2)\npathlib.Path(sys.argv[2]).write_text('{}')"
    )
    monkeypatch.setattr(processes, "CHILD", script)
    processes.Children(tmp_path, timeout_seconds=0.01).prepare("litdata", tmp_path, tmp_path, 1)


def test_a_contender_that_cannot_write_its_form_is_left_out(root, tmp_path, monkeypatch, capsys):
    script = tmp_path / "child.py"
    script.write_text("raise ValueError('no room')")
    monkeypatch.setattr(processes, "CHILD", script)
    asked = argparse.Namespace(root=root, frames=16, timeout=60, python=[], copies=1)
    bench = Bench(asked, tmp_path, None)
    assert bench.prepare(["kprep", "litdata", "webdataset"]) == ["kprep", "webdataset"]
    assert capsys.readouterr().out == (
        "litdata cannot write its form of the dataset and is left out: "
        "exit status 1: ValueError: no room\n"
    )
    assert not (tmp_path / "litdata.json").exists()


def test_a_failed_round_stands_below_the_table_and_not_in_it(tmp_path):
    good = {"clips_per_second": 100.0, "cpu_ms_per_clip": 2.0, "first_batch_seconds": 1.0,
            "warm_first_batch_seconds": 0.1, "imports_seconds": 1.0, "memory_bytes": 5e8}  # fmt: skip
    fine = Measured(
        Cell("kprep", "local", 1, together=False), [good, {**good, "clips_per_second": 120.0}]
    )
    bad = Measured(Cell("litdata", "far", 1, together=False), failures=["hung: 60 s"])
    lines = markdown([fine, bad], TITLES)
    assert any(line.startswith("| local disk | kprep | 110 (100 to 120) |") for line in lines)
    assert lines[-1] == "- litdata, S3 + 30 ms: 1 of 1 rounds failed (hung: 60 s)"
    assert not any("| litdata" in line for line in lines)
    if HAS_MATPLOTLIB:
        chart([fine, bad], TITLES, tmp_path / "chart.png")
        assert (tmp_path / "chart.png").stat().st_size > 1000


def test_epochs_that_fail_or_lack_clips_are_said():
    counted = [{"way": ("kprep", 1, False, False), "left_out": 5}, {"way": ("webdataset",), "left_out": 0},
               {"way": ("litdata",), "left_out": 14}, {"way": ("megatron-energon",), "failed": "hung: 9 s"}]  # fmt: skip
    assert incomplete(counted) == [
        "- litdata: an epoch lacks 14 clips",
        "- megatron-energon: an epoch without decoding failed (hung: 9 s)",
    ]
