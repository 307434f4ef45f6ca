"""`kprep verify` names every fault; one dataset, one fault at a time."""

import contextlib
import json
import os
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import run_kprep
from terminal import run_in_terminal, screen

from prep.demo_videos import random_motion, write_video
from prep.errors import DatasetError, StorageError
from prep.storage import Storage
from prep.verify import verify


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    rng = np.random.default_rng(2)
    for number in range(6):
        target = folder / "videos" / ("left", "up")[number % 2] / f"{number}.mp4"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_video(target, random_motion("left", rng), "libx264")
    run_kprep(
        "shard",
        folder / "videos",
        folder / "root",
        "--split",
        "val",
        "--profile",
        "small",
        "--clips-per-shard",
        3,
    )
    return folder / "root"


@pytest.fixture
def root(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "root"))


def faults(root: Path) -> list[str]:
    return [str(fault) for fault in verify(Storage(str(root))).faults]


def test_a_whole_dataset_has_no_fault(root):
    verdict = verify(Storage(str(root)))
    assert (verdict.faults, verdict.num_clips) == ([], 6)
    files = [path for path in root.rglob("*") if path.is_file()]
    assert verdict.num_files == len(files) - 1  # the manifest is what they are compared with


SHARD = "val/val-000001.tar"


@pytest.mark.parametrize(
    "path", [SHARD, f"{SHARD}.idx", "index/val.parquet", "ledger/val.parquet", "wids-val.json", "classes.txt",
             ".nv-meta/split.yaml", ".nv-meta/.info.json", ".nv-meta/dataset.yaml", "README.md"])  # fmt: skip
def test_files_missing_altered_and_truncated_are_named(root, path):
    data = (root / path).read_bytes()
    for damage in (None, data[:-1], data[:-1] + bytes([data[-1] ^ 1]), data + b"x"):
        if damage is None:
            (root / path).unlink()
        else:
            (root / path).write_bytes(damage)
        found = faults(root)
        assert len([fault for fault in found if fault.startswith(path)]) == 1, (damage, found)


def test_an_extra_file_is_named(root):
    (root / "val" / "val-000099.tar").write_bytes(b"x")
    assert faults(root) == ["val/val-000099.tar: not listed in the manifest"]


def test_what_no_store_lists_is_named_and_not_opened(root):
    os.mkfifo(root / "val/pipe.tar")  # to open it would wait for a writer
    (root / "val/device.tar").symlink_to("/dev/null")
    (root / "val/nothing.tar").symlink_to("nowhere")
    (root / "val/late.tar#1").write_bytes(b"x")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as server, contextlib.chdir(root):
        server.bind("socket")  # a socket's path may have 108 characters
    assert faults(root) == [
        "socket: not listed in the manifest (it is a socket)",
        "val/device.tar: not listed in the manifest (it is a device)",
        "val/late.tar#1: not listed in the manifest (it is a file that no store lists)",
        "val/nothing.tar: not listed in the manifest (it is a link to nothing)",
        "val/pipe.tar: not listed in the manifest (it is a named pipe)",
    ]
    assert [info.path for info in Storage(str(root)).list("val") if "pipe" in info.path] == []


@pytest.mark.parametrize("path", [SHARD, "index/val.parquet", "README.md"])
def test_a_named_pipe_in_the_place_of_a_file_is_named(root, path):
    (root / path).unlink()
    os.mkfifo(root / path)
    assert f"{path}: missing: its path is a named pipe, not a file" in faults(root)
    with pytest.raises(StorageError, match="is a named pipe, not a file"):
        Storage(str(root)).read(path)
    with pytest.raises(StorageError, match="is a named pipe, not a file"):
        Storage(str(root)).read_range(path, 0, 1)


def test_a_flipped_bit_anywhere_in_a_shard_is_named(root):
    data = bytearray((root / SHARD).read_bytes())
    for position in range(0, len(data), len(data) // 40):
        data[position] ^= 4
        (root / SHARD).write_bytes(data)
        assert [fault.split(":")[0] for fault in faults(root)] == [SHARD], position
        data[position] ^= 4


def relist(root: Path, path: str) -> None:
    """Make the manifest agree with a forged file, so that only the contents can give it away."""
    import hashlib

    manifest = json.loads((root / "manifest.json").read_text())
    data = (root / path).read_bytes()
    manifest["files"][path] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (root / "manifest.json").write_text(json.dumps(manifest))


def forge_index(root: Path, column: str, change) -> None:
    path = root / "index/val.parquet"
    table = pq.read_table(path)
    values = table[column].to_pylist()
    values[1] = change(values[1], values)
    at = table.column_names.index(column)
    import pyarrow as pa

    table = table.set_column(
        at, table.schema.field(at), pa.array(values, type=table.schema.field(at).type)
    )
    pq.write_table(table, path)
    relist(root, "index/val.parquet")


@pytest.mark.parametrize(
    ("column", "change"),
    [
        ("key", lambda _, values: values[0]),
        ("label", lambda value, _: 1 - value),
        ("label", lambda _, __: 7),
        ("num_frames", lambda value, _: value + 1),
        ("width", lambda value, _: value + 2),
        ("entry_offset", lambda value, _: value + 512),
        ("entry_bytes", lambda value, _: value + 512),
        ("video_offset", lambda value, _: value + 1),
        ("video_bytes", lambda value, _: value - 1),
        ("content_hash", lambda _, __: bytes(16)),
        ("crc32", lambda value, _: value ^ 1),
        ("start_seconds", lambda value, _: value + 1),
        ("video_id", lambda _, __: "other"),
        ("gop_crc32", lambda value, _: [value[0] ^ 1, *value[1:]]),
        ("gop_offsets", lambda value, _: [value[0] + 1, *value[1:]]),
        ("shard", lambda _, __: SHARD),
    ],
)
def test_an_index_row_that_disagrees_with_the_tar_is_named(root, column, change):
    forge_index(root, column, change)
    if faults(root) == []:
        raise AssertionError(f"a forged {column} passed")


@pytest.mark.parametrize(
    "path", ["wids-val.json", ".nv-meta/.info.json", f"{SHARD}.idx", "classes.txt"]
)
def test_a_companion_that_disagrees_is_named(root, path):
    data = (root / path).read_bytes()
    (root / path).write_bytes(data.replace(b"3", b"4", 1) if b"3" in data else b"\1" + data[1:])
    relist(root, path)
    assert any(fault.startswith(path) and "disagrees" in fault for fault in faults(root))


def test_a_ledger_that_does_not_add_up_is_named(root):
    table = pq.read_table(root / "ledger/val.parquet")
    pq.write_table(table.slice(1), root / "ledger/val.parquet")
    relist(root, "ledger/val.parquet")
    assert any("ledger/val.parquet: counts" in fault for fault in faults(root))


def test_a_tar_cut_at_a_member_boundary_is_named(root):
    """webdataset ends silently there; the manifest and the index do not."""
    import tarfile

    with tarfile.open(root / SHARD) as tar:
        members = tar.getmembers()
    data = (root / SHARD).read_bytes()
    (root / SHARD).write_bytes(data[: members[2].offset])
    relist(root, SHARD)
    assert any(fault.startswith(SHARD) for fault in faults(root))


def test_no_bar_is_left_in_a_terminal_where_nothing_was_counted(root):
    command = [sys.executable, "-P", "-m", "prep", "verify", str(root)]
    lines = list(filter(None, screen(run_in_terminal(command, 300), 300)))
    assert len(lines) == 1, lines
    assert " is whole" in lines[0]


def test_the_command_names_files_and_exits_1(root):
    (root / SHARD).write_bytes(b"short")
    done = run_kprep("verify", root, check=False)
    assert done.returncode == 1
    assert SHARD in done.stdout
    assert "1 fault in" in done.stderr


def test_no_dataset_is_one_sentence(tmp_path):
    done = run_kprep("verify", tmp_path / "nowhere", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    with pytest.raises(DatasetError):
        verify(Storage(str(tmp_path)))


def test_info_shows_the_sums(root):
    text = run_kprep("info", root).stdout
    for part in (
        "small",
        "classes   2: left, up",
        "6 clips",
        "2 shards",
        "6: 6 ok",
        "3 to 3",
    ):
        assert part in text
