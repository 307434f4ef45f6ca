"""The encode workers of a conversion on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prep.worker_pool import WorkerPool, usable_cores

if TYPE_CHECKING:
    from prep.options import ShardOptions

_STARTED_AHEAD = 8  # a list of a few rows needs no more


def local_encoders(options: ShardOptions, *, ahead: bool = False) -> WorkerPool:
    """Return the pool. `ahead`: start some now, because what the caller does next takes a while."""
    wall = options.wall_seconds + 30.0  # the worker's own limit comes first
    pool = WorkerPool("encode", options.workers or usable_cores(), wall)
    if ahead:
        pool.start_ahead(_STARTED_AHEAD)
    return pool
