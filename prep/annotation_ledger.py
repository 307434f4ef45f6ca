"""The table that `kprep info --csv` writes of a dataset, read as a list to compare."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from prep.annotation_overlap import named_video
from prep.annotation_rows import (
    bad_row,
    file_segment,
    normalise_split,
    seconds,
    timed_segment,
)
from prep.annotation_table import KineticsCsv
from prep.errors import UsageError
from prep.segment import YOUTUBE_ID, BadRow, Segment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prep.annotation_table import Layout

# Of prep.ledger.SCHEMA, which costs an import of pyarrow; no annotation list has all of them
_COLUMNS = (
    "row", "key", "youtube_id", "time_start", "time_end", "label", "status", "reason", "detail",
    "source", "seconds", "short",
)  # fmt: skip
# The key of a file `<id>_<start:06d>_<end:06d>.*`, which is cut no further; see Segment.key
_FILE_KEY = re.compile(r"(?:.*-)?(\d{6})-(\d{6})-[0-9a-f]{10}")
_FROM_TARS = "tar"  # the source of what `kprep index` found, whose ids are keys of samples


class LedgerTable(KineticsCsv):
    """The rows of all splits of a dataset, also of those that gave no clip.

    Whole files have no end in it: they are known by their name, as in the folder that they came
    from. A row that was never read has no id, so it is a bad row here, too.
    """

    def __iter__(self) -> Iterator[Segment | BadRow]:
        """Yield one item for every row; raise UsageError where the table is cut or damaged."""
        columns = self.layout.columns
        # Not line by line: what a decoder said of a file can have several lines
        with self.path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = csv.reader(file, delimiter=self.layout.delimiter, strict=True)
            try:
                next(rows)
                for fields in rows:
                    if len(fields) == len(columns):
                        found = _item(dict(zip(columns, fields, strict=True)), self.split)
                    else:
                        found = f"{len(fields)} fields, the header {len(columns)}"
                    if isinstance(found, str):
                        yield bad_row(self.path, rows.line_num, found)
                    else:
                        yield found
            except csv.Error as error:
                raise UsageError(
                    f"{self.path}, line {rows.line_num}: {error}; write the table anew with "
                    "`kprep info --csv`"
                ) from error


def is_ledger(layout: Layout) -> bool:
    """Whether a table is one that `kprep info --csv` wrote."""
    return layout.has_header and set(_COLUMNS) <= set(layout.columns)


def _item(row: dict[str, str], split: str) -> Segment | str:
    """Return the segment of a row, or why it has none."""
    video_id, times, label = row["youtube_id"], (row["time_start"], row["time_end"]), row["label"]
    split = normalise_split(row.get("split", "")) or split
    if not video_id:
        return "it has no id, as the row of the list that it stands for could not be read"
    if row["source"] == _FROM_TARS:
        return _sample(video_id, seconds(times[1]), label, split)
    if times[1]:
        return timed_segment(video_id, times, label, split, {})
    found, cut = file_segment(video_id, label or None, split), _FILE_KEY.fullmatch(row["key"])
    if isinstance(found, str) or not cut or not YOUTUBE_ID.fullmatch(video_id):
        return found
    start, end = float(cut[1]), float(cut[2])
    return replace(found, start_seconds=start, end_seconds=end, path=None)


def _sample(key: str, end: float | None, label: str, split: str) -> Segment | str:
    """Return the segment of a sample of a tar, whose key is a file's name without extension."""
    if not f"{key}{label}".isprintable():
        return "its key or label has a character that is not printable UTF-8"
    video_id, start, end = named_video(f"{key}.") or (key, 0.0, end)
    return Segment(video_id, start, end, label or None, split)
