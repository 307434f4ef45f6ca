"""`kprep index`: tars that somebody else wrote become a dataset, or are refused with the reason."""

import contextlib
import hashlib
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import run_kprep
from copy_datasets import files_of
from foreign_tars import CLASSES, encode, motion, video2dataset_folder
from hypothesis import given
from hypothesis import strategies as st
from webdataset import TarWriter
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

from prep.clip_check import decode_clip, off_rate
from prep.describe_shard import _Foreign
from prep.describe_shards import describe_shards
from prep.errors import KprepError, UsageError
from prep.ffmpeg_binary import find_ffmpeg
from prep.foreign_index import IndexOptions, find_shards, index_tars
from prep.foreign_labels import class_list, label_index, stated_label
from prep.foreign_splits import assign_splits
from prep.index_work import IndexWork
from prep.outcome import Reason, RowFailure
from prep.shard_bytes import ShardBytes, TarEntry, walk
from prep.storage import ObjectInfo, Storage
from prep.tar_samples import Grouping, split_name
from prep.tar_stream import ArchiveError
from prep.verify import _Silent, verify

_prefixes = itertools.count()
X264 = {"bf": "2", "preset": "ultrafast"}


@pytest.fixture(scope="module")
def strangers(tmp_path_factory) -> Path:
    """What video2dataset leaves: splits of which each counts its keys from zero."""
    folder = tmp_path_factory.mktemp("strangers") / "videos"
    video2dataset_folder(folder / "train", num_shards=2, clips_a_shard=12, seed=1)
    video2dataset_folder(folder / "val", num_shards=1, clips_a_shard=8, seed=2)
    return folder


@pytest.fixture(params=["disk", "bucket"])
def root(request, strangers, tmp_path) -> tuple[str, dict[str, str], Storage]:
    """Where the tars are, the environment that reaches them, and the same as a Storage."""
    if request.param == "disk":
        folder = str(shutil.copytree(strangers, tmp_path / "videos"))
        return folder, {}, Storage(folder)
    s3 = request.getfixturevalue("s3")
    url = s3.upload(strangers, f"index-{os.getpid()}-{next(_prefixes)}")
    return url, s3.environment, Storage(url, s3.options)


def tars(storage: Storage) -> dict[str, tuple[str | None, bytes]]:
    return {
        info.path: (info.etag, storage.read(info.path))
        for info in storage.list()
        if info.path.endswith(".tar")
    }


def members(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}


def decoded(video: bytes) -> list[np.ndarray]:
    """Every frame as the reader's format has them, by PyAV alone."""
    with av.open(io.BytesIO(video)) as file:
        return [
            frame.reformat(format="yuv420p", dst_colorspace=5, dst_color_range=1).to_ndarray()
            for frame in file.decode(video=0)
        ]


@pytest.mark.slow
def test_a_strangers_hour(root, tmp_path):
    """Indexed, verified, streamed and trained on, with not a byte of the tars changed."""
    from stream import clip_loader

    where, environment, storage = root
    before = tars(storage)
    text = run_kprep("index", where, **environment).stdout
    assert "split train: 23 clips of 24 samples in 2 tars" in text
    assert "4 classes from txt: down, left, right, up" in text
    assert "left out: 2 missing" in text
    assert tars(storage) == before
    run_kprep("verify", where, **environment)
    run_kprep("verify", where, "--deep", **environment)

    loader = clip_loader(where, split="train", frames=8, fps=12, batch_size=1, seed=3,
                         layout="yuv420", storage_options=storage.options)  # fmt: skip
    loader.set_epoch(0)
    contents = {path: members(data) for path, (_, data) in before.items()}
    seen = set()
    for batch in loader:
        shard, _, name = batch.key[0].rpartition("/")
        inside = contents[f"{shard}.tar"]
        (video,) = (inside[f"{name}.{form}"] for form in ("mp4", "mkv", "webm", "avi", "mov")
                    if f"{name}.{form}" in inside)  # fmt: skip
        assert loader.class_names[int(batch.label[0])] == inside[f"{name}.txt"].decode()
        frames, start = decoded(video), int(batch.start_frame[0])
        height, width = batch.size[0].tolist()
        with av.open(io.BytesIO(video)) as file:
            rate = Fraction(round(file.streams.video[0].average_rate * 1001), 1001)
        for number in range(8):
            wanted = frames[start + int(number * rate / 12)].reshape(-1)
            found = batch.video[0, number, : height * width * 3 // 2].numpy()
            assert np.array_equal(found, wanted), (batch.key, number)
        seen.add(batch.key[0])
    assert len(seen) == 23

    run_kprep("train", "--data", where, "--recipe", "tiny", "--output", tmp_path / "run", "--set",
              "schedule.epochs=1", "--set", "data.batch_size=8", OMP_NUM_THREADS="1", **environment)  # fmt: skip
    assert (tmp_path / "run").is_dir()


def test_other_files_beside_the_tars_are_listed_and_kept(strangers, tmp_path):
    folder = Path(shutil.copytree(strangers, tmp_path / "videos"))
    (folder / "README.md").write_text("mine\n")
    run_kprep("index", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {"README.md", "train/00000.parquet", "train/00000_stats.json"} <= set(manifest["files"])
    assert (folder / "README.md").read_text() == "mine\n"
    assert verify(Storage(str(folder))).faults == []
    (folder / "train/00000.parquet").write_bytes(b"other")
    assert [fault.path for fault in verify(Storage(str(folder))).faults] == ["train/00000.parquet"]


def test_the_other_readers_find_the_same(strangers, tmp_path):
    """webdataset reads the tars themselves; what we write for the others must count as it does."""
    folder = Path(shutil.copytree(strangers, tmp_path / "videos"))
    run_kprep("index", folder)
    rows = pq.read_table(folder / "index/train.parquet").to_pylist()
    counts = json.loads((folder / ".nv-meta/.info.json").read_text())["shard_counts"]
    wids = json.loads((folder / "wids-train.json").read_text())["shardlist"]
    for shard in ("train/00000.tar", "train/00001.tar"):
        source = {"url": shard, "stream": io.BytesIO((folder / shard).read_bytes())}
        samples = list(group_by_keys(tar_file_expander([source])))
        assert counts[shard] == len(samples) == 12
        assert [item["nsamples"] for item in wids if item["url"] == shard] == [12]
        offsets = np.frombuffer((folder / f"{shard}.idx").read_bytes(), "<u8")
        data = (folder / shard).read_bytes()
        for sample, start, end in zip(samples, offsets[:-1], offsets[1:], strict=True):
            piece = members(data[start:end] + bytes(1024))  # a sample's range is a tar of its own
            assert {name.split(".")[0] for name in piece} == {sample["__key__"]}
        keys = {f"{shard[:-4]}/{sample['__key__']}" for sample in samples
                if {"mp4", "mkv", "webm", "avi", "mov"} & set(sample)}  # fmt: skip
        assert keys == {row["key"] for row in rows if row["shard"] == shard}


def test_a_clip_of_our_own_form_gets_its_groups_of_pictures(motion_dataset, tmp_path):
    """The tars of kprep without what stands beside them: read by ranges again, with their labels."""
    shutil.copytree(motion_dataset / "val", tmp_path / "root" / "val")
    for path in (tmp_path / "root" / "val").glob("*.idx"):
        path.unlink()
    run_kprep("index", tmp_path / "root")
    found = pq.read_table(tmp_path / "root/index/val.parquet").to_pylist()
    wanted = pq.read_table(motion_dataset / "index/val.parquet").to_pylist()
    same = ("key", "shard", "label", "num_frames", "fps_num", "width", "gop_offsets", "gop_crc32", "codec_config",
            "entry_offset", "entry_bytes", "content_hash")  # fmt: skip
    for ours, theirs in zip(found, wanted, strict=True):
        assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    names = json.loads((motion_dataset / "manifest.json").read_text())["class_names"]
    assert json.loads((tmp_path / "root/manifest.json").read_text())["class_names"] == names
    assert verify(Storage(str(tmp_path / "root")), deep=True).faults == []


# clips that cannot be streamed exactly


def clip(**changes) -> bytes:
    values = {"rate": Fraction(25), "size": (96, 64), "seconds": 0.8}
    options = {
        name: changes.pop(name) for name in ("stamps", "pix_fmt", "aspect") if name in changes
    }
    form, codec = changes.pop("form", "mp4"), changes.pop("codec", "libx264")
    made = motion(np.random.default_rng(1), 0, **{**values, **changes})
    return encode(made, form, codec, X264 if codec == "libx264" else {}, **options)


def rotated(folder: Path) -> bytes:
    (folder / "in.mp4").write_bytes(clip())
    subprocess.run([find_ffmpeg().path, "-nostdin", "-v", "error", "-display_rotation", "90", "-i", folder / "in.mp4",
                    "-c", "copy", folder / "out.mp4"], check=True, timeout=60)  # fmt: skip
    return (folder / "out.mp4").read_bytes()


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with TarWriter(str(path), encoder=False) as tar:
        for key, parts in samples.items():
            tar.write({"__key__": key, **parts})
    return path


def failures(root: Path, split: str = "train") -> dict[str, tuple[str, str]]:
    rows = pq.read_table(root / f"ledger/{split}.parquet").to_pylist()
    return {row["key"]: (row["reason"], row["detail"]) for row in rows if row["status"] == "failed"}


def test_clips_that_cannot_be_streamed_exactly_are_left_out_by_name(tmp_path):
    root = tmp_path / "root"
    late = [number * 40 + (17 if number > 9 else 0) for number in range(20)]
    good = clip()
    write_tar(root / "train.tar", {
        "a-good": {"mp4": good, "cls": b"1"},
        "b-variable": {"mkv": clip(form="mkv", stamps=late), "cls": b"0"},
        "c-odd": {"mp4": clip(size=(97, 63), pix_fmt="yuv444p"), "cls": b"0"},
        "d-rotated": {"mp4": rotated(tmp_path), "cls": b"0"},
        "e-wide": {"mp4": clip(aspect=Fraction(4, 3)), "cls": b"0"},
        "f-cut": {"mp4": good[: len(good) // 2], "cls": b"0"},
        "g-empty": {"mp4": b"", "cls": b"0"},
        "h-text": {"mp4": b"<html>404 Not Found</html>", "cls": b"0"},
        "i-two": {"mp4": good, "webm": good, "cls": b"0"},
        "j-none": {"cls": b"0"},
        "k-playlist": {"mp4": b"ffconcat version 1.0\nfile /etc/passwd\n", "cls": b"0"},
        "l-label": {"mp4": good, "cls": b"\xff\xfe"},
        "m-good": {"webm": clip(form="webm", codec="libvpx-vp9"), "cls": b"0"},
    })  # fmt: skip
    done = run_kprep("index", root, "--labels", "cls")
    reasons = {key: reason for key, (reason, _) in failures(root).items()}
    assert reasons == {
        "b-variable": "variable frame rate", "c-odd": "odd size", "d-rotated": "rotated",
        "e-wide": "pixels not square", "f-cut": reasons["f-cut"], "g-empty": "empty file",
        "h-text": "not a video", "i-two": "several videos", "j-none": "missing",
        "k-playlist": "not a video", "l-label": "bad label",
    }  # fmt: skip
    assert reasons["f-cut"] in ("damaged", "not a video")
    for reason in set(reasons.values()):
        assert f"{reason}, such as train.tar: " in done.stdout
    rows = pq.read_table(root / "index/train.parquet").to_pylist()
    assert [(row["key"], row["label"]) for row in rows] == [("a-good", 1), ("m-good", 0)]
    assert verify(Storage(str(root)), deep=True).faults == []

    done = run_kprep("index", root, "--labels", "cls", "--force", "--strict", check=False)
    assert done.returncode == 1
    assert "nothing was written" in done.stderr
    run_kprep("index", root, "--labels", "cls", "--force", "--as-stored")
    assert {"d-rotated", "e-wide"} & set(failures(root)) == set()
    assert verify(Storage(str(root)), deep=True).faults == []


def test_a_bad_key_is_told_the_rule_that_it_breaks(tmp_path):
    keys = {
        "__n": "not begin with '__'",
        "a.b/x": "have no dot",
        "y" * 201: "have at most 200 characters",
    }
    samples = {key: {"mp4": clip(), "cls": b"0"} for key in ("good", *keys)}
    write_tar(tmp_path / "train.tar", samples)
    run_kprep("index", tmp_path)
    wanted = {key: ("bad name", f"keys must {rule}") for key, rule in keys.items()}
    assert failures(tmp_path) == wanted


def test_a_long_key_is_cut_in_what_is_printed_of_it(tmp_path):
    """The ledger has it whole."""
    long = "y" * 3000
    write_tar(tmp_path / "train.tar", {key: {"mp4": clip(), "cls": b"0"} for key in ("good", long)})
    text = run_kprep("index", tmp_path).stdout
    assert f"such as train.tar: {'y' * 117}...: keys must have at most 200 characters" in text
    assert list(failures(tmp_path)) == [long]


def test_a_long_key_is_cut_where_it_refuses_a_tar():
    grouping = Grouping()
    long = "y" * 3000
    for name in (f"{long}.mp4", f"{long}.mp4", "b.mp4", f"{long}.cls"):
        grouping.add(TarEntry(name, 0, 0, 0, io.BytesIO()))
    assert [problem for _, problem in grouping.problems] == [
        f"member {'y' * 117}... stands twice", f"key {'y' * 117}... stands twice",
    ]  # fmt: skip


def test_a_dataset_without_a_clip_is_refused(tmp_path):
    write_tar(tmp_path / "root/train.tar", {"a": {"mp4": b"no video", "cls": b"0"}})
    done = run_kprep("index", tmp_path / "root", check=False)
    assert (done.returncode, done.stderr.count("Error: ")) == (1, 1)
    assert "no clip that can be streamed exactly (1 not a video" in done.stderr
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["train.tar"]


# tars that readers would not agree on


def raw_tar(*entries: tuple[tarfile.TarInfo, bytes]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in entries:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def entry(name: str, kind: bytes = tarfile.REGTYPE, **values) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in values.items():
        setattr(info, key, value)
    return info


def hostile_tars() -> dict[str, tuple[bytes, str]]:
    video = clip()
    good = (entry("a.mp4"), video), (entry("a.cls"), b"0")
    plain = raw_tar(*good)
    flipped = bytearray(plain)
    flipped[100] ^= 1
    return {
        "symbolic link": (raw_tar(*good, (entry("b.mp4", tarfile.SYMTYPE, linkname="/etc/passwd"), b"")), "is a link"),
        "hard link": (raw_tar(*good, (entry("b.mp4", tarfile.LNKTYPE, linkname="a.mp4"), b"")), "is a link"),
        "device": (raw_tar(*good, (entry("b.mp4", tarfile.CHRTYPE), b"")), "is a device"),
        "pipe": (raw_tar(*good, (entry("b.mp4", tarfile.FIFOTYPE), b"")), "is a device"),
        "sparse": (raw_tar(*good, (entry("b.mp4", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "99"}), b"1\n0\n9\n" + bytes(600))), ""),
        "resized": (raw_tar(*good, (entry("b.mp4", pax_headers={"size": "1"}), b"x" * 600)), ""),
        "old sparse": (raw_tar(*good, (entry("b.mp4", tarfile.GNUTYPE_SPARSE), b"x")), ""),
        "absolute name": (raw_tar(*good, (entry("/etc/b.mp4"), b"x")), "leaves the archive"),
        "parent name": (raw_tar(*good, (entry("../b.mp4"), b"x")), "leaves the archive"),
        "endless name": (raw_tar(*good, (entry("b/" * 100_000 + "b.mp4"), b"x")), "a name of 200,005 characters"),
        "control character": (raw_tar(*good, (entry("b\x1b[31m.mp4"), b"x")), "a control character in its name"),
        "member twice": (raw_tar(*good, (entry("a.mp4"), video)), "stands twice"),
        "member twice but for case": (raw_tar(*good, (entry("a.MP4"), video)), "stands twice"),
        "key comes back": (raw_tar(*good, (entry("b.mp4"), video), (entry("a.txt"), b"x")), "key a stands twice"),
        "giant header": (raw_tar(*good, (entry("b.mp4", pax_headers={"comment": "x" * (3 << 20)}), b"x")), "extended header"),
        "gzip": (__import__("gzip").compress(plain), "gzip"),
        "truncated": (plain[: len(plain) // 2], ""),
        "no end": (plain[: -len(plain) % 512 or None].rstrip(b"\0"), ""),
        "two archives in one": (plain + plain, "behind its end"),
        "damaged header": (bytes(flipped), ""),
        "no tar": (b"hello" * 300, "not an archive"),
        "nothing": (b"", "empty"),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_hostile_tars_are_refused_with_nothing_written(tmp_path, s3, where):
    for name, (data, says) in hostile_tars().items():
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        (folder / "train-0.tar").write_bytes(data)
        write_tar(folder / "train-1.tar", {"z": {"mp4": clip(), "cls": b"0"}})
        storage = Storage(str(folder))
        if where == "bucket":
            storage = Storage(s3.upload(folder, f"hostile-{os.getpid()}-{folder.name}"), s3.options)
        before = tars(storage)
        from prep.errors import KprepError
        from prep.foreign_index import IndexOptions, find_shards, index_tars
        from prep.verify import _Silent

        options = IndexOptions(workers=1)
        splits, files = find_shards(storage, options)
        with pytest.raises(KprepError) as error:
            index_tars(storage, options, splits, files, _Silent())
        text = str(error.value)
        assert text.startswith("train-0.tar"), (name, text)
        assert says in text, (name, text)
        assert "nothing was written" in text
        assert len(text) < 400
        assert text.isprintable()
        assert tars(storage) == before
        assert {info.path for info in storage.list()} == {"train-0.tar", "train-1.tar"}


def test_folders_leading_dots_and_long_names_are_no_harm(tmp_path):
    """`tar cf x.tar .` and GNU's long names."""
    video = clip()
    deep = "videos/" + "x" * 120 + "/clip"
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in (("./", None), ("./videos", None), ("./a.mp4", video), ("./a.cls", b"0"),
                           (f"./{deep}.mp4", video), (f"./{deep}.cls", b"1")):  # fmt: skip
            info = tarfile.TarInfo(name)
            if data is None:
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
                continue
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (tmp_path / "root").mkdir()
    (tmp_path / "root/00000.tar").write_bytes(sink.getvalue())
    run_kprep("index", tmp_path / "root")
    rows = pq.read_table(tmp_path / "root/index/train.parquet").to_pylist()
    assert [row["key"] for row in rows] == ["a", deep]
    offsets = np.frombuffer((tmp_path / "root/00000.tar.idx").read_bytes(), "<u8")
    assert [row["entry_offset"] for row in rows] == offsets[:-1].tolist()
    piece = members(sink.getvalue()[offsets[1] : offsets[2]] + bytes(1024))
    assert [*piece] == [f"./{deep}.mp4", f"./{deep}.cls"]  # the long name's own header is in it
    assert verify(Storage(str(tmp_path / "root")), deep=True).faults == []


# keys, splits, labels


def test_keys_that_are_not_unique_get_the_shard_before_them(tmp_path):
    root = tmp_path / "root"
    for shard in range(2):
        write_tar(root / f"train-{shard}.tar", {"same": {"mp4": clip(), "cls": b"0"}})
    done = run_kprep("index", root, "--keys", "member", check=False)
    assert (done.returncode, done.stderr.count("Error: ")) == (2, 1)
    assert "key same stands in train-0.tar and in train-1.tar" in done.stderr
    run_kprep("index", root)
    keys = pq.read_table(root / "index/train.parquet")["key"].to_pylist()
    assert keys == ["train-0/same", "train-1/same"]
    assert verify(Storage(str(root)), deep=True).faults == []


@pytest.mark.parametrize(
    ("paths", "wanted", "splits"),
    [
        (["00000.tar", "00001.tar"], (), {"train": ["00000.tar", "00001.tar"]}),
        (["train-0.tar", "val-0.tar"], (), {"train": ["train-0.tar"], "val": ["val-0.tar"]}),
        (["train/0.tar", "validation/0.tar"], (), {"train": ["train/0.tar"], "validation": ["validation/0.tar"]}),
        (["shards/train_00.tar", "shards/test_00.tar"], (), {"train": ["shards/train_00.tar"], "test": ["shards/test_00.tar"]}),
        (["a.tar", "b.tar"], ("everything",), {"everything": ["a.tar", "b.tar"]}),
        (["a.tar", "b.tar"], ("val=b*", "train"), {"train": ["a.tar"], "val": ["b.tar"]}),
        (["a.tar", "b.tar"], ("val=b*",), {"val": ["b.tar"]}),
    ],
)  # fmt: skip
def test_splits_follow_names_or_patterns(paths, wanted, splits):
    assert assign_splits(paths, wanted) == splits


@pytest.mark.parametrize("wanted", [("Train",), ("val=c*",), ("index",), ("all",), ("no=*",)])
def test_splits_that_cannot_be_are_refused(wanted):
    with pytest.raises(UsageError):
        assign_splits(["a.tar"], wanted)


@pytest.mark.parametrize("path", ["all/0.tar", "on-000.tar"])
def test_a_split_that_readers_could_not_load_is_not_made_of_a_name(path):
    with pytest.raises(UsageError, match="say which tars are a split with --split"):
        assign_splits([path], ())


def test_misleading_shard_names_are_refused(tmp_path):
    write_tar(tmp_path / "root/train-{0..9}.tar", {"a": {"mp4": clip(), "cls": b"0"}})
    done = run_kprep("index", tmp_path / "root", check=False)
    assert done.returncode == 2
    assert "rename the file" in done.stderr


LABELS = {
    "cls of indices": ({"cls": b"2"}, {"cls": b"0\n"}, (), ("cls", ["0", "1", "2"], [2, 0])),
    "cls of names": ({"cls": b"up"}, {"cls": b"down"}, (), ("cls", ["down", "up"], [1, 0])),
    "json": ({"json": b'{"label": "up"}'}, {"json": b'{"label": "down"}'}, (), ("json", ["down", "up"], [1, 0])),
    "json with both": ({"json": b'{"label": "a", "label_index": 1}'}, {"json": b'{"label": "b", "label_index": 0}'}, (), ("json", ["b", "a"], [1, 0])),
    "json with none": ({"json": b'{"label": "", "label_index": -1}'}, {"json": b'{"label": "b", "label_index": 0}'}, ("--labels", "json"), ("json", ["b"], [-1, 0])),
    "json with an index alone": ({"json": b'{"label": "", "label_index": 1}'}, {"json": b'{"label": "", "label_index": 0}'}, (), ("json", ["0", "1"], [1, 0])),
    "json field": ({"json": b'{"action": "up"}'}, {"json": b'{"action": "down"}'}, ("--labels", "json:action"), ("json:action", ["down", "up"], [1, 0])),
    "txt": ({"txt": b"up"}, {"txt": b"down\n"}, ("--labels", "txt"), ("txt", ["down", "up"], [1, 0])),
    "captions": ({"txt": b"a dog runs"}, {"txt": b"a cat sleeps"}, (), ("none", [], [-1, -1])),
    "nothing": ({}, {}, (), ("none", [], [-1, -1])),
}  # fmt: skip


@pytest.mark.parametrize("case", LABELS)
def test_labels_come_from_members(tmp_path, case):
    one, two, options, (rule, names, labels) = LABELS[case]
    root = tmp_path / "root"
    video = clip(seconds=0.2)
    write_tar(root / "train.tar", {"a": {"mp4": video, **one}, "b": {"mp4": video, **two}})
    run_kprep("index", root, *options)
    manifest = json.loads((root / "manifest.json").read_text())
    assert manifest["splits"]["train"]["settings"]["foreign"]["labels"] == rule
    assert manifest["class_names"] == names
    assert pq.read_table(root / "index/train.parquet")["label"].to_pylist() == labels
    assert verify(Storage(str(root))).faults == []


def test_a_name_with_the_index_of_no_label_is_a_bad_label(tmp_path):
    """-1 and no name is what kprep's own sidecars say of a clip without a label."""
    video = clip(seconds=0.2)
    values = {"a": ("cat", -1), "b": ("dog", 0), "c": ("", -1), "d": (None, -1)}
    write_tar(tmp_path / "train.tar", {
        key: {"mp4": video, "json": json.dumps({"label": name, "label_index": index}).encode()}
        for key, (name, index) in values.items()
    })  # fmt: skip
    text = run_kprep("index", tmp_path, "--labels", "json").stdout
    why = "class index -1 (no label) with the label 'cat'"
    assert failures(tmp_path) == {"a": ("bad label", why)}
    assert "labels: 1 classes from json: dog\n" in text
    assert "note: 2 clips have no label\n" in text
    assert verify(Storage(str(tmp_path)), deep=True).faults == []


@pytest.mark.parametrize(("text", "count"), [("-1", 1), ("1", 0)])
def test_clips_whose_class_index_is_that_of_no_label_are_counted(tmp_path, text, count):
    video = clip(seconds=0.2)
    samples = {"a": {"mp4": video, "cls": text.encode()}, "b": {"mp4": video, "cls": b"0"}}
    write_tar(tmp_path / "train.tar", samples)
    said = run_kprep("index", tmp_path, "--labels", "cls").stdout
    assert (f"note: {count} clips have no label\n" in said) == bool(count)
    assert "no label" not in run_kprep("index", tmp_path, "--labels", "none", "--force").stdout


def test_a_class_list_decides_order_and_refuses_the_rest(tmp_path):
    root = tmp_path / "root"
    video = clip(seconds=0.2)
    samples = {"a": b"up", "b": b"down", "c": b"sideways", "d": b"1", "e": b"7"}
    write_tar(
        root / "train.tar", {key: {"mp4": video, "cls": text} for key, text in samples.items()}
    )
    (tmp_path / "list.txt").write_text("up\nleft\ndown\n")
    run_kprep("index", root, "--classes", tmp_path / "list.txt")
    rows = pq.read_table(root / "index/train.parquet").to_pylist()
    assert [(row["key"], row["label"]) for row in rows] == [("a", 0), ("b", 2), ("d", 1)]
    assert {key: reason for key, (reason, _) in failures(root).items()} == {
        "c": "bad label",
        "e": "bad label",
    }
    assert (root / "classes.txt").read_text() == "up\nleft\ndown\n"


@pytest.mark.parametrize("labels", [
    [(0, "a"), (1, "a")], [(0, "a"), (0, "b")], [(0, "a"), (2, "b")], [(0, "a"), (None, "b")],
    [(0, None), (None, "b")],
])  # fmt: skip
def test_labels_that_make_no_list_are_refused(labels):
    with pytest.raises(UsageError, match="--classes"):
        class_list(labels)


@pytest.mark.parametrize("texts", [
    {"cls": b"1000000"}, {"cls": b"-5"}, {"cls": b""}, {"cls": b"a\nb"}, {"cls": b"x" * 300}, {"cls": b"\x1b[31m"}, {},
])  # fmt: skip
def test_unusable_labels_are_refused(texts):
    with pytest.raises(RowFailure):
        stated_label("cls", texts)


@pytest.mark.parametrize("text", [b"[1]", b"{", b'{"label": 1.5}', b'{"label": true}', b'{"label": null}', b"[" * 100_000, b'{"label": {"a": 1}}', b'{"label": "a", "label_index": "0"}', b'{"label": "a", "label_index": true}', b'{"label": "a", "label_index": -1}'])  # fmt: skip
def test_unusable_json_labels_are_refused(text):
    with pytest.raises(RowFailure):
        stated_label("json", {"json": text})


@given(st.lists(st.sampled_from(CLASSES), min_size=1))
def test_a_class_list_of_names_gives_every_name_back(names):
    made = class_list([(None, name) for name in names])
    indices = {name: number for number, name in enumerate(made)}
    assert [made[label_index((None, name), indices)] for name in names] == names


@given(st.text(alphabet="ab./_A", min_size=1, max_size=12))
def test_keys_are_those_of_webdataset(name):
    """But for a leading `./`, which is no part of ours."""
    name = name.removeprefix("./")
    if name.startswith("./"):
        return
    key, extension = base_plus_ext(name)
    if name.startswith("__") and split_name(name)[0] is None:
        return  # webdataset passes over these before it asks for the key
    assert split_name(name) == (key, (extension or "").lower())


def test_a_long_name_costs_no_more_time_than_its_length():
    assert split_name("a/" * 2_000_000 + "a") == (None, "")  # squared, this would take an hour
    assert split_name("a/" * 2_000_000 + "b.c") == ("a/" * 2_000_000 + "b", "c")


def test_a_name_that_no_path_can_be_is_refused(tmp_path):
    (tmp_path / "train.tar").write_bytes(raw_tar((entry("b/" * 2046 + "b.mp4"), b"x")))
    storage = Storage(str(tmp_path))
    with pytest.raises(ArchiveError, match="a name of 4,097 characters"):
        list(walk(ShardBytes(storage, storage.info("train.tar"))))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a\nb.mp4", r"member a\nb.mp4 has a control character in its name"),
        ("a\u202eb.mp4", r"member a\u202eb.mp4 has a character that cannot be printed in its name"),
        ("../a\nb.mp4", r"member ../a\nb.mp4 has a name that leaves the archive"),
    ],
)
def test_a_name_that_does_not_print_is_told_from_one_that_leaves_the_archive(tmp_path, name, says):
    (tmp_path / "train.tar").write_bytes(raw_tar((entry(name), b"x")))
    storage = Storage(str(tmp_path))
    with pytest.raises(ArchiveError) as caught:
        list(walk(ShardBytes(storage, storage.info("train.tar"))))
    assert says in str(caught.value)


def test_members_without_end_are_refused(tmp_path, monkeypatch):
    (tmp_path / "train.tar").write_bytes(raw_tar(*((entry(f"{n}.txt"), b"") for n in range(11))))
    storage = Storage(str(tmp_path))
    assert len(list(walk(ShardBytes(storage, storage.info("train.tar"))))) == 11
    monkeypatch.setattr("prep.shard_bytes._MAX_MEMBERS", 10)
    with pytest.raises(ArchiveError, match="over 10 members"):
        list(walk(ShardBytes(storage, storage.info("train.tar"))))


@given(
    st.sampled_from([Fraction(15), Fraction(24000, 1001), Fraction(25), Fraction(30000, 1001), Fraction(60)]),
    st.sampled_from([Fraction(1, 1000), Fraction(1, 90000), Fraction(1, 15360)]),
    st.integers(2, 400), st.integers(0, 10_000),
)  # fmt: skip
def test_a_constant_rate_is_one_however_it_is_rounded(rate, tick, count, begin):
    stamps = [begin + round(number / rate / tick) for number in range(count)]
    assert off_rate(stamps, tick, rate) is None
    moved = [*stamps[:-1], stamps[-1] + int(1 / rate / tick)]  # the last one a frame late
    assert off_rate(moved, tick, rate) == count - 1


# what is there already


def test_nothing_of_somebody_else_is_overwritten(tmp_path):
    root = tmp_path / "root"
    write_tar(root / "train.tar", {"a": {"mp4": clip(), "cls": b"0"}})
    (root / "classes.txt").write_text("mine\n")
    done = run_kprep("index", root, check=False)
    assert done.returncode == 2
    assert "classes.txt exists and would be overwritten" in done.stderr
    assert (root / "classes.txt").read_text() == "mine\n"
    run_kprep("index", root, "--force")
    done = run_kprep("index", root, check=False)
    assert done.returncode == 2
    assert "--force" in done.stderr


DIES_AT = """
import os, signal, sys
from prep.shard_bytes import ShardBytes, walk
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


def killed_index(root: str | Path, moment: str, environment: dict[str, str]) -> None:
    died = subprocess.run([sys.executable, "-P", "-c", DIES_AT, moment, "index", str(root)],
                          env={**os.environ, **environment}, capture_output=True, timeout=120, check=False)  # fmt: skip
    assert died.returncode == -signal.SIGKILL, died.stderr


@pytest.mark.parametrize("where", ["disk", "bucket"])
@pytest.mark.parametrize("moment", ["ledger/train.parquet", "manifest.json"])
def test_killed_while_publishing_the_same_command_completes(request, tmp_path, moment, where):
    root, environment = str(tmp_path / "root"), {}
    write_tar(tmp_path / "root/train.tar", {"a": {"mp4": clip(), "cls": b"0"}})
    shutil.copytree(root, tmp_path / "whole")
    storage = Storage(root)
    if where == "bucket":
        s3 = request.getfixturevalue("s3")
        root = s3.upload(tmp_path / "root", f"killed-{os.getpid()}-{next(_prefixes)}")
        environment, storage = s3.environment, Storage(root, s3.options)
    killed_index(root, moment, environment)
    assert not storage.exists("manifest.json")
    if where == "bucket":
        storage.delete(".kprep-lock")  # it would be void after two minutes
    run_kprep("index", root, **environment)
    run_kprep("index", tmp_path / "whole")
    wanted = Storage(str(tmp_path / "whole"))
    assert {info.path: storage.read(info.path) for info in storage.list()} == {
        info.path: wanted.read(info.path) for info in wanted.list()
    }
    assert b'"card": true' in storage.read("manifest.json")
    assert verify(storage).faults == []


def indexed(root: Path, *, until: int | None = None, **options) -> list[str]:
    """Index a root in this process; return the tars that were described, at most `until` of them."""
    looked_at = []

    def describe(storage, paths, *rest, **more):
        for number, (path, report) in enumerate(describe_shards(storage, paths, *rest, **more)):
            if number == until:
                raise KeyboardInterrupt
            looked_at.append(path)
            yield path, report

    storage, asked = Storage(str(root)), IndexOptions(workers=1, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prep.foreign_index.describe_shards", describe)
        with contextlib.suppress(KeyboardInterrupt):
            index_tars(storage, asked, *find_shards(storage, asked), _Silent())
    return looked_at


def test_an_interrupted_run_goes_on_with_the_tars_that_it_has_not_seen(strangers, tmp_path, monkeypatch):  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole = Path(shutil.copytree(strangers, tmp_path / "whole"))
    every = indexed(whole)
    assert len(every) == 3
    root = Path(shutil.copytree(strangers, tmp_path / "root"))
    first = indexed(root, until=2)
    assert len(first) == 2
    assert not (root / "manifest.json").exists()
    assert sorted([*indexed(root), *first]) == sorted(every)
    assert files_of(root) == files_of(whole)
    assert not list((tmp_path / "cache/kprep/index").iterdir())  # of no use any more
    assert sorted(indexed(root, force=True)) == sorted(every)


def test_without_a_place_for_its_notes_an_index_is_made_all_the_same(strangers, tmp_path, monkeypatch):  # fmt: skip
    (tmp_path / "cache").write_bytes(b"no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    root = Path(shutil.copytree(strangers, tmp_path / "root"))
    assert len(indexed(root)) == 3
    assert verify(Storage(str(root))).faults == []


def test_a_tar_that_cannot_be_read_is_named_in_one_sentence(tmp_path):
    storage, context = (
        Storage(str(tmp_path)),
        {"foreign": {}, "as_stored": False, "rules": ["none"]},
    )
    with pytest.raises(KprepError) as caught:
        list(describe_shards(storage, {"gone.tar": 10}, context, folder=tmp_path, workers=1, progress=_Silent()))  # fmt: skip
    assert str(caught.value) == f"{tmp_path}/gone.tar does not exist"


def test_what_is_too_long_says_its_limit(monkeypatch):
    clip = encode(motion(np.random.default_rng(1), 1), "mp4", "libx264", X264)
    monkeypatch.setattr("prep.clip_check._MOST_FRAMES", 5)
    with pytest.raises(RowFailure) as caught:
        decode_clip(clip)
    assert (caught.value.reason, caught.value.detail) == (
        "picture size",
        "it has more than 5 frames",
    )
    with pytest.raises(RowFailure, match=r"2,147,483,649 bytes, more than 2,147,483,648"):
        _Foreign({}, None, {})._video(SimpleNamespace(size=(2 << 30) + 1))


def found(key: str) -> dict[str, Any]:
    """What `describe_shard` says of a tar with one sample."""
    return {"samples": [{"key": key}]}


def test_what_nobody_came_back_to_is_forgotten(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for root in ("old", "young"):
        IndexWork(root, {}).keep(ObjectInfo("a.tar", 1, "v"), found(root))
    (old,) = [path for path in (tmp_path / "kprep/index").iterdir()
              if IndexWork("old", {})._folder == path]  # fmt: skip
    os.utime(old, (0, 0))
    assert IndexWork("young", {}).report(ObjectInfo("a.tar", 1, "v")) == found("young")
    assert not old.exists()


def test_whoever_comes_back_late_finds_what_nobody_else_has_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    work, info = IndexWork("root", {}), ObjectInfo("a.tar", 1, "v")
    work.keep(info, found("a"))
    os.utime(work._folder, (0, 0))
    assert IndexWork("root", {}).report(info) == found("a")
    IndexWork("another", {})
    assert work.report(info) == found("a")


@pytest.mark.parametrize(
    ("reason", "kept"),
    [(Reason.CRASHED, False), (Reason.STORAGE, False), (Reason.EMPTY_FILE, True)],
)
def test_a_failure_that_can_pass_is_not_remembered(tmp_path, monkeypatch, reason, kept):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    work, info = IndexWork("root", {}), ObjectInfo("a.tar", 1, "v")
    report = {"samples": [{"key": "a"}, {"key": "b", "failed": [str(reason), "why"]}]}
    work.keep(info, report)
    assert work.report(info) == (report if kept else None)


HOMELESS = """
import pwd, sys
from prep.user_cache import cache_folder
def nobody(uid):
    raise KeyError(uid)
pwd.getpwuid = nobody
folder = cache_folder("index", "root")
assert folder.is_dir()
print(folder)
"""


def test_a_user_without_a_home_gets_a_folder_that_is_removed_in_the_end(tmp_path):
    homes = ("HOME", "XDG_CACHE_HOME")
    env = {name: value for name, value in os.environ.items() if name not in homes}
    done = subprocess.run([sys.executable, "-P", "-c", HOMELESS], env={**env, "TMPDIR": str(tmp_path)},
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "described_again"),
    [("nothing", 1), ("a tar", 2), ("the options", 3), ("its notes", 3)],
)
def test_what_an_interrupted_run_found_counts_for_the_same_tar_and_options_only(
    strangers, tmp_path, monkeypatch, changed, described_again
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = Path(shutil.copytree(strangers, tmp_path / "root"))
    tar = root / indexed(root, until=2)[0]
    if changed == "a tar":
        shutil.copyfile(tar, tmp_path / "other.tar")
        (tmp_path / "other.tar").rename(tar)
    for note in (tmp_path / "cache/kprep/index").rglob("*") if changed == "its notes" else ():
        if note.is_file():
            note.write_bytes(note.read_bytes()[:-9])  # as a power failure leaves it
    options = {"labels": "none"} if changed == "the options" else {}
    assert len(indexed(root, **options)) == described_again
    assert verify(Storage(str(root))).faults == []


def test_what_a_killed_run_did_not_begin_is_still_the_users(tmp_path):
    root = tmp_path / "root"
    write_tar(root / "train.tar", {"a": {"mp4": clip(), "cls": b"0"}})
    (root / "README.md").write_text("mine\n")
    killed_index(root, "manifest.json", {})
    other = run_kprep("index", root, "--split", "val", check=False)
    assert (other.returncode, "run that command again" in other.stderr) == (2, True)
    write_tar(root / "train-1.tar", {"b": {"mp4": clip(), "cls": b"0"}})
    (root / "train-1.tar.idx").write_text("mine\n")
    done = run_kprep("index", root, check=False)
    assert (done.returncode, "train-1.tar.idx exists" in done.stderr) == (2, True)
    (root / "train-1.tar.idx").unlink()
    run_kprep("index", root)
    assert (root / "README.md").read_text() == "mine\n"
    assert not (root / ".kprep-work").exists()
    assert verify(Storage(str(root))).faults == []


OF_VAL = ("index/val.parquet", "ledger/val.parquet", "wids-val.json")


def two_splits(root: Path) -> Storage:
    """Index a tar of train and one of val; beside them lie files of the user."""
    write_tar(root / "train/0.tar", {"a": {"mp4": clip(), "cls": b"0"}})
    write_tar(root / "val/0.tar", {"b": {"mp4": clip(), "cls": b"1"}})
    (root / "index").mkdir()
    for path in ("wids-test.json", "index/test.parquet", "val/1.tar.idx"):
        (root / path).write_text("mine\n")
    assert indexed(root) == ["train/0.tar", "val/0.tar"]
    return Storage(str(root))


def reindexed(root: Path, *splits: str) -> set[str]:
    """Index anew; return the files that are there, each of them listed."""
    indexed(root, splits=splits, force=True)
    assert verify(Storage(str(root)), deep=True).faults == []  # nothing that is not listed
    files = set(json.loads((root / "manifest.json").read_text())["files"])
    assert {"wids-test.json", "index/test.parquet", "val/1.tar.idx"} <= files
    return files


def test_what_other_splits_leave_behind_is_removed(tmp_path):
    storage = two_splits(tmp_path)
    files = reindexed(tmp_path, "train")
    assert not {*OF_VAL} & {*files, *files_of(tmp_path)}
    assert {"train/0.tar.idx", "val/0.tar.idx"} <= files
    assert {*OF_VAL} <= reindexed(tmp_path)  # and back
    files = reindexed(tmp_path, "val=val/*")
    assert "train/0.tar" in files  # the user's, of no split
    assert not {"train/0.tar.idx", "index/train.parquet", "wids-train.json"} & files
    storage.delete("train/0.tar")
    write_tar(tmp_path / "val/2.tar", {"c": {"mp4": clip(), "cls": b"1"}})
    reindexed(tmp_path)
    storage.delete("val/2.tar")
    assert "val/2.tar.idx" not in reindexed(tmp_path)


@pytest.mark.parametrize("moment", ["manifest.json", *OF_VAL])
def test_killed_while_removing_the_same_command_completes(tmp_path, monkeypatch, moment):
    storage = two_splits(tmp_path)

    step = "write" if moment == "manifest.json" else "delete"
    real = getattr(Storage, step)

    def killed(self, path, *data):
        if path == moment:
            raise KeyboardInterrupt
        real(self, path, *data)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, step, killed)
        indexed(tmp_path, splits=("train",), force=True)
    assert storage.exists(".kprep-work/index.json")
    assert storage.exists(OF_VAL[-1])
    assert not {*OF_VAL} & {*reindexed(tmp_path, "train"), *files_of(tmp_path)}
    assert not storage.exists(".kprep-work/index.json")


def test_a_killed_run_with_other_splits_is_completed_first(tmp_path, monkeypatch):
    """Its files are listed nowhere yet, so that they would be taken for the user's."""
    two_splits(tmp_path)

    def killed(self, path, data):
        if path == "manifest.json":
            raise KeyboardInterrupt
        real(self, path, data)

    real = Storage.write
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write", killed)
        indexed(tmp_path, splits=("other",), force=True)
    with pytest.raises(UsageError, match="run that command again"):
        indexed(tmp_path, splits=("train",), force=True)
    assert "wids-other.json" in reindexed(tmp_path, "other")
    assert "wids-other.json" not in reindexed(tmp_path, "train")


def test_a_marker_removes_no_file_that_is_not_of_our_form(tmp_path):
    storage = two_splits(tmp_path)
    marker = {"files": [], "card": True, "gone": ["val/0.tar", "README.md", "wids-no.json"]}
    storage.write(".kprep-work/index.json", json.dumps(marker).encode())
    storage.write("wids-no.json", b"of a killed run")
    files = reindexed(tmp_path)
    assert "val/0.tar" in files
    assert "wids-no.json" not in files


def test_a_marker_that_is_not_ours_is_refused(tmp_path):
    root = tmp_path / "root"
    write_tar(root / "train.tar", {"a": {"mp4": clip(), "cls": b"0"}})
    (root / ".kprep-work").mkdir()
    (root / ".kprep-work/index.json").write_text("[]")
    done = run_kprep("index", root, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "index.json is not kprep's" in done.stderr


def test_what_came_before_the_lock_is_not_overlooked(tmp_path):
    from prep.errors import KprepError
    from prep.foreign_index import IndexOptions, find_shards, index_tars
    from prep.verify import _Silent

    storage = Storage(str(tmp_path))
    write_tar(tmp_path / "train-0.tar", {"a": {"mp4": clip(), "cls": b"0"}})
    options = IndexOptions(workers=1)
    splits, files = find_shards(storage, options)
    write_tar(tmp_path / "train-1.tar", {"b": {"mp4": clip(), "cls": b"0"}})
    with pytest.raises(KprepError, match="run the same command again"):
        index_tars(storage, options, splits, files, _Silent())
    (tmp_path / "train-1.tar").unlink()
    (tmp_path / "README.md").write_text("mine\n")
    with pytest.raises(KprepError, match="run the same command again"):
        index_tars(storage, options, splits, files, _Silent())
    assert {path.name for path in tmp_path.iterdir()} == {"train-0.tar", "README.md"}


def test_a_dataset_of_kprep_is_not_indexed_over(motion_dataset):
    done = run_kprep("index", motion_dataset, "--force", check=False)
    assert done.returncode == 2
    assert "verify --repair" in done.stderr


@pytest.mark.parametrize("make", [lambda _: None, lambda root: root.mkdir(), lambda root: (root.mkdir(), (root / "x.tar.gz").write_bytes(b"x"))])  # fmt: skip
def test_nothing_to_index_is_one_sentence(tmp_path, make):
    make(tmp_path / "root")
    done = run_kprep("index", tmp_path / "root", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


# the other readers, by their own packages


@pytest.mark.slow
def test_every_reader_reads_the_tars_of_somebody_else(tmp_path):
    """All samples, also the one that is no clip: the companions count what stands in the tars."""
    root, contents = tmp_path / "root", {}
    for shard in range(2):
        samples = {
            f"{shard:05d}{number:04d}": {
                "mp4": clip(seconds=0.2 + number / 25) if number else clip()[:2000],
                "txt": CLASSES[number % 4].encode(),
                "json": json.dumps({"caption": CLASSES[number % 4]}).encode(),
            }
            for number in range(6)
        }
        write_tar(root / "train" / f"{shard:05d}.tar", samples)
        contents |= {
            key: hashlib.sha256(parts["mp4"]).hexdigest() for key, parts in samples.items()
        }
    assert "10 clips of 12 samples" in run_kprep("index", root, "--labels", "txt").stdout
    for reader in ("webdataset", "wids", "megatron-energon", "datasets"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", Path(__file__).with_name("other_readers.py"), reader, root, "train"],
            capture_output=True, text=True, timeout=300, check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        found = [json.loads(line) for line in done.stdout.splitlines()[1:]]
        assert {key: digest for _, key, digest, _ in found} == contents, reader
        assert {sidecar["caption"] for *_, sidecar in found} == set(CLASSES)
