"""Convolutions in the form of tensor cores: same results, gradients, statistics and names."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, cast

import pytest
import torch
from torch import nn
from torchvision.models import video

from train import models
from train.distributed import World
from train.flops import count_flops
from train.models import draw_model
from train.recipe import load_recipe
from train.tensor_cores import restore_layers, use_tensor_cores

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("one_thread")

LAST = torch.channels_last_3d


def _twins(build: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = build().double().to(memory_format=LAST)
    changed = copy.deepcopy(plain)
    use_tensor_cores(changed, pads_between=True)
    return plain, changed


def _assert_same(plain: nn.Module, changed: nn.Module, clips: torch.Tensor) -> None:
    """Compare results, gradients and BatchNorm's statistics of a training step and an evaluation."""
    given = [clips.clone().requires_grad_(), clips.clone().requires_grad_()]
    results = [model(one) for model, one in zip((plain, changed), given, strict=True)]
    _assert_close(results[1], results[0])
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(results[0].shape, generator=generator, dtype=torch.float64)
    for result in results:
        (result * weights).sum().backward()
    _assert_close(given[1].grad, given[0].grad)
    for (name, one), (other_name, other) in zip(
        plain.named_parameters(), changed.named_parameters(), strict=True
    ):
        assert name == other_name
        _assert_close(other.grad, one.grad)
    for name, value in plain.state_dict().items():
        _assert_close(changed.state_dict()[name], value)
    _assert_close(changed.eval()(clips), plain.eval()(clips))


def _assert_close(found: torch.Tensor | None, wanted: torch.Tensor | None) -> None:
    """Compare to 10 digits of the largest value, or of 1: sums are taken in another order."""
    assert found is not None
    assert wanted is not None
    bound = 1e-10 * max(float(wanted.detach().abs().max()), 1.0)
    torch.testing.assert_close(found, wanted, rtol=0, atol=bound)


def _clips(*shape: int, channels: int = 3) -> torch.Tensor:
    clips = torch.randn(2, channels, *shape, dtype=torch.float64)
    return clips.contiguous(memory_format=LAST)


@pytest.mark.parametrize("name", ["r3d_18", "mc3_18", "r2plus1d_18"])
def test_torchvisions_networks_compute_the_same(name: str) -> None:
    plain, changed = _twins(lambda: getattr(video, name)(num_classes=5))
    _assert_same(plain, changed, _clips(8, 24, 24))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv3d(3, 5, (1, 7, 7), stride=(1, 2, 2), padding=(0, 3, 3)),
        nn.Conv3d(3, 5, (3, 7, 7), stride=(2, 4, 4), padding=(1, 3, 3)),
        nn.Conv3d(3, 5, 3, stride=2, padding=1, bias=False),
        nn.Conv3d(3, 5, 2, stride=2),
        nn.Conv3d(3, 5, (1, 5, 4), stride=(1, 3, 3), padding=(0, 2, 1)),
        nn.Conv3d(3, 5, 1, stride=3),
        nn.Conv3d(3, 5, 3, stride=(1, 2, 3), padding=1),
        nn.Conv3d(3, 5, 3, stride=2, padding=2, dilation=2),
        nn.Conv3d(16, 5, (1, 3, 3), padding=(0, 2, 2), dilation=(1, 2, 2), bias=False),
        nn.Conv3d(16, 5, (3, 1, 1), stride=(2, 1, 1), padding=(2, 0, 0), dilation=(2, 1, 1)),
        nn.Conv3d(6, 5, 1),
        nn.Conv3d(6, 5, 1, stride=2),
        nn.Conv3d(6, 5, (1, 3, 3), padding=1),
        nn.Conv3d(6, 5, (3, 1, 1), padding=1),
        nn.Conv3d(3, 8, 3, padding=1),
        nn.Conv3d(6, 6, 3, groups=3),
        nn.Conv3d(6, 6, (1, 3, 3), padding=1, padding_mode="replicate"),
        nn.Conv3d(6, 6, 3, padding="same"),
    ],
    ids=str,
)
def test_every_kind_of_convolution_computes_the_same(layer: nn.Conv3d) -> None:
    plain, changed = _twins(lambda: nn.Sequential(copy.deepcopy(layer)))
    _assert_same(plain, changed, _clips(5, 9, 11, channels=layer.in_channels))


@pytest.mark.parametrize("size", [(16, 16), (16, 17), (15, 16), (9, 9)])
@pytest.mark.parametrize("padding", [0, 1, 2, 3])
@pytest.mark.parametrize("stride", [2, 3, 4])
def test_squares_of_pixels_are_convolved_as_the_pixels_are(
    stride: int, padding: int, size: tuple[int, int]
) -> None:
    """RGB in every place that a kernel can have over squares, at every edge."""
    layer = nn.Conv3d(3, 5, (1, 7, 5), stride=(1, stride, stride), padding=(0, padding, padding))
    plain, changed = _twins(lambda: nn.Sequential(layer))
    _assert_same(plain, changed, _clips(2, *size))


def _middle(norm: nn.Module, *, bias: bool = False, relu: nn.Module | None = None) -> nn.Module:
    first = nn.Conv3d(8, 13, (1, 3, 3), padding=(0, 1, 1), bias=bias)
    last = nn.Conv3d(13, 6, (3, 1, 1), padding=(1, 0, 0))
    return nn.Sequential(first, norm, relu or nn.ReLU(inplace=True), last, nn.BatchNorm3d(6))


@pytest.mark.parametrize(
    ("build", "between"),
    [
        (lambda: _middle(nn.BatchNorm3d(13)), 16),
        (lambda: _middle(nn.BatchNorm3d(13, momentum=0.3, eps=0.01)), 16),
        (lambda: _middle(nn.BatchNorm3d(13, momentum=None)), 13),
        (lambda: _middle(nn.BatchNorm3d(13, affine=False)), 13),
        (lambda: _middle(nn.BatchNorm3d(13, track_running_stats=False)), 13),
        (lambda: _middle(nn.BatchNorm3d(13), bias=True), 13),
        (lambda: _middle(nn.BatchNorm3d(13), relu=nn.Sigmoid()), 13),  # zeros would not stay zero
        (lambda: _middle(nn.InstanceNorm3d(13)), 13),
    ],
)
def test_channels_in_between_are_padded_where_zeros_stay_zero(
    build: Callable[[], nn.Module], between: int
) -> None:
    plain, changed = _twins(build)
    seen: list[int] = []
    changed[2].register_forward_hook(lambda _, __, out: seen.append(out.shape[1]))  # type: ignore[index]
    _assert_same(plain, changed, _clips(4, 6, 6, channels=8))
    assert set(seen) == {between}


class _Reading(nn.Sequential):
    """Uses what its layers give each other."""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        middle = self[2](self[1](self[0](clips)))
        return self[4](self[3](middle)) + middle.mean()


def test_a_sequential_with_a_forward_of_its_own_keeps_its_channels() -> None:
    plain, changed = _twins(lambda: _Reading(*_middle(nn.BatchNorm3d(13)).children()))
    _assert_same(plain, changed, _clips(4, 6, 6, channels=8))


class _Looking(nn.Module):
    """A user's network that slices a plain Sequential and keeps what is in between."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        first = nn.Conv3d(3, 13, (1, 3, 3), padding=(0, 1, 1), bias=False)
        last = nn.Conv3d(13, num_classes, (3, 1, 1), padding=(1, 0, 0))
        self.layers = nn.Sequential(first, nn.BatchNorm3d(13), nn.ReLU(), last)
        self.side = nn.Linear(13, num_classes)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        middle = self.layers[:3](clips)
        return self.layers[3](middle).mean((2, 3, 4)) + self.side(middle.mean((2, 3, 4)))


def test_a_network_of_ones_own_keeps_the_channels_it_looks_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = _Looking(4).double()
    monkeypatch.setattr(nn.Module, "to", lambda self, *_: self)  # there need not be a GPU
    settings = ("run.channels_last_3d=true", "run.precision=bf16")
    name = f"model.name={__name__}:_Looking"
    world = World(0, 1, torch.device("cuda"), None)
    changed = draw_model(load_recipe("tiny", [*settings, name]), 4, world).double()
    assert [type(layer) for layer in changed.modules()] != [
        type(layer) for layer in plain.modules()
    ]
    changed.load_state_dict(plain.state_dict())
    _assert_same(plain, changed, _clips(4, 6, 6))


@pytest.mark.parametrize(("own", "given"), [(16, 24), (13, 16), (3, 1), (3, 4), (3, 8), (3, 12)])
def test_wrong_channels_are_still_refused(own: int, given: int) -> None:
    _, changed = _twins(lambda: nn.Sequential(nn.Conv3d(own, 5, 3)))
    with pytest.raises(RuntimeError, match="channels"):
        changed(_clips(4, 6, 6, channels=given))


def test_restored_layers_are_those_from_before_and_operations_count_without_zeros() -> None:
    plain, changed = _twins(lambda: video.r2plus1d_18(num_classes=5))
    assert count_flops(changed.float(), (8, 24, 24)) == count_flops(plain.float(), (8, 24, 24))
    kinds = [type(module) for module in plain.modules()]
    assert [type(module) for module in changed.modules()] != kinds
    restore_layers(changed)
    assert [type(module) for module in changed.modules()] == kinds


@pytest.mark.parametrize(
    ("settings", "is_used"),
    [
        (("run.channels_last_3d=true", "run.precision=bf16"), True),
        (("run.channels_last_3d=true",), False),
        (("run.precision=bf16",), False),
    ],
)
def test_networks_on_a_gpu_in_reduced_precision_get_it(
    monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...], *, is_used: bool
) -> None:
    monkeypatch.setattr(nn.Module, "to", lambda self, *_: self)  # there need not be one
    called: list[nn.Module] = []
    monkeypatch.setattr(models, "use_tensor_cores", lambda model, **_: called.append(model))
    for device, wanted in (("cuda", is_used), ("cpu", False)):
        called.clear()
        draw_model(load_recipe("tiny", settings), 4, World(0, 1, torch.device(device), None))
        assert bool(called) == wanted


def test_channels_are_filled_up_to_128_where_it_adds_little() -> None:
    _, changed = _twins(lambda: video.r2plus1d_18(num_classes=5))
    seen: dict[int, int] = {}

    def note(norm: nn.Module, _: object, out: torch.Tensor) -> None:
        seen[cast("nn.BatchNorm3d", norm).num_features] = out.shape[1]

    for module in changed.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.register_forward_hook(note)
    changed(_clips(4, 16, 16))
    assert seen == {
        45: 48, 64: 64, 144: 144, 230: 256, 128: 128, 288: 288, 460: 512, 256: 256, 576: 576,
        921: 1024, 512: 512, 1152: 1152,
    }  # fmt: skip
