"""Ranks: who takes part in a run, on which device, and what they tell each other.

Tensors that ranks exchange outside of DDP travel over a gloo group of their own, on the CPU, so
that they never wait in a device's queue.
"""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist

from prep.errors import UsageError
from train.attempts import attempt_store
from train.lost_ranks import naming_lost_ranks
from train.slurm import adopt_step, step_store

if TYPE_CHECKING:
    from collections.abc import Iterator

# A rank may wait this long for another that evaluates a longer slice or writes a checkpoint, and
# besides for as long as that one waits for its store.
_TIMEOUT = timedelta(minutes=30)
_LONGEST_PATIENCE_SECONDS = 1e8  # three years; gloo and NCCL count nanoseconds


@dataclass(frozen=True)
class World:
    """The processes of a run as one of them sees it."""

    rank: int
    """This process, in `[0, size)`."""
    size: int
    """Processes in the run."""
    device: torch.device
    """Where this process computes."""
    control: dist.ProcessGroup | None
    """The gloo group for everything that is not a gradient; None in a run of one process."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and log lines."""
        return self.rank == 0


@contextmanager
def joined_world(device: str | None = None, patience_seconds: float = 0.0) -> Iterator[World]:
    """Join the run that the environment describes, and leave it at the end.

    Args:
        device: "cpu" or "cuda"; None takes CUDA where there is a GPU.
        patience_seconds: how long a rank may wait for its store before it has to answer.

    Reads torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), else those
    of a SLURM step started by srun, else runs alone. A process group that the caller has already
    made is used as it is and left alone. Raises UsageError when the variables or the device cannot
    serve.

    An error that this rank alone raises leaves the block at once, and the process ends without
    waiting for the others as soon as its Python code is done: they, and NCCL's kernels, may wait
    for this rank. Whoever started the ranks ends the rest. Raises KprepError, with the numbers of
    the ranks that do not answer, where this rank waits for one that is gone or hangs.
    """
    timeout = _TIMEOUT + timedelta(seconds=min(patience_seconds, _LONGEST_PATIENCE_SECONDS))
    adopted = dist.is_available() and dist.is_initialized()
    rank, size, local_rank = _place(adopted=adopted)
    chosen = choose_device(device, local_rank)
    if size == 1:
        yield World(rank, size, chosen, None)
        return
    if not adopted:
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo",
            rank=rank,
            world_size=size,
            store=attempt_store(rank, size, _TIMEOUT) or step_store(rank, _TIMEOUT),
            timeout=timeout,
            device_id=chosen if chosen.type == "cuda" else None,
        )
    try:
        control = dist.new_group(backend="gloo", timeout=timeout)
        with naming_lost_ranks(rank, size, timeout):
            yield World(rank, size, chosen, cast("dist.ProcessGroup", control))
    except BaseException as error:
        if not adopted and is_raised_together(error):
            dist.destroy_process_group()
        elif not adopted:
            atexit.register(_end_now, _exit_code(error))
        raise
    if not adopted:
        dist.destroy_process_group()


def mark_raised_together(error: Exception) -> None:
    """Note that every rank raises an error here: none is left waiting for another."""
    vars(error)["is_raised_together"] = True


def is_raised_together(error: BaseException) -> bool:
    """Return whether every rank raises this error, as far as that was noted."""
    return bool(vars(error).get("is_raised_together"))


def _exit_code(error: BaseException) -> int:
    """Return the code that a process ends with which this error has ended."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    return int(getattr(error, "exit_code", 1))


def _end_now(code: int) -> None:
    """End this process before the destructors run, which can wait for the other ranks."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def choose_device(device: str | None, local_rank: int) -> torch.device:
    """Return the device of this process; one process takes one GPU."""
    if device not in (None, "cpu", "cuda"):
        raise UsageError(f"--device {device!r} must be cpu or cuda")
    if device == "cpu" or (device is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UsageError(
            f"process {local_rank} of this machine has no GPU: there are {count}; "
            "start fewer processes, or use --device cpu"
        )
    chosen = torch.device("cuda", local_rank)
    torch.cuda.set_device(chosen)
    return chosen


def _place(*, adopted: bool) -> tuple[int, int, int]:
    """Return rank, world size and rank on this machine."""
    if adopted:
        return dist.get_rank(), dist.get_world_size(), _adopted_local_rank()
    if "RANK" not in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:
        adopt_step()
    values = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    if values[0] is None and values[1] is None:
        return 0, 1, 0
    try:
        rank, size, local_rank = int(values[0] or ""), int(values[1] or ""), int(values[2] or "0")
    except ValueError:
        rank, size, local_rank = -1, 0, 0
    if not 0 <= rank < size:
        raise UsageError(
            f"RANK ({values[0]}) and WORLD_SIZE ({values[1]}) in the environment must be integers "
            "with 0 <= RANK < WORLD_SIZE; start with torchrun, srun or --nproc, or unset both"
        )
    return rank, size, local_rank


def _adopted_local_rank() -> int:
    """Return the rank on this machine in a group of the caller's, who may have chosen the GPU."""
    if "LOCAL_RANK" in os.environ:
        return int(os.environ["LOCAL_RANK"])
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def gather_to_first(world: World, tensor: torch.Tensor) -> list[torch.Tensor]:
    """Collect one tensor of each rank on rank 0, in the order of ranks; other ranks get [].

    Args:
        world: who takes part.
        tensor: on the CPU, of one dtype and one number of axes on all ranks; the length of the
            first axis can differ (also 0), the lengths of the others are padded with zeros to the
            longest.
    """
    if world.size == 1:
        return [tensor]
    shapes = [torch.zeros(tensor.ndim, dtype=torch.int64) for _ in range(world.size)]
    dist.all_gather(shapes, torch.tensor(tensor.shape), group=world.control)
    largest = torch.stack(shapes).amax(dim=0).tolist()
    padded = torch.zeros(largest, dtype=tensor.dtype)
    padded[tuple(slice(0, length) for length in tensor.shape)] = tensor
    if padded.numel() == 0:
        return [tensor] * world.size if world.is_first else []
    parts = [torch.empty_like(padded) for _ in range(world.size)] if world.is_first else None
    dist.gather(padded, parts, dst=0, group=world.control)
    return [part[: int(shape[0])] for part, shape in zip(parts or [], shapes, strict=False)]


def broadcast_text(world: World, text: str, source: int = 0) -> str:
    """Return the text of rank `source` on every rank."""
    if world.size == 1:
        return text
    data = torch.tensor(list(text.encode()), dtype=torch.uint8)
    length = torch.tensor([len(data)])
    dist.broadcast(length, src=source, group=world.control)
    if not int(length):
        return ""
    data = data if world.rank == source else torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(data, src=source, group=world.control)
    return data.numpy().tobytes().decode()


def all_texts(world: World, text: str) -> list[str]:
    """Return the texts of all ranks, in the order of ranks, on every rank."""
    if world.size == 1:
        return [text]
    data = torch.tensor(list(text.encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world.size)]
    dist.all_gather(lengths, torch.tensor([len(data)]), group=world.control)
    padded = torch.zeros(max(1, *map(int, lengths)), dtype=torch.uint8)
    padded[: len(data)] = data
    parts = [torch.empty_like(padded) for _ in range(world.size)]
    dist.all_gather(parts, padded, group=world.control)
    return [
        part[: int(length)].numpy().tobytes().decode()
        for part, length in zip(parts, lengths, strict=True)
    ]


def broadcast_buffers(world: World, buffers: Iterator[torch.Tensor]) -> None:
    """Overwrite the buffers of every rank (BatchNorm's statistics) with rank 0's."""
    if world.size == 1:
        return
    for buffer in buffers:
        dist.broadcast(buffer, src=0)


def mean_in_rank_order(own: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
    """Begin to average a message of gradients over the ranks, each element summed from rank 0 on.

    gloo sums three or more numbers in an order that depends on their place in the message, and DDP
    gives them other places after a process's first backward: a resumed run would differ in the last
    bits from one that was not interrupted.
    """
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    work = dist.all_gather(parts, own, async_op=True)

    def mean(gathered: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
        gathered.value()  # raises where a rank is gone
        total = parts[0]
        for part in parts[1:]:
            total += part
        return total.div_(len(parts))

    return work.get_future().then(mean)
