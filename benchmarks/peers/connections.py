"""Connections that a forked worker must not share with its parent.

Loaders that open boto3 clients before they fork let their workers read each other's answers over
the same connections: some runs hang, others get the bytes of another file. Megatron-Energon 7.4 and
mosaicml-streaming 0.13 need this to be measured at all.
"""

from __future__ import annotations

import os
import queue
import weakref
from typing import Any

from urllib3.connectionpool import HTTPConnectionPool

_POOLS: weakref.WeakSet[HTTPConnectionPool] = weakref.WeakSet()


def drop_at_fork() -> None:
    """Let workers that are forked later begin with connections of their own.

    Knows of the connections of clients that are made after this call.
    """
    make = HTTPConnectionPool.__init__

    def make_and_note(pool: HTTPConnectionPool, *values: Any, **options: Any) -> None:
        make(pool, *values, **options)
        _POOLS.add(pool)

    HTTPConnectionPool.__init__ = make_and_note  # type: ignore[method-assign]
    os.register_at_fork(after_in_child=_drop)


def _drop() -> None:
    for pool in _POOLS:
        idle = pool.pool
        for _ in range(idle.qsize() if idle is not None else 0):
            try:
                connection = idle.get(block=False)
            except queue.Empty:
                break
            if connection is not None:
                connection.close()  # this process's descriptor; the parent's stays open
            idle.put(None, block=False)
