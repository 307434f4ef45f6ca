"""The object store's client and forks: its threads belong to the process that first used it.

They are the process's and not a store's, so that in a forked child a store that is opened anew
hangs as the parent's own does.
"""

from __future__ import annotations

import os

from prep.errors import StorageError

_used_in = 0


def note_client() -> None:
    """Remember that this process uses the client; to be called before a store is opened."""
    global _used_in  # noqa: PLW0603 - the client's threads are the process's
    _used_in = _used_in or os.getpid()


def refuse_fork(root: str, opened_in: int = 0) -> None:
    """Raise StorageError in a process that was forked from one that had used the client.

    Or, where the root itself has been read without the client, from the process `opened_in`.
    """
    if {_used_in, opened_in} - {0, os.getpid()}:
        raise StorageError(
            f"{root} cannot be read here: a dataset was read before this process was forked, and "
            "connections do not survive that; start workers with the 'forkserver' or 'spawn' method"
        )
