"""Which ranks are gone or hang, where gloo loses the connection to one of them."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from torch.distributed.distributed_c10d import _get_default_store

from prep.errors import KprepError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import timedelta

_KEY = "kprep/still here"
_ANSWER_SECONDS = 5.0
_POLL_SECONDS = 0.5


@contextmanager
def naming_lost_ranks(rank: int, size: int, timeout: timedelta) -> Iterator[None]:
    """Within the block an error of gloo becomes a KprepError that names the ranks it is about.

    gloo fails when a rank ends alone or is killed, on all that wait for it, and when one does not
    answer for `timeout`. Those that notice say so in the store, and who does not is named. That
    takes seconds, in which whoever started the ranks ends them where it knows the cause itself.
    """
    try:
        yield
    except RuntimeError as error:
        where, _, what = str(error).partition("\n")[0].partition("] ")
        if "gloo/transport" not in where:
            raise
        here = _ranks_that_answer(rank, size)
        silent = ", ".join(str(other) for other in range(size) if other not in here)
        lost = f"rank(s) {silent} of {size} do not answer" if silent else "ranks lost each other"
        raise KprepError(
            f"{lost if here else 'the other ranks, and their store, do not answer'}: gone, or "
            f"hanging for {timeout.total_seconds() / 60:g} minutes ({what.partition('. ')[0]}); "
            "go on from the newest checkpoint with --resume auto"
        ) from error


def _ranks_that_answer(rank: int, size: int) -> set[int]:
    """Say in the store that this rank is here; return who said so, nobody without the store."""
    here: set[int] = set()
    store = _get_default_store()

    def ask() -> None:
        with suppress(RuntimeError):
            store.append(_KEY, f"{rank} ")  # type: ignore[attr-defined]
            while len(here) < size:
                here.update(map(int, store.get(_KEY).split()))
                time.sleep(_POLL_SECONDS)

    # on its own: a store whose machine is gone may never answer
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_ANSWER_SECONDS)
    return set(here)
