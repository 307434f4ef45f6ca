"""Shared memory that a loader's batches are made in, again and again.

A batch in fresh shared memory costs the worker a page fault for every 4 KiB, nearly half of what
decoding costs. Here each worker has a few slots in one anonymous memory file: it fills a free one
and lends it; the loader's process reads the same pages, and when nothing there refers to the
batch any more, the slot is free again. With no free slot a batch is made in the worker's own memory
and sent by value, so nobody ever waits for one, and nothing is in /dev/shm.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import select
import sys
import threading
import uuid
from dataclasses import dataclass, fields
from multiprocessing.reduction import DupFd
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary, finalize

import numpy as np
import torch
from torch.utils.data import get_worker_info

from stream.batch import ClipBatch
from stream.batch_memory import private_room

if TYPE_CHECKING:
    from collections.abc import Callable

_FREE, _LENT, _KEPT = range(3)

_here: WeakValueDictionary[str, BatchSlots] = WeakValueDictionary()


class BatchSlots:
    """Slots of one loader: made in its process, sent to its workers while they start.

    A worker calls `room` and `lend`; what it sends arrives as an ordinary ClipBatch.
    """

    def __init__(self, slot_bytes: int, workers: int, per_worker: int) -> None:
        """Lay out `workers * per_worker` slots; they take memory when they are first written.

        Raises OSError where the system has no anonymous memory files or no room for these.
        """
        self.name = uuid.uuid4().hex
        self.per_worker = per_worker
        self.count = workers * per_worker
        self.slot_bytes = _whole_pages(slot_bytes)
        self._open(_memory_file(_whole_pages(self.count) + self.count * self.slot_bytes))
        self._claimed: set[int] = set()
        self._kept: dict[int, set[int]] = {}
        self._kept_for_ever: set[int] = set()
        finalize(self, _close_all, self._kept)
        _here[self.name] = self

    def _open(self, descriptor: int) -> None:
        self._descriptor = descriptor
        finalize(self, os.close, descriptor)
        self._map = mmap.mmap(descriptor, 0)
        self._states = np.ndarray((self.count,), np.uint8, self._map)
        self._first = _whole_pages(self.count)

    def __getstate__(self) -> dict[str, Any]:
        """Let a process that is being started open the same memory."""
        kept = {name: getattr(self, name) for name in ("name", "per_worker", "count", "slot_bytes")}
        return {**kept, "_file": DupFd(self._descriptor)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        file = state.pop("_file")
        self.__dict__.update(state)
        self._open(file.detach())

    def room(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return uint8 of any content in a free slot of this worker; else of its own memory."""
        worker = get_worker_info()
        if worker is None or math.prod(shape) > self.slot_bytes:
            return private_room(shape)
        mine = range(worker.id * self.per_worker, (worker.id + 1) * self.per_worker)
        free = next((slot for slot in mine if self._states[slot] == _FREE), None)
        return private_room(shape) if free is None else torch.from_numpy(self._array(free, shape))

    def lend(self, batch: ClipBatch) -> LentBatch:
        """Return what to send of a batch: its slot, or its video if that stands in none."""
        rest = {one.name: getattr(batch, one.name) for one in fields(batch)}
        for name, value in rest.items():
            if isinstance(value, torch.Tensor):  # torch would send each as a file of its own
                rest[name] = value.numpy()
        offset = batch.video.data_ptr() - self._first_address
        slot, inside = divmod(offset, self.slot_bytes)
        if inside or not 0 <= slot < self.count or not batch.video.is_contiguous():
            return LentBatch(self.name, None, rest)
        self._states[slot] = _LENT
        rest["video"] = tuple(batch.video.shape)
        return LentBatch(self.name, slot, rest)

    def holds(self, video: torch.Tensor) -> bool:
        """Whether a tensor of this process stands in a slot."""
        return 0 <= video.data_ptr() - self._first_address < self.count * self.slot_bytes

    @property
    def _first_address(self) -> int:
        return int(self._states.ctypes.data) + self._first

    @property
    def in_use(self) -> bool:
        """Whether anything in this process refers to a slot."""
        return bool(self._claimed)

    def claim(self, slot: int, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the content of a lent slot, uint8, which is free again when no view is left."""
        array = self._array(slot, shape)
        self._claimed.add(slot)
        finalize(array, self._release, slot).atexit = False
        return torch.from_numpy(array)

    def keep_claimed(self, end: int | None) -> None:
        """Leave alone the slots that are in use now: a process about to be forked may read them.

        `end` is a pipe that reads as ended when that process is no more; None: for ever, as where
        there are too many open files.
        """
        slots = set(self._claimed)
        for slot in slots:
            self._states[slot] = _KEPT
        try:
            own = None if end is None else os.dup(end)
        except OSError:
            own = None
        if own is None:
            self._kept_for_ever |= slots
        else:
            self._kept[own] = slots

    def free_kept(self) -> None:
        """Use the slots again that only processes knew that have ended since."""
        for end in [end for end in self._kept if _has_ended(end)]:
            os.close(end)
            known = self._kept_for_ever.union(
                *(self._kept[other] for other in self._kept if other != end)
            )
            for slot in self._kept.pop(end) - known:
                self._states[slot] = _LENT if slot in self._claimed else _FREE

    def _release(self, slot: int) -> None:
        self._claimed.discard(slot)
        if self._states[slot] == _LENT:
            self._states[slot] = _FREE

    def _array(self, slot: int, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return np.ndarray(shape, np.uint8, self._map, self._first + slot * self.slot_bytes)


@dataclass(frozen=True)
class LentBatch:
    """A batch on its way from a worker; it arrives as a ClipBatch.

    `values` are its fields, with arrays in place of tensors, and of a video in a slot its shape.
    """

    slots: str
    slot: int | None
    values: dict[str, Any]

    def __reduce__(self) -> tuple[Callable[..., ClipBatch | None], tuple[Any, ...]]:
        """Arrive as what `_arrived` makes of it."""
        return _arrived, (self.slots, self.slot, self.values)


def _arrived(name: str, slot: int | None, values: dict[str, Any]) -> Any:
    """Return the batch; None where the loader is gone, of which a queue is being emptied."""
    slots = _here.get(name)
    if slots is None:
        return None
    for field, value in values.items():
        if isinstance(value, np.ndarray):
            values[field] = torch.from_numpy(value)
    if slot is not None:
        values["video"] = slots.claim(slot, values["video"])
    return ClipBatch(**values)


def stands_in_slot(video: torch.Tensor) -> bool:
    """Whether a tensor is in memory of a loader of this process, which is used again."""
    return video.is_cpu and any(slots.holds(video) for slots in list(_here.values()))


class _Fork:
    """What is known of a fork between its beginning and its end: a pipe that the child holds."""

    def __init__(self) -> None:
        self.pipe: tuple[int, int] | None = None
        self.lock = threading.Lock()  # threads fork one after the other

    def before(self) -> None:
        self.lock.acquire()
        self.pipe = None
        used = [slots for slots in list(_here.values()) if slots.in_use]
        if used:
            with contextlib.suppress(OSError):  # too many open files
                self.pipe = os.pipe()
        for slots in used:
            slots.keep_claimed(self.pipe and self.pipe[0])

    def in_parent(self) -> None:
        if self.pipe is not None:
            os.close(self.pipe[0])
            os.close(self.pipe[1])
        self.lock.release()

    def in_child(self) -> None:
        if self.pipe is not None:
            os.close(self.pipe[0])  # the other end closes with this process, or when it executes
        self.lock.release()


_fork = _Fork()
os.register_at_fork(
    before=_fork.before, after_in_parent=_fork.in_parent, after_in_child=_fork.in_child
)


def _has_ended(end: int) -> bool:
    poll = select.poll()
    poll.register(end, select.POLLIN)
    return bool(poll.poll(0))


def _close_all(kept: dict[int, set[int]]) -> None:
    for end in kept:
        os.close(end)


def _memory_file(size: int) -> int:
    if not hasattr(os, "memfd_create") or size > sys.maxsize:
        raise OSError("no anonymous memory files, or not of this size")
    descriptor = os.memfd_create("kprep-batches")
    try:
        os.ftruncate(descriptor, size)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _whole_pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
