"""What a run shows: lines, the bar, curves, operations, utilisation, traces."""

from __future__ import annotations

import gzip
import io
import json
import logging
import re
import struct
import sys
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

import pytest
import torch
from terminal import run_in_terminal, screen
from test_train_trainer import LOGGED_STEPS, _lines, _Loader, _recipe, _trainer, _weights
from torch import nn

from prep.errors import KprepError, UsageError
from train.cli import _Echo
from train.devices import peak_flops
from train.flops import count_flops
from train.models import TORCHVISION_MODELS, freeze_weights, tiny
from train.reporting import format_seconds

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# What torchvision's models cost a clip, forward and backward, in GFLOP: a multiplication and an
# addition count as two. Frames and sizes are those of the published weights.
PUBLISHED = {
    "r3d_18": (16, 112, 241),
    "mc3_18": (16, 112, 257),
    "r2plus1d_18": (16, 112, 242),
    "s3d": (64, 224, 416),
    "mvit_v1_b": (16, 224, 474),
    "mvit_v2_s": (16, 224, 486),
    "swin3d_t": (32, 224, 526),
    "swin3d_s": (32, 224, 993),
    "swin3d_b": (32, 224, 1687),
}


def test_operations_are_counted_as_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv3d(3, 5, (1, 3, 3), bias=False), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(5, 7)
    )  # fmt: skip
    conv = 2 * 5 * (3 * 3 * 3) * (4 * 6 * 6)  # 4 x 8 x 8 pixels give 4 x 6 x 6
    linear = 2 * 5 * 7
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flops = count_flops(model, (4, 8, 8))
    assert flops.forward == conv + linear
    # the clip needs no gradient: the convolution's backward computes only that of its weights
    assert flops.training == 2 * conv + 3 * linear
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(weight.device.type == "cpu" for weight in model.parameters())
    freeze_weights(model, ["0.*"])
    # nothing below the linear layer wants a gradient
    assert count_flops(model, (4, 8, 8)).training == conv + 2 * linear


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION_MODELS)
def test_operations_of_torchvisions_models(name: str) -> None:
    from torchvision.models import get_model, get_model_weights

    frames, size, gigaflops = PUBLISHED[name]
    with torch.device("meta"):
        model = get_model(name, num_classes=400).train()
    flops = count_flops(model, (frames, size, size))
    assert round(flops.training / 1e9) == gigaflops
    # torchvision writes down multiplications with additions, for the crop of its evaluation
    if not name.startswith(("s3d", "swin")):
        weights = next(iter(get_model_weights(name)))
        assert flops.forward / 2e9 == pytest.approx(weights.meta["_ops"], rel=0.01)


def test_counting_leaves_synchronised_batchnorm_alone() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(tiny(3))
    assert count_flops(model, (4, 16, 16)) == count_flops(tiny(3), (4, 16, 16))


@pytest.mark.parametrize(
    ("name", "precision", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H200", "float32", 494.7),
        ("NVIDIA A100-SXM4-80GB", "fp16", 312),
        ("NVIDIA A100 80GB PCIe", "bf16", 312),
        ("NVIDIA A100-PCIE-40GB", "bf16", 312),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("NVIDIA L4", "bf16", 121),
        ("Tesla T4", "fp16", 65),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
    ],
)
def test_peaks_of_devices(name: str, precision: str, teraflops: float) -> None:
    assert peak_flops(name, precision) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16"),  # a seventh of one
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),
        ("NVIDIA A10G", "bf16"),
        ("Tesla V100-SXM2-16GB", "bf16"),  # has none
        ("this CPU", "float32"),
    ],
)
def test_devices_without_a_known_peak(name: str, precision: str) -> None:
    assert peak_flops(name, precision) is None


def test_times_are_readable() -> None:
    assert [format_seconds(seconds) for seconds in (0.4, 61, 7325.2, 360_000)] == [
        "0:00:00", "0:01:01", "2:02:05", "100:00:00"
    ]  # fmt: skip


def test_a_line_of_metrics_has_these_fields(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("train.reporting.peak_flops", lambda name, precision: 1e12)
    trainer = _trainer(tmp_path, _recipe())
    with caplog.at_level(logging.INFO, logger="kprep"):
        trainer.fit()
    lines = _lines(tmp_path, "train")
    assert set(lines[0]) == {
        "kind", "time", "epoch", "step", "lr", "loss", "clips_per_second", "data_wait_share",
        "seconds_per_step", "peak_memory_bytes", "mfu",
    }  # fmt: skip
    flops = count_flops(trainer.model, (4, 16, 16)).training
    for line in lines:
        assert line["mfu"] == pytest.approx(line["clips_per_second"] * flops / 1e12)
        assert line["clips_per_second"] == pytest.approx(4 / line["seconds_per_step"])
        assert line["peak_memory_bytes"] > 2**20
    text = caplog.text
    assert "clip of 3 x 4 x 16 x 16: 0.0" in text
    assert "at most 1 TFLOP/s on this CPU in float32" in text
    assert text.count(" left") == len(LOGGED_STEPS)
    assert "% MFU, " in text


class _ByValue(nn.Module):
    """A network whose path depends on its values: it cannot run without them."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layers = tiny(num_classes)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return self.layers(clips) * (1 if clips.sum() > 0 else 2)


def test_what_is_not_known_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="kprep"):
        _trainer(tmp_path / "a", _recipe("schedule.epochs=1")).fit()
        odd = _recipe("schedule.epochs=1", "model.name=test_train_seeing:_ByValue")
        _trainer(tmp_path / "b", odd).fit()
    assert "no model FLOP utilisation: the peak of this CPU is not known" in caplog.text
    assert "operations of the network cannot be counted: " in caplog.text
    assert {line["mfu"] for name in "ab" for line in _lines(tmp_path / name, "train")} == {None}


def test_clips_without_a_part_in_an_epoch_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = _trainer(tmp_path, _recipe("schedule.epochs=1", "data.batch_size=7"))
    loader = trainer._train_loader
    assert isinstance(loader, _Loader)
    loader.unscored = ["short1", "short2"]
    with caplog.at_level(logging.INFO, logger="kprep"):
        trainer.fit()
    what = "are too short for 4 frames at 7.5 fps and stay out (data.short)"
    assert f"2 (short1, short2) of 26 clips {what}" in caplog.text
    assert "3 clip(s) of an epoch fill no step" in caplog.text  # 24 = 3 x 7 + 3


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextmanager
def _terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Terminal]:
    """A terminal of 160 columns, and somebody who wants to see the run."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    logger, screen, handler = logging.getLogger("kprep"), _Terminal(), _Echo()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        with redirect_stdout(screen):
            yield screen
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def test_a_terminal_shows_a_bar_and_a_line_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = _trainer(tmp_path, _recipe("eval.batch_size=4"))
    trainer._val_loader = _Loader(trainer.world, 4)
    with _terminal(monkeypatch) as terminal:
        trainer.fit()
    text = terminal.getvalue()
    assert "epoch 1/2 step 6: loss" in text
    assert "epoch 1/2 step 4: loss" not in text  # the bar says so instead
    assert "12/12" in text
    assert "% waiting for data" in text
    assert "evaluating" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back
    assert [line["step"] for line in _lines(tmp_path, "train")] == LOGGED_STEPS


def test_the_bar_goes_away_when_a_run_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = _trainer(tmp_path, _recipe())
    trainer._train_loader.fails_at = 4
    with _terminal(monkeypatch) as terminal:
        with pytest.raises(RuntimeError, match="worker gone"):
            trainer.fit()
        assert sys.stdout is terminal
    text = terminal.getvalue()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


LONG_RUN = """
import logging
from train.cli import _Echo
from train.progress import log
from train.progress_bar import ProgressBar

logging.getLogger("kprep").addHandler(_Echo())
log.setLevel(logging.INFO)
bar = ProgressBar()
bar.start(450_000, 212_343)
for step in (212_344, 212_345):
    bar.show_step(step, "epoch 22/45")
    bar.show_news("loss 0.9738, 1148.5 clips/s, 25% waiting for data, 41.2% MFU")
    log.info("epoch %d", step)
for _ in bar.count_scored(["first", "second"], 2):
    log.info(" ".join(["word"] * 40))
bar.stop()
"""


@pytest.fixture(scope="module")
def long_run() -> str:
    """What a long run writes to a terminal of 80 columns."""
    return run_in_terminal([sys.executable, "-c", LONG_RUN], 80)


def test_lines_stand_whole_above_the_bar_of_a_terminal(long_run: str) -> None:
    words = [" ".join(["word"] * 16)] * 2 + [" ".join(["word"] * 8)]  # 16 x 5 - 1 = 79 columns
    shown = [line for line in screen(long_run, 80) if line]
    assert shown == ["epoch 212344", "epoch 212345", *words, *words]


def test_the_bar_keeps_its_counts_and_times_in_80_columns(long_run: str) -> None:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", long_run)
    drawn = re.split(r"\r|\n|\x1b\[.[AK]", plain)
    bars = [line for line in drawn if line.startswith("epoch 22/45")]
    assert any("212345/450000 loss" in line for line in bars)
    for line in bars:
        assert re.search(r"━ 21234[345]/450000 (loss 0\.9738, .*…)? left .:..:..$", line)
        assert len(line) <= 80
    assert any(
        re.search(r"evaluating .* [012]/2 +batches .* left .:..:..$", line) for line in drawn
    )


def _tensorboard(output: Path) -> dict[str, list[tuple[int, float]]]:
    """Every point of every event file, in the order of files: nothing is purged here."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    points: dict[str, list[tuple[int, float]]] = {}
    for path in sorted((output / "tensorboard").glob("events*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                number = value.tensor.float_val[0]
                points.setdefault(value.tag, []).append((event.step, number))
    return points


def test_curves_in_tensorboard_continue_after_a_resume(tmp_path: Path) -> None:
    recipe = _recipe("run.tensorboard=true", "schedule.epochs=2", "run.checkpoint_steps=2")
    _trainer(tmp_path, recipe).fit()
    foreign = tmp_path / "tensorboard" / "events.out.tfevents.1.host.1.0"
    foreign.touch()
    resumed = _trainer(tmp_path, recipe)
    resumed.restore(tmp_path / "checkpoints" / "epoch-0001-step-00000010.pt")
    resumed.fit()
    points = _tensorboard(tmp_path)
    lines = _lines(tmp_path, "train")
    assert [line["step"] for line in lines] == LOGGED_STEPS
    for name in ("loss", "lr", "clips_per_second", "peak_memory_bytes"):
        wanted = [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]
        assert points[f"train/{name}"] == wanted
    assert "train/mfu" not in points
    assert foreign.exists()


def _wandb_history(output: Path) -> list[dict[str, Any]]:
    """The points in the newest file of an offline run (LevelDB's log format, after 7 bytes)."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = (output / "wandb").glob("offline-run-*/run-*.wandb")
    data, place, whole, found = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # a header never crosses a block's end
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            record, whole = Record.FromString(whole), b""
            if record.HasField("history"):
                items = record.history.item
                found.append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in items})
    return found


@pytest.mark.slow
def test_curves_in_wandb_continue_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    recipe = _recipe("run.wandb=words", "schedule.epochs=2", "run.checkpoint_steps=2")
    _trainer(tmp_path, recipe).fit()
    number = (tmp_path / "wandb" / "id").read_text()
    resumed = _trainer(tmp_path, recipe)
    resumed.restore(tmp_path / "checkpoints" / "epoch-0001-step-00000010.pt")
    resumed.fit()
    wandb.teardown()  # its service writes the end of the file when it goes
    assert (tmp_path / "wandb" / "id").read_text() == number
    lines = _lines(tmp_path, "train")
    history = _wandb_history(tmp_path)
    assert [(entry["_step"], entry["train/loss"]) for entry in history] == [
        (line["step"], line["loss"]) for line in lines
    ]


@pytest.mark.parametrize(
    ("setting", "module", "message"),
    [
        ("run.tensorboard=true", "tensorboard", r"pip install 'kprep\[tensorboard\]'"),
        ("run.wandb=words", "wandb", r"pip install 'kprep\[wandb\]'"),
    ],
)
def test_a_missing_package_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, module: str, message: str
) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=message):
        _trainer(tmp_path, _recipe(setting)).fit()


def test_a_damaged_wandb_id_is_refused(tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "id").write_text("../../x")
    with pytest.raises(KprepError, match="must hold the id of a W&B run"):
        _trainer(tmp_path, _recipe("run.wandb=words")).fit()


@pytest.mark.parametrize(("steps", "name"), [(3, "trace-steps-3-5"), (99, "trace-steps-3-12")])
def test_a_trace_of_some_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, steps: int, name: str
) -> None:
    plain = _trainer(tmp_path / "plain", _recipe())
    plain.fit()
    profiled = _trainer(tmp_path / "run", _recipe(f"run.profile_steps={steps}"))
    with caplog.at_level(logging.INFO, logger="kprep"):
        profiled.fit()
    path = tmp_path / "run" / f"{name}.json.gz"
    assert f"{path}" in caplog.text
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = [str(event.get("name")) for event in events]
    first, last = map(int, name.split("-")[2:])
    # a trace that the run's end cut off also shows the step that never came
    cut_off = steps > last - first + 1
    marks = sum(found.startswith("ProfilerStep") for found in names)
    assert marks == last - first + 1 + cut_off
    assert any("conv" in found for found in names)
    torch.testing.assert_close(_weights(profiled), _weights(plain), rtol=0, atol=0)
