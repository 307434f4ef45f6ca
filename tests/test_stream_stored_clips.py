"""Random access: any frames of any clip by its key, and what is said of those that are not there."""

import io
import pickle
import shutil
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from stream_datasets import make_dataset, without_gop_index

from prep.errors import BadClipError, UsageError
from prep.format import iter_records, read_index
from prep.storage import Storage
from stream import StoredClips, clip_loader


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("stored"), 9)


@pytest.fixture(scope="module")
def records(root):
    table = read_index((root / "index/train.parquet").read_bytes(), "i")
    return {record.key: record for record in iter_records(table)}


def planar_of(root, record) -> np.ndarray:
    """Return all frames of a clip, uint8 (T, F), as PyAV decodes the mp4 from its beginning."""
    data = (root / record.shard).read_bytes()[record.video_offset :][: record.video_bytes]
    with av.open(io.BytesIO(data)) as file:
        frames = [frame.to_ndarray(format="yuv420p").reshape(-1) for frame in file.decode(video=0)]
    return np.stack(frames)


def test_every_clip_is_described_and_found_by_its_key(root, records):
    clips = StoredClips(root, split="train")
    assert len(clips) == len(records) == 9
    for clip, record in zip(clips, records.values(), strict=True):
        assert clips[clip.key] == clip
        assert clip.key in clips
        assert (clip.key, clip.label, clip.num_frames) == (
            record.key,
            record.label,
            record.num_frames,
        )
        assert (clip.height, clip.width) == (record.height, record.width)
        assert clip.class_name == ("left", "up")[clip.label]
        assert clip.fps == Fraction(15)
        assert clip.seconds == record.num_frames / 15
    assert clip.key[:-1] not in clips
    assert 0 not in clips
    assert "\ud800" not in clips  # which no file can hold


@pytest.mark.parametrize("gops", [True, False], ids=["gops", "container"])
def test_frames_in_any_order_are_those_of_a_plain_decoder(root, records, tmp_path, gops):
    if not gops:
        root = Path(shutil.copytree(root, tmp_path / "root"))
        without_gop_index(root)
    clips = StoredClips(root, split="train")
    rng = np.random.default_rng(5)
    for key, record in records.items():
        every = planar_of(root, record)
        assert len(every) == record.num_frames
        found = clips.frames(key, range(record.num_frames), layout="yuv420")
        assert np.array_equal(found.numpy(), every)
        some = rng.integers(0, record.num_frames, 7)  # some of them twice, in any order
        assert np.array_equal(clips.frames(key, some, layout="yuv420").numpy(), every[some])


def test_rgb_is_what_the_loader_gives(root):
    clips = StoredClips(root, split="train")
    loader = clip_loader(root, split="train", mode="eval", frames=4, batch_size=1, short="pad")
    for batch in loader:
        start = int(batch.start_frame[0])
        found = clips.frames(batch.key[0], range(start, start + 4))
        assert torch.equal(found, batch.video[0])
    assert clips.frames(batch.key[0], []).shape == (0, *found.shape[1:])


def test_a_time_is_the_frame_that_is_shown_then(root, records):
    clips = StoredClips(root, split="train")
    key = next(iter(records))
    every = clips.frames(key, range(records[key].num_frames))
    beginnings = [number / 15 for number in range(len(every))]  # 2 / 15 * 15 is below 2 as a float
    assert torch.equal(clips.frames_at(key, beginnings), every)
    late = [(number + 0.99) / 15 for number in range(len(every))]
    assert torch.equal(clips.frames_at(key, late), every)


def test_only_the_groups_of_pictures_asked_for_are_read(root, records, monkeypatch):
    read, real = [], Storage.read_range
    monkeypatch.setattr(
        Storage,
        "read_range",
        lambda self, path, a, b, **kw: read.append((path, a, b)) or real(self, path, a, b, **kw),
    )
    clips = StoredClips(root, split="train")
    key, record = max(records.items(), key=lambda item: item[1].num_frames)
    clips.frames(key, [17])  # groups of 16: the second
    offset = record.video_offset
    assert read == [(record.shard, offset + record.gop_offsets[1], offset + record.gop_offsets[2])]


def test_a_copy_in_another_process_decodes_for_itself(root):
    clips = StoredClips(root, split="train")
    key = next(iter(clips)).key
    first = clips.frames(key, [3])  # with a decoder, which cannot travel
    assert torch.equal(pickle.loads(pickle.dumps(clips)).frames(key, [3]), first)  # noqa: S301


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda clips, key: clips["nobody"], "has no clip 'nobody' in split train"),
        (lambda clips, key: clips[0], "has no clip 0 in split train"),
        (lambda clips, key: clips.frames(key, [0, 10**6]), "(1000000) must be at most"),
        (lambda clips, key: clips.frames(key, [-1]), "(-1) must be at least 0"),
        (lambda clips, key: clips.frames(key, [1.0]), "(1.0) must be a whole number"),
        (lambda clips, key: clips.frames(key, [0], layout="bgr"), "layout ('bgr') must be"),
        (lambda clips, key: clips.frames_at(key, [float("nan")]), "time (nan) of clip"),
        (lambda clips, key: clips.frames_at(key, [1e9]), "from 0 to below its length"),
    ],
)
def test_what_is_not_there_is_named(root, records, ask, words):
    with pytest.raises(UsageError) as error:
        ask(StoredClips(root, split="train"), next(iter(records)))
    assert words in str(error.value)


def test_a_split_or_a_list_of_roots_is_refused(root):
    with pytest.raises(UsageError, match="has no split 'val'; it has train"):
        StoredClips(root, split="val")
    with pytest.raises(UsageError, match="must be one root, not 2"):
        StoredClips([root, root / "other"], split="train")
    with pytest.raises(UsageError, match=r"storage_patience_seconds \(nan\)"):
        StoredClips(root, split="train", storage_patience_seconds=float("nan"))


def test_a_damaged_clip_is_a_bad_clip_by_name(root, records, tmp_path):
    copy = Path(shutil.copytree(root, tmp_path / "root"))
    record = next(iter(records.values()))
    data = bytearray((copy / record.shard).read_bytes())
    data[record.video_offset + record.gop_offsets[0] + 100] ^= 1
    (copy / record.shard).write_bytes(data)
    with pytest.raises(BadClipError) as error:
        StoredClips(copy, split="train").frames(record.key, [0])
    assert record.key in str(error.value)
    assert "crc32" in str(error.value)
