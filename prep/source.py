"""What a source of clips is to the conversion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prep.encode import Candidate
    from prep.journal import Row


@dataclass(frozen=True)
class Offer:
    """Files that may hold the clip of a row that is still pending.

    `release` removes what was stored for the offer. It is called exactly when the row's outcome
    has been recorded, or when the offer is given up; calling it again does nothing.
    """

    row: Row
    candidates: list[Candidate]
    release: Callable[[], None]


class Source(Protocol):
    """Where clips come from, in the order that suits the source rather than the plan.

    The consumer pulls: nothing is fetched before it asks for the next offer, so that what waits on
    disk is bounded by the offers that it holds.
    """

    name: str

    def offers(
        self,
        pending: Callable[[str], Row | None],
        archive_done: Callable[[str], bool],
        mark_done: Callable[[str], None],
    ) -> Iterator[Offer]:
        """Yield an offer for every pending row that the source has something for.

        `pending` maps `<video_id>_<start:06d>_<end:06d>` to the row when it waits for a clip, else
        to None. `archive_done` and `mark_done` keep the names of what was read to its end.
        """
        ...
