from __future__ import annotations

import os
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prep.errors import KprepError, UsageError
from train.checkpoint import (
    Checkpoint,
    abandon_checkpoints,
    check_class_names,
    checkpoint_before,
    checkpoint_path,
    checkpoints_in,
    find_checkpoint,
    load_checkpoint,
    rotate_checkpoints,
    save_checkpoint,
)
from train.distributed import World
from train.output import RunOutput
from train.recipe import Recipe

SAVED = Checkpoint(
    epoch=3,
    step=12,
    model={"weight": torch.arange(4.0)},
    optimizer={"state": {0: {"momentum_buffer": torch.ones(4)}}, "param_groups": [{"lr": 0.1}]},
    recipe='name = "x"\n',
    class_names=["a", "b"],
    loader={"epoch": 2, "step": 4},
    rng={"cpu": torch.get_rng_state()[None]},
)


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path / "new", 3)
    save_checkpoint(path, SAVED)
    found = load_checkpoint(path)
    assert torch.equal(found.model["weight"], SAVED.model["weight"])
    assert torch.equal(found.rng["cpu"], SAVED.rng["cpu"])
    assert found.optimizer["param_groups"] == [{"lr": 0.1}]
    same = {"model": {}, "optimizer": None, "rng": {}}
    assert replace(found, **same) == replace(SAVED, **same)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint_path(tmp_path, 3)
    save_checkpoint(path, SAVED)
    before = path.read_bytes()

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(KprepError, match=r"epoch-0003.pt cannot be written: .*No space left"):
        save_checkpoint(path, replace(SAVED, step=99))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_disk_that_is_full_in_the_middle_of_a_write_is_one_sentence(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 1)
    large = replace(SAVED, model={"weight": torch.zeros(1_000_000)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))
    try:
        with pytest.raises(KprepError, match=r"epoch-0001.pt cannot be written: .*File too large"):
            save_checkpoint(path, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for epoch in (1, 2, 9, 10, 10_000):
        checkpoint_path(tmp_path, epoch).touch()
    foreign = [tmp_path / name for name in ("notes.pt", ".notes.pt.7.tmp", ".epoch-x.pt.7.tmp")]
    cut_off = [".epoch-0009.pt.7.tmp", ".epoch-0009-step-00000012.pt.7.tmp", ".best.pt.7.tmp"]
    for path in (*foreign, *(tmp_path / name for name in cut_off)):
        path.touch()
    rotate_checkpoints(tmp_path, keep=2)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["epoch-0010.pt", "epoch-10000.pt"]
    assert all(path.exists() for path in foreign)
    assert len(list(tmp_path.iterdir())) == 2 + len(foreign)


def test_checkpoints_in_mid_epoch_stand_between_those_of_epochs(tmp_path: Path) -> None:
    wanted = [(0, 9), (0, 10), (1, None), (1, 13), (2, None)]
    for epoch, step in reversed(wanted):
        checkpoint_path(tmp_path, epoch, step).touch()
    (tmp_path / "best.pt").touch()
    assert checkpoints_in(tmp_path) == [checkpoint_path(tmp_path, *place) for place in wanted]


@pytest.mark.parametrize(
    ("step", "found"), [(10, 1), (9, 0), (11, 2), (13, 3), (99, 4), (1, 4), (0, 4)]
)
def test_the_newest_checkpoint_before_a_step(tmp_path: Path, step: int, found: int) -> None:
    """Six steps an epoch; where none is older, the newest one is better than nothing."""
    assert checkpoint_before(tmp_path, 5, 6) is None
    paths = [checkpoint_path(tmp_path, *place) for place in [(0, 5), (1, 9), (1, 10), (2, None)]]
    paths.append(checkpoint_path(tmp_path, 2, 13))
    for path in paths:
        path.touch()
    assert checkpoint_before(tmp_path, step, 6) == paths[found]


@pytest.mark.parametrize(
    ("epoch", "step", "kept"), [(0, None, 0), (1, None, 3), (1, 13, 4), (2, None, 5)]
)
def test_checkpoints_beyond_one_are_moved_aside(
    tmp_path: Path, epoch: int, step: int | None, kept: int
) -> None:
    places = [(0, 9), (0, 10), (1, None), (1, 13), (2, None), (3, 25)]
    paths = [checkpoint_path(tmp_path, *place) for place in places]
    for path in paths:
        path.touch()
    (tmp_path / "best.pt").touch()
    moved = abandon_checkpoints(tmp_path, epoch, step)
    assert checkpoints_in(tmp_path) == paths[:kept]
    assert moved == checkpoints_in(tmp_path / "abandoned")
    assert [path.name for path in moved] == [path.name for path in paths[kept:]]
    assert (tmp_path / "best.pt").exists()
    assert abandon_checkpoints(tmp_path, epoch, step) == []


@pytest.mark.parametrize(
    ("epoch", "step", "is_beyond"),
    [(2, None, True), (2, 11, True), (3, None, False), (3, 13, False), (4, None, False)],
)
def test_the_best_network_is_moved_with_the_way_it_is_of(
    tmp_path: Path, epoch: int, step: int | None, *, is_beyond: bool
) -> None:
    """SAVED is the network after three epochs."""
    save_checkpoint(tmp_path / "best.pt", SAVED)
    moved = [tmp_path / "abandoned" / "best.pt"] if is_beyond else []
    assert abandon_checkpoints(tmp_path, epoch, step) == moved
    assert (tmp_path / "best.pt").exists() != is_beyond


def _evaluate(files: RunOutput, epoch: int, top1: float) -> bool:
    """As the trainer does after an epoch of four steps."""
    if is_best := files.is_best(top1):
        files.save_network(replace(SAVED, epoch=epoch, step=4 * epoch), best=True)
    (files._directory / f"evaluation/epoch-{epoch:04d}").mkdir(parents=True)
    files.write("eval", step=4 * epoch, video_top1=top1)
    return is_best


def test_after_going_back_the_best_network_is_one_of_the_new_way(tmp_path: Path) -> None:
    world = World(0, 1, torch.device("cpu"), None)
    best = tmp_path / "checkpoints" / "best.pt"
    files = RunOutput(tmp_path, world, Recipe())
    files.open(0, 0, in_epoch=False)
    found = [_evaluate(files, epoch, top1) for epoch, top1 in ((1, 0.3), (2, 0.4), (3, 0.9))]
    assert found == [True, True, True]
    again = RunOutput(tmp_path, world, Recipe())
    again.open(4, 1, in_epoch=False)  # the network after epoch 1 is gone, best.pt was that of 3
    assert load_checkpoint(best.parent / "abandoned" / "best.pt").epoch == 3
    assert _evaluate(again, 2, 0.25)
    assert not _evaluate(again, 3, 0.2)
    resumed = RunOutput(tmp_path, world, Recipe())
    resumed.open(12, 3, in_epoch=False)
    assert load_checkpoint(best).epoch == 2
    assert not _evaluate(resumed, 4, 0.25)
    assert _evaluate(resumed, 5, 0.28)
    assert load_checkpoint(best).epoch == 5
    evaluations = tmp_path / "evaluation"
    names = [f"epoch-{epoch:04d}" for epoch in range(1, 6)]
    assert sorted(path.name for path in evaluations.iterdir()) == ["abandoned", *names]
    left = sorted(path.name for path in (evaluations / "abandoned").iterdir())
    assert left == ["epoch-0002", "epoch-0003"]


def test_which_checkpoint_resume_means(tmp_path: Path) -> None:
    directory = tmp_path / "run" / "checkpoints"
    assert find_checkpoint("auto", directory) is None
    directory.mkdir(parents=True)
    assert find_checkpoint("auto", directory) is None
    with pytest.raises(UsageError, match="no checkpoint in this directory"):
        find_checkpoint(str(tmp_path / "run"), directory)
    newest = checkpoint_path(directory, 2)
    newest.touch()
    checkpoint_path(directory, 1).touch()
    (directory / ".epoch-0003.pt.77.tmp").touch()  # a write that was cut off
    assert find_checkpoint("auto", directory) == newest
    assert find_checkpoint(str(tmp_path / "run"), tmp_path) == newest
    assert find_checkpoint(str(directory), tmp_path) == newest
    assert find_checkpoint("other.pt", directory) == Path("other.pt")


class _Harmful:
    """Would touch a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load_checkpoint(tmp_path / "none.pt")
    path = tmp_path / "x.pt"
    torch.save({"model": {}}, path)
    with pytest.raises(UsageError, match="not a checkpoint of kprep"):
        load_checkpoint(path)
    for damaged in (b"", b"hello", b"PK\x03\x04" + bytes(100)):
        path.write_bytes(damaged)
        with pytest.raises(KprepError, match=r"x.pt cannot be read"):
            load_checkpoint(path)
    save_checkpoint(path, SAVED)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(KprepError, match=r"x.pt cannot be read"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"lora": 1}, "'lora'"),
        ({"loader": "{"}, "damaged"),
        ({"loader": 3}, "damaged"),
        ({"loader": "[]"}, "loader is of type list"),
        ({"recipe": 5}, "recipe is of type int"),
        ({"epoch": "x"}, "epoch is of type str"),
        ({"step": True}, "step is of type bool"),
        ({"model": "x"}, "model is of type str"),
        ({"class_names": [1]}, "class_names holds no"),
        ({"left_out": [True]}, "left_out holds no"),
        ({"rng": {"cpu": torch.zeros(3)}}, "rng holds no"),
    ],
)
def test_a_checkpoint_of_another_version_is_one_sentence(
    tmp_path: Path, change: dict[str, object], cause: str
) -> None:
    path = checkpoint_path(tmp_path, 3)
    save_checkpoint(path, SAVED)
    values = torch.load(path, weights_only=True)
    torch.save({**values, **change}, path)
    with pytest.raises(KprepError, match=f"epoch-0003.pt is of another version of kprep.*{cause}"):
        load_checkpoint(path)


def test_an_older_checkpoint_leaves_out_nothing(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 3)
    save_checkpoint(path, replace(SAVED, left_out=[13, 14], rollbacks=1))
    values = torch.load(path, weights_only=True)
    assert (load_checkpoint(path).left_out, load_checkpoint(path).rollbacks) == ([13, 14], 1)
    del values["left_out"], values["rollbacks"]
    torch.save(values, path)
    assert (load_checkpoint(path).left_out, load_checkpoint(path).rollbacks) == ([], 0)


@pytest.mark.parametrize("name", ["loader", "rng"])
def test_a_checkpoint_without_a_field_is_one_sentence(tmp_path: Path, name: str) -> None:
    path = checkpoint_path(tmp_path, 3)
    save_checkpoint(path, SAVED)
    values = torch.load(path, weights_only=True)
    del values[name]
    torch.save(values, path)
    with pytest.raises(KprepError, match=f"is of another version of kprep.*{name}"):
        load_checkpoint(path)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 3)
    weight = torch.arange(1000.0)
    save_checkpoint(path, replace(SAVED, model={"weight": weight}))
    data = bytearray(path.read_bytes())
    data[data.index(weight.numpy().tobytes()) + 2003] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(KprepError, match=r"epoch-0003.pt cannot be read \(.* in it is altered\)"):
        load_checkpoint(path)


def test_loading_executes_nothing(tmp_path: Path) -> None:
    path, touched = tmp_path / "x.pt", tmp_path / "touched"
    torch.save({"format": "kprep-checkpoint-1", "model": _Harmful(touched)}, path)
    with pytest.raises(KprepError, match="cannot be read"):
        load_checkpoint(path)
    assert not touched.exists()


def test_other_classes_are_refused_by_name() -> None:
    path = Path("x.pt")
    check_class_names(["a", "b"], ["a", "b"], path)
    with pytest.raises(UsageError, match="class 1 is 'b', the dataset's 'c'"):
        check_class_names(["a", "b"], ["a", "c"], path)
    with pytest.raises(UsageError, match="2 classes, the dataset 3"):
        check_class_names(["a", "b"], ["a", "b", "c"], path)
