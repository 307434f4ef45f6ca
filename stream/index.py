"""A split's index in memory: verified once, written once as a plain file, mapped by all workers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
import time
import uuid
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from prep.errors import DatasetError, StorageError
from prep.format import index_path, read_index
from prep.storage import listed_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from prep.format import FileEntry, Manifest
    from prep.storage import Storage
    from stream.order import Int64

_KEEP_SECONDS = 14 * 24 * 3600


@dataclass(frozen=True)
class IndexedClip:
    """What reading and decoding need of one clip; see prep.format.ClipRecord for the fields."""

    row: int
    key: str
    shard: str
    label: int
    num_frames: int
    width: int
    height: int
    video_offset: int
    video_bytes: int
    crc32: int
    codec_config: bytes | None
    gop_frames: int
    gop_offsets: Int64
    gop_crc32: Int64
    content_hash: bytes = b""


class ClipIndex:
    """The rows of a split's index, over a memory-mapped Arrow file. Cheap to pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        """Send only the path: the other process maps the same file.

        One that was removed since, as for its age, is written again from this process's mapping.
        """
        try:
            os.utime(self.path)
        except FileNotFoundError:
            _cache_folder()
            _write(self.path, lambda file: file.write(self._mapping))
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Map the file."""
        self.path = state["path"]
        self._open()

    def _open(self) -> None:
        with pa.memory_map(str(self.path)) as source:
            self._mapping = source.read_buffer()  # no copy
        table = pa.ipc.open_file(self._mapping).read_all()
        columns: dict[str, Any] = {name: _mapped(table[name]) for name in table.column_names}
        self._keys = columns["key"]
        self._shards = _dictionary(columns["shard"])
        self._configs = _dictionary(columns["codec_config"])
        self._gop_offsets = columns["gop_offsets"]
        self._gop_crc32 = columns["gop_crc32"]
        self._hashes = columns["content_hash"]
        self._columns = {
            name: _filled(columns[name], 0).to_numpy(zero_copy_only=False)
            for name in ("label", "num_frames", "fps_num", "fps_den", "width", "height",
                         "video_offset", "video_bytes", "crc32", "gop_frames")
        }  # fmt: skip

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self._keys)

    @property
    def num_frames(self) -> Int64:
        """Frames of each clip, int64."""
        frames: Int64 = self._columns["num_frames"].astype(np.int64)
        return frames

    @property
    def video_bytes(self) -> Int64:
        """Bytes of each clip's video payload, int64."""
        sizes: Int64 = self._columns["video_bytes"].astype(np.int64)
        return sizes

    @property
    def sizes(self) -> tuple[Int64, Int64]:
        """Height and width of each clip in pixels, int64."""
        return self._columns["height"].astype(np.int64), self._columns["width"].astype(np.int64)

    @property
    def labels(self) -> Int64:
        """Label index of each clip, int64; -1 where there is none."""
        labels: Int64 = self._columns["label"].astype(np.int64)
        return labels

    def key(self, row: int) -> str:
        """Return the key of a row."""
        return str(self._keys[row].as_py())

    def row_of(self, key: str) -> int | None:
        """Return the row of a key; None where no clip has it. Looks through all keys."""
        import pyarrow.compute as pc  # slow to import, and workers need none of it

        try:
            wanted = pa.scalar(key, self._keys.type)
        except UnicodeEncodeError:  # no key is such a text
            return None
        row = pc.index(self._keys, wanted).as_py()
        return int(row) if row >= 0 else None

    def rate(self, row: int) -> Fraction:
        """Return the stored frame rate of a row."""
        return Fraction(int(self._columns["fps_num"][row]), int(self._columns["fps_den"][row]))

    def shard_paths(self) -> list[str]:
        """Return the shards that hold clips."""
        return sorted(set(self._shards[1]))

    def rates(self) -> dict[Fraction, Int64]:
        """Return the stored frame rates and the rows that have each."""
        pairs = np.stack([self._columns["fps_num"], self._columns["fps_den"]], axis=1)
        found, inverse = np.unique(pairs, axis=0, return_inverse=True)
        return {
            Fraction(int(num), int(den)): np.flatnonzero(inverse.reshape(-1) == number)
            for number, (num, den) in enumerate(found)
        }

    def clip(self, row: int) -> IndexedClip:
        """Return one row."""
        value = {name: int(column[row]) for name, column in self._columns.items()}
        codes, configs = self._configs
        indexed = self._gop_offsets[row]
        empty = np.empty(0, dtype=np.int64)
        has_gops = indexed.is_valid and codes[row] >= 0
        return IndexedClip(
            row=row,
            key=self.key(row),
            shard=self._shards[1][int(self._shards[0][row])],
            label=value["label"],
            num_frames=value["num_frames"],
            width=value["width"],
            height=value["height"],
            video_offset=value["video_offset"],
            video_bytes=value["video_bytes"],
            crc32=value["crc32"],
            content_hash=self._hashes[row].as_py(),
            codec_config=configs[int(codes[row])] if has_gops else None,
            gop_frames=value["gop_frames"],
            gop_offsets=indexed.values.to_numpy() if has_gops else empty,
            gop_crc32=self._gop_crc32[row].values.to_numpy().astype(np.int64)
            if has_gops
            else empty,
        )


def _dictionary(column: Any) -> tuple[npt.NDArray[np.int32], list[Any]]:
    """Return the codes (int32, -1 for null) and the values of a dictionary column."""
    codes: npt.NDArray[np.int32] = _filled(column.indices, -1).to_numpy(zero_copy_only=False)
    return codes, column.dictionary.to_pylist()


def _mapped(column: Any) -> Any:
    """Return a column as one array; without a copy where it is one (combine_chunks makes one)."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _filled(column: Any, value: int) -> Any:
    """Replace nulls; without a copy where there are none (fill_null makes one)."""
    return column.fill_null(value) if column.null_count else column


def load_index(storage: Storage, manifest: Manifest, split: str) -> ClipIndex:
    """Return a split's index; parsed and checked against its sha256 only once on a machine.

    Raises DatasetError when the file is not the one that the manifest lists, its rows disagree with
    each other or with the manifest, or it was made to exhaust memory.
    """
    path = index_path(split)
    entry = manifest.files.get(path)
    if entry is None:
        raise DatasetError(
            f"{storage.where(path)} is not listed in the manifest; run `kprep verify`"
        )
    mapped = _cache_folder() / f"index-2-{_checked_as(manifest, split)}.arrow"
    try:
        os.utime(mapped)
        return ClipIndex(mapped)
    except FileNotFoundError:
        pass
    except pa.ArrowException:  # cut by a power failure
        mapped.unlink(missing_ok=True)
    data = _read_checked(storage, path, entry)
    table = read_index(data, storage.where(path), manifest.splits[split].num_clips)
    _check(table, manifest, split, storage.where(path))
    _write(mapped, partial(_save, table.unify_dictionaries().combine_chunks()))
    return ClipIndex(mapped)


def _checked_as(manifest: Manifest, split: str) -> str:
    """Return a digest of everything that an index is checked against: its file and the manifest."""
    described = manifest.splits[split]
    shards = [(shard.path, manifest.files[shard.path].bytes) for shard in described.shards]
    sha256 = manifest.files[index_path(split)].sha256
    values = (sha256, len(manifest.class_names), described.num_clips, shards)
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _read_checked(storage: Storage, path: str, entry: FileEntry) -> bytes:
    """Return a file whose hash is as listed; read once more where the first reading is not."""
    for _ in range(2):
        with listed_file():
            data = storage.read(path, entry.bytes)
        if hashlib.sha256(data).hexdigest() == entry.sha256:
            return data
    raise DatasetError(
        f"{storage.where(path)} is not the file that the manifest lists (its sha256 differs); "
        "run `kprep verify`"
    )


def _cache_folder() -> Path:
    """Return a folder of our own in the system's temporary directory.

    What is mapped from there is trusted, so it must be ours and closed to others.
    """
    try:
        folder = Path(tempfile.gettempdir()) / f"kprep-{os.getuid()}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        status = folder.lstat()
    except OSError as error:
        raise _no_room(error) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise StorageError(
            f"{folder} must be a directory that only you can use; remove it, or set TMPDIR to "
            "another directory"
        )
    for path in folder.glob("index-*.arrow*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _KEEP_SECONDS:
                path.unlink()
    return folder


def _no_room(error: OSError) -> StorageError:
    return StorageError(
        f"the split's index cannot be kept for the loader's processes: {error}; set TMPDIR to a "
        "directory with room"
    )


def _save(table: pa.Table, file: Any) -> None:
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def _write(path: Path, save: Callable[[Any], object]) -> None:
    """Let `save` write a file that is there whole or not at all."""
    # not the process's number: containers that share the directory have the same ones
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with pa.OSFile(str(temporary), "wb") as sink:
            save(sink)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        raise _no_room(error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _check(table: pa.Table, manifest: Manifest, split: str, where: str) -> None:
    """Refuse an index that would send a reader outside its shards or its labels."""
    labels = table["label"].to_numpy()
    if len(labels) and int(labels.max()) >= len(manifest.class_names):
        raise DatasetError(
            f"{where} has label {int(labels.max())}, but the manifest knows only "
            f"{len(manifest.class_names)} classes; run `kprep verify`"
        )
    sizes = {shard.path: manifest.files[shard.path].bytes for shard in manifest.splits[split].shards
             if shard.path in manifest.files}  # fmt: skip
    column = table["shard"].unify_dictionaries().combine_chunks()
    codes, paths = _dictionary(column)
    if any(path not in sizes for path in paths):
        raise DatasetError(f"{where} names a shard that is not the split's; run `kprep verify`")
    limits = np.array([sizes[path] for path in paths], dtype=np.int64)[codes]
    ends = table["video_offset"].to_numpy() + table["video_bytes"].to_numpy()
    if np.any(ends > limits):
        raise DatasetError(f"{where} has a clip that ends behind its shard; run `kprep verify`")
    _check_gops(table, where)


def _check_gops(table: pa.Table, where: str) -> None:
    """GOP offsets must rise within the clip, and there must be enough GOPs for its frames."""
    offsets, crcs = table["gop_offsets"].combine_chunks(), table["gop_crc32"].combine_chunks()
    valid = offsets.is_valid().to_numpy(zero_copy_only=False)
    counts = offsets.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    sums = crcs.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    gop_frames = table["gop_frames"].fill_null(0).to_numpy().astype(np.int64)
    frames = table["num_frames"].to_numpy().astype(np.int64)
    gops = np.maximum(counts - 1, 0)
    agree = np.where(valid, (sums == gops) & (gops * gop_frames >= frames) & (gops > 0), sums == 0)
    flat = offsets.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    ends = np.cumsum(counts)
    rising = np.ones(len(flat), dtype=bool)
    rising[1:] = np.diff(flat) > 0
    firsts = (ends - counts)[counts > 0]
    rising[firsts] = flat[firsts] >= 0
    lasts = flat[(ends - 1)[counts > 0]]
    inside = lasts <= table["video_bytes"].to_numpy()[counts > 0]
    if not (agree.all() and rising.all() and inside.all()):
        raise DatasetError(f"{where} has GOPs that do not fit their clip; run `kprep verify`")
