"""What a journal says, without writing to it: it may be a stranger's, made to do harm.

Nothing in it is run: views, triggers and virtual tables can hold queries without an end. See
https://www.sqlite.org/security.html for databases that are not trusted.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sqlite3
import stat
from typing import TYPE_CHECKING, Any

from prep.errors import DatasetError
from prep.outcome import Status

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

JOURNAL_NAME = "journal.sqlite"
"""Of the journal in a split's work folder."""
_MOST_STEPS = 500  # of a million instructions: some seconds; a row of a real journal takes ten
_STEP = 1_000_000
_MAX_VALUE_BYTES = 16 << 20  # of a row


def read_setting(path: Path, name: str) -> Any:
    """Return a stored setting; None where it, or a journal that can be read, is not there."""
    try:
        with _opened(path, "settings") as db:
            query = "SELECT value FROM settings WHERE name = ?"
            found = db.execute(query, (name,)).fetchone()
        return json.loads(found[0]) if found else None
    except (sqlite3.Error, OSError, TypeError, ValueError, RecursionError):
        return None


def read_sums(path: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Return the number of rows by status, all of them, and of failed rows by reason.

    The most frequent reason stands first. Raises DatasetError where the journal cannot be read.
    """
    try:
        with _opened(path, "rows") as db:
            found = dict(db.execute("SELECT status, COUNT(*) FROM rows GROUP BY status"))
            failures = db.execute(
                "SELECT CAST(reason AS TEXT), COUNT(*) AS n FROM rows WHERE status = 'failed' "
                "GROUP BY reason ORDER BY n DESC, reason"
            ).fetchall()
    except (sqlite3.Error, OSError) as error:
        raise DatasetError(
            f"{path} cannot be read as the journal of an unfinished conversion ({error}); "
            f"remove {path.parent} if it is not yours"
        ) from error
    counts = {str(status): int(found.get(str(status), 0)) for status in Status}
    return counts, {str(reason): count for reason, count in failures}


@contextlib.contextmanager
def _opened(path: Path, table: str) -> Iterator[sqlite3.Connection]:
    """Open a journal that has a plain table of that name; sqlite3.Error or OSError where not."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise sqlite3.DatabaseError("it is no regular file")
    log = path.with_name(f"{path.name}-wal")
    # without a log nobody writes, and SQLite need not put files beside the journal
    still = not log.exists() or not log.stat().st_size
    address = f"{path.absolute().as_uri()}?mode=ro{'&immutable=1' if still else ''}"
    with contextlib.closing(sqlite3.connect(address, uri=True, timeout=30)) as db:
        db.text_factory = lambda data: data.decode("utf-8", "replace")
        db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_VALUE_BYTES)
        steps = itertools.count(1)
        db.set_progress_handler(lambda: next(steps) > _MOST_STEPS, _STEP)
        db.execute("PRAGMA trusted_schema=OFF")
        db.execute("PRAGMA cell_size_check=ON")
        kinds = {row[1]: (row[2], row[5]) for row in db.execute("PRAGMA main.table_list")}
        if kinds.get(table) != ("table", 1):  # STRICT, so that values are of the stated types
            raise sqlite3.DatabaseError(f"it has no strict table {table}")
        if any(column[6] for column in db.execute(f"PRAGMA table_xinfo({table})")):
            raise sqlite3.DatabaseError(f"its table {table} has columns that are computed")
        yield db
