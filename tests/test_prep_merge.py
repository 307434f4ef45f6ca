"""`kprep merge` and `kprep subset`: clips byte for byte, deterministic, ledgers that add up."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import run_kprep
from copy_datasets import CLASSES, convert, draw, files_of, flip, objects_of
from fault_proxy import by_rate, fault_proxy
from foreign_tars import FORMS, encode, motion, video2dataset_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_datasets import relist, without_gop_index
from webdataset import TarWriter

from prep.assemble import write_tar
from prep.byte_progress import ByteProgress
from prep.copy_dataset import copy_dataset
from prep.errors import DatasetError, StorageError, UsageError
from prep.format import Sidecar, Split
from prep.job_bytes import JobBytes
from prep.ledger import SCHEMA
from prep.merge import MergeOptions, merge
from prep.merge_ledger import counts, merge_ledgers
from prep.merge_plan import (
    Clip,
    Selection,
    check_classes,
    choose,
    deal,
    kept_classes,
    merge_classes,
)
from prep.merge_sources import foreign_rules
from prep.remix import _check_places
from prep.shuffle import place
from prep.storage import RetryPolicy, Storage
from prep.verify import verify
from prep.worker_marks import Mark, read_mark
from stream import clip_loader


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("merge")
    draw(folder / "train", dict.fromkeys(CLASSES, 5), seed=1, broken=1)
    draw(folder / "val", dict.fromkeys(CLASSES, 3), seed=2)
    draw(folder / "more", {"left": 3, "right": 3}, seed=3)
    return folder


@pytest.fixture(scope="module")
def one(videos) -> Path:
    """Splits train (12 of 15 clips) and val (9), classes down, left, up."""
    root = convert(videos / "train", videos / "one", "train")
    return convert(videos / "val", root, "val")


@pytest.fixture(scope="module")
def two(videos) -> Path:
    """Split train (6), classes left and right."""
    return convert(videos / "more", videos / "two", "train")


def merged(out, *roots, made_by="kprep merge", **options):
    given = {"workers": 1, **options}
    return merge(
        MergeOptions(
            tuple(Storage(str(root)) for root in roots), Storage(str(out)), made_by, **given
        )
    )


def subset(root, out, **options):
    selection = Selection(**{name: options.pop(name) for name in ("splits", "classes", "per_class", "count")
                             if name in options})  # fmt: skip
    given = {"class_list": "chosen", **options}
    return merged(out, root, made_by="kprep subset", selection=selection, **given)


def samples(root: Path, split: str) -> dict[str, tuple[bytes, Sidecar]]:
    """Video bytes and sidecar of every clip of a split, read with the standard library's tarfile."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted((root / split).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                found.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return {
        key: (parts["mp4"], Sidecar.from_bytes(parts["json"], key)) for key, parts in found.items()
    }


def tars(root: Path) -> list[Path]:
    return list(root.glob("[!.]*/*.tar"))


def ledger(root: Path, split: str) -> list[dict]:
    return pq.read_table(root / f"ledger/{split}.parquet").to_pylist()


def faults(root) -> list[str]:
    return verify(Storage(str(root))).faults


# -- merge ---------------------------------------------------------------------------------------


def test_two_roots_become_one_with_one_class_list(one, two, tmp_path):
    result = merged(tmp_path / "all", one, two)
    root = tmp_path / "all"
    assert faults(root) == []
    assert (root / "classes.txt").read_text().split() == ["down", "left", "right", "up"]
    before = {**samples(one, "train"), **samples(two, "train")}
    after = samples(root, "train")
    assert after.keys() == before.keys()
    for key, (video, sidecar) in after.items():
        old_video, old = before[key]
        assert video == old_video  # byte for byte
        assert sidecar == replace(old, label_index=["down", "left", "right", "up"].index(old.label))
    assert samples(root, "val").keys() == samples(one, "val").keys()
    rows = ledger(root, "train")
    assert Counter(row["status"] for row in rows) == {"ok": 18, "failed": 3}
    assert [row["row"] for row in rows] == list(range(1, 22))
    split = result.manifest.splits["train"]
    assert split.outcomes["ok"] == 18
    parents = [
        json.loads((path / "manifest.json").read_text())["splits"]["train"] for path in (one, two)
    ]
    assert split.settings["made_from"] == [parent["fingerprint"] for parent in parents]
    assert split.settings["annotation_lists"] == sorted(
        parent["settings"]["annotations_sha256"] for parent in parents
    )
    text = run_kprep("info", root).stdout
    assert "18 clips" in text


def test_the_order_is_mixed_over_roots_and_classes(one, two, tmp_path):
    merged(tmp_path / "all", one, two, clips_per_shard=6)
    index = pq.read_table(tmp_path / "all/index/train.parquet").to_pylist()
    keys = [row["key"] for row in index]
    assert keys == sorted(keys, key=lambda key: place(key, 0))
    assert [row["shard"] for row in index] == [
        f"train/train-{number // 6:06d}.tar" for number in range(18)
    ]
    others = merged(tmp_path / "other", one, two, clips_per_shard=6, seed=1)
    assert (
        others.manifest.splits["train"].fingerprint
        != (
            json.loads((tmp_path / "all/manifest.json").read_text())["splits"]["train"][
                "fingerprint"
            ]
        )
    )


def test_late_clips_come_in(videos, one, tmp_path):
    """Rows that failed in one root and are there in another come out ok, and the counts add up."""
    late = shutil.copytree(videos / "train", tmp_path / "late")
    good = draw(tmp_path / "good", dict.fromkeys(CLASSES, 1), seed=7)
    for label in CLASSES:
        shutil.copy(good / label / f"{label}7-0.mp4", late / label / f"{label}1-0.mp4")
        for number in range(1, 5):
            (late / label / f"{label}1-{number}.mp4").write_bytes(b"gone by now")
    convert(late, tmp_path / "late-root", "train")
    merged(tmp_path / "all", one, tmp_path / "late-root")
    assert faults(tmp_path / "all") == []
    rows = ledger(tmp_path / "all", "train")
    assert Counter(row["status"] for row in rows) == {"ok": 15}
    assert len(samples(tmp_path / "all", "train")) == 15


def test_equal_clips_are_taken_once_and_counted(one, tmp_path):
    result = merged(tmp_path / "all", one, one)
    assert result.plan.chosen.num_equal == 21
    assert faults(tmp_path / "all") == []
    assert ledger(tmp_path / "all", "train") == ledger(one, "train")
    text = run_kprep("merge", tmp_path / "again", one, one, "--dry-run").stdout
    assert "21 clips stand in several roots alike" in text
    assert "nothing was written" in text
    assert not (tmp_path / "again").exists()


@pytest.fixture
def relabelled(videos, tmp_path) -> Path:
    """The training videos again: two of class left are other videos of the same name."""
    changed = shutil.copytree(videos / "train", tmp_path / "changed")
    other = draw(tmp_path / "drawn", {"left": 3}, seed=8)
    for number in (1, 2):
        shutil.copy(
            other / "left" / f"left8-{number}.mp4", changed / "left" / f"left1-{number}.mp4"
        )
    return convert(changed, tmp_path / "changed-root", "train")


def test_different_clips_of_one_key_are_refused_by_name_or_chosen(one, relabelled, tmp_path):
    with pytest.raises(UsageError) as caught:
        merged(tmp_path / "all", one, relabelled)
    assert "2 clips stand in several roots with different content" in str(caught.value)
    assert "left1-1" in str(caught.value)
    assert not (tmp_path / "all").exists()
    for choice, source in (("first", one), ("last", relabelled)):
        result = merged(
            tmp_path / choice,
            one,
            relabelled,
            on_conflict=choice,
            selection=Selection(frozenset(["train"])),
        )
        assert result.plan.chosen.num_conflicts == 2
        assert faults(tmp_path / choice) == []
        taken, wanted = samples(tmp_path / choice, "train"), samples(source, "train")
        assert {key: video for key, (video, _) in taken.items()} == {
            key: video for key, (video, _) in wanted.items()
        }


def test_a_clip_in_two_splits_is_refused_or_stands_in_one(videos, tmp_path):
    """A leak between splits: the one that loses is a failed row, as kprep shard books it."""
    flat = tmp_path / "flat"
    flat.mkdir()
    names = ("aaaaaaaaaaa", "bbbbbbbbbbb", "ccccccccccc", "ddddddddddd")
    for number, name in enumerate(names):
        shutil.copy(videos / f"val/up/up2-{number % 3}.mp4", flat / f"{name}_000000_000001.mp4")
    roots = []
    for split, held in (("train", names[:3]), ("val", names)):
        lines = [
            "label,youtube_id,time_start,time_end,split",
            *(f"up,{name},0,1,{split}" for name in held),
        ]
        (tmp_path / f"{split}.csv").write_text("\n".join(lines) + "\n")
        roots.append(
            convert(flat, tmp_path / split, split, "--annotations", tmp_path / f"{split}.csv")
        )
    with pytest.raises(UsageError, match="split train and val"):
        merged(tmp_path / "all", *roots)
    merged(tmp_path / "all", *roots, on_conflict="first")
    assert faults(tmp_path / "all") == []
    assert len(samples(tmp_path / "all", "train")) == 3
    assert len(samples(tmp_path / "all", "val")) == 1
    assert [(row["status"], row["reason"]) for row in ledger(tmp_path / "all", "val")] == [
        *[("failed", "conflicting rows")] * 3,
        ("ok", None),
    ]


def test_profiles_must_agree(videos, one, tmp_path):
    other = convert(videos / "more", tmp_path / "other", "train", "--crf", 30)
    with pytest.raises(UsageError, match=r"another profile.*crf: 30, not 23"):
        merged(tmp_path / "all", one, other)


def test_clips_without_groups_of_pictures_are_carried_as_they_are(one, tmp_path):
    root = Path(shutil.copytree(one, tmp_path / "root"))
    without_gop_index(root)
    subset(root, tmp_path / "out", splits=frozenset(["train"]))
    assert faults(tmp_path / "out") == []
    rows = pq.read_table(tmp_path / "out/index/train.parquet").to_pylist()
    assert len(rows) == 12
    assert {
        (row["codec_config"], row["gop_frames"], row["gop_offsets"], row["gop_crc32"])
        for row in rows
    } == {(None, None, None, None)}


@pytest.mark.slow
def test_tars_of_somebody_else_are_carried_as_they_are(tmp_path):
    """Samples keep their members; keys that repeat from shard to shard get the shard before them."""
    folder = tmp_path / "theirs"
    video2dataset_folder(folder / "train", num_shards=2, clips_a_shard=5, seed=1)
    video2dataset_folder(folder / "val", num_shards=1, clips_a_shard=4, seed=2)
    run_kprep("index", folder)
    copy_dataset(Storage(str(folder)), Storage(str(tmp_path / "val")), splits=["val"])
    assert faults(tmp_path / "val") == []
    copy_dataset(Storage(str(folder)), Storage(str(tmp_path / "copy")))
    assert files_of(tmp_path / "copy") == files_of(folder)
    result = merged(tmp_path / "out", folder)
    assert faults(tmp_path / "out") == []
    assert {name: split.num_clips for name, split in result.manifest.splits.items()} == {
        "train": 9,
        "val": 3,
    }
    theirs, ours = (_members_by_video(root) for root in (folder, tmp_path / "out"))
    assert len(ours) == 12
    assert ours.items() <= theirs.items()
    subset(folder, tmp_path / "few", class_list="all", classes=frozenset(["left", "up"]))
    assert faults(tmp_path / "few") == []
    with pytest.raises(UsageError, match="use --class-list all"):
        subset(folder, tmp_path / "other", classes=frozenset(["left", "up"]))
    run_kprep("index", tmp_path / "copy", "--labels", "none", "--force")
    with pytest.raises(UsageError, match="index each again"):
        merged(tmp_path / "other", folder, tmp_path / "copy", on_conflict="first")


def test_a_second_video_in_a_sample_is_not_taken_for_the_clip(tmp_path):
    """`000.seg.mp4` is a member beside the video `000.mp4`, and stands behind it."""
    folder = tmp_path / "others"
    (folder / "train").mkdir(parents=True)
    with TarWriter(str(folder / "train/00000.tar"), encoder=False) as tar:
        for number, form in enumerate(FORMS[:3]):
            extension, codec, options, _ = form
            data = encode(motion(np.random.default_rng(number), number), extension, codec, options)
            tar.write({"__key__": f"{number:03d}", extension: data, "txt": b"left",
                       f"seg.{extension}": data[:-1] + b"?"})  # fmt: skip
    run_kprep("index", folder)
    subset(folder, tmp_path / "out", count=2, class_list="all")
    assert verify(Storage(str(tmp_path / "out"))).faults == []
    assert len(_members_by_video(tmp_path / "out")) == 2


def test_a_row_whose_video_no_reader_would_find_is_refused(tmp_path):
    job = {"clips": [{"key": "000", "shard": "train/00000.tar", "video_bytes": 3,
                      "content_hash": hashlib.blake2b(b"abc", digest_size=16).hexdigest()}]}  # fmt: skip
    write_tar(tmp_path / "a.tar", [{"__key__": "000", "mp4": b"abc", "json": b"xyz"}])
    _check_places(tmp_path / "a.tar", job)
    write_tar(tmp_path / "b.tar", [{"__key__": "000", "mp4": b"xyz", "json": b"abc"}])
    with pytest.raises(DatasetError, match="clip 000 of train/00000.tar: its video is not the one"):
        _check_places(tmp_path / "b.tar", job)


def _members_by_video(root: Path) -> dict[bytes, dict[str, bytes]]:
    """The other members of every sample, by its video's bytes."""
    found = {}
    for path in root.rglob("*.tar"):
        parts: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                parts.setdefault(key, {})[extension] = tar.extractfile(member).read()
        for members in parts.values():
            videos = [form for form in ("mp4", "mkv", "webm", "avi", "mov") if form in members]
            if videos:
                found[members.pop(videos[0])] = members
    return found


def test_the_class_list_can_be_that_of_what_is_there(one, two, tmp_path):
    merged(
        tmp_path / "val", one, two, selection=Selection(frozenset(["val"])), class_list="present"
    )
    assert (tmp_path / "val/classes.txt").read_text().split() == ["down", "left", "up"]
    assert faults(tmp_path / "val") == []


# -- subset --------------------------------------------------------------------------------------


def test_a_subset_of_everything_has_the_same_shards_byte_for_byte(videos, tmp_path):
    """Same seed, no failed row: the shuffle is kprep shard's own, so even the tars are equal."""
    root = convert(videos / "val", tmp_path / "root", "val")
    subset(root, tmp_path / "copy")
    assert files_of(tmp_path / "copy/val") == files_of(root / "val")
    assert files_of(tmp_path / "copy/index") == files_of(root / "index")
    fingerprints = [json.loads((path / "manifest.json").read_text())["splits"]["val"]["fingerprint"]
                    for path in (root, tmp_path / "copy")]  # fmt: skip
    assert fingerprints[0] == fingerprints[1]


def test_a_subset_by_class_keeps_their_failed_rows_and_renumbers_labels(one, tmp_path):
    subset(one, tmp_path / "up", classes=frozenset(["up", "left"]))
    root = tmp_path / "up"
    assert faults(root) == []
    assert (root / "classes.txt").read_text().split() == ["left", "up"]
    found = samples(root, "train")
    assert {(sidecar.label, sidecar.label_index) for _, sidecar in found.values()} == {
        ("left", 0),
        ("up", 1),
    }
    assert {row["label"] for row in ledger(root, "train")} == {"left", "up"}
    assert Counter(row["status"] for row in ledger(root, "train")) == {"ok": 8, "failed": 2}
    subset(one, tmp_path / "all", classes=frozenset(["up"]), class_list="all")
    assert (tmp_path / "all/classes.txt").read_text().split() == list(CLASSES)
    assert faults(tmp_path / "all") == []


def test_a_subset_by_number_takes_the_first_of_the_shuffle(one, tmp_path):
    result = subset(one, tmp_path / "few", per_class=2, count=5, splits=frozenset(["train"]))
    root = tmp_path / "few"
    assert faults(root) == []
    assert [*result.manifest.splits] == ["train"]
    labels = Counter(sidecar.label for _, sidecar in samples(root, "train").values())
    assert sum(labels.values()) == 5
    assert max(labels.values()) == 2
    ordered = sorted(samples(one, "train"), key=lambda key: place(key, 0))
    for label in CLASSES:
        of_class = [key for key in ordered if samples(one, "train")[key][1].label == label][:2]
        assert sum(key in samples(root, "train") for key in of_class) == labels[label]
    assert {row["status"] for row in ledger(root, "train")} == {"ok"}
    other = subset(one, tmp_path / "other", count=5, seed=3)
    assert other.manifest.splits["train"].num_clips == 5
    assert samples(tmp_path / "other", "train").keys() != samples(root, "train").keys()


def test_a_subset_by_rate_leaves_slow_clips_out_and_streams_at_that_rate(tmp_path):
    """One clip of a low rate among others keeps all of them from being streamed above it."""
    folder, rng = tmp_path / "theirs", np.random.default_rng(5)
    folder.mkdir()
    with TarWriter(str(folder / "00000.tar"), encoder=False) as tar:
        for number, rate in enumerate((30, 4, 8, 30, 24)):
            clip = encode(motion(rng, number, rate=Fraction(rate)), "mp4", "libx264", {})
            tar.write({"__key__": f"clip{number}", "mp4": clip})
    run_kprep("index", folder, "--labels", "none")
    said = "2 of 5 clips, such as clip1: fps .10. must be at most the stored 4; .*--min-fps 10"
    with pytest.raises(UsageError, match=said):
        clip_loader(folder, split="train", frames=4, fps=10, batch_size=1)
    done = run_kprep("subset", folder, tmp_path / "fast", "--min-fps", "10")
    assert "split train: 2 clips below --min-fps are left out" in done.stdout
    assert faults(tmp_path / "fast") == []
    assert {row["key"] for row in ledger(tmp_path / "fast", "train")} == {"clip0", "clip3", "clip4"}
    made = json.loads((tmp_path / "fast/manifest.json").read_text())["splits"]["train"]
    assert made["settings"]["min_fps"] == "10"
    loader = clip_loader(tmp_path / "fast", split="train", frames=4, fps=10, batch_size=1)
    assert sorted(batch.key[0] for batch in loader) == ["clip0", "clip3", "clip4"]
    for bad in ("zero", "0"):
        done = run_kprep("subset", folder, tmp_path / "no", "--min-fps", bad, check=False)
        assert (done.returncode, "--min-fps" in done.stderr) == (2, True), done.stderr


def test_the_command_says_what_it_made(one, tmp_path):
    (tmp_path / "names.txt").write_text("up\n")
    text = run_kprep(
        "subset", one, tmp_path / "up", "--classes-file", tmp_path / "names.txt", "--per-class", 9
    ).stdout
    assert "split train: 1 classes have fewer than 9 clips: 'up' (4)" in text
    assert "4 clips of 4 rows" in text
    assert faults(tmp_path / "up") == []
    again = run_kprep("subset", one, tmp_path / "up", "--classes", "up", "--per-class", 9).stdout
    assert "is complete already; nothing to do" in again
    for words, text in (
        (("--classes", "typo"), "class 'typo' is none of the 3 classes"),
        (("--split", "typo"), "no split 'typo'"),
        (("--classes", "up", "--classes-file", tmp_path / "names.txt"), "exclude each other"),
        (("--classes", "down"), "holds a dataset already"),
    ):
        done = run_kprep("subset", one, tmp_path / "up", *words, check=False)
        assert (done.returncode, text in done.stderr, done.stderr.count("\n")) == (2, True, 1), (
            done.stderr
        )


def test_progress_moves_within_a_shard(tmp_path):
    """By the marks of those that write; a job that is begun again gives its bytes back."""
    booked: list[int] = []
    job_bytes = JobBytes(SimpleNamespace(add=booked.append))
    job_bytes.begin(tmp_path / "one", 100)
    job_bytes.begin(tmp_path / "two", 50)
    mark = Mark(str(tmp_path / "one"))
    for moved in (30, 0, 40):
        mark.add_bytes(moved)
        job_bytes.book()
    assert booked == [30, 0, 40]
    job_bytes.begin(tmp_path / "one", 100)
    job_bytes.book()
    mark.add_bytes(50)  # 120 in its mark, but no job has more than it has
    job_bytes.book()
    job_bytes.end(tmp_path / "one")
    job_bytes.end(tmp_path / "two")
    job_bytes.book()
    assert booked[3:] == [-70, 100, 50]
    mark.close()


def test_those_that_write_shards_say_how_far_they_are(one, tmp_path, monkeypatch):
    moved, booked = [], []
    end = JobBytes.end

    def ended(self, mark):
        moved.append(read_mark(mark)[1])
        end(self, mark)

    monkeypatch.setattr(JobBytes, "end", ended)
    monkeypatch.setattr(ByteProgress, "add", lambda _, count: booked.append(count))
    plan = merged(tmp_path / "out", one).plan
    sizes = [
        plan.shard_bytes(name, n) for name in plan.shards for n in range(len(plan.shards[name]))
    ]
    assert sorted(moved) == sorted(sizes)
    assert sum(booked) == sum(sizes)
    assert not list((tmp_path / "out").rglob("*.mark"))


def test_a_work_folder_below_a_file_is_a_mistake(one, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="work cannot be written: Not a directory; give another"):
        subset(one, tmp_path / "out", work=tmp_path / "file/work")


def test_a_destination_with_something_else_is_refused(one, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match=r"not empty \(it holds thesis.txt\)"):
        subset(one, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    with pytest.raises(UsageError, match="overlap"):
        subset(one, one / "inside")


# -- what decides the bytes ----------------------------------------------------------------------


DIES_WITH_SHARDS = """
import os, signal, sys
from prep.merge_work import MergeWork
real, shards = MergeWork.record, int(sys.argv.pop(1))
def record(self, *facts):
    global shards
    shards -= 1
    if not shards:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, *facts)
MergeWork.record = record
from prep.cli import main
main()
"""


@pytest.mark.slow
def test_workers_and_kills_do_not_change_a_byte(one, two, tmp_path):
    merged(tmp_path / "whole", one, two, clips_per_shard=2)
    wanted = files_of(tmp_path / "whole")
    merged(tmp_path / "three", one, two, clips_per_shard=2, workers=3)
    assert files_of(tmp_path / "three") == wanted
    words = ["--clips-per-shard", "2", "--workers", "1"]
    count = len(tars(tmp_path / "whole"))
    for shards in (1, count // 2, count - 1):
        out = tmp_path / f"killed{shards}"
        died = subprocess.run(
            [sys.executable, "-P", "-c", DIES_WITH_SHARDS, str(shards), "merge", out, one, two,
             *words], capture_output=True, timeout=600, check=False,
        )  # fmt: skip
        assert died.returncode == -signal.SIGKILL, died.stderr
        assert len(tars(out)) >= shards
        assert not (out / "manifest.json").exists()
        run_kprep("merge", out, one, two, *words)
        assert files_of(out) == wanted


DIES_AT = """
import os, signal, sys
from prep.storage import Storage
real, moment = Storage.write, sys.argv.pop(1)
def write(self, path, data):
    if path == moment:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, path, data)
Storage.write = write
from prep.cli import main
main()
"""


@pytest.mark.parametrize("moment", ["index/train.parquet", "README.md", "manifest.json"])
def test_killed_while_publishing_it_continues_without_copying_again(one, tmp_path, moment):
    words = ["subset", one, tmp_path / "out", "--classes", "up", "--workers", 1]
    died = subprocess.run([sys.executable, "-P", "-c", DIES_AT, moment, *map(str, words)],
                          capture_output=True, timeout=120, check=False)  # fmt: skip
    assert died.returncode == -signal.SIGKILL
    assert not (tmp_path / "out/manifest.json").exists()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.tar")}
    refused = run_kprep("subset", one, tmp_path / "out", "--classes", "down", check=False)
    assert (refused.returncode, "was begun from other roots" in refused.stderr) == (2, True)
    run_kprep(*words)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.tar")} == written
    subset(one, tmp_path / "whole", classes=frozenset(["up"]))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_shard_that_did_not_last_is_made_again(one, tmp_path):
    words = ["subset", one, tmp_path / "out", "--clips-per-shard", 5, "--workers", 1]
    died = subprocess.run([sys.executable, "-P", "-c", DIES_AT, "index/train.parquet", *map(str, words)],
                          capture_output=True, timeout=120, check=False)  # fmt: skip
    assert died.returncode == -signal.SIGKILL
    flip(tmp_path / "out/train/train-000000.tar")
    (tmp_path / "out/train/train-000001.tar").unlink()
    notes = tmp_path / "out/.kprep-work/merge-work/val-000000.json"  # only told by its checksum
    facts = json.loads(notes.read_text())
    facts["facts"]["places"][0][1] += 512
    notes.write_text(json.dumps(facts))
    done = run_kprep(*words)
    assert "2 shards that an earlier run had finished had to be made again: train/train-000000.tar was altered" in done.stdout  # fmt: skip
    subset(one, tmp_path / "whole", clips_per_shard=5, class_list="all")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("name", ["plan.json", "train-000000.mark", "train-000000.json"])
def test_a_full_disk_is_named_with_the_file_and_the_same_command_goes_on(
    one, tmp_path, monkeypatch, name
):
    """Whichever file of the work folder is the first that finds no room."""

    def write(path, data):
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(path, data)

    whole = Path.write_bytes
    out = tmp_path / "out"
    with monkeypatch.context() as full:
        full.setattr("prep.merge_work.write_atomic", write)
        full.setattr(Path, "write_bytes", write)
        with pytest.raises(StorageError) as caught:
            subset(one, out)
    where = out / ".kprep-work/merge-work" / name
    assert str(caught.value) == (
        f"{where} cannot be written (No space left on device); see that there is room and that the "
        "disk is sound, then run the same command again"
    )
    subset(one, out)
    assert faults(out) == []


def test_signals_end_a_merge_cleanly_and_it_says_how_to_go_on(one, two, tmp_path):
    words = ["merge", tmp_path / "out", one, two, "--clips-per-shard", 1, "--workers", 1]
    process = subprocess.Popen([sys.executable, "-P", "-m", "prep", *map(str, words)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
    while (
        not (tmp_path / "out/.kprep-work/merge-work/plan.json").exists() and process.poll() is None
    ):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (130, 143), errors
    assert b"run the same command again" in errors
    assert b"Traceback" not in errors
    assert not (tmp_path / "out/manifest.json").exists()


def test_a_clip_that_is_damaged_is_named_and_nothing_is_published(one, tmp_path):
    root = Path(shutil.copytree(one, tmp_path / "root"))
    row = pq.read_table(root / "index/val.parquet").to_pylist()[3]
    flip(root / row["shard"], row["video_offset"] + row["video_bytes"] // 2)
    with pytest.raises(DatasetError) as caught:
        subset(root, tmp_path / "out")
    assert row["key"] in str(caught.value)
    assert "is damaged" in str(caught.value)
    assert not (tmp_path / "out/manifest.json").exists()
    shutil.copy(one / row["shard"], root / row["shard"])
    subset(root, tmp_path / "out")
    assert faults(tmp_path / "out") == []


@pytest.mark.parametrize("damage", ["header", "sidecar", "index"])
def test_other_damage_is_named_too(one, tmp_path, damage):
    root = Path(shutil.copytree(one, tmp_path / "root"))
    row = pq.read_table(root / "index/train.parquet").to_pylist()[1]
    data = bytearray((root / row["shard"]).read_bytes())
    start = row["entry_offset"]
    if damage == "header":
        data[start : start + 4] = b"../x"
    elif damage == "sidecar":
        data[start + 512 : start + 514] = b"[1"
    else:
        flip(root / "index/train.parquet")
    (root / row["shard"]).write_bytes(data)
    with pytest.raises(DatasetError):
        subset(root, tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize("column", ["content_hash", "crc32"])
def test_either_checksum_of_the_index_is_compared(one, tmp_path, column):
    root = Path(shutil.copytree(one, tmp_path / "root"))
    path = root / "index/train.parquet"
    table = pq.read_table(path)
    at, values = table.column_names.index(column), table[column].to_pylist()
    values[1] = bytes(16) if column == "content_hash" else values[1] ^ 1
    field = table.schema.field(at)
    pq.write_table(table.set_column(at, field, pa.array(values, type=field.type)), path)
    relist(root, "index/train.parquet")
    with pytest.raises(DatasetError, match="is damaged: its hash is not the index's"):
        subset(root, tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()


# -- buckets -------------------------------------------------------------------------------------


def test_a_file_is_no_work_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="--work .*file is a file; give a folder"):
        merged(tmp_path / "out", tmp_path / "root", work=tmp_path / "file")
    assert not (tmp_path / "out").exists()


def test_from_buckets_into_a_bucket_as_on_disk(one, two, s3, tmp_path):
    merged(tmp_path / "disk", one, two)
    urls = [s3.upload(root, f"merge/{root.name}") for root in (one, two)]
    refused = run_kprep("merge", "s3://kprep/merge/out", *urls, check=False, **s3.environment)
    assert (refused.returncode, "--work DIR" in refused.stderr) == (2, True)
    run_kprep(
        "merge",
        "s3://kprep/merge/out",
        *urls,
        "--work",
        tmp_path / "work",
        "--workers",
        1,
        **s3.environment,
    )
    assert objects_of(s3, "merge/out") == files_of(tmp_path / "disk")
    assert not list((tmp_path / "work").rglob("*.tar"))
    run_kprep("verify", "s3://kprep/merge/out", **s3.environment)


def test_through_resets_503s_and_truncation_the_bytes_are_the_same(one, s3, tmp_path):
    s3.upload(one, "merge/faulty")
    subset(one, tmp_path / "disk", count=9)
    rates = {"reset": 0.08, "status_503": 0.08, "truncate_206": 0.08, "close": 0.08}
    with fault_proxy(s3.endpoint, by_rate(5, **rates)) as proxy:
        options = {**s3.options, "endpoint": proxy.endpoint}
        source = Storage("s3://kprep/merge/faulty", options, RetryPolicy(30, 0.01, 0.1))
        merge(MergeOptions((source,), Storage(str(tmp_path / "out")), "kprep subset", Selection(count=9),
                           class_list="chosen", workers=1))  # fmt: skip
        assert proxy.faults
    assert files_of(tmp_path / "out") == files_of(tmp_path / "disk")


# -- the plan ------------------------------------------------------------------------------------

KEYS = st.text(st.sampled_from("abcdef01"), min_size=1, max_size=3)
LABELS = st.sampled_from([None, "x", "y", "z"])


@st.composite
def roots(draw):
    """Clips of one to three roots; a key stands once in a root."""
    found = []
    for root in range(draw(st.integers(1, 3))):
        for row, key in enumerate(draw(st.lists(KEYS, unique=True, max_size=12))):
            split, label = draw(st.sampled_from(["train", "val"])), draw(LABELS)
            content = draw(st.sampled_from([b"1" * 16, b"2" * 16]))
            rate = Fraction(draw(st.integers(1, 3)))
            found.append(Clip(root, split, row, key, label, content, 1, rate))
    return found


@given(roots(), st.sampled_from(["first", "last"]), st.integers(0, 3), st.booleans())
def test_every_key_is_taken_once_and_by_the_rule(clips, on_conflict, seed, by_class):
    selection = Selection(classes=frozenset(["x", "y"]) if by_class else None)
    chosen = choose(clips, selection, seed, on_conflict)
    taken = [clip for found in chosen.clips.values() for clip in found]
    assert len({clip.key for clip in taken}) == len(taken)
    assert all(clip.split == split for split, found in chosen.clips.items() for clip in found)
    by_key: dict[str, list[Clip]] = {}
    for clip in clips:
        by_key.setdefault(clip.key, []).append(clip)
    for key, found in by_key.items():
        split, root = chosen.winners[key]
        winner = next(clip for clip in found if (clip.split, clip.root) == (split, root))
        assert winner.identity == (found[0] if on_conflict == "first" else found[-1]).identity
        assert (winner in taken) == (not by_class or winner.label in ("x", "y"))
    assert chosen.num_equal + chosen.num_conflicts == len(clips) - len(by_key)
    if on_conflict == "first":
        assert choose(clips, selection, seed, on_conflict) == chosen
    conflicting = any(len({clip.identity for clip in found}) > 1 for found in by_key.values())
    if conflicting:
        with pytest.raises(UsageError, match="different content"):
            choose(clips, selection, seed, "error")
    else:
        assert choose(clips, selection, seed, "error").clips == chosen.clips


@given(roots(), st.integers(1, 4), st.integers(1, 9), st.integers(0, 3), st.integers(1, 5))
def test_draws_are_the_beginning_of_the_shuffle_and_shards_are_full(
    clips, per_class, count, seed, size
):
    everything = choose(clips, Selection(), seed, "first")
    drawn = choose(clips, Selection(per_class=per_class, count=count), seed, "first")
    for split, found in everything.clips.items():
        expected, seen = [], Counter()
        for clip in found:
            seen[clip.label] += 1
            if seen[clip.label] <= per_class:
                expected.append(clip)
        assert drawn.clips[split] == expected[:count]
        shards = deal(found, size)
        assert [clip for shard in shards for clip in shard] == found
        assert all(len(shard) == size for shard in shards[:-1])
        assert 0 < len(shards[-1]) <= size
        assert found == sorted(found, key=lambda clip: place(clip.key, seed))


@given(st.lists(st.lists(st.sampled_from("abcdefgh"), unique=True), min_size=1, max_size=4))
def test_classes_are_a_union_in_an_order_of_their_own(lists):
    names = merge_classes(lists)
    assert set(names) == {name for found in lists for name in found}
    assert len(set(names)) == len(names)
    if all(found == lists[0] for found in lists):
        assert list(names) == lists[0]
    wanted = Selection(classes=frozenset(names[:2]))
    assert kept_classes(names, wanted, "chosen", ()) == names[:2]
    assert kept_classes(names, wanted, "all", ()) == names
    assert kept_classes(names, wanted, "present", names[:1]) == names[:1]


def test_numbers_are_sorted_as_numbers_and_a_typo_is_named():
    assert merge_classes([["2"], ["10"]]) == ("2", "10")
    with pytest.raises(UsageError, match="class 'Up' is none of the 2 classes"):
        check_classes({"Up"}, ("down", "up"))


ROW = st.tuples(KEYS, st.sampled_from(["ok", "failed", "pending"]), st.integers(0, 2))


@settings(max_examples=200)
@given(
    st.lists(st.lists(ROW, max_size=8, unique_by=lambda row: row[0]), min_size=1, max_size=3),
    st.integers(0, 2),
)
def test_ledgers_add_up_and_late_clips_are_ok(lists, num_bad):
    """Each root: keys with an outcome and so many repeats, and rows that could not be read."""
    ledgers, winners = {}, {}
    for root, rows in enumerate(lists):
        table = []
        for key, status, repeats in rows:
            table.append((key, status, "why" if status == "failed" else ""))
            table += [(key, "duplicate", key)] * repeats
            if status == "ok":
                winners.setdefault(key, ("train", root))
        table += [(None, "failed", f"line {number}") for number in range(num_bad)]
        ledgers[root] = _ledger(table, root)
    taken = frozenset(winners)
    merged = merge_ledgers("train", ledgers, winners, taken, Selection())
    keys = {row[0] for rows in lists for row in rows}
    by_key = Counter(merged["key"].to_pylist())
    for key in keys:
        most = max(row[2] for rows in lists for row in rows if row[0] == key)
        assert by_key[key] == 1 + most
    assert by_key[None] == num_bad
    assert counts(merged)["ok"] == len(taken)
    assert sum(counts(merged).values()) == merged.num_rows
    for row in merged.to_pylist():
        if row["status"] == "ok":
            assert row["source"] == f"root {winners[row['key']][1]}"
    assert merged["row"].to_pylist() == list(range(1, merged.num_rows + 1))


def _ledger(rows, root: int) -> pa.Table:
    values = []
    for number, (key, status, detail) in enumerate(rows, 1):
        reason = {"failed": "truncated" if key else "bad row"}.get(status)
        source = f"root {root}" if status == "ok" else None
        values.append({"row": number, "key": key, "label": "x", "status": status, "reason": reason,
                       "detail": detail, "source": source})  # fmt: skip
    return pa.Table.from_pylist(values, schema=SCHEMA)


@pytest.mark.parametrize("settings", [{}, {"foreign": {"keys": "shard"}}])
def test_tars_of_which_it_is_not_known_how_they_were_indexed_are_not_merged(settings):
    with pytest.raises(DatasetError, match=r"settings\.foreign.* index the tars again"):
        foreign_rules("train", Split("0" * 64, 0, 0, {}, (), settings))
