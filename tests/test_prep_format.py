import dataclasses
import io
import json
import re
from fractions import Fraction

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from prep.companions import energon_files
from prep.dataset_card import RowTally, dataset_card
from prep.errors import DatasetError, StorageError, UsageError
from prep.format import (
    ClipRecord,
    FileEntry,
    Manifest,
    Shard,
    Sidecar,
    Split,
    check_new_split_name,
    check_split_name,
    index_table,
    iter_records,
    read_index,
    read_manifest,
    split_fingerprint,
    write_index,
)
from prep.format.layout import is_reserved, yaml_name
from prep.ledger import SCHEMA, read_ledger
from prep.profile import PROFILES
from prep.storage import Storage, check_relative_path

RECORD = ClipRecord(
    key="a", shard="val/val-000000.tar", label=3, num_frames=20, fps_num=15, fps_den=1, width=170,
    height=128, entry_offset=0, entry_bytes=4096, video_offset=1536, video_bytes=2000,
    content_hash=bytes(range(16)), crc32=2**32 - 1, video_id="a", start_seconds=0.5, end_seconds=2.0,
    source="folder", short=False, codec_config=b"\x01avcC", gop_frames=16,
    gop_offsets=(40, 1000, 2000), gop_crc32=(7, 2**32 - 1),
)  # fmt: skip
FOREIGN = dataclasses.replace(
    RECORD, key="b", label=-1, entry_offset=4096, codec_config=None, gop_frames=None, gop_offsets=None,
    gop_crc32=None, content_hash=bytes(16),
)  # fmt: skip


def test_index_round_trip_and_row_groups():
    data = write_index([index_table([RECORD]), index_table([FOREIGN])])
    assert list(iter_records(read_index(data, "index"))) == [RECORD, FOREIGN]
    assert pq.ParquetFile(io.BytesIO(data)).num_row_groups == 2


@pytest.mark.parametrize(
    "change",
    [
        {"label": -2}, {"num_frames": 0}, {"video_offset": -1}, {"width": 1 << 25},
        {"entry_bytes": 1 << 62}, {"entry_offset": 1 << 62}, {"video_bytes": 1 << 62},
    ],
)  # fmt: skip
def test_index_rows_that_no_writer_makes_are_refused(change):
    data = write_index([index_table([dataclasses.replace(RECORD, **change)])])
    with pytest.raises(DatasetError, match=next(iter(change))):
        read_index(data, "index")


def test_a_clip_of_too_many_pixels_is_refused():
    large = dataclasses.replace(RECORD, width=8193, height=4320)
    with pytest.raises(DatasetError, match="a clip of 35,393,760 pixels, where at most 35,389,440"):
        read_index(write_index([index_table([large])]), "index")


def no_text(length: int) -> pa.Array:
    """Texts that are no UTF-8, which Arrow takes as they are."""
    data = pa.array([b"\xff%d" % number for number in range(length)], pa.binary())
    return pa.Array.from_buffers(pa.string(), length, data.buffers())


@pytest.mark.parametrize("name", ["key", "shard", "video_id", "source"])
def test_an_index_whose_text_is_none_is_refused(name):
    table = index_table([RECORD, FOREIGN])
    at, strange = table.schema.get_field_index(name), no_text(2)
    if pa.types.is_dictionary(table.schema.field(at).type):
        strange = pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int32()), strange)
    sink = io.BytesIO()
    pq.write_table(table.set_column(at, name, strange), sink)
    with pytest.raises(DatasetError, match=r"^val\.parquet .*UTF8"):
        read_index(sink.getvalue(), "val.parquet")


@pytest.mark.parametrize("name", ["key", "status", "reason", "detail"])
def test_a_ledger_whose_text_is_none_is_refused(name):
    values = {"row": [1], "status": ["ok"], "detail": [""]}
    table = pa.table({**{name: [None] for name in SCHEMA.names}, **values}, schema=SCHEMA)
    at, sink = SCHEMA.get_field_index(name), io.BytesIO()
    pq.write_table(table.set_column(at, name, no_text(1)), sink)
    with pytest.raises(DatasetError, match=r"^val\.parquet is not a ledger: .*UTF8"):
        read_ledger(sink.getvalue(), "val.parquet")


def test_index_that_is_no_parquet():
    with pytest.raises(DatasetError, match="val.parquet is not a Parquet file"):
        read_index(b"not parquet", "val.parquet")


def test_index_without_a_column():
    sink = io.BytesIO()
    pq.write_table(index_table([RECORD]).drop(["crc32"]), sink)
    with pytest.raises(DatasetError, match="lacks the columns crc32"):
        read_index(sink.getvalue(), "val.parquet")


def test_fingerprint_depends_on_four_fields_only():
    def of(**change):
        return split_fingerprint(index_table([dataclasses.replace(RECORD, **change), FOREIGN]))

    for change in ({"key": "c"}, {"num_frames": 21}, {"label": 4}, {"content_hash": bytes(16)}):
        assert of(**change) != of()
    assert of(source="cvdf", video_offset=5, crc32=1, shard="val/val-000001.tar") == of()


def manifest():
    split = Split(
        "0" * 64,
        1,
        2,
        {"ok": 1, "failed": 1},
        (Shard("val/val-000000.tar", 1),),
        {"seed": 0},
        {"kprep": "1"},
    )
    return Manifest(
        PROFILES["small"],
        ("a", "b"),
        {"val": split},
        {"val/val-000000.tar": FileEntry(5, "1" * 64)},
    )


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def add_shard(values, path):
    values["files"][path] = {"bytes": 1, "sha256": "0" * 64}
    values["splits"]["val"]["shards"].append({"path": path, "num_clips": 1})


def test_manifest_round_trip():
    assert Manifest.from_bytes(manifest().to_bytes(), "m") == manifest()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(format="other"),
        lambda m: m.update(format_version=2),
        lambda m: m.pop("files"),
        lambda m: m["files"].update({"../../etc/passwd": {"bytes": 1, "sha256": "0" * 64}}),
        lambda m: m["files"].update({"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}),
        lambda m: m["files"].update({"x": {"bytes": -1, "sha256": "0" * 64}}),
        lambda m: m["files"].update({"x": {"bytes": 10**400, "sha256": "0" * 64}}),
        lambda m: m["files"].update({"x": {"bytes": 1 << 63, "sha256": "0" * 64}}),
        lambda m: m["files"].update({"x": {"bytes": 1, "sha256": "zz"}}),
        lambda m: m["splits"]["val"]["outcomes"].update(ok=1 << 63),
        lambda m: m["splits"]["val"]["settings"].update(made_from=nested(700)),
        lambda m: m["splits"]["val"]["tools"].update(kprep={"a": nested(900)}),
        lambda m: m["class_names"].append("\ud800"),
        lambda m: m["splits"]["val"].update(fingerprint=7),
        lambda m: m["splits"]["val"]["shards"].append({"path": "val/../../x.tar", "num_clips": 1}),
        lambda m: m["splits"].update({"../x": m["splits"]["val"]}),
        lambda m: add_shard(m, "val/val-000000.tar.idx"),
        lambda m: add_shard(m, "index/val.parquet"),
        lambda m: add_shard(m, "val/val-000000.tar"),
        lambda m: add_shard(m, "val/x\u00e4.tar"),
        lambda m: add_shard(m, "val/x\ud800.tar"),
        lambda m: add_shard(m, "val/x: y.tar"),
        lambda m: add_shard(m, "val/*.tar"),
        lambda m: add_shard(m, ".hidden/x.tar"),
        lambda m: m["splits"].update(train=m["splits"]["val"]),
        lambda m: m.update(class_names=["a", "a"]),
        lambda m: m["profile"].update(fps="fast"),
        lambda m: m["profile"].update(crf=None),
    ],
)
def test_a_hostile_manifest_is_refused_in_one_sentence(change):
    values = json.loads(manifest().to_bytes())
    change(values)
    with pytest.raises(DatasetError, match="^manifest.json"):
        Manifest.from_bytes(json.dumps(values).encode(), "manifest.json")


def places(value, place=()):
    """Yield where each value of a JSON stands, from the outside in."""
    yield place
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for name, found in inner:
        yield from places(found, (*place, name))


def refusal(place, value) -> str:
    """Return what is said of a manifest with another value at a place; "" where it is read."""
    values = json.loads(manifest().to_bytes())
    at = values
    for name in place[:-1]:
        at = at[name]
    at[place[-1]] = value
    try:
        Manifest.from_bytes(json.dumps(values).encode(), "manifest.json")
    except DatasetError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("value", [None, [], [[1, 2]], {}, {"a": None}, "", "x", 0, -1, 1.5, True])
def test_a_value_of_another_type_is_refused_in_our_own_words(value):
    for place in list(places(json.loads(manifest().to_bytes())))[1:]:
        said = refusal(place, value)
        assert not re.search(r"Error|NoneType|object is|has no attribute|indices", said), place


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda m: m["splits"]["val"].update(outcomes=None),
            "splits.val.outcomes must be an object",
        ),
        (lambda m: m["splits"]["val"].pop("num_rows"), "splits.val.num_rows is missing"),
        (lambda m: m["splits"]["val"].update(shards={}), "splits.val.shards must be a list"),
        (
            lambda m: m["splits"]["val"]["shards"].append(5),
            "splits.val.shards[1] must be an object",
        ),
        (lambda m: m.update(class_names="ab"), "class_names must be a list"),
    ],
)
def test_the_wrong_field_of_a_manifest_is_named(change, said):
    values = json.loads(manifest().to_bytes())
    change(values)
    with pytest.raises(DatasetError) as caught:
        Manifest.from_bytes(json.dumps(values).encode(), "m")
    assert str(caught.value) == f"m is not a kprep manifest: {said}; get it from another copy"


@pytest.mark.parametrize("data", [b"\xff", b"{", b"", b"[" * 100_000, b"[" + b"9" * 5000 + b"]"])
def test_bytes_that_are_no_json_are_refused_in_our_own_words(data):
    with pytest.raises(
        DatasetError, match=r"^m is not JSON: .*; get it from another copy$"
    ) as caught:
        Manifest.from_bytes(data, "m")
    assert not re.search("codec|recursion|Exceeds|Expecting", str(caught.value))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_manifest_or_a_dataset_error(data):
    with pytest.raises(DatasetError):
        Manifest.from_bytes(data, "manifest.json")


def test_a_shard_of_any_other_plain_name_is_read():
    """As `kprep index` takes them."""
    values = json.loads(manifest().to_bytes())
    add_shard(values, "parts/a=b_1.2-x.tar")
    assert (
        Manifest.from_bytes(json.dumps(values).encode(), "m").splits["val"].shards[1].num_clips == 1
    )


def test_a_folder_without_a_manifest(tmp_path):
    with pytest.raises(DatasetError, match="holds no manifest.json"):
        read_manifest(Storage(str(tmp_path)))
    with pytest.raises(DatasetError, match="does not exist"):
        read_manifest(Storage(str(tmp_path / "nowhere")))


SIDECAR = Sidecar("k", "v", "val", "", -1, 0.0, 1.5, 20, 15, 1, 170, 128, "folder", "small", "{}")


def test_sidecar_round_trip_and_types():
    assert Sidecar.from_bytes(SIDECAR.to_bytes(), "k.json") == SIDECAR
    values = json.loads(SIDECAR.to_bytes())
    # Hugging Face infers the schema from five samples: a float that looks like an int breaks it
    assert [type(values[name]) for name in ("label", "label_index", "start_seconds")] == [
        str,
        int,
        float,
    ]
    del values["extra"]
    with pytest.raises(DatasetError, match="extra"):
        Sidecar.from_bytes(json.dumps(values).encode(), "k.json")


@pytest.mark.parametrize(
    "name", ["", "Val", "index", "ledger", "../x", "a b", "0val", "a" * 40, "a-b"]
)
def test_split_names_that_a_reader_could_not_use(name):
    with pytest.raises(UsageError, match="split name"):
        check_split_name(name)


@pytest.mark.parametrize("name", ["all", "y", "n", "yes", "no", "on", "off", "true", "false", "null", "Val"])  # fmt: skip
def test_names_that_mean_something_to_yaml_or_hugging_face_are_for_no_new_split(name):
    with pytest.raises(UsageError, match="split name"):
        check_new_split_name(name)


@given(st.from_regex(r"[a-z][a-z0-9_]{0,3}", fullmatch=True))
def test_every_name_of_a_new_split_is_that_string_to_yaml(name):
    try:
        check_new_split_name(name)
    except UsageError:
        return
    assert yaml.safe_load(name) == name
    assert yaml_name(name) == name


@pytest.mark.parametrize("name", ["no", "true", "null", "all"])
def test_a_split_of_such_a_name_is_read_and_quoted(name):
    values = json.loads(manifest().to_bytes())
    values["splits"] = {name: values["splits"]["val"]}
    read = Manifest.from_bytes(json.dumps(values).encode(), "m")
    files = energon_files(read.splits)
    parts = yaml.safe_load(files[".nv-meta/split.yaml"])["split_parts"]
    assert parts == {name: ["val/val-000000.tar"]}
    head = dataset_card(read, {name: RowTally()}).decode().split("---")[1]
    assert yaml.safe_load(head)["configs"][0]["data_files"][0]["split"] == name


@pytest.mark.parametrize("path", ["/a", "../a", "a/../b", "a//b", "", "a\\b", "a\0b", ".", "a/./b"])
def test_paths_that_leave_the_root(path):
    with pytest.raises(StorageError, match="inside its root"):
        check_relative_path(path)


def test_rates_are_exact():
    assert Fraction(RECORD.fps_num, RECORD.fps_den) == 15


def test_a_local_file_has_one_version_however_it_is_asked_for(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one")
    storage = Storage(str(tmp_path))
    (listed,) = storage.list()
    assert listed == storage.info("a.txt")
    assert storage.read_with_etag("a.txt") == (b"one", listed.etag)
    assert bytes(storage.read_range("a.txt", 1, 3, etag=listed.etag)) == b"ne"


@pytest.mark.parametrize(
    ("path", "reserved"),
    [
        (".kprep-work", True),
        (".kprep-work/copy.json", True),
        (".kprep-lock", True),
        (".kprep-workers/a.tar", False),
        ("train/.kprep-work/a.tar", False),
        (".nv-meta/split.yaml", False),
    ],
)
def test_what_no_dataset_may_hold_is_reserved(path, reserved):
    assert is_reserved(path) == reserved


@pytest.mark.parametrize(("splits", "has"), [({}, "none"), ({"val": 1, "train": 2}, "train, val")])
def test_a_split_that_is_not_there_is_named_with_those_that_are(splits, has):
    manifest = Manifest(PROFILES["small"], (), splits, {})
    with pytest.raises(UsageError, match=f"^here has no split 'typo'; it has {has}$"):
        manifest.split("typo", "here")
