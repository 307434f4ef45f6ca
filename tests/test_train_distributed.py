from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from prep.errors import KprepError, UsageError
from train import distributed
from train.agreement import Status, StatusExchange, raise_together
from train.distributed import (
    World,
    _place,
    broadcast_text,
    choose_device,
    gather_to_first,
    joined_world,
    mean_in_rank_order,
)
from train.launch import launch
from train.lost_ranks import naming_lost_ranks
from train.random_state import kept_random_state, restore_random_states
from train.signals import InterruptedBySignalError

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


def _with_gpus(monkeypatch: pytest.MonkeyPatch, count: int, current: int = 0) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)


@pytest.mark.parametrize(("gpus", "index"), [(1, 0), (8, 5)])
def test_a_slurm_task_that_sees_one_gpu_takes_it(
    monkeypatch: pytest.MonkeyPatch, gpus: int, index: int
) -> None:
    _with_gpus(monkeypatch, gpus)
    step = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "13", "SLURM_LOCALID": "5",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # fmt: skip
    monkeypatch.setattr(os, "environ", {**os.environ, **step})
    rank, size, local_rank = _place(adopted=False)
    assert (rank, size) == (13, 16)
    assert choose_device(None, local_rank) == torch.device("cuda", index)


@pytest.mark.parametrize(("local_rank", "index"), [(None, 3), ("2", 2)])
def test_a_group_of_the_callers_keeps_its_gpu(
    monkeypatch: pytest.MonkeyPatch, local_rank: str | None, index: int
) -> None:
    _with_gpus(monkeypatch, 8, current=3)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 11)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 16)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert choose_device(None, _place(adopted=True)[2]) == torch.device("cuda", index)


def test_losses_of_one_process_arrive_in_order_and_two_steps_late() -> None:
    exchange, arrived = StatusExchange(CPU), []
    for step in range(1, 5):
        exchange.post(Status())
        arrived.append(exchange.read().losses)
        exchange.add_loss(step, torch.tensor(float(step)))
    assert arrived == [[], [], [(1, [1.0])], [(2, [2.0])]]
    exchange.post(Status(), drain=True)
    assert exchange.read().losses == [(3, [3.0]), (4, [4.0])]


def _exchange(folder: str) -> None:
    with joined_world("cpu") as world:
        rows = torch.full((world.rank, 2 + world.rank), world.rank, dtype=torch.int64)
        parts = gather_to_first(world, rows)
        empty = gather_to_first(world, torch.empty(0, 3))
        text = broadcast_text(world, "première" if world.is_first else "other")
        text += broadcast_text(world, "" if world.is_first else "other")
        exchange, losses = StatusExchange(world), []
        for step in range(3):
            exchange.post(Status(signal=10 * (world.rank == 1 and step == 2)))
            agreed = exchange.read()
            losses += agreed.losses
            assert agreed.signal == 10 * (step == 2)
            exchange.add_loss(step, torch.tensor(step + world.rank / 2))
        exchange.post(Status(failed=world.rank == 2), drain=True)
        agreed = exchange.read()
        losses += agreed.losses
        assert agreed.failed
        assert not agreed.checkpoint
        shapes = [list(part.shape) for part in parts]
        found = (shapes, [part.shape[0] for part in empty], text, losses)
        Path(folder, str(world.rank)).write_text(repr(found))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_ranks_exchange_tensors_text_and_losses(tmp_path: Path) -> None:
    launch(3, _exchange, str(tmp_path))
    losses = [(step, [step + 0.0, step + 0.5, step + 1.0]) for step in range(3)]
    # ranks gave 0, 1 and 2 rows; columns are padded to the widest
    first = repr(([[0, 4], [1, 4], [2, 4]], [0, 0, 0], "première", losses))
    other = repr(([], [], "première", losses))
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == [first, other, other]


def test_gradients_are_summed_in_rank_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 1e8 - 1e8 + 1 is 1, and 1e8 + 1 - 1e8 is 0."""
    ranks = torch.tensor([[1e8, 1e8], [-1e8, 1], [1, -1e8]])
    gathered: torch.futures.Future[list[torch.Tensor]] = torch.futures.Future()

    def all_gather(parts: list[torch.Tensor], *_: object, **__: object) -> SimpleNamespace:
        for part, rank in zip(parts, ranks, strict=True):
            part.copy_(rank)
        return SimpleNamespace(get_future=lambda: gathered)

    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
    monkeypatch.setattr("torch.distributed.all_gather", all_gather)
    mean = mean_in_rank_order(ranks[1])
    gathered.set_result([])
    assert torch.equal(mean.wait(), torch.tensor([1 / 3, 0]))
    gathered = torch.futures.Future()
    mean = mean_in_rank_order(ranks[1])
    gathered.set_exception(RuntimeError("a rank is gone"))
    with pytest.raises(RuntimeError, match="a rank is gone"):
        mean.wait()


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


def _finish_slowly(folder: str) -> None:
    """All ranks stop together, and the first has something to send."""
    with joined_world("cpu") as world:
        try:
            raise_together(world, UsageError("one of us") if world.is_first else None)
        finally:
            if world.is_first:
                time.sleep(3)
                Path(folder, "sent").touch()


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_ranks_that_stop_together_have_time_to_finish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_ECHO_SECONDS", "_TERMINATE_SECONDS"):
        monkeypatch.setattr(f"train.launch.{name}", 0.1)
    with pytest.raises(UsageError, match="^one of us$"):
        launch(2, _finish_slowly, str(tmp_path))
    assert (tmp_path / "sent").exists()


def _wait_for_rank_1(folder: str, how: str) -> None:
    """Ranks bear three seconds of silence, and thirty more where a store may be waited for."""
    rank = int(os.environ["RANK"])
    Path(folder, str(rank)).touch()
    while len(list(Path(folder).iterdir())) < 3:  # the start of a process takes longer
        time.sleep(0.01)
    distributed._TIMEOUT = timedelta(seconds=3)
    with joined_world("cpu", 30 if how == "store" else 0) as world:
        if rank == 1 and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1:
            time.sleep(5 if how == "store" else 600)
        assert broadcast_text(world, str(rank), source=1) == "1"


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_rank_may_wait_for_its_store_longer_than_for_another_rank(tmp_path: Path) -> None:
    launch(3, _wait_for_rank_1, str(tmp_path), "store")


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "hangs",
            r"^rank\(s\) 1 of 3 do not answer: gone, or hanging for 0.05 minutes \(.*; go on",
        ),
        ("killed", "process 1 of 3 was killed by signal 9"),
    ],
)
def test_a_rank_that_hangs_is_named(tmp_path: Path, how: str, message: str) -> None:
    with pytest.raises(KprepError, match=message):
        launch(3, _wait_for_rank_1, str(tmp_path), how)


def test_only_errors_of_gloo_are_about_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def append(*_: str) -> None:
        raise RuntimeError("its machine is gone")

    store = SimpleNamespace(append=append)
    monkeypatch.setattr("train.lost_ranks._get_default_store", lambda: store)
    minute = timedelta(minutes=1)
    with pytest.raises(RuntimeError, match="^worker gone$"), naming_lost_ranks(0, 2, minute):
        raise RuntimeError("worker gone")
    lost = "[/x/gloo/transport/tcp/pair.cc:5] Connection closed by peer [::1]:3"
    with (
        pytest.raises(KprepError, match="^the other ranks, and their store, do not answer: gone"),
        naming_lost_ranks(0, 2, minute),
    ):
        raise RuntimeError(lost)


def test_every_rank_gets_its_own_generator_back() -> None:
    states, wanted = [], []
    with kept_random_state():
        for seed in range(3):
            torch.manual_seed(seed)
            states.append(torch.get_rng_state())
            wanted.append(torch.rand(3))
        for rank in range(3):
            world = World(rank, 3, torch.device("cpu"), None)
            restore_random_states({"cpu": torch.stack(states)}, world)
            assert torch.equal(torch.rand(3), wanted[rank])


ERRORS = {
    "usage": UsageError("a sentence"),
    "signal": InterruptedBySignalError(signal.SIGTERM, "stopped"),
    "crash": ValueError("inside"),
}


def _raise_on_rank_1(folder: str) -> None:
    with joined_world("cpu") as world:
        found = []
        for error in (None, *ERRORS.values()):
            try:
                raise_together(world, error if world.rank == 1 else None)
            except (KprepError, ValueError) as caught:
                code = getattr(caught, "exit_code", None)
                found.append((type(caught).__name__, code, str(caught).splitlines()[-1]))
        Path(folder, str(world.rank)).write_text(repr(found))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_what_one_rank_raises_is_raised_on_all(tmp_path: Path) -> None:
    launch(3, _raise_on_rank_1, str(tmp_path))
    ours = [("UsageError", 2, "a sentence"), ("InterruptedBySignalError", 75, "stopped")]
    assert (tmp_path / "1").read_text() == repr([*ours, ("ValueError", None, "inside")])
    for rank in (0, 2):
        crash = ("KprepError", 1, "ValueError: inside")
        assert (tmp_path / str(rank)).read_text() == repr([*ours, crash])
