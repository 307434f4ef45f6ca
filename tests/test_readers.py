"""One directory, five readers: each real package gives the same keys, bytes and metadata.

The table in docs/conformance.md is made from these very results; `make docs-pages` writes it anew.
"""

import csv
import dataclasses
import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import numpy as np
import other_readers
import pytest
from conftest import REPOSITORY, run_kprep

from prep.demo_videos import random_motion, write_video

LABELS = ("дождь", 'it\'s "quoted", with comma', "<script>alert(1)", "跳舞", "left")
# YouTube ids may begin with `-` and `__`; other names may hold anything that a file system takes
IDS = ("__abcdEFGHI", "-0123456789", "_-_-_-_-_-_", "abcdefghijk", "ABCDEFGHIJK")
NAMES = ("a b.c.d", "überall 走", "-dash", "__dunder", "(-)", "per%20cent & more", "emoji 🎬",
         "x" * 120, "UPPER", "it's", "semi;colon", "hash#tag")  # fmt: skip


def make_dataset(folder: Path) -> Path:
    """Splits `train` (12 clips in 5 shards), `val` (5 of YouTube's names in one shard), `extra_1` (one clip)."""
    rng = np.random.default_rng(3)
    root, videos = folder / "root", folder / "videos"

    def write(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        motion = random_motion("left", rng)
        write_video(path, dataclasses.replace(motion, seconds=1.1), "libx264")

    for number, name in enumerate(NAMES):
        write(videos / "train" / LABELS[number % len(LABELS)] / f"{name}.mp4")
    shard = ["--profile", "small", "--clips-per-shard"]
    run_kprep("shard", videos / "train", root, "--split", "train", *shard, 3)
    names = sorted(LABELS, key=str)
    for number, video in enumerate(IDS):
        write(videos / "val" / f"{video}_{number:06d}_{number + 1:06d}.mp4")
    table = folder / "val.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["label", "youtube_id", "time_start", "time_end", "split"])
        for number, video in enumerate(IDS):
            rows.writerow([names[number], video, number, number + 1, "val"])
    run_kprep("shard", videos / "val", root, "--split", "val", "--annotations", table, *shard, 100)
    write(videos / "extra" / "left" / "one.mp4")
    run_kprep("shard", videos / "extra", root, "--split", "extra_1", *shard, 100)
    return root


SHAPE = {"train": 12, "val": 5, "extra_1": 1}
PLACES = ("a directory", "a bucket")
PAGE = REPOSITORY / "docs" / "conformance.md"
REMARKS = {
    "kprep": "by the index: any clip, any group of pictures, from any of the places",
    "webdataset": "the tars, in order; a bucket needs the handler that the code below registers",
    "wids": "any clip of a downloaded shard; for a bucket it starts `aws`, or the function below",
    "megatron-energon": "any clip by `.tar.idx`; buckets through multi-storage-client and boto3",
    "datasets": "the tars, by the card's `configs`; from a bucket by globs, through s3fs",
}


def clips_of_tars(root: Path) -> list[list]:
    """The truth, by Python's own tarfile: [split, key, sha256 of the mp4, sidecar] in order of the tars."""
    clips = []
    for split in SHAPE:
        for path in sorted((root / split).glob("*.tar")):
            with tarfile.open(path) as tar:
                data = {member.name: tar.extractfile(member).read() for member in tar}
            for name, content in data.items():
                key, _, extension = name.partition(".")
                if extension == "mp4":
                    sidecar = json.loads(data[f"{key}.json"])
                    clips.append([split, key, hashlib.sha256(content).hexdigest(), sidecar])
    return clips


def digests(root: Path) -> dict[str, str]:
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(root.rglob("*")) if path.is_file()}  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("readers"))


@pytest.fixture(scope="module")
def environment(s3, tmp_path_factory) -> dict[str, str]:
    """Where the bucket is, and a place of their own for the readers' caches."""
    home = str(tmp_path_factory.mktemp("home"))
    own = {"HF_HOME": home, "TMPDIR": home, "XDG_CACHE_HOME": home, "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**os.environ, **s3.environment, **own}


def run_reader(reader: str, root: str, splits, environment) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, REPOSITORY / "tests/other_readers.py", reader, root, *splits],
        capture_output=True, text=True, timeout=300, check=False, env=environment, cwd=environment["TMPDIR"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(dataset, s3, environment) -> dict[tuple[str, str], tuple[str, list[list]]]:
    """(reader, place) to its version and what it gave, each in a process of its own."""
    before = digests(dataset)
    roots = dict(zip(PLACES, (str(dataset), s3.upload(dataset, "readers/root")), strict=True))
    found = {}
    for reader in other_readers.READERS:
        for place, root in roots.items():
            done = run_reader(reader, root, SHAPE, environment)
            assert done.returncode == 0, f"{reader} from {place}:\n{done.stderr[-3000:]}"
            version, *lines = map(json.loads, done.stdout.splitlines())
            found[reader, place] = version, lines
    assert digests(dataset) == before, "a reader changed the dataset"
    return found


def flip_a_byte(shard: Path) -> None:
    with tarfile.open(shard) as tar:
        member = [member for member in tar if member.name.endswith(".mp4")][2]
    with shard.open("r+b") as file:
        file.seek(member.offset_data + member.size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def cut_behind_a_sample(shard: Path) -> None:
    with tarfile.open(shard) as tar:
        end = tar.getmembers()[6].offset
    os.truncate(shard, end)


DAMAGES = {"one bit of a video flipped": flip_a_byte, "shard cut behind 3 of 5 clips": cut_behind_a_sample}  # fmt: skip


@pytest.fixture(scope="module")
def damages(dataset, environment, tmp_path_factory) -> dict[tuple[str, str], str]:
    """(reader, damage) to what the reader does about it; its own code only, no check around it."""
    truth = [clip for clip in clips_of_tars(dataset) if clip[0] == "val"]
    found = {}
    for damage, inflict in DAMAGES.items():
        root = tmp_path_factory.mktemp("damaged") / "root"
        shutil.copytree(dataset, root)
        inflict(root / "val" / "val-000000.tar")
        for reader in other_readers.READERS:
            done = run_reader(reader, str(root), ["val"], environment)
            clips = [json.loads(line) for line in done.stdout.splitlines()[1:]]
            if done.returncode:
                found[reader, damage] = "an error"
            elif len(clips) < len(truth):
                found[reader, damage] = f"{len(clips)} clips, no error"
            else:
                assert sum(clip in truth for clip in clips) == len(truth) - 1
                found[reader, damage] = "other bytes, no error"
    return found


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("reader", other_readers.READERS)
def test_every_reader_gives_the_same_keys_bytes_and_metadata(dataset, results, reader, place):
    truth = clips_of_tars(dataset)
    assert {split: sum(clip[0] == split for clip in truth) for split in SHAPE} == SHAPE
    _, clips = results[reader, place]
    assert sorted(clips, key=repr) == sorted(truth, key=repr)
    for (*_, got), (*_, wanted) in zip(
        sorted(clips, key=repr), sorted(truth, key=repr), strict=True
    ):
        kinds = {name: type(value) for name, value in wanted.items()}
        assert {name: type(value) for name, value in got.items()} == kinds  # 1 is not 1.0


def test_the_dataset_holds_what_makes_readers_stumble(dataset):
    """Otherwise the table would prove little."""
    clips = clips_of_tars(dataset)
    keys = {clip[1] for clip in clips}
    assert any(key.startswith("-") for key in keys)
    assert any(key.startswith("v__") for key in keys)
    assert {clip[3]["label"] for clip in clips} == set(LABELS)
    assert len(list(dataset.glob("train/*.tar"))) > 3
    assert len(list(dataset.glob("val/*.tar"))) == 1


def page(dataset: Path, results: dict, damages: dict) -> str:
    """docs/conformance.md, from what the readers gave."""
    truth = clips_of_tars(dataset)
    shards = {split: len(list((dataset / split).glob("*.tar"))) for split in SHAPE}
    what = "; ".join(f"`{split}`: {SHAPE[split]} clip{'s' * (SHAPE[split] > 1)} in {shards[split]} shard{'s' * (shards[split] > 1)}" for split in SHAPE)  # fmt: skip
    lines = [
        "# Five readers, one directory", "",
        "<!-- Written by tests/test_readers.py (make docs-pages); do not edit. -->", "",
        "One dataset directory, unchanged, read with the packages themselves: every clip's key, the sha256 of its mp4 and its",
        "sidecar (values and types) are compared with what Python's `tarfile` finds. The table is made by the test",
        "`tests/test_readers.py`, which fails when it is no longer true.", "",
        f"The dataset: {what}. YouTube ids that begin with `-` and `__`, file names with",
        "quotes, `%`, `#`, `;`, spaces, emoji and 120 letters, class names in Russian and Chinese and one that is HTML.", "",
        f"| reader | version | {' | '.join(f'from {place}' for place in PLACES)} | order of the tars | how it reads |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for reader in other_readers.READERS:
        version = results[reader, PLACES[0]][0]
        cells = []
        for place in PLACES:
            clips = results[reader, place][1]
            equal = sum(clip in truth for clip in clips)
            cells.append(f"{equal} of {len(truth)} equal")
        ordered = all(results[reader, place][1] == truth for place in PLACES)
        lines.append(
            f"| {reader} | {version} | {' | '.join(cells)} | "
            f"{'kept' if ordered else 'its own'} | {REMARKS[reader]} |"
        )
    lines += [
        "", "The directory is bit for bit the same before and after. The bucket is SeaweedFS's S3.", "",
        "## What they notice", "",
        "Each reader by itself, on a copy of `val` that was damaged:", "",
        f"| reader | {' | '.join(DAMAGES)} |", "|---|---|---|",
    ]  # fmt: skip
    for reader in other_readers.READERS:
        lines.append(f"| {reader} | {' | '.join(damages[reader, damage] for damage in DAMAGES)} |")
    lines += [
        "", "So a dataset that was copied by other means should be checked once with `kprep verify` before others read it. More",
        "damages, and what the stream makes of them: [Streaming](streaming.md#integrity).", "",
        "## The code", "",
        "What the test runs for each of them (`tests/other_readers.py`). `shards` lists a split's tars from `manifest.json`, `fetch` gets an object of a",
        "bucket, `_profile_of_a_bucket` writes the configuration of multi-storage-client.", "",
    ]  # fmt: skip
    for reader, (read, _) in other_readers.READERS.items():
        source = textwrap.dedent(inspect.getsource(read)).rstrip()
        source = re.sub(r" +# (fmt: skip|type: ignore.*)$", "", source, flags=re.MULTILINE)
        lines += [f"### {reader}", "", "```python", source, "```", ""]
    return "\n".join(lines).rstrip() + "\n"


@pytest.mark.slow
def test_damage_is_noticed_by_kprep(damages):
    assert all(damages["kprep", damage] == "an error" for damage in DAMAGES)


@pytest.mark.slow
def test_the_conformance_page_is_what_the_readers_gave(dataset, results, damages):
    text = page(dataset, results, damages)
    if os.environ.get("KPREP_WRITE_DOCS"):
        PAGE.write_text(text)
    assert PAGE.read_text() == text, "docs/conformance.md is out of date; run `make docs-pages`"
