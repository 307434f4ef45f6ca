"""The ledger of a new root from those of its sources: every row once, and the counts add up.

Rows of several roots are one row when they have one key: that of the clip that was taken, else the
one that says most. So a clip that failed in one root and is there in another comes out ok. Repeats
inside one list stay as many as they are in the root that has most of them.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from prep.errors import DatasetError
from prep.outcome import Reason, Status

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prep.merge_plan import Selection

_ELSEWHERE = "another split holds this segment"
# Which row stands for several of one key, where none has the clip that was taken
_RANKS = {Status.OK: 1, Status.FAILED: 2, Status.PENDING: 3, Status.DUPLICATE: 4}


def merge_ledgers(
    split: str,
    ledgers: Mapping[int, pa.Table],
    winners: Mapping[str, tuple[str, int]],
    taken: frozenset[str],
    selection: Selection,
) -> pa.Table:
    """Return the ledger of one split.

    `ledgers` are those of the roots that have the split, by root. `winners` says for every key in
    which split and root its clip is; `taken` are the keys of this split's clips in the new root.
    Raises DatasetError where a ledger and the clips disagree.
    """
    rows = _one_row_each(split, ledgers, winners)
    starts, start = {}, 0
    for root, ledger in ledgers.items():
        starts[root], start = start, start + ledger.num_rows
    merged = pa.concat_tables(list(ledgers.values()))
    merged = merged.take(pa.array([starts[root] + row for root, row in rows], pa.int64()))
    keep, lost = _fates(split, merged, winners, taken, selection)
    merged = _marked(merged, pa.array(lost, pa.bool_())).filter(pa.array(keep, pa.bool_()))
    at = merged.schema.get_field_index("row")
    numbers = pa.array(range(1, merged.num_rows + 1), pa.int64())
    return merged.set_column(at, merged.schema.field(at), numbers)


def counts(ledger: pa.Table) -> dict[str, int]:
    """Return the number of rows by status; every status is there."""
    found = Counter(ledger["status"].to_pylist())
    return {str(status): found[str(status)] for status in Status}


def _one_row_each(
    split: str, ledgers: Mapping[int, pa.Table], winners: Mapping[str, tuple[str, int]]
) -> list[tuple[int, int]]:
    """Return (root, row) of the row that stands for each row there is, in order of appearance."""
    best: dict[tuple[Any, ...], tuple[int, int, int]] = {}
    for root, ledger in ledgers.items():
        seen: Counter[tuple[Any, ...]] = Counter()
        columns = [ledger[name].to_pylist() for name in ("key", "status", "detail")]
        for row, (key, status, detail) in enumerate(zip(*columns, strict=True)):
            # a row that could not be read has no key; what was wrong with it tells it
            name = (key, status == Status.DUPLICATE) if key is not None else (None, detail)
            seen[name] += 1
            won = status == Status.OK and winners.get(key) == (split, root)
            candidate = (0 if won else _RANKS[Status(status)], root, row)
            identity = (*name, seen[name])
            if identity not in best or candidate < best[identity]:
                best[identity] = candidate
    return [(root, row) for _, root, row in best.values()]


def _fates(
    split: str,
    ledger: pa.Table,
    winners: Mapping[str, tuple[str, int]],
    taken: frozenset[str],
    selection: Selection,
) -> tuple[list[bool], list[bool]]:
    """Return for every row whether it is kept, and whether its clip went to another split."""
    keep, lost = [], []
    missing = set(taken)
    columns = [ledger[name].to_pylist() for name in ("key", "status", "label")]
    for key, status, label in zip(*columns, strict=True):
        has_clip = status == Status.OK and key in missing
        missing.discard(key if has_clip else None)
        wanted = not selection.draws and (
            selection.classes is None or label in selection.classes
        )  # fmt: skip
        elsewhere = status == Status.OK and winners.get(key, (split,))[0] != split
        if status == Status.OK and key not in winners:
            raise DatasetError(
                f"ledger of split {split}: {key} is ok, but has no clip in the index; run "
                "`kprep verify` on the sources"
            )
        keep.append(has_clip or (wanted and (status != Status.OK or elsewhere)))
        lost.append(elsewhere)
    if missing:
        raise DatasetError(
            f"ledger of split {split}: clip {min(missing)} has no row that is ok; run "
            "`kprep verify` on the sources"
        )
    return keep, lost


def _marked(ledger: pa.Table, lost: pa.Array) -> pa.Table:
    """Make rows whose clip went to another split failed ones, as `kprep shard` does."""
    marks = {"status": str(Status.FAILED), "reason": str(Reason.CONFLICT), "detail": _ELSEWHERE}
    for name in ("status", "reason", "detail", "source", "seconds", "short"):
        at = ledger.schema.get_field_index(name)
        field = ledger.schema.field(at)
        value = pa.scalar(marks.get(name), field.type)
        changed = pc.if_else(lost, value, ledger[name].combine_chunks())
        ledger = ledger.set_column(at, field, changed)
    return ledger
