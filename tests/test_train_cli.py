from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import train
from prep.errors import UsageError
from train.cli import train as command


def test_the_public_names_are_these() -> None:
    assert train.__all__ == [
        "Accuracy",
        "Recipe",
        "Trainer",
        "World",
        "build_model",
        "evaluate",
        "joined_world",
        "load_recipe",
        "train",
    ]
    for name in train.__all__:
        home = importlib.import_module(train._HOMES[name])
        assert getattr(train, name) is getattr(home, name)
    with pytest.raises(AttributeError, match="nothing"):
        _ = train.nothing


def test_help_needs_no_torch_and_shows_examples() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from train.cli import train;"
        "result = CliRunner().invoke(train, ['--help']); print(result.output);"
        "sys.exit(result.exit_code or ('torch' in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr
    assert "kprep train --data k400 --recipe resnet --nproc 8" in done.stdout


def test_the_options_are_these() -> None:
    names = {option for parameter in command.params for option in parameter.opts}
    assert names == {
        "--data",
        "--recipe",
        "--set",
        "--output",
        "--nproc",
        "--resume",
        "--weights",
        "--freeze",
        "--train-split",
        "--val-split",
        "--epochs",
        "--profile",
        "--device",
        "--test-only",
        "--check-weights",
    }


def test_every_option_stands_in_the_documentation() -> None:
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    for parameter in command.params:
        assert f"`{parameter.opts[0]}" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "resnt"], "did you mean 'resnet'"),
        (["--recipe", "tiny", "--set", "optim.momentun=1"], "did you mean 'momentum'"),
        (["--recipe", "tiny", "--epochs", "0"], "schedule.epochs"),
        (
            ["--recipe", "tiny", "--epochs", "1", "--set", "schedule.epochs=2"],
            "--epochs 1 and --set schedule.epochs=2 set the same; drop one",
        ),
        (
            ["--recipe", "tiny", "--profile", "5", "--set", "run.profile_steps = 6"],
            "--profile 5 and --set run.profile_steps = 6 set the same",
        ),
        (
            ["--recipe", "tiny", "--freeze", "stem.*", "--set", 'model.freeze=["head.*"]'],
            "--freeze and --set model.freeze",
        ),
        (  # the same twice is no contradiction: the next mistake is named
            ["--recipe", "tiny", "--epochs", "0", "--set", "schedule.epochs=0"],
            "schedule.epochs (0)",
        ),
        ([], "--recipe NAME|FILE is missing"),
        (
            ["--check-weights", "R3D_18_Weights.KINETICS400_V2"],
            "did you mean 'R3D_18_Weights.KINETICS400_V1'",
        ),
        (
            ["--check-weights", "R3D_18", "--recipe", "tiny"],
            "own protocol and weights; drop --recipe",
        ),
        (
            ["--check-weights", "R3D_18", "--test-only"],
            "own protocol and weights; drop --test-only",
        ),
        (["--check-weights", "R3D_18", "--val-split", "none"], "needs an evaluation split"),
    ],
)
def test_mistakes_are_errors_of_usage(options: list[str], message: str) -> None:
    result = CliRunner().invoke(command, ["--data", "x", *options])
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_nproc_in_each_of_several_tasks_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    started: list[object] = []
    monkeypatch.setattr("train.cli.launch", lambda *given: started.append(given))
    for tasks in ("1", "2"):
        monkeypatch.setenv(name, tasks)
        result = CliRunner().invoke(command, ["--data", "x", "--recipe", "tiny", "--nproc", "4"])
    assert isinstance(result.exception, UsageError)
    assert f"({name}=2), each time another run; leave out --nproc" in str(result.exception)
    assert len(started) == 1


def test_a_missing_torch_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.cli.find_spec", lambda name: None)
    result = CliRunner().invoke(command, ["--data", "x", "--recipe", "tiny"])
    assert isinstance(result.exception, UsageError)
    assert "pip install 'kprep[train]'" in str(result.exception)


SIGNALLED = """
import atexit, os, signal, sys
import train.run
from train.signals import InterruptedBySignalError
from prep.cli import main

def run(*_, **__):
    raise InterruptedBySignalError(signal.SIGTERM, "stopped by SIGTERM")

def end():  # the last that runs of Python's
    for number in (signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), number)

atexit.register(end)
train.run.train = run
sys.argv[1:] = ["train", "--data", "d", "--recipe", "tiny"]
main()
"""


EARLY = """
import os, signal, sys, time
import train.cli
from prep.cli import main

def load():  # as the import of torch, which takes seconds
    assert "torch" not in sys.modules
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(60)

train.cli._check_torch = load
sys.argv[1:] = ["train", "--data", "d", "--recipe", "tiny", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("options", [[], ["--nproc", "2"]])
def test_a_signal_before_torch_is_loaded_ends_the_run_with_75(options: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EARLY, *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 75, done.stderr
    assert done.stderr.startswith("Error: stopped by SIGUSR1 before training began")


def test_a_second_signal_does_not_take_the_exit_code_away() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED], capture_output=True, text=True, check=False
    )
    assert done.returncode == 75, done.stderr
    assert "stopped by SIGTERM" in done.stderr
