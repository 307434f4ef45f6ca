"""`kprep shard` from end to end, in processes of its own, as a user runs it."""

import csv
import hashlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from conftest import run_kprep

from prep import ffmpeg_binary
from prep.cli import kprep
from prep.conversion_plan import settings_of
from prep.demo_videos import random_motion, write_broken_files, write_video
from prep.errors import UsageError
from prep.ffmpeg_binary import check_scaler_flags
from prep.format import Manifest, Sidecar, Split, iter_records, read_index, read_manifest
from prep.options import ShardOptions
from prep.outcome import EXPLANATIONS
from prep.profile import EncodingProfile
from prep.published_split import check_same
from prep.shard import ShardResult
from prep.shard_command import _report, shard_command
from prep.shuffle import place
from prep.storage import Storage


def files_of(root: Path) -> dict[str, str]:
    """The sha256 of every file of a dataset, work folder apart."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and ".kprep-work" not in path.parts
    }


def ledger(root: Path, split: str):
    return pq.read_table(root / "ledger" / f"{split}.parquet").to_pylist()


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Twelve short videos in three class folders, and three files that are none."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(5)
    for number in range(12):
        target = folder / ("a b", "left", "up")[number % 3] / f"{number}.mp4"
        target.parent.mkdir(exist_ok=True)
        write_video(target, random_motion("left", rng), "libx264")
    write_broken_files(folder, seed=1)
    (folder / "left" / "notes.txt").write_text("not a clip")
    return folder


@pytest.fixture(scope="module")
def dataset(videos, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("dataset") / "root"
    run_kprep(
        "shard", videos, root, "--split", "train", "--profile", "small", "--clips-per-shard", 6
    )
    return root


def test_every_row_is_accounted_for(videos, dataset):
    rows = ledger(dataset, "train")
    assert len(rows) == 15
    assert Counter(row["status"] for row in rows) == {"ok": 12, "failed": 3}
    assert sorted(row["reason"] for row in rows if row["reason"]) == [
        "empty file",
        "truncated",
        "unsafe input",
    ]
    split = read_manifest(Storage(str(dataset))).splits["train"]
    assert sum(split.outcomes.values()) == split.num_rows == 15
    assert split.num_clips == sum(shard.num_clips for shard in split.shards) == 12


def test_classes_and_labels(dataset):
    manifest = read_manifest(Storage(str(dataset)))
    assert manifest.class_names == ("a b", "left", "up")
    index = read_index((dataset / "index/train.parquet").read_bytes(), "index")
    for record in iter_records(index):
        assert manifest.class_names[record.label] == record.video_id.split("/")[0]


def test_shards_are_mixed_and_hold_what_the_index_says(dataset):
    index = list(iter_records(read_index((dataset / "index/train.parquet").read_bytes(), "index")))
    labels = {
        shard: {r.label for r in index if r.shard == shard} for shard in {r.shard for r in index}
    }
    assert any(len(found) > 1 for found in labels.values())  # not sorted by class
    for record in index:
        data = (dataset / record.shard).read_bytes()
        video = data[record.video_offset : record.video_offset + record.video_bytes]
        assert hashlib.blake2b(video, digest_size=16).digest() == record.content_hash
        with tarfile.open(
            fileobj=io.BytesIO(data[record.entry_offset :][: record.entry_bytes])
        ) as tar:
            assert tar.getnames() == [f"{record.key}.json", f"{record.key}.mp4"]
            sidecar = Sidecar.from_bytes(tar.extractfile(f"{record.key}.json").read(), "sidecar")
        assert (sidecar.key, sidecar.num_frames) == (record.key, record.num_frames)


def test_tar_rules(dataset):
    paths = list(dataset.glob("train/*.tar"))
    assert len(paths) == 3  # 12 videos and 3 files that are none, in shards of 6 rows
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o444)
                assert (member.uname, member.gname, member.pax_headers) == ("", "", {})
                assert len(member.name) <= 100


@pytest.mark.filterwarnings("ignore")  # webdataset leaves its files to the garbage collector
def test_plain_webdataset_reads_it(dataset):
    import gc

    import webdataset

    urls = sorted(map(str, dataset.glob("train/*.tar")))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    gc.collect()
    index = list(iter_records(read_index((dataset / "index/train.parquet").read_bytes(), "index")))
    assert [sample["__key__"] for sample in samples] == [record.key for record in index]
    assert all(hashlib.blake2b(s["mp4"], digest_size=16).digest() == r.content_hash
               for s, r in zip(samples, index, strict=True))  # fmt: skip


def test_companion_files(dataset):
    import json
    import struct

    shards = sorted(path.relative_to(dataset).as_posix() for path in dataset.glob("train/*.tar"))
    wids = json.loads((dataset / "wids-train.json").read_text())
    assert [shard["url"] for shard in wids["shardlist"]] == shards
    assert all(hashlib.md5((dataset / shard["url"]).read_bytes()).hexdigest() == shard["md5sum"]  # noqa: S324
               for shard in wids["shardlist"])  # fmt: skip
    info = json.loads((dataset / ".nv-meta/.info.json").read_text())
    assert set(info) == {"energon_version", "shard_counts"}
    assert list(info["shard_counts"]) == shards
    for shard in shards:
        packed = (dataset / f"{shard}.idx").read_bytes()
        offsets = struct.unpack(f"<{len(packed) // 8}Q", packed)
        assert len(offsets) == info["shard_counts"][shard] + 1
        with tarfile.open(dataset / shard) as tar:
            starts = [member.offset for member in tar if member.name.endswith(".json")]
        assert list(offsets[:-1]) == starts
    assert 'path: "train/*.tar"' in (dataset / "README.md").read_text()


def test_one_worker_and_three_give_the_same_bytes(videos, dataset, tmp_path):
    root = tmp_path / "root"
    for workers in (1, 3):
        shutil.rmtree(root, ignore_errors=True)
        run_kprep("shard", videos, root, "--split", "train", "--profile", "small",
                  "--clips-per-shard", 6, "--workers", workers)  # fmt: skip
        assert files_of(root) == files_of(dataset)


@pytest.mark.parametrize("module", ["torch", "pandas"])
def test_no_process_of_a_conversion_imports(videos, dataset, tmp_path, module):
    """webdataset imports torch where it can, pyarrow pandas: seconds at the end of every run."""
    (tmp_path / f"{module}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    run_kprep("shard", videos, tmp_path / "root", "--split", "train", "--profile", "small",
              "--clips-per-shard", 6, PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")  # fmt: skip
    assert files_of(tmp_path / "root") == files_of(dataset)
    assert not (tmp_path / "imported").exists()


def test_another_seed_gives_another_order(videos, dataset, tmp_path):
    run_kprep("shard", videos, tmp_path / "r", "--split", "train", "--profile", "small",
              "--clips-per-shard", 6, "--seed", 1)  # fmt: skip

    def order(root):
        return read_index((root / "index/train.parquet").read_bytes(), "i")["key"].to_pylist()

    assert order(tmp_path / "r") != order(dataset)
    assert sorted(order(tmp_path / "r")) == sorted(order(dataset))


def test_golden_place_of_a_row():
    """Never changed: an unfinished conversion and a merge both depend on it."""
    assert place("abcdefghijk_000001_000011", 7).hex() == "111e831916161ab5e4efbdc15eec5574"


def test_adding_a_split_changes_nothing_of_the_other(videos, dataset, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(dataset, root)
    before = files_of(root)
    run_kprep("shard", videos, root, "--split", "val", "--profile", "small")
    after = files_of(root)
    shared = {"manifest.json", "README.md", ".nv-meta/.info.json", ".nv-meta/split.yaml"}
    assert {path for path in before if before[path] != after[path]} == shared
    keys = [
        read_index((root / f"index/{split}.parquet").read_bytes(), "i")["key"].to_pylist()
        for split in ("train", "val")
    ]
    assert not set(keys[0]) & set(keys[1])
    run_kprep("verify", root)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_any_moment_it_continues_to_the_same_bytes(videos, dataset, tmp_path, seed):
    """SIGKILL to the whole tree of processes, at random moments, until the conversion ends."""
    root, rng = tmp_path / "root", random.Random(seed)
    command = [sys.executable, "-P", "-m", "prep", "shard", str(videos), str(root), "--split", "train",
               "--profile", "small", "--clips-per-shard", "6"]  # fmt: skip
    for _ in range(6):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(rng.uniform(0.3, 3.0))
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        for tar in root.glob("train/train-*.tar"):  # a final name is a complete file
            assert (
                hashlib.sha256(tar.read_bytes()).hexdigest()
                == files_of(dataset)[f"train/{tar.name}"]
            )
    run_kprep(*command[4:])
    assert files_of(root) == files_of(dataset)


def test_ctrl_c_drains_and_continues(videos, dataset, tmp_path):
    root = tmp_path / "root"
    command = [sys.executable, "-P", "-m", "prep", "shard", str(videos), str(root), "--split", "train",
               "--profile", "small", "--clips-per-shard", "6", "--workers", "1"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(root.glob(".kprep-work/train/staged/*.pack")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130, err
    assert "run the same command again" in err
    assert not (root / "manifest.json").exists()
    run_kprep(*command[4:])
    assert files_of(root) == files_of(dataset)


def test_two_runs_at_once_are_kept_apart(videos, tmp_path):
    import fcntl

    root = tmp_path / "root"
    lock = root / ".kprep-work" / "lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = run_kprep("shard", videos, root, "--split", "train", check=False)
    assert done.returncode == 2
    assert "another kprep" in done.stderr


def refused(*arguments) -> str:
    """Run a command that must be refused as a user's mistake; return its one line."""
    done = run_kprep(*arguments, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_mistakes_get_one_clear_sentence(videos, dataset, tmp_path):
    assert "no folder" in refused("shard", tmp_path / "nowhere", tmp_path / "r", "--split", "train")
    assert "profile 'tiny' is unknown" in refused(
        "shard", videos, tmp_path / "r", "--split", "train", "--profile", "tiny"
    )
    text = refused("shard", videos, dataset, "--split", "val", "--profile", "general")
    assert "short_side_px: 256, not 128" in text
    assert "inside the source" in refused("shard", videos, videos, "--split", "train")
    assert "is not empty" in refused("shard", videos, videos.parent, "--split", "train")
    assert "split name" in refused("shard", videos, tmp_path / "r", "--split", "../x")
    text = refused("shard", videos, dataset, "--split", "train", "--profile", "small", "--seed", 4)
    assert "never changes" in text
    assert "--retry" in refused(
        "shard", videos, tmp_path / "r", "--split", "a", "--retry", "bad luck"
    )
    assert "s3://bucket/x" in refused("shard", videos, "s3://bucket/x", "--split", "a")
    (tmp_path / "empty").mkdir()
    assert "holds no file" in refused(
        "shard", tmp_path / "empty", tmp_path / "r2", "--split", "train"
    )
    (tmp_path / "empty/notes.txt").touch()
    assert "has no videos" in refused(
        "shard", tmp_path / "empty", tmp_path / "r2", "--split", "train"
    )
    (tmp_path / "file").touch()
    assert "is a file" in refused("shard", videos, tmp_path / "file", "--split", "train")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--scheduler", "tcp://127.0.0.1:9"), "--scheduler has no effect without --engine dask"),
        (("--mirror", "http://127.0.0.1:9"), "--mirror has no effect without a source cvdf:"),
        (("--youtube", "attempts=1"), "--youtube has no effect without the source youtube:"),
        (("--classes", " , "), "--classes names no class"),
        (("--classes", "a", "--classes-file", "b"), "exclude each other"),
        (("--scaler-flags", "bicubic+bogus"), r"scaler_flags \('bicubic\+bogus'\) must be names"),
        # what the scaler knows is not what is wrong
        (("--scaler-flags", "lanczos+accurate_rnd"), "nowhere is no folder"),
    ],
)
def test_an_option_without_effect_or_of_no_use_is_refused_at_once(
    tmp_path, monkeypatch, options, text
):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(shard_command, ["nowhere", "root", "--split", "val", *options])
    with pytest.raises(UsageError, match=text):
        raise done.exception
    assert not Path("root").exists()


def test_an_ffmpeg_that_does_not_run_is_not_taken_for_wrong_flags(monkeypatch):
    monkeypatch.setenv("KPREP_FFMPEG", "/bin/false")
    monkeypatch.setattr(ffmpeg_binary, "_find_ffmpeg", ffmpeg_binary._find_ffmpeg.__wrapped__)
    with pytest.raises(UsageError, match="'/bin/false' does not run"):
        check_scaler_flags("lanczos")


def test_a_cpu_limit_that_ffmpeg_does_not_take_is_refused():
    arguments = ["nowhere", "root", "--split", "val", "--cpu-limit", "99999999999999"]
    done = CliRunner().invoke(shard_command, arguments)
    assert (done.exit_code, "1<=x<=86400" in done.output) == (2, True)


def test_labels_with_commas_are_chosen_by_a_file(tmp_path):
    comma = "playing guitar, electric"
    rows = [(comma, "aaaaaaaaaaa", 0, 1, "val", 0), ("x", "bbbbbbbbbbb", 0, 1, "val", 0)]
    (tmp_path / "classes.txt").write_text(f"{comma}\n")
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "aaaaaaaaaaa.mp4").touch()
    words = ["shard", str(tmp_path / "v"), str(tmp_path / "root"), "--split", "val", "--annotations",
             str(kinetics_csv(tmp_path / "val.csv", rows)), "--dry-run", "--workers", "1"]  # fmt: skip
    done = CliRunner().invoke(kprep, [*words, "--classes-file", str(tmp_path / "classes.txt")])
    assert "rows             1\nexpected clips   1" in done.output, done.output
    done = CliRunner().invoke(kprep, [*words, "--classes", comma])
    with pytest.raises(
        UsageError, match="'electric' is no label .*; give labels with commas in a --classes-file"
    ):
        raise done.exception
    done = CliRunner().invoke(kprep, [*words, "--classes", "X"])
    with pytest.raises(UsageError, match="'X' is no label of the list .2 labels.; there it is 'x'"):
        raise done.exception


def test_an_unknown_label_is_refused(videos, dataset, tmp_path):
    (tmp_path / "v" / "new").mkdir(parents=True)
    shutil.copy(next((videos / "up").glob("*.mp4")), tmp_path / "v" / "new")
    words = ("shard", tmp_path / "v", dataset, "--split", "val", "--profile", "small")
    text = refused(*words)
    assert "class folder 'new' is not among the 3 classes" in text
    assert "convert all splits into a new root with a --class-list that has it" in text
    listed = kinetics_csv(tmp_path / "val.csv", [("new", "aaaaaaaaaaa", 0, 1, "val", 0)])
    text = refused(*words, "--annotations", listed)
    assert "label 'new' (row 1 of the list) is not among the 3 classes" in text
    (tmp_path / "w" / "UP").mkdir(parents=True)
    (tmp_path / "w" / "UP" / "1.mp4").touch()
    words = ["shard", str(tmp_path / "w"), str(dataset), "--split", "val", "--profile", "small"]
    done = CliRunner().invoke(kprep, [*words, "--dry-run", "--workers", "1"])
    assert "rows             1" in done.output, done.exception  # it is the dataset's "up"


def test_a_file_whose_name_is_no_text_is_told_from_a_row_of_a_list(videos, tmp_path):
    (tmp_path / "v" / "up").mkdir(parents=True)
    clip = next((videos / "up").glob("*.mp4"))
    for name in ("good.mp4", "two\nlines.mp4"):
        shutil.copy(clip, tmp_path / "v" / "up" / name)
    done = run_kprep(
        "shard", tmp_path / "v", tmp_path / "root", "--split", "val", "--profile", "small"
    )
    assert "2/2 clips" in done.stderr
    assert "1 failed" in done.stderr  # as the table has it; the row had failed before the encoding
    text = " ".join(done.stdout.split())
    assert "bad row 1 the row, or in a folder the file's name, cannot be read" in text
    found = {row["status"]: row["detail"] for row in ledger(tmp_path / "root", "val")}
    assert "two\\nlines.mp4' has a character that is not printable UTF-8" in found["failed"]


def test_the_same_command_again_says_that_all_is_done(videos, dataset):
    before = files_of(dataset)
    done = run_kprep(
        "shard", videos, dataset, "--split", "train", "--profile", "small", "--clips-per-shard", 6
    )
    assert "already published" in done.stdout
    assert "--retry" not in done.stdout
    assert files_of(dataset) == before


def test_another_list_for_a_published_split_is_refused(videos, dataset, tmp_path):
    """It was ignored with exit code 0: the clips asked for were lost without a word."""
    before = files_of(dataset)
    words = (dataset, "--split", "train", "--profile", "small", "--clips-per-shard", 6)
    grown = tmp_path / "grown"
    shutil.copytree(videos, grown)
    shutil.copy(next((grown / "up").glob("*.mp4")), grown / "up" / "another.mp4")
    text = refused("shard", grown, *words)
    assert "never changes" in text
    assert f"the files of source {grown} are not the list that it was made of" in text
    assert "choose another --split, or convert into a new root" in text
    listed = kinetics_csv(tmp_path / "l.csv", [("up", "aaaaaaaaaaa", 0, 1, "train", 0)])
    text = refused("shard", videos, *words, "--annotations", listed)
    assert f"--annotations {listed} is not the list that it was made of" in text
    listed.write_text("no list")
    assert "is no Kinetics list" in refused("shard", videos, *words, "--annotations", listed)
    assert files_of(dataset) == before
    assert not (dataset / ".kprep-work").exists()


def test_another_class_list_for_a_published_split_is_refused(videos, dataset, tmp_path):
    words = ("shard", videos, dataset, "--split", "train", "--profile", "small",
             "--clips-per-shard", 6, "--class-list", tmp_path / "classes.txt")  # fmt: skip
    (tmp_path / "classes.txt").write_text("up\na b\nleft\n")
    assert "--class-list has the same classes in another order" in refused(*words)
    (tmp_path / "classes.txt").write_text("a b\nleft\nup\nzzz\n")
    assert "--class-list has other classes: zzz new" in refused(*words)
    (tmp_path / "classes.txt").write_text("a b\nleft\nup\n")
    assert "nothing to do" in run_kprep(*words).stdout


def published_of_a_list(tmp_path: Path, sha256: str) -> Manifest:
    """A manifest whose only split was made of a list with the default settings."""
    options = ShardOptions((), str(tmp_path / "root"), "train", EncodingProfile("general"))
    split = Split("", 0, 0, {}, (), settings_of(options, sha256))
    return Manifest(options.profile, (), {"train": split}, {})


def test_a_list_that_cannot_be_read_any_more_is_not_compared(tmp_path):
    """Videos are often deleted once they are converted; the same command still ends with 0."""
    manifest = published_of_a_list(tmp_path, "ab" * 32)
    (tmp_path / "emptied" / "left").mkdir(parents=True)
    (tmp_path / "emptied" / "left" / "notes.txt").touch()
    (tmp_path / "others" / "val").mkdir(parents=True)
    os.mkfifo(tmp_path / "pipe")  # to open one that nobody writes to would never end

    def notes(source: str, annotations: Path | None = None) -> str:
        options = ShardOptions(
            (str(source),), str(tmp_path / "root"), "train", manifest.profile, annotations
        )
        (note,) = check_same(options, manifest)
        return note

    here = sorted(tmp_path.rglob("*"))
    assert "emptied has no videos" in notes(tmp_path / "emptied")
    assert "has no folder for split train" in notes(tmp_path / "others")
    assert "gone.csv is no file" in notes(tmp_path / "others", tmp_path / "gone.csv")
    assert "pipe is no file" in notes(tmp_path / "others", tmp_path / "pipe")
    assert "the list of cvdf:k400 was not fetched" in notes("cvdf:k400")
    assert sorted(tmp_path.rglob("*")) == here


@pytest.mark.parametrize("text", [
    "label,youtube_id,time_start,time_end\nx,aaaaaaaaaaa,1,2\n",
    '{"aaaaaaaaaaa": {"annotations": {"label": "x", "segment": [1, 2]}}}',
    "x/a.mp4 0\nx/b.mp4 0\n",
])  # fmt: skip
def test_the_same_list_in_any_form_is_the_same(tmp_path, text):
    listed = tmp_path / "list.txt"
    listed.write_text(text)
    manifest = published_of_a_list(tmp_path, hashlib.sha256(text.encode()).hexdigest())
    options = ShardOptions(
        ("cvdf:k400",), str(tmp_path / "root"), "train", manifest.profile, listed
    )
    assert check_same(options, manifest) == []
    listed.write_text(text.replace("x", "y"))
    with pytest.raises(UsageError, match="list.txt is not the list that it was made of"):
        check_same(options, manifest)


def test_a_retry_of_a_published_split_says_that_it_comes_too_late(videos, dataset):
    before = files_of(dataset)
    done = run_kprep(
        "shard", videos, dataset, "--split", "train", "--profile", "small",
        "--clips-per-shard", 6, "--retry", "truncated",
    )  # fmt: skip
    assert "--retry changes no published split" in " ".join(done.stdout.split())
    assert files_of(dataset) == before


def test_a_conversion_begun_differently_is_refused(videos, tmp_path):
    root = tmp_path / "root"
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "prep", "shard", str(videos), str(root), "--split", "train", "--profile", "small"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    while not list(root.glob(".kprep-work/train/staged/*.pack")) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    text = refused("shard", videos, root, "--split", "train", "--profile", "small", "--seed", "9")
    assert "seed was 0, is 9" in text


def test_no_clip_at_all_is_a_failure_and_publishes_nothing(tmp_path):
    write_broken_files(tmp_path / "v", seed=1)
    done = run_kprep("shard", tmp_path / "v", tmp_path / "r", "--split", "train", check=False)
    assert done.returncode == 1
    assert "gave a clip" in done.stderr
    assert not (tmp_path / "r" / "manifest.json").exists()


def test_the_table_of_failures_folds_at_80_columns(capsys):
    result = ShardResult(None, {"failed": len(EXPLANATIONS)}, dict.fromkeys(EXPLANATIONS, 1))
    with pytest.raises(SystemExit):
        _report(result, SimpleNamespace(split="train"))
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for explanation in EXPLANATIONS.values():
        assert explanation in " ".join(text.split())


def test_limit_and_classes_choose_a_subset(videos, tmp_path):
    run_kprep(
        "shard",
        videos,
        tmp_path / "r",
        "--split",
        "train",
        "--profile",
        "small",
        "--limit",
        3,
        "--classes",
        "up,a b",
    )
    rows = ledger(tmp_path / "r", "train")
    assert len(rows) == 3
    assert {row["label"] for row in rows} <= {"up", "a b"}
    assert (tmp_path / "r" / "classes.txt").read_text() == "a b\nleft\nup\n"


# -- Kinetics lists ------------------------------------------------------------------------------


def kinetics_csv(path: Path, rows) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "youtube_id", "time_start", "time_end", "split", "is_cc"])
        writer.writerows(rows)
    return path


def test_kinetics_list_finds_files_in_every_layout(tmp_path):
    source, rng = tmp_path / "videos", np.random.default_rng(1)
    rows = [
        ("air drumming", "aaaaaaaaaaa", 1, 3, "val", 0),  # already cut, flat
        ("air drumming", "-bbbbbbbbbb", 0, 2, "val", 0),  # already cut, torchvision's class folder
        ("bee keeping", "__ccccccccc", 4, 6, "val", 1),  # already cut, class folder with a space
        ("bee keeping", "ddddddddddd", 1, 3, "val", 0),  # bare id: to be cut
        ("bee keeping", "ddddddddddd", 0, 2, "val", 0),  # a second segment of the same video
        ("bee keeping", "ddddddddddd", 0, 2, "val", 0),  # an exact repeat
        ("bee keeping", "eeeeeeeeeee", 0, 2, "val", 0),  # nowhere
        ("bee keeping", "fffffffffff", 0, 2, "val", 0),  # the same segment with two labels
        ("air drumming", "fffffffffff", 0, 2, "val", 0),
        ("air drumming", "ggggggggggg", 5, 2, "val", 0),  # ends before it begins
        ("air drumming", "hhhhhhhhhhh", 0, 2, "train", 0),  # another split
    ]

    def video(name, seconds=2.0):
        import dataclasses

        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_video(
            target, dataclasses.replace(random_motion("up", rng), seconds=seconds), "libx264"
        )

    video("aaaaaaaaaaa_000001_000003.mp4")
    video("val/air_drumming/-bbbbbbbbbb_000000_000002.mkv")
    video("bee keeping/__ccccccccc_000004_000006.mp4")
    video("full/ddddddddddd.mp4", 5.0)
    root = tmp_path / "root"
    annotations = kinetics_csv(tmp_path / "val.csv", rows)
    run_kprep(
        "shard", source, root, "--split", "val", "--profile", "small", "--annotations", annotations
    )
    found = {
        (row["video_id"], row["start_seconds"], row["label"]): row
        for row in ledger(root, "val")
        if row["video_id"]
    }
    statuses = [row["status"] for row in ledger(root, "val")]
    assert Counter(statuses) == {"ok": 5, "duplicate": 1, "failed": 4}
    assert Counter(row["reason"] for row in ledger(root, "val") if row["reason"]) == {
        "missing": 1, "conflicting rows": 2, "bad row": 1}  # fmt: skip
    assert found["__ccccccccc", 4.0, "bee keeping"]["key"] == "v__ccccccccc_000004_000006"
    assert found["ddddddddddd", 1.0, "bee keeping"]["seconds"] == 2.0
    assert (root / "classes.txt").read_text().splitlines() == ["air drumming", "bee keeping"]
    run_kprep("verify", root)


def test_real_list_against_a_folder_with_a_dozen_clips(corpus, tmp_path):
    listing = corpus / "annotations/activitynet/kinetics-400_val.csv"
    with listing.open() as file:
        rows = list(csv.DictReader(file))
    chosen = rows[7::1600]
    (tmp_path / "v").mkdir()
    for row in chosen:
        name = f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}.mp4"
        shutil.copy(corpus / "actions/singles/abseiling_k400.mp4", tmp_path / "v" / name)
    root = tmp_path / "root"
    run_kprep(
        "shard",
        tmp_path / "v",
        root,
        "--split",
        "val",
        "--profile",
        "small",
        "--annotations",
        listing,
    )
    found = ledger(root, "val")
    assert len(found) == len(rows) == 19_906
    assert Counter(row["status"] for row in found) == {
        "ok": len(chosen),
        "failed": 19_906 - len(chosen),
    }
    assert {row["reason"] for row in found if row["status"] == "failed"} == {"missing"}
    names = (corpus / "annotations/torchvision/kinetics400_categories_torchvision.txt").read_text()
    assert (root / "classes.txt").read_text().splitlines() == names.splitlines()
    run_kprep("verify", root)


@pytest.mark.slow
def test_odd_files_of_the_corpus(corpus, tmp_path):
    """Every file is ok or failed with the right reason; nothing hangs; the sums add up."""
    root = tmp_path / "root"
    run_kprep("shard", corpus / "odd", root, "--split", "train", "--profile", "small")
    rows = {row["video_id"]: row for row in ledger(root, "train")}
    assert len(rows) == len([path for path in (corpus / "odd").rglob("*") if path.is_file()]) == 74
    expected = {
        "decord/corrupted.mp4": None, "derived/vfr_drops.mkv": None, "torchcodec/av1_video.mkv": None,
        "torchcodec/h265_10bits.mp4": None, "lipnet_mpeg1/sbwe5n.mpg": None, "mp4ff/ivf-to-mp4_vp8.ivf": None,
        "torchcodec/testsrc2_odd_width_444.mp4": None, "hf_datasets/test_video_66x50.mov": None,
        "derived/truncated_60pct_a.mp4": "truncated", "derived/zeros_20k.mp4": "not a video",
        "derived/one_frame.mp4": "too short", "moviepy/doc_medias_result.webm": "empty file",
        "moviepy/-video-with-dash-.mp4": "picture size", "mp4ff/mp4_init_prog.mp4": "no frames",
        "mp4parse/av1-clearkey-cbcs-video.mp4": "encrypted", "mp4ff/mp4_opus.mp4": "no video stream",
        "torchcodec/nasa_13013_hdr.mp4": "hdr", "torchcodec/reproduce_seek_bug.wav": "no video stream",
        "torchcodec/nasa_13013.mp4.audio.mp3": "no video stream",
    }  # fmt: skip
    assert {name: rows[name]["reason"] for name in expected} == expected
    run_kprep("verify", root)


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["small", "general"])
def test_real_actions(corpus, tmp_path, profile):
    root = tmp_path / "root"
    run_kprep("shard", corpus / "actions/asl_words", root, "--split", "train", "--profile", profile)
    run_kprep("shard", corpus / "actions/singles", root, "--split", "val", "--profile", profile)
    run_kprep("verify", root)
    manifest = read_manifest(Storage(str(root)))
    assert len(manifest.class_names) == 12
    assert [manifest.splits[name].num_clips for name in ("train", "val")] == [12, 5]
    assert manifest.profile.short_side_px == {"small": 128, "general": 256}[profile]


# -- workers that die ----------------------------------------------------------------------------


def fake_ffmpeg(tmp_path: Path, victim: str, action: str) -> Path:
    """An ffmpeg that does something else when it is given the file named `victim`."""
    from prep.ffmpeg_binary import find_ffmpeg

    script = tmp_path / "ffmpeg"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *{victim}*) {action} ;; esac\nexec "{find_ffmpeg().path}" "$@"\n'
    )
    script.chmod(0o755)
    return script


def test_a_file_that_kills_its_worker_costs_one_row(videos, dataset, tmp_path):
    victim = next((videos / "up").glob("*.mp4")).name
    fake = fake_ffmpeg(tmp_path, f"up/{victim}", "kill -9 $PPID")
    done = run_kprep("shard", videos, tmp_path / "r", "--split", "train", "--profile", "small",
                     check=False, KPREP_FFMPEG=str(fake))  # fmt: skip
    assert done.returncode == 1, done.stderr  # a crash may pass, so nothing is published yet
    assert "worker crashed" in done.stdout
    assert "--finish" in done.stderr
    run_kprep("shard", videos, tmp_path / "r", "--split", "train", "--profile", "small", "--finish",
              KPREP_FFMPEG=str(fake))  # fmt: skip
    rows = ledger(tmp_path / "r", "train")
    assert [
        (row["video_id"], row["detail"]) for row in rows if row["reason"] == "worker crashed"
    ] == [(f"up/{victim}", "signal 9")]
    assert sum(row["status"] == "ok" for row in rows) == 11


def test_workers_that_cannot_start_end_the_run(videos, tmp_path):
    (tmp_path / "av").mkdir()
    (tmp_path / "av" / "__init__.py").write_text("raise ImportError('broken on purpose')")
    done = run_kprep("shard", videos, tmp_path / "r", "--split", "train", check=False,
                     PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))  # fmt: skip
    assert done.returncode == 1
    assert "cannot start" in done.stderr or "broken on purpose" in done.stderr
    assert "memory" not in done.stderr


@pytest.mark.slow
def test_encode_workers_never_load_torch(videos, tmp_path):
    """A torch that cannot be imported does not disturb an encode worker."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    code = "import prep.worker, prep.encode, prep.shard, prep.verify, prep.info, sys; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], check=False, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})  # fmt: skip
    assert done.returncode == 0
