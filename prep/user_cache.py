"""Folders of this user on this machine, for what runs leave to the runs after them."""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import tempfile
from pathlib import Path


def cache_folder(kind: str, root: str) -> Path:
    """Return the folder for one kind of left-over of one root; it is there.

    Without a home it is one that no other run finds, and that this process removes when it ends.
    """
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = cache / "kprep" / kind / hashlib.sha256(root.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # the latter where nothing says what the home is
        parent = Path(tempfile.mkdtemp(prefix="kprep-"))
        atexit.register(shutil.rmtree, parent, ignore_errors=True)
        folder = parent / kind
        folder.mkdir()
    return folder
