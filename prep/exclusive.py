"""Keeping conversions out of a root while its index is made or mended."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from prep.format.layout import WORK_NAME
from prep.root_lock import root_lock
from prep.temporary import temporary_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prep.storage import Storage


@contextlib.contextmanager
def exclusive(storage: Storage) -> Iterator[Callable[[], None]]:
    """Hold the lock of a root as a conversion does; yields what raises when it was lost."""
    with temporary_folder("kprep-lock-") as work:
        folder = (storage.local_root or Path(work)) / WORK_NAME
        try:
            with root_lock(storage, Path(work), folder) as check_lock:
                try:
                    yield check_lock
                finally:
                    (folder / "lock").unlink(missing_ok=True)
        finally:
            with contextlib.suppress(OSError):  # work of a conversion may be in it
                folder.rmdir()
