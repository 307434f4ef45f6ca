"""`kprep info`: for a terminal of 80 columns, for programs, on disk and in a bucket."""

import contextlib
import csv
import errno
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import run_kprep
from copy_datasets import files_of
from report_datasets import CLASSES, large_dataset

from prep.errors import DatasetError, StorageError, UsageError
from prep.info import write_ledger_csv
from prep.info_command import info_command, info_lines
from prep.journal import Journal
from prep.root_state import unfinished
from prep.storage import Storage
from prep.text.plain import few, setting_text
from prep.write_errors import write_error

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


def work_folder(root: Path) -> Path:
    work = root / ".kprep-work/val"
    work.mkdir(parents=True)
    return work


def test_a_journal_that_a_killed_run_left_is_read_and_not_written(tmp_path):
    work = work_folder(tmp_path)
    run = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from prep.journal import Journal\n"
        "from prep.segment import BadRow\n"
        "journal = Journal(Path(sys.argv[1]), 'val')\n"
        "bad = [BadRow(1, 'odd'), BadRow(2, 'odd')]\n"
        "options = {'clips_per_shard': 9, 'limit': None, 'classes': frozenset()}\n"
        "journal.plan(bad, seed=0, taken_keys=frozenset(), **options)\n"
        "journal.set('identity', {})\n"
        "os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", run, work / "journal.sqlite"], check=False)
    refused = run_kprep("info", tmp_path, "--csv", tmp_path.parent / "rows.csv", check=False)
    assert refused.returncode == 2
    assert "has no published split yet, so there is no ledger" in " ".join(refused.stderr.split())
    before = files_of(tmp_path)
    assert any(path.endswith("-wal") for path in before)
    values = json.loads(run_kprep("info", tmp_path, "--json").stdout)["unfinished"]["val"]
    assert values["outcomes"] == {"ok": 0, "failed": 2, "duplicate": 0, "pending": 0}
    assert values["failures"] == {"bad row": 2}
    after = files_of(tmp_path)
    assert all(after[path] == before[path] for path in before if not path.endswith("-shm"))
    Journal(work / "journal.sqlite", "val").close()  # which merges the log
    before = files_of(tmp_path)
    assert json.loads(run_kprep("info", tmp_path, "--json").stdout)["unfinished"]["val"] == values
    assert files_of(tmp_path) == before


ENDLESS = (
    "CREATE VIEW rows AS WITH RECURSIVE n(status, reason) AS "
    "(SELECT 'ok', '' UNION ALL SELECT status, reason FROM n) SELECT status, reason FROM n"
)
SETTINGS = (
    "CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;"
    "INSERT INTO settings VALUES ('identity', '{}');"
)


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        (ENDLESS, "no strict table rows"),
        ("CREATE TABLE rows (status)", "no strict table rows"),
        ("CREATE TABLE rows (x INT) STRICT", "no such column"),
        ("CREATE TABLE rows (x INT, status TEXT AS (hex(zeroblob(x)))) STRICT", "computed"),
        ("CREATE TABLE rows (status TEXT, reason TEXT) STRICT; INSERT INTO rows VALUES ('failed', zeroblob(99000000) || '')", "too big"),
    ],
)  # fmt: skip
def test_a_strangers_journal_is_one_sentence(tmp_path, schema, says):
    path = work_folder(tmp_path) / "journal.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(SETTINGS + schema)
    with pytest.raises(DatasetError, match=f"cannot be read as the journal .*{says}"):
        unfinished(tmp_path)


def test_a_query_that_takes_too_long_is_given_up(tmp_path, monkeypatch):
    path = work_folder(tmp_path) / "journal.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(SETTINGS + "CREATE TABLE rows (status TEXT, reason TEXT) STRICT;")
        db.executemany("INSERT INTO rows VALUES ('failed', ?)", ((f"{n}",) for n in range(5000)))
        db.commit()
    assert sum(unfinished(tmp_path)["val"][1].values()) == 5000
    monkeypatch.setattr("prep.journal_reader._STEP", 50)
    with pytest.raises(DatasetError, match="interrupted"):
        unfinished(tmp_path)


@pytest.mark.parametrize("value", ["[" * 100_000, "9" * 5000, "{", "null"])
def test_a_setting_that_is_none_is_no_plan(tmp_path, value):
    path = work_folder(tmp_path) / "journal.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(SETTINGS)
        db.execute("UPDATE settings SET value = ?", (value,))
        db.commit()
    assert unfinished(tmp_path) == {}


def test_a_journal_that_is_no_file_of_this_root_is_not_opened(tmp_path):
    victim = tmp_path / "places.sqlite"
    with contextlib.closing(sqlite3.connect(victim)) as db:
        db.executescript("CREATE TABLE history (url TEXT)")
    before = victim.read_bytes()
    journal = work_folder(tmp_path / "root") / "journal.sqlite"
    journal.symlink_to(victim)
    done = run_kprep("info", tmp_path / "root", check=False)
    assert done.returncode == 1
    assert f"{journal} is a link" in done.stderr
    assert victim.read_bytes() == before
    journal.unlink()
    os.mkfifo(journal)  # which would wait for somebody to write into it
    assert unfinished(tmp_path / "root") == {}
    journal.unlink()
    journal.write_bytes(b"no database")
    assert unfinished(tmp_path / "root") == {}


@pytest.mark.parametrize("path", ["index/train.parquet", "ledger/train.parquet"])
def test_a_replaced_file_is_refused_in_one_sentence(motion_dataset, tmp_path, path):
    root = Path(shutil.copytree(motion_dataset, tmp_path / "root"))
    shutil.copyfile(root / path.replace("train", "val"), root / path)
    done = run_kprep("info", root, check=False)
    assert done.returncode == 1
    assert f"{path} is not the file that the manifest lists; run `kprep verify`" in done.stderr


@pytest.mark.parametrize("path", ["index/train.parquet", "ledger/train.parquet"])
@pytest.mark.parametrize(
    "words", [("info", "ROOT"), ("pull", "ROOT", "OUT"), ("merge", "OUT", "ROOT")]
)
def test_a_missing_file_is_named_with_what_to_do(motion_dataset, tmp_path, path, words):
    root = Path(shutil.copytree(motion_dataset, tmp_path / "root"))
    (root / path).unlink()
    names = {"ROOT": root, "OUT": tmp_path / "out"}
    done = run_kprep(*(names.get(word, word) for word in words), check=False)
    said = (
        f"Error: {root / path} does not exist, though the manifest lists it; run `kprep verify`\n"
    )
    assert (done.returncode, done.stderr.endswith(said)) == (1, True), done.stderr


def test_the_csv_has_every_row(motion_dataset, tmp_path):
    run_kprep("info", motion_dataset, "--csv", tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 163 + 40
    assert sorted(row["reason"] for row in rows if row["status"] == "failed") == ["empty file", "truncated", "unsafe input"]  # fmt: skip


def test_the_csv_alone_goes_to_standard_output(motion_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_kprep("info", motion_dataset, "--csv", "rows.csv")
    done = CliRunner().invoke(info_command, [str(motion_dataset), "--csv", "-"])
    assert done.stdout_bytes == Path("rows.csv").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]
    assert CliRunner().invoke(info_command, [str(motion_dataset), "--csv", "./-"]).exit_code == 0
    assert Path("./-").read_bytes() == Path("rows.csv").read_bytes()
    done = CliRunner().invoke(info_command, [str(motion_dataset), "--json", "--csv", "-"])
    with pytest.raises(UsageError, match="would both be printed"):
        raise done.exception


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


@pytest.mark.parametrize(
    ("target", "code", "says"),
    [
        ("/dev/full", 1, "(No space left on device); see that there is room and that the disk is"),
        ("no/folder.csv", 2, ": No such file or directory; give another path"),
    ],
)
def test_a_csv_that_cannot_be_written_is_a_mistake_or_a_failure(
    motion_dataset, tmp_path, monkeypatch, target, code, says
):
    monkeypatch.chdir(tmp_path)
    done = run_kprep("info", motion_dataset, "--csv", target, check=False)
    assert done.returncode == code
    assert f"{target} cannot be written" in done.stderr
    assert says in done.stderr


@pytest.mark.parametrize(
    ("kind", "number"),
    [(StorageError, code) for code in (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.ESTALE)]
    + [(UsageError, code) for code in (errno.ENOENT, errno.EISDIR, errno.EACCES, errno.EROFS)],
)
def test_another_path_mends_a_mistake_and_no_failure(kind, number):
    error = write_error("--ids x", OSError(number, os.strerror(number)))
    assert type(error) is kind
    assert str(error).startswith("--ids x cannot be written")
    assert os.strerror(number) in str(error)


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


@pytest.mark.parametrize(
    ("texts", "shown"), [([], ""), (["a"], "a"), (list("abc"), "a; b; c"), (list("abcde"), "a; b; c and 2 more")]
)  # fmt: skip
def test_the_first_few_of_many(texts, shown):
    assert few(texts, between="; ") == shown


def test_many_classes_show_their_ends(tmp_path):
    root = large_dataset(tmp_path / "root", num_clips=2000, num_classes=700)
    text = run_kprep("info", root).stdout
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "classes   700: class 0, class 1, class 2, class 3 and 696 more" in text
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


def test_a_current_directory_that_is_gone_is_named(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    done = subprocess.run(
        ["sh", "-c", 'cd "$0" && rmdir "$0" && exec "$1" -P -m prep info "$2"', gone, sys.executable, "../root"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == ("Error: the current directory has been removed; change to another one\n")
