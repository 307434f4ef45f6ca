"""Temporary folders of which SIGTERM leaves nothing either."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_folders: set[str] = set()


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[str]:
    """Make a folder in the system's temporary directory and remove it afterwards."""
    import tempfile  # here, since `kprep --help` imports this module

    with tempfile.TemporaryDirectory(prefix=prefix) as name:
        _folders.add(name)
        try:
            yield name
        finally:
            _folders.discard(name)


def remove_temporary_folders() -> None:
    """Remove those that are in use: this process ends without leaving its blocks."""
    for name in tuple(_folders):
        import shutil  # is loaded, where there is a folder

        shutil.rmtree(name, ignore_errors=True)
