from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from prep.errors import KprepError, UsageError
from train.distributed import (
    LossExchange,
    World,
    broadcast_text,
    choose_device,
    gather_to_first,
    joined_world,
)
from train.launch import launch

CPU = World(0, 1, torch.device("cpu"), None)
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS", "MASTER_ADDR")


@pytest.fixture(autouse=True)
def _no_run_around_us(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


def test_without_variables_a_process_runs_alone() -> None:
    with joined_world("cpu") as world:
        assert (world.rank, world.size, world.control) == (0, 1, None)


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("0", "x"), ("", "1"), ("-1", "2")])
def test_variables_without_a_meaning_are_refused(
    monkeypatch: pytest.MonkeyPatch, rank: str, size: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UsageError, match="RANK .* WORLD_SIZE"), joined_world("cpu"):
        pass


def test_a_slurm_step_needs_a_meeting_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(UsageError, match="MASTER_ADDR"), joined_world("cpu"):
        pass


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu", 5) == torch.device("cpu")
    with pytest.raises(UsageError, match="'tpu' must be cpu or cuda"):
        choose_device("tpu", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="process 1 .* has no GPU: there are 1"):
        choose_device("cuda", 1)


def test_losses_of_one_process_arrive_in_order() -> None:
    exchange = LossExchange(CPU)
    arrived = [exchange.post(torch.tensor(float(step))) for step in range(4)]
    assert arrived == [[], [], [[0.0]], [[1.0]]]
    assert exchange.flush() == [[2.0], [3.0]]
    assert exchange.flush() == []


def _exchange(folder: str) -> None:
    with joined_world("cpu") as world:
        rows = torch.full((world.rank, 2 + world.rank), world.rank, dtype=torch.int64)
        parts = gather_to_first(world, rows)
        empty = gather_to_first(world, torch.empty(0, 3))
        text = broadcast_text(world, "première" if world.is_first else "other")
        text += broadcast_text(world, "" if world.is_first else "other")
        exchange = LossExchange(world)
        losses = []
        for step in range(3):
            losses += exchange.post(torch.tensor(step + world.rank / 2))
        losses += exchange.flush()
        shapes = [list(part.shape) for part in parts]
        found = (shapes, [part.shape[0] for part in empty], text, losses)
        Path(folder, str(world.rank)).write_text(repr(found))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_ranks_exchange_tensors_text_and_losses(tmp_path: Path) -> None:
    launch(3, _exchange, str(tmp_path))
    losses = [[step + 0.0, step + 0.5, step + 1.0] for step in range(3)]
    # ranks gave 0, 1 and 2 rows; columns are padded to the widest
    first = repr(([[0, 4], [1, 4], [2, 4]], [0, 0, 0], "première", losses))
    other = repr(([], [], "première", losses))
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == [first, other, other]


def _fail(folder: str, how: str) -> None:
    """Rank 1 fails; the others would wait for ever."""
    rank = int(os.environ["RANK"])
    Path(folder, str(rank)).write_text(str(os.getpid()))
    if rank == 1:
        while len(list(Path(folder).iterdir())) < 3:
            time.sleep(0.01)
        if how == "usage":
            raise UsageError("rank 1 cannot do that")
        if how == "crash":
            raise ValueError("something inside")
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3600)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("usage", UsageError, "^rank 1 cannot do that$"),
        ("crash", KprepError, "process 1 of 3 failed:(.|\n)*ValueError: something inside"),
        ("kill", KprepError, "process 1 of 3 was killed by signal 9"),
    ],
)
def test_one_rank_that_fails_ends_them_all(
    tmp_path: Path, how: str, kind: type[KprepError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        launch(3, _fail, str(tmp_path), how)
    for path in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)
