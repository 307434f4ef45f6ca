"""Folders of this user on this machine, for what runs leave to the runs after them."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path


def cache_folder(kind: str, root: str) -> Path:
    """Return the folder for one kind of left-over of one root; it is there.

    Without a home it is one that no other run finds.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "kprep" / kind / hashlib.sha256(root.encode()).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="kprep-")) / kind
        folder.mkdir()
    return folder
