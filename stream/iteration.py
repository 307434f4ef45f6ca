"""One way through an epoch: where it began, how far it is, and the batches it still has."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from torch.utils.data import Sampler

from stream.options import BatchAddress

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stream.clip_stream import ClipStream


@dataclass
class Iteration:
    """One way through an epoch, from a step of it on.

    delivered   batches that the caller has got
    is_running  whether somebody may still ask for its next batch
    is_left     whether another epoch was chosen meanwhile, for the iteration behind this one
    """

    epoch: int
    begun_at: int
    delivered: int = 0
    is_running: bool = True
    is_left: bool = False


class Addresses(Sampler[BatchAddress]):
    """What is still to be made of a loader's current iteration.

    Refers to no loader: in a cycle of references, torch's workers are not told that they can end,
    and whoever drops the loader waits 5 seconds for each.
    """

    def __init__(self, stream: ClipStream) -> None:
        self._plan, self._rank = stream.plan, stream.rank
        self.epoch = 0
        self.begun_at = 0
        self.made_here = 0
        """Batches of the iteration that need no worker any more."""

    def __iter__(self) -> Iterator[BatchAddress]:
        return islice(self.since(self.epoch, self.begun_at), self.made_here, None)

    def __len__(self) -> int:
        return max(0, self.count(self.begun_at) - self.made_here)

    def count(self, first_step: int) -> int:
        """Return how many addresses `since` yields; only the epoch's last step is looked at."""
        last = max(first_step, self._plan.num_steps - 1)
        whole = (last - first_step) * self._plan.accumulate
        return whole + sum(1 for _ in self.since(self.epoch, last))

    def since(self, epoch: int, first_step: int) -> Iterator[BatchAddress]:
        """Yield this rank's addresses from a step of an epoch to its end."""
        plan = self._plan
        for step in range(first_step, plan.num_steps):
            for micro in range(plan.accumulate):
                # an evaluation's last step can leave a rank without clips
                if len(plan.positions(step, micro, self._rank)):
                    yield BatchAddress(epoch, step, micro)
