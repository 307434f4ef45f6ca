"""A SLURM step: who takes part in it, and where its tasks meet.

Steps of one job run beside each other, and several jobs share a machine: tasks that meet at one
port by chance, or because a script set MASTER_PORT for all of them, must not train as one run.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import torch

from prep.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import timedelta

    from torch._C._distributed_c10d import Store

_STEP = "KPREP_SLURM_STEP"  # set where the rank was taken from the step, not from MPI or torchrun
_KEY = "kprep/step"


def adopt_step() -> None:
    """Translate the variables of a SLURM step (srun) into torchrun's.

    Raises UsageError where SLURM does not say where the tasks can meet.
    """
    environment = os.environ
    if int(environment["SLURM_STEP_NUM_TASKS"]) == 1:
        return
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = _first_node(environment)
    job, step = environment.get("SLURM_JOB_ID", "0"), environment.get("SLURM_STEP_ID", "0")
    # 15000..24999 is below the ephemeral range; jobs come in turn, so their steps go far from them
    environment.setdefault("MASTER_PORT", str(15000 + (int(job) + 1009 * int(step)) % 10000))
    environment[_STEP] = f"{job}.{step}"
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    # with --gpus-per-task=1 each task sees one GPU, its own
    sees_one = torch.cuda.is_available() and torch.cuda.device_count() == 1
    environment["LOCAL_RANK"] = "0" if sees_one else environment.get("SLURM_LOCALID", "0")


def _first_node(environment: Mapping[str, str]) -> str:
    """Return the host of the step's first task."""
    # gpu[07-09,12],login1 -> gpu07; srun itself may run on a login node
    nodes = re.match(r"(?:[^,\[]|\[[^\]]*\])+", environment.get("SLURM_STEP_NODELIST", ""))
    if nodes:
        return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes[0])
    launcher = environment.get("SLURM_LAUNCH_NODE_IPADDR")
    if launcher is None:
        raise UsageError("under srun, set MASTER_ADDR to the name of the first node")
    return launcher


def step_store(rank: int, timeout: timedelta) -> Store | None:
    """Return the store for the process groups of a step's tasks; None for other ranks.

    Rank 0 holds it. Raises UsageError where another step has its port.
    """
    environment = os.environ
    step = environment.get(_STEP)
    if step is None or environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    from torch.distributed import DistNetworkError, TCPStore  # type: ignore[attr-defined]

    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    try:
        store = TCPStore(
            address,
            port,
            is_master=rank == 0,
            wait_for_workers=False,
            timeout=timeout,
            multi_tenant=True,  # a process can train again
        )
    except DistNetworkError as error:
        text = str(error).partition("\n")[0]
        raise UsageError(
            f"the tasks of step {step} cannot meet at port {port} of {address} ({text}); "
            "set MASTER_PORT to a free one, for each step another"
        ) from error
    if rank == 0:
        store.compare_set(_KEY, "", step)
    found = store.get(_KEY).decode()
    if found != step:
        raise UsageError(
            f"port {port} of {address} is that of step {found}, and this is step {step}; "
            "set MASTER_PORT to a free one, for each step another"
        )
    return store
