"""Encoding on an existing Dask cluster: the same jobs, run by `prep.encode` on its workers.

The plan, the journal and the tars stay with the process that runs `kprep shard`; the workers read
the sources and write staged clips in the work folder, so both must be visible to them under the
same paths. dask-jobqueue and dask-kubernetes bring such a cluster to SLURM and Kubernetes.
"""

from __future__ import annotations

import contextlib
import queue
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from prep.encode import encode
from prep.errors import KprepError, UsageError
from prep.ffmpeg_binary import find_ffmpeg

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prep.worker_pool import Job

_AHEAD = 2
_CONNECT_SECONDS = 30
_NO_WORKERS_SECONDS = 300.0


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Run one encode on a Dask worker; whatever goes wrong comes back as a value."""
    try:
        return encode(job)
    except Exception as error:  # noqa: BLE001 - it must reach the parent as a result
        return {"error": f"{type(error).__name__}: {error}"}


def report(marker: str) -> tuple[str, bool]:
    """Say which ffmpeg a worker would use, and whether it sees a file in the work folder."""
    return find_ffmpeg().sha256, Path(marker).exists()


class DaskPool:
    """Has the interface of prep.worker_pool.WorkerPool over the workers of a Dask scheduler.

    A worker that dies costs what it had in flight: Dask gives those jobs to others, and gives a job
    up that several workers have died of. Raises UsageError when the cluster cannot be reached, or
    a worker has another ffmpeg or does not see the work folder.
    """

    def __init__(
        self, scheduler: str | None, work: Path, ffmpeg_sha256: str, wall_seconds: float
    ) -> None:
        if not scheduler:
            raise UsageError("--engine dask needs --scheduler ADDRESS, e.g. tcp://10.0.0.1:8786")
        try:
            import distributed
        except ImportError:
            raise UsageError("--engine dask needs Dask; pip install 'kprep[dask]'") from None
        self.wall_seconds = wall_seconds
        self._client: Any
        self._answers: queue.SimpleQueue[tuple[Job, Any]] = queue.SimpleQueue()
        self._futures: dict[Any, tuple[Job, float]] = {}
        self._no_workers_since = 0.0
        try:
            client: Any = distributed.Client
            self._client = client(scheduler, timeout=_CONNECT_SECONDS)
        except (OSError, TimeoutError, ValueError) as error:
            raise UsageError(f"no Dask scheduler answers at {scheduler}: {error}") from error
        try:
            self._check_workers(work, ffmpeg_sha256)
        except BaseException:
            self._client.close()
            raise

    def _check_workers(self, work: Path, ffmpeg_sha256: str) -> None:
        marker = work / "temporary" / f"marker-{uuid.uuid4().hex}"
        marker.touch()
        try:
            reports = self._client.run(report, str(marker))
        except Exception as error:
            raise UsageError(
                f"a Dask worker cannot run kprep ({type(error).__name__}: {error}); install the "
                "same kprep on every worker"
            ) from error
        finally:
            marker.unlink()
        if not reports:
            raise UsageError("the Dask cluster has no workers; start some, then run again")
        for address, (sha256, sees) in reports.items():
            if not sees:
                raise UsageError(
                    f"Dask worker {address} does not see {work}; choose a --work folder that is "
                    "shared with all workers"
                )
            if sha256 != ffmpeg_sha256:
                raise UsageError(
                    f"Dask worker {address} has another ffmpeg (sha256 {sha256[:16]}…, here "
                    f"{ffmpeg_sha256[:16]}…), so its clips would differ; set KPREP_FFMPEG alike"
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for future in self._futures:
            future.cancel()
        self._client.close()

    @property
    def wants_jobs(self) -> bool:
        """Whether a worker would otherwise soon be idle."""
        threads: int = sum(self._client.nthreads().values())
        return self.unfinished < max(1, threads) * _AHEAD

    @property
    def unfinished(self) -> int:
        """Number of jobs submitted and not answered."""
        return len(self._futures)

    def submit(self, job: Job) -> None:
        """Give a job to the cluster."""
        future: Any = self._client.submit(run_job, job.values, pure=False)
        self._futures[future] = (job, time.monotonic())
        future.add_done_callback(lambda done: self._answers.put((job, done)))

    def results(self, timeout_seconds: float) -> Iterator[tuple[Job, dict[str, Any]]]:
        """Yield what has been answered by now; wait at most `timeout_seconds` for the first."""
        with contextlib.suppress(queue.Empty):
            job, future = self._answers.get(timeout=max(timeout_seconds, 0.001))
            while True:
                if self._futures.pop(future, None) is not None:
                    yield job, _value(future)
                job, future = self._answers.get_nowait()
        yield from self._overdue()
        self._check_alive()

    def _overdue(self) -> Iterator[tuple[Job, dict[str, Any]]]:
        """Give up jobs that have had their time, with that of the jobs before them in the queue."""
        threads: int = sum(self._client.nthreads().values())
        limit = self.wall_seconds * (1 + len(self._futures) / max(1, threads))
        now = time.monotonic()
        for future, (job, begun) in list(self._futures.items()):
            if now - begun > limit:
                del self._futures[future]
                future.cancel()
                yield job, {"stalled": f"no result in {limit:.0f} s on the Dask cluster"}

    def _check_alive(self) -> None:
        """Raise KprepError when the cluster has had no worker for minutes: nobody works on."""
        if not self._futures or self._client.nthreads():
            self._no_workers_since = 0.0
            return
        self._no_workers_since = self._no_workers_since or time.monotonic()
        if time.monotonic() - self._no_workers_since > _NO_WORKERS_SECONDS:
            raise KprepError(
                "the Dask cluster has no workers left; start some, then run the same command again"
            )


def _value(future: Any) -> dict[str, Any]:
    if future.status == "finished":
        value: dict[str, Any] = future.result()
        return value
    error = future.exception()
    return {"crashed": f"{type(error).__name__} on the Dask cluster"}
