"""Every kind of corruption that `kprep verify` promises to find, on disk and in a bucket; and what `--repair` mends."""

import hashlib
import io
import itertools
import json
import os
import shutil
import tarfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from conftest import REPOSITORY, run_kprep
from foreign_tars import encode, motion
from webdataset import TarWriter

from prep.cli import kprep
from prep.demo_videos import random_motion, write_video
from prep.errors import KprepError
from prep.faults import Kind
from prep.format import iter_records, read_index, split_fingerprint
from prep.repair import repair
from prep.storage import Storage
from prep.verify import Findings, examine, verify
from prep.verify_shard import gops_agree

SHARD = "val/val-000001.tar"
LAST_SHARD = "val/val-000002.tar"
_prefixes = itertools.count()


class _Quiet:
    def add(self, count: int) -> None:
        pass

    def skip(self, count: int) -> None:
        pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Splits train and val of six clips in two shards each."""
    folder = tmp_path_factory.mktemp("faults")
    rng = np.random.default_rng(2)
    for split, number in itertools.product(("train", "val"), range(6)):
        target = folder / "videos" / split / ("left", "up")[number % 2] / f"{split}{number}.mp4"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_video(target, random_motion("left", rng), "libx264")
    (folder / "videos/val/up/broken.mp4").write_bytes(b"no video")
    for split in ("train", "val"):
        run_kprep("shard", folder / "videos", folder / "root", "--split", split, "--profile", "small",
                  "--clips-per-shard", 3)  # fmt: skip
    return folder / "root"


@pytest.fixture(params=["disk", "bucket"])
def dataset(request, whole, tmp_path) -> Storage:
    """A copy of the dataset to be damaged."""
    return placed(request, whole, tmp_path)


def placed(request, folder: Path, tmp_path: Path) -> Storage:
    if request.param == "disk":
        return Storage(str(shutil.copytree(folder, tmp_path / "root")))
    s3 = request.getfixturevalue("s3")
    return Storage(s3.upload(folder, f"verify-{os.getpid()}-{next(_prefixes)}"), s3.options)


def check(storage: Storage, **options) -> list[tuple[Kind, str]]:
    return [(fault.kind, fault.path) for fault in verify(storage, **options).faults]


def relist(storage: Storage, path: str, data: bytes) -> None:
    """Write a file and make the manifest agree, so that only its contents can give it away."""
    storage.write(path, data)
    change_manifest(storage, lambda values: values["files"].__setitem__(
        path, {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}))  # fmt: skip


def change_manifest(storage: Storage, change) -> None:
    values = json.loads(storage.read("manifest.json"))
    change(values)
    storage.write("manifest.json", json.dumps(values).encode())


def change_index(storage: Storage, split: str, **columns) -> None:
    """Change columns of an index by functions of their values; manifest and fingerprint follow."""
    path = f"index/{split}.parquet"
    table = pq.read_table(io.BytesIO(storage.read(path)))
    for name, change in columns.items():
        at = table.column_names.index(name)
        values = pa.array(change(table[name].to_pylist()), type=table.schema.field(at).type)
        table = table.set_column(at, table.schema.field(at), values)
    sink = io.BytesIO()
    pq.write_table(table, sink)
    relist(storage, path, sink.getvalue())
    print_ = split_fingerprint(table)
    change_manifest(
        storage, lambda values: values["splits"][split].__setitem__("fingerprint", print_)
    )


def first(change):
    return lambda values: [change(values[0]), *values[1:]]


def test_a_whole_dataset_has_no_fault(dataset):
    verdict = verify(dataset, deep=True)
    assert (verdict.faults, verdict.num_clips) == ([], 12)
    assert verdict.num_files == len(list(dataset.list())) - 1


EVERY_FILE = (SHARD, f"{SHARD}.idx", "index/val.parquet", "ledger/val.parquet", "wids-val.json", "classes.txt",
              ".nv-meta/.info.json", ".nv-meta/split.yaml", ".nv-meta/dataset.yaml", "README.md")  # fmt: skip


def test_missing_files_are_named(dataset):
    for path in EVERY_FILE:
        dataset.delete(path)
    assert sorted(check(dataset)) == sorted((Kind.MISSING, path) for path in EVERY_FILE)


def test_an_extra_file_is_named(dataset):
    dataset.write("val/val-000099.tar", b"x")
    assert check(dataset) == [(Kind.EXTRA, "val/val-000099.tar")]


def test_truncated_files_are_named(dataset):
    for path in EVERY_FILE:
        dataset.write(path, dataset.read(path)[:-1])
    assert sorted(check(dataset)) == sorted((Kind.TRUNCATED, path) for path in EVERY_FILE)


def test_a_file_that_has_grown_is_named(dataset):
    dataset.write(SHARD, dataset.read(SHARD) + b"more")
    assert check(dataset) == [(Kind.SIZE, SHARD)]


def test_altered_files_are_named(dataset):
    for path in EVERY_FILE:
        data = bytearray(dataset.read(path))
        data[len(data) // 2] ^= 1
        dataset.write(path, bytes(data))
    assert sorted(check(dataset)) == sorted((Kind.ALTERED, path) for path in EVERY_FILE)


def test_an_altered_shard_says_which_clip_it_is(dataset):
    row = pq.read_table(io.BytesIO(dataset.read("index/val.parquet"))).to_pylist()[-1]
    data = bytearray(dataset.read(row["shard"]))
    data[row["video_offset"] + row["video_bytes"] // 2] ^= 1
    dataset.write(row["shard"], bytes(data))
    (fault,) = verify(dataset).faults
    assert row["key"] in fault.message


def test_a_shard_cut_at_a_member_boundary_is_named(dataset):
    """webdataset ends silently there."""
    data = dataset.read(SHARD)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        relist(dataset, SHARD, data[: tar.getmembers()[2].offset])
    assert (Kind.TAR, SHARD) in check(dataset)


INDEX_ROWS = {
    "label": lambda value: 1 - value,
    "num_frames": lambda value: value + 1,
    "fps_num": lambda value: value + 1,
    "width": lambda value: value + 2,
    "entry_offset": lambda value: value + 512,
    "entry_bytes": lambda value: value + 512,
    "video_offset": lambda value: value + 1,
    "video_bytes": lambda value: value - 1,
    "content_hash": lambda value: bytes(16),
    "crc32": lambda value: value ^ 1,
    "gop_crc32": lambda value: [value[0] ^ 1, *value[1:]],
    "gop_offsets": lambda value: [value[0] + 1, *value[1:]],
    "key": lambda value: f"{value}x",
}


@pytest.mark.parametrize("column", INDEX_ROWS)
def test_an_index_row_that_disagrees_with_the_tar_is_named(dataset, column):
    """Even where the fingerprint was forged along with it."""
    change_index(dataset, "val", **{column: first(INDEX_ROWS[column])})
    found = [fault for fault in verify(dataset).faults if fault.kind is Kind.INDEX]
    assert {fault.path for fault in found} == {"val/val-000000.tar"}, found


def test_a_sidecar_of_another_split_is_named(dataset):
    """Even where the manifest lists the tar that holds it."""
    data = dataset.read(SHARD)
    relist(dataset, SHARD, data.replace(b'"split":"val"', b'"split":"vel"', 1))
    found = [fault for fault in verify(dataset).faults if fault.kind is Kind.INDEX]
    assert ["says split vel, it stands in val" in fault.message for fault in found] == [True]


SIDECARS = {
    "profile": (b'"profile":"small"', b'"profile":"smell"'),
    "label": (b'"label":"up"', b'"label":"uq"'),
    "source": (b'"source":"folder"', b'"source":"forder"'),
    "start_seconds": (b'"start_seconds":0.0', b'"start_seconds":1.0'),
    "fps_den": (b'"fps_den":1', b'"fps_den":2'),
    "height": (b'"height":128', b'"height":126'),
}


@pytest.mark.parametrize("field", SIDECARS)
def test_a_sidecar_that_disagrees_with_the_index_is_named(dataset, field):
    """Even where the manifest lists the tar that holds it."""
    data = dataset.read(SHARD)
    old, new = SIDECARS[field]
    assert old in data
    relist(dataset, SHARD, data.replace(old, new, 1))
    found = [fault for fault in verify(dataset).faults if fault.kind is Kind.INDEX]
    assert ["disagrees with the index" in fault.message for fault in found] == [True]


def test_an_index_with_another_fingerprint_is_named(dataset):
    change_manifest(
        dataset, lambda values: values["splits"]["val"].__setitem__("fingerprint", "0" * 64)
    )
    assert check(dataset) == [(Kind.INDEX, "index/val.parquet")]


@pytest.mark.parametrize(
    ("path", "change"),
    [
        (f"{SHARD}.idx", lambda data: data[:8] + b"\1" + data[9:]),
        ("wids-val.json", lambda data: data.replace(b'"nsamples": 3', b'"nsamples": 4', 1)),
        (".nv-meta/.info.json", lambda data: data.replace(b'.tar": 3', b'.tar": 4', 1)),
        (".nv-meta/split.yaml", lambda data: data.replace(b"val-000000", b"val-000007", 1)),
        ("classes.txt", lambda data: data.replace(b"left", b"lift")),
    ],
    ids=["idx", "wids", "energon counts", "energon splits", "classes"],
)
def test_a_companion_that_disagrees_with_the_tar_is_named(dataset, path, change):
    data = dataset.read(path)
    assert change(data) != data
    relist(dataset, path, change(data))
    assert check(dataset) == [(Kind.COMPANION, path)]


def test_samples_that_a_tar_does_not_hold_are_named(dataset):
    """Here manifest, wids and `.nv-meta` agree with each other, but not with the tar."""
    change_manifest(
        dataset, lambda values: values["splits"]["val"]["shards"][1].__setitem__("samples", 4)
    )
    wids = json.loads(dataset.read("wids-val.json"))
    wids["shardlist"][1]["nsamples"] = 4
    relist(dataset, "wids-val.json", (json.dumps(wids, indent=1) + "\n").encode())
    energon = json.loads(dataset.read(".nv-meta/.info.json"))
    energon["shard_counts"][SHARD] = 4
    relist(dataset, ".nv-meta/.info.json", (json.dumps(energon, indent=1) + "\n").encode())
    (fault,) = verify(dataset).faults
    assert str(fault) == f"manifest.json: {SHARD} holds 3 samples, it says 4"
    done = rebuild(dataset)
    assert (done.rebuilt, len(done.refused), done.findings.faults) == ([], 1, [fault])


def replace_index(storage: Storage, table: pa.Table) -> None:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    relist(storage, "index/val.parquet", sink.getvalue())


def test_an_index_of_no_rows_is_named(dataset):
    table = pq.read_table(io.BytesIO(dataset.read("index/val.parquet")))
    replace_index(dataset, table.slice(0, 0))
    assert (Kind.INDEX, "index/val.parquet") in check(dataset)


@pytest.mark.parametrize("column", ["key", "shard", "content_hash", "label"])
def test_an_index_that_lacks_values_is_named(dataset, column):
    table = pq.read_table(io.BytesIO(dataset.read("index/val.parquet")))
    at = table.column_names.index(column)
    kind = table.schema.field(at).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    values = [None, *table[column].to_pylist()[1:]]
    replace_index(
        dataset, table.set_column(at, pa.field(column, kind), pa.array(values, type=kind))
    )
    assert (Kind.INDEX, "index/val.parquet") in check(dataset)


def test_a_key_twice_in_a_split_is_named(dataset):
    change_index(dataset, "val", key=lambda keys: [keys[1], *keys[1:]])
    assert (Kind.DUPLICATE_KEY, "index/val.parquet") in check(dataset)


def test_a_key_twice_in_a_tar_is_named(dataset):
    with tarfile.open(fileobj=io.BytesIO(dataset.read(SHARD))) as tar:
        members = [(info.name, tar.extractfile(info).read()) for info in tar]
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in [*members, *members[:2]]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    relist(dataset, SHARD, sink.getvalue())
    assert (Kind.DUPLICATE_KEY, SHARD) in check(dataset)


def test_a_key_in_two_splits_is_named(dataset):
    key = pq.read_table(io.BytesIO(dataset.read("index/train.parquet")))["key"][0].as_py()
    change_index(dataset, "val", key=lambda keys: [key, *keys[1:]])
    found = [fault for fault in verify(dataset).faults if fault.kind is Kind.DUPLICATE_KEY]
    assert [(fault.path, fault.key) for fault in found] == [("index/val.parquet", key)]
    assert "train" in found[0].message


@pytest.mark.parametrize("change", [
    lambda table: table.slice(1),
    lambda table: pa.concat_tables([table, table.slice(0, 1)]),
    lambda table: table.set_column(6, "status", pa.array(["ok"] * table.num_rows)),
], ids=["a row less", "a row more", "another outcome"])  # fmt: skip
def test_a_ledger_that_does_not_add_up_is_named(dataset, change):
    table = pq.read_table(io.BytesIO(dataset.read("ledger/val.parquet")))
    assert table.column_names[6] == "status"
    sink = io.BytesIO()
    pq.write_table(change(table), sink)
    relist(dataset, "ledger/val.parquet", sink.getvalue())
    assert {*check(dataset)} == {(Kind.LEDGER, "ledger/val.parquet")}


def test_a_manifest_whose_outcomes_do_not_add_up_is_named(dataset):
    def change(values):
        values["splits"]["val"]["num_rows"] += 1

    change_manifest(dataset, change)
    assert (Kind.LEDGER, "manifest.json") in check(dataset)


def test_a_ledger_of_other_clips_is_named(dataset):
    table = pq.read_table(io.BytesIO(dataset.read("ledger/val.parquet")))
    keys = [f"{key}x" for key in table["key"].to_pylist()]
    sink = io.BytesIO()
    pq.write_table(table.set_column(1, "key", pa.array(keys)), sink)
    relist(dataset, "ledger/val.parquet", sink.getvalue())
    assert {*check(dataset)} == {(Kind.LEDGER, "ledger/val.parquet")}


# --deep: what only decoding can find, in tars that have no sidecar to disagree with


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("foreign") / "root"
    folder.mkdir()
    rng = np.random.default_rng(4)
    options = {"bf": "2", "preset": "ultrafast"}
    with TarWriter(str(folder / "train-000.tar"), encoder=False) as tar:
        for number in range(4):
            video = encode(motion(rng, number, rate=Fraction(25)), "mp4", "libx264", options)
            tar.write({"__key__": f"{number:04d}", "mp4": video, "cls": str(number).encode(),
                       "txt": f"caption {number}".encode(), "flow.npy": b"flow"})  # fmt: skip
    run_kprep("index", folder)
    return folder


@pytest.fixture(params=["disk", "bucket"])
def others(request, foreign, tmp_path) -> Storage:
    return placed(request, foreign, tmp_path)


def test_frames_that_no_group_of_pictures_holds_are_noticed(whole):
    row = next(iter_records(read_index((whole / "index/val.parquet").read_bytes(), "index")))
    payload = (whole / row.shard).read_bytes()[row.video_offset :][: row.video_bytes]
    one = replace(row, gop_offsets=row.gop_offsets[:2], gop_crc32=row.gop_crc32[:1],
                  num_frames=row.gop_frames)  # fmt: skip
    assert gops_agree(payload, one)
    assert not gops_agree(payload, replace(one, num_frames=row.gop_frames + 1))


def deep(storage: Storage) -> list[str]:
    assert check(storage) == []  # every checksum is right
    return [str(fault) for fault in verify(storage, deep=True).faults if fault.kind is Kind.VIDEO]


def test_a_wrong_frame_count_is_found_by_deep(others):
    change_index(others, "train", num_frames=first(lambda value: value - 1))
    assert ["40 frames, the index says 39" in fault for fault in deep(others)] == [True]


def test_a_wrong_rate_is_found_by_deep(others):
    change_index(others, "train", fps_num=first(lambda value: 30), fps_den=first(lambda value: 1))
    assert ["at 25 fps, the index says 30" in fault for fault in deep(others)] == [True]


def test_a_wrong_size_is_found_by_deep(others):
    change_index(others, "train", width=first(lambda value: value + 2))
    (fault,) = deep(others)
    assert "the index says" in fault


def test_a_bucket_that_may_be_read_and_not_listed_is_verified_but_for_extra_files(
    whole, s3, monkeypatch
):
    address = s3.upload(whole, f"verify-{os.getpid()}-{next(_prefixes)}")
    for name, value in {**s3.environment, "AWS_ACCESS_KEY_ID": s3.read_only_id}.items():
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(kprep, ["verify", address])
    assert (done.exit_code, done.stdout.count(" is whole: ")) == (0, 1), done.output
    assert "cannot be listed with these credentials" in done.stderr
    s3.store(address.removeprefix("s3://kprep/")).delete(SHARD)
    done = CliRunner().invoke(kprep, ["verify", address])
    assert (done.exit_code, done.stdout.count("\n")) == (1, 1), done.output
    assert done.stdout.startswith(f"{SHARD}: ")


def change_video(storage: Storage, change) -> None:
    """Change the first clip's bytes in place; hashes, index and companions all follow."""
    row = pq.read_table(io.BytesIO(storage.read("index/train.parquet"))).to_pylist()[0]
    data = bytearray(storage.read("train-000.tar"))
    place = slice(row["video_offset"], row["video_offset"] + row["video_bytes"])
    video = change(bytes(data[place]))
    assert len(video) == row["video_bytes"]
    data[place] = video
    relist(storage, "train-000.tar", bytes(data))
    import zlib

    change_index(storage, "train", crc32=first(lambda _: zlib.crc32(video)),
                 content_hash=first(lambda _: hashlib.blake2b(video, digest_size=16).digest()))  # fmt: skip
    wids = json.loads(storage.read("wids-train.json"))
    wids["shardlist"][0]["md5sum"] = hashlib.md5(data, usedforsecurity=False).hexdigest()
    relist(storage, "wids-train.json", (json.dumps(wids, indent=1) + "\n").encode())


def test_a_clip_that_does_not_decode_is_found_by_deep(others):
    change_video(others, lambda video: video.replace(b"avc1", b"zzzz"))
    (fault,) = deep(others)
    assert "train-000.tar: 0000: its video cannot be read exactly" in fault


def test_a_clip_with_less_in_it_is_found_by_deep(others):
    change_video(
        others, lambda video: video[: len(video) // 2] + bytes(len(video) - len(video) // 2)
    )
    assert "0000" in deep(others)[0]


def test_other_keyframes_than_the_profile_says_are_found_by_deep(dataset):
    def change(values):
        values["profile"]["keyframe_interval_frames"] = 8

    change_manifest(dataset, change)
    found = [str(fault) for fault in verify(dataset, deep=True).faults if fault.kind is Kind.VIDEO]
    assert len(found) == 12
    assert "keyframes come every 16 frames, the profile says 8" in found[0]


def test_another_codec_configuration_is_found_by_deep(dataset):
    """One byte short: the file still holds it, so only the proof of the form can tell."""
    change_index(dataset, "val", codec_config=first(lambda config: config[:-1]))
    assert check(dataset) == []
    keys = pq.read_table(io.BytesIO(dataset.read("index/val.parquet")))["key"].to_pylist()
    found = [fault for fault in verify(dataset, deep=True).faults if fault.kind is Kind.VIDEO]
    assert [fault.key for fault in found] == keys[:1]


def crashing(folder: Path, body: str) -> dict[str, str]:
    """Return an environment in which worker processes do something else when they decode."""
    (folder / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if 'prep.worker' in ' '.join(sys.orig_argv):\n"
        "    import prep.clip_check as check, prep.worker_marks as worker\n"
        "    decode = check.decode_clip\n"
        "    def odd(data, *rest):\n"
        f"        {body}\n"
        "        return decode(data, *rest)\n"
        "    check.decode_clip = odd\n"
        "    worker.CPU_SECONDS = 1\n"
    )
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(REPOSITORY)])}


@pytest.mark.parametrize(
    ("body", "says"),
    [("os.kill(os.getpid(), signal.SIGSEGV)", "signal 11"), ("any(iter(int, 1))", "CPU time")],
    ids=["dies", "never ends"],
)
def test_a_decoder_that_dies_or_never_ends_is_a_fault_of_its_clip(foreign, tmp_path, body, says):
    root = Path(shutil.copytree(foreign, tmp_path / "root"))
    rows = pq.read_table(root / "index/train.parquet").to_pylist()
    environment = crashing(tmp_path, f"if len(data) == {rows[2]['video_bytes']}: {body}")
    done = run_kprep("verify", root, "--deep", "--json", "--workers", 1, check=False, **environment)
    values = json.loads(done.stdout)
    assert done.returncode == 1
    assert [(fault["kind"], fault["key"]) for fault in values["faults"]] == [("video", "0002")]
    assert says in values["faults"][0]["message"]


# the command


def test_json_and_exit_codes(whole, tmp_path):
    root = Path(shutil.copytree(whole, tmp_path / "root"))
    values = json.loads(run_kprep("verify", root, "--json", "--workers", 2).stdout)
    assert (values["whole"], values["clips"], values["faults"]) == (True, 12, [])
    (root / SHARD).unlink()
    done = run_kprep("verify", root, "--json", check=False)
    values = json.loads(done.stdout)
    assert (done.returncode, values["whole"]) == (1, False)
    assert values["faults"] == [
        {"kind": "missing", "path": SHARD, "message": "missing", "key": None}
    ]
    assert run_kprep("verify", root, "--no-such-option", check=False).returncode == 2
    (root / "manifest.json").write_text("{")
    done = run_kprep("verify", root, "--json", check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout)["faults"][0]["kind"] == "manifest"


@pytest.mark.parametrize(("link", "place"), [("manifest.json", "manifest.json"), ("x", ".")])
def test_json_where_the_root_cannot_be_read(whole, tmp_path, link, place):
    root = Path(shutil.copytree(whole, tmp_path / "root"))
    (root / link).unlink(missing_ok=True)
    (root / link).symlink_to(link)  # leads to itself
    done = run_kprep("verify", root, "--json", check=False)
    (fault,) = json.loads(done.stdout)["faults"]
    assert (done.returncode, fault["kind"], fault["path"]) == (1, "unreadable", place)


def test_many_bytes_go_through_processes(whole, monkeypatch):
    """The same verdict through worker processes as in this one."""
    monkeypatch.setattr("prep.verify._FEW_BYTES", 0)
    seen = []

    class Progress(_Quiet):
        def add(self, count: int) -> None:
            seen.append(count)

    verdict = verify(Storage(str(whole)), workers=2, progress=Progress())
    assert (verdict.faults, verdict.num_clips) == ([], 12)
    assert sum(seen) == sum(path.stat().st_size for path in whole.rglob("*.tar"))


# --repair


def rebuild(storage: Storage):
    from prep.format import read_manifest

    findings: Findings = examine(storage, read_manifest(storage))
    return repair(storage, findings, progress=_Quiet())


REBUILT = tuple(path for path in EVERY_FILE if path not in (SHARD, "ledger/val.parquet"))


def contents(storage: Storage) -> dict[str, bytes]:
    return {info.path: storage.read(info.path) for info in storage.list()}


@pytest.mark.parametrize("damage", ["gone", "altered"])
def test_repair_makes_index_and_companions_as_they_were(dataset, damage):
    before = contents(dataset)
    tags = {info.path: info.etag for info in dataset.list() if info.path.endswith(".tar")}
    for path in REBUILT:
        if damage == "gone":
            dataset.delete(path)
        else:
            dataset.write(path, b"altered" + before[path])
    done = rebuild(dataset)
    assert sorted(done.rebuilt) == sorted(REBUILT)
    assert (done.refused, done.findings.faults) == ([], [])
    assert contents(dataset) == before  # byte for byte, the manifest too
    assert {info.path: info.etag for info in dataset.list() if info.path.endswith(".tar")} == tags


def test_repair_mends_what_was_forged_in_the_manifest(dataset):
    before = contents(dataset)

    def change(values):
        values["files"][SHARD]["bytes"] += 512
        del values["files"]["wids-val.json"], values["files"][f"{SHARD}.idx"]

    change_manifest(dataset, change)
    done = rebuild(dataset)
    assert f"the manifest's entry of {SHARD}" in done.rebuilt
    assert done.findings.faults == []
    assert contents(dataset) == before


@pytest.mark.parametrize("column", ["crc32", "gop_offsets", "entry_offset"])
def test_repair_mends_an_index_that_disagrees(dataset, column):
    before = dataset.read("index/val.parquet")
    change_index(dataset, "val", **{column: first(INDEX_ROWS[column])})
    done = rebuild(dataset)
    assert (done.rebuilt, done.findings.faults) == (["index/val.parquet"], [])
    assert dataset.read("index/val.parquet") == before


def test_repair_refuses_where_a_tar_is_damaged_and_writes_nothing(dataset):
    data = bytearray(dataset.read(SHARD))
    data[3000] ^= 1
    dataset.write(SHARD, bytes(data))
    dataset.delete("wids-val.json")
    before = contents(dataset)
    done = rebuild(dataset)
    assert done.rebuilt == []
    assert [line.startswith(f"{SHARD}: altered") for line in done.refused] == [True]
    assert contents(dataset) == before


@pytest.mark.parametrize(
    ("made_by", "old", "new"),
    [
        ("shard", b'"extra":"{}"', b'"extra":"[]"'),
        ("shard", b'"split":"val"', b'"split":"vel"'),
        ("index", b"caption 2", b"caption 7"),
        ("index", b"flow" + bytes(508), b"flaw" + bytes(508)),
    ],
    ids=["extra", "split", "caption", "second member"],
)
def test_repair_never_lists_a_tar_of_other_bytes(whole, foreign, tmp_path, made_by, old, new):
    """What changed is described by nothing but the sha256 of the tar."""
    source, path = (whole, SHARD) if made_by == "shard" else (foreign, "train-000.tar")
    root = Path(shutil.copytree(source, tmp_path / "root"))
    data = (root / path).read_bytes()
    assert old in data
    (root / path).write_bytes(data.replace(old, new, 1))
    before = contents(Storage(str(root)))
    done = run_kprep("verify", root, "--repair", check=False)
    assert (done.returncode, "rebuilt" in done.stdout) == (1, False)
    assert done.stdout.startswith(f"not repaired: {path}: altered")
    assert f"`kprep {made_by}" in done.stdout.splitlines()[0]
    assert contents(Storage(str(root))) == before


def test_repair_does_not_believe_the_tar_where_the_manifest_lists_another(dataset):
    change_manifest(dataset, lambda values: values["files"][SHARD].__setitem__("sha256", "0" * 64))
    before = contents(dataset)
    done = rebuild(dataset)
    assert (done.rebuilt, len(done.refused), len(done.findings.faults)) == ([], 1, 1)
    assert contents(dataset) == before


def test_repair_refuses_where_a_tar_is_gone(dataset):
    dataset.delete(SHARD)
    dataset.delete("index/val.parquet")
    done = rebuild(dataset)
    assert (done.rebuilt, len(done.refused)) == ([], 1)


def test_repair_says_what_the_tars_do_not_hold(dataset):
    dataset.delete("ledger/val.parquet")
    dataset.delete("README.md")
    dataset.write("stray.txt", b"mine")
    done = rebuild(dataset)
    assert done.rebuilt == ["README.md"]
    assert [line.split(":")[0] for line in done.refused] == ["ledger/val.parquet", "stray.txt"]
    assert {fault.kind for fault in done.findings.faults} == {Kind.MISSING, Kind.EXTRA}
    assert dataset.read("stray.txt") == b"mine"


def test_repair_refuses_tars_that_are_not_those_that_were_published(dataset):
    """Here the manifest lists other tars, each whole in itself."""
    data = dataset.read("train/train-000000.tar")
    relist(dataset, SHARD, data)
    done = rebuild(dataset)
    assert "index/val.parquet" not in done.rebuilt
    assert any("fingerprint" in line for line in done.refused)
    assert done.findings.faults


def test_repair_writes_no_shard_whatever_the_manifest_says(whole, tmp_path):
    """A manifest that calls a tar the companion of another is refused, and a second line holds."""
    from prep.format import read_manifest
    from prep.repair import _Rebuilding

    storage = Storage(str(shutil.copytree(whole, tmp_path / "root")))
    work = _Rebuilding(storage, examine(storage, read_manifest(storage)), 0, _Quiet())
    with pytest.raises(KprepError, match="no shard is ever written"):
        work._write(SHARD, b"")

    def change(values):
        values["splits"]["val"]["shards"].append({"path": f"{SHARD}.idx", "num_clips": 0})

    change_manifest(storage, change)
    before = contents(storage)
    done = run_kprep("verify", storage.root, "--repair", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"{SHARD}.idx" in done.stderr
    assert contents(storage) == before


def test_repair_does_not_undo_what_was_published_while_it_read(dataset):
    from prep.format import read_manifest

    dataset.delete("wids-val.json")
    findings = examine(dataset, read_manifest(dataset))
    change_manifest(dataset, lambda values: values["splits"].pop("train"))
    before = contents(dataset)
    with pytest.raises(KprepError, match="run the same command again"):
        repair(dataset, findings, progress=_Quiet())
    assert contents(dataset) == before


def test_repair_of_somebody_elses_tars(others):
    before = contents(others)
    for path in (
        "index/train.parquet",
        "wids-train.json",
        "train-000.tar.idx",
        "README.md",
        "classes.txt",
    ):
        others.delete(path)
    done = rebuild(others)
    assert (len(done.rebuilt), done.refused, done.findings.faults) == (5, [], [])
    assert contents(others) == before


def refused_by_the_manifest(storage: Storage, *messages: str) -> None:
    """Nothing but the manifest is named, and nothing is written."""
    before = contents(storage)
    found = verify(storage).faults
    assert {(fault.kind, fault.path) for fault in found} == {(Kind.MANIFEST, "manifest.json")}
    assert [fault.message for fault in found] == [*messages]
    done = rebuild(storage)
    assert (done.rebuilt, done.findings.faults) == ([], found)
    assert [line.startswith("manifest.json: it contradicts") for line in done.refused] == [True]
    assert "from another copy" in done.refused[0]
    assert contents(storage) == before


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["left", "uX"], "class 1 is uX in it, and up in classes.txt, which is as listed"),
        (["up", "left"], "class 0 is up in it, and left in classes.txt, which is as listed"),
        (["left"], "it names 1 classes, classes.txt, which is as listed, 2"),
    ],
    ids=["another", "swapped", "one less"],
)
def test_class_names_that_only_the_manifest_has_are_its_fault(dataset, names, message):
    change_manifest(dataset, lambda values: values.__setitem__("class_names", names))
    refused_by_the_manifest(dataset, message)


@pytest.mark.parametrize("index", [1, 3])
def test_class_names_of_somebody_elses_tars_are_the_manifests_fault(others, index):
    """Here the clips have numbers, so that classes.txt, with its listed sha256, decides alone."""
    names = json.loads(others.read("manifest.json"))["class_names"]
    names[index] = "cX"
    change_manifest(others, lambda values: values.__setitem__("class_names", names))
    refused_by_the_manifest(
        others, f"class {index} is cX in it, and {index} in classes.txt, which is as listed"
    )


def test_counts_that_only_the_manifest_has_are_its_fault(dataset):
    val = lambda values: values["splits"]["val"]  # noqa: E731
    kept, says = dataset.read("manifest.json"), "it contradicts {}, which is as listed: {}"
    index, ledger = "index/val.parquet", "ledger/val.parquet"
    change_manifest(dataset, lambda values: val(values).__setitem__("num_clips", 5))
    refused_by_the_manifest(
        dataset,
        says.format(index, "6 rows, the manifest says 5 clips"),
        says.format(ledger, "6 rows are ok, the manifest says 5 clips"),
    )
    dataset.write("manifest.json", kept)
    change_manifest(dataset, lambda values: val(values)["shards"][1].__setitem__("num_clips", 4))
    refused_by_the_manifest(
        dataset,
        says.format(index, f"3 rows of {SHARD}, not 4"),
        f"{SHARD} holds 3 samples, it says 4",
    )
    dataset.write("manifest.json", kept)
    change_manifest(dataset, lambda values: val(values)["outcomes"].__setitem__("ok", 5))
    assert {fault.path for fault in verify(dataset).faults} == {"manifest.json"}
    before = contents(dataset)
    assert rebuild(dataset).rebuilt == []
    assert contents(dataset) == before


def test_a_manifest_of_another_profile_lets_no_index_be_rebuilt(dataset):
    """The tars give the same index, so that it is not what is wrong."""
    change_manifest(dataset, lambda values: values["profile"].__setitem__("name", "other"))
    before = contents(dataset)
    done = rebuild(dataset)
    assert done.rebuilt == []
    assert ["tars give already" in line for line in done.refused] == [True, True]
    assert contents(dataset) == before


def test_the_repair_command(whole, tmp_path):
    root = Path(shutil.copytree(whole, tmp_path / "root"))
    (root / "index/val.parquet").unlink()
    done = run_kprep("verify", root, "--repair")
    assert done.stdout.splitlines()[0] == "rebuilt index/val.parquet"
    assert "is whole" in done.stdout
    assert not (root / ".kprep-work").exists()
    (root / SHARD).write_bytes(b"short")
    done = run_kprep("verify", root, "--repair", check=False)
    assert done.returncode == 1
    assert f"not repaired: {SHARD}" in done.stdout


# what strangers can write into a manifest, and how much is held in memory


@pytest.mark.parametrize("value", [7, [], {}, {"keys": "x", "labels": "cls", "as_stored": True, "card": True},
                                   {"keys": "member", "labels": "exec", "as_stored": True, "card": True}])  # fmt: skip
def test_settings_of_a_stranger_are_checked(foreign, tmp_path, value):
    storage = Storage(str(shutil.copytree(foreign, tmp_path / "root")))
    change_manifest(
        storage, lambda values: values["splits"]["train"]["settings"].__setitem__("foreign", value)
    )
    done = run_kprep("verify", storage.root, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "settings.foreign of split train" in done.stderr


def deep_sidecar(storage: Storage) -> None:
    """Make the last sidecar of a split a nest of brackets; its entry grows and its video moves."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(storage.read(LAST_SHARD))) as old, tarfile.open(
        fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT
    ) as new:  # fmt: skip
        members = [(info, old.extractfile(info).read()) for info in old]
        for info, data in members:
            body = b"[" * 200_000 if info is members[-2][0] else data
            info.size = len(body)
            new.addfile(info, io.BytesIO(body))
    grown = -(-200_000 // 512) * 512 - -(-len(members[-2][1]) // 512) * 512
    relist(storage, LAST_SHARD, sink.getvalue())
    more = lambda values: [*values[:-1], values[-1] + grown]  # noqa: E731
    change_index(storage, "val", entry_bytes=more, video_offset=more)


def no_character(storage: Storage) -> None:
    change_manifest(storage, lambda values: values.__setitem__("class_names", ["left", "\ud800"]))


def no_path(storage: Storage) -> None:
    entry = {"bytes": 0, "sha256": "0" * 64}
    change_manifest(storage, lambda values: values["files"].__setitem__("\udfff.txt", entry))


def bogus_status(storage: Storage) -> None:
    path = "ledger/val.parquet"
    table = pq.read_table(io.BytesIO(storage.read(path)))
    at = table.column_names.index("status")
    values = pa.array(["bogus", *table["status"].to_pylist()[1:]], table.schema.field(at).type)
    sink = io.BytesIO()
    pq.write_table(table.set_column(at, table.schema.field(at), values), sink)
    relist(storage, path, sink.getvalue())


def setting(name: str, value: object):
    def change(storage: Storage) -> None:
        change_manifest(
            storage, lambda values: values["splits"]["val"]["settings"].__setitem__(name, value)
        )

    return change


def endless_entry(storage: Storage) -> None:
    change_index(storage, "val", entry_bytes=lambda values: [*values[:-1], 1 << 50])


VERIFY, SUBSET = ("verify", "ROOT"), ("subset", "ROOT", "OUT", "--split", "val", "--workers", 1)
PUSH = ("push", "ROOT", "OUT", "--split", "val")


@pytest.mark.parametrize(
    ("hostile", "words", "said"),
    [
        (deep_sidecar, VERIFY, ".json is not JSON: "),
        (deep_sidecar, SUBSET, "its sidecar is not JSON"),
        (no_character, VERIFY, "manifest.json holds '\\ud800', half a character"),
        (no_character, PUSH, "manifest.json holds '\\ud800', half a character"),
        (no_character, SUBSET, "manifest.json holds '\\ud800', half a character"),
        (no_path, VERIFY, "manifest.json holds '\\udfff', half a character"),
        (bogus_status, VERIFY, "it has the status 'bogus'"),
        (bogus_status, SUBSET, "ledger/val.parquet is not a ledger: it has the status 'bogus'"),
        (endless_entry, VERIFY, "does not stand where the index says"),
        (endless_entry, SUBSET, "has a clip that ends at byte 1,125,899,9"),  # 2^50 = 1.126e15
        (setting("annotation_lists", 5), SUBSET, "annotation_lists 5, which is no list"),
    ],
)
def test_values_of_a_stranger_end_in_a_sentence(whole, tmp_path, hostile, words, said):
    storage = Storage(str(shutil.copytree(whole, tmp_path / "root")))
    hostile(storage)
    names = {"ROOT": storage.root, "OUT": tmp_path / "out"}
    done = run_kprep(*(names.get(word, word) for word in words), check=False)
    assert done.returncode == 1, done.stderr
    assert said in " ".join((done.stdout + done.stderr).split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out/manifest.json").exists()


def test_a_number_of_clips_that_is_none_is_passed_over(whole, tmp_path):
    storage = Storage(str(shutil.copytree(whole, tmp_path / "root")))
    setting("clips_per_shard", [5])(storage)
    run_kprep("subset", storage.root, tmp_path / "out", "--split", "val", "--workers", 1)
    assert verify(Storage(str(tmp_path / "out"))).faults == []


def test_a_shard_is_never_held_whole(tmp_path, monkeypatch):
    """Over a network too, where windows are asked for ahead of their time."""
    from prep import shard_bytes
    from prep.storage import ObjectInfo

    monkeypatch.setattr(shard_bytes, "_WINDOW_BYTES", 1000)
    data = np.random.default_rng(0).bytes(100_500)
    asked, body = [], None

    class Remote:
        local_root = None

        def read_range(self, _path, start, end, **_):
            asked.append((start, end))
            assert end - start <= 1000
            assert (
                end <= (body.received if body else 0) + 5 * 1000
            )  # the window in hand and three more
            return memoryview(data)[start:end]

    body = shard_bytes.ShardBytes(Remote(), ObjectInfo("x", len(data), None))
    got = b""
    while part := body.read(300):
        got += part
    body.close()
    assert got == data
    assert body.sha256.hexdigest() == hashlib.sha256(data).hexdigest()
    assert sorted(asked) == [(at, min(at + 1000, len(data))) for at in range(0, len(data), 1000)]
