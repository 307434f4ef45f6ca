"""Every kind of damage to a small shard or its index: altered pixels never pass, all of it is named.

The same damages through plain webdataset are the baseline; run with `-s` to see the counts that
docs/streaming.md has.
"""

import collections
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from conftest import run_kprep
from stream_datasets import relist, sequence

from prep.demo_videos import random_motion, write_video
from prep.errors import BadClipError, KprepError, StorageError
from prep.storage import Storage
from prep.verify import verify
from stream import clip_loader
from stream.reads import ClipReader, ClipRequest

PAYLOAD_SAMPLES = 200


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corruption")
    rng = np.random.default_rng(4)
    for number in range(3):
        target = folder / "videos" / ("left", "up")[number % 2] / f"{number}.mp4"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_video(target, random_motion("left", rng), "libx264")
    run_kprep("shard", folder / "videos", folder / "root", "--split", "val", "--profile", "small",
              "--clips-per-shard", 3)  # fmt: skip
    return folder / "root"


@pytest.fixture
def root(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "root"))


def loader(root):
    return clip_loader(
        str(root),
        split="val",
        mode="eval",
        frames=8,
        clips_per_video=2,
        batch_size=3,
        layout="yuv420",
    )


class Reading:
    """Reads every GOP of every clip as a run with pinned sizes would, without ETags to help it."""

    def __init__(self, root: Path):
        stream = loader(root).stream
        clips = [stream.index.clip(row) for row in range(len(stream.index))]
        self.requests = [ClipRequest(clip, np.arange(clip.num_frames)) for clip in clips]
        self.reader = ClipReader(Storage(str(root)), {})
        self.expected = self.bytes()

    def bytes(self) -> list[dict[int, bytes]]:
        return [
            {number: bytes(gop) for number, gop in pending.get().gops.items()}
            for pending in self.reader.begin(self.requests)
        ]

    def names_it(self) -> bool:
        """Whether the damage is an error; if not, every byte must be the right one."""
        try:
            assert self.bytes() == self.expected
        except (BadClipError, StorageError):
            return True
        return False


def through_webdataset(shard: Path) -> dict[str, tuple[bytes, bytes]] | None:
    """Return what webdataset gives of a shard; None where it raises."""
    try:
        samples = list(webdataset.WebDataset([str(shard)], shardshuffle=False, empty_check=False))
    except Exception:  # noqa: BLE001 - whatever it raises counts as noticed
        return None
    return {
        sample["__key__"]: (sample.get("mp4", b""), sample.get("json", b"")) for sample in samples
    }


def what_webdataset_does(found, clean) -> str:
    if found is None:
        return "reported"
    if found == clean:
        return "harmless"
    return "altered in silence" if set(found) == set(clean) else "lost in silence"


def damages(shard: Path):
    """Yield (kind, damaged bytes): every cut, each header byte, a sample of payload bytes."""
    data = shard.read_bytes()
    rng = np.random.default_rng(7)
    for end in range(0, len(data), 512):
        yield "cut at a 512-byte boundary", data[:end]
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
    headers = [member.offset + at for member in members for at in range(512)]
    inside = [
        member.offset_data + int(at)
        for member in members
        for at in rng.integers(0, member.size, PAYLOAD_SAMPLES // len(members))
    ]
    for kind, places in (("flipped header byte", headers), ("flipped payload byte", inside)):
        for place in places:
            altered = bytearray(data)
            altered[place] ^= int(rng.integers(1, 256))
            yield kind, bytes(altered)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # webdataset's
def test_a_sweep_over_a_shard(root):
    shard = next((root / "val").glob("*.tar"))
    clean_bytes, clean = shard.read_bytes(), through_webdataset(shard)
    assert len(clean) == 3
    reading, storage = Reading(root), Storage(str(root))
    assert not reading.names_it()
    counts = collections.defaultdict(collections.Counter)
    for kind, data in damages(shard):
        shard.write_bytes(data)
        count = counts[kind]
        count["damages"] += 1
        count["stream names it"] += reading.names_it()
        named = any(fault.path == f"val/{shard.name}" for fault in verify(storage).faults)
        count["verify names it"] += named
        assert named, kind
        count[f"webdataset: {what_webdataset_does(through_webdataset(shard), clean)}"] += 1
        if kind.startswith("cut"):  # a run pins sizes when it begins
            with pytest.raises(KprepError, match=f"{shard.name} has {len(data)} bytes"):
                loader(root)
    shard.write_bytes(clean_bytes)
    assert not reading.names_it()
    for kind, count in counts.items():
        print(kind, dict(count))
        assert count["verify names it"] == count["damages"]
    assert counts["flipped header byte"]["damages"] == 6 * 512
    assert counts["flipped header byte"]["stream names it"] == 0  # it does not read them


def other(column: str, value):
    """A wrong value of the same type."""
    if isinstance(value, bytes):
        return value[:-1] + bytes([value[-1] ^ 1])
    if isinstance(value, list):
        return [*value[:-1], value[-1] - 1]
    if column in ("width", "height"):
        return value + 2  # an odd one is refused before anything is decoded
    return value + 1 if column != "video_bytes" else value - 1


WRONG = (
    "label", "num_frames", "fps_num", "width", "height", "video_offset", "video_bytes", "crc32",
    "content_hash", "gop_frames", "gop_offsets", "gop_crc32",
)  # fmt: skip


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize(
    "column",
    [
        *WRONG,
        "codec_config",
    ],
)
def test_a_wrong_value_in_the_index_is_named(root, column, row):
    """The manifest lists the wrong index, so that its sha256 does not give it away."""
    expected = sequence(loader(root))
    alter_index(root, {column: lambda values: replaced(values, row, other(column, values[row]))})
    assert verify(Storage(str(root))).faults
    try:
        found = sequence(loader(root))
    except KprepError:
        return
    # other start frames and another rate choose other frames; what is chosen must be true
    if column not in ("num_frames", "fps_num"):
        assert found == expected


@pytest.mark.parametrize("change", [-2, 2])
@pytest.mark.parametrize("column", ["width", "height"])
def test_a_clip_of_another_size_than_the_index_says_is_bad(root, column, change):
    alter_index(root, {column: lambda values: [values[0] + change, *values[1:]]})
    with pytest.raises(BadClipError, match="decodes to .* the index says"):
        sequence(loader(root))


def test_swapped_keys_are_named_by_verify_and_no_stream_mixes_the_clips(root):
    """Two rows change places in all but their keys, so that each checksum is right."""
    columns = ("video_offset", "video_bytes", "crc32", "content_hash", "gop_offsets", "gop_crc32",
               "num_frames", "codec_config", "width", "height")  # fmt: skip
    expected = sequence(loader(root))
    alter_index(
        root, {name: lambda values: [values[1], values[0], *values[2:]] for name in columns}
    )
    assert verify(Storage(str(root))).faults
    # a stream reads no sidecar: each row gives, whole, the clip that its place and hash describe
    found = sequence(loader(root))
    assert [clip[1:] for clip in found] == [
        clip[1:] for clip in expected[2:4] + expected[:2] + expected[4:]
    ]
    assert [clip[0] for clip in found] == [clip[0] for clip in expected]


def replaced(values, row, value):
    return [*values[:row], value, *values[row + 1 :]]


def alter_index(root: Path, changes) -> None:
    path = root / "index/val.parquet"
    table = pq.read_table(path)
    for name, change in changes.items():
        at = table.column_names.index(name)
        field = table.schema.field(at)
        array = pa.array(change(table[name].to_pylist()), type=field.type)
        table = table.set_column(at, field, array)
    pq.write_table(table, path)
    relist(root, "index/val.parquet")
