"""The work of a merging process: one shard of a new root from clips of other roots' shards.

Coded pictures are copied byte for byte and checked; only the sidecar's label and split are written
anew. Like prep.assemble, it imports webdataset, which imports torch where it is installed.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prep.assemble import finish_tar, scan, tar_in_the_making, write_tar
from prep.checksums import content_hash
from prep.errors import DatasetError
from prep.format import Sidecar
from prep.merge_sources import flat_key
from prep.storage import Storage
from prep.store_errors import listed_file
from prep.worker_marks import Mark

if TYPE_CHECKING:
    from collections.abc import Iterator

_READERS = 8
_AHEAD_BYTES = 32 << 20  # of clips that are read before they are written, and at least one
_FETCHES = 2  # what arrives damaged is read once more


def remix(job: dict[str, Any]) -> dict[str, Any]:
    """Write one shard and its `.tar.idx`; both appear complete or not at all.

    The job: root, options, path, work, mark, split, sources (root and options of each),
    as_they_are, and clips (source, shard, key, label, label_index, the byte ranges, content_hash
    and crc32). Returns what prep.assemble returns, or `{"damaged": sentence}`, or
    `{"fatal": sentence}`.
    """
    storage, path = Storage(job["root"], job["options"]), job["path"]
    mark, temporary = Mark(job["mark"]), None
    try:
        temporary = tar_in_the_making(storage, Path(job["work"]), path)
        hashed = write_tar(temporary, _samples(job, mark))
        _check_places(temporary, job)
        return finish_tar(temporary, hashed, storage, path)
    except DatasetError as error:
        return {"damaged": str(error)}
    except OSError as error:
        return {"fatal": f"{storage.where(path)} cannot be written: {error.strerror}"}
    finally:
        mark.close()
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _check_places(tar: Path, job: dict[str, Any]) -> None:
    """Raise DatasetError unless each clip's bytes stand where the new index will say."""
    videos = {key: offset for key, _, _, offset in scan(tar)[0]}
    with tar.open("rb") as file:
        for clip in job["clips"]:
            file.seek(videos.get(clip["key"], 0))
            payload = file.read(clip["video_bytes"])
            if content_hash(payload).hex() != clip["content_hash"]:
                raise DatasetError(
                    f"clip {clip['key']} of {clip['shard']}: its video is not the one member that "
                    "is named like a video; run `kprep verify` on the sources"
                )


def _samples(job: dict[str, Any], mark: Mark) -> Iterator[dict[str, str | bytes]]:
    """Yield the samples of the shard in order, reading a few ahead; their bytes go to the mark."""
    sources = [Storage(source["root"], source["options"]) for source in job["sources"]]
    waiting: deque[Any] = deque()
    held = 0
    with ThreadPoolExecutor(_READERS) as pool:
        for clip in job["clips"]:
            while waiting and held + clip["entry_bytes"] > _AHEAD_BYTES:
                first, future = waiting.popleft()
                held -= first["entry_bytes"]
                yield future.result()
                mark.add_bytes(first["entry_bytes"])
            waiting.append((clip, pool.submit(read_sample, sources[clip["source"]], clip, job)))
            held += clip["entry_bytes"]
        for first, future in waiting:
            yield future.result()
            mark.add_bytes(first["entry_bytes"])


def read_sample(source: Storage, clip: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """Read one sample and check it; DatasetError when it is not what the index says, twice."""
    start, end = clip["entry_offset"], clip["entry_offset"] + clip["entry_bytes"]
    for fetch in range(1, _FETCHES + 1):
        with listed_file():
            data = bytes(source.read_range(clip["shard"], start, end))
        try:
            return checked_sample(data, clip, job, source.where(clip["shard"]))
        except DatasetError:
            if fetch == _FETCHES:
                raise
    raise AssertionError  # the loop returns or raises


def checked_sample(
    data: bytes, clip: dict[str, Any], job: dict[str, Any], where: str
) -> dict[str, str | bytes]:
    """Return the members of a sample from its bytes in a tar, the sidecar rewritten."""
    named = f"{where}: clip {clip['key']}"
    members = dict(_members(data, clip["key"], named, renamed=job["as_they_are"]))
    at = clip["video_offset"] - clip["entry_offset"]
    found = [name for name, (offset, size) in members.items()
             if (offset, size) == (at, clip["video_bytes"])]  # fmt: skip
    if len(found) != 1:
        raise DatasetError(f"{named} does not stand where the index says; run `kprep verify`")
    payload = data[at : at + clip["video_bytes"]]
    digest = content_hash(payload).hex()
    if digest != clip["content_hash"] or zlib.crc32(payload) != clip["crc32"]:
        raise DatasetError(f"{named} is damaged: its hash is not the index's; run `kprep verify`")
    sample: dict[str, str | bytes] = {"__key__": clip["key"]}
    sample |= {name: data[offset : offset + size] for name, (offset, size) in members.items()}
    if not job["as_they_are"]:
        if set(members) != {"mp4", "json"}:
            raise DatasetError(
                f"{named} has the members {', '.join(sorted(members))}, not mp4 and json"
            )
        sidecar = Sidecar.from_bytes(bytes(sample["json"]), f"{named}: its sidecar")  # type: ignore[arg-type]
        if sidecar.key != clip["key"]:
            raise DatasetError(f"{named}: its sidecar is of {sidecar.key!r}; run `kprep verify`")
        sample["json"] = replace(
            sidecar, split=job["split"], label=clip["label"], label_index=clip["label_index"]
        ).to_bytes()
    return sample


def _members(
    data: bytes, key: str, named: str, *, renamed: bool
) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield (extension, (offset, size)) of the members of one sample; DatasetError for others.

    `renamed` says that the key may be the sample's own behind its shard's path; see flat_key.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(data + bytes(1024)), mode="r:") as tar:
            infos = tar.getmembers()
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise DatasetError(f"{named} is no part of a tar ({error}); run `kprep verify`") from error
    seen: set[str] = set()
    for info in infos:
        stem, _, extension = info.name.removeprefix("./").partition(".")
        inside = info.isreg() and info.offset_data + info.size <= len(data)
        own = stem == key or (renamed and key.endswith(f"-{flat_key(stem)}"))
        if not own or not extension or not inside or extension in seen:
            raise DatasetError(f"{named} has a member {info.name!r} that is not its own")
        seen.add(extension)
        yield extension, (info.offset_data, info.size)
