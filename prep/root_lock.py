"""Keeping two conversions apart: locks on the work folder and on the root."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any

from prep.errors import KprepError, StorageError, UsageError
from prep.format.layout import LOCK_NAME, WORK_NAME
from prep.links import refuse_links_in
from prep.write_errors import write_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from prep.storage import Storage

_TTL_SECONDS = 120.0

_log = logging.getLogger("kprep.lock")


@contextlib.contextmanager
def file_lock(path: Path, busy: str) -> Iterator[None]:
    """Hold a lock file while the block runs; raise UsageError with `busy` when another run does.

    A KprepError says where the file cannot be made, as on a mount that can only be read.
    """
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("a")
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{busy} (it holds {path}); wait for it to end") from None
        if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
            raise UsageError(f"{busy}; it has just ended, so run the same command again")
        yield


@contextlib.contextmanager
def root_lock(storage: Storage, work: Path, lock_folder: Path) -> Iterator[Callable[[], None]]:
    """Hold the lock of a root while the block runs: one conversion into a root at a time.

    Yields a function that raises KprepError when the lock was lost meanwhile. On disk it is a lock
    file in the root, wherever the work folder is. In a bucket it is an object made by a conditional
    PUT, renewed while we live and void after two minutes; it names the work folder's owner, and as
    that folder is locked on this machine, a run that finds its own name there follows one that was
    killed, and takes over at once. Another run takes over when it has seen for two minutes that
    nobody renews the lock, whatever the clocks of both machines say.
    """
    if storage.local_root is not None:
        refuse_links_in(storage.local_root / WORK_NAME)
        with file_lock(lock_folder / "lock", f"another kprep is converting into {storage.root}"):
            yield lambda: None
        return
    lock = _BucketLock(storage, _owner(work))
    lock.acquire()
    try:
        yield lock.check
    finally:
        lock.release()


def _owner(work: Path) -> str:
    path = work / "owner"
    if not path.exists():
        path.write_text(uuid.uuid4().hex)
    return path.read_text()


def _holder(data: bytes) -> tuple[str | None, float]:
    """Return who holds a lock and when it is void; (None, 0.0) for what is no lock of ours."""
    try:
        held: dict[str, Any] = json.loads(data)
        return held["owner"], float(held["expires"])
    except (ValueError, KeyError, TypeError):
        return None, 0.0


class _BucketLock:
    def __init__(self, storage: Storage, owner: str) -> None:
        self.storage = storage
        self.owner = owner
        self._etag: str | None = None
        self._expires = 0.0  # Unix time in seconds at which the lock that we wrote is void
        self._ended = threading.Event()
        self._lost: str = ""
        self._thread = threading.Thread(target=self._renew, name="kprep-lock", daemon=True)

    def acquire(self) -> None:
        try:
            self._write(None)
        except FileExistsError:
            self._take_over()
        self._thread.start()

    def _take_over(self) -> None:
        """Replace a lock that is void or our own; UsageError while somebody else holds it."""
        data, etag = self.storage.read_with_etag(LOCK_NAME)
        owner, expires = _holder(data)
        if owner != self.owner:
            left = expires - time.time()
            if 0 < left <= _TTL_SECONDS:
                raise self._held(f" (its lock is void in {left:.0f} s unless it lives)")
            etag = self._outlast(etag)
        try:
            self._write(etag)
        except FileExistsError:
            raise UsageError(
                f"another kprep has just begun to convert into {self.storage.root}; wait for it"
            ) from None

    def _outlast(self, etag: str | None) -> str | None:
        """Return a lock's version when it was not renewed for its whole time, None when it is gone.

        UsageError when somebody renews it: that it looks void can be because our clock is ahead.
        """
        _log.warning(
            "%s has a lock that seems to be left behind; taken in %.0f s, unless it is renewed",
            self.storage.root,
            _TTL_SECONDS,
        )
        end = time.monotonic() + _TTL_SECONDS
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _TTL_SECONDS / 24))
            try:
                if self.storage.read_with_etag(LOCK_NAME)[1] != etag:
                    raise self._held()
            except StorageError as error:
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise
                return None
        return etag

    def _held(self, more: str = "") -> UsageError:
        return UsageError(
            f"another kprep is converting into {self.storage.root}{more}; wait for it to end"
        )

    def _write(self, etag: str | None) -> None:
        expires = time.time() + _TTL_SECONDS
        text = json.dumps({"owner": self.owner, "expires": expires}).encode()
        self._etag = self.storage.put_if(LOCK_NAME, text, etag)
        self._expires = expires

    def _renew(self) -> None:
        failing_since = 0.0
        while not self._ended.wait(_TTL_SECONDS / 4):
            try:
                if not self._renewed():
                    self._lost = "another run took the lock"
                    return
                failing_since = 0.0
            except KprepError as error:
                failing_since = failing_since or time.monotonic()
                if time.monotonic() - failing_since > _TTL_SECONDS / 2:
                    self._lost = str(error)
                    return

    def _renewed(self) -> bool:
        """Renew the lock, or find that a renewal came through whose answer did not.

        False when another run has the lock.
        """
        try:
            self._write(self._etag)
        except FileExistsError:
            data, etag = self.storage.read_with_etag(LOCK_NAME)
            owner, expires = _holder(data)
            if owner != self.owner:
                return False
            self._etag, self._expires = etag, expires
        return True

    def _why_lost(self) -> str:
        """Return why the lock is not ours, "" while it is; what was lost once stays lost."""
        if not self._lost and time.time() >= self._expires:  # we were suspended, for instance
            self._lost = f"it was not renewed for {_TTL_SECONDS:.0f} s"
        return self._lost

    def check(self) -> None:
        """Raise KprepError when the lock was lost."""
        if why := self._why_lost():
            raise KprepError(f"the lock of {self.storage.root} was lost: {why}; run again")

    def release(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        if not self._why_lost():
            with contextlib.suppress(KprepError):  # it becomes void by itself
                self.storage.delete(LOCK_NAME)
