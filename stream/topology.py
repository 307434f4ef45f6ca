"""Which rank of how many a loader serves."""

from __future__ import annotations

import os

import torch.distributed

from prep.errors import UsageError
from stream.whole_numbers import whole_number


def rank_and_size(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return rank and number of ranks: those given, else torch.distributed's, else RANK's, else 0.

    Raises UsageError for what is no rank.
    """
    if (rank is None) != (world_size is None):
        raise UsageError("rank and world_size must be given together, or neither")
    if rank is None or world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        else:
            rank, world_size = _environment()
    rank, world_size = whole_number("rank", rank), whole_number("world_size", world_size)
    if not 0 <= rank < world_size:
        raise UsageError(f"rank ({rank}) must be from 0 to world_size - 1 ({world_size - 1})")
    return rank, world_size


def _environment() -> tuple[int, int]:
    rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        return int(rank), int(world_size)
    except ValueError:
        raise UsageError(
            f"RANK ({rank}) and WORLD_SIZE ({world_size}) in the environment must be integers; "
            "start with torchrun, give rank and world_size, or unset both"
        ) from None
