from __future__ import annotations

import argparse
from dataclasses import fields
from typing import TYPE_CHECKING
from urllib.error import URLError

import pytest
import torch
from test_train_trainer import CPU, _Loader, _recipe, _trainer
from torch import nn
from torchvision.models import swin_t
from torchvision.models.video import R3D_18_Weights, swin3d_t

from prep.errors import KprepError, UsageError
from train.checkpoint import checkpoints_in, load_checkpoint
from train.models import build_model, freeze_weights, set_training, tiny
from train.recipe import ModelRecipe, load_recipe
from train.run_state import _EVALUATED_WITH
from train.trainer import Trainer
from train.weights import Weights, find_weights, head_names, load_weights

if TYPE_CHECKING:
    from collections.abc import Callable
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
    report = load_weights(new, weights, ["jump", "run", "swim"], ModelRecipe())
    wanted = _predictions(old)[:, [2, 0, 1]]
    torch.testing.assert_close(_predictions(new), wanted, rtol=0, atol=0)
    assert "head's rows were permuted" in str(report)
    assert (report.skipped, report.fresh) == ([], [])
    same = load_weights(new, weights, ["run", "swim", "jump"], ModelRecipe())
    torch.testing.assert_close(_predictions(new), _predictions(old), rtol=0, atol=0)
    assert "the same classes" in str(same)
    assert f"{len(new.state_dict())} tensors loaded" in str(same)


def test_as_many_but_other_classes_are_refused_with_the_difference() -> None:
    weights = _weights(["run", "swim", "jump"])
    with pytest.raises(UsageError, match=r"lacks fly; the dataset lacks swim; .*new_head=true"):
        load_weights(tiny(3), weights, ["run", "fly", "jump"], ModelRecipe())
    report = load_weights(tiny(3), weights, ["run", "fly", "jump"], ModelRecipe(new_head=True))
    assert report.skipped == report.fresh == sorted(head_names(tiny(3)))


def test_another_number_of_classes_gets_a_new_head() -> None:
    model = tiny(5)
    before = {name: model.state_dict()[name].clone() for name in head_names(model)}
    report = load_weights(model, _weights(["a", "b", "c"]), list("abcde"), ModelRecipe())
    assert len(before) == 2
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)
    assert report.fresh == sorted(before)
    assert "a new head for 5 classes" in str(report)
    assert torch.equal(model.state_dict()["0.weight"], _weights(None).tensors["0.weight"])


REMAP = ModelRecipe(remap_classes=True)


@pytest.mark.parametrize(
    ("saved", "present", "drawn"),
    [
        (["run", "swim", "jump"], ["run", "fly", "jump"], ["fly"]),  # renamed
        (["run", "swim", "jump"], ["swim", "run"], []),  # a subset, permuted
        (["run", "swim"], ["dive", "swim", "fly", "run"], ["dive", "fly"]),  # a superset
    ],
)
def test_rows_are_taken_by_name(saved: list[str], present: list[str], drawn: list[str]) -> None:
    weights, new = _weights(saved, len(saved)), tiny(len(present))
    fresh = {name: new.state_dict()[name].clone() for name in head_names(new)}
    report = load_weights(new, weights, present, REMAP)
    assert report.drawn == drawn
    assert report.fresh == report.skipped == []
    for name in head_names(new):
        for row, known in enumerate(present):
            wanted = fresh[name][row]
            if known in saved:
                wanted = weights.tensors[name][saved.index(known)]
            assert torch.equal(new.state_dict()[name][row], wanted)
    taken = len(present) - len(drawn)
    assert f"{taken} of the head's {len(present)} rows taken by name" in str(report)
    assert f"rows drawn at random: {', '.join(drawn) or 'nothing'};" in str(report)
    unused = sorted(set(saved) - set(present))
    assert f"rows not used: {', '.join(unused) or 'nothing'}" in str(report)


def test_names_that_are_not_the_same_are_not_taken() -> None:
    weights = _weights(["run", "swim", "jump"])
    with pytest.raises(UsageError, match="no row for any of the dataset's classes"):
        load_weights(tiny(2), weights, ["Run", "swim "], REMAP)
    with pytest.raises(UsageError, match="names no classes, so model.remap_classes cannot tell"):
        load_weights(tiny(3), _weights(None), ["run", "swim", "jump"], REMAP)
    with pytest.raises(UsageError, match="exclude each other"):
        load_recipe("tiny", ["model.remap_classes=true", "model.new_head=true"])


def test_a_new_head_says_which_names_it_could_have_kept() -> None:
    report = load_weights(tiny(4), _weights(["a", "b", "c"]), ["c", "d", "e", "a"], ModelRecipe())
    assert "a new head for 4 classes (2 of them are the weights' too" in str(report)


def test_weights_of_another_network_are_refused_and_extra_ones_listed() -> None:
    weights = _weights(None)
    extra = Weights("w.pt", weights.tensors | {"teacher.weight": torch.ones(1)}, None)
    report = load_weights(tiny(3), extra, ["a", "b", "c"], ModelRecipe())
    assert report.skipped == ["teacher.weight"]
    assert "order is taken on trust" in str(report)
    fewer = {name: value for name, value in weights.tensors.items() if name != "0.weight"}
    with pytest.raises(UsageError, match=r"missing 0.weight; .*set model.name"):
        load_weights(tiny(3), Weights("w.pt", fewer, None), ["a", "b", "c"], ModelRecipe())
    wrong = weights.tensors | {"0.weight": torch.ones(1)}
    with pytest.raises(UsageError, match=r"of another shape 0.weight \[1\] for \[16, 3"):
        load_weights(tiny(3), Weights("w.pt", wrong, None), ["a", "b", "c"], ModelRecipe())


@pytest.mark.parametrize("form", ["plain", "model"])
def test_files_of_others_are_read(tmp_path: Path, form: str) -> None:
    path, tensors = tmp_path / "w.pth", tiny(3).state_dict()
    saved = {"model": tensors, "epoch": 3} if form == "model" else tensors
    torch.save(saved, path)
    found = find_weights(str(path))
    assert found.tensors.keys() == tensors.keys()
    assert found.class_names is None


def test_the_reference_scripts_checkpoints_are_read(tmp_path: Path) -> None:
    """What torchvision's video_classification/train.py saves."""
    model = tiny(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [20, 30, 40])
    saved = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "epoch": 44,
        "args": argparse.Namespace(model="r2plus1d_18", lr=0.64, lr_milestones=[20, 30, 40]),
    }
    torch.save(saved, tmp_path / "checkpoint.pth")
    found = find_weights(str(tmp_path / "checkpoint.pth"))
    torch.testing.assert_close(found.tensors, dict(model.state_dict()), rtol=0, atol=0)


def test_what_else_a_file_holds_is_named_with_a_way_out(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    for other, name in ((path, "PosixPath"), (torch.nn.ReLU(), "torch.nn.modules.*ReLU")):
        torch.save({"model": tiny(3).state_dict(), "other": other}, path)
        message = rf"it holds \S*{name}, and only .*; save its state dict alone, torch.save\("
        with pytest.raises(KprepError, match=message) as caught:
            find_weights(str(path))
        assert str(caught.value).isprintable()
        with pytest.raises(KprepError, match=rf"it holds \S*{name}, .* older one") as caught:
            load_checkpoint(path)
        assert str(caught.value).isprintable()


class _Child(nn.Module):
    """A network with a child of its own that has the name of DDP's."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(4, 3)


@pytest.mark.parametrize("build", [_Child, lambda: tiny(3)])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."]
)
def test_prefixes_of_ddp_and_the_compiler_are_no_part_of_a_name(
    build: Callable[[], nn.Module], prefix: str
) -> None:
    source, model = build(), build()
    tensors = {prefix + name: value for name, value in source.state_dict().items()}
    report = load_weights(model, Weights("w.pt", tensors, None), ["a", "b", "c"], ModelRecipe())
    assert (report.fresh, report.skipped) == ([], [])
    torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)


class _Wide(nn.Module):
    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Conv3d(3, width, 1)
        self.head = nn.Linear(width, num_classes)


def test_rows_of_a_head_of_another_width_are_refused() -> None:
    weights = Weights("w.pt", _Wide(16, 4).state_dict(), ["a", "b", "c", "d"])
    with pytest.raises(UsageError, match=r"another width \(head.weight \[4, 16\] for \[3, 8\]\)"):
        load_weights(_Wide(8, 3), weights, ["a", "b", "z"], ModelRecipe(remap_classes=True))


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
    begun._state._class_names = ["c", "a", "b"]
    begun.start_from(str(tmp_path / "a" / "final.pt"))
    saved = torch.load(tmp_path / "a" / "final.pt", weights_only=True)
    assert torch.equal(begun.model.state_dict()["0.weight"], saved["ema"]["0.weight"])
    bias = head_names(begun.model)[-1]
    assert torch.equal(begun.model.state_dict()[bias], saved["ema"][bias][[2, 0, 1]])
    assert torch.equal(
        begun._state.average.model.state_dict()[bias], begun.model.state_dict()[bias]
    )
    assert begun.step == 0
    begun._state._class_names = ["c", "a", "d"]
    with pytest.raises(UsageError, match="lacks d; the dataset lacks b"):
        begun.start_from(str(tmp_path / "a" / "final.pt"))


@pytest.mark.slow
def test_a_swin_for_images_sees_in_a_still_clip_what_it_sees_in_the_image() -> None:
    """224 pixels: at smaller sizes torchvision's two networks pad and shift their windows apart."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    image, clip = swin_t(num_classes=3).eval(), swin3d_t(num_classes=3).eval()
    for name, table in image.named_parameters():
        if name.endswith("table"):
            nn.init.normal_(table)  # so that it matters which distance an entry is for
    names = ["a", "b", "c"]
    report = load_weights(clip, Weights("w", image.state_dict(), names), names, ModelRecipe())
    assert (report.fresh, report.skipped) == ([], [])
    picture = torch.randn(1, 3, 224, 224)
    still = picture[:, :, None].expand(-1, -1, 4, -1, -1)
    with torch.no_grad():
        torch.testing.assert_close(clip(still), image(picture), rtol=1e-3, atol=1e-4)
        assert image(picture).std() > 0.01
    torch.set_num_threads(threads)
    found = load_weights(
        swin3d_t(num_classes=5),
        Weights("w", image.state_dict(), names),
        list("abcde"),
        ModelRecipe(),
    )
    assert found.fresh == ["head.bias", "head.weight"]
    with pytest.raises(UsageError, match="of another network"):
        load_weights(tiny(3), Weights("w", image.state_dict(), names), names, ModelRecipe())


def test_the_protocol_says_what_the_weights_are(tmp_path: Path) -> None:
    """An average that is kept, or asked for and not there, or taken without being asked for."""
    loader = _Loader(CPU, 4)
    found = {}
    for kept in ("0.5", "0"):
        recipe = _recipe("schedule.epochs=1", f"model.ema_decay={kept}")
        trained = _trainer(tmp_path / kept, recipe)
        trained.fit()
        trained._val_loader = loader
        found[kept] = trained.evaluate()[0].protocol
        for asked in ("0.5", "0"):
            recipe = _recipe("schedule.epochs=1", f"model.ema_decay={asked}")
            for way in ("restore", "start_from"):
                tested = Trainer(recipe, CPU, None, loader, tmp_path / "test")
                path = tmp_path / kept / "final.pt"
                if way == "restore":
                    tested.restore(path, weights_only=True)
                else:
                    tested.start_from(str(path))
                found[f"{kept} {asked} {way}"] = tested.evaluate()[0].protocol
    averaged = {name for name, text in found.items() if "averaged weights" in text}
    assert averaged == {
        "0.5", "0.5 0.5 restore", "0.5 0.5 start_from", "0.5 0 restore", "0.5 0 start_from",
    }  # fmt: skip


def test_a_checkpoint_is_evaluated_with_its_average_and_what_changed_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    _trainer(tmp_path / "a", _recipe("schedule.epochs=1", "model.ema_decay=0.5")).fit()
    path = tmp_path / "a" / "final.pt"
    saved = torch.load(path, weights_only=True)
    recipe = _recipe("augment.mean=[0.1, 0.1, 0.1]", "augment.flip=0.1", "eval.every_epochs=9")
    tested = Trainer(recipe, CPU, None, _Loader(CPU, 4), tmp_path / "b")
    tested.restore(path, weights_only=True)
    evaluated = tested._state.evaluated.state_dict()
    torch.testing.assert_close(dict(evaluated), dict(saved["ema"]), rtol=0, atol=0)
    changed = [line for line in caplog.messages if line.startswith("changed since checkpoint")]
    mean = _recipe().augment.mean  # the flip and the turn of an evaluation change no result
    assert changed == [f"changed since checkpoint {path}: augment.mean: {mean} -> (0.1, 0.1, 0.1)"]


def test_what_an_evaluation_depends_on_are_settings_of_a_recipe() -> None:
    for name in _EVALUATED_WITH:  # one that is renamed would never be said to have changed
        section, _, key = name.partition(".")
        assert key in {entry.name for entry in fields(getattr(_recipe(), section))}, name


def test_a_head_that_is_drawn_is_never_evaluated(tmp_path: Path) -> None:
    _trainer(tmp_path / "a", _recipe("schedule.epochs=1")).fit()
    weights = str(tmp_path / "a" / "final.pt")
    for names, settings in ((["a", "b"], ()), (["a", "b", "x"], ("model.remap_classes=true",))):
        loader = _Loader(CPU, 4)
        loader.class_names = names
        trainer = Trainer(_recipe(*settings), CPU, None, loader, tmp_path / "b")
        with pytest.raises(UsageError, match="cannot be evaluated on these classes"):
            trainer.start_from(weights)
    loader.class_names = ["c", "a"]  # all rows are the weights': a subset can be evaluated
    trainer = Trainer(_recipe("model.remap_classes=true"), CPU, None, loader, tmp_path / "b")
    trainer.start_from(weights)


@pytest.mark.parametrize(
    "names", [["b", "a", "c"], ["a", "b"], ["a", "b", "c", "d"], ["a", "b", "x"]]
)
def test_a_run_never_goes_on_with_other_classes(tmp_path: Path, names: list[str]) -> None:
    """Permuted, missing, extra or renamed: neither resumed nor evaluated."""
    _trainer(tmp_path / "a", _recipe("schedule.epochs=1")).fit()
    for training in (True, False):
        loader = _Loader(CPU, 4)
        loader.class_names = names
        both = (loader, None) if training else (None, loader)
        trainer = Trainer(_recipe(), CPU, *both, tmp_path / "b")
        with pytest.raises(UsageError, match="was trained on other classes"):
            trainer.restore(
                checkpoints_in(tmp_path / "a" / "checkpoints")[0], weights_only=not training
            )


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
    with pytest.raises(UsageError, match="^the network has no weights that can be trained"):
        freeze_weights(nn.ReLU(), [])


def test_only_batchnorm_that_is_frozen_keeps_its_statistics() -> None:
    model = build_model(load_recipe("tiny", ['model.freeze=["1.*"]']), num_classes=3)
    set_training(model, freeze_batchnorm=False)
    modes = [layer.training for layer in model.modules() if isinstance(layer, nn.BatchNorm3d)]
    assert modes == [False, True, True, True]
