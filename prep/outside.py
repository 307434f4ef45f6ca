"""Where a command may write what it says about a dataset: not into the dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prep.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from prep.storage import Storage


def check_outside(out: Path, storage: Storage) -> None:
    """Raise UsageError when a file that is to be written lies inside a local root, or is it."""
    root = storage.local_root
    if root is not None and root.resolve() in (out.resolve(), *out.resolve().parents):
        raise UsageError(f"{out} lies inside the dataset, where it does not belong; choose another")
