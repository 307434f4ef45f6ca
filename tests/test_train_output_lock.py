"""Two trainings into one directory: the second is refused, or waits for the first one's end."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
import torch

from prep.errors import StorageError, UsageError
from train import load_recipe, output_lock, train
from train.attempts import note_launch
from train.distributed import World
from train.output_lock import LOCK_NAME

if TYPE_CHECKING:
    from pathlib import Path

CPU = World(0, 1, torch.device("cpu"), None)
HOLD = """
import sys, time
from pathlib import Path
import torch
from train.distributed import World
from train.output_lock import output_lock
with output_lock(Path(sys.argv[1]), World(0, 1, torch.device("cpu"), None), None):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_training_is_refused_with_the_firsts_name(tmp_path: Path) -> None:
    output = tmp_path / "runs" / "a"
    with output_lock.output_lock(output, CPU, None):
        with pytest.raises(UsageError, match=f"process {os.getpid()} on .* trains into --output"):
            train(load_recipe("tiny"), tmp_path / "no dataset", output, device="cpu")
        with pytest.raises(UsageError, match="needs a checkpoint"):  # an evaluation writes beside
            train(load_recipe("tiny"), tmp_path / "x", output, device="cpu", test_only=True)
        with output_lock.output_lock(tmp_path / "runs" / "b", CPU, None):
            pass
    assert list((tmp_path / "runs").iterdir()) == []  # nothing came of either


def test_what_a_run_wrote_and_a_directory_that_was_there_stay(tmp_path: Path) -> None:
    for name in ("new", "old"):
        (tmp_path / "old").mkdir(exist_ok=True)
        with output_lock.output_lock(tmp_path / name, CPU, None):
            if name == "new":
                (tmp_path / name / "metrics.jsonl").touch()
    names = sorted(path.name for path in tmp_path.rglob("*"))
    assert names == ["metrics.jsonl", "new", "old"]


@pytest.mark.parametrize("by", ["resume", "launcher"])
def test_a_run_that_goes_on_waits_for_the_one_that_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, by: str
) -> None:
    monkeypatch.setattr(output_lock, "_POLL_SECONDS", 0.01)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    tmp_path.joinpath("run").mkdir()
    if by == "launcher":
        note_launch(tmp_path / "run")
        monkeypatch.setattr("train.attempts._begun", set())
    resume = "auto" if by == "resume" else None
    first = ExitStack()
    first.enter_context(output_lock.output_lock(tmp_path / "run", CPU, None))
    timer = threading.Timer(0.3, first.close)
    timer.start()
    with (
        caplog.at_level(logging.INFO, "kprep"),
        output_lock.output_lock(tmp_path / "run", CPU, resume),
    ):
        assert (tmp_path / "run" / LOCK_NAME).is_file()
    timer.join()
    assert "waiting up to 120 s for it to end" in caplog.text
    monkeypatch.setattr(output_lock, "_PATIENCE_SECONDS", 0.1)
    with (
        output_lock.output_lock(tmp_path / "run", CPU, None),
        pytest.raises(UsageError, match="wait for it to end, or choose another directory"),
        output_lock.output_lock(tmp_path / "run", CPU, resume),
    ):
        pass


def test_what_a_killed_run_held_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with (
            pytest.raises(UsageError, match=f"process {process.pid} on "),
            output_lock.output_lock(tmp_path / "run", CPU, None),
        ):
            pass
        process.kill()
    assert (tmp_path / "run" / LOCK_NAME).is_file()
    with output_lock.output_lock(tmp_path / "run", CPU, None):
        pass


def test_a_file_system_without_locks_is_said_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    for _ in range(2):
        with (
            caplog.at_level(logging.INFO, "kprep"),
            output_lock.output_lock(tmp_path, CPU, None),
        ):
            assert "No locks available): nothing keeps a second run out" in caplog.text


def test_a_full_disk_is_no_mistake_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output_lock, "_locked", fill)
    with (
        pytest.raises(StorageError, match=r"^--output .* cannot be written \(No space left"),
        output_lock.output_lock(tmp_path, CPU, None),
    ):
        pass


def test_a_directory_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UsageError, match=r"^--output .*file/run cannot be written"),
        output_lock.output_lock(tmp_path / "file" / "run", CPU, None),
    ):
        pass
