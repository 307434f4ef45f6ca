"""A local folder of videos as a source: which files may hold a row's clip."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prep.errors import KprepError, UsageError
from prep.folder_walk import walk
from prep.outcome import Reason
from prep.source import Candidate, Offer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from prep.segment import Segment
    from prep.source import PendingRows

SOURCE_NAME = "folder"


class FolderSource:
    """Finds clips by name in a folder of any layout: flat, class folders, names with spaces.

    `<id>_<start:06d>_<end:06d>.*` is a file that is already cut, `<id>.*` one to cut from. Of a
    segment that is not in whole seconds the first name says too little: its whole video is tried
    before, and such a file is left to rows of other times that have the same name. Names from the
    list are looked up among the files found; they never become part of a path.
    """

    several_files = False  # a row's files are all in one offer

    def __init__(self, root: Path, name: str = SOURCE_NAME) -> None:
        self.name = name
        if not root.is_dir():
            raise UsageError(f"source folder {root} does not exist; give the folder of the videos")
        self.root = root
        self._identity = _identity(root)
        files = walk(root)
        self._dead_links = files.dead_links
        self._by_stem: dict[str, list[str]] = {}
        for path in files.paths:
            self._by_stem.setdefault(_stem(path), []).append(path)
        if not self._by_stem:
            raise UsageError(f"source folder {root} holds no file; see that it is mounted")

    def offers(self, pending: PendingRows) -> Iterator[Offer]:
        """Yield an offer for every pending row, in the order of the plan."""
        for row in pending.rows():
            found = self.candidates(row.segment, pending) if row.segment is not None else []
            yield Offer(row, found, refusal=None if found else self._refusal(row.segment))

    def absence(self) -> tuple[Reason, str]:
        """Say that no file has the row's name."""
        return Reason.MISSING, ""

    def _refusal(self, segment: Segment | None) -> tuple[Reason, str]:
        for path in self._cut_files(segment) if segment is not None else ():
            name = path.rpartition("/")[2]
            return Reason.MISSING, f"{name} may hold the seconds of another row of the list"
        return self.absence()

    def check(self) -> None:
        """Raise KprepError when the folder is gone, or another one stands in its place."""
        if _identity(self.root) != self._identity:
            raise KprepError(
                f"source {self.root} is gone, or no longer the folder that it was when this run "
                "began; see that it is mounted, then run the same command again"
            )

    def stop(self) -> None:
        """Do nothing: the search is over before the first offer."""

    def notes(self) -> list[str]:
        """Return nothing: every row has its own answer.

        No file is lost where a link to a folder is not followed: it is found in its own place.
        """
        return []

    def candidates(self, segment: Segment, rows: PendingRows) -> list[Candidate]:
        """Return the files to try, the likeliest first; none when the folder has none."""
        if segment.path is not None:
            return [self._candidate(segment.path, segment.start_seconds, None)]
        start, end = segment.start_seconds, segment.end_seconds
        if end is None:
            return []
        cut = [self._candidate(path, 0.0, end - start) for path in self._cut_files(segment)]
        paths = self._paths(segment.video_id, segment)
        whole = [self._candidate(path, start, end) for path in paths]
        if segment.in_whole_seconds:
            return cut + whole
        return whole if cut and rows.shares_cut_name(segment) else whole + cut

    def _cut_files(self, segment: Segment) -> list[str]:
        return self._paths(segment.cut_name, segment) if segment.cut_name else []

    def _paths(self, stem: str, segment: Segment) -> list[str]:
        """Return the files of a name; those in the row's split and class folders come first."""

        def unlikely(path: str) -> tuple[bool, bool, str]:
            folders = path.split("/")[:-1]
            classes = {segment.label, torchvision_folder(segment.label or "")}
            return segment.split not in folders, not classes & set(folders), path

        return sorted(self._by_stem.get(stem, []), key=unlikely)

    def _candidate(self, path: str, start: float, end: float | None) -> Candidate:
        listed = path in self._by_stem.get(_stem(path), ())
        was_there = listed and path not in self._dead_links
        return Candidate(self.root / path, self.name, start, end, was_there)


def _stem(path: str) -> str:
    return path.rpartition("/")[2].rpartition(".")[0]


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def torchvision_folder(label: str) -> str:
    """Return the class folder that torchvision.datasets.Kinetics makes of a label."""
    return label.replace(" ", "_").replace("'", "").replace("(", "").replace(")", "")
