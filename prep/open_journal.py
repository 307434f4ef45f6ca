"""The journal of a split, opened for the length of a block."""

from __future__ import annotations

import contextlib
import sqlite3
from typing import TYPE_CHECKING

from prep.errors import KprepError
from prep.journal import Journal
from prep.journal_reader import JOURNAL_NAME

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def journal_of(work: Path, split: str) -> Iterator[Journal]:
    """Open the journal of a split for the length of a block.

    Raises KprepError where it is not what was written to it, or cannot be written now.
    """
    path = work / JOURNAL_NAME
    try:
        with contextlib.closing(Journal(path, split)) as journal:
            if damage := journal.damage():
                raise sqlite3.DatabaseError(damage)
            yield journal
    except sqlite3.OperationalError as error:
        raise KprepError(
            f"{path} cannot be written ({error}); see that there is room and that the disk is "
            "sound, then run the same command again"
        ) from error
    except sqlite3.Error as error:
        raise KprepError(
            f"{path} is damaged ({error}), so the unfinished work on split {split} is lost; begin "
            f"anew with --force, and if that is refused, remove {work} and the split's folder first"
        ) from error
