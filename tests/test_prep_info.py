"""`kprep info`: for a terminal of 80 columns, for programs, on disk and in a bucket."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run_kprep
from report_datasets import CLASSES, large_dataset

from prep.errors import DatasetError
from prep.info import write_ledger_csv
from prep.info_command import info_lines
from prep.plain_text import setting_text
from prep.storage import Storage

SPLIT_FIELDS = {"clips", "rows", "hours", "bytes", "shards", "short_clips", "outcomes", "failures",
                "sources", "clips_by_class", "clips_without_class", "settings", "tools",
                "fingerprint"}  # fmt: skip
FIELDS = {"info_version", "root", "format_version", "profile", "class_names", "splits",
          "unfinished", "terms"}  # fmt: skip


def test_json_says_what_the_dataset_holds(motion_dataset):
    values = json.loads(run_kprep("info", motion_dataset, "--json").stdout)
    assert set(values) == FIELDS
    assert (values["info_version"], values["format_version"]) == (1, 1)
    assert values["class_names"] == ["down", "left", "right", "up"]
    assert values["profile"]["fps"] == "15/1"
    assert values["unfinished"] == {}
    train, val = values["splits"]["train"], values["splits"]["val"]
    assert set(train) == set(val) == SPLIT_FIELDS
    assert (train["clips"], train["rows"], val["clips"]) == (160, 163, 40)  # conftest.motion_videos
    assert train["clips_by_class"] == [40, 40, 40, 40]
    assert train["failures"] == {"empty file": 1, "truncated": 1, "unsafe input": 1}
    assert train["outcomes"] == {"ok": 160, "failed": 3, "duplicate": 0, "pending": 0}
    assert train["sources"] == {"folder": 160}
    tars = sum(path.stat().st_size for path in (motion_dataset / "train").glob("*.tar"))
    assert train["bytes"] == tars
    # 160 clips of 1.5 to 3 s (demo_videos.random_motion)
    assert 160 * 1.5 / 3600 < train["hours"] < 160 * 3 / 3600
    assert "folder: unknown to kprep" in values["terms"][0]


def test_every_field_of_the_json_is_documented():
    guide = (Path(__file__).parent.parent / "docs" / "guide.md").read_text()
    for name in FIELDS | SPLIT_FIELDS:
        assert f"`{name}`" in guide, name


def test_the_text_fits_80_columns_and_cuts_nothing(odd_dataset):
    text = run_kprep("info", odd_dataset).stdout
    assert max(len(line) for line in text.splitlines()) <= 80
    joined = " ".join(text.split())
    for name in CLASSES:
        assert name in joined
    for wanted in ("13 clips", "split train", "10: 9 ok, 1 failed", "1 missing", "source folder",
                   "ffmpeg version", "unknown to kprep"):  # fmt: skip
        assert wanted in joined
    assert "…" not in text  # four classes


def test_long_names_go_on_below_and_a_terminal_obeys_none():
    reason = "a reason of many words " * 9 + "x" * 200 + "\x1b[31m\rred"
    begun = {"train": ({"ok": 3, "failed": 2}, {reason: 2})}
    lines = info_lines("/folder/" + "y" * 120, None, begun)
    assert max(len(line) for line in lines) <= 80
    text = "".join(lines)
    assert "\x1b" not in text
    assert "\r" not in text
    assert "".join(reason.split())[:300] in "".join(text.split())


def test_a_bucket_and_a_folder_say_the_same(odd_dataset, s3):
    url = s3.upload(odd_dataset, "info-odd")
    there = json.loads(run_kprep("info", url, "--json", **s3.environment).stdout)
    here = json.loads(run_kprep("info", odd_dataset, "--json").stdout)
    assert there["root"] == url
    assert {**there, "root": ""} == {**here, "root": ""}


def test_a_split_in_the_making_is_in_the_json(tmp_path, motion_videos):
    from prep.journal import Journal

    work = tmp_path / "root/.kprep-work/train"
    work.mkdir(parents=True)
    journal = Journal(work / "journal.sqlite", "train")
    journal.set("identity", {})
    journal.close()
    values = json.loads(run_kprep("info", tmp_path / "root", "--json").stdout)
    assert set(values) == FIELDS
    assert values["profile"] is None
    assert [*values["unfinished"]] == ["train"]
    assert "split train, not published yet" in run_kprep("info", tmp_path / "root").stdout


@pytest.mark.parametrize("path", ["index/val.parquet", "ledger/val.parquet"])
def test_a_replaced_file_is_refused_in_one_sentence(motion_dataset, tmp_path, path):
    root = Path(shutil.copytree(motion_dataset, tmp_path / "root"))
    shutil.copyfile(root / path.replace("val", "train"), root / path)
    done = run_kprep("info", root, check=False)
    assert done.returncode == 1
    assert f"{path} is not the file that the manifest lists; run `kprep verify`" in done.stderr


def test_the_csv_has_every_row(motion_dataset, tmp_path):
    run_kprep("info", motion_dataset, "--csv", tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 163 + 40
    assert sorted(row["reason"] for row in rows if row["status"] == "failed") == ["empty file", "truncated", "unsafe input"]  # fmt: skip


@pytest.mark.parametrize("path", ["manifest.json", "rows.csv", "index/../train/new.csv", "link"])
def test_the_csv_never_stands_inside_the_dataset(motion_dataset, tmp_path, path):
    root = Path(shutil.copytree(motion_dataset, tmp_path / "root"))
    before = {found: found.stat().st_mtime_ns for found in root.rglob("*")}
    (tmp_path / "link").symlink_to(root / "manifest.json")
    target = tmp_path / path if path == "link" else root / path
    done = run_kprep("info", root, "--csv", target, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "lies inside the dataset" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert {found: found.stat().st_mtime_ns for found in root.rglob("*")} == before


def test_an_earlier_csv_stays_until_the_new_one_is_whole(motion_dataset, tmp_path):
    root = Path(shutil.copytree(motion_dataset, tmp_path / "root"))
    (tmp_path / "rows.csv").write_text("earlier")
    (root / "ledger/val.parquet").write_bytes(b"PAR1")
    with pytest.raises(DatasetError):
        write_ledger_csv(Storage(str(root)), tmp_path / "rows.csv")
    assert (tmp_path / "rows.csv").read_text() == "earlier"
    assert sorted(found.name for found in tmp_path.iterdir()) == ["root", "rows.csv"]
    piped = run_kprep("info", motion_dataset, "--csv", "/dev/stdout").stdout
    assert "split,row,key" in piped


def test_many_classes_show_their_ends(tmp_path):
    root = large_dataset(tmp_path / "root", num_clips=2000, num_classes=700)
    text = run_kprep("info", root).stdout
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "classes   700: class 0, class 1, class 2, class 3, …" in text
    assert "most: class" in text
    assert "CC BY 4.0" in text


def test_reading_indices_and_ledgers_starts_no_thread(motion_dataset):
    """One that outlives the work can abort the process at its end (prep/parquet.py)."""
    code = (
        "import os, sys, numpy, pyarrow.compute\n"
        "from prep.format import read_index\n"
        "from prep.ledger import read_ledger\n"
        "from prep.dataset_warnings import find_warnings\n"
        "from prep.format import Manifest\n"
        "from pathlib import Path\n"
        "root = Path(sys.argv[1])\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "tables = {s: read_index((root / f'index/{s}.parquet').read_bytes(), s) for s in ('train', 'val')}\n"
        "read_ledger((root / 'ledger/val.parquet').read_bytes(), 'val')\n"
        "find_warnings(Manifest.from_bytes((root / 'manifest.json').read_bytes(), ''), tables)\n"
        "assert len(os.listdir('/proc/self/task')) == before\n"
    )
    done = subprocess.run([sys.executable, "-c", code, motion_dataset], capture_output=True, text=True, check=False, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_settings_are_words():
    settings = {"classes": ["left", "up"], "foreign": {"keys": "member", "card": True}, "seed": 0}
    assert setting_text(settings) == "classes left, up, foreign keys member, card yes, seed 0"
