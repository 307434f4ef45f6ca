"""Class names: their order, and one spelling for each."""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from prep.errors import UsageError
from prep.segment import BadRow, Segment
from prep.text.plain import few

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from prep.annotation_rows import Listing


def without_case(label: str) -> str:
    """Return what the spellings of one class have in common.

    `é` is one character or an `e` and an accent, as macOS names files: the same word to a reader.
    """
    return unicodedata.normalize("NFC", label.lower())


def told_apart(labels: Sequence[str]) -> list[str]:
    """Return labels in quotes, as ASCII where two would look the same."""
    alike = len({unicodedata.normalize("NFC", label) for label in labels}) < len(labels)
    return [ascii(label) if alike else repr(label) for label in labels]


def difference(alike: Iterable[Sequence[str]]) -> str:
    """Return by what the spellings of each of several classes differ."""
    by_case = all(len({label.lower() for label in labels}) == 1 for labels in alike)
    return "case" if by_case else "case or by how accents are written"


class OneSpelling:
    """A list in which labels that differ only by case or by how accents are written are one class.

    The more frequent spelling stands for all; where two are as frequent, the one in Unicode's
    composed form (NFC), then the first in sort order. A spelling that `classes` (those of the
    dataset, or of --class-list) holds goes before all.
    Each iteration reads the list twice, and holds no more than the distinct labels.
    """

    def __init__(self, listing: Listing, classes: Sequence[str] = ()) -> None:
        self._listing = listing
        self._classes = tuple(classes)
        self._notes: list[str] = []
        self._by = ""
        self.path = listing.path
        self.sha256 = listing.sha256

    @property
    def other_splits(self) -> int:
        """The number of rows that belong to other splits."""
        return self._listing.other_splits

    @property
    def notes(self) -> list[str]:
        """The list's own notes, and one about classes that had several spellings."""
        if not self._notes:
            return self._listing.notes
        named = few(self._notes, between="; ")
        what = f"{len(self._notes)} classes had labels that differ only by {self._by}: {named}"
        return [*self._listing.notes, what]

    def __iter__(self) -> Iterator[Segment | BadRow]:
        """Yield the list's items with one spelling of every class."""
        spelling = self._spelling()
        for item in self._listing:
            if isinstance(item, Segment) and item.label in spelling:
                yield replace(item, label=spelling[item.label])
            else:
                yield item

    def _spelling(self) -> dict[str, str]:
        """Return what to write for every label that is written otherwise."""
        counts = Counter(
            item.label for item in self._listing if isinstance(item, Segment) and item.label
        )
        classes: dict[str, list[str]] = {}
        for label in sorted({*counts, *self._classes}):
            classes.setdefault(without_case(label), []).append(label)
        changed: dict[str, str] = {}
        self._notes, alike = [], []
        for labels in classes.values():
            # A class list can tell two classes apart by case alone: then they are two
            given = [label for label in labels if label in self._classes]
            others = [label for label in labels if label not in given]
            if not others or len(given) > 1 or len(labels) == 1:
                continue
            chosen = given[0] if given else max(labels, key=lambda label: _weight(label, counts))
            shown = dict(zip(labels, told_apart(labels), strict=True))
            merged = [f"{shown[label]} ({counts[label]})" for label in labels if label != chosen]
            changed |= {label: chosen for label in labels if label != chosen}
            alike.append(labels)
            self._notes.append(f"{', '.join(merged)} counted as {shown[chosen]} ({counts[chosen]})")
        self._by = difference(alike)
        return changed


def _weight(label: str, counts: Mapping[str, int]) -> tuple[int, bool]:
    return counts[label], unicodedata.is_normalized("NFC", label)


def kinetics_class_list(labels: Iterable[str]) -> list[str]:
    """Return the distinct labels in label order: sorted by code point, numbers by value.

    For Kinetics-400 that is the order of torchvision.models' categories. It is not the order of
    torchvision.datasets.Kinetics, which sorts folder names: there `skiing_crosscountry` comes
    before `skiing_not_slalom_or_crosscountry`, here `skiing (not slalom or crosscountry)` first.
    """
    distinct = set(labels)
    if all(label.isascii() and label.isdecimal() for label in distinct):
        return sorted(distinct, key=lambda label: (int(label), label))
    return sorted(distinct)


def chosen_classes(names: str | None, file: Path | None) -> frozenset[str] | None:
    """Return the classes of `--classes` or `--classes-file`; None where neither is given.

    Raises UsageError where both are, and for names between commas that are all empty.
    """
    if names is not None and file is not None:
        raise UsageError("--classes and --classes-file exclude each other; give one of them")
    if file is not None:
        return frozenset(read_class_list(file))
    if names is None:
        return None
    found = frozenset(name.strip() for name in names.split(",") if name.strip())
    if not found:
        raise UsageError("--classes names no class; give names separated by commas")
    return found


def read_class_list(path: Path, *, numbered: bool = False) -> list[str]:
    """Read class names, one a line, in label order; UsageError where it is no such list.

    Lines without a name are left out; where labels are numbers of lines (`numbered`), none may
    stand before the last name.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"class list {path} cannot be read: {error}") from error
    names = [line for line in lines if line]
    if not names:
        raise UsageError(f"class list {path} has no names; write them one a line")
    if numbered and "" in lines[: lines.index(names[-1])]:
        raise UsageError(
            f"class list {path} has no name in line {lines.index('') + 1}, and labels count its "
            "lines; write one name on every line"
        )
    for name, count in Counter(names).items():
        if count > 1:
            raise UsageError(f"class list {path} has {name!r} twice; names must be distinct")
        if not name.isprintable():
            raise UsageError(f"class list {path}: {name!r} must be printable text")
    return names
