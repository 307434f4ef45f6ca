"""The two ends of a copy: which pairs make sense, who else writes, how long uploads may take."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from prep.errors import UsageError
from prep.format.layout import WORK_NAME
from prep.root_lock import file_lock, root_lock
from prep.storage import Storage
from prep.user_cache import cache_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_UPLOAD_TIMEOUT = "300s"  # of one part: 8 MiB over a slow line, of many parts at once


def check_roots(source: Storage, destination: Storage) -> None:
    """Raise UsageError where one root is or contains the other, or is not to be written."""
    if destination.is_read_only:
        raise UsageError(f"{destination.root} is read only; copy to a directory, s3:// or gs://")
    ends = [_resolved(storage) for storage in (source, destination)]
    for one, other in (ends, ends[::-1]):
        if one == other or other.startswith(f"{one.rstrip('/')}/"):
            raise UsageError(
                f"{destination.root} and {source.root} overlap; copy to a root of its own"
            )
    if destination.local_root is not None:
        _refuse_file(destination.local_root)


def _refuse_file(folder: Path) -> None:
    """Raise UsageError where a folder cannot be made, as a file stands in its place or above it."""
    place = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not place.is_dir():
        raise UsageError(f"{place} is no folder; give a folder for the dataset")


def _resolved(storage: Storage) -> str:
    return str(storage.local_root.resolve()) if storage.local_root is not None else storage.root


def patient(storage: Storage) -> Storage:
    """Return the same root with time enough to upload large parts over a slow line."""
    if storage.local_root is not None:
        return storage
    given = storage.options.get("client_options", {})
    options = {**storage.options, "client_options": {"timeout": _UPLOAD_TIMEOUT, **given}}
    return Storage(storage.root, options, storage.retry)


@contextlib.contextmanager
def destination_lock(destination: Storage) -> Iterator[Callable[[], None]]:
    """Keep other writers out of a destination while the block runs; see root_lock.

    For a bucket, a folder of this user on this machine says who we are: a run that follows one that
    was killed takes its lock over at once.
    """
    if destination.local_root is not None:
        folder = destination.local_root / WORK_NAME
        with root_lock(destination, folder, folder) as check:
            yield check
        return
    # without a home, a run after a kill has to wait until the lock is void
    folder = cache_folder("copies", destination.root)
    with (
        file_lock(folder / "lock", f"another kprep is copying into {destination.root}"),
        root_lock(destination, folder, folder) as check,
    ):
        yield check


def remove_lock(destination: Storage) -> None:
    """Take the lock file off a local root; we hold it."""
    if destination.local_root is None:
        return
    folder = destination.local_root / WORK_NAME
    (folder / "lock").unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # unfinished work of others may be there
        folder.rmdir()
