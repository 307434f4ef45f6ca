"""From which archive a clip was taken, remembered until that archive was read to its end.

The checksum of an archive stands behind its last byte, when its clips are long encoded. Until it is
compared each clip has a mark among the journal's settings, which survives `kill -9`: then the
archive is read again, also where no row waits for a clip any more.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3

UNREAD = "an archive not read to its end"
_MARKS = "name GLOB 'taken *'"


class TakenClips:
    """The marks of one journal."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def mark(self, row: int, archive: str) -> None:
        """Remember the archive of a row's clip, in the transaction that stores its outcome."""
        self._db.execute(
            "INSERT OR REPLACE INTO settings (name, value) VALUES (?, ?)",
            (f"taken {row}", json.dumps(archive)),
        )

    def forget(self, row: int) -> None:
        """Forget a row whose clip is gone."""
        self._db.execute("DELETE FROM settings WHERE name = ?", (f"taken {row}",))

    def archives(self) -> set[str]:
        """Return the archives that have clips here and were not read to their end since."""
        found = self._db.execute(f"SELECT DISTINCT value FROM settings WHERE {_MARKS}")  # noqa: S608
        return {json.loads(value) for (value,) in found}

    def judge(self, archive: str, fault: str) -> int:
        """Have the rows with clips from an archive tell its fault, if any; return their number.

        `fault` is like "a damaged archive". No transaction may be open.
        """
        value = json.dumps(archive)
        self._db.execute("BEGIN")
        if fault:
            self._db.execute(
                "UPDATE rows SET detail = detail || iif(detail = '', '', '; ') || ? WHERE row IN "  # noqa: S608
                f"(SELECT CAST(substr(name, 7) AS INTEGER) FROM settings WHERE {_MARKS} "
                "AND value = ?)",
                (f"from {fault}, {archive}", value),
            )
        query = f"DELETE FROM settings WHERE {_MARKS} AND value = ?"  # noqa: S608
        count = self._db.execute(query, (value,)).rowcount
        self._db.execute("COMMIT")
        return count

    def give_up(self) -> None:
        """Have the rows tell it whose archives cannot be read to their end before publishing."""
        for archive in sorted(self.archives()):
            self.judge(archive, UNREAD)
