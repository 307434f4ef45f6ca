"""Lists of paths with labels (UCF101, mmaction2), and folders that are their own list."""

from __future__ import annotations

import hashlib
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

from prep.annotation_rows import (
    ANY_SPLIT,
    bad_row,
    file_segment,
    file_sha256,
    lines,
    normalise_split,
    shown,
)
from prep.errors import UsageError
from prep.folder_walk import note_on_left_out, walk
from prep.segment import BadRow, Segment

if TYPE_CHECKING:
    from collections.abc import Iterator

_VIDEO_SUFFIXES = (
    "mp4", "avi", "mkv", "webm", "mov", "m4v", "mpg", "mpeg", "ts", "flv", "wmv", "3gp", "ogv",
)  # fmt: skip
# The path ends at the last video extension, so that it can have spaces; the rest is the label
_ROW = re.compile(
    rf'(?P<quote>"?)(?P<path>[^"]+\.(?:{"|".join(_VIDEO_SUFFIXES)}))(?P=quote)'
    r"(?:(?:\s*[,;\t]\s*|\s+)(?P<label>\S.*))?",
    re.IGNORECASE,
)
_MAX_DIGITS = 18
_NUMBERED_CLASS = re.compile(r"(\d+)[\s,;]+(\S.*)")
# Files that stand beside videos in every dataset folder and are no videos
_COMPANIONS = {
    ".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".md", ".srt", ".vtt",
    ".jpg", ".jpeg", ".png", ".npy", ".npz", ".pkl", ".pt", ".zip", ".tar", ".gz", ".tgz", ".html",
    ".py", ".sh", ".log", ".part", ".ytdl",
}  # fmt: skip
_USUAL_SPLITS = {"train", "val", "test"}


class PathList:
    """One file a line, with or without a label: `Class/v_x.avi 1`, `path.mp4 12`, `a b.mp4,label`.

    Paths are relative to SOURCE. A number is looked up in a class index beside the list
    (`classInd.txt`, or the only `*label_map*.txt`); without one, the class folder is the label
    where folders and numbers match one to one. A row without a label takes its class folder.
    """

    def __init__(self, path: Path, split: str) -> None:
        self.path = path
        self.split = split
        self.other_splits = 0
        self.notes: list[str] = []
        index = _find_class_index(path)
        self._names = read_class_index(index) if index else {}
        own = file_sha256(path)
        both = f"{own} {file_sha256(index)}" if index else ""
        self.sha256 = hashlib.sha256(both.encode()).hexdigest() if index else own
        self._folders_are_classes = not index and self._numbers_match_folders()
        self._how = f"class numbers are looked up in {index.name}" if index else ""
        if self._folders_are_classes:
            self._how = "class numbers match the class folders, whose names are the labels"

    def __iter__(self) -> Iterator[Segment | BadRow]:
        """Yield one item for every line that is not blank."""
        unlabelled = numbers = 0
        for number, line in lines(self.path):
            row = _parse(line)
            if row is None:
                problem = "no path of a video (.mp4, .avi, …), alone or with one label"
                yield bad_row(self.path, number, problem)
                continue
            label = self._label(*row)
            found = file_segment(row[0], label, self.split)
            if row[1] and label is None:
                found = f"class number ({shown(row[1])}) is not in the class index"
            elif isinstance(found, Segment):
                numbers += label is not None and label.isdecimal()
                unlabelled += label is None
            yield bad_row(self.path, number, found) if isinstance(found, str) else found
        self._write_notes(unlabelled, numbers)

    def _label(self, path: str, written: str | None) -> str | None:
        folder = _class_folder(path, self.split)
        if written is None:
            return folder
        if self._names and written.isdecimal():
            return self._names.get(int(written)) if len(written) <= _MAX_DIGITS else None
        if self._folders_are_classes and written.isdecimal():
            return folder
        return written

    def _numbers_match_folders(self) -> bool:
        """Whether every number stands with one class folder, and every folder with one number."""
        by_number: dict[str, str] = {}
        by_folder: dict[str, str] = {}
        for _, line in lines(self.path):
            path, written = _parse(line) or ("", None)
            folder = _class_folder(path, self.split)
            if written is None or not written.isdecimal():
                continue
            if folder is None or by_number.setdefault(written, folder) != folder:
                return False
            if by_folder.setdefault(folder, written) != written:
                return False
        return len(by_number) > 1

    def _write_notes(self, unlabelled: int, numbers: int) -> None:
        name = self.path.name
        self.notes = [f"{name}: {self._how}"] if self._how else []
        if numbers:
            self.notes.append(
                f"{name}: {numbers} labels are class numbers, kept as they are; put the class "
                "index (classInd.txt: `1 Name` a line) beside the list to have names"
            )
        if unlabelled:
            self.notes.append(f"{unlabelled} rows of {name} have no label")


def is_path_list(sample: list[str]) -> bool:
    """Whether most of some lines are paths of videos."""
    return sum(_parse(line) is not None for line in sample) * 2 > len(sample)


def read_class_index(path: Path) -> dict[int, str]:
    """Read class names by number: `1 Name` a line (classInd.txt), or names alone from 0 on."""
    rows = [line.strip() if line else "" for _, line in lines(path)]
    numbered = [_NUMBERED_CLASS.fullmatch(row) for row in rows]
    if any(match and len(match[1]) > _MAX_DIGITS for match in numbered):
        raise UsageError(f"class index {path} has a class number of over {_MAX_DIGITS} digits")
    pairs = [(int(match[1]), match[2]) for match in numbered if match]
    if len(pairs) != len(rows):
        pairs = list(enumerate(rows))
    names = dict(pairs)
    if not rows or len(names) != len(pairs) or len(set(names.values())) != len(pairs):
        raise UsageError(f"class index {path} must name distinct classes, each with its own number")
    return names


def _parse(line: str | None) -> tuple[str, str | None] | None:
    """Return path and label of a line; None where it has no path of a video."""
    match = _ROW.fullmatch((line or "").strip().rstrip(" \t,;"))
    if match is None:
        return None
    label = match["label"] or ""
    if len(label) > 1 and label[0] == label[-1] == '"':
        label = label[1:-1].replace('""', '"')
    return match["path"], label.strip() or None


def _class_folder(path: str, split: str) -> str | None:
    """Return the folder that a file stands in, unless that is the split's own."""
    folder = posixpath.basename(posixpath.dirname(posixpath.normpath(path)))
    return None if not folder or normalise_split(folder) == normalise_split(split) else folder


def _find_class_index(path: Path) -> Path | None:
    classic = path.with_name("classInd.txt")
    if classic.is_file():
        return classic
    maps = sorted(file for file in path.parent.glob("*label_map*.txt") if file.name != path.name)
    return maps[0] if len(maps) == 1 else None


class ClassFolders:
    """A folder that is its own list: every file below a class folder is a clip of that class.

    `<root>/<class>/…/<file>`, or `<root>/<split>/<class>/…` where such a folder exists (Showmax's
    downloader calls val `valid`); split "*" is all of these folders. Files that stand in no folder
    have no label. Hidden files and those with an extension that no video has are counted in
    `left_out`, by extension. Links to folders are followed out of the root only: what really lies
    in it, also in the folder of another split, is of its own class there.
    """

    def __init__(self, root: Path, split: str) -> None:
        self.split = split
        self.root = self.path = root
        self._folders = _split_folders(root, split)
        self.left_out: dict[str, int] = {}
        self._folders_left_out: list[tuple[str, str]] = []
        self.other_splits = 0
        names = "\n".join(path for _, _, path in self._paths())
        if not names and self._folders_left_out:
            (why,) = note_on_left_out(self._folders_left_out)
            raise UsageError(f"source {root} has no clip of split {split}: {why}; make folders of "
                             "these links, or give the folder that they lead to")  # fmt: skip
        self.sha256 = hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()

    @property
    def notes(self) -> list[str]:
        """What was left out."""
        what = ", ".join(f"{count} {suffix}" for suffix, count in sorted(self.left_out.items()))
        notes = [f"left out as no videos by their extension: {what}"] if what else []
        return notes + note_on_left_out(self._folders_left_out)

    def __iter__(self) -> Iterator[Segment | BadRow]:
        """Yield one segment for every file, in the order of their paths."""
        for line, (split, inside, path) in enumerate(self._paths(), start=1):
            folder, _, rest = path.removeprefix(inside).partition("/")
            found = file_segment(path, folder if rest else None, split)
            yield BadRow(line, found) if isinstance(found, str) else found

    def _paths(self) -> list[tuple[str, str, str]]:
        """Return split, its folder and path of every file that may be a video."""
        self.left_out, self._folders_left_out = {}, []
        found = []
        places = _places(self.root, self._folders)
        for split, inside in self._folders:
            files = walk(self.root, inside, places)
            self._folders_left_out += files.left_out
            for path in files.paths:
                suffix = Path(path).suffix.lower()
                if suffix in _COMPANIONS:
                    self.left_out[suffix] = self.left_out.get(suffix, 0) + 1
                else:
                    found.append((split, inside, path))
        return found


def _places(root: Path, folders: list[tuple[str, str]]) -> list[str]:
    """Return the folders that hold clips of some split: a link must not take these into another."""
    chosen = {inside for _, inside in folders}
    if "" in chosen:
        return [""]
    others = {f"{name}/" for name in _folders_in(root) if normalise_split(name) in _USUAL_SPLITS}
    return sorted(chosen | others)


def _split_folders(root: Path, split: str) -> list[tuple[str, str]]:
    """Return the split with its folder and a slash, "" where the root has no folders of splits."""
    if not root.is_dir():
        raise UsageError(f"source {root} is no folder; give the folder of the videos")
    folders = _folders_in(root)
    for name in [split, *folders]:
        if name in folders and normalise_split(name) == normalise_split(split):
            return [(split, f"{name}/")]
    visible = [name for name in folders if not name.startswith(".")]
    if not visible or any(normalise_split(name) not in _USUAL_SPLITS for name in visible):
        return [(split, "")]
    if split == ANY_SPLIT:
        return [(normalise_split(name), f"{name}/") for name in visible]
    raise UsageError(f"source {root} has no folder for split {split}, only for "
                     f"{', '.join(visible)}; choose one of them with --split")  # fmt: skip


def _folders_in(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())
