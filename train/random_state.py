"""The ranks' random generators: only dropout and its like use them.

Clips, order and augmentation are functions of the seed and need no generator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from train.distributed import gather_to_first

if TYPE_CHECKING:
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
        if name == "cpu":
            torch.set_rng_state(rows[world.rank])
        elif world.device.type == "cuda":
            torch.cuda.set_rng_state(rows[world.rank], world.device)
