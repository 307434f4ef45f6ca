"""`kprep push` and `kprep pull`: verified copies, continued after kills and faults, never half a dataset."""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import obstore
import pyarrow.parquet as pq
import pytest
from conftest import run_kprep
from copy_datasets import CLASSES, convert, draw, files_of, flip, noise_dataset, objects_of
from fault_proxy import by_rate, fault_proxy, uploads_by_rate
from hypothesis import given
from hypothesis import strategies as st

from prep import copy_dataset as copying
from prep.byte_progress import ByteProgress
from prep.copy_dataset import copy_dataset
from prep.copy_plan import is_root_file, plan_copy
from prep.copy_roots import check_roots
from prep.errors import DatasetError, KprepError, MissingBucketError, StorageError, UsageError
from prep.faults import Kind
from prep.format import FileEntry, Manifest, Shard, Split, read_manifest
from prep.open_index import open_index
from prep.profile import PROFILES
from prep.storage import RetryPolicy, Storage
from prep.verify import verify


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Two splits of real clips, some rows failed."""
    folder = tmp_path_factory.mktemp("copied")
    for split, seed in (("train", 1), ("val", 2)):
        draw(folder / split, dict.fromkeys(CLASSES, 4), seed=seed, broken=1)
        convert(folder / split, folder / "root", split)
    return folder / "root"


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> Path:
    return noise_dataset(tmp_path_factory.mktemp("noise") / "root")


def pushed(s3, source: Path, prefix: str, **options):
    return copy_dataset(
        Storage(str(source)), Storage(f"s3://kprep/{prefix}", s3.options), **options
    )


# -- there and back ------------------------------------------------------------------------------


def test_to_a_bucket_and_back_is_byte_identical(dataset, s3, tmp_path):
    url, back = "s3://kprep/copy/there", tmp_path / "back"
    text = run_kprep("push", dataset, url, **s3.environment).stdout
    assert "0 were there already" in text
    assert objects_of(s3, "copy/there") == files_of(dataset)
    run_kprep("verify", url, **s3.environment)
    run_kprep("pull", url, back, **s3.environment)
    assert files_of(back) == files_of(dataset)
    assert sorted(path.name for path in back.iterdir()) == sorted(
        path.name for path in dataset.iterdir()
    )  # no work folder is left
    assert verify(Storage(str(back))).faults == []


def test_large_files_go_in_parts_and_come_back_equal(noise, s3, tmp_path):
    result = pushed(s3, noise, "copy/noise")
    assert objects_of(s3, "copy/noise") == files_of(noise)
    [etag] = [meta["e_tag"] for page in obstore.list(s3.store("copy/noise")) for meta in page
              if meta["path"].endswith("000001.tar")]  # fmt: skip
    assert etag.strip('"').endswith("-3")  # S3's mark of an upload in three parts
    assert result.bytes_sent == sum(path.stat().st_size for path in noise.rglob("*") if path.is_file()
                                    and path.name != "manifest.json")  # fmt: skip
    copy_dataset(Storage("s3://kprep/copy/noise", s3.options), Storage(str(tmp_path / "back")))
    assert files_of(tmp_path / "back") == files_of(noise)


def test_from_bucket_to_bucket_and_from_folder_to_folder(noise, s3, tmp_path):
    pushed(s3, noise, "copy/first")
    copy_dataset(
        Storage("s3://kprep/copy/first", s3.options), Storage("s3://kprep/copy/second", s3.options)
    )
    assert objects_of(s3, "copy/second") == files_of(noise)
    copy_dataset(Storage(str(noise)), Storage(str(tmp_path / "copy")))
    assert files_of(tmp_path / "copy") == files_of(noise)


def test_a_plain_web_server_can_be_pulled_from(dataset, tmp_path, http_folder):
    with http_folder(dataset) as url:
        run_kprep("pull", url, tmp_path / "back")
        assert files_of(tmp_path / "back") == files_of(dataset)
        done = run_kprep("push", dataset, url, check=False)
        assert (done.returncode, "read only" in done.stderr) == (2, True)


@pytest.fixture
def http_folder():
    """Serve a folder on 127.0.0.1, with ranges, as web servers do."""
    import http.server

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            path, span = Path(self.translate_path(self.path)), self.headers.get("Range")
            if not path.is_file():
                return self.send_error(404)
            data = path.read_bytes()
            first, last = 0, len(data) - 1
            if span:
                first, last = (int(part or last) for part in span.removeprefix("bytes=").split("-"))
            self.send_response(206 if span else 200)
            if span:
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            self.send_header("Content-Length", str(last + 1 - first))
            self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
            self.end_headers()
            self.wfile.write(data[first : last + 1])
            return None

    @contextlib.contextmanager
    def serve(folder):
        def make(*arguments):
            return Handler(*arguments, directory=str(folder))

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), make) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            try:
                yield f"http://127.0.0.1:{server.server_address[1]}"
            finally:
                server.shutdown()
                thread.join()

    return serve


# -- what is there is not sent again -------------------------------------------------------------


def test_a_repeat_sends_nothing_and_a_damaged_file_alone(noise, s3, tmp_path):
    pushed(s3, noise, "copy/repeat")
    again = pushed(s3, noise, "copy/repeat")
    assert (again.num_sent, again.num_there) == (0, 12)
    store = s3.store("copy/repeat")
    data = bytearray(obstore.get(store, "train/train-000001.tar").bytes())
    data[77] ^= 1
    obstore.put(store, "train/train-000001.tar", bytes(data))  # the same size, and no mark of ours
    obstore.delete(store, "index/train.parquet")
    assert pushed(s3, noise, "copy/repeat").sent == [
        "train/train-000001.tar",
        "index/train.parquet",
    ]
    assert objects_of(s3, "copy/repeat") == files_of(noise)
    copy_dataset(Storage(str(noise)), Storage(str(tmp_path / "copy")))
    flip(tmp_path / "copy/train/train-000002.tar")
    repaired = copy_dataset(Storage(str(noise)), Storage(str(tmp_path / "copy")))
    assert repaired.sent == ["train/train-000002.tar"]
    assert files_of(tmp_path / "copy") == files_of(noise)


def test_objects_that_others_uploaded_are_read_and_not_sent_again(noise, s3):
    s3.upload(noise, "copy/others")
    assert pushed(s3, noise, "copy/others").num_sent == 0


def test_a_partial_local_file_is_continued_and_a_damaged_one_begun_anew(noise, tmp_path):
    source = CountingStorage(str(noise))
    root, path = tmp_path / "copy", "train/train-000000.tar"
    stop_after_reads(source, root, 2)
    [part] = [part for part in root.rglob("*.part") if part.stat().st_size == 16 << 20]
    source.ranges.clear()
    copy_dataset(source, Storage(str(root)), jobs=1)
    assert source.ranges[path] == [(16 << 20, 20 << 20)]
    assert files_of(root) == files_of(noise)
    shutil.rmtree(root)
    stop_after_reads(CountingStorage(str(noise)), root, 2)
    [part] = [part for part in root.rglob("*.part") if part.stat().st_size == 16 << 20]
    flip(part)
    copy_dataset(Storage(str(noise)), Storage(str(root)))
    assert files_of(root) == files_of(noise)


class CountingStorage(Storage):
    """A root that notes which ranges of which tars are read, and can fail at one of them."""

    def __post_init__(self):
        super().__post_init__()
        self.ranges, self.fail_at = {}, None

    def read_range(self, path, start, end, *, etag=None):
        if path.endswith(".tar"):
            self.ranges.setdefault(path, []).append((start, end))
            if self.fail_at is not None and sum(map(len, self.ranges.values())) > self.fail_at:
                raise StorageError("the line is dead")
        return super().read_range(path, start, end, etag=etag)


def stop_after_reads(source, root, count):
    source.fail_at = count
    with pytest.raises(StorageError, match="the line is dead"):
        copy_dataset(source, Storage(str(root)), jobs=1)
    assert not (root / "manifest.json").exists()
    source.fail_at = None


# -- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bucket", [False, True], ids=["to a folder", "to a bucket"])
def test_a_damaged_source_file_is_named_and_nothing_is_published(noise, s3, tmp_path, bucket):
    source = Path(shutil.copytree(noise, tmp_path / "source"))
    flip(source / "train/train-000001.tar", 15 << 20)
    flip(source / "train/train-000002.tar", 0)
    prefix = "copy/damaged"
    destination = (
        Storage(f"s3://kprep/{prefix}", s3.options) if bucket else Storage(str(tmp_path / "c"))
    )
    with pytest.raises(DatasetError) as caught:
        copy_dataset(Storage(str(source)), destination)
    assert "train-000001.tar is damaged" in str(caught.value)
    assert "train-000002.tar is damaged" in str(caught.value)
    there = objects_of(s3, prefix) if bucket else files_of(tmp_path / "c")
    assert "manifest.json" not in there
    assert "train/train-000001.tar" not in there
    assert "train/train-000000.tar" in there
    # mended at the source, the same command completes
    copy_dataset(Storage(str(noise)), destination)
    assert (objects_of(s3, prefix) if bucket else files_of(tmp_path / "c")) == files_of(noise)


def test_a_file_that_is_cut_during_the_copy_publishes_nothing(tmp_path, monkeypatch):
    source = noise_dataset(tmp_path / "source", shards=1, shard_bytes=1 << 16)
    target, real = Storage(str(tmp_path / "copy")), copying.sizes_at

    def sizes_at(storage):
        """As it is, but that the tar is cut once it has come."""
        tar = tmp_path / "copy/train/train-000000.tar"
        if storage is target and tar.exists() and (tmp_path / "copy/index/train.parquet").exists():
            tar.write_bytes(b"cut")
        return real(storage)

    monkeypatch.setattr(copying, "sizes_at", sizes_at)
    with pytest.raises(StorageError, match=r"train-000000\.tar has 3 bytes after the copy"):
        copy_dataset(Storage(str(source)), target)
    assert not (tmp_path / "copy/manifest.json").exists()


def test_what_arrives_damaged_is_fetched_again(noise, tmp_path):
    source = FlippingStorage(str(noise))
    copy_dataset(source, Storage(str(tmp_path / "copy")))
    assert source.flipped == 3
    assert files_of(tmp_path / "copy") == files_of(noise)


class FlippingStorage(Storage):
    """A root of which the first read of every tar arrives with another bit."""

    flipped = 0

    def read_range(self, path, start, end, *, etag=None):
        data = bytearray(super().read_range(path, start, end, etag=etag))
        seen = vars(self).setdefault("seen", set())
        if path.endswith(".tar") and start and path not in seen:
            seen.add(path)
            self.flipped += 1
            data[5] ^= 1
        return memoryview(data)


# -- what a destination holds --------------------------------------------------------------------


def test_splits_are_added_and_the_copy_verifies(dataset, s3, tmp_path):
    url, copy = "s3://kprep/copy/splits", tmp_path / "copy"
    run_kprep("push", dataset, url, "--split", "val", **s3.environment)
    run_kprep("verify", url, **s3.environment)
    manifest = json.loads(bytes(obstore.get(s3.store("copy/splits"), "manifest.json").bytes()))
    assert list(manifest["splits"]) == ["val"]
    assert not any("train" in path for path in manifest["files"])
    run_kprep("pull", url, copy, **s3.environment)
    assert verify(Storage(str(copy))).faults == []
    before = files_of(copy / "val")
    result = copy_dataset(Storage(str(dataset)), Storage(str(copy)), splits=["train"])
    assert {path for path in result.sent if "train" in path} == {
        path for path in files_of(dataset) if "train" in path
    }
    assert files_of(copy / "val") == before
    assert files_of(copy) == files_of(dataset)
    assert copy_dataset(Storage(str(dataset)), Storage(str(copy)), splits=["val"]).num_sent == 0
    assert files_of(copy) == files_of(dataset)


def written_otherwise(root: Path, path: str) -> None:
    """Write a table's rows in other bytes, as another version of Arrow does; manifest too."""
    table = pq.read_table(root / path)
    pq.write_table(table, root / path, compression="gzip", row_group_size=2)
    relist(root, path)


class DyingStorage(Storage):
    """A destination that cannot write its manifest."""

    def write(self, path, data):
        if path == "manifest.json":
            raise StorageError("died")
        super().write(path, data)


@pytest.mark.parametrize("added", [False, True], ids=["the split again", "another split beside it"])
def test_a_published_split_stays_readable_under_another_writing_of_it(dataset, tmp_path, added):
    source, copy = tmp_path / "source", tmp_path / "copy"
    shutil.copytree(dataset, source)
    splits = ["train", "val"] if added else ["train"]
    copy_dataset(Storage(str(source)), Storage(str(copy)), splits=["train"])
    written_otherwise(source, "index/train.parquet")
    if added:
        written_otherwise(source, "ledger/train.parquet")
    else:
        change_tools(source)  # so that there is a manifest to write
    before = files_of(copy)
    with pytest.raises(StorageError, match="died"):
        copy_dataset(Storage(str(source)), DyingStorage(str(copy)), splits=splits)
    assert (
        files_of(copy).items()
        >= {path: digest for path, digest in before.items() if not is_root_file(path)}.items()
    )
    open_index(Storage(str(copy)), read_manifest(Storage(str(copy))), "train")
    copy_dataset(Storage(str(source)), Storage(str(copy)), splits=splits)
    assert verify(Storage(str(copy))).faults == []
    assert files_of(copy)["index/train.parquet"] == before["index/train.parquet"]
    assert copy_dataset(Storage(str(source)), Storage(str(copy)), splits=splits).num_sent == 0


def test_a_damaged_index_of_a_published_split_is_sent(dataset, tmp_path):
    source, copy = tmp_path / "source", tmp_path / "copy"
    shutil.copytree(dataset, source)
    copy_dataset(Storage(str(source)), Storage(str(copy)))
    written_otherwise(source, "index/train.parquet")
    flip(copy / "index/train.parquet")
    result = copy_dataset(Storage(str(source)), Storage(str(copy)))
    assert result.sent == ["index/train.parquet"]
    assert files_of(copy) == files_of(source)
    assert verify(Storage(str(copy))).faults == []


def change_tools(root: Path) -> None:
    values = json.loads((root / "manifest.json").read_text())
    values["splits"]["train"]["tools"]["kprep"] = "another"
    (root / "manifest.json").write_text(json.dumps(values))


def test_another_dataset_is_refused(dataset, tmp_path):
    others = draw(tmp_path / "v", dict.fromkeys(CLASSES, 2), seed=9)
    other = convert(others, tmp_path / "other", "train")
    before = files_of(other)
    done = run_kprep("push", dataset, other, check=False)
    assert done.returncode == 2
    assert "another split train (6 clips, the source's has 9)" in done.stderr
    assert "a published split never changes" in done.stderr
    profile = convert(others, tmp_path / "profile", "test", "--crf", 30)
    with pytest.raises(UsageError, match=r"another profile \(.*crf: 23, not 30"):
        copy_dataset(Storage(str(dataset)), Storage(str(profile)))
    few = draw(tmp_path / "few", {"left": 2}, seed=10)
    classes = convert(few, tmp_path / "classes", "test")
    with pytest.raises(UsageError, match="other classes"):
        copy_dataset(Storage(str(dataset)), Storage(str(classes)))
    assert files_of(other) == before


def test_a_clip_of_another_split_is_refused(dataset, tmp_path):
    """A key is unique in a dataset, also when the splits come from different places."""
    other = tmp_path / "other"
    shutil.copytree(dataset, other)
    manifest = json.loads((other / "manifest.json").read_text())
    for name in ("index/val.parquet", "ledger/val.parquet", "wids-val.json"):
        (other / name.replace("val", "test")).write_bytes((other / name).read_bytes())
        manifest["files"][name.replace("val", "test")] = manifest["files"].pop(name)
    manifest["splits"] = {"test": manifest["splits"]["val"]}
    manifest["files"] = {
        path: entry for path, entry in manifest["files"].items() if "train" not in path
    }
    (other / "manifest.json").write_text(json.dumps(manifest))
    copy_dataset(Storage(str(dataset)), Storage(str(tmp_path / "copy")), splits=["val"])
    with pytest.raises(UsageError, match="belongs to split val"):
        copy_dataset(Storage(str(other)), Storage(str(tmp_path / "copy")))
    copy_dataset(Storage(str(dataset)), Storage(str(tmp_path / "copy2")), splits=["train"])
    shutil.copy(dataset / "index/train.parquet", other / "index/test.parquet")
    whole = json.loads((dataset / "manifest.json").read_text())
    manifest["files"]["index/test.parquet"] = whole["files"]["index/train.parquet"]
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="a key is unique in a dataset"):
        copy_dataset(Storage(str(other)), Storage(str(tmp_path / "copy2")))


def test_a_file_for_which_there_is_no_room_is_named(noise, tmp_path):
    words = f'ulimit -f 10000; exec "{sys.executable}" -P -m prep pull "$0" "$1"'  # of 512 or 1024 bytes
    done = subprocess.run(["sh", "-c", words, noise, tmp_path / "copy"], capture_output=True,
                          text=True, timeout=120, check=False)  # fmt: skip
    assert done.returncode == 1
    said = (
        f"{tmp_path}/copy/train/train-00000\\d.tar cannot be read or written: File too large; mend"
    )
    assert re.search(said, done.stderr), done.stderr


def test_a_folder_of_something_else_is_refused(noise, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(
        UsageError, match=r"is not empty and no kprep dataset \(it holds thesis.txt\)"
    ):
        copy_dataset(Storage(str(noise)), Storage(str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_unfinished_copy_of_something_else_is_refused(noise, tmp_path):
    stop_after_reads(CountingStorage(str(noise)), tmp_path / "copy", 4)
    other = noise_dataset(tmp_path / "other", seed=5, shard_bytes=1000)
    with pytest.raises(UsageError, match="unfinished copy of other clips"):
        copy_dataset(Storage(str(other)), Storage(str(tmp_path / "copy")))
    copy_dataset(Storage(str(noise)), Storage(str(tmp_path / "copy")))
    assert files_of(tmp_path / "copy") == files_of(noise)


@pytest.mark.parametrize("path", ["manifest.json", ".kprep-lock", ".kprep-work/x"])
def test_a_manifest_that_lists_what_is_not_its_own_is_refused(noise, tmp_path, path):
    source = noise_dataset(tmp_path / "source", shard_bytes=1000)
    manifest = json.loads((source / "manifest.json").read_text())
    manifest["files"][path] = {"bytes": 1, "sha256": "0" * 64}
    (source / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DatasetError, match="no dataset's file"):
        copy_dataset(Storage(str(source)), Storage(str(tmp_path / "copy")))


@pytest.mark.parametrize("below", ["", "/inside/it"])
def test_a_file_is_no_destination(tmp_path, below):
    (tmp_path / "file").touch()
    (tmp_path / "new").mkdir()
    check_roots(Storage(str(tmp_path / "source")), Storage(str(tmp_path / "new/inside/it")))
    with pytest.raises(UsageError, match="file is no folder; give a folder for the dataset"):
        check_roots(Storage(str(tmp_path / "source")), Storage(f"{tmp_path}/file{below}"))


def test_mistakes_are_one_sentence(noise, tmp_path):
    (tmp_path / "file").touch()
    for words, code, text in (
        (("push", noise, noise), 2, "overlap"),
        (("push", noise, noise / "inside"), 2, "overlap"),
        (("push", tmp_path / "nowhere", tmp_path / "x"), 1, "does not exist"),
        (("push", noise, tmp_path / "x", "--split", "typo"), 2, "no split 'typo'"),
        (("pull", "ftp://x/y", tmp_path / "x"), 2, "must be a directory, s3://"),
        (
            ("push", tmp_path / "file", tmp_path / "x"),
            1,
            "file is a file; give the folder of a dataset",
        ),
    ):
        done = run_kprep(*words, check=False)
        assert (done.returncode, text in done.stderr, done.stderr.count("\n")) == (code, True, 1), (
            done.stderr
        )
    assert not (tmp_path / "x").exists()


def test_a_dry_run_writes_nothing(dataset, noise, s3, tmp_path):
    text = run_kprep("push", dataset, tmp_path / "copy", "--dry-run").stdout
    assert "nothing was written" in text
    assert f"to copy          {len(files_of(dataset)) - 1} files" in text
    assert not (tmp_path / "copy").exists()
    text = run_kprep("push", noise, "s3://kprep/copy/dry", "--dry-run", **s3.environment).stdout
    assert "62.9 MB" in text
    assert objects_of(s3, "copy/dry") == {}


# -- kills ---------------------------------------------------------------------------------------


DIES_WITH_BYTES = """
import os, signal, sys
from prep.byte_progress import ByteProgress
mark, moved = int(sys.argv.pop(1)), 0
def counting(real):
    def call(self, count):
        global moved
        real(self, count)
        moved += count
        if moved >= mark:
            os.kill(os.getpid(), signal.SIGKILL)
    return call
for name in ("add", "skip"):
    setattr(ByteProgress, name, counting(getattr(ByteProgress, name)))
from prep.cli import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["push", "pull"])
def test_killed_at_any_moment_a_repeat_completes(s3, tmp_path, way):
    source = noise_dataset(tmp_path / "source", shards=6, shard_bytes=24 << 20, seed=3)
    env = {**os.environ, **s3.environment, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    if way == "pull":
        s3.upload(source, "copy/kill-source")
    whole = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    for number in range(4):
        here, there = tmp_path / f"copy{number}", f"copy/kill{number}"
        ends = (
            (source, f"s3://kprep/{there}")
            if way == "push"
            else ("s3://kprep/copy/kill-source", here)
        )
        words = [way, *map(str, ends), "--jobs", "2"]
        random_moments = random.Random(f"{way} {number}")
        for moment in sorted(random_moments.uniform(0, 0.7) * whole for _ in range(3)):
            died = subprocess.run(
                [sys.executable, "-P", "-c", DIES_WITH_BYTES, str(int(moment)), *words],
                env=env, capture_output=True, timeout=600, check=False,
            )  # fmt: skip
            assert died.returncode == -signal.SIGKILL, died.stderr
        done = subprocess.run([sys.executable, "-P", "-m", "prep", *words], env=env,
                              capture_output=True, timeout=600, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
        found = objects_of(s3, there) if way == "push" else files_of(here)
        assert found == files_of(source)


DIES_AT = """
import os, signal, sys
from prep.storage import Storage
moment, before = sys.argv.pop(1), sys.argv.pop(1) == "before"
def dying(real):
    def call(self, path, *arguments):
        if path == moment and before:
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, path, *arguments)
        if path == moment:
            os.kill(os.getpid(), signal.SIGKILL)
    return call
for name in ("write", "write_parts", "delete"):
    setattr(Storage, name, dying(getattr(Storage, name)))
from prep.cli import main
main()
"""


class Killed(BaseException):
    """Ends a copy where a kill would: nothing of it handles this."""


class Mortal(Storage):
    """A local destination whose process dies when it begins its write number `last`."""

    last: int
    writes = 0

    def local_target(self, path):
        self.writes += 1
        if self.writes == self.last:
            raise Killed(path)
        return super().local_target(path)


def clips_at(root: Path) -> dict[str, dict[str, str]]:
    """What a reader of the manifest gets: each split's clips by key, every byte checked."""
    storage = Storage(str(root))
    manifest, found = read_manifest(storage), {}
    for split in manifest.splits:
        found[split] = {}
        for row in open_index(storage, manifest, split).to_pylist():
            start = row["video_offset"]
            data = storage.read_range(row["shard"], start, start + row["video_bytes"])
            assert hashlib.blake2b(data, digest_size=16).digest() == row["content_hash"]
            found[split][row["key"]] = hashlib.sha256(data).hexdigest()
    return found


@pytest.mark.parametrize("there", [[], ["val"], ["train", "val"]], ids=["new", "one split", "all"])
def test_killed_before_any_of_its_writes_a_reader_sees_the_old_clips_or_the_new(
    dataset, tmp_path, there
):
    source, before = tmp_path / "source", tmp_path / "before"
    shutil.copytree(dataset, source)
    if there:
        copy_dataset(Storage(str(source)), Storage(str(before)), splits=there)
    change_tools(source)
    (source / "README.md").write_text("another card")
    relist(source, "README.md")
    old, new = clips_at(before) if there else None, clips_at(source)
    for last in range(1, 100):
        root = tmp_path / f"copy{last}"
        shutil.copytree(before, root) if there else root.mkdir()
        destination = Mortal(str(root))
        destination.last = last
        try:
            copy_dataset(Storage(str(source)), destination, jobs=1)
        except Killed as killed:
            last_path = str(killed)
        else:
            break
        if there:
            assert clips_at(root) == old
            faults = verify(Storage(str(root))).faults
            assert {fault.path for fault in faults if fault.kind is not Kind.EXTRA} <= {
                path for path in files_of(source) if is_root_file(path)
            }
            assert not faults or faults[0].path == ".kprep-work/copy.json"
        else:
            begun = (root / ".kprep-work/copy.json").exists()
            assert begun or last <= 2  # the lock and the marker itself
            why = (
                "a copy into this root is not finished; repeat"
                if begun
                else "its conversion is not"
            )
            with pytest.raises(DatasetError, match=why):
                read_manifest(Storage(str(root)))
        copy_dataset(Storage(str(source)), Storage(str(root)))
        assert verify(Storage(str(root))).faults == []
        assert clips_at(root) == new
        shutil.rmtree(root)
    assert last_path == "manifest.json"
    assert last > {0: 20, 1: 10, 2: 2}[len(there)]


def relist(root: Path, path: str) -> None:
    """Let the manifest list a file as it is now."""
    data = (root / path).read_bytes()
    values = json.loads((root / "manifest.json").read_text())
    values["files"][path] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (root / "manifest.json").write_text(json.dumps(values))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "moment", [".kprep-work/copy.json", "train/train-000001.tar", "README.md", "manifest.json"]
)
def test_killed_around_every_kind_of_write_a_bucket_holds_all_or_nothing(
    s3, tmp_path, moment, when
):
    source = noise_dataset(tmp_path / "source", shard_bytes=9 << 20)
    prefix = f"copy/dies/{tmp_path.name}"
    env = {**os.environ, **s3.environment, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    words = ["push", str(source), f"s3://kprep/{prefix}"]
    died = subprocess.run([sys.executable, "-P", "-c", DIES_AT, moment, when, *words], env=env,
                          capture_output=True, timeout=120, check=False)  # fmt: skip
    assert died.returncode == -signal.SIGKILL, died.stderr
    there = objects_of(s3, prefix)
    if "manifest.json" in there:
        assert {**files_of(source), **there} == there
    run_kprep(*words, **s3.environment, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert objects_of(s3, prefix) == files_of(source)


@pytest.mark.slow
def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(tmp_path):
    source = noise_dataset(tmp_path / "source", shards=8, shard_bytes=16 << 20)
    words = [
        sys.executable,
        "-P",
        "-m",
        "prep",
        "push",
        str(source),
        str(tmp_path / "copy"),
        "--jobs",
        "1",
    ]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while not list((tmp_path / "copy").glob("train/*.tar")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130, errors
    assert b"run the same command again" in errors
    assert b"Traceback" not in errors
    run_kprep("push", source, tmp_path / "copy")
    assert files_of(tmp_path / "copy") == files_of(source)


# -- two at once ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("bucket", [False, True], ids=["into a folder", "into a bucket"])
def test_two_at_once_are_kept_apart(s3, tmp_path, bucket):
    source = noise_dataset(tmp_path / "source", shards=8, shard_bytes=16 << 20, seed=1)
    other = noise_dataset(tmp_path / "other", shards=2, shard_bytes=1 << 20, seed=2)
    url = f"s3://kprep/copy/two/{tmp_path.name}" if bucket else str(tmp_path / "copy")
    env = {**os.environ, **s3.environment, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    words = [sys.executable, "-P", "-m", "prep", "push", str(source), url, "--jobs", "1"]
    first = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    watch = Storage(url, s3.options) if bucket else Storage(url)
    while first.poll() is None:
        if (bucket or Path(url).is_dir()) and any(i.path.endswith(".tar") for i in watch.list()):
            break
    first.send_signal(signal.SIGSTOP)
    try:
        for cache in ("cache", "elsewhere"):  # this machine's user, and somebody else's
            done = run_kprep("push", other, url, check=False, **s3.environment,
                             XDG_CACHE_HOME=str(tmp_path / cache))  # fmt: skip
            assert (done.returncode, "another kprep is" in done.stderr) == (2, True), done.stderr
    finally:
        first.send_signal(signal.SIGCONT)
        first.wait(60)
    assert first.returncode == 0
    assert (
        objects_of(s3, url.removeprefix("s3://kprep/")) if bucket else files_of(Path(url))
    ) == files_of(source)


# -- faults --------------------------------------------------------------------------------------

QUICK = RetryPolicy(patience_seconds=120, first_wait_seconds=0.01, longest_wait_seconds=0.1)
IMPATIENT = {"timeout": "8s", "read_timeout": "1s"}


def through(s3, proxy, prefix):
    options = {**s3.options, "endpoint": proxy.endpoint, "client_options": IMPATIENT}
    return Storage(f"s3://kprep/{prefix}", options, QUICK)


def many(tmp_path):
    return noise_dataset(tmp_path / "source", shards=40, shard_bytes=300_000, seed=8)


def test_a_pull_through_resets_503s_stalls_and_truncation_is_whole(s3, tmp_path):
    source = many(tmp_path)
    s3.upload(source, "copy/faulty")
    rates = {"reset": 0.05, "status_503": 0.05, "stall": 0.02, "truncate_206": 0.05, "close": 0.05}
    with fault_proxy(s3.endpoint, by_rate(3, **rates)) as proxy:
        copy_dataset(through(s3, proxy, "copy/faulty"), Storage(str(tmp_path / "copy")), jobs=4)
        assert {"reset", "503", "truncate-206", "close"} <= set(proxy.faults)
    assert files_of(tmp_path / "copy") == files_of(source)


@pytest.mark.slow
def test_a_push_through_resets_503s_stalls_and_lost_answers_is_whole(s3, tmp_path):
    source = noise_dataset(tmp_path / "source", shards=24, shard_bytes=300_000, seed=8)
    large = noise_dataset(tmp_path / "large", shards=1, shard_bytes=9 << 20, seed=4)
    choose = uploads_by_rate(1, reset=0.06, status_503=0.06, lost_answer=0.06, stall=0.01)
    with fault_proxy(s3.endpoint, choose_upload=choose) as proxy:
        copy_dataset(Storage(str(source)), through(s3, proxy, "copy/faulty2"), jobs=4)
        copy_dataset(Storage(str(large)), through(s3, proxy, "copy/faulty3"), jobs=2)
        assert {"reset", "503", "lost-answer"} <= set(proxy.faults)
    assert objects_of(s3, "copy/faulty2") == files_of(source)
    assert objects_of(s3, "copy/faulty3") == files_of(large)


def test_a_server_that_only_refuses_is_one_error_and_no_dataset(s3, tmp_path):
    source = noise_dataset(tmp_path / "source", shards=3, shard_bytes=1000)
    policy = replace(QUICK, patience_seconds=0.5)

    def refuse(number, path):
        return "503" if path.endswith("000001.tar") else None

    with fault_proxy(s3.endpoint, choose_upload=refuse) as proxy:
        destination = through(s3, proxy, "copy/refused")
        destination.retry = policy
        with pytest.raises(StorageError, match=r"train-000001\.tar"):
            copy_dataset(Storage(str(source)), destination)
    assert "manifest.json" not in objects_of(s3, "copy/refused")
    copy_dataset(Storage(str(source)), Storage("s3://kprep/copy/refused", s3.options))
    assert objects_of(s3, "copy/refused") == files_of(source)


def test_a_bucket_that_does_not_exist_is_one_sentence(noise, s3, tmp_path):
    done = run_kprep("pull", "s3://nowhere/x", tmp_path / "copy", check=False, **s3.environment)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert not (tmp_path / "copy").exists()


@pytest.mark.slow
def test_memory_stays_flat(tmp_path):
    """A copy of 420 MB in two files needs far less than they have."""
    source = noise_dataset(tmp_path / "source", shards=2, shard_bytes=200 << 20)
    code = (
        "import sys\nfrom prep.copy_dataset import copy_dataset\nfrom prep.storage import Storage\n"
        "copy_dataset(Storage(sys.argv[1]), Storage(sys.argv[2]))\n"
        "print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')])\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code, str(source), str(tmp_path / "copy")],
                          capture_output=True, text=True, check=True, timeout=120)  # fmt: skip
    assert int(done.stdout.split()[-1]) < 300_000  # KiB; the files have 410,000


# -- the plan and the progress -------------------------------------------------------------------


def _manifest(splits: dict[str, int]) -> Manifest:
    files, made = {}, {}
    for name, count in splits.items():
        shards = tuple(Shard(f"{name}/{name}-{number:06d}.tar", 3) for number in range(count))
        for path in [*(shard.path for shard in shards), *(f"{shard.path}.idx" for shard in shards),
                     f"index/{name}.parquet", f"ledger/{name}.parquet", f"wids-{name}.json"]:  # fmt: skip
            files[path] = FileEntry(len(path), f"{abs(hash(path)):064x}"[:64])
        made[name] = Split(f"{len(name):064x}", 3 * count, 3 * count, {"ok": 3 * count}, shards)
    for path in ("README.md", "classes.txt", ".nv-meta/split.yaml", "LICENSE"):
        files[path] = FileEntry(1, "0" * 64)
    return Manifest(PROFILES["small"], ("a", "b"), made, files)


SPLITS = st.dictionaries(
    st.sampled_from(["train", "val", "test", "a", "bb"]), st.integers(0, 4), min_size=1
)


@given(SPLITS, st.data())
def test_a_plan_copies_each_file_once_and_lists_what_will_be_there(splits, data):
    source = _manifest(splits)
    wanted = data.draw(st.lists(st.sampled_from(sorted(splits)), unique=True))
    there = data.draw(st.lists(st.sampled_from(sorted(splits)), unique=True))
    existing = _manifest({name: splits[name] for name in there}) if there else None
    plan = plan_copy(source, wanted, existing, "there")
    chosen = set(wanted or splits)
    assert set(plan.manifest.splits) == chosen | set(there)
    assert set(plan.added) == chosen - set(there)
    assert len(set(plan.paths)) == len(plan.paths)
    assert all(path.endswith(".tar") for path in plan.shards)
    assert not any(path.endswith(".tar") or is_root_file(path) for path in plan.companions)
    assert plan.made_anew == (set(plan.manifest.splits) != set(splits))
    expected = _manifest({name: splits[name] for name in chosen | set(there)}).files
    if plan.made_anew:
        expected = {path: entry for path, entry in expected.items() if not is_root_file(path)}
        assert plan.root_files == ()
    assert plan.manifest.files == expected
    copied = _manifest({name: splits[name] for name in chosen}).files
    assert set(plan.paths) == {
        path for path in copied if not (plan.made_anew and is_root_file(path))
    }


def test_progress_shows_bandwidth_and_the_time_that_is_left(capsys):
    now = [100.0]
    progress = ByteProgress("copied", 10_000_000, clock=lambda: now[0])
    now[0] = 104.0
    progress.add(4_000_000)
    progress.skip(2_000_000)
    assert progress.line() == "copied 4.0 MB of 8.0 MB, 1.0 MB/s, 00:04 left"
    now[0] = 111.0
    progress.add(1)
    assert "copied 4.0 MB of 8.0 MB" in capsys.readouterr().err


def test_a_plan_of_an_unknown_split_names_those_there_are():
    with pytest.raises(KprepError, match=r"the source has no split .x.; it has train, val"):
        plan_copy(_manifest({"train": 1, "val": 1}), ["x"], None, "there")


def test_a_copy_writes_the_very_manifest_that_it_has_checked(dataset, tmp_path, monkeypatch):
    """A newer one can stand there a moment later."""
    reads = []

    def read(storage, path, *rest):
        reads.append((storage.root, path))
        return whole(storage, path, *rest)

    whole = Storage.read
    monkeypatch.setattr(Storage, "read", read)
    copy_dataset(Storage(str(dataset)), Storage(str(tmp_path / "copy")))
    assert reads.count((str(dataset), "manifest.json")) == 1
    copied = (tmp_path / "copy/manifest.json").read_bytes()
    assert copied == (dataset / "manifest.json").read_bytes()


def test_a_bucket_that_is_not_there_is_said_to_be_missing(s3, tmp_path):
    with pytest.raises(MissingBucketError, match="s3://nobody-has-this/.* bucket does not exist"):
        copy_dataset(Storage("s3://nobody-has-this/x", s3.options), Storage(str(tmp_path / "copy")))
