"""The loader's worker processes: how they start, and that they end with the process they serve."""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import wait
from threading import Thread
from typing import TYPE_CHECKING, Any

from prep.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

# Imported once in the fork server, so that a worker starts in tens of milliseconds
_PRELOAD = [
    "torch", "numpy", "pyarrow", "pyarrow.ipc", "av", "obstore", "prep.object_urls",
    "prep.range_requests", "stream.clip_stream", "stream.preloaded",
]  # fmt: skip


def begin_worker(_: int) -> None:
    """Be torch's `worker_init_fn`.

    torch's workers watch their parent process, but that is the fork server here: after a SIGKILL
    of the trainer, server and workers would keep each other alive for ever.
    """
    end_with_parent()


def end_with_parent() -> None:
    """Make this process end with the one that started it, however that comes about."""
    parent = multiprocessing.process.parent_process()
    if parent is not None:
        Thread(target=_end_with, args=(parent.sentinel,), name="kprep-end", daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def fork_server_context() -> Any:
    """Return the start method for workers; their server imports torch (seconds) from now on.

    Plain fork is never used: the object store's client hangs in a forked child once the parent has
    read from it.
    """
    _check_main_guard()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with _safe_path():
        forkserver.ensure_running()
    return context


@contextmanager
def _safe_path() -> Iterator[None]:
    """Let Python find no modules where the user stands, such as a `stream.py`, in place of ours."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        del os.environ["PYTHONSAFEPATH"]
        if before is not None:
            os.environ["PYTHONSAFEPATH"] = before


def _check_main_guard() -> None:
    """Say what is wrong when a worker's import of the user's script would start workers again."""
    if getattr(multiprocessing.process.current_process(), "_inheriting", False):
        raise UsageError(
            "the loader's workers import your script, which starts a loader again; "
            'put the script\'s work into a function under `if __name__ == "__main__":`'
        )
