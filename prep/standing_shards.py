"""Whether the shards that an earlier run finished are still what it wrote."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prep.byte_progress import ByteProgress
from prep.errors import StorageError
from prep.format import shard_path
from prep.text.plain import few
from prep.worker_pool import usable_cores

if TYPE_CHECKING:
    from prep.storage import ObjectInfo, Storage

Shards = dict[tuple[str, int], dict[str, Any]]  # what is known of each, by split and number
_WINDOW_BYTES = 8 << 20


def altered_shards(
    storage: Storage, shards: Shards, workers: int = 0
) -> dict[tuple[str, int], str]:
    """Return what is wrong with those that are not what was written, by split and number.

    `shards` has what `prep.assemble.finish_tar` told of each. Every byte is read, several shards
    at a time (`workers` 0: one for each core); but a tar in a store that has the size and ETag of
    its upload is that upload. Raises StorageError for what is there and cannot be read.
    """
    if not shards:
        return {}
    count = min(workers or usable_cores(), len(shards))
    progress = ByteProgress("checked", sum(map(_bytes, shards.values())))
    check = _Check(storage, progress, threading.Event())
    try:
        with ThreadPoolExecutor(count) as pool:
            found = [pool.submit(check.fault, *shard, facts) for shard, facts in shards.items()]
            try:
                faults = [future.result() for future in found]
            finally:  # also at Ctrl-C: then what has not been read need not be
                check.stop.set()
    finally:
        progress.close()
    return {shard: fault for shard, fault in zip(shards, faults, strict=True) if fault}


def note_on(faults: dict[tuple[str, int], str]) -> list[str]:
    """Say which shards are made again, and why; nothing where none is."""
    if not faults:
        return []
    what = "1 shard" if len(faults) == 1 else f"{len(faults)} shards"
    named = few(list(faults.values()))
    return [f"{what} that an earlier run had finished had to be made again: {named}"]


@dataclass
class _Check:
    storage: Storage
    progress: ByteProgress
    stop: threading.Event

    def fault(self, split: str, number: int, facts: dict[str, Any]) -> str:
        """Return how a tar or its `.tar.idx` is not what was written; "" where both are."""
        path = shard_path(split, number)
        faults = [
            self._fault(f"{path}.idx", facts["index_bytes"], facts["index_sha256"], None),
            self._fault(path, facts["bytes"], facts["sha256"], facts.get("etag")),
        ]
        return next(filter(None, faults), "")

    def _fault(self, path: str, size: int, sha256: str, etag: str | None) -> str:
        try:
            info = self.storage.info(path)
            if info.size_bytes == size and (etag is None or info.etag != etag):
                return "" if self._sha256(info) == sha256 else f"{path} was altered"
        except StorageError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            self.progress.skip(size)
            return f"{path} is gone"
        self.progress.skip(size)
        return "" if info.size_bytes == size else f"{path} has {info.size_bytes} bytes, not {size}"

    def _sha256(self, info: ObjectInfo) -> str:
        digest = hashlib.sha256()
        for start in range(0, info.size_bytes, _WINDOW_BYTES):
            if self.stop.is_set():
                break
            end = min(start + _WINDOW_BYTES, info.size_bytes)
            digest.update(self.storage.read_range(info.path, start, end, etag=info.etag))
            self.progress.add(end - start)
        return digest.hexdigest()


def _bytes(facts: dict[str, Any]) -> int:
    return int(facts["index_bytes"]) + int(facts["bytes"])
