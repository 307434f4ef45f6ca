"""The step and PyTorch's stack: no waiting for the device, one exchange, compiler, determinism."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from test_train_trainer import _batch, _recipe, _trainer, _weights
from torch import distributed, nn
from torch._dynamo.exc import TorchDynamoException
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from prep.errors import UsageError
from train import models
from train.determinism import determinism
from train.models import build_model, check_clip_size, freeze_weights, tiny
from train.optim import build_optimizer
from train.recipe import load_recipe, recipe_from_dict
from train.step import OptimizerStep

if TYPE_CHECKING:
    from pathlib import Path

    from stream.batch import ClipBatch

pytestmark = pytest.mark.usefixtures("one_thread")

META = torch.device("meta")
EVERYTHING = (
    "augment.rand_operations=6", "augment.crop_area=[0.1, 1]", "augment.erase=1.0",
    "augment.mixup=0.2", "augment.cutmix=1.0", "optim.clip_grad_norm=1.0", "data.accumulate=2",
    "optim.label_smoothing=0.1", "optim.layer_decay=0.5",
)  # fmt: skip


class _Copies(TorchFunctionMode):
    """Notes numbers of the host that go to the device, also as an index: CUDA waits for each."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") == META:
            self.found.append(f"{function.__name__}{args}")
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and args[0].is_meta:
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.found += [f"index {place}" for place in places if _is_on_the_host(place)]
        return function(*args, **kwargs)


def _is_on_the_host(place: Any) -> bool:
    """Whether an index is numbers that have to be copied; a single one is an offset."""
    if isinstance(place, torch.Tensor):
        return not place.is_meta and place.ndim > 0
    return isinstance(place, (list, range, np.ndarray))


def _meta_step(*settings: str) -> OptimizerStep:
    """A step on the device without values: reading one of them there raises an error."""
    recipe = _recipe(*settings)
    with META:
        model = build_model(recipe, num_classes=3)
    optimizer = build_optimizer(model, recipe)
    return OptimizerStep(model, optimizer, recipe, META, num_classes=3, transform=None)


def _of_two_sizes(batch: ClipBatch) -> ClipBatch:
    size = batch.size.clone()
    size[1::2] = 20  # what is beyond is padding
    return replace(batch, size=size)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_host_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(models, "autocast", lambda *_: nullcontext())  # has no form for meta
    step = _meta_step(*EVERYTHING, f"optim.name={name}")
    batches = [_batch([0, 1, 2, 3]), _of_two_sizes(_batch([4, 5, 6, 7]))]
    first, later = _Copies(), _Copies()
    with first:
        step.run(step.prepare(batches), 0.1, 0)
    with later:
        loss = step.run(step.prepare(batches), 0.1, 1)
    assert len(first.found) <= 2  # mean and deviation of the levels, once in a run
    assert later.found == []
    with pytest.raises((RuntimeError, NotImplementedError)):  # the net is no sieve
        bool(loss > 0)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_gradients_are_exchanged_once_a_step(accumulate: int) -> None:
    recipe = _recipe(f"data.accumulate={accumulate}")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(tiny(3))
        exchanged: list[int] = []

        def note(_: object, bucket: Any) -> torch.futures.Future[torch.Tensor]:
            exchanged.append(bucket.index())
            done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        note.__annotations__ = {}  # DDP compares annotations, which are text here
        wrapped.register_comm_hook(None, note)
        step = OptimizerStep(
            wrapped, build_optimizer(wrapped.module, recipe), recipe, torch.device("cpu"),
            num_classes=3, transform=None,
        )  # fmt: skip
        for epoch in range(3):
            exchanged.clear()
            step.run([_batch([0, 1])] * accumulate, 0.1, epoch)
            assert len(exchanged) == len(set(exchanged)) >= 1
    finally:
        distributed.destroy_process_group()


class _Unused(nn.Module):
    """Has weights that no clip goes through."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.never = tiny(3), nn.Linear(2, 2)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return self.layers(clips)


def test_weights_that_no_step_uses_are_named_where_ddp_waits_for_them() -> None:
    recipe = _recipe()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        for is_frozen in (False, True):
            model = _Unused()
            if is_frozen:
                freeze_weights(model, ["never.*"])
            for wrapped in (model, DistributedDataParallel(model)):
                step = OptimizerStep(
                    wrapped, build_optimizer(model, recipe), recipe, torch.device("cpu"),
                    num_classes=3, transform=None,
                )  # fmt: skip
                if wrapped is model or is_frozen:
                    step.run([_batch([0, 1])], 0.1, 0)
                    continue
                before = model.layers[0].weight.clone()
                with pytest.raises(UsageError, match=r"use never.weight, never.bias: .*freeze"):
                    step.run([_batch([0, 1])], 0.1, 0)
                assert torch.equal(model.layers[0].weight, before)
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_compiled_network_trains_like_the_plain_one(tmp_path: Path) -> None:
    settings = ("optim.name=sgd", "schedule.epochs=1")
    plain = _trainer(tmp_path / "a", _recipe(*settings))
    compiled = _trainer(tmp_path / "b", _recipe(*settings, "run.compile=true"))
    assert compiled._step._network is not compiled.model
    losses = [trainer.fit()["loss"] for trainer in (plain, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    torch.testing.assert_close(_weights(compiled), _weights(plain), rtol=1e-3, atol=1e-4)


def test_a_network_that_cannot_be_compiled_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: torch.Tensor) -> torch.Tensor:
        raise TorchDynamoException("InvalidCxxCompiler: No working C++ compiler found\n\nmore")

    monkeypatch.setattr(torch, "compile", lambda _: refuse)
    trainer = _trainer(tmp_path, _recipe("run.compile=true"))
    with pytest.raises(
        UsageError, match=r"InvalidCxxCompiler: No .* found'?.; .*run.compile=false"
    ):
        trainer.fit()


def test_an_operation_that_is_not_deterministic_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("s3d", ["run.deterministic=true"])
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    sentence = "max_pool3d_backward, which model.name 's3d' needs"
    with pytest.raises(UsageError, match=sentence), determinism(recipe):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        raise RuntimeError("max_pool3d_backward does not have a deterministic implementation, but")
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="out of memory"), determinism(recipe):
        raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    ("name", "frames", "side", "fits"),
    # S3D halves frames three times and pixels five times, and takes the mean of 2 x 7 x 7 places
    [("s3d", 13, 209, True), ("s3d", 12, 224, False), ("s3d", 16, 208, False),
     ("r3d_18", 4, 32, True), ("swin3d_b", 2, 16, True), ("mvit_v2_s", 2, 16, True)],
)  # fmt: skip
def test_clips_that_are_too_small_are_refused_at_the_start(
    name: str, frames: int, side: int, *, fits: bool
) -> None:
    recipe = recipe_from_dict({"data": {"frames": frames}, "model": {"name": name},
                               "augment": {"resize": [side, side], "crop": [side, side]}})  # fmt: skip
    with (
        nullcontext()
        if fits
        else pytest.raises(UsageError, match=f"cannot take clips of {frames} ")
    ):
        check_clip_size(recipe, num_classes=3)


def test_the_check_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    check_clip_size(load_recipe("resnet"), num_classes=3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("wanted", [False, True])
def test_cudnn_tries_its_kernels_unless_the_same_result_is_wanted_twice(*, wanted: bool) -> None:
    before = torch.backends.cudnn.benchmark
    with determinism(_recipe(f"run.deterministic={str(wanted).lower()}")):
        assert torch.backends.cudnn.benchmark is not wanted
    assert torch.backends.cudnn.benchmark is before
