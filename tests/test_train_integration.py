"""Training on a converted dataset: four classes that only motion tells apart."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import run_kprep

from prep.errors import KprepError, UsageError
from train import load_recipe, train
from train.checkpoint import checkpoints_in, load_checkpoint
from train.launch import launch

if TYPE_CHECKING:
    from stream import ClipBatch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.usefixtures("one_thread")]
SHORT = ("schedule.epochs=1", "run.log_every_steps=5")


def _lines(output: Path, kind: str) -> list[dict[str, Any]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


@pytest.fixture(scope="module")
def trained(motion_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the tiny recipe, run as a user runs it."""
    output = tmp_path_factory.mktemp("trained") / "run"
    options = ("--data", motion_dataset, "--recipe", "tiny", "--output", output)
    done = run_kprep("train", *options, "--device", "cpu", OMP_NUM_THREADS="1")
    assert "learning rate 0.003 = 0.003 x 16 / 16 (factor 1" in done.stdout
    assert "clips/s" in done.stdout
    return output


def test_the_tiny_recipe_learns_motion(trained: Path) -> None:
    last = _lines(trained, "eval")[-1]
    assert last["videos"] == 40
    assert last["video_top1"] > 0.9  # chance is 0.25
    assert last["protocol"] == (
        "2 x 8 frames @ 7.5 fps, even placement, resized to 40x40, centre crop 36x36, "
        "averaged probabilities"
    )


def _shuffle_each(batch: ClipBatch) -> ClipBatch:
    """Put the frames of each clip into an order of its own."""
    frames = [clip[torch.randperm(len(clip))] for clip in batch.video]
    return replace(batch, video=torch.stack(frames))


def test_without_the_order_of_frames_there_is_nothing_to_learn(
    motion_dataset: Path, tmp_path: Path
) -> None:
    """The same training stays near chance (0.25 of 40 videos, standard deviation 0.07)."""
    recipe = load_recipe("tiny")
    metrics = train(recipe, motion_dataset, tmp_path, device="cpu", transform_batch=_shuffle_each)
    assert metrics["video_top1"] < 0.25 + 4 * 0.07


def test_test_only_gives_the_number_of_the_run(trained: Path, motion_dataset: Path) -> None:
    options = ("--data", motion_dataset, "--recipe", "tiny", "--output", trained)
    done = run_kprep("train", *options, "--resume", trained / "final.pt", "--test-only")
    share = _lines(trained, "eval")[-1]["video_top1"]
    assert f"video top-1 {share:.2%}" in done.stdout
    assert "loss" not in done.stdout
    directory = trained / "evaluation" / "test-val-final"
    assert f"written to {directory}" in done.stdout
    assert json.loads((directory / "summary.json").read_text())["video_top1"] == share
    assert "<svg" in (directory / "report.html").read_text()  # the curves of the run are there
    options = (*options[:-1], trained / "elsewhere", "--val-split", "train")
    run_kprep("train", *options, "--resume", trained, "--test-only", "--nproc", 2, "--set",
              "data.workers=0", OMP_NUM_THREADS="1")  # fmt: skip
    summary = trained / "elsewhere/evaluation/test-train-epoch-0015/summary.json"
    assert json.loads(summary.read_text())["videos"] == 160
    for wrong, code in (("test", 2), ("none", 2)):
        options = (*options[:-1], wrong)
        done = run_kprep("train", *options, "--resume", trained, "--test-only", check=False)
        assert (done.returncode, done.stdout) == (code, "")


def test_videos_too_short_for_the_protocol_are_counted_and_left_out(
    trained: Path, motion_dataset: Path
) -> None:
    """16 frames at 7.5 of 15 fps span 31 stored frames; the videos have 22 to 45."""
    options = ("--data", motion_dataset, "--recipe", "tiny", "--set", "eval.frames=16")
    done = run_kprep("train", *options, "--resume", trained, "--test-only", OMP_NUM_THREADS="1")
    videos = int(re.findall(r"\((\d+) videos", done.stdout)[0])
    unscored = int(re.findall(r"not scored: (\d+)", done.stdout)[0])
    assert unscored > 0
    assert videos + unscored == 40
    assert "2 x 16 frames @ 7.5 fps" in done.stdout


def _evaluate(data: str, trained: str, output: str) -> None:
    recipe = load_recipe("tiny", ["eval.batch_size=7"])
    metrics = train(recipe, data, output, resume=trained, device="cpu", test_only=True)
    (Path(output) / f"{torch.initial_seed()}.json").write_text(json.dumps(metrics))


def test_three_ranks_score_exactly_what_one_does(
    trained: Path, motion_dataset: Path, tmp_path: Path
) -> None:
    """80 clips in batches of 7 fill no rank evenly."""
    launch(3, _evaluate, str(motion_dataset), str(trained), str(tmp_path))
    found = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    last = _lines(trained, "eval")[-1]
    assert len(found) == 3
    names = ("clip_top1", "clip_top5", "video_top1", "video_top5")
    for metrics in found:
        assert {name: metrics[name] for name in names} == {name: last[name] for name in names}


def test_the_same_seed_gives_the_same_weights(motion_dataset: Path, tmp_path: Path) -> None:
    recipe = load_recipe("tiny", SHORT)
    models = []
    for name in ("a", "b"):
        train(recipe, motion_dataset, tmp_path / name, val_split=None, device="cpu")
        models.append(load_checkpoint(tmp_path / name / "final.pt").model)
    torch.testing.assert_close(models[0], models[1], rtol=0, atol=0)


def test_a_resumed_run_equals_an_uninterrupted_one(motion_dataset: Path, tmp_path: Path) -> None:
    runs = {"whole": (None, 2), "cut": (None, 1), "cut again": ("auto", 2)}
    for name, (resume, epochs) in runs.items():
        recipe = load_recipe("tiny", [f"schedule.epochs={epochs}"])
        output = tmp_path / name.split()[0]
        train(recipe, motion_dataset, output, val_split=None, resume=resume, device="cpu")
    models = [load_checkpoint(tmp_path / name / "final.pt").model for name in ("whole", "cut")]
    torch.testing.assert_close(models[0], models[1], rtol=0, atol=0)


STEPWISE = ("--epochs", 2, "--set", "run.checkpoint_steps=1", "--set", "run.deterministic=true",
            "--set", "data.workers=1", "--val-split", "none", "--device", "cpu")  # fmt: skip


def _train_until(step: int, number: int, *options: object) -> tuple[int, str]:
    """Run the command, send it a signal once a checkpoint of at least `step` steps is there."""
    output = Path(str(options[options.index("--output") + 1]))
    command = [sys.executable, "-P", "-m", "prep", "train", *map(str, options)]
    # a file: loader workers of a killed run hold a pipe open until they notice
    log = output.parent / "log"
    with (
        log.open("w") as file,
        subprocess.Popen(
            command,
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        ) as process,
    ):
        while not any(
            load_checkpoint(path).step >= step
            for path in checkpoints_in(output / "checkpoints")[-1:]
        ):
            assert process.poll() is None, log.read_text()
            time.sleep(0.02)
        if number == signal.SIGHUP:  # as a terminal that goes sends it, to all processes
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        process.wait(timeout=120)
    return process.returncode, log.read_text()


@pytest.fixture(scope="module")
def whole_runs() -> dict[tuple[object, ...], dict[str, torch.Tensor]]:
    """Return the weights of runs that nothing cut off, by their options."""
    return {}


@pytest.mark.parametrize(
    ("number", "code", "nproc"),
    [(signal.SIGKILL, -9, ()), (signal.SIGTERM, 75, ("--nproc", 2)), (signal.SIGINT, 130, ()),
     (signal.SIGHUP, 75, ("--nproc", 2)), (signal.SIGHUP, 75, ("--set", "data.workers=1"))],
)  # fmt: skip
@pytest.mark.usefixtures("heard_hangups")
def test_a_run_that_is_cut_off_at_a_random_step_reaches_the_same_weights(
    motion_dataset: Path, tmp_path: Path, number: int, code: int, nproc: tuple[object, ...],
    whole_runs: dict[tuple[object, ...], dict[str, torch.Tensor]],
) -> None:  # fmt: skip
    common = ("--data", motion_dataset, "--recipe", "tiny", *STEPWISE, *nproc)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    if common not in whole_runs:
        run_kprep("train", *common, "--output", whole, OMP_NUM_THREADS="1")
        whole_runs[common] = load_checkpoint(whole / "final.pt").model
    step = random.randrange(1, 17)  # of 20 steps on two ranks, 40 on one
    options = (*common, "--output", cut, "--resume", "auto")
    returned, text = _train_until(step, number, *options)
    assert returned == code, text
    if number != signal.SIGKILL:
        name = "SIGTERM" if number == signal.SIGHUP else signal.Signals(number).name
        assert f"stopped by {name} after step" in text
        assert "Traceback" not in text
    assert not (cut / "final.pt").exists()
    run_kprep("train", *options, OMP_NUM_THREADS="1")
    found = load_checkpoint(cut / "final.pt").model
    torch.testing.assert_close(found, whole_runs[common], rtol=0, atol=0, msg=f"cut at {step}")


FROZEN = ("model.freeze_batchnorm=true", "optim.name=sgd", "optim.lr=0.01")


def _record(data: str, output: str, overrides: tuple[str, ...]) -> None:
    """Train, and write down which clips this rank saw."""
    seen: list[str] = []

    def note(batch: ClipBatch) -> ClipBatch:
        views, starts = batch.view.tolist(), batch.start_frame.tolist()
        seen.extend(map(str, zip(batch.key, views, starts, strict=True)))
        return batch

    recipe = load_recipe("tiny", [*SHORT, *FROZEN, *overrides])
    train(recipe, data, output, val_split=None, device="cpu", transform_batch=note)
    (Path(output) / f"seen-{torch.initial_seed()}").write_text("\n".join(seen))


def test_two_ranks_and_one_see_the_same_clips_and_reach_the_same_weights(
    motion_dataset: Path, tmp_path: Path
) -> None:
    data = str(motion_dataset)
    _record(data, str(tmp_path / "one"), ("data.batch_size=16",))
    launch(2, _record, data, str(tmp_path / "two"), ("data.batch_size=8",))
    seen = {
        name: [path.read_text().splitlines() for path in sorted((tmp_path / name).glob("seen-*"))]
        for name in ("one", "two")
    }
    assert [len(rank) for rank in seen["two"]] == [160, 160]
    assert sorted(seen["one"][0]) == sorted(seen["two"][0] + seen["two"][1])
    one, two = (load_checkpoint(tmp_path / name / "final.pt").model for name in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
    losses = [_lines(tmp_path / name, "train")[-1]["loss"] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_nproc_trains_and_reports_once(motion_dataset: Path, tmp_path: Path) -> None:
    options = ("--data", motion_dataset, "--recipe", "tiny", "--output", tmp_path / "run")
    done = run_kprep("train", *options, "--nproc", 2, "--epochs", 1, "--set", "data.workers=1")
    assert "2 process(es) on cpu; 10 steps an epoch" in done.stdout
    assert "learning rate 0.006 = 0.003 x 32 / 16 (factor 2" in done.stdout
    assert done.stdout.count("after 1 epochs") == 1


@pytest.mark.parametrize("target", ["/dev/full", "a reader that leaves"])
def test_a_run_outlives_its_output(motion_dataset: Path, tmp_path: Path, target: str) -> None:
    """A full disk under a log, `| head`, and `| tee` that is killed."""
    command = (sys.executable, "-P", "-m", "prep", "train", "--data", motion_dataset,
               "--recipe", "tiny", "--output", tmp_path, "--epochs", "1", "--val-split", "none",
               "--set", "data.workers=0", "--device", "cpu")  # fmt: skip
    with Path("/dev/full").open("w") as full:
        process = subprocess.Popen(
            command,
            stdout=full if target == full.name else subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    if process.stdout is not None:
        process.stdout.close()
    _, errors = process.communicate(timeout=120)
    assert errors.count("standard output cannot be written") == 1
    assert errors.count("\n") == 1
    assert process.returncode == 0
    assert (tmp_path / "final.pt").exists()


def test_a_loss_that_is_not_finite_ends_all_ranks_with_one_sentence(
    motion_dataset: Path, tmp_path: Path
) -> None:
    options = ("--data", motion_dataset, "--recipe", "tiny", "--output", tmp_path / "run")
    settings = ("--set", "optim.lr=1e30", "--set", "optim.name=sgd")
    done = run_kprep("train", *options, *settings, "--nproc", 2, check=False)
    assert done.returncode == 1
    assert done.stderr.count("the loss is not finite") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_split": "trian"}, "trian"),
        ({"val_split": "test"}, "test"),
        ({"data": "nowhere"}, "nowhere"),
        ({"resume": "nowhere.pt"}, "nowhere.pt does not exist"),
        ({"test_only": True}, "needs a checkpoint"),
        ({"test_only": True, "val_split": None}, "needs an evaluation split"),
        ({"device": "tpu"}, "must be cpu or cuda"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(
    motion_dataset: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    options = {"data": motion_dataset, "output": tmp_path, "device": "cpu", **changes}
    with pytest.raises(KprepError, match=message):
        train(load_recipe("tiny"), **options)


def test_an_output_with_checkpoints_is_not_overwritten(trained: Path, motion_dataset: Path) -> None:
    with pytest.raises(UsageError, match="earlier run; go on with --resume auto"):
        train(load_recipe("tiny"), motion_dataset, trained, device="cpu")


def test_another_runs_checkpoint_is_not_resumed_over_an_outputs_own(
    trained: Path, motion_dataset: Path, tmp_path: Path
) -> None:
    """Started again, the command would go back to the other run each time."""
    recipe, output = load_recipe("tiny", ["data.batch_size=8"]), tmp_path / "new"
    with pytest.raises(UsageError, match="global_batch"):  # it is read, as there is no other
        train(recipe, motion_dataset, output, resume=str(trained), device="cpu")
    newest = checkpoints_in(trained / "checkpoints")[-1]
    (output / "checkpoints").mkdir(parents=True)
    shutil.copy(newest, output / "checkpoints")
    for resume in (trained, newest):
        with pytest.raises(UsageError, match=f"--resume {resume} is none of them; .*--resume auto"):
            train(recipe, motion_dataset, output, resume=str(resume), device="cpu")
    for own in (output, output / "checkpoints" / newest.name):
        with pytest.raises(UsageError, match="global_batch"):
            train(recipe, motion_dataset, output, resume=str(own), device="cpu")


@pytest.mark.slow
def test_real_words_through_r3d_18(corpus: Path, tmp_path: Path) -> None:
    """The seed's recipe on real video: twelve signed words, one epoch of a few steps on a CPU."""
    root = tmp_path / "data"
    run_kprep("shard", corpus / "actions/asl_words", root, "--split", "train", "--profile", "small")
    small = ("data.frames=8", "data.batch_size=4", "data.clips_per_video=1", "data.workers=0",
             "schedule.epochs=1", "augment.resize=[64, 86]", "augment.crop=[56, 56]")  # fmt: skip
    settings = [word for value in small for word in ("--set", value)]
    run_kprep("train", "--data", root, "--recipe", "resnet", "--set", "model.name=r3d_18", *settings,
              "--val-split", "train", "--output", tmp_path / "run")  # fmt: skip
    trained = _lines(tmp_path / "run", "train")
    assert trained[-1]["step"] == 3  # 12 clips in batches of 4
    assert 0 < trained[-1]["loss"] < 20
    assert _lines(tmp_path / "run", "eval")[-1]["videos"] == 12
    assert (tmp_path / "run" / "final.pt").exists()


def test_resuming_with_another_batch_names_the_field(trained: Path, motion_dataset: Path) -> None:
    recipe = load_recipe("tiny", ["data.batch_size=8", "schedule.epochs=16"])
    with pytest.raises(UsageError, match="global_batch"):
        train(recipe, motion_dataset, trained, resume="auto", device="cpu")
