"""Annotation lists with one row a line and columns: the official Kinetics CSV and its relatives.

Delimiter and header are found in the file, never assumed. A line is a row: a quote that is never
closed spoils its own line, not the thousands that follow it.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from prep.annotation_rows import (
    ANY_SPLIT,
    bad_row,
    file_sha256,
    is_other_split,
    lines,
    normalise_split,
    seconds,
    shown,
    timed_segment,
)
from prep.errors import UsageError
from prep.segment import YOUTUBE_ID

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from prep.segment import BadRow, Segment

DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", " ": "space"}
# name: how header lines call it, in lower case, with _ for space and -
_COLUMNS = {
    "youtube_id": ("youtube_id", "youtubeid", "video_id", "ytid", "youtube_identifier", "id"),
    "time_start": ("time_start", "start_time", "start_seconds", "start"),
    "time_end": ("time_end", "end_time", "end_seconds", "end"),
    "label": ("label", "class", "class_name", "label_name", "action"),
    "split": ("split", "subset"),
}
_REQUIRED = ("youtube_id", "time_start", "time_end")
_SPLITS = {"train", "val", "test"}
_SPACED = re.compile(r'"((?:[^"]|"")*)"(?!\S)|(\S+)')
_SAMPLE_ROWS = 200


@dataclass(frozen=True)
class Layout:
    """How a table is written. `columns` are our names where known, the list's own otherwise."""

    delimiter: str
    columns: tuple[str, ...]
    has_header: bool

    def fields(self, line: str) -> list[str] | None:
        """Split a line; None where its quotes do not match."""
        if self.delimiter == " ":
            return self._spaced(line)
        return _fields(line, self.delimiter)

    def _spaced(self, line: str) -> list[str] | None:
        """Split at spaces; where a label without quotes has spaces, the surplus is the label's."""
        found = _fields(line, " ")
        surplus = len(found or ()) - len(self.columns)
        if found is None or surplus <= 0 or "label" not in self.columns:
            return found
        at = self.columns.index("label")
        return [*found[:at], " ".join(found[at : at + surplus + 1]), *found[at + surplus + 1 :]]


class KineticsCsv:
    """The official Kinetics list: [label,] youtube_id, time_start, time_end [, split] [, …].

    Delimited by comma, tab, semicolon or space, with or without a header line. Rows of other
    splits are counted in `other_splits` and left to their own conversion. Columns beyond the known
    ones travel in `Segment.extra`.
    """

    def __init__(self, path: Path, split: str) -> None:
        self.path = path
        self.split = split
        self.sha256 = file_sha256(path)
        self.layout = table_layout(path)
        self.other_splits = 0
        self.notes: list[str] = []

    def __iter__(self) -> Iterator[Segment | BadRow]:
        """Yield one item for every row of this split."""
        self.other_splits, unlabelled, columns = 0, 0, len(self.layout.columns)
        skip = self.layout.has_header
        for number, line in lines(self.path):
            if skip:
                skip = False
                continue
            fields = None if line is None else self.layout.fields(line)
            if line is None or fields is None:
                yield bad_row(self.path, number, "too long" if line is None else "unmatched quotes")
            elif len(fields) != columns:
                where = "the header" if self.layout.has_header else "the first rows"
                yield bad_row(self.path, number, f"{len(fields)} fields, {where} {columns}")
            else:
                item = self._row(dict(zip(self.layout.columns, fields, strict=True)), number)
                if item is not None:
                    unlabelled += getattr(item, "label", "") is None
                    yield item
        self._write_notes(unlabelled)

    def _row(self, row: dict[str, str], number: int) -> Segment | BadRow | None:
        split = row.pop("split", "").strip() or self.split
        if is_other_split(split, self.split):
            self.other_splits += 1
            return None
        split = normalise_split(split) if self.split == ANY_SPLIT else self.split
        video_id, start, end = (row.pop(name) for name in _REQUIRED)
        found = timed_segment(video_id, (start, end), row.pop("label", ""), split, row)
        return bad_row(self.path, number, found) if isinstance(found, str) else found

    def _write_notes(self, unlabelled: int) -> None:
        layout, name = self.layout, self.path.name
        self.notes = []
        if not layout.has_header:
            columns = ", ".join(layout.columns)
            self.notes.append(
                f"{name} has no header line; its columns were taken as {columns} "
                f"(delimiter: {DELIMITERS[layout.delimiter]})"
            )
        if self.other_splits:
            self.notes.append(f"{self.other_splits} rows of {name} are of other splits")
        if unlabelled:
            self.notes.append(f"{unlabelled} rows of {name} have no label")


def table_layout(path: Path) -> Layout:
    """Find out delimiter and columns of a table; raise UsageError where it is no Kinetics list."""
    head = [line for _, line in islice(lines(path), _SAMPLE_ROWS)]
    sample = [line for line in head if line is not None]
    if not head or head[0] is None:
        problem = "is empty" if not head else "is no list: its first line has no end"
        raise UsageError(f"annotation list {path} {problem}")
    missing: list[str] = list(_REQUIRED)
    for delimiter in DELIMITERS:
        columns = _header(sample[0], delimiter)
        lacks = [name for name in _REQUIRED if name not in columns]
        if not lacks:
            _check_distinct(path, columns)
            return Layout(delimiter, columns, has_header=True)
        missing = min(missing, lacks, key=len)
    for delimiter in DELIMITERS:
        layout = _headerless(path, sample, delimiter)
        if layout is not None:
            return layout
    raise UsageError(
        f"{path} is no Kinetics list: its first line ({shown(sample[0])}) must name the columns "
        f"{', '.join(_REQUIRED)} (and label, split where known), or all rows must have an id of 11 "
        f"characters and two times; missing: {', '.join(missing)}"
    )


def _fields(line: str, delimiter: str) -> list[str] | None:
    if delimiter == " ":
        found = _SPACED.findall(line)
        if any(word.startswith('"') for _, word in found):
            return None
        return [word or quoted.replace('""', '"') for quoted, word in found]
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True))
    except csv.Error:
        return None


def _header(line: str, delimiter: str) -> tuple[str, ...]:
    """Return a header line's names: ours where one is known, else the list's own."""
    own = {alias: name for name, aliases in _COLUMNS.items() for alias in aliases}
    names: list[str] = []
    for i, field in enumerate(_fields(line, delimiter) or []):
        name = re.sub(r"[\s-]+", "_", field.strip().lower())
        strange = name not in own and (not name or name in names)
        names.append(f"column_{i + 1}" if strange else own.get(name, name))
    return tuple(names)


def _check_distinct(path: Path, columns: tuple[str, ...]) -> None:
    twice = sorted(name for name, count in Counter(columns).items() if count > 1)
    if twice:
        raise UsageError(f"{path} has two columns for {', '.join(twice)}; leave one")


def _headerless(path: Path, sample: list[str], delimiter: str) -> Layout | None:
    """Recognise columns by what stands in them: an id, two times, a split's name, one text."""
    parsed = [fields for line in sample if (fields := _fields(line, delimiter))]
    counts = Counter(len(fields) for fields in parsed)
    width = max(counts, key=lambda count: (counts[count], -count), default=0)
    rows = [[field.strip() for field in fields] for fields in parsed if len(fields) == width]
    values = list(zip(*rows, strict=True))
    if width < len(_REQUIRED) or len(rows) * 2 < len(sample):
        return None
    times = next(
        (i for i in range(width - 1) if _mostly(_is_interval, values[i], values[i + 1])), None
    )
    ids = [i for i in range(width) if _mostly(_is_youtube_id, values[i])]
    if times is None or not ids:
        return None
    # Labels of 11 letters (kitesurfing) look like ids; ids differ from row to row
    video_id = max(ids, key=lambda i: (len(set(values[i])), i == times - 1))
    names = {video_id: "youtube_id", times: "time_start", times + 1: "time_end"}
    rest = [i for i in range(width) if i not in names]
    names |= {i: "split" for i in rest if _mostly(_is_split, values[i])}
    texts = [i for i in rest if i not in names and not _mostly(_is_number, values[i])]
    if len(texts) > 1 or list(names.values()).count("split") > 1:
        raise UsageError(
            f"{path} has no header line, and which column is the label cannot be told; "
            "add a line like label,youtube_id,time_start,time_end,split"
        )
    names |= dict.fromkeys(texts, "label")
    columns = tuple(names.get(i, f"column_{i + 1}") for i in range(width))
    return Layout(delimiter, columns, has_header=False)


def _mostly(test: Callable[..., bool], *columns: tuple[str, ...]) -> bool:
    """Whether more than half of the values pass: damaged rows must not hide a column."""
    passed = sum(test(*values) for values in zip(*columns, strict=True))
    return passed * 2 > len(columns[0])


def _is_interval(start: str, end: str) -> bool:
    first, last = seconds(start), seconds(end)
    return first is not None and last is not None and 0 <= first < last


def _is_youtube_id(text: str) -> bool:
    return YOUTUBE_ID.fullmatch(text) is not None


def _is_split(text: str) -> bool:
    return normalise_split(text) in _SPLITS


def _is_number(text: str) -> bool:
    return seconds(text) is not None
