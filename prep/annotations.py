"""Annotation lists and folders, as a stream of segments.

A reader yields a `Segment` or a `BadRow` for every row of its input: nothing is skipped.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from prep.errors import UsageError
from prep.segment import BadRow, Segment

if TYPE_CHECKING:
    from collections.abc import Iterator

_REQUIRED = ("youtube_id", "time_start", "time_end")
_SPLIT_NAMES = {"validate": "val", "validation": "val", "testing": "test", "training": "train"}
# Files that stand beside videos in every dataset folder and are no videos
_COMPANIONS = {
    ".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".md", ".srt", ".vtt",
    ".jpg", ".jpeg", ".png", ".npy", ".npz", ".pkl", ".pt", ".zip", ".tar", ".gz", ".tgz", ".html",
    ".py", ".sh", ".log", ".part", ".ytdl",
}  # fmt: skip


def normalise_split(name: str) -> str:
    """Return the split's usual name: `validate` and `validation` are `val`."""
    lowered = name.strip().lower()
    return _SPLIT_NAMES.get(lowered, lowered)


class KineticsCsv:
    """The official Kinetics CSV: [label,] youtube_id, time_start, time_end [, split] [, …].

    Rows of other splits are counted in `other_splits` and left to their own conversion. Columns
    beyond the known ones travel in `Segment.extra`.
    """

    def __init__(self, path: Path, split: str) -> None:
        self.path = path
        self.split = split
        self.other_splits = 0
        try:
            self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise UsageError(f"annotation list {path} cannot be read: {error.strerror}") from error

    def __iter__(self) -> Iterator[Segment | BadRow]:
        """Yield one item for every row of this split."""
        self.other_splits = 0
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file)
            try:
                header = [name.strip().lower() for name in next(reader, [])]
                self._check_header(header)
                for values in reader:
                    item = self._row(header, values, reader.line_num)
                    if item is not None:
                        yield item
            except csv.Error as error:
                raise UsageError(f"{self.path}, line {reader.line_num}: {error}") from error

    def _check_header(self, header: list[str]) -> None:
        missing = [name for name in _REQUIRED if name not in header]
        if missing:
            raise UsageError(
                f"{self.path} is no Kinetics CSV: its first line must name the columns "
                f"{', '.join(_REQUIRED)} (and label, split where known); "
                f"missing: {', '.join(missing)}"
            )

    def _row(self, header: list[str], values: list[str], line: int) -> Segment | BadRow | None:
        if not any(value.strip() for value in values):
            return None  # a blank line is no row
        if len(values) != len(header):
            return BadRow(line, f"line {line} has {len(values)} fields, the header {len(header)}")
        row = dict(zip(header, values, strict=True))
        split = normalise_split(row.pop("split", "") or self.split)
        if split != self.split:
            self.other_splits += 1
            return None
        label = row.pop("label", "").strip() or None
        video_id = row.pop("youtube_id").strip()
        times = [_seconds(row.pop(name)) for name in ("time_start", "time_end")]
        start, end = times
        if start is None or end is None or not 0 <= start < end:
            return BadRow(
                line, f"line {line}: time_start and time_end must be seconds, 0 <= start < end"
            )
        if not video_id or len(video_id) > 200 or not video_id.isprintable():
            return BadRow(line, f"line {line}: youtube_id is empty, too long or not printable")
        extra = json.dumps(row, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
        return Segment(video_id, start, end, label, self.split, extra)


def _seconds(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value < 1e6 else None


class ClassFolders:
    """A folder that is its own list: every file below a class folder is a clip of that class.

    `<root>/<class>/…/<file>`, or `<root>/<split>/<class>/…` where such a folder exists; files that
    stand in no folder have no label. Hidden files and those with an extension that no video has
    are counted in `left_out`, by extension.
    """

    def __init__(self, root: Path, split: str) -> None:
        self.split = split
        self.root = root
        self._inside = f"{split}/" if (root / split).is_dir() else ""
        self.left_out: dict[str, int] = {}
        names = "\n".join(path for path in self._paths())
        self.sha256 = hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()

    def __iter__(self) -> Iterator[Segment | BadRow]:
        """Yield one segment for every file, in the order of their paths."""
        for line, path in enumerate(self._paths(), start=1):
            folder, _, rest = path.removeprefix(self._inside).partition("/")
            label = folder if rest else None
            if not path.isprintable():
                yield BadRow(line, f"file {path!a} has a name that is not printable")
                continue
            yield Segment(path, 0.0, None, label, self.split, path=path)

    def _paths(self) -> list[str]:
        self.left_out = {}
        found = []
        for name in walk(self.root / self._inside):
            path = self._inside + name
            suffix = Path(path).suffix.lower()
            if suffix in _COMPANIONS:
                self.left_out[suffix] = self.left_out.get(suffix, 0) + 1
            else:
                found.append(path)
        return found


def walk(root: Path) -> list[str]:
    """Return the paths of all files below `root` that are not hidden, relative to it, sorted.

    Links are followed, as dataset folders are often made of them; a loop of links ends.
    """
    found, seen = [], set()
    for folder, folders, files in os.walk(root, followlinks=True):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = Path(folder).relative_to(root).as_posix()
        prefix = "" if inside == "." else f"{inside}/"
        found += [f"{prefix}{name}" for name in files if not name.startswith(".")]
    return sorted(found)


def read_class_list(path: Path) -> list[str]:
    """Read class names, one a line, in label order."""
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"class list {path} cannot be read: {error}") from error
    names = [name for name in names if name]
    if not names or len(set(names)) != len(names):
        raise UsageError(f"class list {path} must hold distinct names, one a line")
    return names
