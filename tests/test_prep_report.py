"""`kprep report` without a browser: sums, warnings, the sample, and what the page holds."""

import errno
import html
import json
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from conftest import REPOSITORY, run_kprep
from hypothesis import given
from hypothesis import strategies as st
from report_datasets import CLASSES, CLOSING, SCRIPT, damage, large_dataset

from prep import clip_sprite
from prep.clip_sample import sample_rows
from prep.clip_sprite import draw_sprite, encode_picture
from prep.clip_statistics import class_counts, clip_seconds, frequent, histogram
from prep.dataset_warnings import find_warnings, overlapping_rows
from prep.demo_videos import random_motion, write_video
from prep.errors import BadClipError, StorageError, UsageError
from prep.format import index_schema, read_index, read_manifest
from prep.profile import PROFILES
from prep.report import make_report
from prep.report_command import report_command
from prep.report_html import _header, report_page
from prep.storage import RetryPolicy, Storage
from prep.text.html import script_json, text

numbers = st.floats(0, 1e7, allow_nan=False) | st.integers(0, 1000).map(float)


@given(st.lists(st.lists(numbers, max_size=60), min_size=1, max_size=3))
def test_a_histogram_counts_every_value_once(parts):
    values = {f"s{number}": np.array(part) for number, part in enumerate(parts)}
    found = histogram(values)
    everything = np.concatenate([*values.values()])
    if not everything.size:
        assert found is None
        return
    assert {name: counts.sum() for name, counts in found.counts.items()} == {
        name: len(part) for name, part in values.items()
    }
    assert 1 <= len(found.edges) - 1 <= 40
    assert found.edges[0] <= everything.min() + 1e-9 * everything.max()
    assert found.open_ended == (everything.max() >= found.edges[-1])
    assert (found.lowest, found.highest) == (everything.min(), everything.max())


def test_a_duplicates_clip_is_not_one_that_is_missing():
    outcomes = {"ok": 4, "failed": 15, "duplicate": 1, "pending": 2}
    split = SimpleNamespace(num_clips=4, num_rows=22, outcomes=outcomes, hours=0.1, bytes=9)
    manifest = SimpleNamespace(class_names=("a",), profile=PROFILES["small"], is_foreign=False)
    info = SimpleNamespace(manifest=manifest, splits=(split,))
    page = _header(SimpleNamespace(info=info), "root")
    assert "<dt>rows without a clip</dt><dd>17</dd>" in page


def test_the_bins_of_a_histogram_are_round():
    found = histogram({"a": np.array([1.0, 2.0, 9.9]), "b": np.array([3.05] * 97)})
    steps = np.diff(found.edges)
    assert np.allclose(steps, steps[0])
    # 100 values make 10 bins at most; 9.9 lies far beyond the 99th percentile, 3.12
    assert (steps[0], found.edges[0], found.open_ended) == (0.5, 1.0, True)
    assert found.counts["b"][int(np.searchsorted(found.edges, 3.05)) - 1] == 97
    assert found.counts["a"].tolist() == [1, 0, 1, 0, 1]  # 1.0, 2.0, and 9.9 in the last
    outlier = histogram({"a": np.r_[np.full(999, 10.0), 1e6]})
    assert outlier.open_ended
    assert outlier.counts["a"][-1] >= 1


@given(st.lists(st.lists(st.integers(-1, 4), max_size=40), min_size=1, max_size=3),
       st.integers(0, 60), st.integers(0, 5))  # fmt: skip
def test_a_sample_takes_the_classes_in_turns(parts, count, seed):
    labels = {f"s{number}": np.array(part, np.int64) for number, part in enumerate(parts)}
    chosen = sample_rows(labels, count, seed)
    taken = [(name, row) for name, rows in chosen.items() for row in rows.tolist()]
    there = Counter((name, label) for name, part in labels.items() for label in part.tolist())
    assert len(taken) == len(set(taken)) == min(count, sum(there.values()))
    shown = Counter((name, int(labels[name][row])) for name, row in taken)
    for group, size in there.items():  # nobody has two more than another that has some left
        for other in there:
            assert shown[group] >= min(size, shown[other] - 1)
    again = sample_rows(labels, count, seed)
    assert all(np.array_equal(chosen[name], again[name]) for name in labels)


segments = st.tuples(st.integers(0, 2), st.integers(1, 30), st.integers(1, 12))


@given(st.lists(segments, max_size=25))
def test_overlaps_are_those_of_the_definition(drawn):
    rows = [(f"video{video:06d}", start, start + length) for video, start, length in drawn]
    table = index_rows(
        video_id=[row[0] for row in rows], key=[f"clip{number}" for number in range(len(rows))],
        start_seconds=[row[1] for row in rows], end_seconds=[row[2] for row in rows],
    )  # fmt: skip
    order = sorted(range(len(rows)), key=lambda n: (rows[n], n))
    wanted = [
        place
        for at, place in enumerate(order)
        if any(rows[other][0] == rows[place][0] and rows[other][2] > rows[place][1]
               for other in order[:at])
    ]  # fmt: skip
    assert overlapping_rows(table).tolist() == sorted(wanted)


def index_rows(**given_columns) -> pa.Table:
    """Return an index with these columns and anything elsewhere."""
    count = len(next(iter(given_columns.values())))
    defaults = {"string": "x", "int32": 1, "int64": 1, "uint32": 1, "double": 0.0, "bool": False}
    columns = {}
    for field in index_schema():
        kind = str(field.type)
        if field.name in given_columns:
            columns[field.name] = pa.array(given_columns[field.name], field.type)
        elif field.nullable:
            columns[field.name] = pa.nulls(count, field.type)
        elif kind == "fixed_size_binary[16]":
            columns[field.name] = pa.array(
                [n.to_bytes(16, "big") for n in range(count)], field.type
            )
        else:
            value = "x" if "dictionary" in kind else defaults[kind]
            columns[field.name] = pa.array([value] * count).cast(field.type)
    return pa.table(columns, schema=index_schema())


def test_clips_that_were_cut_before_are_not_said_to_overlap():
    """Their segments all begin at 0, wherever in the video they stood."""
    cut = index_rows(video_id=["video000001"] * 2, key=["a-1", "b-2"], start_seconds=[0, 0], end_seconds=[10, 10])  # fmt: skip
    assert overlapping_rows(cut).tolist() == []
    keys = ["video000001_000000_000010", "video000001_000005_000015"]
    named = index_rows(video_id=["video000001"] * 2, key=keys, start_seconds=[0, 5], end_seconds=[10, 15])  # fmt: skip
    assert overlapping_rows(named).tolist() == [1]
    odd = index_rows(video_id=["a"] * 3, key=["1", "2", "3"], start_seconds=[1, float("nan"), float("inf")], end_seconds=[9, 9, float("inf")])  # fmt: skip
    assert overlapping_rows(odd).tolist() == []


def test_counts_of_classes_and_sizes():
    table = index_rows(label=[0, 0, 2, -1, 7], num_frames=[15, 30, 45, 60, 75])
    assert class_counts(table, 3).tolist() == [2, 0, 1, 2]  # 7 is beyond the list
    assert clip_seconds(table).tolist() == [15, 30, 45, 60, 75]
    sizes = {"a": np.array([5, 5, 7]), "b": np.array([7, 7, 9])}
    assert frequent(sizes, 2) == [(7, {"a": 1, "b": 2}), (5, {"a": 2, "b": 0})]


def warnings_of(root: Path) -> dict[str, list[str]]:
    storage = Storage(str(root))
    manifest = read_manifest(storage)
    tables = {name: read_index((root / f"index/{name}.parquet").read_bytes(), name) for name in manifest.splits}  # fmt: skip
    found: dict[str, list[str]] = {}
    for finding in find_warnings(manifest, tables):
        found.setdefault(finding.kind, []).append(f"{finding.title}: {', '.join(finding.examples)}")
    return found


def test_everything_there_is_to_warn_of(odd_dataset):
    assert warnings_of(odd_dataset) == {
        "leak": [
            "2 videos in both train and val: video000000, video000006",
            "1 clip in more than one split, byte for byte: copy0000001_000000_000002",
        ],
        "duplicate": ["1 clip more than once in a split, byte for byte: copy0000001_000000_000002"],
        "overlap": [
            "1 clip of train overlapping another clip of the video: video000000_000001_000003"
        ],
        "empty class": [
            "1 class of train without a clip: empty",
            f"2 classes of val without a clip: {CLOSING}, empty",
        ],
        "missing": ["10 % of the rows of train have no clip: "],
        "short": ["1 clip of val shorter than annotated: "],  # 0 to 9 s of a video of 3 s
    }


def test_keys_that_only_case_tells_apart():
    manifest = SimpleNamespace(class_names=(), splits={})
    tables = {
        "train": index_rows(key=["Ab_000001_000002", "c_000001_000002"]),
        "val": index_rows(key=["aB-000001_000002", "d_000001_000002"]),
    }
    found = {finding.kind: finding for finding in find_warnings(manifest, tables)}
    assert (
        found["similar keys"].title == "1 group of keys that only case or '-' for '_' tells apart"
    )
    assert found["similar keys"].examples == ("Ab_000001_000002",)
    apart = {"train": tables["train"], "val": index_rows(key=["e_000001_000002"])}
    assert "similar keys" not in {finding.kind for finding in find_warnings(manifest, apart)}


def test_a_sound_dataset_has_no_warning(motion_dataset):
    assert warnings_of(motion_dataset) == {}


def test_tiny_classes_and_clips_without_a_class(motion_dataset):
    manifest = read_manifest(Storage(str(motion_dataset)))
    labels = [0] * 30 + [1] * 30 + [2] * 30 + [3] * 2 + [-1]
    found = find_warnings(manifest, {"train": index_rows(label=labels)})
    said = {finding.kind: (finding.title, finding.examples) for finding in found}
    title = "1 class of train with less than a tenth of the usual clips"
    assert said["tiny class"] == (title, ("up (2)",))
    assert said["unlabelled"] == ("1 clip of train without a class", ())


def video(folder: Path, seconds: float = 2.0, size=(160, 120)) -> tuple[bytes, int]:
    from dataclasses import replace

    motion = random_motion("up", np.random.default_rng(1))
    motion = replace(motion, seconds=seconds, size=size, rate=Fraction(15))
    write_video(folder / "clip.mp4", motion, "libx264")
    return (folder / "clip.mp4").read_bytes(), round(seconds * 15)


@pytest.mark.parametrize(("size", "tile"), [((160, 120), (192, 144)), ((120, 240), (72, 144)), ((320, 40), (192, 24))])  # fmt: skip
def test_a_sprite_holds_evenly_spaced_frames(tmp_path, size, tile):
    data, num_frames = video(tmp_path, size=size)
    sprite = draw_sprite(data, num_frames, 12)
    assert (sprite.num_frames, (sprite.width, sprite.height)) == (12, tile)
    picture = decode_picture(tmp_path, sprite.data)
    assert picture.shape == (tile[1], 12 * tile[0], 3)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24", width=tile[0], height=tile[1]) for frame in container.decode(video=0)]  # fmt: skip
    for place, number in enumerate(np.linspace(0, 29, 12).round().astype(int)):
        part = picture[:, place * tile[0] : (place + 1) * tile[0]].astype(float)
        distances = [np.abs(part - frame).mean() for frame in frames]
        assert distances[number] == min(distances)


def decode_picture(folder: Path, data: bytes) -> np.ndarray:
    (folder / "picture").write_bytes(data)
    with av.open(str(folder / "picture")) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


def test_a_short_clip_gives_each_frame_once(tmp_path):
    data, num_frames = video(tmp_path, seconds=1 / 3)
    assert num_frames == 5
    assert draw_sprite(data, 5, 12).num_frames == 5


def test_without_webp_the_picture_is_a_jpeg(tmp_path, monkeypatch):
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:, 32:] = 255
    assert encode_picture(pixels)[0] == "image/webp"
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libwebp"})
    kind, data = encode_picture(pixels)
    assert kind == "image/jpeg"
    assert np.abs(decode_picture(tmp_path, data).astype(int) - pixels).max() < 30


def test_a_clip_that_is_not_what_the_index_says_is_bad(tmp_path):
    data, num_frames = video(tmp_path)
    with pytest.raises(BadClipError, match="decodes to 30 frames, the index says 31"):
        draw_sprite(data, num_frames + 1, 12)
    with pytest.raises(BadClipError, match="decodes to more frames, the index says 29"):
        draw_sprite(data, num_frames - 1, 12)
    for damaged in (b"", b"#EXTM3U\n/etc/passwd\n", data[:200], bytes(len(data))):
        with pytest.raises(BadClipError):
            draw_sprite(damaged, num_frames, 12)


def test_a_clip_that_would_take_too_long_is_bad_before_it_is_decoded(tmp_path, monkeypatch):
    data, num_frames = video(tmp_path)
    with pytest.raises(BadClipError, match="has 30001 frames, too many to be shown"):
        draw_sprite(data, 30_001, 12)
    start, end = data.index(b"mdat") + 4, data.index(b"moov")
    pictures = slice(start, end - 4 if end > start else None)
    blank = bytearray(data)
    blank[pictures] = bytes(len(data[pictures]))  # nothing in it decodes
    monkeypatch.setattr(clip_sprite, "MAX_PIXELS", 160 * 120 - 1)
    with pytest.raises(BadClipError, match="is 160x120 pixels large"):
        draw_sprite(bytes(blank), num_frames, 12)


def data_of(page: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found[1])


def test_damaged_and_missing_clips_are_shown_as_such(odd_dataset, tmp_path):
    root = Path(shutil.copytree(odd_dataset, tmp_path / "root"))
    key = damage(root, "train", 1)
    shard = "train/train-000002.tar"
    inside = read_index((root / "index/train.parquet").read_bytes(), "train")
    gone = [row["key"] for row in inside.to_pylist() if row["shard"] == shard]
    (root / shard).unlink()
    done = run_kprep("report", root, tmp_path / "page.html")
    assert f"{1 + len(gone)} of the sampled clips cannot be shown, such as " in done.stdout
    clips = data_of((tmp_path / "page.html").read_text())["clips"]
    problems = {clip["key"]: clip["problem"] for clip in clips if clip["problem"]}
    assert problems == {key: "is damaged: its crc32 differs from the index",
                        **dict.fromkeys(gone, f"cannot be read from {shard}")}  # fmt: skip
    assert all("sprite" in clip for clip in clips if not clip["problem"])


def drawing_otherwise(folder: Path, monkeypatch, body: str) -> None:
    """Let worker processes do something else before they draw a clip of `data`."""
    (folder / "sitecustomize.py").write_text(
        "import os, signal, sys, time\n"
        "if 'prep.worker' in ' '.join(sys.orig_argv):\n"
        "    import prep.clip_sprite as sprites\n"
        "    draw = sprites.draw_sprite\n"
        "    def odd(data, *rest):\n"
        f"        {body}\n"
        "        return draw(data, *rest)\n"
        "    sprites.draw_sprite = odd\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(REPOSITORY)]))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "could not be decoded (signal 11)"),
        ("any(iter(int, 1))", "could not be decoded (more than 1 s of CPU time)"),
        ("raise RuntimeError('odd')", "could not be decoded (RuntimeError: odd)"),
    ],
    ids=["dies", "never ends", "fails"],
)
def test_a_clip_that_ends_its_decoder_costs_only_itself(odd_dataset, tmp_path, monkeypatch, body, says):  # fmt: skip
    rows = read_index((odd_dataset / "index/train.parquet").read_bytes(), "train").to_pylist()
    hostile = max(rows, key=lambda row: row["video_bytes"])
    same = [row["key"] for row in rows if row["video_bytes"] == hostile["video_bytes"]]
    monkeypatch.setattr("prep.sampled_clips._CPU_SECONDS", 1)
    drawing_otherwise(tmp_path, monkeypatch, f"if len(data) == {hostile['video_bytes']}: {body}")
    storage = Storage(str(odd_dataset))
    report = make_report(storage, samples=13, seed=3)
    problems = {clip.row["key"]: clip.problem for clip in report.clips if clip.problem}
    assert problems == dict.fromkeys(same, says)
    assert [clip.row["key"] for clip in report.clips if clip.sprite is None] == list(problems)
    page = report_page(report, 3)
    assert f"{hostile['key']} {says}" in html.unescape(page.decode())
    assert {clip["problem"] for clip in data_of(page.decode())["clips"]} == {"", says}
    assert report_page(make_report(storage, samples=13, seed=3), 3) == page


def test_a_decoder_that_waits_for_ever_is_given_up(odd_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("prep.sampled_clips._WALL_SECONDS", 1.0)
    drawing_otherwise(tmp_path, monkeypatch, "time.sleep(3600)")
    (clip,) = make_report(Storage(str(odd_dataset)), samples=1, seed=0).clips
    assert clip.problem == "could not be decoded (no result in 1 s)"


def test_a_full_temporary_directory_is_named_with_the_way_out(odd_dataset, monkeypatch):
    monkeypatch.setattr("prep.sampled_clips._Looks._file", lambda *_: Path("/dev/full"))
    full = re.escape(f"{tempfile.gettempdir()} cannot hold the clips that are to be drawn")
    with pytest.raises(StorageError, match=rf"^{full} \(No space left on device\); set TMPDIR"):
        make_report(Storage(str(odd_dataset)), samples=1, seed=0)


def test_clips_are_decoded_in_other_processes_only(odd_dataset, monkeypatch):
    def here(*_):
        raise AssertionError("decoded in the process of the report")

    monkeypatch.setattr(clip_sprite, "draw_sprite", here)
    monkeypatch.setattr(av, "open", here)
    report = make_report(Storage(str(odd_dataset)), samples=4, seed=0)
    assert all(clip.sprite for clip in report.clips)


def test_the_page_is_the_same_each_time_and_for_each_place(odd_dataset, tmp_path, s3):
    url = s3.upload(odd_dataset, "report-odd")
    pages = []
    for storage in (Storage(str(odd_dataset)), Storage(str(odd_dataset)), Storage(url, s3.options)):
        report = make_report(storage, samples=9, seed=3)
        pages.append(report_page(report, 3).decode().replace(html.escape(url), "odd"))
    assert pages[0] == pages[1] == pages[2]
    other = report_page(make_report(Storage(str(odd_dataset)), samples=9, seed=4), 4)
    keys = [{clip["key"] for clip in data_of(page)["clips"]} for page in (pages[0], other.decode())]
    assert keys[0] != keys[1]
    assert str(odd_dataset) not in pages[0]


def test_a_missing_shard_of_a_bucket_is_shown_and_a_lost_bucket_ends(odd_dataset, tmp_path, s3):
    root = Path(shutil.copytree(odd_dataset, tmp_path / "root"))
    (root / "val/val-000000.tar").unlink()
    url = s3.upload(root, "report-gone")
    quick = RetryPolicy(patience_seconds=0.0)
    report = make_report(Storage(url, s3.options, retry=quick), samples=13, seed=0)
    assert {clip.split for clip in report.clips if clip.problem} == {"val"}

    class Lost(Storage):
        def read_range(self, path, start, end, *, etag=None):
            self.options["endpoint"] = "http://127.0.0.1:1"
            self._reads = None
            return super().read_range(path, start, end, etag=etag)

    with pytest.raises(StorageError, match="cannot be reached"):
        make_report(Lost(url, s3.options, retry=quick), samples=4, seed=0)


def test_nothing_of_the_data_is_markup(odd_dataset):
    page = report_page(make_report(Storage(str(odd_dataset)), samples=20, seed=0), 0).decode()
    assert SCRIPT not in page
    assert CLOSING not in page
    assert html.escape(SCRIPT, quote=True) in page
    assert {clip["label"] for clip in data_of(page)["clips"]} == set(CLASSES[:3])
    assert page.count("<script") == 2  # the data and ours
    found = Attributes()
    found.feed(page)
    assert {value for name, value in found.seen if name in ("src", "href", "action")} <= {
        "data:,", "#warnings", "#clips", "#numbers", "#classes", "#rows", "#origin"
    }  # fmt: skip
    assert not [name for name, _ in found.seen if name == "style" or name.startswith("on")]


class Attributes(HTMLParser):
    """Collects the attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str | None]] = []

    def handle_starttag(self, _tag, attrs):
        self.seen += attrs


@given(st.text(max_size=40))
def test_text_and_json_cannot_leave_their_place(value):
    escaped = text(value)
    assert not set("<>\"'") & set(escaped)
    assert "\x1b" not in escaped
    inside = script_json({"value": value})
    assert not set("<>&") & set(inside)
    assert inside.isascii()
    assert json.loads(inside) == {"value": value}


def test_the_policy_allows_our_script_and_style_and_no_request(motion_dataset):
    import base64
    import hashlib

    page = report_page(make_report(Storage(str(motion_dataset)), samples=0, seed=0), 0).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        code = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert page.index("Content-Security-Policy") < page.index("<style")


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("page.txt", "must end in .html"),
        ("nowhere/page.html", "its folder does not exist"),
        ("root/page.html", "lies inside the dataset"),
        ("folder.html", "it is a folder"),
    ],
)
def test_a_place_that_cannot_be_is_refused_before_anything_is_read(tmp_path, out, said):
    (tmp_path / "root").mkdir()
    (tmp_path / "folder.html").mkdir()
    done = run_kprep("report", tmp_path / "root", tmp_path / out, check=False)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, StorageError), (errno.EACCES, UsageError)]
)
def test_a_page_that_cannot_be_written_is_a_mistake_or_a_failure(
    odd_dataset, tmp_path, monkeypatch, number, kind
):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("prep.report_command.write_atomic", refuse)
    out = tmp_path / "page.html"
    done = CliRunner().invoke(report_command, [str(odd_dataset), str(out), "--samples", "0"])
    assert type(done.exception) is kind
    assert f"{out} cannot be written" in str(done.exception)


def test_a_damaged_index_is_one_sentence(odd_dataset, tmp_path):
    root = Path(shutil.copytree(odd_dataset, tmp_path / "root"))
    (root / "index/val.parquet").write_bytes(b"PAR1")
    done = run_kprep("report", root, tmp_path / "page.html", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "index/val.parquet is not the file that the manifest lists" in done.stderr
    assert not (tmp_path / "page.html").exists()


def lines_executed(call) -> int:
    """Count the lines of prep that Python runs in this thread."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if "/prep/" not in frame.f_code.co_filename:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


class Counting(Storage):
    """Counts requests and bytes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.whole: list[str] = []
        self.ranges = 0

    def read(self, path, *most):
        self.whole.append(path)
        return super().read(path, *most)

    def read_range(self, path, start, end, *, etag=None):
        self.ranges += 1
        return super().read_range(path, start, end, etag=etag)


@pytest.mark.slow
def test_240000_clips_cost_no_more_steps_than_a_tenth_of_them(tmp_path):
    """Columns are summed by pyarrow and numpy: Python runs no line for each row."""
    pages, steps = {}, {}
    for count in (24_000, 240_000):
        storage = Counting(str(large_dataset(tmp_path / str(count), count)))

        def both(storage=storage, count=count):
            pages[count] = report_page(make_report(storage, samples=50, seed=0), 0)

        steps[count] = lines_executed(both)
        assert sorted(storage.whole) == [
            "index/train.parquet",
            "ledger/train.parquet",
            "manifest.json",
        ]
        assert storage.ranges == 50
    # the manifest's lines grow with its shards, 60 instead of 6
    assert steps[240_000] < steps[24_000] + 60 * 60, steps
    assert len(pages[240_000]) < len(pages[24_000]) * 1.2
    text = pages[240_000].decode()
    assert "<dd>240,000</dd>" in text
    clips = data_of(text)["clips"]
    assert len({clip["labelIndex"] for clip in clips}) == 50  # of 400 classes: no class twice
    assert {clip["problem"] for clip in clips} <= {f"cannot be read from train/train-{n:06d}.tar" for n in range(60)}  # fmt: skip
