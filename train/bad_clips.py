"""One account of bad clips for all ranks, so that its limit ends the run on all of them at once.

Batches name the damaged clips that substitutes stand in for. With the status of each step every
rank says how many its batches name, and how many of those nobody has named yet; only for these do
the ranks exchange names. So the account is the same on every rank after every step.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from prep.errors import DatasetError
from stream.bad_clips import BadClip, BadClipSummary
from train.agreement import raising_together
from train.distributed import all_texts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from stream.batch import ClipBatch
    from train.distributed import World


def check_damage(world: World, found: Iterable[BadClip], limit: int) -> None:
    """Raise DatasetError, on all ranks, when they found more damaged videos than the limit.

    Every rank calls this with its own; one that several ranks found counts once.
    """
    texts = all_texts(world, json.dumps(list(found)))
    told = sorted(BadClip(*values) for text in texts for values in json.loads(text))
    with raising_together(world):
        BadClipSummary(limit).count(told)


class SharedBadClips:
    """The bad clips that any rank met since the run was started or resumed.

    Args:
        world: who takes part.
        limit: different bad clips, over all ranks, that the run bears.
        say: shows one line, a format string and its values, on rank 0.
        write: appends a line to the metrics, as RunOutput.write.
    """

    def __init__(
        self,
        world: World,
        limit: int,
        say: Callable[..., None],
        write: Callable[..., None],
    ) -> None:
        self._world = world
        self._say = say
        self._write = write
        self._met: list[BadClip] = []
        self.summary = BadClipSummary(limit)
        """The account, the same on every rank."""

    def note(self, batches: Iterable[ClipBatch]) -> tuple[int, int]:
        """Take this rank's batches of a step; return how many bad clips, and how many new ones."""
        self._met = [clip for batch in batches for clip in batch.bad_clips]
        return len(self._met), len(self._new())

    def agree(self, met: int, new: int, step: int) -> DatasetError | None:
        """Count what all ranks met together; every rank calls this with the same numbers.

        Returns, on every rank, the error that ends the run when there are more than the limit.
        """
        self.summary.occurrences += met
        if not new:
            return None
        texts = all_texts(self._world, json.dumps(self._new()))
        told = [BadClip(*values) for text in texts for values in json.loads(text)]
        fresh = list({clip.key: clip for clip in told}.values())
        error = None
        try:
            self.summary.count(fresh)
        except DatasetError as caught:
            error = caught
        known, limit = len(self.summary.clips), self.summary.limit
        for number, clip in enumerate(fresh, start=known - len(fresh) + 1):
            self._say("bad clip %d (of at most %d), replaced: %s", number, limit, clip.reason)
        self._report(step, fresh)
        return error

    def end(self, step: int) -> None:
        """Say and write down what there was in all."""
        if self.summary.clips:
            self._say("over all ranks: %s", self.summary)
            self._report(step, self.summary.clips.values())

    def _new(self) -> list[BadClip]:
        clips = {clip.key: clip for clip in self._met if clip.key not in self.summary.clips}
        return list(clips.values())

    def _report(self, step: int, clips: Iterable[BadClip]) -> None:
        values: dict[str, Any] = {
            "different": len(self.summary.clips),
            "occurrences": self.summary.occurrences,
            "clips": [clip._asdict() for clip in clips],
        }
        self._write("bad_clips", step=step, **values)
