"""The loader's worker processes: how they start, and that they end with the process they serve."""

from __future__ import annotations

import multiprocessing.process
import os
import sys
from contextlib import suppress
from multiprocessing.connection import wait
from threading import Thread
from typing import TYPE_CHECKING, Any

from prep.errors import KprepError, UsageError
from stream.fork_server import running_server_context

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.utils.data import DataLoader

_NO_GUARD = (
    "the loader's workers import your script, which starts a loader again; put the script's work "
    'into a function under `if __name__ == "__main__":`'
)
_NO_GUARD_EXIT = 78  # EX_CONFIG of sysexits.h


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
    return running_server_context()


def made_by_workers(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield what torch's workers make.

    Raises UsageError where the user's script has no `__main__` guard, and KprepError where a worker
    has ended in another way; the workers that are left are of no use then, see `stop_workers`.
    """
    try:
        yield from loader  # its own iterator waits for all workers before it begins anew
    except BrokenPipeError as error:  # more is sent to a worker than a pipe holds
        raise KprepError(
            "a worker of the loader ended at its start, and may have said why above"
        ) from error
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error):
            raise
        # torch does not say how they ended
        workers = getattr(getattr(loader, "_iterator", None), "_workers", [])
        codes = {worker.exitcode for worker in workers} - {None, 0}
        if _NO_GUARD_EXIT in codes:
            raise UsageError(_NO_GUARD) from None
        how = " and ".join(sorted(map(_way_to_end, codes))) or "ended"
        raise KprepError(f"a worker of the loader {how}") from error


def stop_workers(loader: DataLoader[Any]) -> None:
    """Stop a loader's workers; whoever met an error, or Ctrl-C, does not wait for them.

    Left alone they would stay for as long as a traceback refers to them, as the last one does in a
    notebook. torch waits 5 seconds for each that is busy, and ends it then.
    """
    stop = getattr(getattr(loader, "_iterator", None), "_shutdown_workers", None)
    if stop is not None:
        Thread(target=stop, name="kprep-stop", daemon=True).start()


def _way_to_end(code: int) -> str:
    if code > 0:
        return f"ended with exit code {code}, and may have said why above"
    return f"was killed by signal {-code}; 9 is often the kernel's, out of memory"


def _check_main_guard() -> None:
    """End a process whose import of the user's script would start workers again, and say why.

    A worker's own traceback would bury the sentence; `made_by_workers` says it again at the end.
    """
    if getattr(multiprocessing.process.current_process(), "_inheriting", False):
        with suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(f"{_NO_GUARD}\n")
            sys.stderr.flush()
        os._exit(_NO_GUARD_EXIT)
