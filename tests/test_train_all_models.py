"""Each of torchvision's nine networks: a step, an evaluation, a checkpoint, other classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from test_train_trainer import CPU, _Loader

from stream import ClipBatch
from train.checkpoint import checkpoint_path, load_checkpoint, save_checkpoint
from train.models import TORCHVISION_MODELS
from train.param_groups import head_names
from train.recipe import Recipe, recipe_from_dict
from train.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.usefixtures("one_thread")]

# frames and side of the smallest clips that are worth a test; S3D takes none below 13 x 209
SMALL = {"s3d": (13, 209), "mvit_v1_b": (4, 48), "mvit_v2_s": (4, 48)}


class _TwoClips(_Loader):
    """One step an epoch, of two clips."""

    def __init__(self, recipe: Recipe, class_names: list[str]) -> None:
        super().__init__(CPU, 2)
        self.num_clips = self.num_videos = 2
        self.steps_per_epoch, self.class_names = 1, class_names
        self._shape = (2, recipe.data.frames, 32, 40, 3)

    def __iter__(self) -> Iterator[ClipBatch]:
        generator = torch.Generator().manual_seed(1)
        yield ClipBatch(
            video=torch.randint(0, 256, self._shape, dtype=torch.uint8, generator=generator),
            size=torch.tensor([[32, 40], [32, 40]]),
            label=torch.tensor([0, 1]),
            key=["clip0", "clip1"],
            start_frame=torch.zeros(2, dtype=torch.int64),
            view=torch.zeros(2, dtype=torch.int64),
            layout="rgb",
        )


def _recipe(name: str) -> Recipe:
    frames, side = SMALL.get(name, (4, 32))
    sections: dict[str, dict[str, Any]] = {
        "data": {"frames": frames, "batch_size": 2, "workers": 0},
        "model": {"name": name},
        "optim": {"lr": 0.001, "lr_batch": 2},
        "augment": {"resize": [side, side], "crop": [side, side]},
    }
    return recipe_from_dict(sections)


def _trainer(output: Path, name: str, class_names: list[str]) -> Trainer:
    recipe = _recipe(name)
    loaders = [_TwoClips(recipe, class_names) for _ in "ab"]
    return Trainer(recipe, CPU, *loaders, output)


def _step(trainer: Trainer) -> float:
    (batch,) = trainer._training_loader()
    trainer.model.train()
    return float(trainer._step.run([batch], 0.001, 0))


@pytest.mark.parametrize("name", TORCHVISION_MODELS)
def test_a_network_trains_scores_is_saved_and_gets_other_classes(tmp_path: Path, name: str) -> None:
    trainer = _trainer(tmp_path, name, ["a", "b", "c"])
    before = {key: value.clone() for key, value in trainer.model.named_parameters()}
    # log(3) for a network that knows nothing, which torchvision's random ones nearly are
    assert 0.1 < _step(trainer) < 10
    still = [
        key for key, value in trainer.model.named_parameters() if torch.equal(value, before[key])
    ]
    # biases of keys shift all products of a query alike: softmax gives them no gradient
    assert all("bias" in key or "rel_pos" in key or "table" in key for key in still), still
    accuracy, scores = trainer.evaluate()
    assert accuracy.videos == 2

    path = checkpoint_path(tmp_path, 0, 1)
    trainer._state.step = 1
    optimizer = trainer._state.optimizer.state_dict()
    save_checkpoint(path, trainer._state._checkpoint(optimizer, {"epoch": 0, "step": 1}, {}))
    saved = load_checkpoint(path)
    assert saved.class_names == ["a", "b", "c"]
    for value in trainer.model.state_dict().values():
        value.zero_()
    trainer._state.optimizer.state.clear()
    trainer.restore(path)
    torch.testing.assert_close(trainer.model.state_dict(), saved.model, rtol=0, atol=0)
    momenta = trainer._state.optimizer.state_dict()["state"]
    torch.testing.assert_close(momenta, saved.optimizer["state"], rtol=0, atol=0)
    again, scores_again = trainer.evaluate()
    assert again == accuracy
    assert torch.equal(scores.probability, scores_again.probability)

    other = _trainer(tmp_path / "other", name, ["b", "x", "c", "y", "a"])
    other.start_from(str(path))
    head = set(head_names(other.model))
    for key, value in other.model.state_dict().items():
        assert key in head or torch.equal(value, saved.model[key])
    assert {len(other.model.state_dict()[key]) for key in head} == {5}
    assert 0.1 < _step(other) < 10
