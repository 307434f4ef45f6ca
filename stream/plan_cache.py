"""What a cache of whole clips on every node does to the requests: expectations in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from stream.cache import ADMITTED_SHARE


@dataclass(frozen=True)
class NodeShare:
    """Chance that one of `nodes` nodes holds a clip that it needs in the second epoch."""

    nodes: int
    held_share: float


@dataclass(frozen=True)
class CachePlan:
    """A cache of whole clips on each node.

    split_bytes         of all clips in the order: every node meets every clip over the epochs
    needed_limit_bytes  cache limit a node with which no clip is fetched twice: disk space for all
    limit_bytes         the limit that was given, None for none: then the needed one is assumed
    kept_share          share of the clips that the cache is for, always the same ones
    second_epoch        by number of nodes: chance that a clip is kept and was met in the first
    requests_run        requests of the whole run: a kept clip is fetched whole by each node once,
                        the others are read in parts each time
    bytes_run           bytes of the whole run likewise
    """

    split_bytes: int
    needed_limit_bytes: int
    limit_bytes: int | None
    kept_share: float
    second_epoch: tuple[NodeShare, ...]
    requests_run: float
    bytes_run: float


def plan_cache(
    *,
    clips: int,
    split_bytes: int,
    disk_bytes: int,
    views: int,
    grouping: Literal["spread", "together"],
    nodes: int,
    epochs: int,
    limit_bytes: int | None,
    requests_per_view: float,
    bytes_per_view: float,
) -> CachePlan:
    """Return what a cache gives.

    A view lands on each node with chance 1 / nodes, anew each epoch; views that are kept together
    land together. `disk_bytes` is the disk space for all clips; `requests_per_view` and
    `bytes_per_view` are those without a cache.
    """
    kept = 1.0
    if limit_bytes is not None and limit_bytes < disk_bytes:
        kept = ADMITTED_SHARE * limit_bytes / disk_bytes
    draws = views if grouping == "spread" else 1
    fetched = kept * clips * nodes * _met(nodes, draws * epochs)
    in_parts = (1 - kept) * clips * views * epochs
    return CachePlan(
        split_bytes=split_bytes,
        needed_limit_bytes=disk_bytes,
        limit_bytes=limit_bytes,
        kept_share=kept,
        second_epoch=tuple(
            NodeShare(count, kept * _met(count, draws))
            for count in sorted({1, *(count for count in (2, 4, 8) if count < nodes), nodes})
        ),
        requests_run=fetched + in_parts * requests_per_view,
        bytes_run=fetched * split_bytes / max(1, clips) + in_parts * bytes_per_view,
    )


def _met(nodes: int, draws: int) -> float:
    """Return the chance that a node meets a clip at least once in so many draws."""
    return 1.0 if nodes == 1 else -math.expm1(draws * math.log1p(-1 / nodes))
