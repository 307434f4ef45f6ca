"""Attempts of one launch: a store for each under torchrun, and whether one came before.

torchrun's rendezvous (PyTorch 2.15 and before, unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1) holds
one TCPStore for as long as it lives. After a restart the ranks find in it what the attempt before
left, such as the addresses of processes that are gone, and cannot connect. So each attempt gets a
prefix of its own. TORCHELASTIC_RESTART_COUNT cannot be it: a node that replaces another counts
from 0 again.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING

from prep.errors import KprepError
from prep.storage import write_atomic

if TYPE_CHECKING:
    from pathlib import Path

    from torch._C._distributed_c10d import Store

LAUNCH_NAME = ".launch"
_POLL_SECONDS = 0.05
_TIMEOUT = timedelta(minutes=5)
_begun: set[Path] = set()  # by this process: what it left is not an earlier attempt's


def attempt_store(rank: int, size: int, timeout: timedelta) -> Store | None:
    """Return the store for this attempt's process groups; None where torchrun holds none."""
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    store = _agent_store(timeout)
    if store is None:
        return None
    return PrefixStore(agree_on_attempt(store, rank, size, timeout), store)


def note_launch(output: Path) -> None:
    """Write down which torchrun or SLURM job trains into a directory, for `is_restarted`.

    Raises OSError.
    """
    _begun.add(output.resolve())
    path, found = output / LAUNCH_NAME, [*_torchruns(), *_slurm_jobs()]
    if found:
        write_atomic(path, "".join(f"{name}\n" for name in found).encode())
    else:
        path.unlink(missing_ok=True)


def is_restarted(output: Path) -> bool:
    """Return whether the launcher started this again that had begun to train into a directory.

    A job that is requeued, or ranks of a torchrun that lives on. A run that was refused has not
    begun: what an earlier one left stays out of its reach. Nor is it a restart when a process
    trains a second time into a directory.
    """
    if output.resolve() in _begun:
        return False
    try:
        noted = (output / LAUNCH_NAME).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError):
        return False
    is_requeued = os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
    jobs = _slurm_jobs() if is_requeued else []
    return any(name in noted for name in [*_torchruns(), *jobs])


def _torchruns() -> list[str]:
    """Return a name that all attempts of this torchrun share, and no other's."""
    store = _agent_store(_TIMEOUT)
    if store is None:
        return []
    name = store.compare_set("kprep/launch", "", uuid.uuid4().hex)
    return [f"torchrun {name.decode()}"]


def _slurm_jobs() -> list[str]:
    job = os.environ.get("SLURM_JOB_ID")
    return [f"slurm {job}"] if job else []


def _agent_store(timeout: timedelta) -> Store | None:
    """Return the store that torchrun holds for all attempts."""
    environment = os.environ
    if (
        environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        or "TORCHELASTIC_RUN_ID" not in environment  # set by torchrun, not by --nproc
    ):
        return None
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    store: Store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
    return store


def agree_on_attempt(store: Store, rank: int, size: int, timeout: timedelta) -> str:
    """Return a name that all processes which run now share, and no earlier ones did.

    Rank 0 draws it and gives it to each process under the name that this process drew; what
    processes of an earlier attempt left is answered too, and read by nobody. Raises KprepError
    when a rank does not come in time.
    """
    own = uuid.uuid4().hex
    if rank != 0:
        store.set(f"kprep/rank/{rank}", own)
        attempt = store.get(f"kprep/answer/{own}").decode()
        store.set(f"kprep/here/{attempt}/{rank}", "yes")
        return attempt
    missing = set(range(1, size))
    deadline = time.monotonic() + timeout.total_seconds()
    while missing:
        missing -= {other for other in missing if store.check([f"kprep/here/{own}/{other}"])}
        for other in missing:
            if store.check([f"kprep/rank/{other}"]):
                name = store.get(f"kprep/rank/{other}").decode()
                store.set(f"kprep/answer/{name}", own)
        if time.monotonic() > deadline:
            raise KprepError(f"ranks {sorted(missing)} of {size} did not start")
        time.sleep(_POLL_SECONDS)
    return own
