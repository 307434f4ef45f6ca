"""What all annotation forms share: reading lines, checking values, making segments and bad rows."""

from __future__ import annotations

import hashlib
import json
import math
import posixpath
import re
from typing import TYPE_CHECKING, Any, Protocol

from prep.errors import UsageError
from prep.segment import BadRow, Segment

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ANY_SPLIT = "*"  # reads the rows of every split, each under its own name
MAX_LINE_CHARACTERS = 1 << 16
_MAX_NAME_CHARACTERS = 200
_MAX_EXTRA_CHARACTERS = 10_000
_MAX_PATH_CHARACTERS = 1024
_MAX_SECONDS = 1e6
_SPLIT_NAMES = {
    "training": "train", "validate": "val", "validation": "val", "valid": "val", "testing": "test",
}  # fmt: skip
# No file stem or id of a video service has them, and each means something to a shell or a path
_NEVER_IN_IDS = frozenset('/\\"`$<>|*?;:')
_CLIP_STEM = re.compile(r"([A-Za-z0-9_-]{11})_(\d{6})_(\d{6})")
_EXTRA = json.JSONEncoder(ensure_ascii=True, sort_keys=True, allow_nan=False, separators=(",", ":"))
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


class Listing(Protocol):
    """A list of annotation rows, read as a stream, as often as wanted.

    `other_splits` (rows left to the conversions of other splits) and `notes` (what a user should
    know about how the list was read) are complete when an iteration has come to its end.
    """

    @property
    def path(self) -> Path:
        """The list file, or the folder that is its own list."""

    @property
    def sha256(self) -> str:
        """Of everything that decides the rows."""

    @property
    def other_splits(self) -> int:
        """The number of rows that belong to other splits."""

    @property
    def notes(self) -> list[str]:
        """One sentence for everything that a user should know."""

    def __iter__(self) -> Iterator[Segment | BadRow]:
        """Yield one item for every row of the split: nothing is skipped."""


def normalise_split(name: str) -> str:
    """Return the split's usual name: `validate`, `validation` and `valid` are `val`."""
    lowered = name.strip().lower()
    return _SPLIT_NAMES.get(lowered, lowered)


def is_other_split(name: str, wanted: str) -> bool:
    """Whether a row of split `name` is not for a conversion of split `wanted`."""
    return wanted != ANY_SPLIT and normalise_split(name) != normalise_split(wanted)


def file_sha256(path: Path) -> str:
    """Return the file's sha256; a list that cannot be read is the user's mistake."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"annotation list {path} cannot be read: {error.strerror}") from error


def first_character(path: Path) -> str:
    """Return the first character that is no space, "" where there is none."""
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 16):
                if file.tell() == len(block) and block.startswith(_UTF16_MARKS):
                    raise UsageError(f"annotation list {path} is UTF-16; save it as UTF-8")
                text = block.decode("utf-8-sig", "surrogateescape").lstrip()
                if text:
                    return text[0]
    except OSError as error:
        raise UsageError(f"annotation list {path} cannot be read: {error.strerror}") from error
    return ""


def lines(path: Path) -> Iterator[tuple[int, str | None]]:
    """Yield number and text of every line that is not blank; None stands for an overlong line.

    Lines end with \n, \r\n or \r. A byte-order mark is left out; bytes that are no UTF-8 become
    surrogates, which no check lets pass.
    """
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        number = 0
        while line := file.readline(MAX_LINE_CHARACTERS):
            number += 1
            if len(line) == MAX_LINE_CHARACTERS and not line.endswith("\n"):
                while line and not line.endswith("\n"):
                    line = file.readline(MAX_LINE_CHARACTERS)
                yield number, None
            elif line.strip():
                yield number, line.removesuffix("\n")


def bad_row(path: Path, line: int, problem: str) -> BadRow:
    """Return a bad row that names its file and line; values are shown as ASCII, shortened."""
    return BadRow(line, f"{path.name}, line {line}: {problem}")


def shown(value: str) -> str:
    """Return a value from data as it may stand in a message: quoted, ASCII, at most 40 long."""
    return ascii(value if len(value) <= 40 else f"{value[:37]}...")


def seconds(value: object) -> float | None:
    """Return a time in seconds, finite and below 1e6, or None; `0:10` and `1e2s` are none."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    if isinstance(value, str) and "_" in value:  # Python's own way to write 1_000
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and abs(number) < _MAX_SECONDS else None


def timed_segment(
    video_id: str, times: tuple[object, object], label: str, split: str, extra: dict[str, Any]
) -> Segment | str:
    """Return the segment of a row, or what is wrong with the row. An empty label is none."""
    start, end = (seconds(value) for value in times)
    if start is None or end is None or not 0 <= start < end:
        values = " and ".join(shown(str(value)) for value in times)
        return f"time_start and time_end ({values}) must be seconds, 0 <= start < end"
    video_id = video_id.strip()
    if not _is_name(video_id) or _NEVER_IN_IDS & set(video_id) or video_id in (".", ".."):
        return f"youtube_id ({shown(video_id)}) must be an id or a file name without folder"
    label = label.strip()
    if label and not _is_name(label):
        return f"label ({shown(label)}) must be printable UTF-8, at most 200 characters"
    try:
        text = _EXTRA.encode(extra) if extra else "{}"
    except ValueError:
        return "its other columns hold a number that is not finite, which JSON does not have"
    if len(text) > _MAX_EXTRA_CHARACTERS:
        return f"its other columns hold {len(text)} characters; at most 10,000 are kept"
    return Segment(video_id, start, end, label or None, split, text)


def file_segment(path: str, label: str | None, split: str) -> Segment | str:
    """Return the segment of a file named relative to the source, or what is wrong with its name.

    A file named `<id>_<start:06d>_<end:06d>.*` is a clip of that YouTube video.
    """
    problem = _path_problem(path)
    if problem:
        return f"path {shown(path)} {problem}"
    if label and not _is_name(label):
        return f"label ({shown(label)}) must be printable UTF-8, at most 200 characters"
    # Not pathlib: it interns every part of every path for good
    path = posixpath.normpath(path)
    stem = _CLIP_STEM.fullmatch(posixpath.splitext(posixpath.basename(path))[0])
    return Segment(stem[1] if stem else path, 0.0, None, label, split, path=path)


def _is_name(text: str) -> bool:
    return bool(text) and len(text) <= _MAX_NAME_CHARACTERS and text.isprintable()


def _path_problem(path: str) -> str:
    if not path.isprintable():
        return "has a character that is not printable UTF-8"
    if len(path) > _MAX_PATH_CHARACTERS:
        return "is longer than 1,024 characters"
    if "://" in path:
        return "is an address; it must be a file below SOURCE"
    if path.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[\\/]", path):
        return "is absolute; it must be relative to SOURCE"
    if ".." in re.split(r"[\\/]", path):
        return "leads out of SOURCE; it must not have '..'"
    return "names no file" if posixpath.normpath(path) == "." else ""
