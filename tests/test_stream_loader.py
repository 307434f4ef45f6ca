"""The loader: one sequence for any topology, exact resume, checked bytes, equal pixels."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from copy import deepcopy as copy_of
from fractions import Fraction
from itertools import islice
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import run_kprep
from stream_datasets import make_dataset, relist, sequence, without_gop_index
from torch.utils.data import DataLoader

from prep.errors import (
    BadClipError,
    DatasetError,
    KprepError,
    ReplacedError,
    StorageError,
    UsageError,
)
from prep.format import iter_records, read_index
from prep.range_requests import MOST_CONNECTIONS
from prep.storage import Storage
from stream import (
    BatchAddress,
    ClipBatch,
    ClipLoader,
    ClipStream,
    StreamOptions,
    StreamState,
    clip_loader,
)
from stream.clip_stream import _CLIPS_AHEAD
from stream.decode import ClipDecoder
from stream.ranges import ClipRequest, runs


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("loader"))


def loader(root, **more):
    options = {
        "split": "train",
        "frames": 16,
        "batch_size": 6,
        "seed": 3,
        "layout": "yuv420",
        **more,
    }
    return clip_loader(str(root), **options)


def merged(root, ranks: int, batch: int, epoch: int = 0, workers: int = 0, **more):
    """The global sequence: step by step, rank after rank."""
    parts = []
    for rank in range(ranks):
        one = loader(
            root, rank=rank, world_size=ranks, batch_size=batch, num_workers=workers, **more
        )
        one.set_epoch(epoch)
        found = sequence(one)
        parts.append([found[i : i + batch] for i in range(0, len(found), batch)])
    assert len({len(part) for part in parts}) == 1  # equal steps on all ranks
    return [clip for step in zip(*parts, strict=True) for part in step for clip in part]


def test_what_a_batch_holds(root):
    one = loader(root, layout="rgb")
    batch = next(iter(one))
    assert batch.video.shape[:2] == (6, 16)
    assert batch.video.shape[2:] == (*batch.size.max(dim=0).values.tolist(), 3)
    assert one.class_names == ["left", "up"]
    assert set(batch.label.tolist()) <= {0, 1}
    assert repr(batch).startswith("ClipBatch(video=uint8[6, 16, ")
    height, width = batch.size[0].tolist()
    assert not batch.video[0, :, height:].any()
    assert not batch.video[0, :, :, width:].any()


def test_short_clips_stay_out_and_are_counted(root):
    one = loader(root)
    assert (one.num_clips, len(one.unscored)) == (23, 1)
    padded = loader(root, short="pad")
    assert (padded.num_clips, padded.unscored) == (24, [])
    rows = {padded.stream.index.key(row): row for row in range(24)}
    row = rows[one.unscored[0]]
    frames = padded.stream.placed.frames(padded.stream.index.clip(row), 0)
    assert frames.tolist() == [
        min(i, int(padded.stream.index.num_frames[row]) - 1) for i in range(16)
    ]
    assert any(
        key == one.unscored[0]
        for epoch in range(9)
        for key, *_ in merged(root, 1, 6, epoch, short="pad")
    )


@pytest.mark.slow
def test_ranks_and_workers_do_not_change_the_sequence(root):
    reference = merged(root, 1, 4, clips_per_video=3)
    assert len(reference) == 23 * 3 // 4 * 4
    for ranks, workers in ((1, 2), (2, 1), (4, 2)):
        assert merged(root, ranks, 4 // ranks, workers=workers, clips_per_video=3) == reference
    assert merged(root, 1, 4, epoch=1, clips_per_video=3) != reference


def test_python_hash_seed_does_not_change_the_sequence(root):
    code = (
        "import sys, hashlib; from stream import BatchAddress, clip_loader\n"
        "one = clip_loader(sys.argv[1], split='train', batch_size=4, clips_per_video=9, seed=5)\n"
        "items, stream = [], one.stream\n"
        "for e in range(10):\n"
        "  for s in range(one.steps_per_epoch):\n"
        "    rows, views = stream.items(BatchAddress(e, s, 0))\n"
        "    clips = [stream.index.clip(int(row)) for row in rows]\n"
        "    items += zip([clip.key for clip in clips], stream.placed.start_frames(e, clips, views.tolist()))\n"
        "assert len(items) >= 2000; print(hashlib.sha256(repr(items[:2000]).encode()).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code, str(root)],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("0", "1", "4711")
    }
    assert len(found) == 1


def test_accumulation_reshapes_the_same_steps(root):
    assert merged(root, 1, 2, accumulate=3) == merged(root, 1, 6)
    assert loader(root, batch_size=2, accumulate=3).steps_per_epoch == loader(root).steps_per_epoch


@pytest.mark.parametrize("batch", [1, 4, 23, 24])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_evaluation_covers_every_clip_once_unpadded(root, ranks, batch):
    found = []
    for rank in range(ranks):
        one = loader(
            root, mode="eval", clips_per_video=2, rank=rank, world_size=ranks, batch_size=batch
        )
        for step in range(one.steps_per_epoch):
            found += list(
                zip(
                    *(part.tolist() for part in one.stream.items(BatchAddress(0, step, 0))),
                    strict=True,
                )
            )
        assert len(one) <= one.steps_per_epoch
    assert len(found) == len(set(found)) == 46


def test_uneven_evaluation_iterates_on_every_rank(root):
    parts = [
        sequence(loader(root, mode="eval", rank=rank, world_size=3, batch_size=5))
        for rank in range(3)
    ]
    assert [len(part) for part in parts] == [10, 8, 5]  # 23 = 5 + 5 + 5, then 5 + 3 + 0
    assert len({key for part in parts for key, *_ in part}) == 23


def test_a_single_evaluation_clip_stands_in_the_middle(root):
    one = loader(root, mode="eval", batch_size=23)
    batch = next(iter(one))
    for key, start in zip(batch.key, batch.start_frame.tolist(), strict=True):
        row = next(row for row in range(24) if one.stream.index.key(row) == key)
        assert start == (int(one.stream.index.num_frames[row]) - 16) // 2


# -- resume --------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_at_every_step_equals_the_uninterrupted_run(root, accumulate):
    whole = merged(root, 1, 3, clips_per_video=2, accumulate=accumulate)
    steps = loader(root, batch_size=3, clips_per_video=2, accumulate=accumulate).steps_per_epoch
    for cut in range(steps + 1):
        first = loader(root, batch_size=3, clips_per_video=2, accumulate=accumulate)
        taken = list(islice(first, cut * accumulate))
        before = [key for batch in taken for key in batch.key]
        state = json.loads(json.dumps(first.state_dict()))
        assert state["step"] == cut
        second = loader(root, batch_size=3, clips_per_video=2, accumulate=accumulate)
        second.load_state_dict(state)
        second.set_epoch(0)
        assert len(second) == (steps - cut) * accumulate
        assert before + [key for key, *_ in sequence(second)] == [key for key, *_ in whole]


def test_state_counts_what_was_consumed(root):
    one = loader(root, batch_size=2, accumulate=2)
    for number, _ in enumerate(one, start=1):
        assert one.state_dict()["step"] == number // 2
    assert one.state_dict()["step"] == one.steps_per_epoch
    one.set_epoch(1)
    assert (one.state_dict()["epoch"], one.state_dict()["step"]) == (1, 0)
    assert len(json.dumps(one.state_dict())) < 1024


@pytest.mark.slow
def test_resume_with_persistent_workers_and_on_other_ranks(root):
    whole = merged(root, 1, 12, clips_per_video=4)
    one = loader(root, batch_size=12, clips_per_video=4, num_workers=2)
    iterator = iter(one)
    for _ in range(3):
        next(iterator)
    state = one.state_dict()
    assert state["step"] == 3
    one.load_state_dict(state)  # the same loader, its workers alive and ahead
    assert sequence(one) == whole[36:]
    for ranks in (2, 3, 6):
        parts = []
        for rank in range(ranks):
            other = loader(
                root, batch_size=12 // ranks, rank=rank, world_size=ranks, clips_per_video=4
            )
            other.load_state_dict(state)
            parts.append(sequence(other))
        size = 12 // ranks
        steps = len(parts[0]) // size
        assert [
            clip
            for step in range(steps)
            for part in parts
            for clip in part[step * size : step * size + size]
        ] == whole[36:]


@pytest.mark.slow
def test_the_first_batch_does_not_wait_for_the_workers(root, monkeypatch):
    """It is made in this process, once; breaking off behind it loses and repeats nothing."""
    expected = sequence(loader(root, batch_size=4))
    one = loader(root, batch_size=4, num_workers=2)
    started = []
    real = ClipLoader._loader
    monkeypatch.setattr(ClipLoader, "_loader", lambda self: started.append(self) or real(self))
    for _ in range(2):  # broken off before there are workers
        assert next(iter(one)).key == [key for key, *_ in expected[:4]]
        assert not started
    state = one.state_dict()
    one.load_state_dict(state)
    assert sequence(one) == expected[4:]
    assert len(started) == 1
    one.set_epoch(1)
    one.set_epoch(0)
    assert sequence(one) == expected


def test_iterating_again_repeats_the_whole_epoch(root):
    one = loader(root)
    state = {**one.state_dict(), "step": 2}
    one.load_state_dict(state)
    assert (len(sequence(one)), len(sequence(one))) == (6, 18)


def keys(batches) -> list[list[str]]:
    return [batch.key for batch in batches]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_iteration_keeps_the_epoch_that_it_began_with(root, workers):
    epochs = []
    for epoch in range(2):
        one = loader(root, batch_size=4)
        one.set_epoch(epoch)
        epochs.append(keys(one))
    assert epochs[0] != epochs[1]
    one = loader(root, batch_size=4, num_workers=workers)
    found = []
    for number, batch in enumerate(one):
        found.append(batch.key)
        if not number:
            one.set_epoch(1)
        place = one.state_dict()["epoch"], one.state_dict()["step"]
        assert place == ((0, number + 1) if number + 1 < one.steps_per_epoch else (1, 0))
        assert one.epoch == 1
    assert found == epochs[0]
    assert (one.state_dict()["epoch"], one.state_dict()["step"]) == (1, 0)
    assert keys(one) == epochs[1]


def test_a_state_of_an_iteration_that_another_epoch_follows_continues_it(root):
    whole = keys(loader(root, batch_size=4))
    one = loader(root, batch_size=4)
    batches = iter(one)
    next(batches)
    one.set_epoch(1)
    next(batches)
    other = loader(root, batch_size=4)
    other.load_state_dict(one.state_dict())
    assert keys(other) == whole[2:]
    del batches  # given up: the epoch that was chosen is next
    assert (one.state_dict()["epoch"], one.state_dict()["step"]) == (1, 0)


@pytest.mark.parametrize("what", ["load", "iterate"])
def test_an_iteration_that_another_has_replaced_says_so(root, what):
    whole = keys(loader(root, batch_size=4))
    one = loader(root, batch_size=4)
    old = iter(one)
    next(old)
    if what == "load":
        one.load_state_dict({**one.state_dict(), "step": 3})
    new = iter(one)
    first = next(new).key
    with pytest.raises(UsageError, match="iterate over the loader anew"):
        next(old)
    assert [first, *keys(new)] == (whole[3:] if what == "load" else whole)
    assert one.state_dict()["step"] == one.steps_per_epoch


@pytest.mark.parametrize("number", [np.int64(1), np.array(1), torch.tensor(1)])
def test_an_integer_of_any_kind_is_its_number(root, number):
    plain = {"seed": 1, "clips_per_video": 1, "shuffle_block": 1, "accumulate": 1, "rank": 1,
             "world_size": 2, "frames": 8, "batch_size": 4}  # fmt: skip
    given = {name: number * value for name, value in plain.items()}
    one, other = loader(root, **plain), loader(root, **given)
    one.set_epoch(1)
    other.set_epoch(number)
    assert sequence(one) == sequence(other)
    assert json.loads(json.dumps(other.state_dict())) == one.state_dict()
    address = BatchAddress(number, number, 0 * number)  # as a sampler of one's own may have it
    assert one.stream[BatchAddress(1, 1, 0)].start_frame.tolist() == (
        one.stream[address].start_frame.tolist()
    )


@pytest.mark.parametrize("value", [1.0, True, "1", np.float64(1), torch.tensor(1.0)])
@pytest.mark.parametrize("name", ["seed", "frames", "batch_size", "num_workers", "epoch"])
def test_what_is_no_integer_is_refused(root, name, value):
    with pytest.raises(UsageError, match=rf"{name} \(.*\) must be a whole number"):
        if name == "epoch":
            loader(root).set_epoch(value)
        else:
            loader(root, **{name: value})


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_callers_generator_is_left_alone(root, workers):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one = loader(root, num_workers=workers)
    for _ in range(2):
        list(one)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_pinned_memory_is_for_machines_with_an_accelerator(root, monkeypatch, workers):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert sequence(loader(root, num_workers=workers, pin_memory=True)) == sequence(loader(root))


@pytest.mark.slow
def test_nobody_but_the_caller_keeps_the_first_batch(root):
    one = loader(root, num_workers=1)
    batches = iter(one)
    first = weakref.ref(next(batches).video)
    next(batches)
    assert first() is None


def test_a_state_stays_small_and_is_taken_as_it_is(root):
    largest = 2**64 - 1
    one = loader(root, seed=largest, shuffle_block=largest, fps="14.99997", bad_clips="substitute")
    one.set_epoch(largest)
    assert len(json.dumps(one.state_dict())) < 1024
    one.load_state_dict(StreamState.from_json(one.state_dict()))
    assert (one.epoch, len(next(iter(one)))) == (largest, 6)


@pytest.mark.parametrize("value", [-(2**63) - 1, 2**64, 1 << 20_000], ids=["-", "+", "very long"])
def test_numbers_of_more_than_64_bits_are_refused(root, value):
    with pytest.raises(UsageError, match=r"seed \(.*\) must be at (least|most)"):
        loader(root, seed=value)
    with pytest.raises(UsageError, match=r"epoch \(.*\) must be at (least|most)"):
        loader(root).set_epoch(value)


def test_an_evaluations_state_has_its_mode_and_placement(root):
    options = {"mode": "eval", "clips_per_video": 2, "batch_size": 4}
    state = loader(root, **options).state_dict()
    with pytest.raises(UsageError, match="placement was even and is middle now"):
        loader(root, **options, placement="middle").load_state_dict(state)
    with pytest.raises(UsageError, match="mode was eval and is train now"):
        loader(root, **{**options, "mode": "train"}).load_state_dict(state)
    loader(root, placement="middle").load_state_dict(loader(root).state_dict())


def test_a_state_from_before_modes_were_in_it_continues(root):
    state = loader(root).state_dict()
    loader(root).load_state_dict({name: state[name] for name in state
                                  if name not in ("mode", "placement")})  # fmt: skip


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 4}, "seed"),
        ({"batch_size": 5}, "global_batch"),
        ({"frames": 8}, "frames"),
        ({"fps": 7.5}, "fps"),
        ({"clips_per_video": 2}, "clips_per_video"),
        ({"grouping": "together"}, "grouping"),
        ({"shuffle_block": 4}, "shuffle_block"),
        ({"short": "pad"}, "short"),
    ],
)
def test_a_state_of_another_sequence_is_refused_by_name(root, change, field):
    with pytest.raises(UsageError, match=f"{field} was"):
        loader(root, **change).load_state_dict(loader(root).state_dict())


@pytest.mark.parametrize(
    "state",
    [
        None,
        7,
        "{",
        {},
        {"version": 2},
        {"version": 1, "step": "x"},
        {"version": 1, "step": True},
        {"version": 1, "epoch": True},
        {"version": 1, "epoch": -1},
        {"version": 1, "step": 1 << 20_000},
        "[" * 100_000,
    ],
)
def test_a_state_that_is_none_is_refused(root, state):
    if isinstance(state, dict) and len(state) > 1:
        state = {**loader(root).state_dict(), **state}
    with pytest.raises(UsageError, match="state"):
        loader(root).load_state_dict(state)


def test_another_dataset_is_refused(root, tmp_path):
    state = {**loader(root).state_dict(), "fingerprint": "0" * 64}
    with pytest.raises(UsageError, match="fingerprint was"):
        loader(root).load_state_dict(state)


def test_another_writing_of_the_same_clips_is_refused(root, tmp_path):
    """The index's fingerprint and all sizes are equal; only the bytes of a shard differ."""
    state = loader(root).state_dict()
    copy = Path(shutil.copytree(root, tmp_path / "root"))
    loader(copy).load_state_dict(state)
    shard = copy / "train/train-000001.tar"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1  # padding behind the last member
    shard.write_bytes(data)
    relist(copy, "train/train-000001.tar")
    with pytest.raises(UsageError, match="objects was"):
        loader(copy).load_state_dict(state)


# -- pixels --------------------------------------------------------------------------------------


def test_fast_path_equals_the_container_path(root, tmp_path):
    """Clips of three sizes interleaved, contexts reused, five random epochs: equal pixels."""
    plain = Path(shutil.copytree(root, tmp_path / "plain"))
    without_gop_index(plain)
    for epoch in range(5):
        for frames, fps in ((16, 15), (8, 5), (1, 15)):
            fast = merged(root, 1, 6, epoch, frames=frames, fps=fps)
            assert fast == merged(plain, 1, 6, epoch, frames=frames, fps=fps)
            assert len({digest for *_, digest in fast}) > len(fast) // 2


def test_pixels_are_those_of_a_plain_decoder(root):
    one = loader(root, fps=7.5, frames=8)
    index = {
        record.key: record
        for record in iter_records(read_index((root / "index/train.parquet").read_bytes(), "i"))
    }
    for batch in one:
        for number, key in enumerate(batch.key):
            record = index[key]
            data = (root / record.shard).read_bytes()[record.video_offset :][: record.video_bytes]
            import io

            with av.open(io.BytesIO(data)) as file:
                frames = [frame.to_ndarray(format="yuv420p") for frame in file.decode(video=0)]
            start = int(batch.start_frame[number])
            expected = np.stack([frames[start + 2 * i].reshape(-1) for i in range(8)])
            assert np.array_equal(batch.video[number, :, : expected.shape[1]].numpy(), expected)


def test_only_the_gops_that_hold_the_frames_are_read(root, monkeypatch):
    one = loader(root)
    reads = []
    real = Storage.read_range
    monkeypatch.setattr(
        Storage,
        "read_range",
        lambda self, path, a, b, **kw: reads.append(b - a) or real(self, path, a, b, **kw),
    )
    for _ in one:
        pass
    whole = sum(one.stream.index.clip(int(row)).video_bytes for row in one.stream.rows)
    assert len(reads) == 18  # one request a clip: 16 frames touch one or two neighbouring GOPs
    assert sum(reads) < 0.8 * whole * 18 / 23


def decoded_requests(monkeypatch) -> list[tuple[str, int]]:
    """Return a list that grows by the key and the number of frames of each clip decoded from now on."""
    decoded, real = [], ClipDecoder.decode

    def count(self, clip, data, frames, out):
        decoded.append((clip.key, len(frames)))
        return real(self, clip, data, frames, out)

    monkeypatch.setattr(ClipDecoder, "decode", count)
    return decoded


@pytest.mark.parametrize("layout", ["yuv420", "rgb"])
@pytest.mark.parametrize("indexed", [True, False])
def test_evaluation_decodes_a_video_once_for_all_its_clips(
    root, tmp_path, monkeypatch, layout, indexed
):
    """Views that share a batch share the decoding; the pixels are those of views alone."""
    if not indexed:
        root = shutil.copytree(root, tmp_path / "root")
        without_gop_index(root)
    options = {"mode": "eval", "frames": 8, "fps": 5, "clips_per_video": 5, "layout": layout}
    alone = sequence(loader(root, batch_size=1, **options))
    decoded = decoded_requests(monkeypatch)
    together = loader(root, batch_size=10, **options)
    assert sequence(together) == alone
    keys = [key for key, *_ in alone]
    assert decoded == [(key, 5 * 8) for key in dict.fromkeys(keys)]
    decoded.clear()
    assert sequence(loader(root, batch_size=7, **options)) == alone  # a batch cuts a video in two
    assert sum(frames for _, frames in decoded) == len(keys) * 8


def test_views_that_stay_together_are_decoded_in_one_pass(root, monkeypatch):
    options = {"frames": 8, "clips_per_video": 3, "grouping": "together"}
    alone = sequence(loader(root, batch_size=1, **options))
    decoded = decoded_requests(monkeypatch)
    assert sequence(loader(root, batch_size=6, **options)) == alone
    assert decoded == [(key, 3 * 8) for key in dict.fromkeys(key for key, *_ in alone)]


def test_what_is_begun_ahead_is_asked_for_at_once():
    """A batch of 24 that is decoded, and those behind it: else workers wait for connections."""
    assert MOST_CONNECTIONS >= _CLIPS_AHEAD + 24


@pytest.mark.parametrize(("batch_size", "ahead"), [(2, 24), (20, 3), (60, 1)])
def test_reads_are_begun_48_clips_ahead_each_once(root, monkeypatch, batch_size, ahead):
    options = {"frames": 4, "clips_per_video": 20, "batch_size": batch_size}
    expected = sequence(loader(root, **options))
    stream = loader(root, **options).stream
    begun, real = [], stream._begin

    def begin(address):
        begun.append(address.step)
        return real(address)

    monkeypatch.setattr(stream, "_begin", begin)
    batches, most = [], 0
    for step in range(stream.plan.num_steps):
        batches.append(stream[BatchAddress(0, step, 0)])
        most = max(most, len(begun) - len(batches))
    assert sequence(batches) == expected
    assert begun == list(range(stream.plan.num_steps))
    assert most == min(ahead, stream.plan.num_steps - 2)
    again = stream[BatchAddress(0, 1, 0)]  # out of turn
    assert sequence([again]) == sequence([batches[1]])


def test_gops_of_several_views_are_read_once_and_in_order(root):
    clip = loader(root).stream.index.clip(0)
    views = [np.array([0, 20, 40]), np.array([8, 30, 50])]
    request = ClipRequest(clip, np.concatenate(views), 2)
    assert request.gops == sorted({frame // clip.gop_frames for view in views for frame in view})


def test_runs_and_gops_by_hand(root):
    assert runs([2, 3, 7]) == [(2, 4), (7, 8)]
    assert runs([]) == []
    clip = loader(root).stream.index.clip(0)

    assert ClipRequest(clip, np.array([0, 15])).gops == [0]
    assert ClipRequest(clip, np.array([15, 16])).gops == [0, 1]


# -- damage --------------------------------------------------------------------------------------


@pytest.fixture
def copy(root, tmp_path) -> Path:
    return Path(shutil.copytree(root, tmp_path / "root"))


@pytest.mark.parametrize("gops", [True, False], ids=["gops", "container"])
def test_a_flipped_bit_in_a_clip_is_a_bad_clip_by_name(copy, gops):
    if not gops:
        without_gop_index(copy)
    record = next(
        r
        for r in iter_records(read_index((copy / "index/train.parquet").read_bytes(), "i"))
        if r.num_frames >= 16
    )
    shard = copy / record.shard
    data = bytearray(shard.read_bytes())
    data[record.video_offset + record.video_bytes // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(BadClipError) as error:
        for epoch in range(20):
            one = loader(copy)
            one.set_epoch(epoch)
            sequence(one)
    assert record.key in str(error.value)
    assert record.shard in str(error.value)
    assert "at byte" in str(error.value)


def test_every_altered_payload_byte_is_caught(copy):
    """The whole clip decoded once with each of 60 bytes flipped: altered pixels never pass."""
    one = loader(copy, mode="eval", frames=16, batch_size=1)
    address = BatchAddress(0, 0, 0)
    record = one.stream.index.clip(int(one.stream.items(address)[0][0]))
    rows, _ = one.stream.items(address)
    frames = one.stream.placed.frames(record, one.stream.placed.start_frames(0, [record], [0])[0])
    gops = ClipRequest(record, frames).gops
    start, end = int(record.gop_offsets[gops[0]]), int(record.gop_offsets[gops[-1] + 1])
    shard = copy / record.shard
    clean = shard.read_bytes()
    for position in np.linspace(start, end - 1, 60).astype(int):
        data = bytearray(clean)
        data[record.video_offset + position] ^= 0x10
        with shard.open("r+b") as file:  # in place: the same object, other bytes
            file.write(data)
        os.utime(shard, ns=(0, 0))
        with pytest.raises(KprepError):
            loader(copy, mode="eval", frames=16, batch_size=1).stream[address]


def test_a_replaced_shard_is_an_error_that_names_it(copy):
    one = loader(copy)
    shard = copy / one.stream.index.clip(0).shard
    data = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(data)
    with pytest.raises(ReplacedError, match="was replaced"):
        sequence(one)


def test_a_truncated_or_missing_shard_is_named_at_once(copy):
    shard = next((copy / "train").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(KprepError, match=f"{shard.name} has .* bytes, the manifest says"):
        loader(copy)
    shard.unlink()
    with pytest.raises(StorageError, match=f"{shard.name} does not exist"):
        loader(copy)


def test_an_altered_index_is_refused(copy):
    path = copy / "index/train.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    # the mapped copy is named by the sha256 that the manifest lists; a fresh name forces a read
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["index/train.parquet"]["sha256"] = hashlib.sha256(b"other").hexdigest()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DatasetError, match="sha256 differs"):
        loader(copy)


@pytest.mark.parametrize(
    ("column", "change", "words"),
    [
        ("label", lambda value: 9, "label 9"),
        ("video_offset", lambda value: 1 << 40, "ends behind its shard"),
        ("shard", lambda value: "train/../../x.tar", "not the split's"),
        ("gop_offsets", lambda value: [*value[:-1], 1 << 40], "GOPs"),
        ("gop_offsets", lambda value: value[::-1], "GOPs"),
        ("gop_crc32", lambda value: value[1:], "GOPs"),
        ("num_frames", lambda value: 5000, "GOPs"),
    ],
)
def test_a_hostile_index_is_refused(copy, column, change, words):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = copy / "index/train.parquet"
    table = pq.read_table(path)
    values = table[column].to_pylist()
    values[2] = change(values[2])
    at = table.column_names.index(column)
    field = table.schema.field(at)
    pq.write_table(table.set_column(at, field, pa.array(values, type=field.type)), path)
    relist(copy, "index/train.parquet")
    with pytest.raises(DatasetError, match=words):
        loader(copy)


# -- use -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"split": "val"}, "has no split 'val'; it has train"),
        ({"fps": 30}, "at most the stored 15"),
        ({"fps": "x"}, "fps"),
        ({"fps": "1e99999999"}, "fps"),
        ({"frames": 0}, "frames"),
        ({"frames": 900}, "no clip of split train has 900 frames"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 100}, "cannot fill a batch"),
        ({"rank": 2}, "together"),
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"layout": "nv12"}, "layout"),
        ({"num_workers": -1}, "num_workers"),
        ({"prefetch_batches": 0}, "prefetch_batches"),
        ({"frames": 10**9}, "frames .* must be at most 100000"),
        ({"bad_clip_limit": None}, "bad_clip_limit"),
        ({"split": ["train"]}, "split .* must be the name of one split"),
        ({"storage_patience_seconds": "600"}, "storage_patience_seconds"),
        ({"storage_patience_seconds": None}, "storage_patience_seconds"),
        ({"storage_patience_seconds": float("nan")}, "storage_patience_seconds"),
        ({"cache_dir": 3, "cache_limit": "1GB"}, "cache_dir"),
    ],
)
def test_mistakes_get_one_sentence(root, change, words):
    with pytest.raises(UsageError, match=words):
        loader(root, **change)


@pytest.mark.parametrize(("change", "words"), [
    ({"rank": 5, "world_size": 2}, "rank"), ({"rank": -1, "world_size": 2}, "rank"),
    ({"world_size": 0}, "rank"), ({"batch_size": -1}, "batch_size"), ({"batch_size": 2.0}, "batch_size"),
    ({"accumulate": 0}, "accumulate"),
])  # fmt: skip
def test_a_stream_refuses_what_the_loader_does(root, change, words):
    """A rank that does not exist would get other ranks' clips, counted from the end below 0."""
    with pytest.raises(UsageError, match=words):
        ClipStream(Storage(root), StreamOptions("train"), **{"batch_size": 2, **change})


def test_a_stream_has_no_batches_but_those_of_its_epoch(root):
    stream = loader(root, batch_size=2).stream
    for address in (
        BatchAddress(0, 11, 0),
        BatchAddress(0, 0, 1),
        BatchAddress(0, -1, 0),
        0,
        (0, 0),
    ):
        with pytest.raises(UsageError, match=r"step|micro|BatchAddress"):
            stream[address]
    with pytest.raises(UsageError, match="BatchAddress"):
        list(stream)
    for change in ({"num_workers": 1.5}, {"prefetch_batches": 0}, {"bad_clip_limit": None}):
        with pytest.raises(UsageError, match=next(iter(change))):
            ClipLoader(stream, **change)


@pytest.mark.parametrize("fps", [7.5, "7.5", "15/2", np.float64(7.5)])
def test_a_rate_of_options_is_exact_however_it_is_written(root, fps):
    """A float would choose other frames than documented, and its states would not continue."""
    options = StreamOptions("train", fps=fps)
    assert (type(options.fps), options.fps) == (Fraction, Fraction(15, 2))
    whole = loader(root, fps=7.5, batch_size=2, seed=0)
    state = ClipLoader(ClipStream(Storage(root), options, batch_size=2)).state_dict()
    assert {**state, "bad_clips": ""} == {**whole.state_dict(), "bad_clips": ""}
    for wrong in (0, -1, None, float("nan")):
        with pytest.raises(UsageError, match="fps"):
            StreamOptions("train", fps=wrong)


@pytest.mark.parametrize(("rank", "size"), [("abc", "2"), ("", "2"), ("0", "two")])
def test_a_rank_in_the_environment_that_is_no_number_is_refused(root, monkeypatch, rank, size):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UsageError, match=rf"RANK \({rank}\) and WORLD_SIZE \({size}\) .* integers"):
        loader(root)


def test_rank_and_world_size_come_from_the_environment(root, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    one = loader(root, batch_size=3)
    assert (one.stream.rank, one.global_batch) == (1, 6)


@pytest.mark.slow
def test_a_bad_clip_in_a_worker_arrives_as_one_sentence(copy):
    record = next(iter_records(read_index((copy / "index/train.parquet").read_bytes(), "i")))
    shard = copy / record.shard
    data = bytearray(shard.read_bytes())
    for at in range(record.video_offset + 1000, record.video_offset + record.video_bytes, 50):
        data[at] ^= 255
    shard.write_bytes(data)
    with pytest.raises(BadClipError) as error:
        sequence(loader(copy, short="pad", num_workers=1, batch_size=24))
    assert record.key in str(error.value)
    assert "Traceback" not in str(error.value)


SCRIPT = """
import sys
from stream import clip_loader
loader = clip_loader(sys.argv[1], split="train", batch_size=6, num_workers=1)
for batch in loader:
    print(len(batch))
"""


@pytest.mark.slow
def test_a_plain_dataloader_with_spawned_workers_gives_the_same(root):
    """The stream is a map of addresses: any sampler, any start method, no state in the workers."""
    expected = sequence(loader(root, batch_size=4))
    stream = loader(root, batch_size=4).stream
    addresses = [BatchAddress(0, step, 0) for step in range(stream.plan.num_steps)]
    plain = DataLoader(
        stream, batch_size=None, sampler=addresses, num_workers=2, collate_fn=as_it_is,
        multiprocessing_context="spawn",
    )  # fmt: skip
    assert sequence(plain) == expected


def test_workers_end_by_themselves_when_the_loader_is_dropped(root):
    """In a cycle of references torch cannot tell them to, waits 5 seconds for each and kills it."""
    one = loader(root, num_workers=2)
    batches = iter(one)
    next(batches)
    next(batches)
    workers = one._torch_loader._iterator._workers
    del one, batches
    assert [worker.exitcode for worker in workers] == [0, 0]


def as_it_is(batch):
    return batch


def test_an_index_file_that_a_power_failure_cut_is_made_again(root):
    expected = sequence(loader(root))
    mapped = loader(root).stream.index.path
    whole = mapped.read_bytes()
    for length in (0, 100, len(whole) // 2, len(whole) - 1):
        mapped.unlink()  # not in place: this process has the old one mapped
        mapped.write_bytes(whole[:length])
        assert sequence(loader(root)) == expected
        assert mapped.read_bytes() == whole


@pytest.fixture
def temporary_directory(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("planted", ["file", "link", "open"])
def test_what_is_planted_in_the_temporary_directory_is_named(root, temporary_directory, planted):
    place = temporary_directory / f"kprep-{os.getuid()}"
    if planted == "file":
        place.touch()
    elif planted == "link":
        place.symlink_to("nowhere")
    else:
        place.mkdir()
        place.chmod(0o777)
    with pytest.raises(StorageError, match=f"{place} must be a directory .* TMPDIR"):
        loader(root)


def test_a_full_temporary_directory_is_named(root, temporary_directory, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stream.index.os.fsync", full)
    with pytest.raises(StorageError, match=r"No space left on device.*; set TMPDIR"):
        loader(root)
    assert not list(temporary_directory.rglob("*.tmp"))
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: full(0))
    with pytest.raises(StorageError, match=r"No space left on device.*; set TMPDIR"):
        loader(root)


def test_an_index_that_went_for_its_age_is_there_again_for_workers(root, temporary_directory):
    one = loader(root)
    path = one.stream.index.path
    before = path.read_bytes()
    shutil.rmtree(temporary_directory / f"kprep-{os.getuid()}")
    other = ForkingPickler.loads(ForkingPickler.dumps(one.stream.index))
    assert path.read_bytes() == before
    assert [other.key(row) for row in range(24)] == [one.stream.index.key(n) for n in range(24)]


def test_the_index_is_mapped_and_not_copied(root):
    """Every column that is read clip by clip lies inside the mapping of the one file on this machine."""
    index = loader(root).stream.index
    text = Path("/proc/self/maps").read_text()
    spans = [[int(end, 16) for end in line.split()[0].split("-")]
             for line in text.splitlines() if line.endswith(str(index.path))]  # fmt: skip
    assert spans
    columns = {**index._columns, "shards": index._shards[0], "configs": index._configs[0]}
    columns["gop_offsets"] = index._gop_offsets.values.to_numpy()
    columns["gop_crc32"] = index._gop_crc32.values.to_numpy()
    for name, column in columns.items():
        address = column.__array_interface__["data"][0]
        assert any(begin <= address < end for begin, end in spans), name


@pytest.mark.slow
def test_a_script_without_a_main_guard_is_told_so(root, tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(path), str(root)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    lines = done.stderr.splitlines()
    assert lines[0].startswith("the loader's workers import your script")
    assert lines[-1] == f"prep.errors.UsageError: {lines[0]}"
    assert done.stderr.count("Traceback") == 1  # the script's own


@pytest.mark.slow
def test_a_loader_outlives_its_workers_and_ctrl_c(root):
    """Which comes to the whole process group, and is for the process that stops the others."""
    expected = sequence(loader(root, batch_size=2))
    one = loader(root, batch_size=2, num_workers=1)
    before = set(multiprocessing.active_children())
    batches = iter(one)
    for _ in range(2):  # the first one is made here
        next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    os.kill(worker.pid, signal.SIGINT)
    assert sequence(batches) == expected[4:]
    batches = iter(one)
    next(batches)
    worker.kill()
    with pytest.raises(
        KprepError, match="^a worker of the loader was killed by signal 9; .* memor"
    ):
        list(batches)
    step = one.state_dict()["step"]
    one.load_state_dict(one.state_dict())
    assert sequence(one) == expected[2 * step :]
    assert sequence(one) == expected
    other = copy_of(one)
    assert sequence(islice(other, 1)) == expected[:2]
    assert len(other) == len(one)


def test_an_iteration_that_ends_with_an_error_leaves_no_workers_to_the_next(root, monkeypatch):
    """They may be in the middle of anything, also where Ctrl-C interrupted the iteration."""
    one, stopped = loader(root), []

    def interrupted(_):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr("stream.loader.made_by_workers", interrupted)
    monkeypatch.setattr("stream.loader.stop_workers", stopped.append)
    with pytest.raises(KeyboardInterrupt):
        list(one)
    assert len(stopped) == 1
    assert one._torch_loader is None
    monkeypatch.undo()
    assert sequence(one) == sequence(loader(root))


@pytest.mark.parametrize("child", [
    "s.read('manifest.json')",
    "Storage(sys.argv[1]).read('manifest.json')",
    "Storage('http://127.0.0.1:9/none').begin_range('a', 0, 1)",
    "Storage('s3://bucket/none').info('a')",
    "next(Storage(sys.argv[1]).list())",
    "clip_loader(sys.argv[1], split='train', batch_size=2)",
])  # fmt: skip
def test_a_store_does_not_survive_a_fork(root, child):
    """The client's threads are the process's: one that the child opens anew would hang too."""
    code = (
        "import os, sys; from prep.storage import Storage; from stream import clip_loader\n"
        "s = Storage(sys.argv[1]); s.read('manifest.json')\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        f"    try: {child}; os._exit(1)\n"
        "    except Exception as e: os._exit(0 if 'forkserver' in str(e) else 2)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(root)], timeout=60, check=False)
    assert done.returncode == 0


def test_a_fork_before_anything_was_read_is_no_error(root):
    code = (
        "import os, sys; from prep.storage import Storage\n"
        "s = Storage(sys.argv[1])\n"
        "pid = os.fork()\n"
        "s.read('manifest.json')\n"
        "if pid == 0: os._exit(0)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(root)], timeout=60, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("field", ["label", "video", "size"])
def test_batches_check_their_shapes(field):
    values = {
        "video": torch.zeros((2, 4, 12), dtype=torch.uint8), "size": torch.zeros((2, 2), dtype=torch.int64),
        "label": torch.zeros(2, dtype=torch.int64), "key": ["a", "b"], "start_frame": torch.zeros(2, dtype=torch.int64),
        "view": torch.zeros(2, dtype=torch.int64), "layout": "yuv420",
    }  # fmt: skip
    assert len(ClipBatch(**values).to("cpu")) == 2
    values[field] = values[field][:1]
    with pytest.raises(ValueError, match=field):
        ClipBatch(**values)


# -- object storage ------------------------------------------------------------------------------


@pytest.mark.slow
def test_s3_gives_the_same_sequence_as_the_local_directory(root, s3, monkeypatch):
    url = s3.upload(root, "same")
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    assert merged(url, 1, 6, clips_per_video=2) == merged(root, 1, 6, clips_per_video=2)
    assert sequence(loader(url, num_workers=2)) == sequence(loader(root))
    run_kprep("verify", url)
    assert "24 clips" in run_kprep("info", url).stdout


@pytest.mark.slow
def test_s3_mistakes_and_replacements_are_named(root, s3, monkeypatch):
    url = s3.upload(root, "changing")
    one = loader(url, storage_options=s3.options)
    import obstore

    shard = one.stream.index.clip(0).shard
    obstore.put(s3.store("changing"), shard, (root / shard).read_bytes()[:-1] + b"x")
    with pytest.raises(ReplacedError, match="was replaced"):
        sequence(one)
    with pytest.raises(KprepError, match="holds no manifest"):
        loader("s3://kprep/nowhere", storage_options=s3.options)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    with pytest.raises(StorageError, match="AWS_ACCESS_KEY_ID"):
        loader(url)
    with pytest.raises(StorageError, match="cannot be reached"):
        loader(url, storage_options={**s3.options, "secret_access_key": "wrong"})
