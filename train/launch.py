"""`--nproc N`: start N processes on this machine, and end them all when one of them fails."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from typing import TYPE_CHECKING

from prep.errors import KprepError, UsageError
from stream.fork_server import blocked
from stream.workers import end_with_parent
from train.signals import EXIT_CODES, InterruptedBySignalError, ignore_further

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

    # exit code: 0 for a crash, minus a signal's number for a signal; message; when on the monotonic
    # clock; whether all ranks end so
    _Report = tuple[int, str, float, bool]

# When one rank fails, others fail from losing it: their reports are waited for this long, so that
# the first cause is shown and not its echo.
_ECHO_SECONDS = 1.0
_TERMINATE_SECONDS = 5.0
# Where all ranks end together, the one that writes may still send curves and traces.
_FINISH_SECONDS = 60.0


def launch(num_processes: int, target: Callable[..., object], *arguments: object) -> None:
    """Run `target(*arguments)` in `num_processes` new processes, as torchrun would.

    Each finds RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in its environment. Raises
    the KprepError of a process that fails with one, and a KprepError for any other end, after all
    processes are gone. SIGTERM, SIGUSR1 and Ctrl-C are passed on to all of them, and awaited.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    # The store's port is chosen by the system and held by this process: no other run can take it.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(num_processes)]
    processes = [
        context.Process(
            target=_run_rank,
            args=(_environment(rank, num_processes, store.port), pipes[rank][1], target, arguments),
        )
        for rank in range(num_processes)
    ]
    try:
        for process, (_, sender) in zip(processes, pipes, strict=True):
            with blocked(signal.SIGHUP):  # of the whole session; it is for this process
                process.start()
            sender.close()
        with _passing_on(processes) as signals:
            _watch(processes, [receiver for receiver, _ in pipes], signals)
    finally:
        _end(processes)


def _environment(rank: int, size: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun would set for one process."""
    threads = max(1, (os.cpu_count() or 1) // size)
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the launcher holds the store: rank 0 makes none
        # N processes with a thread for each core would only fight over them
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }


def _run_rank(
    environment: dict[str, str],
    report: Connection,
    target: Callable[..., object],
    arguments: tuple[object, ...],
) -> None:
    """Be one rank: run the target, and report the error that ended it."""
    end_with_parent()
    os.environ.update(environment)
    try:
        target(*arguments)
    except InterruptedBySignalError as error:
        ignore_further()
        report.send((-error.number, str(error), time.monotonic(), True))
        sys.exit(error.exit_code)
    except KprepError as error:
        report.send((error.exit_code, str(error), time.monotonic(), _is_shared(error)))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - whatever it is, the launcher shows it
        report.send((0, traceback.format_exc(), time.monotonic(), _is_shared(error)))
        sys.exit(1)
    finally:
        # process groups that hang in a reference cycle until the interpreter is torn down abort it
        gc.collect()


def _is_shared(error: Exception) -> bool:
    from train.distributed import is_raised_together  # loads torch

    return is_raised_together(error)


@contextmanager
def _passing_on(processes: list[SpawnProcess]) -> Iterator[list[int]]:
    """Pass signals on to the processes while the block runs; yield those that came."""
    came: list[int] = []

    def pass_on(number: int, _: object) -> None:
        came.append(number)
        for process in processes:
            if process.pid is not None and process.exitcode is None:
                os.kill(process.pid, number)

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {number: signal.signal(number, pass_on) for number in EXIT_CODES}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(processes: list[SpawnProcess], receivers: list[Connection], signals: list[int]) -> None:
    """Wait for all processes to end well; raise as soon as one does not."""
    running = dict(enumerate(processes))
    while running:
        wait([process.sentinel for process in running.values()])
        for rank in [rank for rank, process in running.items() if process.exitcode is not None]:
            if running.pop(rank).exitcode != 0:
                time.sleep(_ECHO_SECONDS)
                reports = _reports(receivers)
                if any(is_shared for *_, is_shared in reports.values()):
                    _join(processes, _FINISH_SECONDS)
                    reports |= _reports(receivers)
                raise _cause(processes, reports, rank, signals)


def _cause(
    processes: list[SpawnProcess], reports: dict[int, _Report], first: int, signals: list[int]
) -> KprepError:
    """Return the error to show: a rank's own sentence if there is one, else how the first ended."""
    for exit_code, message, *_ in reports.values():
        if exit_code < 0:
            return InterruptedBySignalError(-exit_code, message)
        if exit_code == UsageError.exit_code:
            return UsageError(message)
        if exit_code:
            return KprepError(message)
    if signals:
        name = signal.Signals(signals[0]).name
        return InterruptedBySignalError(
            signals[0], f"stopped by {name} before training began, or after it"
        )
    # a process that was killed says nothing; those that say something then only lost it
    killed = [rank for rank, process in enumerate(processes) if (process.exitcode or 0) < 0]
    if killed:
        number = -(processes[killed[0]].exitcode or 0)
        return KprepError(
            f"process {killed[0]} of {len(processes)} was killed by signal {number}; "
            "signal 9 is often the kernel's, out of memory"
        )
    if not reports:
        text = f"exit status {processes[first].exitcode}, no message"
    else:  # the others may have ended from losing it before we looked
        first = min(reports, key=lambda rank: reports[rank][2])
        text = reports[first][1]
    return KprepError(f"process {first} of {len(processes)} failed:\n{text}")


def _reports(receivers: list[Connection]) -> dict[int, _Report]:
    """Return what ranks have reported since they were asked last, by rank."""
    found = {}
    for rank, receiver in enumerate(receivers):
        with suppress(EOFError, OSError):
            if receiver.poll():
                found[rank] = receiver.recv()
    return found


def _end(processes: list[SpawnProcess]) -> None:
    """End what still runs: first politely, then by force."""
    started = [process for process in processes if process.pid is not None]
    for process in started:
        process.terminate()
    _join(started, _TERMINATE_SECONDS)
    for process in started:
        if process.is_alive():
            process.kill()
            process.join()


def _join(processes: list[SpawnProcess], seconds: float) -> None:
    """Wait for processes to end, so long at most."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
