"""Clips that somebody else made: B-frames, audio, other codecs and containers, without a GOP index.

They go through the container path, with everything else as for our own: order, jitter, resume,
checked bytes, cache, S3. The tar and its index are made here, from the format's own types.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
from stream_datasets import sequence

from prep.errors import BadClipError
from prep.format import (
    ClipRecord,
    FileEntry,
    Manifest,
    Shard,
    Split,
    index_table,
    split_fingerprint,
    write_index,
)
from prep.profile import PROFILES
from prep.storage import Storage
from stream import BatchAddress, clip_loader
from stream.decode import _planar

SIZE = (96, 64)
# container, video codec, options, with audio
KINDS = {
    "bframes": ("mp4", "libx264", {"bf": "3", "g": "12", "preset": "veryfast"}, True),
    "opengop": ("matroska", "libx264", {"bf": "2", "x264-params": "open-gop=1"}, False),
    "mpeg4": ("avi", "mpeg4", {"g": "10"}, True),
    "vp9": ("webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}, False),
}


def foreign_video(kind: str, seed: int, frames: int) -> bytes:
    """Encode moving noise; about 25 % of the frames are far from their neighbours."""
    container_name, codec, options, with_audio = KINDS[kind]
    rng = np.random.default_rng(seed)
    sink = io.BytesIO()
    with av.open(sink, "w", format=container_name) as container:
        video = container.add_stream(codec, rate=15, options=options)
        video.width, video.height, video.pix_fmt = *SIZE, "yuv420p"
        audio = (
            container.add_stream("aac" if container_name == "mp4" else "mp3", rate=44100)
            if with_audio
            else None
        )
        base = rng.integers(0, 255, (8, 12, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        for number in range(frames):
            picture = np.roll(base, 3 * number + 20 * (number // 4), axis=1)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts = number
            container.mux(video.encode(frame))
            if audio is not None:
                sound = av.AudioFrame.from_ndarray(
                    np.zeros((2, 1024), dtype=np.float32), format="fltp", layout="stereo"
                )
                sound.sample_rate, sound.pts = 44100, number * 1024
                container.mux(audio.encode(sound))
        container.mux(video.encode(None))
        if audio is not None:
            container.mux(audio.encode(None))
    return sink.getvalue()


def write_root(root, per_kind: int = 3) -> list[tuple[str, bytes]]:
    """Make a dataset of one foreign tar; return (key, video) of its clips."""
    tar_path = root / "train/train-000000.tar"
    tar_path.parent.mkdir(parents=True)
    clips, records = [], []
    extensions = {"mp4": "mp4", "matroska": "mkv", "avi": "avi", "webm": "webm"}
    with tarfile.open(tar_path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(per_kind):
            for kind, (container, *_) in KINDS.items():
                frames = 40 + 7 * number
                data = foreign_video(kind, 10 * number + len(kind), frames)
                key, entry = f"{kind}_{number}", tar.offset
                member = tarfile.TarInfo(f"{key}.{extensions[container]}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
                clips.append((key, data))
                records.append(
                    ClipRecord(
                        key=key, shard="train/train-000000.tar", label=number % 2, num_frames=frames,
                        fps_num=15, fps_den=1, width=SIZE[0], height=SIZE[1], entry_offset=entry,
                        entry_bytes=tar.offset - entry, video_offset=entry + 512,
                        video_bytes=len(data), crc32=zlib.crc32(data), video_id=key,
                        content_hash=hashlib.blake2b(data, digest_size=16).digest(),
                        start_seconds=0.0, end_seconds=frames / 15, source="folder", short=False,
                    )
                )  # fmt: skip
    table = index_table(records)
    files = {"index/train.parquet": write_index([table]),
             "train/train-000000.tar": tar_path.read_bytes()}  # fmt: skip
    (root / "index").mkdir()
    (root / "index/train.parquet").write_bytes(files["index/train.parquet"])
    split = Split(split_fingerprint(table), len(records), len(records), {"ok": len(records)},
                  (Shard("train/train-000000.tar", len(records)),))  # fmt: skip
    entries = {path: FileEntry(len(data), hashlib.sha256(data).hexdigest())
               for path, data in files.items()}  # fmt: skip
    manifest = Manifest(PROFILES["small"], ("odd", "even"), {"train": split}, entries)
    (root / "manifest.json").write_bytes(manifest.to_bytes())
    return clips


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    root = tmp_path_factory.mktemp("foreign") / "root"
    return root, dict(write_root(root))


def loader(root, **more):
    return clip_loader(
        str(root), **{"split": "train", "batch_size": 4, "layout": "yuv420", "seed": 5, **more}
    )


def test_these_clips_are_as_foreign_as_they_say(foreign):
    _, clips = foreign
    for kind, (_, codec, _, with_audio) in KINDS.items():
        with av.open(io.BytesIO(clips[f"{kind}_0"])) as container:
            packets = [p for p in container.demux(video=0) if p.pts is not None]
            reordered = [p.pts for p in packets] != sorted(p.pts for p in packets)
            assert reordered == ("264" in codec)
            assert bool(container.streams.audio) == with_audio


def test_pixels_are_those_of_a_plain_decoder(foreign):
    root, clips = foreign
    one = loader(root, mode="eval", clips_per_video=3, frames=8)
    seen = 0
    for batch in one:
        for number, key in enumerate(batch.key):
            with av.open(io.BytesIO(clips[key])) as container:
                frames = [_planar(frame).to_ndarray() for frame in container.decode(video=0)]
            start = int(batch.start_frame[number])
            wanted = np.stack(frames[start : start + 8]).reshape(8, -1)
            assert np.array_equal(batch.video[number].numpy(), wanted), key
            seen += 1
    assert seen == 3 * len(clips)


def test_ranks_workers_and_resume_do_not_change_the_sequence(foreign):
    root, _ = foreign
    whole = sequence(loader(root, clips_per_video=2))
    parts = [sequence(loader(root, clips_per_video=2, batch_size=2, rank=rank, world_size=2,
                             num_workers=rank)) for rank in range(2)]  # fmt: skip
    steps = len(whole) // 4
    dealt = [
        clip for step in range(steps) for rank in parts for clip in rank[2 * step : 2 * step + 2]
    ]
    assert dealt == whole

    first = loader(root, clips_per_video=2)
    batches = iter(first)
    for _ in range(2):
        next(batches)
    second = loader(root, clips_per_video=2, batch_size=2, accumulate=2)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert sequence(second) == whole[8:]


@pytest.mark.slow
def test_a_bucket_and_a_cache_give_the_same(foreign, s3, tmp_path, monkeypatch):
    root, _ = foreign
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    address = s3.upload(root, "foreign")
    whole = sequence(loader(root))
    cached = loader(address, cache_dir=tmp_path / "cache", cache_limit="50MB")
    assert sequence(cached) == whole
    requests = []
    real = Storage.read_range
    monkeypatch.setattr(Storage, "read_range",
                        lambda *args, **more: requests.append(args) or real(*args, **more))  # fmt: skip
    assert sequence(cached) == whole  # the same epoch again
    assert not requests


@pytest.mark.parametrize("place", [0.02, 0.5, 0.98])
def test_damage_is_a_bad_clip_by_name(foreign, tmp_path, place):
    """A flipped bit anywhere in the payload, also where the decoder would not notice it."""
    source, clips = foreign
    root = tmp_path / "root"
    (root / "train").mkdir(parents=True)
    (root / "index").mkdir()
    for path in ("manifest.json", "index/train.parquet"):
        (root / path).write_bytes((source / path).read_bytes())
    data = bytearray((source / "train/train-000000.tar").read_bytes())
    (root / "train/train-000000.tar").write_bytes(data)
    one = loader(root, mode="eval", batch_size=1)
    record = one.stream.index.clip(3)
    data[record.video_offset + int(place * (record.video_bytes - 1))] ^= 0x04
    (root / "train/train-000000.tar").write_bytes(data)
    damaged = loader(root, mode="eval", batch_size=1)
    damaged.stream[BatchAddress(0, 2, 0)]
    with pytest.raises(
        BadClipError, match=rf"train-000000\.tar: clip {record.key} is damaged at byte"
    ):
        damaged.stream[BatchAddress(0, 3, 0)]
    assert len(clips) == len(damaged.stream.index)


def test_a_count_of_frames_that_is_wrong_is_named(foreign, tmp_path):
    """The bytes are right and the index promises more frames than there are."""
    _, clips = foreign
    one = loader(foreign[0], mode="eval", batch_size=1)
    record = one.stream.index.clip(0)
    with av.open(io.BytesIO(clips[record.key])) as container:
        assert sum(1 for _ in container.decode(video=0)) == record.num_frames
    request = one.stream._reader.begin(
        [one.stream._request(one.stream._items(0, [0], [0], [0])[0])]
    )[0]
    beyond = np.arange(record.num_frames - 4, record.num_frames + 4)
    out = np.empty((8, SIZE[0] * SIZE[1] * 3 // 2), dtype=np.uint8)
    from stream.decode import ClipDecoder

    with pytest.raises(BadClipError, match=rf"has no frame {record.num_frames + 3}"):
        ClipDecoder().decode(record, request.get(), beyond, out)
    assert Fraction(15) in one.stream.index.rates()
