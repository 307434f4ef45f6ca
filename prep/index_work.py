"""What an interrupted `kprep index` has found already, kept until its manifest stands.

It lies in a folder of this user's, never beside the tars: a stranger who wrote those could have put
findings of his own there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import zlib
from typing import TYPE_CHECKING, Any

from prep import __version__
from prep.atomic_files import write_atomic
from prep.outcome import Reason
from prep.user_cache import cache_folder

if TYPE_CHECKING:
    from pathlib import Path

    from prep.storage import ObjectInfo

_KEEP_SECONDS = 14 * 24 * 3600  # of what nobody has come back to


class IndexWork:
    """The reports of `describe_shard` for one root, each under a name that says what it depends on.

    That is the tar (path, size and version), what was asked for (`context`), and the tools.
    """

    def __init__(self, root: str, context: dict[str, Any]) -> None:
        import av

        self._asked = [context, __version__, av.__version__]
        self._folder = cache_folder("index", root)
        os.utime(self._folder)  # somebody came back to this one
        _forget_old(self._folder.parent)

    def report(self, info: ObjectInfo) -> dict[str, Any] | None:
        """Return what was found in a tar; None where it has to be described."""
        try:
            packed = self._path(info).read_bytes()
            report: dict[str, Any] = json.loads(zlib.decompress(packed))
        except (OSError, zlib.error, ValueError):  # not there, or cut by a power failure
            return None
        return report

    def keep(self, info: ObjectInfo, report: dict[str, Any]) -> None:
        """Keep what was found in a tar, unless it may be found otherwise next time.

        So it is where the store does not tell one version from another, and where a sample failed
        for a reason that can pass, such as a decoder that was killed for want of memory.
        """
        if info.etag is None or any(map(_may_pass, report["samples"])):
            return
        packed = zlib.compress(json.dumps(report).encode(), 1)
        with contextlib.suppress(OSError):  # a full disk costs no more than the repetition
            write_atomic(self._path(info), packed)

    def remove(self) -> None:
        """Forget everything: the manifest stands."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, info: ObjectInfo) -> Path:
        values = json.dumps([info.path, info.size_bytes, info.etag, *self._asked])
        return self._folder / hashlib.sha256(values.encode()).hexdigest()


def _may_pass(sample: dict[str, Any]) -> bool:
    return "failed" in sample and Reason(sample["failed"][0]).retryable


def _forget_old(folder: Path) -> None:
    for other in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # a run that ends removes its own
            if time.time() - other.stat().st_mtime > _KEEP_SECONDS:
                shutil.rmtree(other, ignore_errors=True)
