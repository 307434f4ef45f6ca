"""docs/format.md is enough to write a reader from, and says what the code does."""

import hashlib
import json
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import REPOSITORY
from stream_datasets import relist

from prep.errors import DatasetError
from prep.format import Manifest, Sidecar, index_schema, iter_records, read_index, read_manifest
from prep.ledger import SCHEMA
from prep.outcome import Reason, Status
from prep.profile import EncodingProfile
from prep.storage import Storage

PAGE = (REPOSITORY / "docs" / "format.md").read_text()


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    """The reader of the page, as a program."""
    path = tmp_path_factory.mktemp("reader") / "reader.py"
    path.write_text(re.search(r"```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)[1])
    return path


def read(reader: Path, root: Path) -> subprocess.CompletedProcess[str]:
    """Run it with the standard library alone: no site-packages, no environment, no folder of ours."""
    return subprocess.run(
        [sys.executable, "-I", "-S", reader, root], capture_output=True, text=True, timeout=120,
        check=False, cwd=reader.parent,
    )  # fmt: skip


def test_the_page_s_reader_reads_every_clip(reader, motion_dataset):
    done = read(reader, motion_dataset)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    storage = Storage(str(motion_dataset))
    manifest = read_manifest(storage)
    rows = [
        (split, row)
        for split in manifest.splits
        for row in iter_records(read_index(storage.read(f"index/{split}.parquet"), split))
    ]
    assert len(found) == len(rows) == 200
    for (split, key, label, sidecar, digest, gops), (wanted_split, row) in zip(
        found, rows, strict=True
    ):
        assert (split, key, label) == (wanted_split, row.key, manifest.class_names[row.label])
        video = storage.read_range(row.shard, row.video_offset, row.video_offset + row.video_bytes)
        assert digest == hashlib.sha256(video).hexdigest()
        assert tuple(gops) == row.gop_offsets
        assert Sidecar.from_bytes(json.dumps(sidecar).encode(), key).num_frames == row.num_frames


def change_manifest(root: Path, change) -> None:
    values = json.loads((root / "manifest.json").read_text())
    change(values)
    (root / "manifest.json").write_text(json.dumps(values))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def another_idx(root: Path) -> None:
    path = root / "val/val-000000.tar.idx"
    first, *rest = struct.unpack(f"<{path.stat().st_size // 8}Q", path.read_bytes())
    path.write_bytes(struct.pack(f"<{len(rest) + 1}Q", first + 512, *rest))
    relist(root, "val/val-000000.tar.idx")


def another_class(root: Path) -> None:
    change_manifest(root, lambda values: values["class_names"].reverse())
    names = json.loads((root / "manifest.json").read_text())["class_names"]
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    relist(root, "classes.txt")


DAMAGES = {
    "a flipped byte": lambda root: flip(root / "val/val-000000.tar", 5000),
    "a missing file": lambda root: (root / "ledger/val.parquet").unlink(),
    "another .tar.idx": another_idx,
    "other classes": another_class,
    "version 2": lambda root: change_manifest(root, lambda values: values.update(format_version=2)),
    "another fingerprint": lambda root: change_manifest(
        root, lambda values: values["splits"]["val"].update(fingerprint="0" * 64)
    ),
    "a path that leaves the root": lambda root: change_manifest(
        root, lambda values: values["files"].update({"../x": {"bytes": 0, "sha256": "0" * 64}})
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_page_s_reader_refuses_damage(reader, motion_dataset, tmp_path, damage):
    root = tmp_path / "root"
    shutil.copytree(motion_dataset, root)
    DAMAGES[damage](root)
    done = read(reader, root)
    assert done.returncode == 1
    assert "Error" in done.stderr


def test_unknown_fields_and_columns_are_ignored_by_both_readers(reader, motion_dataset, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(motion_dataset, root)

    def add(values):
        values["later"] = {"some": "thing"}
        values["splits"]["val"]["later"] = 1
        values["files"]["README.md"]["later"] = 1

    change_manifest(root, add)
    assert read(reader, root).returncode == 0
    assert set(read_manifest(Storage(str(root))).splits) == {"train", "val"}


def test_a_later_version_and_a_profile_with_other_fields_are_refused(motion_dataset):
    values = json.loads((motion_dataset / "manifest.json").read_text())
    for change in ({"format_version": 2}, {"profile": {**values["profile"], "later": 1}}):
        with pytest.raises(DatasetError):
            Manifest.from_bytes(json.dumps({**values, **change}).encode(), "manifest.json")


# -- the page names what the code has ------------------------------------------------------------


def table_of(heading: str, nth: int = 0) -> list[str]:
    """The names in the first column of the nth table below a heading."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)[1]
    tables = re.findall(r"^\|[^\n]*\n\|[-|]+\n((?:\|[^\n]*\n)+)", section, re.MULTILINE)
    cells = [line.split("|")[1] for line in tables[nth].splitlines()]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def test_the_page_has_every_column_and_field(motion_dataset):
    manifest = json.loads((motion_dataset / "manifest.json").read_text())
    assert sorted(table_of("Manifest", 0)) == sorted(manifest)
    assert sorted(table_of("Manifest", 1)) == sorted(manifest["splits"]["val"])
    assert sorted(table_of("Manifest", 2)) == sorted(
        field.name for field in fields(EncodingProfile)
    )
    assert sorted(table_of("Sidecar")) == sorted(field.name for field in fields(Sidecar))
    assert sorted(table_of("Index")) == sorted(index_schema().names)
    assert sorted(table_of("Ledger")) == sorted(SCHEMA.names)


def test_the_page_has_every_status_and_reason():
    ledger = re.search(r"^## Ledger\n(.*?)^## ", PAGE, re.DOTALL | re.MULTILINE)[1]
    named = set(re.findall(r"`([^`]+)`", ledger))
    assert {str(word) for word in (*Reason, *Status)} <= named
    listed = ledger.partition("Reasons:")[2]
    assert re.findall(r"`([^`]+)`", listed) == [str(reason) for reason in Reason]


def test_the_page_s_companions_are_what_is_written(motion_dataset):
    wids = json.loads((motion_dataset / "wids-val.json").read_text())
    section = re.search(r"^## Companions\n(.*?)^## ", PAGE, re.DOTALL | re.MULTILINE)[1]
    for name in (*wids, *wids["shardlist"][0]):
        assert f'"{name}"' in section
    info = json.loads((motion_dataset / ".nv-meta/.info.json").read_text())
    for name in info:
        assert f'"{name}"' in section


def test_index_types_are_the_page_s():
    """Each row of the table against the schema."""
    section = re.search(r"^## Index\n(.*?)^## ", PAGE, re.DOTALL | re.MULTILINE)[1]
    words = {"string": "string", "int32": "int32", "int64": "int64", "double": "double", "bool": "bool",
             "uint32": "uint32", "16 bytes": "fixed_size_binary[16]"}  # fmt: skip
    for line in re.findall(r"^\| (`.*)$", section, re.MULTILINE):
        names, kind = (cell.strip() for cell in line.split(" | ")[:2])
        for name in re.findall(r"`([^`]+)`", names):
            field = index_schema().field(name)
            assert field.nullable == kind.endswith(", or null"), name
            plain = kind.removesuffix(", or null")
            if plain.startswith("dictionary of "):
                assert str(field.type.value_type) == plain.removeprefix("dictionary of "), name
            elif plain.startswith("list of "):
                assert str(field.type.value_type) == plain.removeprefix("list of "), name
            else:
                assert str(field.type) == words[plain], name
