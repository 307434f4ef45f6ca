"""Ranks agree: whatever ends or changes a run happens on all of them at the same step.

Before every step each rank says whether it has its batches, whether a signal came, whether a
checkpoint is due, and what an earlier loss was. The exchange runs in the background, on the CPU,
while clips are copied to the device and the device computes the step before; it is read before the
first collective of the network. So a rank without a batch never leaves the others in a collective,
and the weights are still those of the last complete step: they can be saved.
"""

from __future__ import annotations

import json
import math
import traceback
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from prep.errors import KprepError, error_from_text, error_to_text
from train.distributed import broadcast_text, mark_raised_together
from train.signals import InterruptedBySignalError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from train.distributed import World

# Losses in one message: one in the loop; both that can be on the way when everything is awaited.
_LOSS_SLOTS = 2
_LOSSES = 5  # column of the first one


class LossNotFiniteError(KprepError):
    """A loss, or a weight, is NaN or infinite, or a loss is above `run.max_loss`."""

    def __init__(self, step: int, message: str) -> None:
        """Keep the number of the step whose loss it was, counted from 1."""
        super().__init__(message)
        self.step = step


@dataclass(frozen=True)
class Status:
    """What one rank says before a step."""

    failed: bool = False
    """It has no batch for the step, or cannot use it."""
    signal: int = 0
    """Number of the signal that it received; 0 for none."""
    checkpoint: bool = False
    """It wants a checkpoint of the steps that are complete."""
    bad_clips: tuple[int, int] = (0, 0)
    """Bad clips that its batches name, and how many of them no rank has named before."""


@dataclass(frozen=True)
class Agreed:
    """What all ranks said, the same on each of them."""

    failed: bool
    """Whether any rank failed."""
    signal: int
    """The largest signal number of all ranks; 0 for none."""
    checkpoint: bool
    """Whether any rank wants a checkpoint."""
    bad_clips: tuple[int, int]
    """Sums over all ranks; a clip that is new to several ranks counts for each of them."""
    losses: list[tuple[int, list[float]]]
    """Losses that arrived: number of the step and one loss per rank, in order."""


class StatusExchange:
    """Tell every rank the status and the losses of all ranks.

    A loss is copied off the device while later steps are queued: it arrives two steps late, and
    nobody waits for the device.
    """

    def __init__(self, world: World) -> None:
        """Start with nothing on the way."""
        self._world = world
        self._copies: deque[tuple[int, torch.Tensor, torch.cuda.Event | None]] = deque()
        self._sent: tuple[torch.Tensor, list[int], dist.Work | None] | None = None

    def add_loss(self, step: int, loss: torch.Tensor) -> None:
        """Hand in this rank's loss of a step: a float32 scalar on the device."""
        self._copies.append((step, *_start_copy(loss)))

    def post(self, status: Status, *, drain: bool = False) -> None:
        """Send a status, with the losses that are due; every rank does so at the same points.

        Args:
            status: of this rank.
            drain: send all losses, also one that the device still computes.
        """
        message = torch.zeros(self._world.size, _LOSSES + _LOSS_SLOTS, dtype=torch.float64)
        row = message[self._world.rank]
        row[0], row[1], row[2] = float(status.failed), status.signal, float(status.checkpoint)
        row[3], row[4] = status.bad_clips
        steps: list[int] = []
        while len(self._copies) > (0 if drain else 1):
            step, loss, event = self._copies.popleft()
            if event is not None:
                event.synchronize()
            row[_LOSSES + len(steps)] = loss.double()
            steps.append(step)
        work = None
        if self._world.size > 1:
            work = dist.all_reduce(message, group=self._world.control, async_op=True)
        self._sent = (message, steps, work)

    def read(self) -> Agreed:
        """Wait for what was posted, and return what all ranks said."""
        if self._sent is None:
            raise RuntimeError("read() without post()")
        (message, steps, work), self._sent = self._sent, None
        if work is not None:
            work.wait()
        return Agreed(
            failed=bool(message[:, 0].any()),
            signal=int(message[:, 1].max()),
            checkpoint=bool(message[:, 2].any()),
            bad_clips=(int(message[:, 3].sum()), int(message[:, 4].sum())),
            losses=[(step, message[:, _LOSSES + slot].tolist()) for slot, step in enumerate(steps)],
        )

    def forget(self) -> None:
        """Drop losses on the way: the steps they belong to are undone."""
        self._copies.clear()


def lost_losses(losses: list[float], most: float) -> str:
    """Say on which ranks a step's loss is not finite, or else above `most` (0: no limit); or ""."""
    lost = [str(rank) for rank, loss in enumerate(losses) if not math.isfinite(loss)]
    if lost:
        return f"the loss is not finite on rank {', '.join(lost)}"
    large = [f"{rank} ({loss:.4g})" for rank, loss in enumerate(losses) if loss > most > 0]
    if large:
        return f"the loss is above run.max_loss ({most:g}) on rank {', '.join(large)}"
    return ""


def raise_together(world: World, error: Exception | None) -> None:
    """Raise on every rank when any rank has an error; every rank calls this at the same point.

    A rank with an error raises its own; the others raise one of the same kind and sentence (of the
    lowest rank that has one), or a KprepError with the traceback where it is none of kprep's.
    """
    if world.size > 1:
        failed = torch.zeros(world.size, dtype=torch.int64)
        failed[world.rank] = int(error is not None)
        dist.all_reduce(failed, group=world.control)
        if failed.any():
            first = int(failed.nonzero()[0])
            text = broadcast_text(world, _pack(error, world.rank), source=first)
            error = error or _unpack(text)
    if error is not None:
        mark_raised_together(error)
        raise error


@contextmanager
def raising_together(world: World, kinds: type[Exception] = KprepError) -> Iterator[None]:
    """Raise, at the end of the block and on every rank, what the block raised on any of them.

    As `raise_together`; every rank enters the block. Only errors of `kinds` wait for its end: what
    else is raised leaves at once, and the other ranks are ended for it.
    """
    error = None
    try:
        yield
    except kinds as caught:
        error = caught
    raise_together(world, error)


def rank_0_first(world: World, work: Callable[[], object]) -> None:
    """Call `work` on every rank, rank 0 first: only one of them downloads.

    Raises, on all ranks, what it raises on any of them.
    """
    for first in (True, False):
        with raising_together(world):
            if world.is_first == first:
                work()


def _pack(error: Exception | None, rank: int) -> str:
    if error is None:
        return ""
    ours = error
    if not isinstance(ours, KprepError):
        ours = KprepError(f"rank {rank} failed:\n{''.join(traceback.format_exception(error))}")
    number = error.number if isinstance(error, InterruptedBySignalError) else 0
    return json.dumps([number, error_to_text(ours)])


def _unpack(text: str) -> KprepError:
    number, packed = json.loads(text)
    error = error_from_text(packed)
    return InterruptedBySignalError(number, str(error)) if number else error


def _start_copy(loss: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    if loss.device.type != "cuda":
        return loss.detach().clone(), None
    host = torch.empty((), dtype=loss.dtype, pin_memory=True)
    host.copy_(loss.detach(), non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return host, event
