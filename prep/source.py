"""What a source of clips is to the conversion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from prep.journal import Row
    from prep.outcome import Reason
    from prep.segment import Segment


def _nothing() -> None:
    """Release an offer that stored nothing."""


@dataclass(frozen=True)
class Candidate:
    """A file that may hold a row's clip, and where in it. `end_seconds` None: to its end.

    `was_there`: it was when the source was opened, so that it is not missing when it is gone.
    """

    path: Path
    source: str
    start_seconds: float
    end_seconds: float | None
    was_there: bool = True


@dataclass(frozen=True)
class Offer:
    """Files that may hold the clip of a pending row, or why the source has none.

    `release` removes what was stored for the offer. It is called when the row's answer has been
    recorded, or when the offer is given up; calling it again does nothing. `archive` is what the
    file was read from, where something can be known of it only at its end.
    """

    row: Row
    candidates: list[Candidate]
    release: Callable[[], None] = _nothing
    refusal: tuple[Reason, str] | None = None
    archive: str = ""


class PendingRows(Protocol):
    """The rows that wait for a clip and that this source has not answered yet."""

    def rows(self) -> Iterator[Row]:
        """Yield them in the order of the plan."""
        ...

    def by_cut_name(self, name: str) -> Row | None:
        """Return the row of a file name `<video_id>_<start:06d>_<end:06d>`, or None."""
        ...

    def known(self, name: str) -> bool:
        """Whether a file name stands for any row of the list, pending or not."""
        ...

    def shares_cut_name(self, segment: Segment) -> bool:
        """Whether a row of other times, pending or not, has the segment's cut name."""
        ...

    def archive_done(self, name: str) -> bool:
        """Whether an archive was read to its end, in this run or an earlier one."""
        ...

    def mark_done(self, name: str) -> None:
        """Remember that an archive was read to its end."""
        ...

    def settle(self) -> None:
        """Return when all offers made so far are released."""
        ...

    def unread(self) -> set[str]:
        """Return the archives that clips were taken from and that were not judged since."""
        ...

    def judge(self, archive: str, fault: str) -> int:
        """Have the rows with clips from an archive tell its fault, if any; return their number."""
        ...

    def waiting(self) -> bool:
        """Whether any row waits for a clip, those in work left out; it may `settle` to know."""
        ...


class Source(Protocol):
    """Where clips come from, in the order that suits the source rather than the plan.

    The conversion pulls: nothing is fetched before it asks for the next offer, so that what waits
    on disk is bounded by the offers that it holds.
    """

    name: str
    several_files: bool
    """Whether a row can be offered again when the clip of its first file is refused. Then its
    answer is final only at the end of the pass."""

    def offers(self, pending: PendingRows) -> Iterator[Offer]:
        """Yield an offer for pending rows; those left out get `absence` as their answer."""
        ...

    def absence(self) -> tuple[Reason, str]:
        """Return why the rows without an offer have none, after the last offer."""
        ...

    def check(self) -> None:
        """Raise KprepError when what the source reads from is not what it was at the start."""
        ...

    def stop(self) -> None:
        """End what is under way soon; called from a signal handler."""
        ...

    def notes(self) -> list[str]:
        """Return what a user should know of the pass: one line each."""
        ...
