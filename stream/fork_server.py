"""A fork server for the loader's workers alone, beside the one that Python keeps for everybody.

It starts under conditions that would surprise a user's own processes: modules imported ahead, none
found where the user stands, deaf to Ctrl-C and to the end of a session.
"""

from __future__ import annotations

import io
import os
import signal
from contextlib import contextmanager
from multiprocessing import context, forkserver, popen_forkserver, process, resource_tracker, spawn
from multiprocessing.reduction import dump
from multiprocessing.util import Finalize, close_fds  # type: ignore[attr-defined]
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

# Imported once in the server, so that a worker starts in tens of milliseconds
_PRELOAD = [
    "torch", "numpy", "pyarrow", "pyarrow.ipc", "av", "obstore", "prep.object_urls",
    "prep.range_requests", "stream.clip_stream", "stream.preloaded",
]  # fmt: skip


class _Server(forkserver.ForkServer):
    """What `multiprocessing.forkserver` keeps one of, with a start of its own."""

    _forkserver_pid: int | None
    _forkserver_alive_fd: int | None

    def __init__(self) -> None:
        super().__init__()
        self.set_forkserver_preload(_PRELOAD)
        self._starts = Lock()

    def ensure_running(self) -> None:
        """Start the server where it does not run; any number of threads may call this at once."""
        with self._starts:
            if not self._is_running():
                # both signals come to all processes of a terminal: they are for the trainer alone
                with _safe_path(), blocked(signal.SIGHUP):
                    resource_tracker.ensure_running()  # whose start lets SIGINT through again
                    with blocked(signal.SIGINT):
                        super().ensure_running()

    def forget(self) -> None:
        """Be without a server, in a process forked from the one that started it."""
        if self._forkserver_alive_fd is not None:
            os.close(self._forkserver_alive_fd)  # or it would run for as long as this process does
        self.__init__()  # type: ignore[misc] # a lock may have been held while the process forked

    def _is_running(self) -> bool:
        pid = self._forkserver_pid
        how = os.WEXITED | os.WNOHANG | os.WNOWAIT  # the base class waits for one that has ended
        try:
            return pid is not None and os.waitid(os.P_PID, pid, how) is None
        except ChildProcessError:  # it has ended, and somebody waited for all children
            if self._forkserver_alive_fd is not None:
                os.close(self._forkserver_alive_fd)
            self._forkserver_pid = self._forkserver_alive_fd = None
            return False


_server = _Server()
os.register_at_fork(after_in_child=_server.forget)


class _Popen(popen_forkserver.Popen):
    """A process that our server starts."""

    _fds: list[int]

    def _launch(self, worker: process.BaseProcess) -> None:
        """Do what the base class does, which knows Python's server only."""
        preparation = spawn.get_preparation_data(worker.name)
        main = preparation.get("init_main_from_path")
        if main is not None and not Path(main).is_file():
            del preparation["init_main_from_path"]  # a script from standard input
        data = io.BytesIO()
        context.set_spawning_popen(self)
        try:
            dump(preparation, data)
            dump(worker, data)
        finally:
            context.set_spawning_popen(None)
        self.sentinel, pipe = _server.connect_to_new_process(self._fds)
        # the child knows by the other end of this pipe that its parent is there
        self.finalizer = Finalize(self, close_fds, (os.dup(pipe), self.sentinel))
        with os.fdopen(pipe, "wb") as stream:
            stream.write(data.getbuffer())
        self.pid = forkserver.read_signed(self.sentinel)


class _Process(process.BaseProcess):
    _start_method = "forkserver"

    @staticmethod
    def _Popen(worker: process.BaseProcess) -> _Popen:  # noqa: N802 - Python's name
        return _Popen(worker)


class _Context(context.ForkServerContext):
    Process = _Process  # type: ignore[assignment]


def running_server_context() -> Any:
    """Return a `multiprocessing` context whose processes our server starts, which runs now."""
    _server.ensure_running()
    return _Context()


@contextmanager
def _safe_path() -> Iterator[None]:
    """Let Python find no modules where the user stands, such as a `stream.py`, in place of ours."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("PYTHONSAFEPATH", None)
        else:
            os.environ["PYTHONSAFEPATH"] = before


@contextmanager
def blocked(number: signal.Signals) -> Iterator[None]:
    """Start processes within the block that never get this signal; this one does not lose it.

    The mask is the thread's, and is inherited: no handler is changed, and none needs the main
    thread.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
