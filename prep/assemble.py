"""The work of the tar writer: staged clips in, one complete shard and its `.tar.idx` out.

Besides that of `kprep merge` and `kprep subset`, this is the only process that imports webdataset.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tarfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from prep.atomic_files import temporary_name
from prep.checksums import content_hash
from prep.errors import StorageError
from prep.storage import Storage
from prep.tar_samples import VIDEO_EXTENSIONS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_BLOCK = 512  # tar: headers and data stand on multiples of it


class HashingFile:
    """A file that hashes what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.md5 = hashlib.md5(usedforsecurity=False)  # wids asks for it
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.md5.update(data)
        self.bytes += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        self._file.flush()


def get_ready() -> None:
    """Import what writes the tars, before there is one to write."""
    import webdataset  # noqa: F401


def assemble(job: dict[str, Any]) -> dict[str, Any]:
    """Write the tar of one shard and its `.tar.idx`; both appear complete or not at all.

    In a local root the tar is written beside its place, synced and renamed; for a bucket it is
    written in the work folder and uploaded. Returns sizes, hashes and where each sample stands; or
    `{"lost": [rows]}` when staged bytes are no longer what was journaled (a power cut took them),
    so that these rows are encoded again.
    """
    storage, path = Storage(job["root"], job["options"]), job["path"]
    lost: list[int] = []
    temporary: Path | None = None
    try:
        temporary = tar_in_the_making(storage, Path(job["work"]), path)
        hashed = write_tar(temporary, _samples(job["clips"], storage, path, lost))
        if lost:
            return {"lost": lost}
        return finish_tar(temporary, hashed, storage, path)
    except OSError as error:
        return {"fatal": f"{storage.where(path)} cannot be written: {error.strerror}"}
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _samples(
    clips: list[dict[str, Any]], storage: Storage, path: str, lost: list[int]
) -> Iterator[dict[str, str | bytes]]:
    """Yield what the tar holds; the rows of clips that are no longer there go to `lost`."""
    moved: dict[str, int] | None = None
    for clip in clips:
        data = _payload(clip, storage, path)
        if data is None and clip["file"] is None:
            # the tar was built again, and the run killed before the journal knew
            moved = _video_offsets(storage, path) if moved is None else moved
            offset = moved.get(clip["key"], 0)
            data = _payload({**clip, "offset": offset}, storage, path) if offset else None
        if data is None:
            lost.append(clip["row"])
            continue
        yield {"__key__": clip["key"], "mp4": data, "json": clip["sidecar"].encode("ascii")}


def write_tar(target: Path, samples: Iterable[dict[str, str | bytes]]) -> HashingFile:
    """Write samples (`__key__` and members by extension) as a tar of the format, and sync it."""
    from webdataset import TarWriter

    with target.open("wb") as file:
        hashed = HashingFile(file)
        # an integer mtime: a float would add a PAX header to every member
        with TarWriter(hashed, encoder=False, mtime=0, user="", group="", mode=0o444) as tar:
            for sample in samples:
                tar.write(sample)
        file.flush()
        os.fsync(file.fileno())
    return hashed


def tar_in_the_making(storage: Storage, work: Path, path: str) -> Path:
    """Return where a shard is written: beside its place, or for a bucket in the work folder."""
    if storage.local_root is not None:
        return temporary_name(storage.local_target(path))
    target = work / path
    target.parent.mkdir(parents=True, exist_ok=True)
    return temporary_name(target)


def finish_tar(temporary: Path, hashed: HashingFile, storage: Storage, path: str) -> dict[str, Any]:
    """Put a written tar and its `.tar.idx` in their places; return sizes, hashes and places."""
    places, end = scan(temporary)
    index = energon_offsets([*(place[1] for place in places), end])
    storage.write(f"{path}.idx", index)
    etag = storage.move_in(temporary, path)
    return {
        "etag": etag,
        "bytes": hashed.bytes,
        "sha256": hashed.sha256.hexdigest(),
        "md5": hashed.md5.hexdigest(),
        "index_bytes": len(index),
        "index_sha256": hashlib.sha256(index).hexdigest(),
        "num_clips": len(places),
        "places": places,
    }


def _payload(clip: dict[str, Any], storage: Storage, path: str) -> bytes | None:
    """Read a clip from its pack, or from the tar that has it, and check its hash."""
    try:
        if clip["file"] is None:
            data = bytes(storage.read_range(path, clip["offset"], clip["offset"] + clip["bytes"]))
        else:
            with Path(clip["file"]).open("rb") as file:
                file.seek(clip["offset"])
                data = file.read(clip["bytes"])
    except (FileNotFoundError, StorageError):
        return None
    digest = content_hash(data).hex()
    return data if digest == clip["content_hash"] else None


def _video_offsets(storage: Storage, path: str) -> dict[str, int]:
    """Return where the videos of a tar on disk begin, by key; nothing where that does not show."""
    if storage.local_root is None:
        return {}
    try:
        return {key: place[-1] for key, *place in scan(storage.local_target(path))[0]}
    except (OSError, tarfile.TarError):
        return {}


def scan(path: Path) -> tuple[list[tuple[str, int, int, int]], int]:
    """Return (key, entry offset, entry bytes, video offset) of each sample, and the end of data.

    Read back from the file that was written, so that the index says what is there. The video is
    the member whose whole extension is one of a video's: `000.seg.mp4` is not that of `000`.
    """
    samples: dict[str, list[int]] = {}
    end = 0
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
            place = samples.setdefault(key, [member.offset, 0, 0])
            place[1] = end - place[0]
            if extension.lower() in VIDEO_EXTENSIONS:
                place[2] = member.offset_data
    return [(key, *place) for key, place in samples.items()], end  # type: ignore[misc]


def energon_offsets(offsets: list[int]) -> bytes:
    """Return Megatron-Energon's `.tar.idx`: little-endian offsets of the samples, then the end."""
    return struct.pack(f"<{len(offsets)}Q", *offsets)
