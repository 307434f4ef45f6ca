"""The ranks' random generators: only dropout and its like use them.

Clips, order and augmentation are functions of the seed and need no generator.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from train.distributed import gather_to_first

if TYPE_CHECKING:
    from collections.abc import Iterator

    from train.distributed import World


def gather_random_states(world: World) -> dict[str, torch.Tensor]:
    """Return every rank's states on rank 0: uint8 (ranks, bytes) by device type; {} elsewhere."""
    states = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(world.device)
    gathered = {name: gather_to_first(world, state[None]) for name, state in states.items()}
    return {name: torch.cat(parts) for name, parts in gathered.items() if parts}


def restore_random_states(states: dict[str, torch.Tensor], world: World) -> None:
    """Put this rank's generators into their saved states.

    On another number of ranks, or another kind of device, there is nothing to restore from: the
    generators stay as they were seeded.
    """
    for name, rows in states.items():
        if len(rows) != world.size:
            continue
        # a copy: set_rng_state reads a row of a larger tensor out of bounds (torch 2.15, seen to
        # end the process with a segmentation fault)
        state = rows[world.rank].clone()
        if name == "cpu":
            torch.set_rng_state(state)
        elif world.device.type == "cuda":
            torch.cuda.set_rng_state(state, world.device)


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Leave the CPU's generator as it was before the block.

    PyTorch's DataLoader draws a number whenever an iteration begins: without this, a run that is
    resumed in mid-epoch would draw other dropout masks than the uninterrupted one.
    """
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
