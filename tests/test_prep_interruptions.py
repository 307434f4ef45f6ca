"""Conversions that end at the worst moments, meet each other, or are given the wrong places."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from conftest import run_kprep
from processes import descendants, is_running
from test_prep_shard import fake_ffmpeg, files_of, kinetics_csv, ledger

from prep import dask_pool
from prep.conversion import check_fatal
from prep.conversion_plan import _changed
from prep.demo_videos import random_motion, write_video
from prep.errors import DatasetError, KprepError, UsageError
from prep.journal import Journal
from prep.open_journal import journal_of
from prep.options import ShardOptions
from prep.profile import PROFILES
from prep.signals import handling
from prep.storage import Storage
from prep.verify import verify
from prep.worker_pool import Job, WorkerPool


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("source") / "videos", np.random.default_rng(8)
    for number in range(6):
        target = folder / ("left", "up")[number % 2] / f"{number}.mp4"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_video(target, random_motion("left", rng), "libx264")
    return folder


def arguments(videos, root, split="train", *more):
    return (
        "shard",
        videos,
        root,
        "--split",
        split,
        "--profile",
        "small",
        "--clips-per-shard",
        3,
        *more,
    )


@pytest.fixture(scope="module")
def reference(videos, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("reference") / "root"
    run_kprep(*arguments(videos, root))
    return root


DIES_AT = """
import os, signal, sys
from prep.errors import DatasetError
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


@pytest.mark.parametrize(
    "moment", ["index/train.parquet", "ledger/train.parquet", "wids-train.json", "classes.txt", ".nv-meta/split.yaml",
               "README.md", "manifest.json"])  # fmt: skip
def test_killed_while_publishing_it_continues(videos, reference, tmp_path, moment):
    root = tmp_path / "root"
    words = [sys.executable, "-P", "-c", DIES_AT, moment, *map(str, arguments(videos, root))]
    assert (
        subprocess.run(words, capture_output=True, timeout=120, check=False).returncode
        == -signal.SIGKILL
    )
    (root / ".README.md.99999.tmp").write_bytes(b"left by a killed writer")
    run_kprep(*arguments(videos, root))
    assert files_of(root) == files_of(reference)
    assert sorted(path.name for path in root.iterdir()) == sorted(
        path.name for path in reference.iterdir()
    )


@pytest.fixture(scope="module")
def unpublished(videos, tmp_path_factory) -> Path:
    """A root whose shards stand, and whose conversion was killed before it published."""
    root = tmp_path_factory.mktemp("unpublished") / "root"
    words = [sys.executable, "-P", "-c", DIES_AT, "index/train.parquet", *map(str, arguments(videos, root))]  # fmt: skip
    died = subprocess.run(words, capture_output=True, timeout=120, check=False)
    assert died.returncode == -signal.SIGKILL
    return root


@pytest.mark.parametrize(
    ("damage", "told"),
    [("gone", "train-000000.tar is gone"), ("cut", "train-000000.tar has 3000 bytes, not "),
     ("flipped", "train-000000.tar was altered"), ("index", "train-000000.tar.idx is gone")],
)  # fmt: skip
def test_a_finished_shard_that_did_not_last_is_made_again(
    videos, reference, unpublished, tmp_path, damage, told
):
    root = Path(shutil.copytree(unpublished, tmp_path / "root"))
    tar = root / "train/train-000000.tar"
    data = bytearray(tar.read_bytes())
    if damage in ("gone", "index"):
        (tar if damage == "gone" else tar.with_name(f"{tar.name}.idx")).unlink()
    elif damage == "cut":
        tar.write_bytes(data[:3000])
    else:
        data[len(data) // 2] ^= 1
        tar.write_bytes(data)
    done = run_kprep(*arguments(videos, root))
    assert f"1 shard that an earlier run had finished had to be made again: train/{told}" in done.stdout  # fmt: skip
    assert files_of(root) == files_of(reference)


def test_a_finished_shard_in_a_bucket_is_read_unless_its_etag_is_that_of_the_upload(
    s3, tmp_path, monkeypatch
):
    from prep.assemble import assemble
    from prep.standing_shards import altered_shards

    clips = []
    for number, size in enumerate((1000, 6 << 20)):  # the second one goes up in two parts
        (tmp_path / "pack").mkdir(exist_ok=True)
        (pack := tmp_path / "pack" / str(number)).write_bytes(bytes(size))
        digest = hashlib.blake2b(bytes(size), digest_size=16).hexdigest()
        clips.append({"row": 1, "key": "k", "file": str(pack), "offset": 0, "bytes": size,
                      "sidecar": "{}", "content_hash": digest})  # fmt: skip
    storage, shards = Storage(f"s3://kprep/{tmp_path.name}", s3.options), {}
    for number, clip in enumerate(clips):
        job = {"root": storage.root, "options": storage.options, "work": str(tmp_path),
               "path": f"val/val-{number:06d}.tar", "clips": [clip]}  # fmt: skip
        shards["val", number] = assemble(job)
    read, real = [], Storage.read_range

    def read_range(self, path, *places, **more):
        read.append(path)
        return real(self, path, *places, **more)

    monkeypatch.setattr(Storage, "read_range", read_range)
    assert altered_shards(storage, shards) == {}
    assert all(path.endswith(".idx") for path in read)
    begun_before = {shard: {**facts, "etag": None} for shard, facts in shards.items()}
    assert altered_shards(storage, begun_before) == {}
    assert {path for path in read if path.endswith(".tar")} == {
        "val/val-000000.tar", "val/val-000001.tar",
    }  # fmt: skip
    data = bytearray(storage.read("val/val-000000.tar"))
    data[700] ^= 4
    storage.write("val/val-000000.tar", bytes(data))
    storage.delete("val/val-000001.tar")
    assert altered_shards(storage, shards) == {
        ("val", 0): "val/val-000000.tar was altered",
        ("val", 1): "val/val-000001.tar is gone",
    }


ALTERED = {
    "rows": "UPDATE rows SET facts = json_set(facts, '$.num_frames', 1) WHERE row = 2",
    "status": "UPDATE rows SET reason = 'not ! video' WHERE row = 2",
    "shards": "UPDATE shards SET facts = json_set(facts, '$.md5', '0') WHERE shard = 1",
    "settings": "UPDATE settings SET value = '[\"left\", \"uq\"]' WHERE name = 'class_names'",
}


@pytest.mark.parametrize("what", ALTERED)
def test_a_journal_that_is_not_as_it_was_written_publishes_nothing(
    videos, reference, unpublished, tmp_path, what
):
    """Written by a connection that keeps no seals, as a flipped bit is."""
    root = Path(shutil.copytree(unpublished, tmp_path / "root"))
    path = root / ".kprep-work/train/journal.sqlite"
    with closing(sqlite3.connect(path)) as journal, journal:
        journal.execute(ALTERED[what])
    done = run_kprep(*arguments(videos, root), check=False)
    assert done.returncode == 1
    assert f"{path} is damaged (entry " in done.stderr
    assert not (root / "manifest.json").exists()
    if what == "rows":
        run_kprep(*arguments(videos, root, "train", "--force"))
        assert files_of(root) == files_of(reference)


def test_bits_that_flip_in_a_journal_are_noticed_or_do_no_harm(unpublished, tmp_path):
    found = Path(shutil.copytree(unpublished / ".kprep-work/train", tmp_path / "work"))
    with journal_of(found, "train") as journal:  # which puts its log into the file
        whole = contents(journal)
    data, rng = (found / "journal.sqlite").read_bytes(), random.Random(3)
    noticed = 0
    for _ in range(300):
        altered = bytearray(data)
        altered[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (found / "journal.sqlite").write_bytes(altered)
        try:
            with journal_of(found, "train") as journal:
                assert contents(journal) == whole
        except KprepError:
            noticed += 1
    assert noticed > 30  # most of so small a file is empty


def contents(journal: Journal) -> list[object]:
    names = ("identity", "root", "class_names", "labels", "settings", "neighbours")
    settings = [journal.setting(name) for name in names]
    return [*settings, journal.shards(), *journal.all_rows()]


def test_a_conversion_that_was_begun_without_seals_is_continued(
    videos, reference, unpublished, tmp_path
):
    root = Path(shutil.copytree(unpublished, tmp_path / "root"))
    with closing(sqlite3.connect(root / ".kprep-work/train/journal.sqlite")) as journal:
        for table in ("rows", "shards", "settings"):
            journal.execute(f"ALTER TABLE {table} DROP COLUMN seal")
    run_kprep(*arguments(videos, root))
    assert files_of(root) == files_of(reference)


def test_killed_while_publishing_a_second_split_it_continues(videos, tmp_path):
    root, whole = tmp_path / "root", tmp_path / "whole"
    for target in (root, whole):
        run_kprep(*arguments(videos, target))
    words = [
        sys.executable,
        "-P",
        "-c",
        DIES_AT,
        "manifest.json",
        *map(str, arguments(videos, root, "val")),
    ]
    assert (
        subprocess.run(words, capture_output=True, timeout=120, check=False).returncode
        == -signal.SIGKILL
    )
    run_kprep(*arguments(videos, root, "val"))
    run_kprep(*arguments(videos, whole, "val"))
    assert files_of(root) == files_of(whole)


def test_a_journal_that_was_only_created_is_no_obstacle(videos, reference, tmp_path):
    journal = tmp_path / "root/.kprep-work/train/journal.sqlite"
    journal.parent.mkdir(parents=True)
    journal.touch()
    run_kprep(*arguments(videos, tmp_path / "root"))
    assert files_of(tmp_path / "root") == files_of(reference)


@pytest.mark.usefixtures("heard_hangups")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_drains_and_exits_143(videos, reference, tmp_path, number):
    root = tmp_path / "root"
    words = [
        sys.executable,
        "-P",
        "-m",
        "prep",
        *map(str, arguments(videos, root, "train", "--workers", 1)),
    ]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not list(root.glob(".kprep-work/train/staged/*.pack")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(number)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 143
    assert b"Interrupted; run the same command again" in said
    run_kprep(*arguments(videos, root))
    assert files_of(root) == files_of(reference)


def shard_of_a_lost_clip(folder: Path) -> Job:
    """Return a job that is answered at once: its row 7 is lost."""
    clip = {
        "row": 7,
        "file": str(folder / "nowhere"),
        "offset": 0,
        "bytes": 1,
        "content_hash": "0",
    }
    values = {"root": str(folder), "options": {}, "path": "a.tar", "work": "", "clips": [clip]}
    return Job(None, values)


def test_workers_started_ahead_serve_and_are_gone_afterwards(tmp_path):
    others = set(descendants(os.getpid()))  # such as the S3 server of other tests
    with WorkerPool("assemble", 3, 60.0) as pool:
        pool.start_ahead(2)
        started = set(descendants(os.getpid())) - others
        pool.submit(shard_of_a_lost_clip(tmp_path))
        answers = []
        while pool.unfinished:
            answers += [result for _, result in pool.results(0.1)]
        assert len(started) == 2
        assert set(descendants(os.getpid())) - others == started
    assert answers == [{"lost": [7]}]
    assert not any(map(is_running, started))


def test_a_worker_that_is_killed_as_it_starts_costs_nothing(tmp_path):
    """As the kernel does where memory is short."""
    with WorkerPool("assemble", 1, 60.0) as pool:
        pool.submit(shard_of_a_lost_clip(tmp_path))
        pool._workers[0].process.kill()
        answers = []
        while pool.unfinished:
            answers += [result for _, result in pool.results(0.1)]
    assert answers == [{"lost": [7]}]


def test_workers_that_are_always_killed_as_they_start_end_the_run():
    with WorkerPool("assemble", 1, 60.0) as pool:
        pool.start_ahead(1)
        pool._workers[0].process.kill()
        while pool._workers:
            assert list(pool.results(0.1)) == []
        pool.start_ahead(1)
        pool._workers[0].process.kill()
        with pytest.raises(KprepError, match="end as they start, by signal 9; often the kernel's"):
            while True:
                list(pool.results(0.1))


def test_an_error_of_a_worker_keeps_its_kind_and_its_own_way_out(monkeypatch):
    def refuse(_):
        raise UsageError("no ffmpeg found; install one")

    monkeypatch.setattr(dask_pool, "encode", refuse)
    with pytest.raises(UsageError, match="^no ffmpeg found; install one$"):
        check_fatal(dask_pool.run_job({}))


def test_signals_are_handled_in_the_block_and_in_the_main_thread_only():
    before, told = signal.getsignal(signal.SIGTERM), []
    with handling(told.append):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: handling(print).__enter__()).result()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert told == [signal.SIGTERM, signal.SIGINT]
    assert signal.getsignal(signal.SIGTERM) is before


def test_large_jobs_and_results_do_not_block_each_other(tmp_path):
    """Jobs and results of full-size shards are far larger than a pipe: no deadlock."""
    clip = {"row": 0, "file": str(tmp_path / "nowhere"), "offset": 0, "bytes": 1, "content_hash": "0" * 32,
            "sidecar": "x" * 400}  # fmt: skip
    values = {"root": str(tmp_path), "options": {}, "path": "train/train-000000.tar", "work": str(tmp_path),
              "clips": [{**clip, "row": row, "key": f"{row:060d}"} for row in range(40_000)]}  # fmt: skip
    with WorkerPool("assemble", 1, 60.0, ahead=1) as pool:
        for number in range(3):
            pool.submit(Job(number, values))
        answers = []
        while pool.unfinished:
            answers += [(job.tag, len(result["lost"])) for job, result in pool.results(0.1)]
    assert answers == [(0, 40_000), (1, 40_000), (2, 40_000)]


def test_a_shard_built_again_whose_run_was_killed_gives_its_clips(tmp_path):
    """The tar is new, the journal old: clips are found by their names."""
    from prep.assemble import assemble

    pack = tmp_path / "0.pack"
    pack.write_bytes(b"".join(bytes([number]) * 1000 for number in range(3)))
    clips = [
        {"row": number, "key": f"k{number}", "file": str(pack), "offset": 1000 * number, "bytes": 1000, "sidecar": "{}",
         "content_hash": hashlib.blake2b(bytes([number]) * 1000, digest_size=16).hexdigest()}
        for number in range(3)
    ]  # fmt: skip
    job = {
        "root": str(tmp_path / "r"),
        "options": {},
        "path": "train/train-000000.tar",
        "work": str(tmp_path),
    }
    before = {key: place[-1] for key, *place in assemble({**job, "clips": clips[1:]})["places"]}
    whole = assemble({**job, "clips": clips})  # killed here: the journal has the places of before
    pack.unlink()
    old = [{**clip, "file": None, "offset": before[clip["key"]]} for clip in clips[1:]]
    assert assemble({**job, "clips": [clips[0], *old]}) == {"lost": [0]}
    first = {**clips[0], "file": None, "offset": 0}
    assert assemble({**job, "clips": [first, *old]}) == whole


def test_staged_bytes_that_a_power_cut_took_are_encoded_again(tmp_path):
    """The file has its length, as a file system leaves it whose pages were not written."""
    from prep.assemble import assemble

    pack, data = tmp_path / "0.pack", b"coded pictures"
    pack.write_bytes(bytes(len(data)))
    clip = {"row": 7, "key": "k", "file": str(pack), "offset": 0, "bytes": len(data), "sidecar": "{}",
            "content_hash": hashlib.blake2b(data, digest_size=16).hexdigest()}  # fmt: skip
    job = {"root": str(tmp_path / "r"), "options": {}, "path": "val/val-000000.tar",
           "work": str(tmp_path), "clips": [clip]}  # fmt: skip
    assert assemble(job) == {"lost": [7]}
    assert not list(tmp_path.rglob("*.tar"))


def test_a_clip_that_is_lost_twice_ends_the_run_and_equal_answers_count_once(tmp_path):
    from prep.conversion import Conversion
    from prep.outcome import Reason
    from prep.segment import Segment
    from prep.source import Offer

    class Source:
        name, several_files = "cvdf", True

    journal = Journal(tmp_path / "journal.sqlite", "val")
    journal.plan([Segment("aaaaaaaaaaa", 0.0, 1.0, "x", "val")], seed=0, clips_per_shard=4, limit=None,
                 classes=frozenset(), taken_keys=frozenset())  # fmt: skip
    options = ShardOptions(("cvdf:k400",), str(tmp_path), "val", PROFILES["small"])
    conversion = Conversion(options, journal, tmp_path, [Source()], None, None)
    for _ in range(2):  # the same file, before an interruption and after it
        row = next(journal.pending())
        conversion._take(Source, Offer(row, [], refusal=(Reason.TRUNCATED, "no moov")))
        journal.commit()
    assert len(next(journal.pending()).answers) == 1
    journal.mark_done("cvdf", "a.tar")
    conversion._lose(1, 0)
    journal.mark_done("cvdf", "b.tar")  # it may have been read past the row
    assert not journal.is_done("cvdf", "a.tar")
    assert not journal.is_done("cvdf", "b.tar")
    with pytest.raises(KprepError, match="does not keep what is written there"):
        conversion._lose(1, 0)
    journal.close()


def test_info_shows_a_split_in_the_making(videos, tmp_path):
    process = paused(videos, tmp_path / "root")
    process.kill()
    process.wait()
    text = run_kprep("info", tmp_path / "root").stdout
    assert "split train, not published yet" in text
    assert re.search(r"rows +6: .*pending", text)
    run_kprep(*arguments(videos, tmp_path / "root"))
    assert "not published" not in run_kprep("info", tmp_path / "root").stdout


# -- two at once ---------------------------------------------------------------------------------


def paused(videos, root, *more) -> subprocess.Popen[bytes]:
    """A conversion that has begun and is then stopped in its tracks."""
    words = [sys.executable, "-P", "-m", "prep", *map(str, arguments(videos, root, *more))]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    places = (Path(root).glob, "**/*.pack"), (Path(root).parent.glob, "elsewhere/**/*.pack")
    while not any(any(glob(form)) for glob, form in places) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)
    return process


@pytest.mark.parametrize("more", [(), ("--work", "other")], ids=["same work", "other work"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_second_run_on_a_root_is_told_so(videos, tmp_path, more, split):
    root = tmp_path / "root"
    process = paused(videos, root)
    try:
        more = tuple(str(tmp_path / word) if word == "other" else word for word in more)
        done = run_kprep(*arguments(videos, root, split, *more), check=False)
        assert done.returncode == 2
        assert "another kprep is converting" in done.stderr
    finally:
        process.send_signal(signal.SIGCONT)
        process.wait(60)
    assert process.returncode == 0
    assert verify(Storage(str(root))).faults == []


def test_a_work_folder_belongs_to_one_root(videos, tmp_path):
    work = tmp_path / "elsewhere"
    process = paused(videos, tmp_path / "one", "train", "--work", work)
    process.kill()
    process.wait()
    done = run_kprep(*arguments(videos, tmp_path / "two", "train", "--work", work), check=False)
    assert done.returncode == 2
    assert "belongs to the conversion into" in done.stderr
    run_kprep(*arguments(videos, tmp_path / "one", "train", "--work", work))


@pytest.mark.parametrize("more", [(), ("--force",)], ids=["continued", "thrown away"])
def test_a_root_that_was_moved_keeps_its_unfinished_work(videos, reference, tmp_path, more):
    fake = fake_ffmpeg(tmp_path, "up/1", f"[ -e {tmp_path}/crash ] && kill -9 $PPID")
    (tmp_path / "crash").touch()
    same = {"KPREP_FFMPEG": str(fake)}
    begun = run_kprep(*arguments(videos, tmp_path / "one"), check=False, **same)
    assert begun.returncode == 1
    assert list((tmp_path / "one" / "train").glob("*.tar"))
    (tmp_path / "one").rename(tmp_path / "two")
    (tmp_path / "crash").unlink()
    run_kprep(*arguments(videos, tmp_path / "two", "train", *more), **same)
    shards = {path: data for path, data in files_of(reference).items() if path.endswith(".tar")}
    assert shards.items() <= files_of(tmp_path / "two").items()


def test_a_bucket_may_be_spelled_with_a_slash(tmp_path):
    from prep.root_state import begun_splits, check_owner

    (tmp_path / "val").mkdir()
    journal = Journal(tmp_path / "val" / "journal.sqlite", "val")
    journal.set("root", "s3://bucket/prefix")
    journal.close()
    for root, owns in (("s3://bucket/prefix/", True), ("s3://bucket/other", False)):
        options = ShardOptions(("v",), root, "val", PROFILES["small"], work=tmp_path)
        assert begun_splits(options) == ({"val"} if owns else set())
        if owns:
            check_owner(options, tmp_path / "val")
        else:
            with pytest.raises(UsageError, match="into s3://bucket/prefix"):
                check_owner(options, tmp_path / "val")


def test_a_conversion_has_one_client_for_its_root(tmp_path):
    options = ShardOptions(("v",), "s3://bucket/prefix", "val", PROFILES["small"], work=tmp_path)
    assert options.storage is options.storage


@pytest.mark.parametrize("what", ["ffmpeg_sha256", "profile", "class_list"])
def test_a_conversion_begun_with_something_else_is_refused(videos, tmp_path, what):
    from prep.ffmpeg_binary import find_ffmpeg

    root = tmp_path / "root"
    process = paused(videos, root)
    process.kill()
    process.wait()
    (tmp_path / "classes.txt").write_text("up\nleft\n")
    other = tmp_path / "ffmpeg"
    other.write_text(f'#!/bin/sh\nexec "{find_ffmpeg().path}" "$@"\n')
    other.chmod(0o755)
    more = {
        "profile": ("--crf", "30"),
        "class_list": ("--class-list", tmp_path / "classes.txt"),
    }.get(what, ())
    environment = {"KPREP_FFMPEG": str(other)} if what == "ffmpeg_sha256" else {}
    done = run_kprep(*arguments(videos, root, "train", *more), check=False, **environment)
    assert done.returncode == 2
    named = "--class-list was not given, is given" if what == "class_list" else f"{what} was"
    assert named in " ".join(done.stderr.split())
    if what == "profile":  # what differs, and not the eleven fields of both
        assert re.search(
            r"begun differently: profile was (\w+) \(name: custom-\w{8}, not \1; crf: 30, not \d+\); ",
            " ".join(done.stderr.split()),
        )
    run_kprep(*arguments(videos, root))


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        (["up"], None, "--class-list was given, is not given"),
        (["up", "down"], ["down", "up"], "--class-list has the same classes in another order"),
        (["up", "down"], ["up"], "--class-list has other classes: down missing"),
        (
            [f"old {number}" for number in range(400)],
            ["left", "right"],
            "--class-list has other classes: old 0, old 1, old 2 and 397 more missing; left, right new",
        ),
    ],
)
def test_another_list_of_classes_is_not_said_whole(tmp_path, was, now, said):
    options = ShardOptions(("v",), str(tmp_path), "val", PROFILES["small"])
    assert _changed(options, "class_list", was, now) == said


def test_force_removes_nothing_that_is_not_ours(videos, tmp_path):
    root = tmp_path / "root"
    process = paused(videos, root)
    process.kill()
    process.wait()
    (root / "train").mkdir(exist_ok=True)
    (root / "train" / "thesis.txt").write_text("precious")
    done = run_kprep(*arguments(videos, root, "train", "--force"), check=False)
    assert (done.returncode, "thesis.txt" in done.stderr) == (2, True)
    assert (root / "train" / "thesis.txt").read_text() == "precious"
    (root / "train" / "thesis.txt").unlink()
    run_kprep(*arguments(videos, root, "train", "--force"))


# -- sources and lists that change ---------------------------------------------------------------


def test_a_source_that_is_dropped_leaves_no_row_behind(videos, tmp_path):
    """A row that one source has answered, and that waits for another which is gone now, ends."""
    (tmp_path / "v").mkdir()
    shutil.copy(videos / "left" / "0.mp4", tmp_path / "v" / "aaaaaaaaaaa_000000_000001.mp4")
    rows = [("x", "aaaaaaaaaaa", 0, 1, "val", 0), ("x", "bbbbbbbbbbb", 0, 1, "val", 0)]
    listing = kinetics_csv(tmp_path / "val.csv", rows)
    words = (
        "shard",
        tmp_path / "v",
        tmp_path / "root",
        "--split",
        "val",
        "--profile",
        "small",
        "--annotations",
        listing,
    )
    run_kprep(*words, "--source", "youtube:", "--youtube", "url_template=http://127.0.0.1:9/{id}", "--youtube",
              "extractors=generic", "--youtube", "attempts=1", "--youtube", "seconds_between_videos=0",
              check=False)  # fmt: skip
    journal = Journal(tmp_path / "root/.kprep-work/val/journal.sqlite", "val")
    journal._db.execute("UPDATE rows SET status = 'pending', reason = NULL, answers = "
                        "'[[\"folder\", \"missing\", \"\"]]' WHERE status = 'failed'")  # fmt: skip
    journal.close()
    run_kprep(*words)
    assert [row["status"] for row in ledger(tmp_path / "root", "val")] == ["ok", "failed"]


def test_classes_are_those_of_the_list_and_not_of_the_rows_at_hand(videos, tmp_path):
    root = tmp_path / "root"
    run_kprep(*arguments(videos, root, "train", "--limit", 1))
    assert (root / "classes.txt").read_text() == "left\nup\n"
    run_kprep(*arguments(videos, root, "val", "--classes", "up"))
    done = run_kprep(
        *arguments(videos, tmp_path / "other", "val", "--classes", "up,typo"), check=False
    )
    assert (done.returncode, "'typo'" in done.stderr) == (2, True)


def test_keys_of_two_splits_never_meet(videos, tmp_path):
    (tmp_path / "v").mkdir()
    shutil.copy(videos / "left" / "0.mp4", tmp_path / "v" / "aaaaaaaaaaa_000000_000001.mp4")
    shutil.copy(videos / "left" / "2.mp4", tmp_path / "v" / "bbbbbbbbbbb_000000_000001.mp4")
    root = tmp_path / "root"
    for split, names in (("train", ["aaaaaaaaaaa"]), ("val", ["aaaaaaaaaaa", "bbbbbbbbbbb"])):
        listing = kinetics_csv(
            tmp_path / f"{split}.csv", [("x", name, 0, 1, split, 0) for name in names]
        )
        run_kprep(
            "shard",
            tmp_path / "v",
            root,
            "--split",
            split,
            "--profile",
            "small",
            "--annotations",
            listing,
        )
    assert [row["reason"] for row in ledger(root, "val")] == ["conflicting rows", None]
    (line,) = [
        line
        for line in (root / "README.md").read_text().splitlines()
        if line.startswith("| conflicting rows")
    ]
    assert "or stands in another split" in line
    assert verify(Storage(str(root))).faults == []
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["splits"]["train2"] = manifest["splits"]["train"]
    for name in ("index/train", "ledger/train", "wids-train"):
        for path in [path for path in manifest["files"] if path.startswith(name)]:
            manifest["files"][path.replace("train", "train2")] = manifest["files"][path]
            shutil.copy(root / path, root / path.replace("train", "train2"))
    (root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DatasetError, match=r"train-000000\.tar stands 2 times"):
        verify(Storage(str(root)))


@pytest.fixture
def two_lists(videos, tmp_path):
    """A folder and the lists of train and of val, whose class lists differ; `a` is in both."""
    folder = tmp_path / "v"
    folder.mkdir()
    for number, letter in enumerate("abcdef"):
        source = videos / ("left", "up")[number % 2] / f"{number}.mp4"
        shutil.copy(source, folder / f"{letter * 11}_000000_000001.mp4")
    rows = {"train": "archery:c bowling:d yoga:a", "val": "bowling:b yoga:f yoga:e yoga:a"}
    for split, text in rows.items():
        pairs = [pair.split(":") for pair in text.split()]
        kinetics_csv(
            tmp_path / f"{split}.csv",
            [(label, letter * 11, 0, 1, split, 0) for label, letter in pairs],
        )
    return folder


def convert_list(folder, root, split, *more, **environment):
    listing = folder.parent / f"{split}.csv"
    words = ("--split", split, "--profile", "small", "--clips-per-shard", 2, "--annotations")
    return run_kprep("shard", folder, root, *words, listing, *more, **environment)


PLANS_AND_DIES = """
import os, sys
import prep.shard
prep.shard._convert = lambda *_: os._exit(9)
from prep.cli import main
main()
"""


def test_a_split_that_was_only_planned_is_planned_again_beside_another(two_lists, tmp_path):
    root, whole = tmp_path / "root", tmp_path / "whole"
    words = ["shard", two_lists, root, "--split", "val", "--profile", "small", "--clips-per-shard",
             2, "--annotations", tmp_path / "val.csv"]  # fmt: skip
    begun = [sys.executable, "-P", "-c", PLANS_AND_DIES, *map(str, words)]
    assert subprocess.run(begun, timeout=120, check=False).returncode == 9
    for target in (root, whole):
        convert_list(two_lists, target, "train")
        convert_list(two_lists, target, "val")
    assert verify(Storage(str(root))).faults == []
    assert (root / "classes.txt").read_text() == "archery\nbowling\nyoga\n"
    assert files_of(root) == files_of(whole)


def test_a_split_half_encoded_takes_the_classes_of_one_published_meanwhile(two_lists, tmp_path):
    train = tmp_path / "train.csv"
    train.write_text(train.read_text().replace("aaaaaaaaaaa", "missing-one"))
    root, whole = tmp_path / "root", tmp_path / "whole"
    fake = fake_ffmpeg(tmp_path, "bbbbbbbbbbb_", f"[ -e {tmp_path}/crash ] && kill -9 $PPID")
    (tmp_path / "crash").touch()
    first = convert_list(two_lists, root, "val", check=False, KPREP_FFMPEG=str(fake))
    assert first.returncode == 1  # b's worker crashed, which may pass
    assert list((root / "val").glob("*.tar"))
    convert_list(two_lists, root, "train", KPREP_FFMPEG=str(fake))
    journal = Journal(root / ".kprep-work/val/journal.sqlite", "val")  # mark what is kept
    journal._db.execute(
        "UPDATE rows SET facts = json_set(facts, '$.source', 'kept') WHERE status = 'ok'"
    )
    journal.close()
    (tmp_path / "crash").unlink()
    convert_list(two_lists, root, "val", KPREP_FFMPEG=str(fake))
    convert_list(two_lists, whole, "train", KPREP_FFMPEG=str(fake))
    convert_list(two_lists, whole, "val", KPREP_FFMPEG=str(fake))
    assert verify(Storage(str(root))).faults == []
    assert (root / "classes.txt").read_text() == (whole / "classes.txt").read_text()
    assert Counter(row["source"] for row in ledger(root, "val")) == {"kept": 3, "folder": 1}


def test_a_clip_of_a_split_published_meanwhile_is_no_clip_of_this_one(two_lists, tmp_path):
    root = tmp_path / "root"
    fake = fake_ffmpeg(tmp_path, "bbbbbbbbbbb_", "kill -9 $PPID")
    same = {"KPREP_FFMPEG": str(fake)}
    assert convert_list(two_lists, root, "val", check=False, **same).returncode == 1
    convert_list(two_lists, root, "train", **same)
    before = files_of(root)
    done = convert_list(two_lists, root, "val", check=False, **same)
    assert done.returncode == 2
    assert "clip aaaaaaaaaaa_000000_000001 of split val is in another split" in done.stderr
    assert files_of(root) == before
    convert_list(two_lists, root, "val", "--force", "--finish", **same)
    assert verify(Storage(str(root))).faults == []


# -- places --------------------------------------------------------------------------------------


@pytest.mark.parametrize("back", [False, True], ids=["gone", "another"])
def test_a_source_that_goes_away_costs_no_row(videos, tmp_path, back):
    source, root = tmp_path / "v", tmp_path / "root"
    source.symlink_to(videos)
    (tmp_path / "empty").mkdir()  # as the place of a mount looks without it
    (tmp_path / "other").symlink_to(tmp_path / "empty")
    away = f"mv -T {tmp_path}/other {source}" if back else f"rm {source}"
    fake = fake_ffmpeg(tmp_path, "up/", f"rm {tmp_path}/once && {away}")
    (tmp_path / "once").touch()
    done = run_kprep(*arguments(source, root), check=False, KPREP_FFMPEG=str(fake))
    assert done.returncode == 1
    assert "is gone, or no longer the folder" in done.stderr
    source.unlink(missing_ok=True)
    source.symlink_to(videos)
    run_kprep(*arguments(source, root), KPREP_FFMPEG=str(fake))
    assert [row["status"] for row in ledger(root, "train")] == ["ok"] * 6


def test_root_and_work_inside_the_source_are_refused(videos, tmp_path):
    for words in (
        arguments(videos, videos / "out"),
        arguments(videos, tmp_path / "r", "train", "--work", videos / "w"),
    ):
        done = run_kprep(*words, check=False)
        assert (done.returncode, "lies inside the source" in done.stderr) == (2, True)
    assert not (videos / "out").exists()


def test_a_mistake_leaves_no_folder_behind(tmp_path):
    assert (
        run_kprep(
            "shard", tmp_path / "nowhere", tmp_path / "root", "--split", "train", check=False
        ).returncode
        == 2
    )
    (tmp_path / "empty").mkdir()
    assert (
        run_kprep(
            "shard", tmp_path / "empty", tmp_path / "root", "--split", "train", check=False
        ).returncode
        == 2
    )
    assert not (tmp_path / "root").exists()


def test_a_mistake_leaves_only_the_folders_that_were_there(videos, tmp_path):
    wrong = ("shard", videos, "--split", "train", "--classes", "nope")
    inside = tmp_path / "new" / "root"
    done = run_kprep(*wrong, inside, "--work", tmp_path / "a" / "work", check=False)
    assert (done.returncode, list(tmp_path.iterdir())) == (2, []), done.stderr
    kept = [tmp_path / name for name in ("root", "work")]
    for folder in kept:
        folder.mkdir()
    done = run_kprep(*wrong, kept[0], "--work", kept[1], check=False)
    assert (done.returncode, sorted(tmp_path.rglob("*"))) == (2, kept), done.stderr


def test_a_pipe_and_a_dead_link_are_no_videos(videos, tmp_path):
    source = tmp_path / "v" / "left"
    source.mkdir(parents=True)
    shutil.copy(videos / "left" / "0.mp4", source)
    os.mkfifo(source / "pipe.mp4")
    (source / "link.mp4").symlink_to(tmp_path / "nowhere.mp4")
    run_kprep(*arguments(tmp_path / "v", tmp_path / "root"))
    reasons = {row["video_id"]: row["reason"] for row in ledger(tmp_path / "root", "train")}
    assert reasons == {
        "left/0.mp4": None,
        "left/pipe.mp4": "unsafe input",
        "left/link.mp4": "missing",
    }


def test_names_that_are_no_utf8_end_no_conversion(videos, tmp_path):
    folder = tmp_path / "v"
    folder.mkdir()
    shutil.copy(videos / "left" / "0.mp4", folder / "aaaaaaaaaaa_000000_000001.mp4")
    Path(os.fsdecode(os.fsencode(folder) + b"/bbbbbbbbbbb_000000_000001.m\xff4")).symlink_to("gone")
    listing = Path(os.fsdecode(os.fsencode(tmp_path) + b"/list\xff.csv"))
    rows = [("x", letter * 11, 0, end, "val", 0) for letter, end in (("a", 1), ("b", 1), ("c", 0))]
    kinetics_csv(listing, rows)
    run_kprep("shard", folder, tmp_path / "root", "--split", "val", "--profile", "small", "--annotations", listing)  # fmt: skip
    found = [
        (row["reason"], row["detail"].partition(",")[0]) for row in ledger(tmp_path / "root", "val")
    ]
    assert found == [
        (None, ""),
        ("missing", "bbbbbbbbbbb_000000_000001.m\ufffd4 is gone"),
        ("bad row", "list\ufffd.csv"),
    ]


@pytest.mark.parametrize(
    "words",
    [
        ("--seed", "9" * 70),
        ("--limit", "9" * 20),
        ("--min-seconds", "nan"),
        ("--fps", "1e99999999"),
    ],
)
def test_absurd_numbers_are_refused(videos, tmp_path, words):
    done = run_kprep(*arguments(videos, tmp_path / "root", "train", *words), check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_manifest_of_brackets_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text("[" * 200_000)
    done = run_kprep("info", tmp_path, check=False)
    assert (done.returncode, "is not JSON" in done.stderr) == (1, True)
