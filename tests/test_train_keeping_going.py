"""Runs that are cut off and continue by themselves, also on another number of ranks."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prep.errors import DatasetError, KprepError, UsageError
from train import attempts, load_recipe, run
from train.attempts import agree_on_attempt, is_restarted, note_launch
from train.checkpoint import (
    Checkpoint,
    checkpoint_path,
    checkpoints_in,
    load_checkpoint,
    save_checkpoint,
)
from train.distributed import World
from train.launch import launch
from train.regroup import keep_global_batch, share_step
from train.signals import InterruptedBySignalError, SignalWatch, ending_at_once
from train.trainer import Trainer
from train.transforms import train_clips, video_on

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@given(st.integers(1, 4096), st.integers(1, 64), st.integers(1, 64), st.booleans())
def test_ranks_share_a_step_evenly_or_not_at_all(
    global_batch: int, ranks: int, most: int, is_paired: bool
) -> None:
    found = share_step(global_batch, ranks, most, is_paired=is_paired)
    sizes = [
        size
        for size in range(1, most + 1)
        if global_batch % (ranks * size) == 0 and not (is_paired and size % 2)
    ]
    if found is None:
        assert not sizes
    else:
        size, accumulate = found
        assert size == max(sizes)
        assert ranks * size * accumulate == global_batch


def _saved(path: Path, ranks: int, given: Sequence[int] = ()) -> Path:
    saved = Checkpoint(
        epoch=0, step=3, model={}, optimizer={}, recipe="", class_names=["a"],
        loader={"global_batch": 12}, rng={"cpu": torch.zeros(ranks, 8, dtype=torch.uint8)},
        given=list(given),
    )  # fmt: skip
    save_checkpoint(path, saved)
    return path


def test_a_step_keeps_its_clips_on_another_number_of_ranks(tmp_path: Path) -> None:
    path = _saved(tmp_path / "x.pt", ranks=2)
    recipe = load_recipe("tiny", ["data.batch_size=6"])
    batches = {}
    for size in (1, 2, 3, 4, 6):
        data = keep_global_batch(recipe, path, World(0, size, CPU, None)).data
        batches[size] = (data.batch_size, data.accumulate)
    assert batches == {1: (6, 2), 2: (6, 1), 3: (4, 1), 4: (3, 1), 6: (2, 1)}
    with pytest.raises(UsageError, match="12 clips a step, which 5 ranks cannot share evenly"):
        keep_global_batch(recipe, path, World(0, 5, CPU, None))
    mixed = replace(recipe, augment=replace(recipe.augment, mixup=0.2))
    with pytest.raises(UsageError, match="which 4 ranks cannot share in pairs"):
        keep_global_batch(mixed, path, World(0, 4, CPU, None))


def test_on_the_same_ranks_a_changed_step_is_the_users(tmp_path: Path) -> None:
    """The stream refuses it by the field's name: see test_train_integration."""
    recipe = load_recipe("tiny", ["data.batch_size=8"])
    for batches in ((), (6, 1)):  # a checkpoint that lacks them, and one with others
        path = _saved(tmp_path / "x.pt", ranks=2, given=batches)
        assert keep_global_batch(recipe, path, World(0, 2, CPU, None)) == recipe


def test_the_same_command_continues_again_on_the_same_fewer_ranks(tmp_path: Path) -> None:
    """A run of 2 ranks came back on 1, which took twice the batches, and comes back again."""
    path = _saved(tmp_path / "x.pt", ranks=1, given=(6, 1))
    recipe = load_recipe("tiny", ["data.batch_size=6"])
    data = keep_global_batch(recipe, path, World(0, 1, CPU, None)).data
    assert (data.batch_size, data.accumulate) == (6, 2)
    changed = load_recipe("tiny", ["data.batch_size=4"])
    assert keep_global_batch(changed, path, World(0, 1, CPU, None)) == changed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_training_ends_the_run_at_once(number: int) -> None:
    before = signal.getsignal(number)

    def read_patiently() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(600)
        except Exception:  # noqa: BLE001 - such as a library's retry
            time.sleep(600)

    with (
        pytest.raises(InterruptedBySignalError, match="before training began, or after") as caught,
        ending_at_once(),
    ):
        read_patiently()
    assert caught.value.exit_code == 75
    assert signal.getsignal(number) is before


def _lose_a_signal() -> None:
    """As pyarrow does while it tries to import pandas."""
    with suppress(BaseException):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_whose_exception_got_lost_ends_the_steps() -> None:
    with ending_at_once():
        _lose_a_signal()
        with SignalWatch() as watch:
            assert watch.received == signal.SIGTERM
    with ending_at_once(), SignalWatch() as watch:  # the next run of the process knows nothing
        assert watch.received == 0


def test_a_signal_whose_exception_got_lost_ends_what_has_no_steps() -> None:
    stopped = pytest.raises(InterruptedBySignalError, match="stopped by SIGTERM")
    with stopped as caught, ending_at_once(), ending_at_once():  # the command's, and the run's
        _lose_a_signal()
    assert caught.value.exit_code == 75
    with stopped as caught, ending_at_once():
        _lose_a_signal()
        raise DatasetError("an index that pyarrow could not read")
    assert isinstance(caught.value.__cause__, DatasetError)
    with pytest.raises(DatasetError), ending_at_once():
        raise DatasetError("nothing to do with a signal")


def test_every_attempt_has_a_name_of_its_own() -> None:
    """Also after one in which only some ranks came, and one of another number of ranks."""
    from concurrent.futures import ThreadPoolExecutor

    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    minute = timedelta(minutes=1)

    def join(rank: int, size: int) -> str:
        client = torch.distributed.TCPStore(
            "127.0.0.1", server.port, is_master=False, wait_for_workers=False, timeout=minute
        )
        return agree_on_attempt(client, rank, size, minute)

    names = []
    with ThreadPoolExecutor(8) as pool:
        for size in (3, 3, 2, 4):
            server.set("kprep/rank/1", "left by a process that is gone")
            found = set(pool.map(join, range(size), [size] * size))
            assert len(found) == 1
            names.append(found.pop())
    assert len(set(names)) == 4
    with pytest.raises(KprepError, match=r"ranks \[1\] of 2 did not start"):
        agree_on_attempt(server, 0, 2, timedelta(seconds=0))


def _torchrun_variables(store: torch.distributed.TCPStore) -> dict[str, str]:
    return {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "none",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}  # fmt: skip


def test_only_the_launch_that_began_a_run_goes_on_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {name: value for name, value in os.environ.items() if "SLURM" not in name}
    stores = [
        torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for _ in range(2)
    ]
    job = {"SLURM_JOB_ID": "77"}
    launches: dict[str, dict[str, str]] = {
        "by hand": {},
        "job": job,
        "requeued job": {**job, "SLURM_RESTART_COUNT": "1"},
        "other job": {"SLURM_JOB_ID": "78", "SLURM_RESTART_COUNT": "1"},
        "torchrun": _torchrun_variables(stores[0]),
        "other torchrun": _torchrun_variables(stores[1]),
        "torchrun in a job": {**_torchrun_variables(stores[0]), **job},
    }
    restarts = set()
    for began, place in launches.items():
        for later, other in launches.items():
            monkeypatch.setattr(os, "environ", {**kept, **place})
            note_launch(tmp_path)
            monkeypatch.setattr(os, "environ", {**kept, **other})
            assert not is_restarted(tmp_path)  # by the process that began
            monkeypatch.setattr(attempts, "_begun", set())
            if is_restarted(tmp_path):
                restarts.add((began, later))
    assert restarts == {
        *((began, "requeued job") for began in ("job", "requeued job", "torchrun in a job")),
        ("other job", "other job"),
        *((a, b) for a in ("torchrun", "torchrun in a job") for b in ("torchrun", "torchrun in a job")),
        ("other torchrun", "other torchrun"),
    }  # fmt: skip


@pytest.mark.parametrize("resume", [None, "auto", "older", "other"])
def test_a_run_that_is_started_again_takes_its_newest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: str | None
) -> None:
    older, newest = (
        _saved(checkpoint_path(tmp_path / "run" / "checkpoints", epoch), ranks=1)
        for epoch in (1, 2)
    )
    other = _saved(tmp_path / "other.pt", ranks=1)
    given = {"older": str(older), "other": str(other)}.get(resume or "", resume)
    world, output = World(0, 1, CPU, None), tmp_path / "run"
    monkeypatch.setattr(os, "environ", {**os.environ, "SLURM_JOB_ID": "77"})
    note_launch(output)
    monkeypatch.setattr(attempts, "_begun", set())  # by another process
    if resume in ("older", "auto"):
        first = run._checkpoint_to_load(given, output, world, overwrites=True)
        assert first == (older if resume == "older" else newest)
    else:
        with pytest.raises(UsageError, match="has the checkpoints of an earlier run"):
            run._checkpoint_to_load(given, output, world, overwrites=True)
    os.environ["SLURM_RESTART_COUNT"] = "1"
    assert run._checkpoint_to_load(given, output, world, overwrites=True) == newest
    if resume == "older":  # an evaluation takes what it is told
        assert run._checkpoint_to_load(given, output, world, overwrites=False) == older


def test_only_rank_0_looks_for_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rank may see an older state of a shared directory; alone it must refuse nothing."""
    _saved(checkpoint_path(tmp_path / "checkpoints", 1), ranks=2)
    monkeypatch.setattr(run, "raising_together", lambda world: nullcontext())
    monkeypatch.setattr(run, "broadcast_text", lambda world, text: text or "what rank 0 found")
    second = World(1, 2, CPU, None)
    found = run._checkpoint_to_load(None, tmp_path, second, overwrites=True)
    assert found == Path("what rank 0 found")


# Real runs below: 160 clips, 12 a step, 13 steps an epoch.
SETTINGS = (
    "model.freeze_batchnorm=true", "optim.name=sgd", "optim.lr=0.01", "optim.lr_batch=12",
    "schedule.epochs=1", "schedule.warmup_epochs=0.5", "run.deterministic=true",
    "run.log_every_steps=1", "data.batch_size=6", "data.workers=0", "data.clips_per_video=1",
)  # fmt: skip


def _train_and_record(data: str, output: str, overrides: tuple[str, ...], stop_at: int) -> None:
    """Train as one rank; write down each step's rate and clips, with a hash of their pixels.

    The last rank sends itself a signal in step `stop_at`.
    """
    seen: list[Any] = []

    class Recording(Trainer):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            train_step = self._step.run

            def record(batches: Any, rate: float, epoch: int) -> torch.Tensor:
                clips = []
                for batch in batches:
                    video = video_on(batch, CPU)
                    drawn = train_clips(video, self.recipe.augment, self.recipe.run.seed, epoch)
                    for index, pixels in enumerate(drawn):
                        place = (int(batch.view[index]), int(batch.start_frame[index]))
                        digest = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:16]
                        clips.append([batch.key[index], *place, digest])
                seen.append([self.step, rate, clips])
                if self.step == stop_at and self.world.rank == self.world.size - 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                return train_step(batches, rate, epoch)

            self._step.run = record  # type: ignore[method-assign]

    run.Trainer = Recording  # type: ignore[misc]
    torch.set_num_threads(1)
    recipe = load_recipe("tiny", [*SETTINGS, *overrides])
    number = os.environ.get("RANK", "0")
    try:
        run.train(recipe, data, output, val_split=None, resume="auto", device="cpu")
    except InterruptedBySignalError:
        if stop_at == 0:
            raise
    finally:
        run.Trainer = Trainer  # type: ignore[misc]
        name = f"seen-{time.time_ns()}-{number}.json"
        Path(output, name).write_text(json.dumps(seen))


def _steps(output: Path) -> dict[int, tuple[set[float], list[tuple[Any, ...]]]]:
    """The rates and clips of each step, over all ranks and attempts."""
    found: dict[int, tuple[set[float], list[tuple[Any, ...]]]] = {}
    for path in output.glob("seen-*.json"):
        for step, rate, clips in json.loads(path.read_text()):
            rates, all_clips = found.setdefault(step, (set(), []))
            rates.add(rate)
            all_clips.extend(map(tuple, clips))
    return {step: (rates, sorted(clips)) for step, (rates, clips) in sorted(found.items())}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_then_three_then_one_and_one_again_train_on_the_same_clips(
    motion_dataset: Path, tmp_path: Path
) -> None:
    """The same command each time: a step's clips, their draws and its rate are equal exactly."""
    data, whole, cut = str(motion_dataset), tmp_path / "whole", tmp_path / "cut"
    _train_and_record(data, str(whole), ("data.accumulate=2",), 0)
    first = random.randrange(2, 6)
    second = random.randrange(first + 1, 11)
    third = random.randrange(second + 1, 12)
    launch(2, _train_and_record, data, str(cut), (), first)
    launch(3, _train_and_record, data, str(cut), (), second)
    assert load_checkpoint(checkpoints_in(cut / "checkpoints")[-1]).step == second
    _train_and_record(data, str(cut), (), third)
    assert load_checkpoint(checkpoints_in(cut / "checkpoints")[-1]).step == third
    _train_and_record(data, str(cut), (), 0)
    wanted, found = _steps(whole), _steps(cut)
    assert list(wanted) == list(range(1, 14))
    assert all(len(clips) == 12 and len(rates) == 1 for rates, clips in wanted.values())
    assert found == wanted, f"cut at {first}, {second} and {third}"
    one, other = (load_checkpoint(output / "final.pt").model for output in (whole, cut))
    # by norms: AdamW moves a weight whose gradient is all rounding by as much as any other
    for name, tensor in one.items():
        away = float((tensor.double() - other[name].double()).norm())
        assert away <= 1e-3 * float(tensor.double().norm()) + 1e-6, name


STEPWISE = ("--recipe", "tiny", "--epochs", "1", "--val-split", "none", "--device", "cpu",
            "--set", "run.checkpoint_steps=1", "--set", "data.workers=1",
            "--set", "run.deterministic=true")  # fmt: skip


def _wait_for_step(output: Path, step: int, process: subprocess.Popen[bytes], log: Path) -> None:
    while not any(
        load_checkpoint(path, in_place=True).step >= step
        for path in checkpoints_in(output / "checkpoints")[-1:]
    ):
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _start(command: Sequence[object], log: Path, place: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(
            [*map(str, command)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **place},
        )


def _torchrun(data: Path, output: Path, log: Path) -> subprocess.Popen[bytes]:
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "--max-restarts", "2", "-m", "prep", "train", "--data", data, "--output", output,
               *STEPWISE)  # fmt: skip
    return _start(command, log, {})


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_continues_after_a_rank_was_killed(motion_dataset: Path, tmp_path: Path) -> None:
    weights, step = [], random.randrange(1, 7)
    for name in ("whole", "cut"):
        output, log = tmp_path / name, tmp_path / f"{name}.log"
        process = _torchrun(motion_dataset, output, log)
        if name == "cut":
            _wait_for_step(output, step, process, log)
            os.kill(random.choice(_children(process.pid)), signal.SIGKILL)
        assert process.wait(timeout=500) == 0, log.read_text()
        weights.append(load_checkpoint(output / "final.pt").model)
    assert "resumed from" in (tmp_path / "cut.log").read_text()
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0, msg=f"killed at {step}")


def _srun(data: Path, output: Path, size: int, log: Path) -> list[subprocess.Popen[bytes]]:
    """Start a run as srun does: a process for each task, with SLURM's variables."""
    place = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
             "SLURM_STEP_NUM_TASKS": str(size)}  # fmt: skip
    command = (sys.executable, "-P", "-m", "prep", "train", "--data", data, "--output", output,
               "--set", "data.batch_size=6", "--set", "data.clips_per_video=1", "--resume", "auto", *STEPWISE)  # fmt: skip
    return [
        _start(command, log, {**place, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})
        for rank in range(size)
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_preempted_slurm_job_continues_with_fewer_tasks(
    motion_dataset: Path, tmp_path: Path
) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    tasks = _srun(motion_dataset, output, 2, log)
    _wait_for_step(output, 2, tasks[0], log)
    for task in tasks:
        task.send_signal(signal.SIGUSR1)
    assert [task.wait(timeout=120) for task in tasks] == [75, 75], log.read_text()
    stopped = load_checkpoint(checkpoints_in(output / "checkpoints")[-1])
    assert f"stopped by SIGUSR1 after step {stopped.step}" in log.read_text()
    (task,) = _srun(motion_dataset, output, 1, log)
    assert task.wait(timeout=240) == 0, log.read_text()
    text = log.read_text()
    assert (
        "a step stays 12 clips, on 1 rank(s) instead of 2: data.batch_size 6, data.accumulate 2"
        in text
    )
    assert load_checkpoint(output / "final.pt").step == 13
    steps = [
        json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(set(steps))
    assert "Traceback" not in text
