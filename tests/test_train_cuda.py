"""Training on a GPU: same pixels as on a CPU, no waiting, exact resumption, every precision."""

from __future__ import annotations

import copy
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from test_train_fused_clips import check_found
from test_train_step_stack import EVERYTHING, _of_two_sizes
from test_train_trainer import _batch, _lines, _recipe, _trainer
from triton_device import found_by

from prep.errors import UsageError
from stream import ClipBatch, clip_loader
from stream.color import yuv420_to_rgb
from train import train
from train.determinism import determinism
from train.distributed import World
from train.fused_clips import why_not_cut
from train.fused_norm import use_fused_norm, why_not_fused
from train.models import build_model, draw_model, set_training, tiny
from train.optim import build_optimizer
from train.recipe import Recipe, load_recipe
from train.self_check import check_first_convolution
from train.step import OptimizerStep
from train.tensor_cores import use_tensor_cores
from train.transforms import train_clips, video_on

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.cuda

CUDA = torch.device("cuda", 0)
GPU = World(0, 1, CUDA, None)
RESNET = (
    "model.name=r3d_18", "data.batch_size=4", "data.workers=2", "augment.resize=[64, 86]",
    "augment.crop=[56, 56]", "schedule.epochs=2", "schedule.milestones=[]", "data.frames=8",
    "schedule.warmup_epochs=0", "data.clips_per_video=1", "eval.clips_per_video=1",
)  # fmt: skip


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Let PyTorch raise wherever the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _step(recipe: Recipe, device: torch.device) -> OptimizerStep:
    model = draw_model(recipe, 3, World(0, 1, device, None))
    set_training(model, freeze_batchnorm=False)
    optimizer = build_optimizer(model, recipe)
    return OptimizerStep(model, optimizer, recipe, device, num_classes=3, transform=None)


def _clips(root: Path, *, layout: str = "yuv420", batch_size: int = 8) -> ClipBatch:
    loader = clip_loader(root, split="train", frames=8, batch_size=batch_size, layout=layout)
    return next(iter(loader))


def _planar(batch: ClipBatch) -> ClipBatch:
    """Take an RGB batch's bytes for planar ones, which are half as many."""
    video = batch.video.flatten(2)
    return replace(batch, video=video[:, :, : video.shape[2] // 2].contiguous(), layout="yuv420")


def test_planar_clips_become_the_same_rgb_levels_on_the_device(motion_dataset: Path) -> None:
    batch = _clips(motion_dataset)
    height, width = batch.size[0].tolist()
    found = yuv420_to_rgb(batch.video.to(CUDA), height, width).cpu()
    assert torch.equal(found, yuv420_to_rgb(batch.video, height, width))


@pytest.mark.parametrize(
    "settings",
    [(), ("augment.crop_area=[0.1, 1]", "augment.rand_operations=4")],
    ids=["resnet", "everything"],
)
def test_augmentation_is_the_same_on_the_device(
    motion_dataset: Path, settings: tuple[str, ...]
) -> None:
    recipe = load_recipe("resnet", settings).augment
    batch = _clips(motion_dataset)
    wanted = train_clips(batch, recipe, seed=3, epoch=1)
    found = train_clips(replace(batch, video=batch.video.to(CUDA)), recipe, seed=3, epoch=1).cpu()
    # a level that rounds the other way is 0.02 after normalisation; operations can widen it
    differs = (found - wanted).abs() > (0.05 if settings else 1e-4)
    assert float(differs.float().mean()) < 1e-3


def test_one_kernel_prepares_clips_as_pytorchs_steps_do() -> None:
    assert why_not_cut(CUDA) is None
    # of a place among 454 columns float32 leaves 3e-5, and a GPU rounds it otherwise
    check_found(found_by("fused_clips_child.py"), most_off=2e-4)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("operations", [True, False])
def test_the_host_never_waits_for_the_device(
    name: str, precision: str, *, operations: bool
) -> None:
    last = str(precision != "float32").lower()  # with kprep's own kernels
    recipe = _recipe(
        *EVERYTHING, f"optim.name={name}", f"run.precision={precision}",
        f"run.channels_last_3d={last}", *(() if operations else ("augment.rand_operations=0",)),
    )  # fmt: skip
    step = _step(recipe, CUDA)
    batches = [_batch([0, 1, 2, 3]), _of_two_sizes(_batch([4, 5, 6, 7]))]
    if not operations:  # in one pass, which takes planar clips
        batches = [_planar(batch) for batch in batches]
    pinned = [batch.pin_memory() for batch in batches]
    step.run(step.prepare(pinned), 0.1, 0)  # once in a run there are constants to copy
    with _no_waiting():
        loss = step.run(step.prepare(pinned), 0.1, 1)
    assert torch.isfinite(loss).item()


def test_a_step_changes_the_weights_as_on_a_cpu() -> None:
    recipe = _recipe("model.name=r3d_18", "optim.name=sgd", "data.accumulate=2")
    changes = []
    for device in (torch.device("cpu"), CUDA):
        with _exact_float32():
            step = _step(recipe, device)
            before = {name: weight.cpu() for name, weight in step._wrapped.state_dict().items()}
            before = {name: weight.clone() for name, weight in before.items()}
            step.run(step.prepare([_batch([0, 1, 2, 3]), _batch([4, 5, 6, 7])]), 0.01, 0)
        after = step._wrapped.state_dict()
        changes.append({name: after[name].cpu() - weight for name, weight in before.items()})
    for name, wanted in changes[0].items():
        off = (changes[1][name] - wanted).float().norm()
        assert off <= 0.01 * wanted.float().norm() + 1e-7, name


@contextmanager
def _exact_float32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("accumulate", [1, 3])
def test_clips_that_are_copied_ahead_arrive_whole(accumulate: int) -> None:
    """A step that reads its clips before they are there, or another one's, gives other losses."""
    losses: list[list[float]] = []
    for ahead in (True, False):
        step = _step(_recipe("data.frames=4", "augment.resize=[20, 20]"), CUDA)
        batches = [
            _batch([4 * number + place for place in range(4)]).pin_memory() for number in range(24)
        ]
        if not ahead:
            batches = [video_on(batch, CUDA) for batch in batches]
            torch.cuda.synchronize()
        found = []
        held = step.prepare(batches[:accumulate])
        for first in range(accumulate, 24 + accumulate, accumulate):
            coming = step.prepare(batches[first : first + accumulate])
            found.append(step.run(held, 0.0, 0))
            held = coming
        losses.append(torch.stack(found).tolist())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        ("run.precision=bf16", "run.channels_last_3d=true"),
        ("run.precision=fp16",),
        ("run.precision=bf16", "run.channels_last_3d=true", "run.compile=true"),
        ("model.sync_batchnorm=true",),
    ],
    ids=["bf16", "fp16", "compiled", "sync-batchnorm"],
)
def test_every_way_to_compute_trains(tmp_path: Path, settings: tuple[str, ...]) -> None:
    trainer = _trainer(tmp_path, _recipe("schedule.epochs=8", *settings), GPU)
    metrics = trainer.fit()
    losses = [line["loss"] for line in _lines(tmp_path, "train")]
    assert metrics["steps"] == 48
    assert losses[-1] < losses[0]


def test_padded_channels_compute_the_same_in_bf16() -> None:
    """The reduced network is as near to float32 with zero channels as without them."""
    clips = torch.randn(4, 3, 8, 56, 56, device=CUDA).to(memory_format=torch.channels_last_3d)
    errors = []
    with torch.no_grad(), _exact_float32():
        torch.manual_seed(0)
        model = build_model(load_recipe("resnet", RESNET[1:]), num_classes=30).to(CUDA)
        model.to(memory_format=torch.channels_last_3d)
        wanted = model(clips)
        for _ in range(2):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                found = model(clips).float()
            errors.append(float((found - wanted).norm() / wanted.norm()))
            use_tensor_cores(model, pads_between=True)
    assert errors[0] < 0.1
    assert errors[1] < 1.3 * errors[0]


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_batch_normalisation_has_its_kernels(kind: torch.dtype) -> None:
    assert why_not_fused(CUDA, kind) is None
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}[kind]
    recipe = load_recipe("tiny", [f"run.precision={precision}", "run.channels_last_3d=true"])
    model = draw_model(recipe, 4, GPU)
    assert {type(layer).__name__ for layer in model.modules()} >= {
        "_TensorCoreConv3d", "_FusedBatchNorm3d", "_DoneReLU",
    }  # fmt: skip


def test_batch_normalisations_kernels_are_exact_on_the_device() -> None:
    found = found_by("fused_norm_child.py")
    assert all(error < 1e-4 for error in found["errors"].values()), found
    assert all(error < 0.05 for error in found["reduced"].values()), found
    assert found["lost"] == []
    assert found["copies"] == 0


def test_a_step_in_bf16_is_as_exact_with_kpreps_layers_as_without() -> None:
    clips = torch.randn(8, 3, 8, 56, 56, device=CUDA).to(memory_format=torch.channels_last_3d)
    labels = torch.arange(8, device=CUDA) % 3
    torch.manual_seed(0)
    plain = build_model(load_recipe("resnet", RESNET), num_classes=3).to(CUDA).train()
    plain.to(memory_format=torch.channels_last_3d)
    ours = copy.deepcopy(plain)
    use_tensor_cores(ours, pads_between=True)
    use_fused_norm(ours, with_relu=True)

    def gradients(model: torch.nn.Module, *, reduced: bool) -> torch.Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=reduced):
            logits = model(clips)
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()
        return torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])

    with _exact_float32():
        wanted = gradients(copy.deepcopy(plain), reduced=False)
    errors = [
        float((gradients(model, reduced=True) - wanted).norm() / wanted.norm())
        for model in (plain, ours)
    ]
    assert errors[1] < 1.3 * errors[0] + 1e-3, errors


def test_the_first_convolution_is_right_in_every_precision() -> None:
    model = build_model(load_recipe("resnet", RESNET), num_classes=3).to(CUDA)
    for precision in ("bf16", "fp16"):
        error = check_first_convolution(model, precision, (16, 112, 112), CUDA)
        assert error is not None
        assert 0 < error < 0.01


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_resumed_run_is_equal_bit_for_bit(
    tmp_path: Path, motion_dataset: Path, precision: str
) -> None:
    last = str(precision != "float32").lower()  # with kprep's own kernels
    recipe = load_recipe(
        "resnet",
        [*RESNET, "run.deterministic=true", f"run.precision={precision}",
         f"run.channels_last_3d={last}"],
    )  # fmt: skip
    kept = replace(recipe, run=replace(recipe.run, checkpoint_steps=25, keep_checkpoints=99))
    train(kept, motion_dataset, tmp_path / "whole", val_split=None, device="cuda")
    middle = sorted((tmp_path / "whole" / "checkpoints").glob("epoch-*-step-*.pt"))
    assert middle
    train(
        kept, motion_dataset, tmp_path / "again", val_split=None, device="cuda",
        resume=str(middle[0]),
    )  # fmt: skip
    one, other = (
        torch.load(tmp_path / name / "final.pt", weights_only=True) for name in ("whole", "again")
    )
    torch.testing.assert_close(one["model"], other["model"], rtol=0, atol=0)


def with_max_pool(num_classes: int) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.MaxPool3d(2), tiny(num_classes))


def test_what_cannot_be_repeated_is_refused_in_one_sentence() -> None:
    recipe = _recipe("run.deterministic=true")
    clips = torch.zeros(2, 3, 4, 20, 20, device=CUDA, requires_grad=True)
    with pytest.raises(UsageError, match="run.deterministic: "), determinism(recipe):
        with_max_pool(3).to(CUDA)(clips).sum().backward()


def test_the_demos_network_learns_motion(tmp_path: Path, motion_dataset: Path) -> None:
    metrics = train(load_recipe("tiny"), motion_dataset, tmp_path, device="cuda")
    assert metrics["video_top1"] >= 0.9


def test_torchrun_takes_the_gpu_over_nccl(tmp_path: Path, motion_dataset: Path) -> None:
    settings = [part for one in RESNET for part in ("--set", one)]
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", "--standalone",
            "-m", "prep", "train", "--data", str(motion_dataset), "--recipe", "resnet", *settings,
            "--output", str(tmp_path / "run"), "--set", "schedule.epochs=1",
            "--set", "run.profile_steps=3", "--set", "run.precision=bf16",
        ],
        capture_output=True, text=True, timeout=300, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "final.pt").is_file()
    assert list((tmp_path / "run").glob("trace-steps-*.json.gz"))
    assert any(line.get("peak_memory_bytes", 0) > 0 for line in _lines(tmp_path / "run", "train"))


def test_pinned_batches_come_out_of_the_workers(motion_dataset: Path) -> None:
    loader = clip_loader(
        motion_dataset, split="train", frames=8, batch_size=8, num_workers=2, pin_memory=True
    )
    plain = clip_loader(motion_dataset, split="train", frames=8, batch_size=8)
    for found, wanted in zip(loader, plain, strict=True):
        assert found.video.is_pinned()
        assert found.key == wanted.key
        assert found.video.shape == wanted.video.shape
        assert torch.equal(found.video.to(CUDA, non_blocking=True).cpu(), wanted.video)
