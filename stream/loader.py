"""The loader: hands batch addresses to worker processes and knows where the sequence stands."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset

from prep.errors import KprepError, UsageError, error_from_text, error_to_text
from prep.storage import RetryPolicy, Storage
from stream.bad_clips import BadClipSummary, Policy
from stream.batch import ClipBatch
from stream.batch_slots import BatchSlots, LentBatch
from stream.clip_stream import ClipStream
from stream.iteration import Addresses, Iteration
from stream.opened_roots import RootSummary, WeightedStorage, summarise
from stream.options import BatchAddress, Mode, Short, StreamOptions
from stream.rates import parse_rate
from stream.roots import RootLike, WeightedRootLike, check_patience, data_roots
from stream.state import StreamState, state_of
from stream.topology import rank_and_size
from stream.whole_numbers import whole_number
from stream.workers import begin_worker, fork_server_context, made_by_workers, stop_workers

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from fractions import Fraction
    from pathlib import Path

    from stream.batch import Layout
    from stream.order import Grouping
    from stream.sampling import Placement

_OPENING_PATIENCE_SECONDS = 60.0
_BATCHES_HELD = 2  # of a worker: the one being made, and one that the caller has


@dataclass(frozen=True)
class _Failure:
    """An error of ours on its way from a worker, as `error_to_text` has it: no traceback."""

    text: str


class _Guarded(Dataset["ClipBatch | LentBatch | _Failure"]):
    """A stream whose own errors arrive as values, since torch would wrap them in tracebacks.

    Workers make batches in `slots` where there are any; what they lend arrives as a ClipBatch.
    """

    def __init__(self, stream: ClipStream, slots: BatchSlots | None = None) -> None:
        self.stream = stream
        self.slots = slots

    def __getitem__(self, address: BatchAddress) -> ClipBatch | LentBatch | _Failure:
        try:
            if self.slots is None:
                return self.stream[address]
            return self.slots.lend(self.stream.batch(address, self.slots.room))
        except KprepError as error:
            return _Failure(error_to_text(error))


def _as_is(batch: Any) -> Any:
    """Return the batch as the worker made it; a lambda could not be sent to a worker."""
    return batch


class ClipLoader:
    """Iterates over this rank's batches of one epoch; made by `clip_loader`.

    `set_epoch` before each epoch; `state_dict` at any moment; `load_state_dict` to continue, also
    on another number of ranks or workers while the global batch stays the same.
    """

    def __init__(
        self,
        stream: ClipStream,
        *,
        num_workers: int = 0,
        prefetch_batches: int = 2,
        pin_memory: bool = False,
        bad_clip_limit: int = 100,
    ) -> None:
        self.stream = stream
        self.num_workers = whole_number("num_workers", num_workers, least=0)
        self.next_step = 0
        """The step at which the next iteration begins: 0, or where a loaded state continues."""
        self._epoch = 0
        self._iteration: Iteration | None = None
        self._addresses = Addresses(stream)
        self._bad_clips = BadClipSummary(whole_number("bad_clip_limit", bad_clip_limit, least=0))
        self._prefetch_batches = whole_number("prefetch_batches", prefetch_batches, least=1)
        self._pin_memory = pin_memory
        self._torch_loader: DataLoader[Any] | None = None
        self._slots: BatchSlots | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the workers behind: a copy starts its own, and nobody iterates over it yet."""
        here = self._iteration and replace(self._iteration, is_running=False)
        return {**self.__dict__, "_iteration": here, "_torch_loader": None, "_slots": None}

    @property
    def epoch(self) -> int:
        """The epoch that was chosen: the next iteration is over it."""
        return self._epoch

    @property
    def class_names(self) -> list[str]:
        """Class names in label order."""
        return list(self.stream.class_names)

    @property
    def roots(self) -> list[RootSummary]:
        """What each root brings into an epoch, in the order in which they were given."""
        return summarise(self.stream.roots, self.stream.mixture.shares)

    @property
    def num_clips(self) -> int:
        """Clips of the split that are in the order."""
        return len(self.stream.rows)

    @property
    def num_videos(self) -> int:
        """Clips of the split, also those that are too short to be in the order; on any rank."""
        return self.num_clips + len(self.stream.placed.left_out)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps an epoch, the same on every rank."""
        return self.stream.plan.num_steps

    @property
    def global_batch(self) -> int:
        """Clips an optimiser step over all ranks: world_size x batch_size x accumulate."""
        return self.stream.plan.global_batch

    @property
    def num_left_out(self) -> int:
        """Clips at the end of each epoch that fill no step; others each epoch."""
        return self.stream.plan.num_left_out

    @property
    def unscored(self) -> list[str]:
        """Keys of clips too short for the frames asked for, and of those an evaluation left out."""
        bad = self._bad_clips.clips if self.stream.options.mode == "eval" else {}
        return self.stream.unscored + list(bad)

    def bad_clip_summary(self) -> BadClipSummary:
        """Return which bad clips this rank met since the loader was made, and how often."""
        return self._bad_clips

    def __len__(self) -> int:
        """Return the number of batches that this rank gets from the next iteration.

        That is an epoch's, or its rest where a state was loaded; also while one is under way.
        """
        return self._addresses.count(self.next_step)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to iterate over; the one of a loaded state continues in its middle.

        An iteration that is under way keeps its own: the next one is over this epoch.
        """
        epoch = whole_number("epoch", epoch, least=0)
        if epoch != self.epoch:
            self._epoch, self.next_step = epoch, 0
            if self._iteration is not None:
                self._iteration.is_left = True

    def __iter__(self) -> Iterator[ClipBatch]:
        """Yield the batches from the current place to the end of the epoch.

        Iterating again without `set_epoch` repeats the epoch from its beginning. Raises UsageError
        where more is asked of an iteration after another one has begun, or a state was loaded.
        """
        iteration = self._iteration = Iteration(self.epoch, self.next_step)
        addresses = self._addresses
        addresses.epoch, addresses.begun_at, addresses.made_here = self.epoch, self.next_step, 0
        try:
            for batch in self._batches():
                self._begin_anew(iteration)
                if self._slots is not None:
                    self._slots.free_kept()
                if isinstance(batch, _Failure):
                    raise error_from_text(batch.text)
                iteration.delivered += 1
                self._bad_clips.add(batch.bad_clips)
                if len(batch):  # an evaluation's batch can lose all its clips
                    yield batch
                    self._check_current(iteration)
            self._begin_anew(iteration)
            # an evaluation's last steps can have no clips for this rank; they are over all the same
            steps = self.steps_per_epoch - iteration.begun_at
            iteration.delivered = steps * self.stream.plan.accumulate
        finally:
            iteration.is_running = False

    def _begin_anew(self, iteration: Iteration) -> None:
        """Let the iteration behind this one begin at the first step of its epoch."""
        if not iteration.is_left:
            self.next_step = 0

    def _check_current(self, iteration: Iteration) -> None:
        if iteration is not self._iteration:
            raise UsageError(
                "this iteration over the loader ended when another one began or a state was "
                "loaded; iterate over the loader anew, with one iteration at a time"
            )

    def _batches(self) -> Iterator[ClipBatch | _Failure]:
        """Yield what workers make; the first batch of all is made in this process.

        The fork server, which `clip_loader` started, imports torch meanwhile (seconds).
        """
        if self.num_workers and self._torch_loader is None:
            for address in islice(self._addresses, 1):
                self._addresses.made_here = 1
                yield self._made_here(address)  # and kept by nobody but the caller
        loader = self._loader()
        try:
            yield from made_by_workers(loader)
        except GeneratorExit:  # no error, but nobody wants more
            raise
        except BaseException:  # Ctrl-C too: it may have come between a batch and what torch notes
            self._torch_loader = self._slots = None  # the next iteration has workers of its own
            stop_workers(loader)
            raise

    def _made_here(self, address: BatchAddress) -> ClipBatch | _Failure:
        """Return a batch as workers make them, pinned where torch's DataLoader would do so."""
        batch: Any = _Guarded(self.stream)[address]
        if self._pin_memory and _can_pin() and isinstance(batch, ClipBatch):
            return batch.pin_memory()
        found: ClipBatch | _Failure = batch
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return where the sequence stands, counting whole optimiser steps; under 1 KiB of JSON.

        That is where the iteration under way stands, also when `set_epoch` has chosen another epoch
        for the next one.
        """
        iteration = self._iteration
        if iteration is None:
            return state_of(self.stream, self.epoch, self.next_step).to_json()
        step = iteration.begun_at + iteration.delivered // self.stream.plan.accumulate
        is_over = not iteration.is_running or step == self.steps_per_epoch
        if iteration.is_left and is_over:
            return state_of(self.stream, self.epoch, self.next_step).to_json()
        return state_of(self.stream, iteration.epoch, step).to_json()

    def load_state_dict(self, state: Any) -> None:
        """Continue behind the last step that `state` counts.

        Raises UsageError, with the field's name, when the state is of another sequence.
        """
        saved = StreamState.from_json(state)
        saved.check_continues(state_of(self.stream, 0, 0))
        if saved.step > self.steps_per_epoch:
            raise UsageError(f"cannot resume: step {saved.step} is behind the end of the epoch")
        self._epoch, self.next_step = saved.epoch, saved.step
        self._iteration = None

    def _loader(self) -> DataLoader[Any]:
        if self._torch_loader is None:
            workers = self.num_workers
            self._slots = self._open_slots()
            self._torch_loader = DataLoader(
                _Guarded(self.stream, self._slots),
                batch_size=None,
                sampler=self._addresses,
                num_workers=workers,
                collate_fn=_as_is,
                pin_memory=self._pin_memory,
                multiprocessing_context=fork_server_context() if workers else None,
                persistent_workers=workers > 0,
                prefetch_factor=self._prefetch_batches if workers else None,
                worker_init_fn=begin_worker,
                # torch draws seeds for its workers; the caller's generator is left as it is
                generator=torch.Generator(),
            )
        return self._torch_loader

    def _open_slots(self) -> BatchSlots | None:
        """Return memory for what workers prepare, and for what the caller holds meanwhile."""
        if not self.num_workers:
            return None
        each = self._prefetch_batches + _BATCHES_HELD
        with contextlib.suppress(OSError):
            return BatchSlots(self.stream.most_batch_bytes(), self.num_workers, each)
        return None  # batches are made in fresh memory


def _can_pin() -> bool:
    """Whether torch's DataLoader pins memory on this machine; where it does not, it warns."""
    accelerator = torch.accelerator.current_accelerator()
    return torch.accelerator.is_available() and (accelerator is None or accelerator.type != "mps")


def clip_loader(
    root: RootLike | Sequence[WeightedRootLike],
    *,
    split: str,
    batch_size: int,
    frames: int = 16,
    fps: float | str | Fraction = 15,
    clips_per_video: int = 1,
    seed: int = 0,
    mode: Mode = "train",
    num_workers: int = 0,
    rank: int | None = None,
    world_size: int | None = None,
    accumulate: int = 1,
    layout: Layout = "rgb",
    placement: Placement = "even",
    short: Short = "skip",
    grouping: Grouping = "spread",
    shuffle_block: int = 1,
    pin_memory: bool = False,
    prefetch_batches: int = 2,
    bad_clips: Policy = "raise",
    bad_clip_limit: int = 100,
    cache_dir: str | Path | None = None,
    cache_limit: int | str | None = None,
    storage_options: dict[str, Any] | None = None,
    storage_patience_seconds: float = 600.0,
) -> ClipLoader:
    """Open a split of a dataset, or of several together, for training or evaluation.

    Args:
        root: a directory, `s3://bucket/prefix`, `gs://…` or `https://…`; or a list of roots,
            (root, weight) pairs and DataRoots, see stream.mixture for weights. An evaluation takes
            each clip once. Keys are called `N/key` then, N being the root's place in the list.
        split: name of the split.
        batch_size: clips a rank and micro-batch.
        frames: frames a clip.
        fps: frames a second of a clip, at most the stored rate; frame i is stored frame
            `start + floor(i * stored_fps / fps)`.
        clips_per_video: views of each stored clip an epoch.
        seed: decides order and jitter, together with the epoch.
        mode: "train" is shuffled and jittered, with equal steps on all ranks; "eval" gives every
            view of every clip exactly once, in order, unpadded, and can end unevenly.
        num_workers: worker processes; 0 reads and decodes in this one.
        rank: of this process; by default torch.distributed's, else RANK's, else 0.
        world_size: number of ranks; by default likewise.
        accumulate: micro-batches an optimiser step.
        layout: "rgb" or "yuv420", see ClipBatch.
        placement: of evaluation clips: "even", "middle" or "torchvision", see `evaluation_start`.
        short: clips with fewer frames are left out ("skip") or their last frame repeats ("pad").
        grouping: views of a video are "spread" over the epoch or stay "together".
        shuffle_block: neighbours of the index that stay together; 1 shuffles perfectly.
        pin_memory: as torch's DataLoader.
        prefetch_batches: batches that each worker prepares ahead.
        bad_clips: what a clip does whose content is damaged. "raise" ends the run; "substitute"
            puts another clip in its place, a function of (seed, epoch, position), and names the
            bad one in the batch; an evaluation leaves it out instead.
        bad_clip_limit: different bad clips a rank bears before it raises DatasetError.
        cache_dir: keep clips in this directory of a local disk, shared by all processes and jobs
            that name it; None for no cache.
        cache_limit: what the cache may occupy at any moment, as du counts: bytes, "50GB", "64MiB".
        storage_options: of the object store's client, see prep.storage.Storage; for every root
            that has none of its own (DataRoot).
        storage_patience_seconds: how long reading waits for a store that fails, since the last
            byte that arrived; opening waits a minute at most.

    Raises:
        UsageError: an option that has no meaning or that the split cannot serve.
        DatasetError: the root is no dataset, or its index is damaged.
        StorageError: the root cannot be read.
    """
    rank, world_size = rank_and_size(rank, world_size)
    if whole_number("num_workers", num_workers, least=0):
        fork_server_context()
    options = StreamOptions(
        split=split, mode=mode, frames=frames, fps=parse_rate(fps), seed=seed, short=short,
        clips_per_video=clips_per_video, grouping=grouping, shuffle_block=shuffle_block,
        placement=placement, layout=layout, bad_clips=bad_clips,
    )  # fmt: skip
    check_patience(storage_patience_seconds)
    roots = _storages(root, storage_options or {}, storage_patience_seconds)
    stream = ClipStream(
        roots, options, batch_size=batch_size, rank=rank, world_size=world_size,
        accumulate=accumulate, cache_dir=cache_dir, cache_limit=cache_limit,
    )  # fmt: skip
    for one in roots:
        one.storage.retry = RetryPolicy(storage_patience_seconds)
    return ClipLoader(
        stream,
        num_workers=num_workers,
        prefetch_batches=prefetch_batches,
        pin_memory=pin_memory,
        bad_clip_limit=bad_clip_limit,
    )


def _storages(
    root: RootLike | Sequence[WeightedRootLike], options: dict[str, Any], patience_seconds: float
) -> list[WeightedStorage]:
    # an endpoint that is mistyped should not take ten minutes to be found
    opening = RetryPolicy(min(_OPENING_PATIENCE_SECONDS, patience_seconds))
    return [
        WeightedStorage(Storage(one.root, one.options_or(options), opening), one.weight)
        for one in data_roots(root)
    ]
