"""Ranges of local files: files kept open, replaced ones, descriptors, reading ahead."""

import contextlib
import errno
import gc
import os
import pickle
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prep.errors import DatasetError, ReplacedError, StorageError
from prep.format import read_manifest
from prep.local_files import OpenFiles, local_version
from prep.open_index import open_index, open_ledger
from prep.storage import Storage
from stream.index import load_index

DATA = bytes(range(256)) * 40


def open_below(folder: Path) -> list[str]:
    """Return the files below a folder that this process has open, sorted."""
    targets = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of this folder itself
            targets.append(str(link.readlink()))
    return sorted(target for target in targets if target.startswith(f"{folder}/"))


def test_a_range_comes_with_size_and_version(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(DATA)
    version = local_version(path.stat())
    files = OpenFiles()
    assert files.read(str(path), 10, 300) == (DATA[10:300], len(DATA), version)
    assert files.read(str(path), len(DATA) - 5, len(DATA) + 5)[0] == DATA[-5:]
    assert files.read(str(path), 5, 5)[0] == b""


def test_short_reads_are_continued(tmp_path, monkeypatch):
    path, real = tmp_path / "a", os.pread
    path.write_bytes(DATA)
    monkeypatch.setattr(os, "pread", lambda file, size, at: real(file, min(size, 7), at))
    assert OpenFiles().read(str(path), 3, 100)[0] == DATA[3:100]


def test_a_file_is_opened_once_and_closed_with_its_holder(tmp_path, monkeypatch):
    path, opened, real = tmp_path / "a", [], os.open
    path.write_bytes(DATA)
    monkeypatch.setattr(os, "open", lambda *args: opened.append(args) or real(*args))
    files = OpenFiles()
    for start in range(50):
        files.read_ahead(str(path), start, start + 9)
        assert files.read(str(path), start, start + 9)[0] == DATA[start : start + 9]
    assert len(opened) == 1
    assert open_below(tmp_path) == [str(path)]
    del files
    gc.collect()
    assert open_below(tmp_path) == []


def test_what_was_not_used_for_longest_is_closed_first(tmp_path):
    paths = [str(tmp_path / name) for name in "abcd"]
    for path in paths:
        Path(path).write_bytes(path.encode())
    files = OpenFiles(most=2)
    for path in (paths[0], paths[1], paths[0], paths[2]):
        assert files.read(path, 0, 1000)[0] == path.encode()
    assert open_below(tmp_path) == [paths[0], paths[2]]
    assert [files.read(path, 0, 1000)[0] for path in paths] == [path.encode() for path in paths]


def test_a_replaced_file_is_read_anew(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"one")
    files = OpenFiles()
    first = files.read(str(path), 0, 3)
    (tmp_path / "b").write_bytes(b"two!")
    (tmp_path / "b").replace(path)
    assert files.read(str(path), 0, 4) == (b"two!", 4, local_version(path.stat()))
    assert files.read(str(path), 0, 4)[2] != first[2]
    assert open_below(tmp_path) == [str(path)]  # the one that is gone is closed
    path.write_bytes(b"3")  # in place
    assert files.read(str(path), 0, 4) == (b"3", 1, local_version(path.stat()))


def test_a_file_replaced_through_another_machine_is_opened_anew(tmp_path, monkeypatch):
    path, real, stale = tmp_path / "a", os.pread, []
    path.write_bytes(DATA)
    files = OpenFiles()
    files.read(str(path), 0, 3)

    def pread(file, size, at):
        if not stale:  # what a shared file system says of a file that is gone on its server
            stale.append(file)
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(file, size, at)

    monkeypatch.setattr(os, "pread", pread)
    assert files.read(str(path), 5, 9)[0] == DATA[5:9]
    assert open_below(tmp_path) == [str(path)]

    def always(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "pread", always)
    with pytest.raises(OSError, match="Stale"):
        files.read(str(path), 5, 9)


def test_a_file_that_is_gone_is_not_read_from_its_descriptor(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"one")
    files = OpenFiles()
    files.read(str(path), 0, 3)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        files.read(str(path), 0, 3)


@pytest.mark.parametrize("kind", ["pipe", "folder", "nothing"])
def test_what_is_no_file_is_not_read_and_not_waited_for(tmp_path, kind):
    path = tmp_path / "a"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    files = OpenFiles()
    files.read_ahead(str(path), 0, 10)
    with pytest.raises(FileNotFoundError):
        files.read(str(path), 0, 10)
    assert open_below(tmp_path) == []


def test_threads_never_get_bytes_of_another_file(tmp_path):
    # with one file kept open, its descriptor's number is another file's a moment later
    paths = [str(tmp_path / f"{number}") for number in range(8)]
    for number, path in enumerate(paths):
        Path(path).write_bytes(bytes([number]) * 5000)
    files = OpenFiles(most=1)

    def read(turn: int) -> bool:
        number = turn * 5 % 8
        return files.read(paths[number], turn % 100, 4000)[0] == bytes([number]) * (
            4000 - turn % 100
        )

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read, range(4000)))


def test_the_last_descriptors_are_given_back(tmp_path, monkeypatch):
    paths, real = [tmp_path / name for name in "abc"], os.open
    for path in paths:
        path.write_bytes(DATA)

    def scarce(*args):
        if len(open_below(tmp_path)) == 2:
            raise OSError(errno.EMFILE, "Too many open files")
        return real(*args)

    monkeypatch.setattr(os, "open", scarce)
    files = OpenFiles()
    assert [files.read(str(path), 1, 5)[0] for path in paths] == [DATA[1:5]] * 3
    assert open_below(tmp_path) == [str(paths[2])]

    def refused(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(OSError, match="Too many open files"):
        files.read(str(paths[0]), 0, 1)
    with pytest.raises(OSError, match="Too many open files"):  # with nothing left to close
        files.read(str(paths[0]), 0, 1)


def test_a_range_is_read_ahead_before_it_is_waited_for(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(DATA)
    asked = []

    def advise(file, *rest):
        asked.append((str(Path(f"/proc/self/fd/{file}").readlink()), *rest))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    storage = Storage(str(tmp_path))
    body = storage.begin_range("a", 100, 300)
    assert asked == [(str(tmp_path / "a"), 100, 200, os.POSIX_FADV_WILLNEED)]
    assert body() == DATA[100:300]
    assert body() is body()
    assert len(asked) == 1


def test_what_cannot_be_read_ahead_is_said_when_it_is_waited_for(tmp_path, monkeypatch):
    storage = Storage(str(tmp_path))
    body = storage.begin_range("a", 0, 3)
    with pytest.raises(StorageError, match="a does not exist"):
        body()
    (tmp_path / "a").write_bytes(DATA)
    monkeypatch.delattr(os, "posix_fadvise")  # macOS
    assert storage.begin_range("a", 0, 3)() == DATA[:3]


def test_a_version_is_asked_for_by_every_read(tmp_path):
    (tmp_path / "a").write_bytes(DATA)
    storage = Storage(str(tmp_path))
    etag = storage.info("a").etag
    body = storage.begin_range("a", 0, 3, etag=etag)
    assert storage.begin_range("a", 0, 3, etag=etag)() == DATA[:3]
    (tmp_path / "b").write_bytes(DATA)
    (tmp_path / "b").replace(tmp_path / "a")
    with pytest.raises(ReplacedError, match="was replaced"):
        body()


def test_a_storage_that_has_files_open_can_be_sent_to_a_worker(tmp_path):
    (tmp_path / "a").write_bytes(DATA)
    storage = Storage(str(tmp_path))
    assert storage.read_range("a", 0, 3) == DATA[:3]
    sent = pickle.loads(pickle.dumps(storage))  # noqa: S301 - our own
    assert sent.read_range("a", 2, 5) == DATA[2:5]
    assert len(open_below(tmp_path)) == 2


def test_a_file_of_gigabytes_where_the_manifest_lists_less_is_not_read(
    motion_dataset, tmp_path, monkeypatch
):
    """A sparse one takes no room on disk, but all of its length in memory."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where no test has kept the index
    root = shutil.copytree(motion_dataset, tmp_path / "root")
    storage = Storage(str(root))
    manifest = read_manifest(storage)
    listed = manifest.files["index/train.parquet"].bytes
    for path in ("index/train.parquet", "ledger/train.parquet"):
        os.truncate(root / path, 1 << 40)
    for load in (open_index, load_index):
        with pytest.raises(DatasetError, match=f"has {1 << 40} bytes, where {listed} are the most"):
            load(storage, manifest, "train")
    with pytest.raises(DatasetError, match="has"):
        open_ledger(storage, manifest, "train")
    os.truncate(root / "manifest.json", 1 << 40)
    with pytest.raises(DatasetError, match=f"manifest.json has {1 << 40} bytes"):
        read_manifest(storage)
