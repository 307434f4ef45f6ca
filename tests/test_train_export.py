"""Networks for other programs: loaded by those programs, and compared."""

from __future__ import annotations

import io
import json
import resource
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
import torchvision
from click.testing import CliRunner
from conftest import run_kprep
from torch import nn

from prep.errors import KprepError, StorageError, UsageError
from train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from train.export import _WAYS, Parity, export, load_trained, sidecar_path
from train.export_command import export_command
from train.models import build_model, tiny
from train.recipe import load_recipe

if TYPE_CHECKING:
    from pathlib import Path

CLASSES = ["aim", "bow", "catch", "dance", "eat"]
SMALL = ("data.frames=4", "augment.resize=[40, 40]", "augment.crop=[32, 32]")


def own_network(num_classes: int) -> nn.Module:
    """What a user names as test_train_export:own_network."""
    return nn.Sequential(tiny(num_classes), nn.Dropout(0.5))


def _checkpoint(path: Path, name: str, *overrides: str, has_average: bool = False) -> Path:
    recipe = load_recipe("tiny", [f"model.name={name}", *(overrides or SMALL)])
    torch.manual_seed(1)
    network = build_model(recipe, len(CLASSES))
    for buffer in network.buffers():  # BatchNorm's statistics after some training
        if buffer.is_floating_point() and buffer.ndim == 1:
            buffer.uniform_(0.5, 1.5)
    model = network.state_dict()
    average = {name: value + 1 for name, value in model.items()} if has_average else None
    saved = Checkpoint(
        epoch=3, step=12, model=model, optimizer=None, recipe=recipe.to_toml(),
        class_names=CLASSES, loader={}, rng={}, ema=average,
    )  # fmt: skip
    save_checkpoint(path, saved)
    return path


def _invoke(*arguments: object) -> str:
    result = CliRunner().invoke(export_command, [*map(str, arguments)])
    if result.exception:
        raise result.exception
    return result.output


@pytest.mark.parametrize("name", ["r2plus1d_18", "mc3_18"])
def test_plain_torchvision_loads_the_state_dict(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    saved = _checkpoint(run / "final.pt", name)
    output = tmp_path / "plain.pt"
    text = _invoke(run, "--format", "state-dict", "--output", output)
    assert f"{name}: weights after 3 epochs (12 steps), 5 classes" in text
    assert "float32 (N, 3, 4, 32, 32)" in text
    assert "logits differ by at most 0 " in text
    model = getattr(torchvision.models.video, name)(num_classes=5)
    model.load_state_dict(torch.load(output, weights_only=True), strict=True)
    torch.testing.assert_close(model.state_dict(), load_checkpoint(saved).model, rtol=0, atol=0)
    beside = json.loads(sidecar_path(output).read_text())
    assert beside["class_names"] == CLASSES
    assert beside["input"]["shape"] == ["N", 3, 4, 32, 32]
    assert beside["preprocessing"]["resize"]["size"] == [40, 40]
    assert beside["preprocessing"]["center_crop"] == [32, 32]
    assert beside["preprocessing"]["mean"] == list(load_recipe("tiny").augment.mean)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain.pt", "plain.pt.json", "run"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["r3d_18", "s3d", "mvit_v1_b", "mvit_v2_s", "swin3d_t"])
def test_the_state_dict_of_every_family_fits_torchvision(tmp_path: Path, name: str) -> None:
    size = ("data.frames=16", "augment.resize=[224, 224]", "augment.crop=[224, 224]")
    saved = _checkpoint(tmp_path / "x.pt", name, *(size if name[0] in "sm" else SMALL))
    trained = load_trained(saved)
    (tmp_path / "plain.pt").write_bytes(_WAYS["state-dict"][0](trained))
    model = torchvision.models.get_model(name, num_classes=5)
    model.load_state_dict(torch.load(tmp_path / "plain.pt", weights_only=True), strict=True)


def test_averaged_weights_are_taken_unless_told_otherwise(tmp_path: Path) -> None:
    both = _checkpoint(tmp_path / "both.pt", "tiny", has_average=True)
    saved, output = load_checkpoint(both), tmp_path / "x.pt"
    for options, wanted in (
        ((), saved.ema),
        (("--averaged",), saved.ema),
        (("--raw",), saved.model),
    ):
        text = _invoke(both, "--format", "state-dict", "--output", output, *options)
        found = torch.load(output, weights_only=True)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        assert ("averaged weights" in text) == (wanted is saved.ema)
    plain = _checkpoint(tmp_path / "plain.pt", "tiny")
    with pytest.raises(UsageError, match="holds no averaged weights"):
        load_trained(plain, averaged=True)


def test_a_torch_export_program_takes_any_number_of_clips(tmp_path: Path) -> None:
    saved = _checkpoint(tmp_path / "x.pt", "tiny")
    output = tmp_path / "x.pt2"
    assert "parity with torch.export" in _invoke(
        saved, "--format", "torch-export", "--output", output
    )
    program = torch.export.load(output).module()
    clips = torch.randn(7, 3, 4, 32, 32)
    wanted = load_trained(saved).network(clips)
    torch.testing.assert_close(program(clips), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "r2plus1d_18"])
def test_onnx_takes_any_number_of_clips(tmp_path: Path, name: str) -> None:
    import onnxruntime

    saved = _checkpoint(tmp_path / "x.pt", name)
    output = tmp_path / "x.onnx"
    assert "parity with onnxruntime" in _invoke(saved, "--format", "onnx", "--output", output)
    session = onnxruntime.InferenceSession(str(output), providers=["CPUExecutionProvider"])
    assert [put.name for put in session.get_inputs()] == ["clips"]
    clips = torch.randn(4, 3, 4, 32, 32)
    (logits,) = session.run(["logits"], {"clips": clips.numpy()})
    wanted = load_trained(saved).network(clips)
    torch.testing.assert_close(torch.from_numpy(logits), wanted, rtol=1e-4, atol=1e-4)


def test_a_file_that_gives_other_logits_does_not_appear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = _checkpoint(tmp_path / "x.pt", "tiny")
    to_bytes, read = _WAYS["state-dict"]

    def spoil(trained: object) -> bytes:
        tensors = torch.load(io.BytesIO(to_bytes(trained)), weights_only=True)
        file = io.BytesIO()
        torch.save({name: value * 1.01 for name, value in tensors.items()}, file)
        return file.getvalue()

    monkeypatch.setitem(_WAYS, "state-dict", (spoil, read))
    with pytest.raises(KprepError, match="is not written, it is another network"):
        export(load_trained(saved), "state-dict", tmp_path / "plain.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize("form", list(_WAYS))
def test_a_full_disk_is_no_mistake_of_the_user(tmp_path: Path, form: str) -> None:
    trained = load_trained(_checkpoint(tmp_path / "x.pt", "tiny"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(
            StorageError, match=r"^--output .*plain.pt2 cannot be written \(File too"
        ):
            export(trained, form, tmp_path / "plain.pt2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_a_path_where_the_json_file_cannot_be_is_named(tmp_path: Path) -> None:
    trained = load_trained(_checkpoint(tmp_path / "x.pt", "tiny"))
    (tmp_path / "plain.pt.json").mkdir()
    with pytest.raises(UsageError, match=r"plain.pt.json cannot be written: Is a directory"):
        export(trained, "state-dict", tmp_path / "plain.pt")


def test_a_difference_that_is_no_number_is_none_of_rounding() -> None:
    assert Parity("x", 1e-5, 0.1).is_close
    assert not Parity("x", 1e-3, 0.1).is_close
    assert not Parity("x", float("nan"), 0.1).is_close


def test_a_file_alone_does_not_decide_what_code_runs(tmp_path: Path) -> None:
    own = "test_train_export:own_network"
    saved = _checkpoint(tmp_path / "own.pt", own)
    for other in (None, "os:system"):
        with pytest.raises(UsageError, match=f"if you trust '{own}', say --model {own}"):
            load_trained(saved, model_name=other)
    output = tmp_path / "x.pt"
    text = _invoke(saved, "--format", "state-dict", "--output", output, "--model", own)
    assert f"{own}: weights" in text


def test_mistakes_are_said_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = _checkpoint(tmp_path / "x.pt", "tiny")
    trained = load_trained(saved)
    with pytest.raises(UsageError, match="final.pt does not exist"):
        load_trained(tmp_path)
    with pytest.raises(UsageError, match="the directory .*nowhere does not exist"):
        export(trained, "state-dict", tmp_path / "nowhere" / "x.pt")
    before = saved.read_bytes()
    with pytest.raises(UsageError, match=r"x.pt is a checkpoint of kprep; name another file"):
        export(trained, "state-dict", saved)
    assert saved.read_bytes() == before
    other = replace(load_checkpoint(saved), class_names=CLASSES[1:])
    save_checkpoint(tmp_path / "other.pt", other)
    with pytest.raises(UsageError, match="does not fit 'tiny': .*size mismatch"):
        load_trained(tmp_path / "other.pt")
    monkeypatch.setattr("train.export.find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"onnx and onnxscript and onnxruntime: pip install 'kprep"
    ):
        export(trained, "onnx", tmp_path / "x.onnx")


def test_help_needs_no_torch() -> None:
    import subprocess

    code = "import sys, train.export_command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.slow
def test_export_as_a_user_runs_it(tmp_path: Path) -> None:
    saved = _checkpoint(tmp_path / "x.pt", "r3d_18")
    done = run_kprep("export", saved, "--format", "onnx", "--output", tmp_path / "x.onnx")
    assert len(done.stdout.splitlines()) == 5, done.stdout
    failed = run_kprep("export", tmp_path / "no.pt", "--format", "onnx", "--output", tmp_path / "y",
                       check=False)  # fmt: skip
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
