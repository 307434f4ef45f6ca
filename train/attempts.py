"""A store for each attempt under torchrun, which keeps one for all of them.

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
from typing import TYPE_CHECKING

from prep.errors import KprepError

if TYPE_CHECKING:
    from datetime import timedelta

    from torch._C._distributed_c10d import Store

_POLL_SECONDS = 0.05


def attempt_store(rank: int, size: int, timeout: timedelta) -> Store | None:
    """Return the store for this attempt's process groups; None where torchrun holds none."""
    environment = os.environ
    if (
        environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        or "TORCHELASTIC_RUN_ID" not in environment  # set by torchrun, not by --nproc
    ):
        return None
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
    prefix = agree_on_attempt(store, rank, size, timeout)
    return PrefixStore(prefix, store)


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
