"""One way to read and write a dataset root: a local directory or an object store.

A bucket is reached through obstore; of a local directory, what is read often (sizes, versions,
ranges) is read directly. A `Storage` can be pickled and sent to worker processes: the client is
opened there, on the first use.

Who tries again: reads (`info`, `read`, `read_range`) through a client that never does, with
`RetryPolicy`, which knows how far a body came and what can no longer succeed; writes and
listings through a client with obstore's own retries. `begin_range` reads without that client
where it can, and with it whatever fails.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prep.atomic_files import sync_path, write_atomic
from prep.downloads import Download, RetryPolicy, Tries, stop_waiting
from prep.errors import StorageError
from prep.forks import note_client, refuse_fork
from prep.links import refuse_endless_links, refuse_links_to
from prep.local_files import (
    MOST_BYTES,
    OpenFiles,
    ends_early,
    local_info,
    read_whole,
)
from prep.object_reads import TIMEOUTS, range_requests, receive
from prep.root_address import is_url, root_address
from prep.s3_environment import with_s3_environment, without_other_token
from prep.store_errors import listed_file, replaced, store_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextlib import AbstractContextManager

    from obstore.store import ObjectStore

    from prep.range_requests import RangeRequests

__all__ = [
    "PART_BYTES",
    "ObjectInfo",
    "RetryPolicy",
    "Storage",
    "check_relative_path",
    "listed_file",
    "stop_waiting",
    "sync_path",
    "write_atomic",
]

PART_BYTES = 8 << 20
_MOST_PARTS = 9_000  # of one upload; S3 allows 10,000
_SHA256_ATTRIBUTE = "kprep-sha256"


@lru_cache(1024)  # a loader asks for a range of one of a few shards a thousand times a second
def check_relative_path(path: str) -> str:
    """Return `path` when it names something inside a root; raise StorageError when it may not.

    Paths come from manifests and archives that strangers wrote: no absolute path, no `..`, no
    empty component, no backslash, no control character.
    """
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts) or re.search(r"[\\\x00-\x1f\x7f]", path):
        raise StorageError(f"path {path!r} in a dataset must stay inside its root; refused")
    return path


@dataclass(frozen=True)
class ObjectInfo:
    """What a store says of an object: its path, its size and its version (None: no ETag)."""

    path: str
    size_bytes: int
    etag: str | None


@dataclass
class Storage:
    """A dataset root.

    `root` is a local directory or `s3://bucket/prefix`, `gs://…`, `https://…` (read only).
    `options` are passed to the store's client: `endpoint`, `region`, `access_key_id`,
    `secret_access_key`, `skip_signature` and so on; the usual AWS environment variables serve
    where they are absent. `client_options` among them change the client's `timeout`,
    `read_timeout` (of a stalled body) and `connect_timeout`, such as "20s".
    """

    root: str
    options: dict[str, Any] = field(default_factory=dict, repr=False)
    retry: RetryPolicy = field(default_factory=RetryPolicy, repr=False, compare=False)
    _store: ObjectStore | None = field(default=None, init=False, repr=False, compare=False)
    _reads: ObjectStore | None = field(default=None, init=False, repr=False, compare=False)
    _opened_in: int = field(default=0, init=False, repr=False, compare=False)
    _requests: RangeRequests | None = field(default=None, init=False, repr=False, compare=False)
    _files: OpenFiles = field(default_factory=OpenFiles, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Make a local root absolute and refuse addresses that no store serves."""
        self.root = root_address(str(self.root))
        if self.root.startswith("s3://"):
            # taken here and not where the client is opened: a worker process that was started
            # earlier has an older environment
            self.options = with_s3_environment(self.options)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open client behind: another process opens its own."""
        closed = {"_store": None, "_reads": None, "_opened_in": 0, "_requests": None}
        kept = {"root": self.root, "options": self.options, "retry": self.retry}
        return {**kept, **closed, "_files": OpenFiles()}

    @cached_property
    def local_root(self) -> Path | None:
        """The directory, or None when the root is in an object store."""
        return None if is_url(self.root) else Path(self.root)

    @property
    def is_read_only(self) -> bool:
        """Whether the root is served over HTTP: it can be read, but not listed or written."""
        return self.root.startswith(("http://", "https://"))

    def where(self, path: str) -> str:
        """Name an object for a message."""
        return f"{self.root}/{path}"

    def store(self) -> ObjectStore:
        """Return this process's client for writing and listing; opened on the first call.

        Raises StorageError in a process forked after the parent had opened a store, this one or
        another: the client's threads do not survive a fork and every request would hang.
        """
        self._refuse_fork()
        if self._store is None:
            self._store, self._opened_in = self._open(max_retries=5), os.getpid()
        return self._store

    def reading_store(self) -> ObjectStore:
        """Return this process's client for reading, which tries nothing twice; else as `store`."""
        self._refuse_fork()
        if self._reads is None:
            self._reads, self._opened_in = self._open(max_retries=0), os.getpid()
        return self._reads

    def _refuse_fork(self) -> None:
        refuse_fork(self.root, self._opened_in)

    def _open(self, max_retries: int) -> ObjectStore:
        from obstore.store import LocalStore, from_url

        note_client()
        if self.local_root is not None:
            if not self.local_root.is_dir():
                raise StorageError(f"{self.root} is not a directory")
            return LocalStore(self.local_root)
        plain = str(self.options.get("endpoint", self.root)).startswith("http://")
        options = {**without_other_token(self.options), **self.options}
        client: Any = {**TIMEOUTS, "allow_http": plain, **options.pop("client_options", {})}
        retry: Any = {"max_retries": max_retries, "retry_timeout": timedelta(seconds=60)}
        opened: ObjectStore = from_url(
            self.root, client_options=client, retry_config=retry, **options
        )
        return opened

    def info(self, path: str) -> ObjectInfo:
        """Return size and version of an object; StorageError where there is none."""
        check_relative_path(path)
        if self.local_root is not None:
            with self._errors(path):
                return ObjectInfo(path, *local_info(self.where(path)))
        import obstore

        tries = Tries(self.retry, self.where(path))
        while True:
            try:
                with self._errors(path):
                    meta = obstore.head(self.reading_store(), path)
                return ObjectInfo(path, int(meta["size"]), meta["e_tag"])
            except StorageError as error:
                tries.after(error)

    def exists(self, path: str) -> bool:
        """Whether the object is there; StorageError where the store cannot tell."""
        try:
            self.info(path)
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return False
            raise
        return True

    def read(self, path: str, most: int = MOST_BYTES) -> bytes:
        """Return a whole object, of one version; its length is the one that the store says.

        Raises DatasetError, before anything is read, when it has more than `most` bytes.
        """
        check_relative_path(path)
        if self.local_root is None:
            return bytes(self._receive(Download(path, most=most)))
        self._refuse_fork()  # as in _read_local
        note_client()
        with self._errors(path):
            return read_whole(self.where(path), most)

    def read_range(self, path: str, start: int, end: int, *, etag: str | None = None) -> memoryview:
        """Return bytes `[start, end)` of an object.

        A body that breaks or stalls is continued where it stopped, on the same version.

        Raises ReplacedError when `etag` is given and the object has another one by now, and
        StorageError when the object ends before `end` or cannot be had within the patience.
        """
        check_relative_path(path)
        if self.local_root is not None:
            return self._read_local(path, start, end, etag)
        return self._receive(Download(path, start, end, etag))

    def begin_range(
        self, path: str, start: int, end: int, *, etag: str | None = None
    ) -> Callable[[], memoryview]:
        """Ask for bytes `[start, end)` of an object; call what is returned to have them.

        The call raises as `read_range`. Of a local root the system is told to read ahead, and the
        bytes are taken from its page cache when they are needed.
        """
        check_relative_path(path)
        if self.local_root is not None:
            self._files.read_ahead(self.where(path), start, end)
            return cache(partial(self.read_range, path, start, end, etag=etag))
        self._refuse_fork()
        if self._requests is None:
            self._opened_in = os.getpid()
            with self._errors(path):  # as where no file can be opened any more
                self._requests = self._range_requests()
        return self._requests.begin(path, start, end, etag)

    def _range_requests(self) -> RangeRequests:
        def read(path: str, start: int, end: int, etag: str | None) -> memoryview:
            return self.read_range(path, start, end, etag=etag)

        return range_requests(self.root, self.options, self.reading_store, read)

    def _read_local(self, path: str, start: int, end: int, etag: str | None) -> memoryview:
        # a script whose forked workers would hang on a bucket is told so on a local directory too
        self._refuse_fork()
        self._opened_in = os.getpid()
        with self._errors(path):
            data, size, version = self._files.read(self.where(path), start, end)
        if etag is not None and version != etag:
            raise replaced(self.where(path))
        if len(data) < end - start:
            raise ends_early(self.where(path), size, start, end)
        return memoryview(data)

    def _receive(self, download: Download) -> memoryview:
        return receive(download, self.reading_store, self.where(download.path), self.retry)

    def _errors(self, path: str) -> AbstractContextManager[None]:
        return store_errors(self.where(path))

    def write(self, path: str, data: bytes) -> None:
        """Write a whole object so that it appears complete or not at all."""
        check_relative_path(path)
        if self.local_root is not None:
            with self._errors(path):
                write_atomic(self.local_target(path), data)
            return
        import obstore

        with self._errors(path):
            obstore.put(self.store(), path, data)

    def local_target(self, path: str) -> Path:
        """Return where an object of a local root is written, in a folder that is there.

        Raises StorageError where a link would lead out of the root.
        """
        if self.local_root is None:
            raise ValueError(f"{self.root} is not on this machine")
        refuse_links_to(self.local_root, check_relative_path(path))
        target = self.local_root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def read_with_etag(self, path: str) -> tuple[bytes, str | None]:
        """Return a whole object and its version."""
        import obstore

        with self._errors(path):
            result = obstore.get(self.store(), check_relative_path(path))
            return bytes(result.bytes()), result.meta["e_tag"]

    def put_if(self, path: str, data: bytes, etag: str | None) -> str | None:
        """Write an object only if it is absent (`etag` None) or of that version.

        Returns the new version. Raises FileExistsError when the object is there already, or is
        another version by now.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        mode: Any = "create" if etag is None else {"e_tag": etag}
        try:
            with self._errors(path):
                result = obstore.put(self.store(), check_relative_path(path), data, mode=mode)
                return result["e_tag"]
        except StorageError as error:
            if isinstance(error.__cause__, AlreadyExistsError | PreconditionError):
                raise FileExistsError(path) from error
            raise

    def delete(self, path: str) -> None:
        """Remove an object."""
        import obstore

        check_relative_path(path)
        if self.local_root is not None:
            refuse_links_to(self.local_root, path)
        with self._errors(path):
            obstore.delete(self.store(), path)

    def move_in(self, file: Path, path: str) -> str | None:
        """Rename or upload a finished local file to `path`; return the ETag of an upload."""
        import obstore

        if self.local_root is not None:
            target = self.local_target(path)
            file.replace(target)
            sync_path(target.parent)
            return None
        with self._errors(path):  # in parts, then complete
            uploaded = obstore.put(self.store(), check_relative_path(path), file)
        file.unlink()
        return uploaded["e_tag"]

    def write_parts(
        self, path: str, parts: Iterable[memoryview], size_bytes: int, sha256: str
    ) -> None:
        """Write an object of a store from its parts, so that it appears complete or not at all.

        An error that `parts` raises leaves nothing behind. The object is marked with its sha256,
        which `stated_sha256` finds.
        """
        import obstore

        with self._errors(path):
            obstore.put(
                self.store(),
                check_relative_path(path),
                iter(parts) if size_bytes > PART_BYTES else b"".join(parts),
                attributes={_SHA256_ATTRIBUTE: sha256},
                chunk_size=max(PART_BYTES, -(-size_bytes // _MOST_PARTS)),
                max_concurrency=2,
            )

    def stated_sha256(self, path: str) -> str | None:
        """Return the sha256 that `write_parts` marked an object with; None where there is none."""
        import obstore

        if self.local_root is not None:
            return None
        with self._errors(path):  # no body is asked for beyond its first byte
            result = obstore.get(self.store(), check_relative_path(path), options={"range": (0, 1)})
            return result.attributes.get(_SHA256_ATTRIBUTE)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield every object below `prefix`, in the order of their paths.

        Links of a local root are followed; StorageError for one that leads in circles.
        """
        import obstore

        with self._errors(prefix or "."):
            store = self.store()  # says where there is no such directory
            if self.local_root is not None:
                refuse_endless_links(self.local_root)
            found = [
                ObjectInfo(str(meta["path"]), int(meta["size"]), meta["e_tag"])
                for page in obstore.list(store, prefix or None)
                for meta in page
            ]
        yield from sorted(found, key=lambda info: info.path)
