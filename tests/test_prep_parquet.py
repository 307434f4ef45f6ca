"""Indices and ledgers that were made to exhaust memory are refused before they can."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import run_kprep
from copy_datasets import convert, draw, plain
from report_datasets import large_index

from prep import parquet
from prep.errors import DatasetError
from prep.format import index_schema, read_index, read_manifest, write_index
from prep.ledger import SCHEMA, read_ledger
from prep.open_index import open_index, open_ledger
from prep.parquet import ALWAYS_BYTES, MOST_EXPANSION
from prep.publish import file_entry
from prep.storage import Storage
from stream.index import load_index

GROUP_ROWS = 1 << 20
LONG_BYTES = 1 << 20


def equal_rows() -> bytes:
    """64 million rows in some kilobytes: one number, as often as there are rows."""
    return packed(pa.table({"row": np.full(GROUP_ROWS, 7, np.int64)}), groups=64)


def equal_list_values() -> bytes:
    """64 rows, each of a million equal offsets."""
    offsets = pa.array([np.full(GROUP_ROWS, 7, np.int64)])
    return packed(pa.table({"gop_offsets": offsets}), groups=64)


def equal_texts() -> bytes:
    """A thousand rows that share one text of a megabyte; its column does not say so."""
    codes = pa.array(np.zeros(1000, np.int32))
    texts = pa.DictionaryArray.from_arrays(codes, pa.array(["x" * LONG_BYTES]))
    return packed(pa.table({"key": texts}), groups=1)


def equal_hashes() -> bytes:
    """A thousand rows that share one "hash" of a megabyte."""
    hashes = pa.array([b"x" * LONG_BYTES] * 10, pa.binary(LONG_BYTES))
    return packed(pa.table({"content_hash": hashes}), groups=100)


def packed(table: pa.Table, *, groups: int) -> bytes:
    """Write a table again and again as a row group of one file."""
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink, table.schema, compression="zstd", use_dictionary=True, store_schema=False,
        dictionary_pagesize_limit=4 * LONG_BYTES, write_statistics=False,
    ) as writer:  # fmt: skip
        for _ in range(groups):
            writer.write_table(table)
    return sink.getvalue()


READ = """
import sys
from pathlib import Path
import pyarrow as pa
from prep.errors import DatasetError
from prep.format import read_index
from prep.ledger import read_ledger
read = {"index": read_index, "ledger": read_ledger}[sys.argv[2]]
try:
    read(Path(sys.argv[1]).read_bytes(), "val.parquet")
except DatasetError as error:
    print(pa.default_memory_pool().max_memory(), error)
"""


@pytest.mark.parametrize(
    ("bomb", "kind", "would_take"),
    [
        (equal_rows, "ledger", 64 * GROUP_ROWS * 8),
        (equal_list_values, "index", 64 * GROUP_ROWS * 8),
        (equal_texts, "index", 1000 * LONG_BYTES),
        (equal_texts, "ledger", 1000 * LONG_BYTES),
        (equal_hashes, "index", 1000 * LONG_BYTES),
    ],
)
def test_a_file_that_unpacks_to_much_more_is_refused_before_it_is(tmp_path, bomb, kind, would_take):
    data = bomb()
    (tmp_path / "bomb").write_bytes(data)
    assert len(data) < 200_000
    assert would_take > ALWAYS_BYTES
    reader = subprocess.run(
        [sys.executable, "-c", READ, tmp_path / "bomb", kind],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    peak, _, said = reader.stdout.partition(" ")
    assert int(peak) < 32 * LONG_BYTES
    assert said.startswith("val.parquet would take ")
    assert "it was made to exhaust memory" in said


def padded_varint(number: int, length: int) -> bytes:
    """Return a number of Parquet's footer in so many bytes; longer than need be is allowed."""
    zigzag = 2 * number
    low = bytes(zigzag >> 7 * place & 127 | 128 for place in range(length - 1))
    return low + bytes([zigzag >> 7 * (length - 1)])


def test_a_footer_that_lies_lets_one_column_chunk_too_many_be_read(monkeypatch):
    """Each group is small enough, and all of them are too much, of which the footer says nothing."""
    groups, text_bytes, limit = 64, 1 << 16, 1 << 20
    data = packed(pa.table({"key": ["x" * text_bytes]}), groups=groups)
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    size = pq.read_metadata(io.BytesIO(data)).row_group(0).column(0).total_uncompressed_size
    assert size > text_bytes
    true, false = padded_varint(size, 3), padded_varint(0, 3)
    assert data.count(true, start) >= groups
    data = data[:start] + data[start:].replace(true, false)
    footer = pq.read_metadata(io.BytesIO(data))
    assert {footer.row_group(n).column(0).total_uncompressed_size for n in range(groups)} == {0}
    assert len(data) * MOST_EXPANSION < limit * 2
    read = []
    real = parquet._read_column
    monkeypatch.setattr(parquet, "ALWAYS_BYTES", limit)
    monkeypatch.setattr(parquet, "_read_column", lambda *call: read.append(call) or real(*call))
    with pytest.raises(DatasetError, match="it was made to exhaust memory"):
        read_index(data, "index")
    most = max(limit, len(data) * MOST_EXPANSION)
    assert len(read) <= most // text_bytes + 1 < groups


def test_a_column_that_stands_twice_or_holds_something_else_is_refused():
    table = large_index(3, 1, 3)
    lists = pa.array([["a"]] * 3)
    for other, why in (
        (table.append_column("key", table["key"]), "lacks the columns key"),
        (table.set_column(table.column_names.index("gop_offsets"), "gop_offsets", lists),
         "has a column of another type"),
    ):  # fmt: skip
        with pytest.raises(DatasetError, match=why):
            read_index(packed(other, groups=2), "index")


def test_texts_and_dictionaries_come_back_as_they_were():
    """Texts are read as dictionaries and written out again: nothing of that is seen."""
    table = large_index(9000, 40, 2000)
    data = write_index([table.slice(first, 2000) for first in range(0, 9000, 2000)])
    found = read_index(data, "index")
    assert found.schema == index_schema()
    assert found.equals(table)
    nulls = {"key": ["a", None], "status": ["ok", "failed"], "detail": ["", "d"], "row": [0, 1]}
    ledger = pa.table({name: nulls.get(name, [None, None]) for name in SCHEMA.names}).cast(SCHEMA)
    sink = io.BytesIO()
    pq.write_table(ledger, sink)
    assert read_ledger(sink.getvalue(), "ledger").equals(ledger)
    without = ledger.slice(0, 0)
    sink = io.BytesIO()
    pq.write_table(without, sink)
    assert read_ledger(sink.getvalue(), "ledger").equals(without)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parquet")
    return convert(draw(folder / "videos", {"up": 3}, seed=1), folder / "root", "train")


def with_file(root: Path, path: str, data: bytes, **counts: int) -> None:
    """Put a file into a dataset whose manifest agrees with it."""
    values = json.loads((root / "manifest.json").read_text())
    entry = file_entry(data)
    values["files"][path] = {"bytes": entry.bytes, "sha256": entry.sha256}
    values["splits"]["train"] |= counts
    (root / path).write_bytes(data)
    (root / "manifest.json").write_text(json.dumps(values))


@pytest.mark.parametrize("path", ["index/train.parquet", "ledger/train.parquet"])
def test_every_command_says_so_in_one_sentence(dataset, tmp_path, path):
    root = Path(shutil.copytree(dataset, tmp_path / "root"))
    if "ledger" in path:
        with_file(root, path, equal_rows(), num_rows=64 * GROUP_ROWS)
    else:
        with_file(root, path, equal_list_values(), num_clips=64)
    commands = [
        ("info", root), ("report", root, tmp_path / "page.html"), ("subset", root, tmp_path / "new"),
        ("verify", root),
    ]  # fmt: skip
    if "index" in path:
        commands += [("plan", root, "--nodes", 1, "--gpus", 1, "--workers", 1, "--batch", 1)]
    for command in commands:
        done = run_kprep(*command, check=False)
        said = plain(done.stdout + done.stderr)
        assert done.returncode == 1, said
        assert "would take" in said, said
        assert "Traceback" not in said


def test_rows_that_the_manifest_does_not_count_are_refused(dataset, tmp_path):
    root = Path(shutil.copytree(dataset, tmp_path / "root"))
    path = root / "manifest.json"
    values = json.loads(path.read_text())
    values["splits"]["train"] |= {"num_clips": 2, "num_rows": 4}
    path.write_text(json.dumps(values))
    storage = Storage(str(root))
    manifest = read_manifest(storage)
    for read in (open_index, load_index):
        with pytest.raises(DatasetError, match="has 3 rows, the manifest says 2"):
            read(storage, manifest, "train")
    with pytest.raises(DatasetError, match="has 3 rows, the manifest says 4"):
        open_ledger(storage, manifest, "train")


def test_an_index_that_was_mapped_for_one_manifest_is_checked_again_for_another(dataset, tmp_path):
    """The mapped file is shared by all datasets of a machine that have that index."""
    load_index(Storage(str(dataset)), read_manifest(Storage(str(dataset))), "train")
    root = Path(shutil.copytree(dataset, tmp_path / "root"))
    path = root / "manifest.json"
    values = json.loads(path.read_text())
    values["class_names"] = []
    path.write_text(json.dumps(values))
    storage = Storage(str(root))
    with pytest.raises(DatasetError, match="has label 0, but the manifest knows only 0 classes"):
        load_index(storage, read_manifest(storage), "train")


def test_what_needs_pandas_finds_it_although_writing_did_without():
    pytest.importorskip("pandas")
    code = (
        "import sys, pyarrow as pa\nfrom prep.parquet import forgo_pandas\n"
        "forgo_pandas()\npa.array(['a'])\nassert 'pandas' not in sys.modules\n"
        "frame = pa.table({'a': [7]}).to_pandas()\nprint(frame['a'][0], len(pa.Table.from_pandas(frame)))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["7", "1"]


@pytest.mark.parametrize(
    "error", [OSError("ZSTD_DCtx create failed"), pa.ArrowMemoryError("malloc of size 64 failed")]
)
def test_want_of_memory_is_not_damage(monkeypatch, error):
    def starved(*_, **__):
        raise error

    monkeypatch.setattr(parquet.pq, "ParquetFile", starved)
    for read in (read_index, read_ledger):
        with pytest.raises(MemoryError, match="x.parquet"):
            read(b"", "x.parquet")
