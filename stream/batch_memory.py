"""The memory of a batch: planar frames, RGB, and how they travel from a worker process."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import get_worker_info

from stream.color import write_rgb

# gives uint8 memory of a shape for a batch, of any content
Room = Callable[[tuple[int, ...]], torch.Tensor]


def private_room(shape: tuple[int, ...]) -> torch.Tensor:
    """Return uint8 of any content, for this process alone."""
    return torch.empty(shape, dtype=torch.uint8)


def fresh_room(shape: tuple[int, ...]) -> torch.Tensor:
    """Return uint8 of any content that travels from a worker process without being copied.

    As torch's own `default_collate` does, batches of a worker are made in shared memory.
    """
    if get_worker_info() is None or not math.prod(shape):
        return private_room(shape)
    new_shared: Any = torch.UntypedStorage._new_shared  # noqa: SLF001 - see above
    storage = new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def widened(planar: torch.Tensor, longest: int) -> torch.Tensor:
    """Return (N, T, F) with F at least `longest`; what is new is zero."""
    if planar.shape[2] >= longest:
        return planar
    wider = torch.zeros((*planar.shape[:2], longest), dtype=torch.uint8)
    wider[:, :, : planar.shape[2]] = planar
    return wider


def rgb_of_planar(planar: torch.Tensor, sizes: list[tuple[int, int]], room: Room) -> torch.Tensor:
    """Convert each clip; clips of several sizes stand in the upper left of the largest."""
    height = max((size[0] for size in sizes), default=0)
    width = max((size[1] for size in sizes), default=0)
    video = room((len(sizes), planar.shape[1], height, width, 3))
    if len(set(sizes)) > 1:
        video.zero_()
    for number, (rows, columns) in enumerate(sizes):
        write_rgb(planar[number].numpy(), video[number, :, :rows, :columns].numpy())
    return video
