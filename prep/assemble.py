"""The work of the tar writer: staged clips in, one complete shard and its `.tar.idx` out.

This is the only process that imports webdataset, which imports torch where it is installed.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tarfile
from pathlib import Path
from typing import IO, Any

from prep.storage import sync_directory, temporary_name, write_atomic

_BLOCK = 512  # tar: headers and data stand on multiples of it


class _HashingFile:
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


def assemble(job: dict[str, Any]) -> dict[str, Any]:
    """Write the tar of one shard under a temporary name, sync it, and rename it.

    Returns sizes, hashes and where each sample stands; or `{"lost": [rows]}` when staged bytes are
    no longer what was journaled (a power cut took them), so that these rows are encoded again.
    """
    target = Path(job["target"])
    lost = [clip["row"] for clip in job["clips"] if _payload(clip) is None]
    if lost:
        return {"lost": lost}
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(target)
    try:
        with temporary.open("wb") as file:
            hashed = _write_tar(file, job["clips"])
            file.flush()
            os.fsync(file.fileno())
        places, end = scan(temporary)
        write_atomic(target.with_name(f"{target.name}.idx"), energon_index(places, end))
        temporary.replace(target)
    except OSError as error:
        return {"fatal": f"{target} cannot be written: {error.strerror}"}
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(target.parent)
    return {
        "bytes": hashed.bytes,
        "sha256": hashed.sha256.hexdigest(),
        "md5": hashed.md5.hexdigest(),
        "num_clips": len(job["clips"]),
        "places": places,
    }


def _write_tar(file: IO[bytes], clips: list[dict[str, Any]]) -> _HashingFile:
    from webdataset import TarWriter

    hashed = _HashingFile(file)
    # an integer mtime: a float would add a PAX header to every member
    with TarWriter(hashed, encoder=False, mtime=0, user="", group="", mode=0o444) as tar:
        for clip in clips:
            data = _payload(clip)
            if data is None:
                raise OSError(5, f"staged clip {clip['key']} changed while it was copied")
            tar.write(
                {"__key__": clip["key"], "mp4": data, "json": clip["sidecar"].encode("ascii")}
            )
    return hashed


def _payload(clip: dict[str, Any]) -> bytes | None:
    """Read a clip from its pack (or from the tar that had it) and check its hash."""
    try:
        with Path(clip["file"]).open("rb") as file:
            file.seek(clip["offset"])
            data = file.read(clip["bytes"])
    except FileNotFoundError:
        return None
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    return data if digest == clip["content_hash"] else None


def scan(path: Path) -> tuple[list[tuple[str, int, int, int]], int]:
    """Return (key, entry offset, entry bytes, video offset) of each sample, and the end of data.

    Read back from the file that was written, so that the index says what is there.
    """
    samples: dict[str, list[int]] = {}
    end = 0
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
            place = samples.setdefault(key, [member.offset, 0, 0])
            place[1] = end - place[0]
            if extension == "mp4":
                place[2] = member.offset_data
    return [(key, *place) for key, place in samples.items()], end  # type: ignore[misc]


def energon_index(places: list[tuple[str, int, int, int]], end: int) -> bytes:
    """Return Megatron-Energon's `.tar.idx`: little-endian offsets of the samples, then the end."""
    offsets = [place[1] for place in places]
    return struct.pack(f"<{len(offsets) + 1}Q", *offsets, end)
