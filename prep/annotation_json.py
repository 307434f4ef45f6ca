"""DeepMind's JSON lists, read entry by entry: memory does not grow with the file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TextIO

from prep.annotation_rows import (
    ANY_SPLIT,
    bad_row,
    file_sha256,
    is_other_split,
    normalise_split,
    timed_segment,
)
from prep.errors import UsageError
from prep.segment import BadRow, Segment

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_CHUNK_CHARACTERS = 1 << 16
_MAX_ENTRY_CHARACTERS = 1 << 20
_SPACE = " \t\r\n"
# `url` follows from the id; the others are columns of their own
_OWN_FIELDS = ("annotations", "subset", "url")


class DeepMindJson:
    """`{id: {annotations: {label, segment: [start, end]}, duration, subset, url}, …}`.

    The form is keyed by video id, so it cannot hold two segments of one video; a list of
    annotations in the place of one is read as so many rows. Further fields (`duration`) travel in
    `Segment.extra`.
    """

    def __init__(self, path: Path, split: str) -> None:
        self.path = path
        self.split = split
        self.sha256 = file_sha256(path)
        self.other_splits = 0
        self.notes: list[str] = []

    def __iter__(self) -> Iterator[Segment | BadRow]:
        """Yield one item for every annotation of this split."""
        self.other_splits = 0
        unlabelled = 0
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            for line, video_id, entry in _Entries(self.path, file):
                for item in self._rows(line, video_id, entry):
                    unlabelled += isinstance(item, Segment) and item.label is None
                    yield item
        counts = {"are of other splits": self.other_splits, "have no label": unlabelled}
        self.notes = [f"{n} rows of {self.path.name} {what}" for what, n in counts.items() if n]

    def _rows(self, line: int, video_id: str, entry: Any) -> Iterator[Segment | BadRow]:
        if not isinstance(entry, dict):
            yield bad_row(self.path, line, "the entry must be an object with annotations")
            return
        subset = entry.get("subset")
        split = subset if isinstance(subset, str) and subset.strip() else self.split
        annotations = entry.get("annotations")
        rows = annotations if isinstance(annotations, list) and annotations else [annotations]
        if is_other_split(split, self.split):
            self.other_splits += len(rows)
            return
        split = normalise_split(split) if self.split == ANY_SPLIT else self.split
        extra = {name: value for name, value in entry.items() if name not in _OWN_FIELDS}
        for row in rows:
            found = _segment(video_id, row, split, extra)
            yield bad_row(self.path, line, found) if isinstance(found, str) else found


def _segment(video_id: str, row: Any, split: str, extra: dict[str, Any]) -> Segment | str:
    if not isinstance(row, dict):
        return "annotations must be an object with label and segment"
    times, label = row.get("segment"), row.get("label")
    if not isinstance(times, list) or len(times) != 2:
        return "segment must be [start, end] in seconds"
    if label is not None and not isinstance(label, str):
        return "label must be text"
    return timed_segment(video_id, (times[0], times[1]), label or "", split, extra)


class _Entries:
    """Iterates (line, key, value) of one JSON object, holding one entry and one chunk at a time."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path = path
        self._file = file
        self._decoder = json.JSONDecoder()
        self._buffer = ""
        self._at = 0
        self._line = 1
        self._ended = False

    def __iter__(self) -> Iterator[tuple[int, str, Any]]:
        self._expect("{")
        if self._peek() == "}":
            self._expect("}")
        else:
            yield from self._pairs()
        if self._peek():
            raise self._broken("something follows the closing brace")

    def _pairs(self) -> Iterator[tuple[int, str, Any]]:
        """Yield what stands between the braces, the closing one included."""
        mark = ","
        while mark == ",":
            self._peek()
            line, key = self._line, self._value()
            if not isinstance(key, str):
                raise self._broken("a key must be text")
            self._expect(":")
            yield line, key, self._value()
            mark = self._expect(",}")

    def _peek(self) -> str:
        """Return the next character that is no space, and stand on it; "" at the end."""
        while True:
            while self._at < len(self._buffer) and self._buffer[self._at] in _SPACE:
                self._line += self._buffer[self._at] == "\n"
                self._at += 1
            if self._at < len(self._buffer) or not self._read():
                return self._buffer[self._at : self._at + 1]

    def _expect(self, marks: str) -> str:
        mark = self._peek()
        if not mark or mark not in marks:
            raise self._broken(f"expected {' or '.join(marks)}")
        self._at += 1
        return mark

    def _value(self) -> Any:
        """Return the value that begins here, reading on until it is whole."""
        self._peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._at)
            except (ValueError, RecursionError) as error:
                if len(self._buffer) - self._at > _MAX_ENTRY_CHARACTERS or not self._read():
                    raise self._broken("an entry cannot be read") from error
                continue
            # A number that touches the end of what was read may go on: 1 | 23
            if end < len(self._buffer) or not self._read():
                self._line += self._buffer.count("\n", self._at, end)
                self._at = end
                return value

    def _read(self) -> bool:
        chunk = "" if self._ended else self._file.read(_CHUNK_CHARACTERS)
        self._ended = not chunk
        self._buffer, self._at = self._buffer[self._at :] + chunk, 0
        return bool(chunk)

    def _broken(self, problem: str) -> UsageError:
        return UsageError(
            f"{self._path}, line {self._line}: {problem}; the file is damaged or no DeepMind list"
        )
