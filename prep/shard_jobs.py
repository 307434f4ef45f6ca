"""Many shards over worker processes: progress by bytes, and a name for whatever kills a worker."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from prep.errors import KprepError, error_from_text
from prep.job_bytes import ByteCount, JobBytes
from prep.worker_marks import CPU_SECONDS, how_it_ended, new_mark, read_mark
from prep.worker_pool import Job, WorkerPool, usable_cores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_NEVER = float("inf")  # a shard can take hours; one clip is limited by its CPU time
_POLL_SECONDS = 0.2


def run_here(
    function: Callable[[dict[str, Any]], dict[str, Any]], jobs: list[dict[str, Any]], folder: Path
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Run the jobs in this process: for few bytes, and nothing that decodes."""
    mark = folder / "here.mark"
    for values in jobs:
        new_mark(mark)
        yield values, function({**values, "mark": str(mark), "skip": {}})


class ShardProgress(ByteCount, Protocol):
    """Where the jobs report to."""

    def skip(self, count: int) -> None:
        """Take bytes off the total that need not be read."""
        ...


@dataclass
class _Running:
    values: dict[str, Any]
    mark: Path
    skip: dict[str, str] = field(default_factory=dict)


def run_shard_jobs(
    task: str,
    jobs: list[dict[str, Any]],
    workers: int,
    folder: Path,
    progress: ShardProgress,
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Run a task of prep.worker for each shard; yield (job, result) as they are done.

    Each job has `path` and `bytes`. A clip that ends its worker, by a crash or by taking too much
    CPU time, is handed to the next try in `skip` (data offset: what happened), so that the task
    names it. Raises KprepError when a worker dies of something that is no clip.
    """
    waiting = deque(
        _Running(values, folder / f"{number}.mark") for number, values in enumerate(jobs)
    )
    running: dict[str, _Running] = {}
    job_bytes = JobBytes(progress)
    with WorkerPool(task, workers or usable_cores(), _NEVER, ahead=1) as pool:
        while waiting or pool.unfinished:
            while waiting and len(running) < pool.count:
                state = waiting.popleft()
                running[str(state.mark)] = state
                _submit(pool, state, job_bytes)
            for job, result in pool.results(_POLL_SECONDS):
                state = running[job.tag]
                if "crashed" in result:
                    _name_the_clip(state, result["crashed"])
                    _submit(pool, state, job_bytes)
                    continue
                if "raised" in result:
                    raise error_from_text(result["raised"])
                if "fatal" in result:
                    raise KprepError(result["fatal"])
                if "error" in result:
                    raise KprepError(_failed(state, result["error"].strip().splitlines()[-1]))
                del running[job.tag]
                job_bytes.end(state.mark)
                yield state.values, result
            job_bytes.book()


def _submit(pool: WorkerPool, state: _Running, job_bytes: JobBytes) -> None:
    job_bytes.begin(state.mark, state.values["bytes"])
    values = {**state.values, "mark": str(state.mark), "skip": state.skip}
    # one attempt: the mark says what to leave out of the next
    pool.submit(Job(str(state.mark), values, attempts=1))


def _name_the_clip(state: _Running, how: str) -> None:
    offset, _ = read_mark(state.mark)
    if offset is None or str(offset) in state.skip:
        raise KprepError(_failed(state, f"the worker process ended ({how})"))
    state.skip[str(offset)] = how_it_ended(how, CPU_SECONDS)


def _failed(state: _Running, what: str) -> str:
    return f"{state.values['path']} could not be examined: {what}; see `kprep --debug`"
