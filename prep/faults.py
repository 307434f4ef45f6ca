"""What `kprep verify` finds: one fault is one file, what is wrong with it, and of which kind."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Kind(StrEnum):
    """The kinds of fault. The words are part of `kprep verify --json`."""

    MANIFEST = "manifest"
    MISSING = "missing"
    UNREADABLE = "unreadable"
    EXTRA = "extra"
    TRUNCATED = "truncated"
    SIZE = "size"
    ALTERED = "altered"
    TAR = "tar"
    INDEX = "index"
    COMPANION = "companion"
    DUPLICATE_KEY = "duplicate key"
    LEDGER = "ledger"
    VIDEO = "video"


@dataclass(frozen=True)
class Fault:
    """One fault. `path` is below the root; `key` names the clip where it is one clip's."""

    kind: Kind
    path: str
    message: str
    key: str | None = None

    def __str__(self) -> str:
        """Return the line that the command prints."""
        line = f"{self.path}: {self.message}"
        if line.isprintable():
            return line
        return line.encode("unicode_escape").decode("ascii")  # names of strangers

    def to_json(self) -> dict[str, Any]:
        """Return the fault as JSON values."""
        return {**asdict(self), "kind": str(self.kind)}


def fault_from_json(values: dict[str, Any]) -> Fault:
    """Return what a worker process sent."""
    return Fault(Kind(values["kind"]), values["path"], values["message"], values["key"])
