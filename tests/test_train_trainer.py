"""The trainer on clips made in memory; with a real dataset it is in test_train_integration.py."""

from __future__ import annotations

import atexit
import itertools
import json
import logging
import os
import signal
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch

from prep.errors import DatasetError, KprepError, StorageError, UsageError
from stream import ClipBatch
from stream.bad_clips import BadClipSummary
from train.agreement import lost_losses, raise_together
from train.checkpoint import (
    checkpoint_path,
    checkpoints_in,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from train.distributed import World, joined_world
from train.evaluation import evaluate
from train.launch import launch
from train.models import tiny
from train.recipe import Recipe, load_recipe, parse_recipe
from train.signals import InterruptedBySignalError
from train.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CPU = World(0, 1, torch.device("cpu"), None)
SMALL = [
    "data.frames=4",
    "data.batch_size=4",
    "augment.resize=[20, 20]",
    "augment.crop=[16, 16]",
    "schedule.epochs=2",
    "schedule.milestones=[]",
    "run.log_every_steps=2",
    "optim.lr_batch=8",
    "eval.clips_per_video=1",
]

# Two epochs of six steps, logged every second one: not the first of an epoch (losses arrive two
# steps late), and the last of an epoch in any case.
LOGGED_STEPS = [4, 6, 10, 12]


def _recipe(*overrides: str) -> Recipe:
    return load_recipe("tiny", [*SMALL, *overrides])


def _batch(numbers: list[int], epoch: int = 0) -> ClipBatch:
    """Clips whose pixels are a function of their number and the epoch."""
    videos = []
    for number in numbers:
        generator = torch.Generator().manual_seed(1000 * epoch + number)
        videos.append(torch.randint(0, 256, (4, 24, 24, 3), dtype=torch.uint8, generator=generator))
    count = len(numbers)
    return ClipBatch(
        video=torch.stack(videos),
        size=torch.full((count, 2), 24),
        label=torch.tensor([number % 3 for number in numbers]),
        key=[f"clip{number}" for number in numbers],
        start_frame=torch.zeros(count, dtype=torch.int64),
        view=torch.zeros(count, dtype=torch.int64),
        layout="rgb",
    )


class _Dropping(torch.nn.Module):
    """A network whose result depends on the random generator."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layers = tiny(num_classes)
        self.layers.insert(-1, torch.nn.Dropout(0.5))

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return self.layers(clips)


class _Loader:
    """What `clip_loader` offers, for 24 clips in memory and in order."""

    def __init__(self, world: World, batch_size: int, accumulate: int = 1) -> None:
        self.class_names = ["a", "b", "c"]
        self.num_clips = self.num_videos = 24
        self.unscored: list[str] = []
        self.global_batch = world.size * batch_size * accumulate
        self.steps_per_epoch = self.num_clips // self.global_batch
        self.num_left_out = self.num_clips % self.global_batch
        self._rank, self._batch_size, self._accumulate = world.rank, batch_size, accumulate
        self._epoch, self._first = 0, 0
        self.loaded: list[dict[str, Any]] = []
        self.fails_at: int | None = None

    def __iter__(self) -> Iterator[ClipBatch]:
        torch.rand(1)  # as torch's DataLoader does when an iteration begins
        first_step, self._first = self._first, 0
        for step in range(first_step, self.steps_per_epoch):
            if step == self.fails_at:
                raise RuntimeError("worker gone")
            for micro in range(self._accumulate):
                first = step * self.global_batch
                first += (self._rank * self._accumulate + micro) * self._batch_size
                yield _batch(list(range(first, first + self._batch_size)), self._epoch)

    def bad_clip_summary(self) -> BadClipSummary:
        return BadClipSummary(0)

    def set_epoch(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._epoch, self._first = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded.append(state)
        self._epoch, self._first = state["epoch"], state["step"]


def _trainer(output: Path, recipe: Recipe, world: World = CPU, **options: Any) -> Trainer:
    loader = _Loader(world, recipe.data.batch_size, recipe.data.accumulate)
    return Trainer(recipe, world, loader, None, output, **options)


def _weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def _assert_same(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], **close: Any
) -> None:
    assert one.keys() == other.keys()
    torch.testing.assert_close(one, other, **(close or {"rtol": 0, "atol": 0}))


def _lines(output: Path, kind: str) -> list[dict[str, Any]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


def test_the_recipe_of_a_run_on_other_ranks_is_the_one_that_was_given(tmp_path: Path) -> None:
    given = _recipe("data.batch_size=8", "schedule.epochs=1")
    kept = replace(given, data=replace(given.data, batch_size=4, accumulate=4))
    _trainer(tmp_path, kept, given=given).fit()
    assert load_recipe(tmp_path / "recipe.toml") == given
    saved = load_checkpoint(checkpoints_in(tmp_path / "checkpoints")[-1])
    assert parse_recipe(saved.recipe, "") == kept


@pytest.mark.parametrize(
    "change", [{"optimizer": {}}, {"rng": {"cpu": torch.zeros(1, 9, dtype=torch.uint8)}}]
)
def test_states_that_do_not_fit_are_one_sentence(tmp_path: Path, change: dict[str, Any]) -> None:
    _trainer(tmp_path, _recipe("schedule.epochs=1")).fit()
    path = checkpoints_in(tmp_path / "checkpoints")[-1]
    save_checkpoint(path, replace(load_checkpoint(path), **change))
    with pytest.raises(KprepError, match=r"epoch-0001.pt is of another version of kprep, or dama"):
        _trainer(tmp_path / "resumed", _recipe("schedule.epochs=2")).restore(path)


def test_a_run_writes_checkpoints_metrics_and_its_recipe(tmp_path: Path) -> None:
    recipe = _recipe("run.keep_checkpoints=1")
    metrics = _trainer(tmp_path, recipe).fit()
    assert (metrics["epochs"], metrics["steps"]) == (2, 12)
    assert [path.name for path in checkpoints_in(tmp_path / "checkpoints")] == ["epoch-0002.pt"]
    assert load_recipe(tmp_path / "recipe.toml") == recipe
    assert load_checkpoint(tmp_path / "final.pt").optimizer is None
    lines = _lines(tmp_path, "train")
    assert [line["step"] for line in lines] == LOGGED_STEPS
    assert all(0 <= line["data_wait_share"] <= 1 for line in lines)
    assert all(line["clips_per_second"] > 0 for line in lines)
    assert lines[-1]["loss"] == metrics["loss"]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    weights = []
    for number, seed in enumerate((1, 1, 2)):
        torch.manual_seed(number)  # what ran before must not matter
        trainer = _trainer(tmp_path / str(number), _recipe(f"run.seed={seed}"))
        trainer.fit()
        weights.append(_weights(trainer))
    _assert_same(weights[0], weights[1])
    assert not torch.equal(weights[0]["0.weight"], weights[2]["0.weight"])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, optimizer: str) -> None:
    overrides = (f"optim.name={optimizer}", "schedule.epochs=3")
    whole = _trainer(tmp_path / "whole", _recipe(*overrides))
    whole.fit()
    _trainer(tmp_path / "cut", _recipe(*overrides, "schedule.epochs=2")).fit()
    resumed = _trainer(tmp_path / "cut", _recipe(*overrides))
    resumed.restore(checkpoints_in(tmp_path / "cut" / "checkpoints")[-1])
    assert resumed._train_loader.loaded == [{"epoch": 2, "step": 0}]
    resumed.fit()
    _assert_same(_weights(whole), _weights(resumed))
    steps = [line["step"] for line in _lines(tmp_path / "whole", "train")]
    assert [line["step"] for line in _lines(tmp_path / "cut", "train")] == steps


def test_a_run_resumed_in_mid_epoch_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    overrides = ("model.name=test_train_trainer:_Dropping", "data.accumulate=2")
    whole = _trainer(tmp_path / "whole", _recipe(*overrides))  # 3 steps an epoch
    whole.fit()
    often = _recipe(*overrides, "run.checkpoint_steps=1", "run.keep_checkpoints=9")
    _trainer(tmp_path / "often", often).fit()
    paths = checkpoints_in(tmp_path / "often" / "checkpoints")
    assert [path.stem for path in paths] == [
        "epoch-0000-step-00000001",
        "epoch-0000-step-00000002",
        "epoch-0001",
        "epoch-0001-step-00000004",
        "epoch-0001-step-00000005",
        "epoch-0002",
    ]
    for number, path in enumerate(paths):
        torch.manual_seed(99)
        resumed = _trainer(tmp_path / str(number), _recipe(*overrides))
        resumed.restore(path)
        resumed.fit()
        _assert_same(_weights(whole), _weights(resumed))


def test_minutes_between_checkpoints(tmp_path: Path) -> None:
    recipe = _recipe("run.checkpoint_minutes=1e-9", "run.keep_checkpoints=99", "schedule.epochs=1")
    _trainer(tmp_path, recipe).fit()
    assert len(checkpoints_in(tmp_path / "checkpoints")) == 6


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]
)
def test_a_signal_writes_a_checkpoint_of_the_last_complete_step(
    tmp_path: Path, number: int, code: int
) -> None:
    before = signal.getsignal(number)
    seen: list[str] = []

    def interrupt(batch: ClipBatch) -> ClipBatch:
        seen.append("step")
        if len(seen) == 3:
            os.kill(os.getpid(), number)
        return batch

    with pytest.raises(InterruptedBySignalError, match="after step 3; the checkpoint is") as caught:
        _trainer(tmp_path, _recipe(), transform_batch=interrupt).fit()
    assert caught.value.exit_code == code
    assert load_checkpoint(checkpoints_in(tmp_path / "checkpoints")[-1]).step == 3
    assert signal.getsignal(number) is before


def test_a_signal_ends_the_wait_for_a_batch(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, _recipe())
    batches = iter(trainer._train_loader)

    class Stuck(_Loader):
        def __iter__(self) -> Iterator[ClipBatch]:
            yield from itertools.islice(batches, 2)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)

    trainer._train_loader = Stuck(CPU, 4)
    with pytest.raises(InterruptedBySignalError, match="after step 2"):
        trainer.fit()


def test_a_signal_ends_an_evaluation_that_is_made_up_for(tmp_path: Path) -> None:
    class Interrupting(_Loader):
        def __iter__(self) -> Iterator[ClipBatch]:
            for number, batch in enumerate(super().__iter__()):
                if number == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    trainer = _trainer(tmp_path, _recipe("eval.batch_size=4"))
    trainer._val_loader = Interrupting(CPU, 4)
    with pytest.raises(InterruptedBySignalError, match="after step 6; the checkpoint is") as caught:
        trainer.fit()
    assert caught.value.exit_code == 75
    assert _lines(tmp_path, "eval") == []
    resumed = _trainer(tmp_path, _recipe("eval.batch_size=4"))
    resumed._val_loader = _Loader(CPU, 4)
    resumed.restore(checkpoints_in(tmp_path / "checkpoints")[-1])
    resumed.fit()
    assert [line["step"] for line in _lines(tmp_path, "eval")] == [6, 12]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_the_wait_for_a_batch_to_score(
    tmp_path: Path, number: int, code: int
) -> None:
    class Troubled(_Loader):
        def __iter__(self) -> Iterator[ClipBatch]:
            yield from itertools.islice(super().__iter__(), 2)
            if number == signal.SIGTERM:
                os.kill(os.getpid(), number)
                time.sleep(600)  # the storage is stuck
            with suppress(Exception):
                os.kill(os.getpid(), number)
            raise RuntimeError("worker exited unexpectedly")  # a terminal's Ctrl-C ends it, too

    trainer = _trainer(tmp_path, _recipe("eval.batch_size=4"))
    trainer._val_loader = Troubled(CPU, 4)
    with pytest.raises(InterruptedBySignalError, match="after step 6; the checkpoint is") as caught:
        trainer.fit()
    assert caught.value.exit_code == code
    assert _lines(tmp_path, "eval") == []


def test_a_loader_that_fails_leaves_a_checkpoint(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, _recipe())
    trainer._train_loader.fails_at = 4
    with pytest.raises(RuntimeError, match="worker gone"):
        trainer.fit()
    assert load_checkpoint(checkpoints_in(tmp_path / "checkpoints")[-1]).step == 4


def test_the_best_network_is_kept_and_an_evaluation_is_not_repeated(tmp_path: Path) -> None:
    recipe = _recipe("eval.batch_size=4")
    scored = _trainer(tmp_path, recipe)
    scored._val_loader = _Loader(CPU, 4)
    scored.fit()
    found = {line["step"]: line["video_top1"] for line in _lines(tmp_path, "eval")}
    assert list(found) == [6, 12]
    best = load_checkpoint(tmp_path / "checkpoints" / "best.pt")
    assert best.step == max(found, key=lambda step: (found[step], -step))
    # a run that was stopped between an epoch's end and its evaluation makes up for it
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"eval"' not in line or '"step": 6' in line]
    (tmp_path / "metrics.jsonl").write_text("".join(kept))
    for _ in range(2):
        resumed = _trainer(tmp_path, recipe)
        resumed._val_loader = _Loader(CPU, 4)
        resumed.restore(tmp_path / "checkpoints" / "epoch-0002.pt")
        resumed.fit()
        assert [line["step"] for line in _lines(tmp_path, "eval")] == [6, 12]


def test_metrics_beyond_the_checkpoint_are_dropped_on_resume(tmp_path: Path) -> None:
    _trainer(tmp_path, _recipe()).fit()
    resumed = _trainer(tmp_path, _recipe())
    resumed.restore(tmp_path / "checkpoints" / "epoch-0001.pt")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # cut off by a crash
    resumed.fit()
    assert [line["step"] for line in _lines(tmp_path, "train")] == LOGGED_STEPS


@pytest.mark.parametrize("name", ["epoch-0000-step-00000004", "epoch-0001"])
def test_a_run_that_goes_back_keeps_its_new_checkpoints(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Six steps an epoch; the attempt that is left got to step 12, the new one to step 7."""
    often = ("run.checkpoint_steps=1", "run.keep_checkpoints=9")
    _trainer(tmp_path, _recipe(*often)).fit()
    directory = tmp_path / "checkpoints"
    old = load_checkpoint(directory / f"{name}.pt")
    seen: list[str] = []

    def interrupt(batch: ClipBatch) -> ClipBatch:
        seen.append("step")
        if len(seen) == 7 - old.step:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    recipe = _recipe(*often, "run.keep_checkpoints=2", "optim.lr=0.123")
    resumed = _trainer(tmp_path, recipe, transform_batch=interrupt)
    resumed.restore(directory / f"{name}.pt")
    with caplog.at_level(logging.INFO), pytest.raises(InterruptedBySignalError):
        resumed.fit()
    newest = find_checkpoint("auto", directory)
    assert newest == checkpoint_path(directory, 1, 7)
    found = [load_checkpoint(path) for path in checkpoints_in(directory)]
    assert [saved.step for saved in found] == [6, 7]
    assert "lr = 0.123" in found[-1].recipe
    left = [load_checkpoint(path) for path in checkpoints_in(directory / "abandoned")]
    assert [saved.step for saved in left] == list(range(old.step + 1, 13))
    assert "lr = 0.123" not in "".join(saved.recipe for saved in left)
    assert f"beyond step {old.step}, moved to checkpoints/abandoned: epoch-" in caplog.text


class _Counted(_Loader):
    """Counts how many of the batches it has made are still there."""

    most_alive = 0

    def __iter__(self) -> Iterator[ClipBatch]:
        made: list[weakref.ref[ClipBatch]] = []
        for batch in super().__iter__():
            made.append(weakref.ref(batch))
            alive = sum(reference() is not None for reference in made)
            self.most_alive = max(self.most_alive, alive)
            yield batch


def test_the_batches_of_a_step_are_gone_when_those_of_the_next_are_made(tmp_path: Path) -> None:
    recipe = _recipe("data.batch_size=2", "data.accumulate=4")
    loader = _Counted(CPU, batch_size=2, accumulate=4)
    Trainer(recipe, CPU, loader, None, tmp_path).fit()
    assert loader.most_alive == 4


def test_settings_changed_on_resume_take_effect(tmp_path: Path) -> None:
    _trainer(tmp_path, _recipe()).fit()
    resumed = _trainer(tmp_path, _recipe("optim.weight_decay=0.5", "schedule.epochs=3"))
    resumed.restore(tmp_path / "checkpoints" / "epoch-0002.pt")
    assert resumed._state.optimizer.param_groups[0]["weight_decay"] == 0.5


def test_checkpoints_of_another_run_are_refused(tmp_path: Path) -> None:
    _trainer(tmp_path, _recipe()).fit()
    path = tmp_path / "checkpoints" / "epoch-0002.pt"
    other = _trainer(tmp_path, _recipe("optim.name=sgd"))
    with pytest.raises(UsageError, match=r"state of adamw, and optim.name is 'sgd'"):
        other.restore(path)
    with pytest.raises(UsageError, match=r"only the network; .*epoch-\*.pt, or begin .* --weights"):
        _trainer(tmp_path, _recipe()).restore(tmp_path / "final.pt")
    other = _trainer(tmp_path, _recipe())
    other._state._class_names = ["a", "c", "b"]
    with pytest.raises(UsageError, match="class 1 is 'b', the dataset's 'c'"):
        other.restore(path)
    other = _trainer(tmp_path, _recipe("model.name=r3d_18"))
    with pytest.raises(UsageError, match="another network than 'r3d_18'"):
        other.restore(path)


def test_accumulated_batches_equal_one_large_batch(tmp_path: Path) -> None:
    frozen = ("model.freeze_batchnorm=true", "optim.name=sgd")
    large = _trainer(tmp_path / "a", _recipe(*frozen, "data.batch_size=8"))
    small = _trainer(tmp_path / "b", _recipe(*frozen, "data.batch_size=2", "data.accumulate=4"))
    losses = [trainer.fit()["loss"] for trainer in (large, small)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    _assert_same(_weights(large), _weights(small), rtol=1e-4, atol=1e-6)


def test_a_hook_changes_what_the_network_sees(tmp_path: Path) -> None:
    plain = _trainer(tmp_path / "a", _recipe("schedule.epochs=1"))
    seen: list[str] = []

    def blacken(batch: ClipBatch) -> ClipBatch:
        seen.extend(batch.key)
        return replace(batch, video=torch.zeros_like(batch.video))

    black = _trainer(tmp_path / "b", _recipe("schedule.epochs=1"), transform_batch=blacken)
    assert plain.fit()["loss"] != black.fit()["loss"]
    assert seen == [f"clip{number}" for number in range(24)]


def _without_clips(batch: ClipBatch) -> ClipBatch:
    tensors = {name: getattr(batch, name)[:0] for name in ("video", "size", "label", "view")}
    return replace(batch, key=[], start_frame=batch.start_frame[:0], **tensors)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda batch: None, "a NoneType"),
        (lambda batch: batch.video, "a Tensor"),
        (_without_clips, "no clips"),
    ],
)
def test_a_hook_that_returns_no_batch_is_said(
    tmp_path: Path, returned: Callable[[ClipBatch], Any], said: str
) -> None:
    wanted = f"transform_batch returned {said}; it must return a ClipBatch"
    with pytest.raises(UsageError, match=wanted):
        _trainer(tmp_path, _recipe(), transform_batch=returned).fit()
    loader = _Loader(CPU, 4)
    with pytest.raises(UsageError, match=wanted):
        evaluate(tiny(3), loader, _recipe(), CPU, num_classes=3, transform_batch=returned)


def test_a_hook_that_cannot_be_called_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="transform_batch is of type int; give a function"):
        _trainer(tmp_path / "out", _recipe(), transform_batch=5)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="transform_batch is of type int; give a function"):
        evaluate(tiny(3), [], _recipe(), CPU, num_classes=3, transform_batch=cast("Any", 5))


class _Detached(torch.nn.Module):
    """A network whose logits do not know where they come from."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layers = tiny(num_classes)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return cast("torch.Tensor", self.layers(clips)).detach()


def test_logits_that_no_weight_can_learn_from_are_said(tmp_path: Path) -> None:
    own = _recipe("model.name=test_train_trainer:_Detached")
    with pytest.raises(UsageError, match=r"_Detached' returned logits that depend on no weight"):
        _trainer(tmp_path, own).fit()


def test_clips_without_a_usable_label_stop_training(tmp_path: Path) -> None:
    def unlabel(batch: ClipBatch) -> ClipBatch:
        return replace(batch, label=torch.tensor([0, -1, 0, 0]))

    with pytest.raises(DatasetError, match="clip1 has no label"):
        _trainer(tmp_path / "a", _recipe(), transform_batch=unlabel).fit()
    unknown = _trainer(tmp_path / "b", _recipe())
    unknown.class_names = ["a", "b"]
    with pytest.raises(DatasetError, match="clip2 has label 2 of 2 classes"):
        unknown.fit()


def test_a_loss_that_is_not_finite_stops_before_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(KprepError, match=r"loss is not finite on rank 0.*lower optim.lr"):
        _trainer(tmp_path, _recipe("optim.name=sgd", "optim.lr=1e30")).fit()
    assert checkpoints_in(tmp_path / "checkpoints") == []


def _poison(
    trainer: Trainer, step: int, times: int = 1, rank: int = 0, factor: float = float("nan")
) -> None:
    """Make the loss of a step NaN, or multiply it, as often as asked."""
    add, left = trainer._exchange.add_loss, [times]

    def poisoned(number: int, loss: torch.Tensor) -> None:
        if number == step and left[0] and trainer.world.rank == rank:
            left[0] -= 1
            loss = loss * factor
        add(number, loss)

    trainer._exchange.add_loss = poisoned  # type: ignore[method-assign]


def test_a_lost_loss_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, _recipe("run.checkpoint_steps=2"))
    _poison(trainer, step=5)
    with pytest.raises(KprepError, match=r"rank 0, at step 5 .* is .*epoch-0000-step-00000002.pt"):
        trainer.fit()
    assert trainer.step == 6


def test_a_lost_loss_is_rolled_back_and_its_step_left_out(tmp_path: Path) -> None:
    recipe = _recipe("run.checkpoint_steps=2", "run.on_nan=rollback", "run.max_rollbacks=2")
    trainer = _trainer(tmp_path, recipe)
    _poison(trainer, step=5)
    assert trainer.fit()["steps"] == 12
    assert trainer._train_loader.loaded == [{"epoch": 0, "step": 2}]
    assert trainer._state.left_out == {4, 5}
    hopeless = _trainer(tmp_path / "b", recipe)
    for step in (3, 5, 7):
        _poison(hopeless, step)
    with pytest.raises(KprepError, match="not finite on rank 0, at step 7"):
        hopeless.fit()


def test_a_killed_run_leaves_out_what_it_would_have_left_out(tmp_path: Path) -> None:
    """Killed between two rollbacks; the second goes back to before steps that the first leaves out."""
    recipe = _recipe("run.checkpoint_steps=2", "run.on_nan=rollback", "run.max_rollbacks=2")
    whole, killed = (_trainer(tmp_path / name, recipe) for name in ("whole", "killed"))
    for trainer in (whole, killed):
        _poison(trainer, step=5)
    _poison(whole, step=7)
    whole.fit()
    run = killed._step.run

    def die(*arguments: Any) -> torch.Tensor:
        if killed.step == 7:
            raise MemoryError
        return run(*arguments)

    killed._step.run = die  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        killed.fit()
    resumed = _trainer(tmp_path / "killed", recipe)
    resumed.restore(checkpoints_in(tmp_path / "killed" / "checkpoints")[-1])
    assert resumed.step == 6
    _poison(resumed, step=7)
    resumed.fit()
    assert resumed._train_loader.loaded == [{"epoch": 1, "step": 0}, {"epoch": 0, "step": 4}]
    _assert_same(_weights(resumed), _weights(whole))
    for trainer in (whole, resumed):
        assert trainer._state.left_out == {4, 5, 6, 7}
        assert trainer._state.rollbacks == 2


def _spoil_weights(trainer: Trainer, step: int) -> None:
    """Let the update of a step, the first time, leave weights that are finite but of no use."""
    run, left = trainer._step.run, [step]

    def spoil(*arguments: Any) -> torch.Tensor:
        loss = run(*arguments)
        if trainer.step in left:
            left.remove(step)
            with torch.no_grad():
                for weight in trainer.model.parameters():
                    weight.mul_(1e30)
        return loss

    trainer._step.run = spoil  # type: ignore[method-assign]


def test_a_checkpoint_of_spoilt_weights_is_not_gone_back_to(tmp_path: Path) -> None:
    """Step 4 spoils them, its checkpoint is written, and the loss of step 5 is lost."""
    recipe = _recipe("run.checkpoint_steps=2", "run.on_nan=rollback", "run.max_rollbacks=1")
    trainer = _trainer(tmp_path, recipe)
    _spoil_weights(trainer, step=4)
    assert trainer.fit()["steps"] == 12
    assert trainer._train_loader.loaded == [{"epoch": 0, "step": 2}]
    left = checkpoints_in(tmp_path / "checkpoints" / "abandoned")
    assert left == [tmp_path / "checkpoints" / "abandoned" / "epoch-0000-step-00000004.pt"]


def test_statistics_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    """They do not show in a loss, since training takes each batch's own, but in evaluation."""
    trainer = _trainer(tmp_path, _recipe("run.checkpoint_steps=2"))
    run = trainer._step.run

    def spoil(*arguments: Any) -> torch.Tensor:
        if trainer.step == 3:
            trainer.model[1].running_var[0] = float("inf")
        return run(*arguments)

    trainer._step.run = spoil  # type: ignore[method-assign]
    with pytest.raises(KprepError, match=r"BatchNorm's statistics, are not finite, at step 4 "):
        trainer.fit()
    assert [path.name for path in checkpoints_in(tmp_path / "checkpoints")] == [
        "epoch-0000-step-00000002.pt"
    ]


def test_a_loss_above_the_limit_is_lost_too(tmp_path: Path) -> None:
    settings = ("run.checkpoint_steps=2", "run.max_loss=50")
    trainer = _trainer(tmp_path / "stop", _recipe(*settings))
    _poison(trainer, step=5, factor=1000)
    sentence = r"the loss is above run.max_loss \(50\) on rank 0 \(\d.*\), at step 5 .*000002.pt"
    with pytest.raises(KprepError, match=sentence):
        trainer.fit()
    again = _trainer(tmp_path / "rollback", _recipe(*settings, "run.on_nan=rollback"))
    _poison(again, step=5, factor=1000)
    assert again.fit()["steps"] == 12
    assert again._state.left_out == {4, 5}
    unlimited = _trainer(tmp_path / "unlimited", _recipe(settings[0]))
    _poison(unlimited, step=5, factor=1000)
    assert unlimited.fit()["steps"] == 12


def test_losses_are_lost_by_rank() -> None:
    assert lost_losses([1.0, 9.0], 0) == lost_losses([1.0, 9.0], 9) == ""
    assert lost_losses([9.5, 1.0, 12.0], 9) == (
        "the loss is above run.max_loss (9) on rank 0 (9.5), 2 (12)"
    )
    assert lost_losses([9.5, float("nan")], 9) == "the loss is not finite on rank 1"


def test_sync_batchnorm_on_a_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs CUDA"):
        _trainer(tmp_path, _recipe("model.sync_batchnorm=true"))


def _fit_ranks(output: str, overrides: tuple[str, ...]) -> None:
    with joined_world("cpu") as world:
        trainer = _trainer(Path(output), _recipe(*overrides), world)
        metrics = trainer.fit()
        Path(output, f"loss{world.rank}").write_text(repr(metrics["loss"]))


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_two_ranks_equal_one_with_the_same_global_batch(tmp_path: Path) -> None:
    frozen = ("model.freeze_batchnorm=true", "optim.name=sgd")
    alone = _trainer(tmp_path / "alone", _recipe(*frozen, "data.batch_size=8"))
    metrics = alone.fit()
    together = (*frozen, "data.batch_size=2", "data.accumulate=2")
    launch(2, _fit_ranks, str(tmp_path / "two"), together)
    losses = [float((tmp_path / "two" / f"loss{rank}").read_text()) for rank in range(2)]
    assert losses[0] == losses[1] == pytest.approx(metrics["loss"], rel=1e-5)
    saved = load_checkpoint(tmp_path / "two" / "final.pt").model
    _assert_same(_weights(alone), saved, rtol=1e-4, atol=1e-6)
    rng = load_checkpoint(tmp_path / "two" / "checkpoints" / "epoch-0002.pt").rng["cpu"]
    assert len(rng) == 2
    assert not torch.equal(rng[0], rng[1])  # dropout must differ between ranks


def _fit_and_resume(output: str) -> None:
    with joined_world("cpu") as world:
        recipe = _recipe("data.batch_size=2", "run.deterministic=true")
        _trainer(Path(output, "whole"), recipe, world).fit()
        resumed = _trainer(Path(output, "cut"), recipe, world)
        resumed.restore(Path(output, "whole/checkpoints/epoch-0001.pt"))
        resumed.fit()


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_three_ranks_that_resume_equal_three_that_were_not_interrupted(tmp_path: Path) -> None:
    """gloo sums three numbers in an order that depends on their place in DDP's messages."""
    launch(3, _fit_and_resume, str(tmp_path))
    whole, cut = (load_checkpoint(tmp_path / name / "final.pt") for name in ("whole", "cut"))
    _assert_same(whole.model, cut.model)


@dataclass(frozen=True)
class _Trouble:
    """What goes wrong on the last rank, and after which step all ranks stop."""

    kind: str
    at: int
    step: int
    message: str


# A loss arrives while the step after it is under way; everything else ends the step it comes in.
TROUBLES = (
    _Trouble("nan", at=2, step=3, message="the loss is not finite on rank {last}, at step 2"),
    _Trouble("loader", at=3, step=3, message="worker gone"),
    _Trouble("worker", at=2, step=2, message="clip of step 2 is damaged"),
    _Trouble("SIGUSR1", at=2, step=2, message="stopped by SIGUSR1 after step 2; the checkpoint"),
    _Trouble("SIGTERM", at=3, step=3, message="stopped by SIGTERM after step 3; the checkpoint"),
)


class _Clips(torch.utils.data.Dataset):
    """A rank's batches, loaded by a worker process that meets a damaged clip."""

    def __init__(self, loader: _Loader, damaged: int) -> None:
        self._batches, self._damaged = list(loader), damaged

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, step: int) -> ClipBatch:
        if step == self._damaged:
            raise ValueError(f"clip of step {step} is damaged")
        return self._batches[step]


class _WorkerLoader(_Loader):
    damaged = -1

    def __iter__(self) -> Iterator[ClipBatch]:
        clips = _Clips(_Loader(World(self._rank, 1, CPU.device, None), 2), self.damaged)
        yield from torch.utils.data.DataLoader(clips, batch_size=None, num_workers=1)


def _make_trouble(trainer: Trainer, trouble: _Trouble) -> None:
    last = trainer.world.size - 1
    if trouble.kind == "nan":
        _poison(trainer, trouble.at, rank=last)
    if trainer.world.rank != last:
        return
    if trouble.kind == "loader":
        trainer._train_loader.fails_at = trouble.at
    if trouble.kind == "worker":
        trainer._train_loader = _WorkerLoader(trainer.world, 2)
        trainer._train_loader.damaged = trouble.at
    if trouble.kind.startswith("SIG"):
        run = trainer._step.run

        def send(*arguments: Any) -> torch.Tensor:
            if trainer.step == trouble.at:
                os.kill(os.getpid(), getattr(signal, trouble.kind))
            return run(*arguments)

        trainer._step.run = send  # type: ignore[method-assign]


def _fit_in_troubles(output: str) -> None:
    torch.set_num_threads(1)
    with joined_world("cpu") as world:
        for trouble in TROUBLES:
            recipe = _recipe("data.batch_size=2", "run.checkpoint_steps=100")
            trainer = _trainer(Path(output, trouble.kind), recipe, world)
            _make_trouble(trainer, trouble)
            try:
                trainer.fit()
            except (KprepError, RuntimeError, ValueError) as error:
                place = Path(output, trouble.kind, f"rank{world.rank}")
                place.write_text(json.dumps([trainer.step, str(error)]))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_stop_at_the_same_step(tmp_path: Path, size: int) -> None:
    """A rank that was left in a collective would wait for half an hour."""
    launch(size, _fit_in_troubles, str(tmp_path))
    for trouble in TROUBLES:
        output = tmp_path / trouble.kind
        for rank in range(size):
            step, error = json.loads((output / f"rank{rank}").read_text())
            assert step == trouble.step, trouble.kind
            assert trouble.message.format(last=size - 1) in error
        saved = checkpoints_in(output / "checkpoints")
        if trouble.kind == "nan":
            assert saved == []
        else:
            assert load_checkpoint(saved[-1]).step == trouble.step


def _wait_for_the_others() -> None:
    """What NCCL's destructors do while another rank's kernel waits for this one."""
    time.sleep(3600)


def _fail_alone(output: str, error: Exception) -> None:
    """Rank 1 cannot transform its third batch."""
    torch.set_num_threads(1)
    torch.distributed.destroy_process_group = _wait_for_the_others
    atexit.register(_wait_for_the_others)
    batches = itertools.count(1)

    def transform(batch: ClipBatch) -> ClipBatch:
        if next(batches) == 3 and os.environ["RANK"] == "1":
            raise error
        return batch

    with joined_world("cpu") as world:
        recipe = _recipe("data.batch_size=2")
        _trainer(Path(output), recipe, world, transform_batch=transform).fit()


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ValueError("no such clip"), KprepError,
         "^process 1 of 2 failed:(.|\n)*ValueError: no such clip\n$"),
        (UsageError("rank 1 cannot do that"), UsageError, "^rank 1 cannot do that$"),
    ],
)  # fmt: skip
def test_a_rank_that_fails_alone_in_a_step_waits_for_nobody(
    tmp_path: Path, error: Exception, kind: type[KprepError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        launch(2, _fail_alone, str(tmp_path), error)
    assert not (tmp_path / "final.pt").exists()


def _fail_together(output: str) -> None:
    destroy, destroyed = torch.distributed.destroy_process_group, []
    torch.distributed.destroy_process_group = lambda: (destroyed.append(1), destroy())
    with pytest.raises(UsageError, match="one of us"), joined_world("cpu") as world:
        raise_together(world, UsageError("one of us") if world.is_first else None)
    Path(output, str(os.environ["RANK"])).write_text(str(len(destroyed)))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_ranks_that_fail_together_leave_together(tmp_path: Path) -> None:
    launch(2, _fail_together, str(tmp_path))
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["1", "1"]


def test_a_network_that_cannot_be_written_is_raised_on_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Exception | None] = []
    monkeypatch.setattr("train.agreement.raise_together", lambda _, error: told.append(error))
    trainer = _trainer(tmp_path, _recipe())
    (tmp_path / "final.pt").mkdir()
    trainer._files.save_network(trainer._state._checkpoint(None, {}, {}), best=False)
    assert [str(error)[:10] for error in told] == ["checkpoint"]


def test_a_full_disk_is_no_mistake_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.output.note_launch", fill)
    with pytest.raises(StorageError, match=r"^--output .* cannot be written \(No space left"):
        _trainer(tmp_path, _recipe("schedule.epochs=1")).fit()
