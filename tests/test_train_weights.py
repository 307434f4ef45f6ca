from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.error import URLError

import pytest
import torch
from test_train_trainer import _recipe, _trainer
from torch import nn
from torchvision.models.video import R3D_18_Weights

from prep.errors import KprepError, UsageError
from train.models import build_model, freeze_weights, set_training, tiny
from train.recipe import load_recipe
from train.weights import Weights, find_weights, head_names, load_weights

if TYPE_CHECKING:
    from pathlib import Path


def _weights(classes: list[str] | None, count: int = 3) -> Weights:
    torch.manual_seed(5)
    return Weights("w.pt", dict(tiny(count).state_dict()), classes)


def _predictions(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return model.eval()(torch.rand(4, 3, 4, 16, 16))


def test_the_same_names_in_another_order_give_the_same_answers_by_name() -> None:
    old, new = tiny(3), tiny(3)
    weights = _weights(["run", "swim", "jump"])
    old.load_state_dict(weights.tensors)
    report = load_weights(new, weights, ["jump", "run", "swim"])
    wanted = _predictions(old)[:, [2, 0, 1]]
    torch.testing.assert_close(_predictions(new), wanted, rtol=0, atol=0)
    assert "head's rows were permuted" in str(report)
    assert (report.skipped, report.fresh) == ([], [])
    same = load_weights(new, weights, ["run", "swim", "jump"])
    torch.testing.assert_close(_predictions(new), _predictions(old), rtol=0, atol=0)
    assert "the same classes" in str(same)
    assert f"{len(new.state_dict())} tensors loaded" in str(same)


def test_as_many_but_other_classes_are_refused_with_the_difference() -> None:
    weights = _weights(["run", "swim", "jump"])
    with pytest.raises(UsageError, match=r"lacks fly; the dataset lacks swim; .*new_head=true"):
        load_weights(tiny(3), weights, ["run", "fly", "jump"])
    report = load_weights(tiny(3), weights, ["run", "fly", "jump"], new_head=True)
    assert report.skipped == report.fresh == sorted(head_names(tiny(3)))


def test_another_number_of_classes_gets_a_new_head() -> None:
    model = tiny(5)
    before = {name: model.state_dict()[name].clone() for name in head_names(model)}
    report = load_weights(model, _weights(["a", "b", "c"]), list("abcde"))
    assert len(before) == 2
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)
    assert report.fresh == sorted(before)
    assert "a new head for 5 classes" in str(report)
    assert torch.equal(model.state_dict()["0.weight"], _weights(None).tensors["0.weight"])


def test_weights_of_another_network_are_refused_and_extra_ones_listed() -> None:
    weights = _weights(None)
    extra = Weights("w.pt", weights.tensors | {"teacher.weight": torch.ones(1)}, None)
    report = load_weights(tiny(3), extra, ["a", "b", "c"])
    assert report.skipped == ["teacher.weight"]
    assert "order is taken on trust" in str(report)
    fewer = {name: value for name, value in weights.tensors.items() if name != "0.weight"}
    with pytest.raises(UsageError, match=r"missing 0.weight; .*set model.name"):
        load_weights(tiny(3), Weights("w.pt", fewer, None), ["a", "b", "c"])
    wrong = weights.tensors | {"0.weight": torch.ones(1)}
    with pytest.raises(UsageError, match=r"of another shape 0.weight \[1\] for \[16, 3"):
        load_weights(tiny(3), Weights("w.pt", wrong, None), ["a", "b", "c"])


@pytest.mark.parametrize("form", ["plain", "model", "module."])
def test_files_of_others_are_read(tmp_path: Path, form: str) -> None:
    path, tensors = tmp_path / "w.pth", tiny(3).state_dict()
    if form == "module.":
        saved: object = {f"module.{name}": value for name, value in tensors.items()}
    else:
        saved = {"model": tensors, "epoch": 3} if form == "model" else tensors
    torch.save(saved, path)
    found = find_weights(str(path))
    assert found.tensors.keys() == tensors.keys()
    assert found.class_names is None


def test_what_is_no_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.pth"
    for damaged, kind in ((b"hello", KprepError), (b"", KprepError)):
        path.write_bytes(damaged)
        with pytest.raises(kind, match="cannot be read"):
            find_weights(str(path))
    torch.save({"epoch": 3}, path)
    with pytest.raises(UsageError, match="holds no state dict"):
        find_weights(str(path))
    with pytest.raises(UsageError, match="neither a file nor a name"):
        find_weights("resnet")
    with pytest.raises(UsageError, match="torchvision has no such weights"):
        find_weights("R3D_18_Weights.KINETICS900")

    def offline(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    name = "R3D_18_Weights.KINETICS400_V1"
    with pytest.raises(UsageError, match=r"r3d_18-\w+.pth is not there, .*put https://") as caught:
        find_weights(name)
    assert R3D_18_Weights.KINETICS400_V1.url in str(caught.value)


def test_training_begins_with_a_checkpoint_of_ours(tmp_path: Path) -> None:
    recipe = _recipe("model.ema_decay=0.5")
    _trainer(tmp_path / "a", recipe).fit()
    begun = _trainer(tmp_path / "b", recipe)
    begun.class_names = ["c", "a", "b"]
    begun.start_from(str(tmp_path / "a" / "final.pt"))
    saved = torch.load(tmp_path / "a" / "final.pt", weights_only=True)
    assert torch.equal(begun.model.state_dict()["0.weight"], saved["ema"]["0.weight"])
    bias = head_names(begun.model)[-1]
    assert torch.equal(begun.model.state_dict()[bias], saved["ema"][bias][[2, 0, 1]])
    assert torch.equal(begun._average.model.state_dict()[bias], begun.model.state_dict()[bias])
    assert begun.step == 0
    begun.class_names = ["c", "a", "d"]
    with pytest.raises(UsageError, match="lacks d; the dataset lacks b"):
        begun.start_from(str(tmp_path / "a" / "final.pt"))


def test_frozen_weights_stay_as_they_were(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, _recipe('model.freeze=["0.*", "1.*"]', "schedule.epochs=1"))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.fit()
    for name, value in trainer.model.state_dict().items():
        is_frozen = name.startswith(("0.", "1."))
        assert torch.equal(before[name], value) == is_frozen, name
    model = tiny(3)
    with pytest.raises(UsageError, match=r"model.freeze 'layer1.\*' matches no weight"):
        freeze_weights(model, ["layer1.*"])
    with pytest.raises(UsageError, match="leaves nothing to train"):
        freeze_weights(model, ["*"])


def test_only_batchnorm_that_is_frozen_keeps_its_statistics() -> None:
    model = build_model(load_recipe("tiny", ['model.freeze=["1.*"]']), num_classes=3)
    set_training(model, freeze_batchnorm=False)
    modes = [layer.training for layer in model.modules() if isinstance(layer, nn.BatchNorm3d)]
    assert modes == [False, True, True, True]
