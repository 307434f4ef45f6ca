"""The address of a dataset root: a folder, or a scheme with the name of a bucket or a server."""

from __future__ import annotations

import re
from pathlib import Path

from prep.errors import UsageError

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_SERVED = re.compile(r"(s3|gs|https|http):(.*)", re.DOTALL)
_NAMED = re.compile(r"//[^/]")


def is_url(root: str) -> bool:
    """Whether a root is an address, of whatever scheme, and no folder."""
    return _URL.match(root) is not None


def root_address(root: str) -> str:
    """Return a root without slashes at its end, a local one absolute.

    Raises UsageError for a scheme that no store serves, and for an address without a name: as a
    folder, `s3://` of an empty variable would be one on this machine whose name is `s3:`.
    """
    served = _SERVED.fullmatch(root)
    if served and not _NAMED.match(served[2]):
        scheme, what = served[1], "server" if served[1].startswith("http") else "bucket"
        raise UsageError(
            f"root {root!r} names no {what}; give {scheme}://{what.upper()}/PREFIX (a variable in "
            "it may be empty)"
        )
    if not served and is_url(root):
        raise UsageError(
            f"root {root!r} must be a directory, s3://, gs://, https:// or http://; "
            "copy the dataset to one of these"
        )
    return (root if served else str(Path(root).absolute())).rstrip("/") or "/"
