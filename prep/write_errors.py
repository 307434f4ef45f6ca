"""What is said of a file or output that cannot be written: its path is wrong, or its disk fails."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import TYPE_CHECKING

from prep.errors import KprepError, StorageError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WAY_OUT = "see that there is room and that the disk is sound, then run the same command again"
# What another path mends; any other error is of the disk or the mount
_WRONG_PATH = frozenset(
    {
        errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM,
        errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EILSEQ, errno.ENXIO,
        errno.ETXTBSY,
    }
)  # fmt: skip


def write_error(what: str, error: OSError) -> KprepError:
    """Return the error of a file or folder that cannot be written; `what` begins its sentence.

    A UsageError where the path cannot be right, else a StorageError.
    """
    why = error.strerror or str(error)
    if error.errno in _WRONG_PATH:
        return UsageError(f"{what} cannot be written: {why}; give another path")
    return StorageError(f"{what} cannot be written ({why}); {WAY_OUT}")


@contextlib.contextmanager
def write_errors(path: Path, option: str = "") -> Iterator[None]:
    """Turn the OSError of writing a file, which `option` named, into one sentence about it."""
    try:
        yield
    except OSError as error:
        raise write_error(f"{option} {path}".lstrip(), error) from error


def write_to_nowhere() -> None:
    """Send standard output to nowhere from here on, with what waits to be written."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
