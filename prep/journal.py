"""The journal of a conversion: the plan and what became of every row, in one SQLite file.

The journal is the truth while a split is being made; the ledger is exported from it. SQLite gives
what a file of our own would have to be taught: a commit survives `kill -9`, memory stays flat at
any number of rows, and the sums are one query. See docs/decisions/0002-sqlite-journal.md.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prep.journal_seals import damage, keep_seals, seal
from prep.outcome import Outcome, Reason, Status
from prep.segment import BadRow, Segment
from prep.shuffle import place
from prep.taken_clips import TakenClips
from prep.text.plain import storable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_SCHEMA = """
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS rows (
    row INTEGER PRIMARY KEY, video_id TEXT, start REAL, end REAL, label TEXT, extra TEXT, path TEXT,
    key TEXT, cut TEXT, place BLOB, shard INTEGER, slot INTEGER,
    status TEXT NOT NULL, reason TEXT, detail TEXT NOT NULL DEFAULT '', facts TEXT,
    answers TEXT NOT NULL DEFAULT '[]'
) STRICT;
CREATE TABLE IF NOT EXISTS shards (shard INTEGER PRIMARY KEY, facts TEXT NOT NULL) STRICT;
"""
_INDICES = """
CREATE INDEX IF NOT EXISTS rows_by_place ON rows (shard, slot);
CREATE INDEX IF NOT EXISTS rows_by_status ON rows (status, shard, slot);
CREATE INDEX IF NOT EXISTS rows_by_cut ON rows (cut);
"""
_COLUMNS = (
    "row, video_id, start, end, label, extra, path, key, shard, slot, status, reason, detail, "
    "facts, answers"
)
_BATCH = 256
# Rows of these reasons are in archives that were not read to their end; for the others, archives
# that were must be read again
_OF_UNREAD_ARCHIVES = frozenset({str(Reason.NETWORK), str(Reason.RATE_LIMITED)})


@dataclass(frozen=True)
class Answer:
    """Why one source gave no clip for a row."""

    source: str
    reason: Reason
    detail: str


@dataclass(frozen=True)
class Row:
    """One annotation row with its place in the plan and what is known of its clip."""

    row: int
    segment: Segment | None
    key: str | None
    shard: int | None
    slot: int | None
    outcome: Outcome
    facts: dict[str, Any]
    answers: tuple[Answer, ...] = ()

    def annotated_end(self) -> float:
        """Return the annotated end of a clip; of a whole file, where the clip ends."""
        if self.segment is None:
            raise ValueError(f"row {self.row} has no segment")
        if self.segment.end_seconds is not None:
            return float(self.segment.end_seconds)
        return float(self.segment.start_seconds) + float(self.facts["seconds"])


class Journal:
    """The plan and the outcomes of one split."""

    def __init__(self, path: Path, split: str) -> None:
        self.split = split
        self._db = sqlite3.connect(path, isolation_level=None, timeout=30)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(_SCHEMA)
        keep_seals(self._db)
        self.taken = TakenClips(self._db)

    def close(self) -> None:
        """Close the file; everything recorded is in it."""
        self._db.close()

    def damage(self) -> str:
        """Return what is wrong with the file; "" when it is as it was written."""
        return damage(self._db)

    def setting(self, name: str) -> Any:
        """Return a stored setting, or None."""
        found = self._db.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
        return json.loads(found[0]) if found else None

    def set(self, name: str, value: Any) -> None:
        """Store a setting."""
        self._db.execute(
            "INSERT OR REPLACE INTO settings (name, value) VALUES (?, ?)", (name, json.dumps(value))
        )

    # -- the plan -----------------------------------------------------------------------------

    def forget_plan(self) -> None:
        """Empty a journal, all at once: without settings it has no plan."""
        self._db.executescript(
            "BEGIN; DELETE FROM rows; DELETE FROM shards; DELETE FROM settings; COMMIT;"
        )

    def plan(
        self,
        items: Iterable[Segment | BadRow],
        *,
        seed: int,
        clips_per_shard: int,
        limit: int | None,
        classes: frozenset[str],
        taken_keys: frozenset[str],
    ) -> None:
        """Store every row and decide, before anything is encoded, which shard and slot it has.

        Rows are shuffled by a keyed hash of their keys, so the plan is a function of the rows and
        the seed. Exact repeats become duplicates; one segment with two labels, or one that another
        split of the dataset holds already, is a conflict.
        """
        labels: set[str] = set()
        self._db.execute("BEGIN")
        self._db.executemany(
            "INSERT INTO rows (video_id, start, end, label, extra, path, key, cut, place, status, "
            "reason, detail) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                _planned(item, seed, taken_keys)
                for item in _noting_labels(items, labels)
                if not classes or (isinstance(item, Segment) and item.label in classes)
            ),
        )
        self._settle_repeats()
        if limit is not None:
            self._db.execute(
                "DELETE FROM rows WHERE row NOT IN (SELECT row FROM rows ORDER BY place IS NULL, "
                "place, row LIMIT ?)",
                (limit,),
            )
        self._db.execute(
            "UPDATE rows SET shard = rank / ?1, slot = rank % ?1 FROM ("
            " SELECT row AS ranked, ROW_NUMBER() OVER (ORDER BY place, key) - 1 AS rank"
            " FROM rows WHERE status = 'pending') WHERE row = ranked",
            (clips_per_shard,),
        )
        seal(self._db, "rows")
        self._db.execute("COMMIT")
        self._db.executescript(_INDICES)
        self.set("labels", sorted(labels))

    def _settle_repeats(self) -> None:
        self._db.execute("CREATE TEMP TABLE repeats AS SELECT key, MIN(row) AS first, "
                         "COUNT(DISTINCT COALESCE(label, char(0))) AS labels FROM rows "
                         "WHERE status = 'pending' GROUP BY key HAVING COUNT(*) > 1")  # fmt: skip
        self._db.execute(
            "UPDATE rows SET status = 'failed', reason = ?, "
            "detail = 'the list has this segment with two labels' "
            "WHERE key IN (SELECT key FROM repeats WHERE labels > 1)",
            (Reason.CONFLICT,),
        )
        self._db.execute(
            "UPDATE rows SET status = 'duplicate', detail = key WHERE status = 'pending' "
            "AND EXISTS (SELECT 1 FROM repeats WHERE repeats.key = rows.key "
            "AND repeats.first != rows.row)"
        )
        self._db.execute("DROP TABLE repeats")

    # -- outcomes -----------------------------------------------------------------------------

    def record(
        self, row: int, outcome: Outcome, facts: dict[str, Any] | None = None, archive: str = ""
    ) -> None:
        """Store what became of a row, and the archive of its clip; `commit` makes it last."""
        if not self._db.in_transaction:
            self._db.execute("BEGIN")
        self._db.execute(
            "UPDATE rows SET status = ?, reason = ?, detail = ?, facts = ? WHERE row = ?",
            (
                outcome.status,
                outcome.reason,
                storable(outcome.detail),
                json.dumps(facts) if facts else None,
                row,
            ),
        )
        if archive:
            self.taken.mark(row, archive)

    def record_answers(self, row: int, answers: tuple[Answer, ...]) -> None:
        """Store what sources have answered to a row that stays pending; `commit` makes it last."""
        if not self._db.in_transaction:
            self._db.execute("BEGIN")
        values = [[answer.source, answer.reason, answer.detail] for answer in answers]
        self._db.execute("UPDATE rows SET answers = ? WHERE row = ?", (json.dumps(values), row))

    def lose(self, row: int) -> None:
        """Make a row pending whose clip is gone, and forget which archives were read to their end.

        Until `begin_round` none is remembered either: one that is being read may be past the row.
        """
        self.record(row, Outcome(Status.PENDING))
        self.record_answers(row, ())
        self.taken.forget(row)
        self._forget_archives()
        self.set("lost", value=True)

    def begin_round(self) -> None:
        """Remember archives again: those that are not known to be done will all be read."""
        self._db.execute("DELETE FROM settings WHERE name = 'lost'")

    def mark_done(self, source: str, archive: str) -> None:
        """Remember that an archive was read to its end."""
        self.commit()
        if not self.setting("lost"):
            self.set(f"done {source} {archive}", value=True)

    def is_done(self, source: str, archive: str) -> bool:
        """Whether an archive was read to its end, in this run or an earlier one."""
        return bool(self.setting(f"done {source} {archive}"))

    def _forget_archives(self) -> None:
        self._db.execute("DELETE FROM settings WHERE name LIKE 'done %'")

    def commit(self) -> None:
        """Make everything recorded so far survive whatever comes."""
        if self._db.in_transaction:
            self._db.execute("COMMIT")

    def reopen(self, reasons: Iterable[Reason]) -> int:
        """Make failed rows of the given reasons pending again; return how many."""
        wanted = [str(reason) for reason in reasons]
        marks = ",".join("?" * len(wanted))
        failed = f"status = 'failed' AND shard IS NOT NULL AND reason IN ({marks})"
        found = self._db.execute(f"SELECT DISTINCT shard, reason FROM rows WHERE {failed}", wanted)  # noqa: S608
        pairs = found.fetchall()
        if not pairs:
            return 0
        self._db.execute("BEGIN")
        changed = self._db.execute(
            "UPDATE rows SET status = 'pending', reason = NULL, detail = '', answers = '[]' "  # noqa: S608
            f"WHERE {failed}",
            wanted,
        ).rowcount
        self._db.executemany("DELETE FROM shards WHERE shard = ?", {(shard,) for shard, _ in pairs})
        if not {reason for _, reason in pairs} <= _OF_UNREAD_ARCHIVES:
            self._forget_archives()
        self._db.execute("COMMIT")
        return changed

    def use_sources(self, sources: list[str]) -> None:
        """Forget answers of pending rows when other sources than last time are asked.

        Those of the first ones stay where only the last are left out: nothing is asked again.
        """
        known = self.setting("sources")
        if known is not None and known[: len(sources)] != sources:
            self._db.execute("UPDATE rows SET answers = '[]' WHERE status = 'pending'")
            self._forget_archives()
        self.set("sources", sources)

    def counts(self) -> dict[str, int]:
        """Return the number of rows by status; every status is there."""
        found = dict(self._db.execute("SELECT status, COUNT(*) FROM rows GROUP BY status"))
        return {str(status): int(found.get(str(status), 0)) for status in Status}

    def failures(self) -> dict[str, int]:
        """Return the number of failed rows by reason, the most frequent first."""
        return dict(
            self._db.execute(
                "SELECT reason, COUNT(*) AS n FROM rows WHERE status = 'failed' "
                "GROUP BY reason ORDER BY n DESC, reason"
            )
        )

    def first_details(self) -> dict[str, str]:
        """Return, for each reason, what the first failed row with a detail says, in row order."""
        firsts = (
            "SELECT MIN(row) FROM rows WHERE status = 'failed' AND detail != '' GROUP BY reason"
        )
        return dict(
            self._db.execute(
                f"SELECT reason, detail FROM rows WHERE row IN ({firsts}) ORDER BY row"  # noqa: S608
            )
        )

    def labels(self) -> list[str]:
        """Return the distinct labels of the whole list, sorted; also those that no row here has."""
        return list(self.setting("labels") or [])

    def first_with_label(self, label: str) -> int:
        """Return the number of the first row of a label; 0 when it has no row here."""
        found = self._db.execute("SELECT MIN(row) FROM rows WHERE label = ?", (label,)).fetchone()
        return int(found[0] or 0)

    def planned_shards(self) -> int:
        """Return the number of shards of the plan, those that stay empty included."""
        found = self._db.execute("SELECT MAX(shard) FROM rows").fetchone()[0]
        return 0 if found is None else int(found) + 1

    def planned_keys(self) -> Iterator[str]:
        """Yield the keys of the rows that have a place in a shard."""
        for (key,) in self._db.execute("SELECT key FROM rows WHERE shard IS NOT NULL"):
            yield str(key)

    def pending(self) -> Iterator[Row]:
        """Yield rows without a result, in the order of the plan; recording meanwhile is safe."""
        yield from self._pages("status = 'pending' AND shard IS NOT NULL")

    def pending_by_cut_name(self, name: str) -> Row | None:
        """Return the row that waits for the clip `<video_id>_<start:06d>_<end:06d>`, or None."""
        found = self._db.execute(
            f"SELECT {_COLUMNS} FROM rows WHERE cut = ? AND status = 'pending' "  # noqa: S608
            "ORDER BY row LIMIT 1",
            (name,),
        ).fetchone()
        return self._row(found) if found else None

    def has_cut_name(self, name: str, besides: tuple[float | None, ...] = (None, None)) -> bool:
        """Whether any row of the list, besides those of a start and end, has this cut name."""
        query = "SELECT 1 FROM rows WHERE cut = ? AND (start, end) IS NOT (?, ?) LIMIT 1"
        return self._db.execute(query, (name, *besides)).fetchone() is not None

    def shard_rows(self, shard: int) -> list[Row]:
        """Return the clips that a shard will hold, in order."""
        return [
            self._row(values)
            for values in self._db.execute(
                f"SELECT {_COLUMNS} FROM rows WHERE shard = ? AND status = 'ok' ORDER BY slot",  # noqa: S608
                (shard,),
            )
        ]

    def all_rows(self) -> Iterator[Row]:
        """Yield every row, in the order of the list."""
        last = 0
        while True:
            page = self._db.execute(
                f"SELECT {_COLUMNS} FROM rows WHERE row > ? ORDER BY row LIMIT ?",  # noqa: S608
                (last, _BATCH),
            ).fetchall()
            if not page:
                return
            last = page[-1][0]
            yield from map(self._row, page)

    def pending_by_shard(self) -> dict[int, int]:
        """Return the number of rows that wait for a result, for every shard of the plan."""
        found = self._db.execute(
            "SELECT shard, SUM(status = 'pending') FROM rows WHERE shard IS NOT NULL GROUP BY shard"
        )
        return {int(shard): int(count) for shard, count in found}

    def unfinished_rows(self, shard: int, *, finish: bool) -> int:
        """Return how many rows of a shard still wait, or may yet succeed unless `finish`."""
        retryable = [] if finish else [str(reason) for reason in Reason if reason.retryable]
        marks = ",".join("?" * len(retryable))
        found = self._db.execute(
            "SELECT COUNT(*) FROM rows WHERE shard = ? AND (status = 'pending' "  # noqa: S608
            f"OR (status = 'failed' AND reason IN ({marks})))",
            (shard, *retryable),
        ).fetchone()
        return int(found[0])

    # -- shards -------------------------------------------------------------------------------

    def record_shard(
        self, shard: int, facts: dict[str, Any], clips: dict[int, dict[str, Any]]
    ) -> None:
        """Store a finished tar together with where its clips now are, in one commit."""
        self.commit()
        self._db.execute("BEGIN")
        self._db.executemany(
            "UPDATE rows SET facts = ? WHERE row = ?",
            [(json.dumps(value), row) for row, value in clips.items()],
        )
        self._db.execute(
            "INSERT OR REPLACE INTO shards (shard, facts) VALUES (?, ?)", (shard, json.dumps(facts))
        )
        self._db.execute("COMMIT")

    def forget_shards(self, shards: Iterable[int]) -> None:
        """Have some tars built again, from those of their own clips that are whole."""
        self._db.executemany("DELETE FROM shards WHERE shard = ?", [(shard,) for shard in shards])

    def shards(self) -> dict[int, dict[str, Any]]:
        """Return the finished tars by number."""
        found = self._db.execute("SELECT shard, facts FROM shards ORDER BY shard")
        return {int(shard): json.loads(facts) for shard, facts in found}

    def _pages(self, condition: str) -> Iterator[Row]:
        shard, slot = -1, -1
        while True:
            page = self._db.execute(
                f"SELECT {_COLUMNS} FROM rows WHERE {condition} AND (shard, slot) > (?, ?) "  # noqa: S608
                "ORDER BY shard, slot LIMIT ?",
                (shard, slot, _BATCH),
            ).fetchall()
            if not page:
                return
            shard, slot = page[-1][8], page[-1][9]
            yield from map(self._row, page)

    def _row(self, values: tuple[Any, ...]) -> Row:
        (row, video_id, start, end, label, extra, path, key, shard, slot,
         status, reason, detail, facts, answers) = values  # fmt: skip
        segment = None
        if video_id is not None:
            segment = Segment(video_id, start, end, label, self.split, extra, path)
        outcome = Outcome(Status(status), Reason(reason) if reason else None, detail)
        answered = tuple(
            Answer(source, Reason(why), more) for source, why, more in json.loads(answers)
        )
        known = json.loads(facts) if facts else {}
        return Row(row, segment, key, shard, slot, outcome, known, answered)


def _noting_labels(
    items: Iterable[Segment | BadRow], labels: set[str]
) -> Iterator[Segment | BadRow]:
    """Add the labels of the whole list to a set: classes do not depend on the rows at hand."""
    for item in items:
        if isinstance(item, Segment) and item.label is not None:
            labels.add(item.label)
        yield item


def _planned(item: Segment | BadRow, seed: int, taken_keys: frozenset[str]) -> tuple[Any, ...]:
    if isinstance(item, BadRow):
        return (None,) * 9 + (Status.FAILED, Reason.BAD_ROW, storable(item.detail))
    key = item.key
    ordinal = place(key, seed)
    columns = (
        item.video_id,
        item.start_seconds,
        item.end_seconds,
        item.label,
        item.extra,
        item.path,
    )
    if key in taken_keys:
        reason, detail = Reason.CONFLICT, "another split holds this segment"
        return (*columns, key, item.cut_name, ordinal, Status.FAILED, reason, detail)
    return (*columns, key, item.cut_name, ordinal, Status.PENDING, None, "")
