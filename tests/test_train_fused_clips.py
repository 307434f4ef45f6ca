"""Clips prepared by one kernel: what PyTorch's steps give, and used where it works."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from planar_clips import SETTINGS, SIZES, batch_of
from test_train_fused_norm import CUDA
from test_train_trainer import _recipe, _trainer
from triton_device import found_by

from prep.errors import UsageError
from stream.color import frame_bytes
from train import fused_clips, trainer, transforms, triton_support
from train.fused_clips import Cut, cut_clips, why_not_cut
from train.recipe import AugmentRecipe, load_recipe
from train.transforms import goes_in_one_pass, train_clips, why_slow_clips

if TYPE_CHECKING:
    from stream import ClipBatch


def check_found(found: dict[str, Any], *, most_off: float) -> None:
    """Check levels and clips of every kind."""
    assert found["levels"] == 0, "the reference conversion is exact"
    assert len(found["errors"]) == 2 * len(SETTINGS)
    for name, (most, share) in found["errors"].items():
        if "rounded" in name:  # one level, where halves round the other way
            assert most < 0.0182, name
            assert share < 3e-3, name
        else:
            assert most < most_off, name


def test_one_kernel_gives_the_clips_that_pytorchs_steps_give() -> None:
    """The kernel runs by Triton's interpreter."""
    check_found(found_by("fused_clips_child.py"), most_off=3e-5)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Let PyTorch say that there is a GPU which can do it."""
    why_not_cut.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(triton_support, "find_spec", lambda _: True)
    return CUDA


@pytest.mark.parametrize(
    ("off", "reason"),
    [
        (1e-5, None),
        (0.5, "Triton's results are off by 0.5"),
        (float("nan"), "Triton's results are off by nan"),
    ],
)
def test_a_kernel_that_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch, gpu: torch.device, off: float, reason: str | None
) -> None:
    monkeypatch.setattr(fused_clips, "_error_of_a_clip", lambda *_: off)
    assert why_not_cut(gpu) == reason
    notice = why_slow_clips(load_recipe("resnet"), gpu)
    assert why_slow_clips(load_recipe("resnet", ["data.layout=rgb"]), gpu) is None, (
        "it is wanted so"
    )
    why_not_cut.cache_clear()
    assert (notice is None) == (reason is None)
    if notice is not None:
        said = notice.replace(str(reason), "…")
        training = Path(__file__).parent.parent / "docs/training.md"
        assert f"`{said}`" in training.read_text().replace("\n", " ")


def test_a_compiler_that_fails_is_the_reason(
    monkeypatch: pytest.MonkeyPatch, gpu: torch.device
) -> None:
    def fail(*_: object) -> float:
        raise RuntimeError("at 2:2:\nFailed to find C compiler.\n")

    monkeypatch.setattr(fused_clips, "_error_of_a_clip", fail)
    wanted = "Triton failed with RuntimeError: Failed to find C compiler."
    assert why_not_cut(gpu) == wanted
    why_not_cut.cache_clear()


@pytest.mark.parametrize("spoilt", [None, 0.01, float("nan"), "never rounded", "always rounded"])
def test_a_trial_compares_with_pytorch(
    monkeypatch: pytest.MonkeyPatch, spoilt: float | str | None
) -> None:
    """PyTorch stands in for the kernel, and one value of it is spoilt, or rounding is forgotten."""

    def cut_clips(
        video: torch.Tensor, cuts: list[Cut], crop: tuple[int, int], mean: tuple[float, ...],
        std: tuple[float, ...], *, is_rounded: bool,
    ) -> torch.Tensor:  # fmt: skip
        (cut,) = cuts
        if isinstance(spoilt, str):
            is_rounded = spoilt == "always rounded"
        recipe = AugmentRecipe(
            resize=cut.resized, crop=crop, mean=mean, std=std, round_resized=is_rounded
        )
        batch = batch_of((cut.size,), video.shape[1])
        draws = transforms.Draws(flip=cut.flip, top=cut.top, left=cut.left)
        batch.video.copy_(video)
        clips = transforms.clips_from_draws(batch, recipe, [draws])
        if isinstance(spoilt, float):
            clips[0, 2, 1, 19, 19] += spoilt
        return clips

    monkeypatch.setattr(fused_clips, "cut_clips", cut_clips)
    off = fused_clips._error_of_a_clip(torch.device("cpu"))
    assert (off <= fused_clips._TOLERANCE) == (spoilt is None)


def test_there_is_none_on_a_cpu() -> None:
    assert why_not_cut(torch.device("cpu")) == "there is no CUDA device"
    assert why_slow_clips(load_recipe("resnet"), torch.device("cpu")) is None, "nothing is missed"
    assert not goes_in_one_pass(batch_of(SIZES, 2))


@pytest.mark.parametrize(
    ("layout", "device", "reason", "goes"),
    [
        ("yuv420", CUDA, None, True),
        ("yuv420", CUDA, "Triton is not installed", False),
        ("yuv420", torch.device("cpu"), None, False),
        ("rgb", CUDA, None, False),
    ],
)
def test_planar_clips_on_a_gpu_take_it(
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
    device: torch.device,
    reason: str | None,
    goes: bool,
) -> None:
    monkeypatch.setattr(transforms, "why_not_cut", lambda _: reason)
    batch = SimpleNamespace(layout=layout, video=SimpleNamespace(device=device))
    assert goes_in_one_pass(cast("ClipBatch", batch)) == goes


def test_a_run_says_what_takes_longer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trainer, "why_no_kernels", lambda *_: "one takes longer")
    monkeypatch.setattr(trainer, "why_slow_clips", lambda *_: "another takes longer")
    with caplog.at_level("INFO"):
        _trainer(tmp_path, _recipe("schedule.epochs=1")).fit()
    said = [line for line in caplog.messages if "takes longer" in line]
    assert said == ["one takes longer", "another takes longer"]


@pytest.mark.parametrize("size", [(60, 50), (37, 50), (38, 49), (0, 50), (-2, 50)])
def test_a_batch_whose_sizes_do_not_fit_is_refused(size: tuple[int, int]) -> None:
    """PyTorch's steps refuse them; a kernel would read what lies behind the frames."""
    video = torch.zeros((1, 2, frame_bytes(38, 50)), dtype=torch.uint8)
    cut = Cut(0, size, (0, size[0], 0, size[1]), (30, 44), 0, 0)
    one = (1.0, 1.0, 1.0)
    with pytest.raises(UsageError, match=rf"clips of {size[1]}x{size[0]} in frames of 2850 bytes"):
        cut_clips(video, [cut], (20, 20), one, one, is_rounded=False)
    for box in ((0, 40, 0, 50), (0, 38, 2, 52), (-2, 20, 0, 50), (20, 20, 0, 50)):
        with pytest.raises(ValueError, match="not within a picture"):
            cut_clips(video, [Cut(0, (38, 50), box, (30, 44), 0, 0)], (20, 20), one, one,
                      is_rounded=False)  # fmt: skip


def test_a_recipe_with_randaugment_never_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a clip has operations is drawn, and its pixels must not depend on its neighbours."""
    monkeypatch.setattr(transforms, "goes_in_one_pass", lambda _: True)
    monkeypatch.setattr(transforms, "cut_clips", lambda *_, **__: "one pass")
    batch = batch_of(SIZES, 2)
    recipe = AugmentRecipe(rand_operations=1, rand_probability=0.0)
    assert train_clips(batch, recipe, seed=0, epoch=0) != "one pass"
    assert train_clips(batch, AugmentRecipe(), seed=0, epoch=0) == "one pass"
