"""Batches in memory that is used again: never while anybody can still see the old one."""

import dataclasses
import gc
import os
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from stream_datasets import make_dataset, sequence

from stream import clip_loader
from stream.batch import ClipBatch
from stream.batch_slots import BatchSlots, stands_in_slot

SMALL = {"split": "train", "frames": 4, "batch_size": 3, "clips_per_video": 6, "seed": 3}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("slots"), count=8)


def loader(root, **more):
    return clip_loader(str(root), **{**SMALL, "num_workers": 2, "layout": "yuv420", **more})


@pytest.fixture(scope="module")
def expected(root):
    return {layout: sequence(loader(root, num_workers=0, layout=layout))
            for layout in ("rgb", "yuv420")}  # fmt: skip


def states(one) -> list[int]:
    gc.collect()
    return one._slots._states.tolist()


@pytest.mark.parametrize("layout", ["rgb", "yuv420"])
def test_reused_memory_gives_the_same_pixels(root, expected, layout):
    one = loader(root, layout=layout)
    places = set()
    for _ in range(2):
        found = []
        for batch in one:
            places.add(batch.video.data_ptr())
            found += sequence([batch])
        assert found == expected[layout]
    del batch
    assert len(places) <= one._slots.count + 1  # the first batch is made in this process
    assert states(one) == [0] * one._slots.count


def test_batches_that_are_kept_do_not_change(root, expected):
    """More of them than there are slots: the others come by value, and cost no files."""
    one = loader(root)
    batches = list(one)
    assert len(batches) > one._slots.count
    assert not any(map(stands_in_slot, [batches[-1].video, torch.empty(0)]))
    maps = Path("/proc/self/maps").read_text().splitlines()
    files = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    assert not any("shm/torch_" in one for one in (*maps, *files))
    assert set(states(one)) == {1}
    list(one)
    assert sequence(batches) == expected["yuv420"]
    del batches
    assert set(states(one)) == {0}


@pytest.mark.parametrize("view", [
    lambda video: video[1].untyped_storage(),
    lambda video: video.numpy()[1],
    lambda video: torch.from_dlpack(video)[1].numpy(),
    lambda video: memoryview(video.numpy().reshape(-1))[9:],
], ids=["storage", "numpy", "dlpack", "memoryview"])  # fmt: skip
def test_any_view_of_a_batch_keeps_its_slot(root, view):
    one = loader(root)
    batches = iter(one)
    next(batches)  # made in this process
    batch = next(batches)
    kept = view(batch.video)
    before = bytes(kept)
    del batch, batches
    for _ in range(2):
        list(one)
    assert bytes(kept) == before
    assert sum(states(one)) == 1
    del kept
    assert sum(states(one)) == 0


def test_an_iteration_that_is_left_gives_its_slots_back(root, expected):
    one = loader(root)
    batches = iter(one)
    for _ in range(4):
        next(batches)
    del batches
    one.set_epoch(1)
    one.set_epoch(0)
    assert sequence(one) == expected["yuv420"]
    assert sum(states(one)) == 0


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_what_a_forked_child_may_read_is_not_used_again_while_it_lives(root):
    one = loader(root)
    batches = iter(one)
    next(batches)
    batch = next(batches)
    before = batch.video.numpy().tobytes()
    go, say = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go[1])
        os.read(go[0], 1)
        os.write(say[1], b"1" if batch.video.numpy().tobytes() == before else b"0")
        os.read(go[0], 1)
        os._exit(0)
    try:
        del batch
        for _ in range(3):
            list(one)
        os.write(go[1], b"x")
        assert os.read(say[0], 1) == b"1"
        assert 2 in states(one)
    finally:
        for end in (*go, *say):
            os.close(end)
        assert os.waitpid(child, 0)[1] == 0
    del batches
    list(one)
    assert set(states(one)) == {0}  # nobody is left who could read it


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_slot_is_kept_while_one_of_several_children_lives():
    slots = BatchSlots(100, workers=1, per_worker=2)
    slots._states[:] = 1  # lent
    video = slots.claim(0, (4,))
    go = os.pipe()
    children = []
    for reads in (True, False):
        child = os.fork()
        if child == 0:
            os.close(go[1])
            if reads:
                os.read(go[0], 1)
            os._exit(0)
        children.append(child)
    os.waitpid(children[1], 0)
    slots.free_kept()
    assert slots._states.tolist() == [2, 1]
    os.write(go[1], b"x")
    os.waitpid(children[0], 0)
    slots.free_kept()
    assert slots._states.tolist() == [1, 1]  # this process still has it
    del video
    assert slots._states.tolist() == [0, 1]
    for end in go:
        os.close(end)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("missing", ["pipe", "dup"])
def test_without_a_pipe_slots_are_kept_for_ever(monkeypatch, missing):
    """As where there are too many open files; a later fork that ends changes nothing of that."""

    def refused(*_):
        raise OSError(24, "Too many open files")

    slots = BatchSlots(100, workers=1, per_worker=2)
    slots._states[:] = 1  # lent
    video = slots.claim(0, (4,))
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(os, missing, refused)
            child = os.fork()
            if child == 0:
                os._exit(0)
        missing = "getlogin"  # the second time there is a pipe
        os.waitpid(child, 0)
    slots.free_kept()
    del video
    assert slots._states.tolist() == [2, 1]


def test_sizes_that_no_memory_has_are_refused_as_missing_memory():
    with pytest.raises(OSError, match="not of this size"):
        BatchSlots(2**56, workers=80, per_worker=4)


def test_a_batch_sent_to_another_process_is_a_copy(root, expected):
    one = loader(root)
    batches = []
    for batch in one:
        batch.video.share_memory_()  # what sending through a queue of torch's does
        batches.append(batch)
    assert sum(states(one)) == 0
    list(one)
    assert sequence(batches) == expected["yuv420"]


def test_a_lent_batch_travels_without_files():
    """Passing a file costs both processes more than all the rest of a batch on its way."""
    slots = BatchSlots(100, workers=1, per_worker=1)
    batch = ClipBatch(
        video=slots.claim(0, (2, 3, 6)),
        size=torch.tensor([[2, 2], [2, 2]]),
        label=torch.tensor([4, -1]),
        key=["a", "b"],
        start_frame=torch.tensor([7, 0]),
        view=torch.tensor([1, 0]),
        layout="yuv420",
    )
    batch.video[:] = 9
    own = dataclasses.replace(batch, video=batch.video.clone())  # as where no slot was free
    for lent in (batch, own):
        sent = ForkingPickler.dumps(slots.lend(lent))
        assert b"torch" not in bytes(sent)
        arrived = ForkingPickler.loads(sent)
        assert (arrived.video.data_ptr() == batch.video.data_ptr()) == (lent is batch)
        assert sequence([arrived]) == sequence([batch])
        for name in ("size", "label", "start_frame", "view"):
            assert torch.equal(getattr(arrived, name), getattr(batch, name))


def test_a_numpy_view_of_a_batch_that_was_sent_does_not_change(root, expected):
    """torch moves the memory of a tensor that it sends, and a view of it stays behind."""
    one = loader(root)
    batches = iter(one)
    next(batches)
    batch = next(batches)
    view = batch.video.numpy()
    before = view.copy()
    sent = ForkingPickler.dumps(batch)
    assert sum(states(one)) >= 1
    del batch, batches
    for _ in range(2):
        list(one)
    assert np.array_equal(view, before)
    assert torch.equal(ForkingPickler.loads(sent).video, torch.from_numpy(before))


def test_without_memory_files_batches_are_made_as_torch_makes_them(root, expected, monkeypatch):
    def refused(*_):
        raise OSError("no room")

    monkeypatch.setattr(os, "ftruncate", refused)
    one = loader(root)
    assert sequence(one) == expected["yuv420"]
    assert one._slots is None


def test_memory_goes_with_the_last_batch(root):
    def open_files():
        found = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
        return sum("kprep-batches" in file for file in found)

    def mapped():
        return Path("/proc/self/maps").read_text().count("kprep-batches")

    gc.collect()
    files, maps = open_files(), mapped()
    one = loader(root)
    batches = iter(one)
    next(batches)
    batch = next(batches)
    assert (open_files() > files, mapped() > maps) == (True, True)
    before = batch.video.clone()
    del one, batches
    gc.collect()
    assert torch.equal(batch.video, before)
    del batch
    gc.collect()
    assert (open_files(), mapped()) == (files, maps)


def test_a_slot_too_small_or_another_place_is_not_lent():
    slots = BatchSlots(100, workers=2, per_worker=3)
    assert slots.slot_bytes % 4096 == 0
    outside = slots.room((10,))  # no worker here
    assert isinstance(outside, torch.Tensor)
    first = slots.claim(0, (2, 5))
    first[:] = 7
    last = slots.claim(5, (4,))
    last[:] = 9
    assert (slots.claim(0, (10,)) == 7).all()
    assert np.all(last.numpy() == 9)
