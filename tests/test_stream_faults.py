"""Reads from a real S3 server through a proxy that breaks them: the same sequence, or one clear error."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import obstore
import pytest
from fault_proxy import by_rate, fault_proxy, script
from processes import descendants, is_running
from stream_datasets import make_dataset, sequence, without_gop_index

from prep.downloads import growing_wait
from prep.errors import (
    BadClipError,
    DatasetError,
    MissingBucketError,
    ReplacedError,
    StorageError,
    UsageError,
)
from prep.format import iter_records, read_index
from prep.range_requests import MOST_CONNECTIONS
from prep.storage import RetryPolicy, Storage
from stream import clip_loader
from stream.bad_clips import substitute
from stream.order import ORDER_VERSION
from stream.ranges import ByteRange, ClipRequest, batch_ranges
from stream.reads import ClipReader

DATA = bytes(np.random.default_rng(1).integers(0, 256, 400_000, dtype=np.uint8))
FAST = {"timeout": "3s", "read_timeout": "400ms", "connect_timeout": "1s"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("faults"), 12)


@pytest.fixture(scope="module")
def bucket(root, s3) -> str:
    obstore.put(s3.store("faults"), "x.tar", DATA)
    return s3.upload(root, "faults")


@pytest.fixture
def proxy(bucket, s3):
    with fault_proxy(s3.endpoint) as running:
        yield running


def through(s3, proxy, **more):
    """Storage options that lead through the proxy."""
    return {**s3.options, "endpoint": proxy.endpoint, **more}


def storage(s3, proxy, url="s3://kprep/faults", options=None, **policy):
    options = through(s3, proxy, **(options or {}))
    return Storage(url, options, RetryPolicy(first_wait_seconds=0.01, **policy))


def loader(root, **more):
    return clip_loader(
        str(root),
        **{"split": "train", "batch_size": 4, "seed": 3, "layout": "yuv420", **more},
    )


class Clock:
    """Seconds that pass only by sleeping."""

    def __init__(self):
        self.now, self.waits = 0.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.waits.append(seconds)
        self.now += seconds


# -- one read ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "continued"),
    [
        ("reset", True),
        ("close", True),
        ("stall", True),
        ("truncate-206", True),
        ("truncate-200", False),  # refused before its body: the answer to a range must be a part
        ("503", False),
        ("429", False),
        ("delay", None),
    ],
)
def test_a_broken_body_continues_where_it_stopped(s3, proxy, fault, continued):
    proxy.choose = script(fault, *([fault] if continued else []))
    options = {"client_options": FAST} if fault == "stall" else {}
    one = storage(s3, proxy, options=options)
    assert one.read_range("x.tar", 1000, 301_000) == DATA[1000:301_000]
    starts = [int(get.range.removeprefix("bytes=").split("-")[0]) for get in proxy.gets]
    if continued is None:
        assert starts == [1000]
    elif continued:  # half arrives each time: the rest is asked for, then the rest of the rest
        assert starts == [1000, 151_000, 226_000]
    else:
        assert starts == [1000, 1000]


def test_a_whole_object_is_continued_on_its_version(s3, proxy):
    proxy.choose = script("reset")
    assert storage(s3, proxy).read("x.tar") == DATA
    assert [get.range for get in proxy.gets] == [None, "bytes=200000-399999"]


def test_an_answer_that_begins_elsewhere_is_asked_for_again(s3, proxy, monkeypatch):
    real, answers = obstore.get, []

    def get(store, path, options=None):
        answers.append(path)
        elsewhere = {"range": (100, len(DATA))}
        return real(store, path, options=elsewhere if len(answers) == 1 else options)

    monkeypatch.setattr(obstore, "get", get)
    assert storage(s3, proxy).read("x.tar") == DATA
    assert len(answers) == 2


def test_an_object_replaced_between_the_halves_is_an_error_that_names_it(s3, proxy):
    store = s3.store("faults")
    obstore.put(store, "y.tar", DATA)

    def choose(number, path):
        if number == 1:
            obstore.put(store, "y.tar", DATA[::-1])
        return "reset" if number == 0 else None

    proxy.choose = choose
    with pytest.raises(ReplacedError, match=r"faults/y\.tar was replaced"):
        storage(s3, proxy).read("y.tar")
    assert len(proxy.gets) >= 2


def test_a_precondition_in_an_errors_text_is_a_replaced_object(s3, proxy):
    from obstore.exceptions import GenericError

    one = storage(s3, proxy)
    with pytest.raises(ReplacedError, match="x.tar was replaced"), one._errors("x.tar"):
        raise GenericError("HTTP error: body: Precondition Failed")


def test_patience_ends_in_one_error_that_names_the_object(s3, proxy):
    clock = Clock()
    proxy.choose = lambda number, path: "503"
    one = storage(s3, proxy, patience_seconds=60, clock=clock, sleep=clock.sleep, draw=lambda: 0.0)
    with pytest.raises(StorageError, match=r"faults/x\.tar .*503.*given up after 6\d s") as error:
        one.read_range("x.tar", 0, 10)
    assert not isinstance(error.value, ReplacedError)
    # half of 0.01, doubled up to half of 5 s
    assert clock.waits[:3] == [0.005, 0.01, 0.02]
    assert max(clock.waits) == 2.5
    assert len(proxy.gets) == len(clock.waits) + 1


def test_patience_counts_from_the_last_byte(s3, proxy):
    clock = Clock()
    proxy.choose = script(*["503"] * 4, "reset", *["503"] * 4, "reset", *["503"] * 4)
    one = storage(s3, proxy, patience_seconds=0.1, clock=clock, sleep=clock.sleep, draw=lambda: 0.0)
    assert one.read_range("x.tar", 0, 100_000) == DATA[:100_000]
    assert clock.now > 0.1


def test_waits_are_spread(s3):
    policy = RetryPolicy(first_wait_seconds=1, longest_wait_seconds=6)
    waits = [policy.wait_seconds(failures) for failures in (1, 2, 3, 4, 9) for _ in range(50)]
    limits = np.repeat([1, 2, 4, 6, 6], 50)
    assert np.all((np.array(waits) >= limits / 2) & (np.array(waits) < limits))
    assert len(set(waits)) == 250
    assert 3 <= policy.wait_seconds(1_000_000) < 6  # a patience of days


def test_a_wait_grows_to_its_limit_and_no_further():
    waits = [growing_wait(0.5, 100, failures, factor=4) for failures in (1, 2, 3, 4, 5, 600, 10**9)]
    assert waits == [0.5, 2, 8, 32, 100, 100, 100]


@pytest.mark.parametrize(
    ("change", "url", "words"),
    [
        ({"secret_access_key": "wrong"}, "s3://kprep/faults", "SignatureDoesNotMatch"),
        ({"access_key_id": "nobody"}, "s3://kprep/faults", "InvalidAccessKeyId"),
        ({}, "s3://nobody-has-this/faults", "bucket does not exist"),
        ({}, "s3://kprep/faults/nowhere", "does not exist"),
    ],
)
def test_what_cannot_succeed_is_not_tried_again(s3, proxy, change, url, words):
    with pytest.raises(StorageError, match=words):
        Storage(url, through(s3, proxy, **change)).read_range("x.tar", 0, 10)
    assert len(proxy.requests) == 1


def test_mistakes_when_a_dataset_is_opened(s3, proxy):
    with pytest.raises(MissingBucketError, match="s3://nobody-has-this/.* bucket does not exist"):
        loader("s3://nobody-has-this/faults", storage_options=through(s3, proxy))
    with pytest.raises(DatasetError, match="holds no manifest"):
        loader("s3://kprep/nowhere", storage_options=through(s3, proxy))
    wrong = {"secret_access_key": "wrong"}
    with pytest.raises(StorageError, match="cannot be reached.*40"):
        loader("s3://kprep/faults", storage_options=through(s3, proxy, **wrong))
    with pytest.raises(StorageError, match="given up after"):
        loader(
            "s3://kprep/faults",
            storage_options={**through(s3, proxy), "endpoint": "http://127.0.0.1:9"},
            storage_patience_seconds=0.3,
        )


# -- a whole epoch -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_the_sequence_through_faults_is_that_of_the_local_directory(
    root, bucket, s3, proxy, workers
):
    expected = sequence(loader(root, clips_per_video=6))
    proxy.choose = by_rate(
        7, reset=0.05, status_503=0.05, status_429=0.02, stall=0.02, delay=0.05, close=0.03,
        truncate_200=0.03, truncate_206=0.03,
    )  # fmt: skip
    options = through(s3, proxy, client_options=FAST)
    one = loader(bucket, clips_per_video=6, num_workers=workers, storage_options=options)
    assert sequence(one) == expected
    one.set_epoch(1)
    other = loader(root, clips_per_video=6)
    other.set_epoch(1)
    assert sequence(one) == sequence(other)
    assert len(set(proxy.faults)) >= 5, proxy.faults
    assert not one.bad_clip_summary().clips


def test_a_shard_changed_in_mid_epoch_is_named(root, s3, proxy):
    url = s3.upload(root, "changing-faults")
    one = loader(url, batch_size=2, clips_per_video=4, storage_options=through(s3, proxy))
    batches = iter(one)
    next(batches)
    shard = one.stream.index.clip(0).shard
    # another last byte, which is padding: nothing but the ETag, here the content's MD5, tells
    obstore.put(s3.store("changing-faults"), shard, (root / shard).read_bytes()[:-1] + b"x")
    with pytest.raises(ReplacedError, match=f"{shard} was replaced"):
        list(batches)


def test_a_server_that_comes_back_costs_nothing_but_time(root, bucket, s3, proxy):
    expected = sequence(loader(root))
    one = loader(bucket, batch_size=4, storage_options=through(s3, proxy))
    found = []

    def batches():
        for number, batch in enumerate(one):
            if number == 0:
                proxy.down = True
                threading.Timer(0.6, lambda: setattr(proxy, "down", False)).start()
            yield batch

    found = sequence(batches())
    assert found == expected


@pytest.mark.parametrize("policy", ["raise", "substitute"])
def test_a_server_that_stays_away_stops_the_run_and_is_no_bad_clip(bucket, s3, proxy, policy):
    one = loader(
        bucket, storage_options=through(s3, proxy), storage_patience_seconds=0.5, bad_clips=policy
    )
    proxy.down = True
    with pytest.raises(StorageError, match="train-00000.*given up after"):
        sequence(one)
    assert not one.bad_clip_summary().clips


LOOP = """
import json, sys
from stream import clip_loader

def main():
    one = clip_loader(sys.argv[1], split="train", batch_size=2, num_workers=2, layout="yuv420",
                      clips_per_video=500, storage_options=json.loads(sys.argv[2]))
    for number, _ in enumerate(one):
        if number == 4:
            print("running", flush=True)

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("stalled", [False, True])
def test_ctrl_c_ends_the_workers(bucket, s3, proxy, tmp_path, stalled):
    """As a terminal sends it, to every process; also while all reads wait for a dead connection."""
    script = tmp_path / "loop.py"
    script.write_text(LOOP)
    with subprocess.Popen(
        [sys.executable, script, bucket, json.dumps(through(s3, proxy))],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "running\n"
        helpers = descendants(process.pid)
        assert len(helpers) >= 3  # fork server and two workers
        if stalled:
            proxy.choose = lambda number, path: "stall"
            until = time.monotonic() + 600
            while proxy.in_flight < 2 and time.monotonic() < until:
                time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        errors = process.communicate(timeout=600)[1]
    assert process.returncode in (1, 130, -signal.SIGINT)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    until = time.monotonic() + 600
    while any(is_running(pid) for pid in helpers) and time.monotonic() < until:
        time.sleep(0.05)
    assert not [pid for pid in helpers if is_running(pid)]


def test_requests_in_flight_are_many_and_bounded(root, bucket, s3, proxy):
    proxy.latency_seconds = 0.05
    one = loader(bucket, batch_size=40, clips_per_video=4, storage_options=through(s3, proxy))
    before = len(proxy.gets)
    proxy.most_in_flight = 0
    sequence(one)
    assert 2 <= proxy.most_in_flight <= MOST_CONNECTIONS
    assert len(proxy.gets) - before < 40


# -- which bytes ---------------------------------------------------------------------------------


def request(clip, *frames):
    return ClipRequest(clip, np.array(frames))


def test_views_of_a_clip_are_planned_together(root):
    index = loader(root).stream.index
    clip = next(index.clip(row) for row in range(12) if index.num_frames[row] > 40)
    ends = [clip.video_offset + int(offset) for offset in clip.gop_offsets]
    first, last = request(clip, 0, 15), request(clip, 32, 40)
    gops = len(clip.gop_crc32)
    assert gops == 3
    union = (ends[1] - ends[0] + ends[3] - ends[2]) / clip.video_bytes
    together = batch_ranges([first, last])
    if union > 0.6:
        assert together == [ByteRange(clip.shard, ends[0], ends[3])]
    else:
        assert together == [
            ByteRange(clip.shard, ends[0], ends[1]),
            ByteRange(clip.shard, ends[2], ends[3]),
        ]
    # touching runs of two views are one request, and a view alone is read by itself
    touching = [request(clip, 0), request(clip, 16)]
    assert batch_ranges(touching) == [ByteRange(clip.shard, ends[0], ends[2])]
    assert batch_ranges([last]) == [ByteRange(clip.shard, ends[2], ends[3])] == last.ranges


def fake_clip(gop_bytes, offset=0, row=0):
    from types import SimpleNamespace

    offsets = np.concatenate([[0], np.cumsum(gop_bytes)])
    return SimpleNamespace(
        row=row, shard="s", video_offset=offset, video_bytes=int(offsets[-1]) + 100,
        codec_config=b"", gop_frames=16, gop_offsets=offsets,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("middle", "expected"),
    [
        (100, [(0, 2100)]),  # views need 2000 of 2200 bytes, 0.91: one range
        (1000, [(0, 3000)]),  # 2000 of 3100, 0.65: one range
        (1400, [(0, 1000), (2400, 3400)]),  # 2000 of 3500, 0.57: two
    ],
)
def test_six_tenths_of_a_clip_make_one_range(middle, expected):
    clip = fake_clip([1000, middle, 1000])
    found = batch_ranges([request(clip, 0), request(clip, 32)])
    assert [(part.start, part.end) for part in found] == expected
    # one view with the same frames never reads what it does not need
    assert len(batch_ranges([request(clip, 0, 32)])) == 2


def test_neighbours_within_the_gap_are_one_request_and_order_is_that_of_use():
    near, far, last = (fake_clip([500], offset, row) for row, offset in enumerate((0, 5000, 1000)))
    requests = [request(far, 0), request(near, 0), request(last, 0)]
    spans = lambda gap: [part[1:] for part in batch_ranges(requests, gap=gap)]  # noqa: E731
    assert spans(0) == [(5000, 5500), (0, 500), (1000, 1500)]
    assert spans(500) == [(5000, 5500), (0, 1500)]
    assert batch_ranges(requests, whole={1})[0][1:] == (5000, 5600)
    assert batch_ranges([]) == []


def test_views_kept_together_cost_one_request_a_clip(root, bucket, s3, proxy):
    one = loader(
        bucket,
        clips_per_video=5,
        batch_size=5,
        grouping="together",
        storage_options=through(s3, proxy),
    )
    before = len(proxy.gets)
    clips = len(sequence(one)) // 5
    assert len(proxy.gets) - before == clips
    assert sequence(one) == sequence(
        loader(root, clips_per_video=5, batch_size=5, grouping="together")
    )


def test_the_first_clip_is_decoded_while_the_last_is_on_its_way(bucket, s3, proxy, monkeypatch):
    """All ranges of a batch are asked for, then each is waited for where its clip is decoded."""
    from stream.decode import ClipDecoder

    monkeypatch.setattr("stream.reads.REMOTE_GAP_BYTES", 0)
    one = loader(bucket, storage_options=through(s3, proxy))
    events = []
    real_begin, real_decode = Storage.begin_range, ClipDecoder.decode

    def begin_range(self, path, start, end, **more):
        events.append("asked")
        body = real_begin(self, path, start, end, **more)
        return lambda: events.append("taken") or body()

    def decode(self, *arguments):
        events.append("decoded")
        return real_decode(self, *arguments)

    monkeypatch.setattr(Storage, "begin_range", begin_range)
    monkeypatch.setattr(ClipDecoder, "decode", decode)
    assert len(next(iter(one))) == 4
    assert events == ["asked"] * 4 + ["taken", "decoded"] * 4


def test_the_next_batch_is_read_while_this_one_is_decoded(root, bucket, s3, proxy, monkeypatch):
    """Where batches come in turn, the clips of the next ones are asked for before this one's decoding."""
    one = loader(bucket, batch_size=2, storage_options=through(s3, proxy))
    expected = sequence(loader(root, batch_size=2))
    begun = []
    real = type(one.stream)._begin
    monkeypatch.setattr(
        type(one.stream), "_begin", lambda self, at: begun.append(at.step) or real(self, at)
    )
    seen = [list(begun) for _ in one]
    assert seen == [[0], *[[0, 1, 2, 3, 4]] * 4]  # all of them are fewer than 48 clips
    assert sequence(one) == expected
    options = {"num_workers": 2, "storage_options": through(s3, proxy)}
    assert sequence(loader(bucket, batch_size=2, **options)) == expected


# -- bad clips -----------------------------------------------------------------------------------


def damage(root: Path, *numbers: int) -> list:
    """Spoil the payload of these clips, of those that have 16 frames, all over; return their records."""
    data = (root / "index/train.parquet").read_bytes()
    records = [r for r in iter_records(read_index(data, "i")) if r.num_frames >= 16]
    for number in numbers:
        record = records[number]
        with (root / record.shard).open("r+b") as file:
            for at in range(record.video_offset, record.video_offset + record.video_bytes, 40):
                file.seek(at)
                file.write(b"\xa5")
    return [records[number] for number in numbers]


def spoil_last_gop(root: Path, number: int):
    """Change a byte of the last group of pictures of a clip; return its record."""
    data = (root / "index/train.parquet").read_bytes()
    record = list(iter_records(read_index(data, "i")))[number]
    with (root / record.shard).open("r+b") as file:
        file.seek(record.video_offset + record.gop_offsets[-1] - 20)
        file.write(b"\xa5\x5a")
    return record


@pytest.fixture
def copy(root, tmp_path) -> Path:
    return Path(shutil.copytree(root, tmp_path / "root"))


def test_golden_substitutes_of_order_version_1():
    """These numbers never change while ORDER_VERSION is 1: resumed runs depend on them."""
    assert ORDER_VERSION == 1
    drawn = [substitute("f" * 64, 3, 1, 17, attempt, 240_000) for attempt in (1, 2)]
    assert drawn == [2835, 170_902]


@pytest.mark.parametrize(
    ("gops", "epoch"), [(True, 0), (False, 0), (True, 1)], ids=["gops", "container", "epoch 1"]
)
def test_a_substitute_is_a_function_of_epoch_and_position(root, copy, gops, epoch):
    if not gops:
        without_gop_index(copy)
    first, second = damage(copy, 1, 6)
    whole = loader(root, clips_per_video=3)
    one = loader(copy, clips_per_video=3, bad_clips="substitute")
    whole.set_epoch(epoch)
    one.set_epoch(epoch)
    clean, found = sequence(whole), sequence(one)
    bad = {first.key, second.key}
    assert len(found) == len(clean)
    for position, (before, after) in enumerate(zip(clean, found, strict=True)):
        if before[0] not in bad:
            assert after == before
            continue
        stream, attempt, key = one.stream, 0, before[0]
        while key in bad:  # worked out here a second time
            attempt += 1
            place = (3, epoch, position, attempt)
            drawn = substitute(stream.split.fingerprint, *place, len(stream.rows))
            key = stream.index.key(int(stream.rows[drawn]))
        assert (after[0], after[1]) == (key, before[1])
    summary = one.bad_clip_summary()
    assert set(summary.clips) == bad
    assert summary.occurrences >= sum(clip[0] in bad for clip in clean)
    assert summary.clips[first.key].shard == first.shard
    assert summary.clips[first.key].offset == first.video_offset
    assert first.key in str(summary)
    assert one.state_dict()["bad_clips"] == "substitute"
    with pytest.raises(UsageError, match="bad_clips was substitute"):
        loader(copy, clips_per_video=3).load_state_dict(one.state_dict())


@pytest.mark.slow
def test_ranks_and_workers_get_the_same_substitutes(copy):
    damage(copy, 0, 4, 5)
    whole = sequence(loader(copy, batch_size=4, bad_clips="substitute"))
    assert sequence(loader(copy, batch_size=4, bad_clips="substitute", num_workers=2)) == whole
    parts = [
        sequence(loader(copy, batch_size=2, rank=rank, world_size=2, bad_clips="substitute"))
        for rank in range(2)
    ]
    steps = [part[i : i + 2] for i in range(0, len(parts[0]), 2) for part in parts]
    assert [clip for step in steps for clip in step] == whole


def test_a_damaged_view_costs_its_neighbours_of_the_clip_nothing(root, copy):
    """Views that are decoded in one pass are tried one by one when it fails: only those that need
    the damaged group of pictures have substitutes, in batches of any size."""
    record = spoil_last_gop(copy, 3)
    options = {"frames": 4, "clips_per_video": 6, "grouping": "together"}
    clean = sequence(loader(root, **options))
    hurt = {
        number for number, (key, _, start, _) in enumerate(clean)
        if key == record.key and start + 3 >= (record.num_frames - 1) // 16 * 16
    }  # fmt: skip
    assert 0 < len(hurt) < sum(key == record.key for key, *_ in clean)
    found = sequence(loader(copy, **options, bad_clips="substitute"))
    assert {n for n, (a, b) in enumerate(zip(clean, found, strict=True)) if a != b} == hurt
    for batch_size in (1, 4):
        one = loader(copy, **options, batch_size=batch_size, bad_clips="substitute")
        both = list(zip(sequence(one), found, strict=False))
        assert len(both) > max(hurt)
        assert all(mine == other for mine, other in both)


def test_an_evaluation_loses_the_views_that_are_damaged_and_no_others(root, copy):
    """In batches of any size, and the clip is named once in each that lost one."""
    record = spoil_last_gop(copy, 3)
    options = {"mode": "eval", "frames": 4, "clips_per_video": 5}
    clean = sequence(loader(root, **options))
    sound = [
        (key, *rest) for key, *rest in clean
        if key != record.key or rest[1] + 3 < (record.num_frames - 1) // 16 * 16
    ]  # fmt: skip
    assert 0 < len(clean) - len(sound) < 5
    for batch_size in (1, 2, 5, 7):
        one = loader(copy, **options, batch_size=batch_size, bad_clips="substitute")
        batches = list(one)
        assert sequence(batches) == sound
        assert all(len({clip.key for clip in batch.bad_clips}) == len(batch.bad_clips)
                   for batch in batches)  # fmt: skip
        assert list(one.bad_clip_summary().clips) == [record.key]
        assert record.key in one.unscored


def test_the_default_is_to_raise_with_shard_key_and_place(copy):
    (record,) = damage(copy, 2)
    with pytest.raises(BadClipError, match=f"{record.shard}: clip {record.key} is damaged at byte"):
        sequence(loader(copy, clips_per_video=2))


def test_a_budget_ends_the_run(copy):
    damage(copy, 0, 1, 2)
    one = loader(copy, clips_per_video=4, bad_clips="substitute", bad_clip_limit=2)
    with pytest.raises(DatasetError, match=r"3 different clips are bad.*bad_clip_limit \(2\)"):
        sequence(one)


def test_a_dataset_without_a_sound_clip_ends_too(copy):
    damage(copy, *range(11))
    with pytest.raises(BadClipError, match="16 substitutes"):
        sequence(loader(copy, bad_clips="substitute"))


@pytest.mark.parametrize("layout", ["rgb", "yuv420"])
def test_an_evaluation_leaves_bad_clips_out_and_lists_them(root, copy, layout):
    options = {"mode": "eval", "clips_per_video": 2, "batch_size": 2, "layout": layout}
    first, second = damage(copy, 3, 4)
    one = loader(copy, **options, bad_clips="substitute")
    bad = {first.key, second.key}
    keys, listed = [], []
    for batch in one:
        keys += batch.key
        listed += [clip.key for clip in batch.bad_clips]
    clean = [clip[0] for clip in sequence(loader(root, **options))]
    assert keys == [key for key in clean if key not in bad]
    # a batch that lost all of its clips is not yielded; the loader's account has it all the same
    assert set(one.bad_clip_summary().clips) == bad
    assert bad < set(one.unscored)
    with pytest.raises(BadClipError):
        sequence(loader(copy, **options))


def test_a_read_that_was_damaged_on_its_way_is_repeated(root, monkeypatch):
    """The first answer of each range has a flipped bit, the second is sound: no bad clip."""
    expected = sequence(loader(root))
    seen = set()
    real = Storage.read_range

    def read_range(self, path, start, end, **more):
        body = bytearray(real(self, path, start, end, **more))
        if (path, start, end) not in seen:
            seen.add((path, start, end))
            body[len(body) // 2] ^= 1
        return memoryview(body)

    monkeypatch.setattr(Storage, "read_range", read_range)
    one = loader(root, bad_clips="substitute")
    assert sequence(one) == expected
    assert not one.bad_clip_summary().clips


def test_a_second_reading_is_of_the_pinned_version():
    """Else a shard that was replaced would look like a clip that is bad."""
    asked = []
    storage = SimpleNamespace(read_range=lambda *place, etag: asked.append((*place, etag)))
    request = SimpleNamespace(ranges=[ByteRange("a.tar", 2, 4)])
    ClipReader(storage, {"a.tar": "v"}).fresh_parts(request)
    assert asked == [("a.tar", 2, 4, "v")]


# -- ranks ---------------------------------------------------------------------------------------

RANK = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import torch, torch.distributed as dist
from stream_datasets import sequence
from stream import clip_loader

def main():
    rank = int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=4)
    one = clip_loader(sys.argv[4], split="train", batch_size=1, seed=3, layout="yuv420", clips_per_video=4,
                      bad_clips="substitute", storage_options=json.loads(sys.argv[5]))
    steps, epoch, found = 0, 0, []
    while steps < 200:
        one.set_epoch(epoch)
        for batch in one:
            together = torch.ones(1)
            dist.all_reduce(together)  # hangs where a rank has fewer steps
            assert together.item() == 4
            steps += 1
            found += batch.key
            if steps == 200:
                break
        epoch += 1
    summary = one.bad_clip_summary()
    print(json.dumps([steps, epoch, one.state_dict(), found, sorted(summary.clips), summary.occurrences]))
    dist.destroy_process_group()

if __name__ == "__main__":
    main()
"""


def run_ranks(tmp_path, url, options, timeout=300):
    """Run the script above on four ranks; return the exit code, output and errors of each."""
    script_path = tmp_path / "rank.py"
    script_path.write_text(RANK)
    started = [
        subprocess.Popen(
            [sys.executable, script_path, Path(__file__).parent, str(rank), tmp_path / "meet", url, json.dumps(options)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(4)
    ]  # fmt: skip
    try:
        return [(*one.communicate(timeout=timeout), one.returncode) for one in started]
    finally:
        for one in started:
            one.kill()
            one.wait()


@pytest.mark.slow
def test_four_ranks_with_two_shards_and_a_bad_clip_keep_step(root, copy, s3, tmp_path):
    (record,) = damage(copy, 5)
    url = s3.upload(copy, "ranks")
    with fault_proxy(s3.endpoint) as proxy:
        done = run_ranks(tmp_path, url, through(s3, proxy))
        assert [code for *_, code in done] == [0] * 4, done
        heads = [r for r in proxy.requests if r.method == "HEAD" and r.path.endswith(".tar")]
        assert len(heads) == len({r.path for r in heads}) == 2  # rank 0 pinned for all
    results = [json.loads(out) for out, *_ in done]
    steps, epochs, state, *_ = results[0]
    assert steps == 200
    assert all(result[:3] == [steps, epochs, state] for result in results)
    assert {key for result in results for key in result[4]} == {record.key}
    assert sum(result[5] for result in results) >= epochs - 1
    keys = [key for step in zip(*(result[3] for result in results), strict=True) for key in step]
    assert record.key not in keys
    expected = []
    one = loader(copy, clips_per_video=4, bad_clips="substitute")
    for epoch in range(epochs):
        one.set_epoch(epoch)
        expected += [key for batch in one for key in batch.key]
    assert keys == expected[: len(keys)]


@pytest.mark.slow
def test_what_rank_0_meets_while_pinning_reaches_every_rank(root, s3, tmp_path):
    url = s3.upload(root, "ranks-broken")
    shard = min((root / "train").glob("*.tar"))
    obstore.put(s3.store("ranks-broken"), f"train/{shard.name}", shard.read_bytes()[:-512])
    done = run_ranks(tmp_path, url, s3.options)
    for _, errors, code in done:
        assert code != 0
        assert f"{shard.name} has" in errors
