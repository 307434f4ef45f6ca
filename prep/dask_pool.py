"""Encoding on an existing Dask cluster: the same jobs, run by `prep.encode` on its workers.

The plan, the journal and the tars stay with the process that runs `kprep shard`; the workers read
the sources and write staged clips in the work folder, so both must be visible to them under the
same paths. dask-jobqueue and dask-kubernetes bring such a cluster to SLURM and Kubernetes.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import queue
import threading
import time
import uuid
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import click

from prep.encode import encode
from prep.errors import KprepError, UsageError, error_to_text
from prep.ffmpeg_binary import find_ffmpeg

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from prep.worker_pool import Job

_AHEAD = 2
_LOOK_SECONDS = 1.0  # between two looks at which workers there are
_ANSWER_SECONDS = 30  # the scheduler's, to what is asked of it
_CHECK_SECONDS = 120  # all workers', to their first check: kprep may lie on a slow network
_CLOSE_SECONDS = 5
_NO_WORKERS_SECONDS = 300.0
# What the client raises once its scheduler does not answer
_LOST = (OSError, RuntimeError, asyncio.CancelledError, concurrent.futures.CancelledError)


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Run one encode on a Dask worker; whatever goes wrong comes back as a value."""
    try:
        return encode(job)
    except KprepError as error:
        return {"raised": error_to_text(error)}
    except Exception as error:  # noqa: BLE001 - it must reach the parent as a result
        return {"error": f"{type(error).__name__}: {error}"}


def report(marker: str, folders: list[str]) -> tuple[str, str]:
    """Say which ffmpeg a worker would use, and which of some places it does not see: "" for none.

    `marker` is a file in the work folder. A source folder without an entry is the place of a mount
    that is not there.
    """
    sha256 = find_ffmpeg().sha256
    if not Path(marker).exists():
        return sha256, str(Path(marker).parent.parent)
    return sha256, next((folder for folder in folders if not _has_entries(folder)), "")


def _has_entries(folder: str) -> bool:
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is not None
    except OSError:
        return False


class _InWork(NamedTuple):
    job: Job
    begun: float
    workers: frozenset[str]


class DaskPool:
    """Has the interface of prep.worker_pool.WorkerPool over the workers of a Dask scheduler.

    A worker that dies costs what it had in flight: Dask gives those jobs to others, and gives a job
    up that several workers have died of. Raises UsageError when the cluster cannot be reached, or
    a worker has another ffmpeg or does not see the work folder or a source. A worker that comes
    later gets jobs once it was found to be like the others; one that is not is left alone.
    """

    def __init__(
        self,
        scheduler: str | None,
        work: Path,
        folders: Sequence[Path],
        ffmpeg_sha256: str,
        wall_seconds: float,
    ) -> None:
        if not scheduler:
            raise UsageError("--engine dask needs --scheduler ADDRESS, e.g. tcp://10.0.0.1:8786")
        try:
            import distributed
        except ImportError:
            raise UsageError("--engine dask needs Dask; pip install 'kprep[dask]'") from None
        self.wall_seconds = wall_seconds
        self._scheduler = scheduler
        self._ffmpeg_sha256 = ffmpeg_sha256
        self._marker = work / "temporary" / f"marker-{uuid.uuid4().hex}"
        self._places = (str(self._marker), [str(folder) for folder in folders])
        self._answers: queue.SimpleQueue[tuple[Job, Any]] = queue.SimpleQueue()
        self._waiting: deque[Job] = deque()
        self._futures: dict[Any, _InWork] = {}
        self._checks: dict[str, Any] = {}
        self._faults: dict[str, str] = {}  # of the workers that were checked; "" for none
        self._threads: dict[str, int] = {}  # of the workers that get jobs
        self._looked = self._no_workers_since = 0.0
        if not os.environ.get("KPREP_DEBUG"):  # what it means for us is said in a sentence
            for name in ("distributed", "distributed.client", "distributed.utils"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            self._client = _connected(distributed.Client, scheduler)
        except (OSError, TimeoutError, ValueError) as error:
            raise UsageError(f"no Dask scheduler answers at {scheduler}: {error}") from error
        try:
            self._marker.touch()
            self._check_first_workers()
        except BaseException:
            self._close()
            raise

    def _check_first_workers(self) -> None:
        try:
            reports = _in_time(_CHECK_SECONDS, self._client.run, report, *self._places)
        except _TooLateError:
            raise UsageError(
                f"not every Dask worker at {self._scheduler} has said within {_CHECK_SECONDS} s "
                "what it sees; end those that are stopped, or mend the mounts that hang, then run "
                "again"
            ) from None
        except Exception as error:
            raise UsageError(f"a Dask worker {_cannot_run(error)}") from error
        if not reports:
            raise UsageError("the Dask cluster has no workers; start some, then run again")
        for address, answer in reports.items():
            self._faults[address] = self._fault(*answer)
            if self._faults[address]:
                raise UsageError(f"Dask worker {address} {self._faults[address]}")

    def _fault(self, sha256: str, unseen: str) -> str:
        """Return what is wrong with a worker, "" where nothing is."""
        if unseen and unseen in self._places[1]:
            return f"does not see the source {unseen}, or finds it empty; mount it there"
        if unseen:
            return f"does not see {unseen}; choose a --work folder that is shared with all workers"
        if sha256 != self._ffmpeg_sha256:
            return (
                f"has another ffmpeg (sha256 {sha256[:16]}…, here {self._ffmpeg_sha256[:16]}…), so "
                "its clips would differ; set KPREP_FFMPEG alike"
            )
        return ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(KprepError), self._reached():
            for future in self._futures:
                future.cancel()
        self._close()

    def _close(self) -> None:
        with contextlib.suppress(KprepError), self._reached():
            self._client.close(timeout=_CLOSE_SECONDS)
        self._marker.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        """Say in one sentence that the scheduler is lost."""
        try:
            yield
        except _LOST as error:
            raise self._lost() from error

    def _lost(self) -> KprepError:
        return KprepError(
            f"the Dask scheduler at {self._scheduler} went away, or gave its work up; see that it "
            "runs, then run the same command again"
        )

    @property
    def wants_jobs(self) -> bool:
        """Whether a worker would otherwise soon be idle."""
        self._look()
        return self.unfinished < max(1, sum(self._threads.values())) * _AHEAD

    @property
    def unfinished(self) -> int:
        """Number of jobs submitted and not answered."""
        return len(self._waiting) + len(self._futures)

    def submit(self, job: Job) -> None:
        """Give a job to the cluster."""
        self._waiting.append(job)
        self._look()
        self._hand_out()

    def results(self, timeout_seconds: float) -> Iterator[tuple[Job, dict[str, Any]]]:
        """Yield what has been answered by now; wait at most `timeout_seconds` for the first."""
        with contextlib.suppress(queue.Empty):
            job, future = self._answers.get(timeout=max(timeout_seconds, 0.001))
            while True:
                value = self._value(future) if future in self._futures else None
                if value is not None:
                    del self._futures[future]
                    yield job, value
                elif future in self._futures:
                    self._again(future)
                    break  # to look first whether the scheduler is there
                job, future = self._answers.get_nowait()
        self._look()
        self._take_back()
        self._hand_out()
        yield from self._overdue()
        self._check_alive()

    def _look(self) -> None:
        """See which workers there are, and have those that are new checked."""
        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS:
            return
        with self._reached():
            threads: dict[str, int] = self._client.nthreads(callback_timeout=_ANSWER_SECONDS)
            for known in (self._checks, self._faults):
                for address in set(known) - set(threads):
                    del known[address]  # where it comes again, it may be another
            for address in set(threads) - set(self._checks) - set(self._faults):
                self._checks[address] = self._client.submit(
                    report, *self._places, workers=[address], pure=False, priority=1
                )
            for address, check in list(self._checks.items()):
                if check.done():
                    del self._checks[address]
                    self._judge(address, check)
        self._threads = {name: n for name, n in threads.items() if self._faults.get(name) == ""}
        self._looked = now

    def _judge(self, address: str, check: Any) -> None:
        """Book whether a worker that came late gets jobs."""
        if check.status == "finished":
            fault = self._fault(*check.result())
        else:
            fault = _cannot_run(check.exception())
        self._faults[address] = fault
        if fault:
            click.echo(f"Dask worker {address} gets no work: it {fault}", err=True)

    def _hand_out(self) -> None:
        """Give waiting jobs to the workers that were checked, and to no others."""
        while self._waiting and self._threads:
            job, workers = self._waiting.popleft(), list(self._threads)
            with self._reached():
                future: Any = self._client.submit(run_job, job.values, workers=workers, pure=False)
            self._futures[future] = _InWork(job, time.monotonic(), frozenset(workers))
            future.add_done_callback(lambda done, job=job: self._answers.put((job, done)))

    def _take_back(self) -> None:
        """Take back the jobs of which no worker is left; Dask would let them wait for those."""
        for future, (_, _, workers) in list(self._futures.items()):
            if not workers & self._threads.keys():
                self._again(future)

    def _again(self, future: Any) -> None:
        """Let a job wait for a worker again."""
        self._waiting.append(self._futures.pop(future).job)
        with self._reached():
            future.cancel()

    def _overdue(self) -> Iterator[tuple[Job, dict[str, Any]]]:
        """Give up jobs that have had their time, with that of the jobs before them in the queue."""
        threads = sum(self._threads.values())
        limit = self.wall_seconds * (1 + len(self._futures) / max(1, threads))
        now = time.monotonic()
        for future, (job, begun, _) in list(self._futures.items()):
            if now - begun > limit:
                del self._futures[future]
                with self._reached():
                    future.cancel()
                yield job, {"stalled": f"no result in {limit:.0f} s on the Dask cluster"}

    def _check_alive(self) -> None:
        """Raise KprepError when nobody has worked for minutes, and somebody should."""
        if not self.unfinished or self._threads:
            self._no_workers_since = 0.0
            return
        self._no_workers_since = self._no_workers_since or time.monotonic()
        if time.monotonic() - self._no_workers_since > _NO_WORKERS_SECONDS:
            raise KprepError(
                "the Dask cluster has no workers left that can be used; start some, then run the "
                "same command again"
            )

    def _value(self, future: Any) -> dict[str, Any] | None:
        """Return a job's answer; None where it cannot be had: its worker may have died since."""
        with self._reached(), contextlib.suppress(TimeoutError):
            if future.status == "finished":
                value: dict[str, Any] = future.result(_ANSWER_SECONDS)
                return value
            if future.status == "error":
                return {"crashed": f"{type(future.exception()).__name__} on the Dask cluster"}
            if future.status != "lost":
                raise self._lost()
        return None


def _connected(client: Any, scheduler: str) -> Any:
    """Return a client; TimeoutError when none is there in time.

    Dask's own limit covers the connection, but not what the other side says next: nothing, where it
    is stopped or no scheduler.
    """
    seconds = _ANSWER_SECONDS + _CLOSE_SECONDS
    try:
        return _in_time(seconds, client, scheduler, timeout=_ANSWER_SECONDS)
    except _TooLateError:
        raise TimeoutError(f"nothing is said within {_ANSWER_SECONDS} s") from None


class _TooLateError(Exception):
    """What was waited for has not come in time."""


def _in_time(seconds: float, call: Callable[..., Any], *values: Any, **named: Any) -> Any:
    """Return what a call gives, or raise what it raises; _TooLateError when it takes longer.

    Then its thread is left behind: Dask has no limit of time there.
    """
    made: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def run() -> None:
        try:
            made.set_result(call(*values, **named))
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            made.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    if not concurrent.futures.wait([made], seconds).done:
        raise _TooLateError
    return made.result()


def _cannot_run(error: Any) -> str:
    return (
        f"cannot run kprep ({type(error).__name__}: {error}); install the same kprep on every "
        "worker"
    )
