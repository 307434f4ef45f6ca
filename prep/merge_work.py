"""What is kept of a new root in the making: whose it is, and which shards stand."""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING, Any

from prep.atomic_files import write_atomic
from prep.errors import KprepError, UsageError
from prep.write_errors import write_errors

if TYPE_CHECKING:
    from pathlib import Path


class MergeWork:
    """A folder with one small file for each shard that stands, and one that says of what."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def check(self, root: str, identity: str) -> bool:
        """Whether this root was begun here; UsageError when something else was."""
        begun = self._read("plan.json")
        if begun is None:
            return False
        if begun.get("root") != root:
            raise UsageError(
                f"work folder {self.folder} belongs to {begun.get('root')}; choose another --work"
            )
        if begun.get("identity") != identity:
            raise UsageError(
                f"{root} was begun from other roots, or with other options; repeat the first "
                f"command, or remove {root} and {self.folder} and begin anew"
            )
        return True

    def begin(self, root: str, identity: str) -> None:
        """Note which root is made here."""
        with write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._write("plan.json", {"root": root, "identity": identity})

    def record(self, split: str, number: int, facts: dict[str, Any]) -> None:
        """Note that a shard was written."""
        values = {"facts": facts, "crc32": _crc32(facts)}
        self._write(f"{split}-{number:06d}.json", values)

    def shard(self, split: str, number: int) -> dict[str, Any] | None:
        """Return what is known of a shard that was written; None where it has to be."""
        values = self._read(f"{split}-{number:06d}.json") or {}
        facts: dict[str, Any] | None = values.get("facts")
        return facts if values.get("crc32") == _crc32(facts) else None

    def mark(self, split: str, number: int) -> Path:
        """Return where the process that writes a shard says how far it is."""
        return self.folder / f"{split}-{number:06d}.mark"

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            values: dict[str, Any] = json.loads((self.folder / name).read_text())
        except (FileNotFoundError, NotADirectoryError):  # `begin` says that no folder can be there
            return None
        except (OSError, ValueError) as error:
            raise KprepError(f"{self.folder / name} cannot be read ({error}); remove it") from error
        return values

    def _write(self, name: str, values: dict[str, Any]) -> None:
        with write_errors(self.folder / name):
            write_atomic(self.folder / name, json.dumps(values).encode())


def _crc32(facts: Any) -> int:
    return zlib.crc32(json.dumps(facts).encode())
