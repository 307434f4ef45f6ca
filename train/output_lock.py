"""One training at a time into an output directory: a later one would destroy the earlier's work."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

from prep.errors import UsageError
from prep.write_errors import write_error
from train.agreement import raising_together
from train.attempts import is_restarted
from train.progress import log

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from train.distributed import World

LOCK_NAME = ".lock"
_POLL_SECONDS = 0.5
# A run that was asked to end still writes a checkpoint; NFS gives back the locks of a machine that
# is gone after 90 s.
_PATIENCE_SECONDS = 120.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system that has none


@contextmanager
def output_lock(output: Path, world: World, resume: str | None) -> Iterator[None]:
    """Keep other trainings out of a directory while the block runs; rank 0 does, all ranks call.

    The system gives the lock of a process that is gone back, however it ended. A run that resumes,
    or that its launcher started again, waits a while for the one before it. Raises, on all ranks,
    UsageError where another run has the directory or its path cannot be right, StorageError where
    the disk fails.
    """
    with ExitStack() as held:
        with raising_together(world):
            if world.is_first:
                waits = resume is not None or is_restarted(output)
                _take(output, held, _PATIENCE_SECONDS if waits else 0.0)
        yield


def _take(output: Path, held: ExitStack, patience_seconds: float) -> None:
    path, is_new = output / LOCK_NAME, not output.exists()
    busy, deadline = "", time.monotonic() + patience_seconds
    try:
        while (file := _locked(path)) is None:
            if time.monotonic() >= deadline:
                raise UsageError(
                    f"{busy or _busy(path)}; wait for it to end, or choose another directory "
                    f"(should its machine be gone, delete {path})"
                )
            if not busy:
                busy = _busy(path)
                log.info("%s; waiting up to %d s for it to end", busy, patience_seconds)
            time.sleep(_POLL_SECONDS)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise write_error(f"--output {output}", error) from error
        log.info("no locks on %s (%s): nothing keeps a second run out", output, error)
        return
    held.enter_context(file)
    held.callback(_clear, path, is_new=is_new)
    with suppress(OSError):  # only for people
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()


def _locked(path: Path) -> TextIO | None:
    """Return the open file with its lock; None while another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as opened:
        file = opened.enter_context(path.open("a", encoding="utf-8"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
            return None  # that of a run which has just ended, and removed it
        opened.pop_all()
        return file


def _busy(path: Path) -> str:
    holder = ""
    with suppress(OSError, UnicodeDecodeError):
        holder = path.read_text(encoding="utf-8")
    return f"{holder or 'another run'} trains into --output {path.parent}"


def _clear(path: Path, *, is_new: bool) -> None:
    """Remove the lock, and a new directory in which nothing came of the run."""
    with suppress(OSError):
        path.unlink()
        if is_new:
            path.parent.rmdir()
