"""A pool of worker processes in which a crash or a hang costs one job, never the run.

Plain subprocesses with pipes rather than multiprocessing: callers need no `__main__` guard,
nothing is pickled, and a worker that a hostile file kills is simply started again.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, Self, cast

from prep.errors import KprepError

if TYPE_CHECKING:
    from collections.abc import Iterator

_AHEAD = 2  # jobs given to a worker at a time: it starts the next one while we book the last


@dataclass
class Job:
    """One unit of work: `values` go to the worker, `tag` stays here and comes back."""

    tag: Any
    values: dict[str, Any]
    attempts: int = 0


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    jobs: deque[Job] = field(default_factory=deque)
    since: float = 0.0
    received: bytes = b""
    ready: bool = False


class WorkerPool:
    """`count` processes that run one task of prep.worker.

    A job whose worker dies is given once more to a fresh worker; when that dies too, the result is
    `{"crashed": "signal 11"}`. A job without a result after `wall_seconds` gives `{"stalled": …}`.
    `ahead` is how many jobs a worker is given at a time. It must be 1 where job and result can be
    larger than a pipe holds: else we wait to hand over a job while the worker waits to hand over a
    result.
    """

    def __init__(self, task: str, count: int, wall_seconds: float, *, ahead: int = _AHEAD) -> None:
        self.task = task
        self.count = count
        self.wall_seconds = wall_seconds
        self.ahead = ahead
        self._queue: deque[Job] = deque()
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._killed_at_start = 0  # one after the other, with no worker that got ready between

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def wants_jobs(self) -> bool:
        """Whether a worker would otherwise soon be idle."""
        return self.unfinished < self.count * self.ahead + 1

    @property
    def unfinished(self) -> int:
        """Number of jobs submitted and not answered."""
        return len(self._queue) + sum(len(worker.jobs) for worker in self._workers)

    def start_ahead(self, most: int) -> None:
        """Start workers now, at most so many; the others start when there are jobs for them."""
        while len(self._workers) < min(self.count, most):
            self._start()

    def submit(self, job: Job) -> None:
        """Queue a job."""
        self._queue.append(job)
        self._dispatch()

    def results(self, timeout_seconds: float) -> Iterator[tuple[Job, dict[str, Any]]]:
        """Yield what has been answered by now; wait at most `timeout_seconds` for the first."""
        for key, _ in self._selector.select(timeout_seconds):
            yield from self._receive(cast("_Worker", key.data))
        yield from self._overdue()
        self._dispatch()

    def stop(self) -> None:
        """Kill all workers and whatever they have started."""
        for worker in self._workers:
            _kill(worker)
        self._workers.clear()
        self._selector.close()

    def _dispatch(self) -> None:
        while self._queue:
            idle = min(self._workers, key=lambda worker: len(worker.jobs), default=None)
            if (idle is None or idle.jobs) and len(self._workers) < self.count:
                idle = self._start()
            if idle is None or len(idle.jobs) >= self.ahead:
                return
            self._give(idle, self._queue.popleft())

    def _start(self) -> _Worker:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "prep.worker", self.task],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("KPREP_DEBUG") else subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the parent, which lets workers finish
        )
        worker = _Worker(process)
        self._workers.append(worker)
        stdout = cast("IO[bytes]", process.stdout)
        os.set_blocking(stdout.fileno(), False)
        self._selector.register(stdout, selectors.EVENT_READ, worker)
        return worker

    def _give(self, worker: _Worker, job: Job) -> None:
        if not worker.jobs:
            worker.since = time.monotonic()
        worker.jobs.append(job)
        stdin = cast("IO[bytes]", worker.process.stdin)
        with contextlib.suppress(BrokenPipeError):  # its end is noticed where it is read
            stdin.write(json.dumps(job.values).encode() + b"\n")
            stdin.flush()

    def _receive(self, worker: _Worker) -> Iterator[tuple[Job, dict[str, Any]]]:
        stdout = cast("IO[bytes]", worker.process.stdout)
        while chunk := stdout.read(1 << 16):
            worker.received += chunk
        *lines, worker.received = worker.received.split(b"\n")
        for line in lines:
            if not worker.ready:  # the first line says that everything it needs is imported
                worker.ready = True
                self._killed_at_start = 0
                continue
            job = worker.jobs.popleft()
            worker.since = time.monotonic()
            yield job, json.loads(line)
        if chunk == b"":
            yield from self._lost(worker)

    def _lost(self, worker: _Worker) -> Iterator[tuple[Job, dict[str, Any]]]:
        """Try the job that a worker died of once more; its other jobs go back untouched."""
        self._remove(worker)
        if not worker.ready:
            self._cannot_start(worker.process.returncode)
            self._queue.extendleft(reversed(worker.jobs))
            return
        if not worker.jobs:
            return
        suspect = worker.jobs.popleft()
        self._queue.extendleft(reversed(worker.jobs))
        suspect.attempts += 1
        if suspect.attempts < 2:
            self._queue.appendleft(suspect)
        else:
            code = worker.process.returncode
            yield suspect, {"crashed": f"signal {-code}" if code < 0 else f"exit code {code}"}

    def _cannot_start(self, code: int) -> None:
        """Raise KprepError where starting another worker would end the same way."""
        if code >= 0:
            raise KprepError(
                f"a worker process cannot start (it ended with {code}); "
                "set KPREP_DEBUG=1 to see why"
            )
        self._killed_at_start += 1
        if self._killed_at_start > self.count:  # all can be killed at once, where memory is short
            way = (
                "often the kernel's, out of memory; use fewer workers, or give them more memory"
                if code == -signal.SIGKILL
                else "set KPREP_DEBUG=1 to see why"
            )
            raise KprepError(f"worker processes end as they start, by signal {-code}; {way}")

    def _overdue(self) -> Iterator[tuple[Job, dict[str, Any]]]:
        now = time.monotonic()
        for worker in list(self._workers):
            if worker.jobs and now - worker.since > self.wall_seconds:
                self._remove(worker)
                job = worker.jobs.popleft()
                self._queue.extendleft(reversed(worker.jobs))
                yield job, {"stalled": f"no result in {self.wall_seconds:.0f} s"}

    def _remove(self, worker: _Worker) -> None:
        self._selector.unregister(cast("IO[bytes]", worker.process.stdout))
        _kill(worker)
        self._workers.remove(worker)


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def _kill(worker: _Worker) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.process.pid, signal.SIGKILL)
    worker.process.wait()
    for pipe in (worker.process.stdin, worker.process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
