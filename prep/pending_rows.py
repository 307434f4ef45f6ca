"""The journal's pending rows as a source sees them; see prep.source.PendingRows."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prep.journal import Journal, Row
    from prep.segment import Segment


class JournalRows:
    """The rows that wait for a clip and that one source has not answered.

    `settle` returns when all offers made so far are released, `waiting` says whether any row waits.
    """

    def __init__(
        self,
        journal: Journal,
        source: str,
        settle: Callable[[], None],
        waiting: Callable[[], bool],
    ) -> None:
        self._journal = journal
        self._source = source
        self.settle = settle
        self.waiting = waiting

    def rows(self) -> Iterator[Row]:
        """Yield them in the order of the plan."""
        for row in self._journal.pending():
            if all(answer.source != self._source for answer in row.answers):
                yield row

    def by_cut_name(self, name: str) -> Row | None:
        """Return the row of a file name `<video_id>_<start:06d>_<end:06d>`, or None.

        Also one that the source has answered with a file that gave no clip: here is another.
        """
        return self._journal.pending_by_cut_name(name)

    def known(self, name: str) -> bool:
        """Whether a file name stands for any row of the list, pending or not."""
        return self._journal.has_cut_name(name)

    def shares_cut_name(self, segment: Segment) -> bool:
        """Whether a row of other times, pending or not, has the segment's cut name."""
        name, times = segment.cut_name, (segment.start_seconds, segment.end_seconds)
        return name is not None and self._journal.has_cut_name(name, times)

    def archive_done(self, name: str) -> bool:
        """Whether an archive was read to its end, in this run or an earlier one."""
        return self._journal.is_done(self._source, name)

    def unread(self) -> set[str]:
        """Return the archives that clips were taken from and that were not judged since."""
        return self._journal.taken.archives()

    def judge(self, archive: str, fault: str) -> int:
        """Have the rows with clips from an archive tell its fault, if any; return their number."""
        self._journal.commit()
        return self._journal.taken.judge(archive, fault)

    def mark_done(self, name: str) -> None:
        """Remember that an archive was read to its end."""
        self._journal.mark_done(self._source, name)
