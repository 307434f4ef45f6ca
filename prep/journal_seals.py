"""Checksums in a journal, so that a bit that flips on its disk does not become another dataset.

Every row of its tables has a `seal`, the crc32 of its other columns. Triggers keep it: they belong
to our connection and are no part of the file, so that nothing in it runs anywhere else.
"""

from __future__ import annotations

import sqlite3
import zlib
from typing import Any

_ROWS = (
    "row, video_id, start, end, label, extra, path, key, cut, place, shard, slot, status, reason, "
    "detail, facts, answers"
)
_SEALED = {  # the columns of each table, and the change after which a row is sealed again
    "settings": ("name, value", "INSERT"),
    "shards": ("shard, facts", "INSERT"),
    "rows": (_ROWS, "UPDATE OF status, reason, detail, facts, answers"),
}


def keep_seals(db: sqlite3.Connection) -> None:
    """Have every row sealed that this connection writes; `seal` is for those of a new plan.

    A journal that was begun without seals is sealed as it is.
    """
    db.create_function("seal_of", -1, _seal_of, deterministic=True)
    for table, (columns, change) in _SEALED.items():
        known = {column[1] for column in db.execute(f"PRAGMA table_info({table})")}
        if "seal" not in known:
            db.execute("BEGIN")
            db.execute(f"ALTER TABLE {table} ADD COLUMN seal INTEGER")
            seal(db, table)
            db.execute("COMMIT")
        db.execute(
            f"CREATE TEMP TRIGGER seal_{table} AFTER {change} ON {table} BEGIN "  # noqa: S608
            f"UPDATE {table} SET seal = seal_of({columns}) WHERE rowid = NEW.rowid; END"
        )


def seal(db: sqlite3.Connection, table: str) -> None:
    """Seal every row of a table."""
    db.execute(f"UPDATE {table} SET seal = seal_of({_SEALED[table][0]})")  # noqa: S608


def damage(db: sqlite3.Connection) -> str:
    """Return what is wrong with a journal; "" when it is as it was written."""
    try:
        found = str(db.execute("PRAGMA integrity_check(1)").fetchone()[0])
        if found != "ok":
            return found
        for table, (columns, _) in _SEALED.items():
            query = f"SELECT rowid FROM {table} WHERE seal IS NOT seal_of({columns}) LIMIT 1"  # noqa: S608
            if altered := db.execute(query).fetchone():
                return f"entry {altered[0]} of its {table} was altered"
    except sqlite3.Error as error:
        return str(error)
    return ""


def _seal_of(*values: Any) -> int:
    return zlib.crc32(ascii(values).encode())
