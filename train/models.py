"""The networks: torchvision's video models, a tiny one for demonstrations, and the user's own."""

from __future__ import annotations

import importlib
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import video
from torchvision.ops import StochasticDepth

from prep.errors import UsageError
from train.distributed import mean_in_rank_order
from train.fused_norm import has_fused_norm, use_fused_norm, why_not_fused
from train.mvit import set_clip_size
from train.precision import autocast, reduced_type
from train.tensor_cores import use_tensor_cores
from train.toml_values import nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from train.distributed import World
    from train.recipe import Recipe

TORCHVISION_MODELS = (
    "r3d_18",
    "mc3_18",
    "r2plus1d_18",
    "s3d",
    "mvit_v1_b",
    "mvit_v2_s",
    "swin3d_t",
    "swin3d_s",
    "swin3d_b",
)

_LISTED = 8


def model_names() -> list[str]:
    """Return the names that `build_model` knows by itself."""
    return [*TORCHVISION_MODELS, "tiny"]


def build_model(recipe: Recipe, num_classes: int) -> nn.Module:
    """Build the recipe's network with freshly drawn weights.

    The network takes float32 (N, 3, T, H, W) and returns logits (N, num_classes). Raises UsageError
    for a name that is unknown, and for a function that cannot be imported or called with
    `num_classes`.
    """
    name = recipe.model.name
    model = _builder(name)(num_classes=num_classes)
    if not isinstance(model, nn.Module):
        raise UsageError(f"model.name {name!r} must return a torch.nn.Module, not {type(model)}")
    if recipe.model.stochastic_depth >= 0:
        _set_stochastic_depth(model, recipe)
    if isinstance(model, video.MViT):
        _check_one_length(recipe)
        set_clip_size(model, (recipe.data.frames, *recipe.augment.crop))
    if recipe.model.freeze_batchnorm:
        for module in _batchnorms(model):
            module.requires_grad_(requires_grad=False)
    freeze_weights(model, recipe.model.freeze)
    if recipe.model.sync_batchnorm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    return model


def draw_model(recipe: Recipe, num_classes: int, world: World) -> nn.Module:
    """Draw the first weights, equal on all ranks, and leave each rank its own generator."""
    run = recipe.run
    if recipe.model.sync_batchnorm and world.device.type != "cuda":
        raise UsageError(
            "model.sync_batchnorm needs CUDA; on a CPU add --set model.sync_batchnorm=false"
        )
    check_clip_size(recipe, num_classes)
    torch.manual_seed(run.seed)
    model = build_model(recipe, num_classes).to(world.device)
    if run.channels_last_3d:
        keep_channels_last(model)
        if run.precision != "float32" and world.device.type == "cuda":
            # a network of the user's may look at what one layer gives the next
            is_known = recipe.model.name in model_names()
            use_tensor_cores(model, pads_between=is_known)
            if why_no_kernels(recipe, model, world.device) is None:
                use_fused_norm(model, with_relu=is_known)
    # dropout and its like must not be the same on every rank
    torch.manual_seed((run.seed + 1 + world.rank) % 2**63)
    return model


def why_no_kernels(recipe: Recipe, model: nn.Module, device: torch.device) -> str | None:
    """Say why a network's batch normalisation has none of kprep's kernels, where it could."""
    dtype = reduced_type(recipe.run.precision)
    if dtype is None or device.type != "cuda" or not recipe.run.channels_last_3d:
        return None
    reason = why_not_fused(device, dtype) if has_fused_norm(model) else None
    return reason and f"batch normalisation by PyTorch's kernels, which take longer: {reason}"


def keep_channels_last(model: nn.Module) -> None:
    """Lay out the weights of 3-D convolutions so; `Module.to` refuses a network with 2-D ones."""
    for weight in model.parameters():
        if weight.ndim == 5:
            weight.data = weight.data.to(memory_format=torch.channels_last_3d)


def check_clip_size(recipe: Recipe, num_classes: int) -> None:
    """Raise UsageError for clips that are too short or too small for a network of torchvision's.

    The network is run without any data, which costs a fraction of a second; it would otherwise
    fail at the first clips, with the words of one of its layers.
    """
    if recipe.model.name not in TORCHVISION_MODELS:
        return
    height, width = recipe.augment.crop
    with torch.device("meta"), torch.no_grad():
        model = build_model(recipe, num_classes).eval()
        for frames in sorted({recipe.data.frames, recipe.eval_frames}):
            try:
                model(torch.empty(1, 3, frames, height, width))
            except RuntimeError as error:
                raise UsageError(
                    f"model.name {recipe.model.name!r} cannot take clips of {frames} frames of "
                    f"{height} x {width} pixels ({str(error).splitlines()[0]}); raise data.frames, "
                    "eval.frames or augment.crop"
                ) from error


def distribute(model: nn.Module, world: World) -> DistributedDataParallel:
    """Wrap the network so that the ranks' gradients are averaged."""
    device_ids = [world.device] if world.device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, device_ids=device_ids)
    if world.device.type == "cpu" and world.size > 2:
        wrapped.register_comm_hook(None, lambda _, bucket: mean_in_rank_order(bucket.buffer()))
    return wrapped


def is_finite(model: nn.Module) -> bool:
    """Return whether weights and BatchNorm's statistics are finite; other buffers need not be."""
    statistics = [
        statistic
        for module in _batchnorms(model)
        for statistic in (module.running_mean, module.running_var)
        if isinstance(statistic, torch.Tensor)
    ]
    return all(bool(tensor.isfinite().all()) for tensor in [*model.parameters(), *statistics])


def check_all_used(model: nn.Module) -> None:
    """Raise UsageError, with their names, for weights that a backward of DDP gave no gradient.

    DDP waits for all of them: it has exchanged no gradient that shares a message with them.
    """
    names = [
        name
        for name, weight in model.named_parameters()
        if weight.requires_grad and weight.grad is None
    ]
    if names:
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        raise UsageError(
            f"the network does not use {', '.join(names[:_LISTED])}{more}: several processes can "
            "train only weights that every step uses; leave these out with model.freeze"
        )


def freeze_weights(model: nn.Module, patterns: Sequence[str]) -> None:
    """Leave out of training the weights whose names match a pattern (`*`, `?`, `[...]`).

    Raises UsageError for a pattern that matches nothing, and when nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(
                f"model.freeze {pattern!r} matches no weight; {nearest(pattern, names)}"
            )
    for name, weight in model.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            weight.requires_grad = False
    if not any(weight.requires_grad for weight in model.parameters()):
        if not patterns:
            raise UsageError("the network has no weights that can be trained")
        raise UsageError(f"model.freeze {list(patterns)} leaves nothing to train")


def set_training(model: nn.Module, *, freeze_batchnorm: bool) -> None:
    """Put the model into training mode; frozen BatchNorm keeps its stored statistics."""
    model.train()
    for module in _batchnorms(model):
        is_frozen = any(not weight.requires_grad for weight in module.parameters())
        if freeze_batchnorm or is_frozen:
            module.eval()


def tiny(num_classes: int) -> nn.Module:
    """Return a 3-D convolutional network of about 100,000 weights that a CPU trains in a minute.

    Takes float32 (N, 3, T, H, W) of any size. It ends in the maximum over time and space, not the
    mean: what moves covers a small part of the picture, and the mean drowns it (measured on the
    demo's videos: 25 % against 99 %).
    """
    return nn.Sequential(
        *_tiny_stage(3, 16, (1, 3, 3), (1, 2, 2)),
        *_tiny_stage(16, 32, (3, 3, 3), (1, 2, 2)),
        *_tiny_stage(32, 48, (3, 3, 3), (1, 1, 1)),
        *_tiny_stage(48, 32, (3, 3, 3), (1, 2, 2)),
        nn.AdaptiveMaxPool3d(1),
        nn.Flatten(),
        nn.Linear(32, num_classes),
    )


def _tiny_stage(
    inputs: int, outputs: int, kernel: tuple[int, int, int], stride: tuple[int, int, int]
) -> list[nn.Module]:
    padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
    return [
        nn.Conv3d(inputs, outputs, kernel, stride, padding, bias=False),
        nn.BatchNorm3d(outputs),
        nn.ReLU(inplace=True),
    ]


def _batchnorms(model: nn.Module) -> list[nn.Module]:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return [module for module in model.modules() if isinstance(module, kinds)]


def _builder(name: str) -> Callable[..., object]:
    """Return the function that builds the named model from `num_classes`."""
    if name == "tiny":
        return tiny
    if ":" in name:
        return _user_builder(name)
    if name not in TORCHVISION_MODELS:
        raise UsageError(
            f"model.name {name!r} does not exist (your own are named package.module:function); "
            f"{nearest(name, model_names())}"
        )
    found: Callable[..., object] = getattr(video, name)
    return found


def _user_builder(name: str) -> Callable[..., object]:
    module_name, _, function_name = name.partition(":")
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise UsageError(
            f"model.name {name!r}: {module_name!r} is no name of a module; "
            "a model of your own is named package.module:function"
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(
            f"model.name {name!r}: module {module_name!r} cannot be imported: {error}; "
            "it must be installed or on PYTHONPATH"
        ) from error
    found = getattr(module, function_name, None)
    if not callable(found):
        functions = sorted(key for key, value in vars(module).items() if callable(value))
        raise UsageError(
            f"model.name {name!r}: {module_name} has no function {function_name!r}; "
            f"{nearest(function_name, functions)}"
        )

    def build(num_classes: int) -> object:
        try:
            return found(num_classes=num_classes)
        except TypeError as error:
            raise UsageError(
                f"model.name {name!r} must be callable as {function_name}(num_classes=...): {error}"
            ) from error

    return build


def _set_stochastic_depth(model: nn.Module, recipe: Recipe) -> None:
    """Let blocks be left out in training with probabilities that rise in a line from 0."""
    layers = [layer for layer in model.modules() if isinstance(layer, StochasticDepth)]
    if len(layers) < 2:
        raise UsageError(
            f"model.stochastic_depth ({recipe.model.stochastic_depth:g}) has no effect on "
            f"model.name {recipe.model.name!r}, only on MViT and Swin3D; set it to -1"
        )
    for place, layer in enumerate(layers):
        layer.p = recipe.model.stochastic_depth * place / (len(layers) - 1)


def _check_one_length(recipe: Recipe) -> None:
    if recipe.eval_frames != recipe.data.frames:
        raise UsageError(
            f"model.name {recipe.model.name!r} takes clips of one length: eval.frames "
            f"({recipe.eval.frames}) must be 0, or data.frames ({recipe.data.frames})"
        )


def run_model(
    model: nn.Module, clips: torch.Tensor, recipe: Recipe, num_classes: int
) -> torch.Tensor:
    """Return the logits (N, num_classes) of clips, in the recipe's precision and memory format.

    Raises UsageError when the network returns anything else, which only a user's own can do.
    """
    if recipe.run.channels_last_3d:
        clips = clips.contiguous(memory_format=torch.channels_last_3d)
    with autocast(recipe.run.precision, clips.device):
        logits: torch.Tensor = model(clips)
    if not isinstance(logits, torch.Tensor):
        raise UsageError(
            f"model.name {recipe.model.name!r} returned a {type(logits).__name__}; "
            f"it must return a tensor of logits of shape ({len(clips)}, {num_classes})"
        )
    if tuple(logits.shape) != (len(clips), num_classes):
        raise UsageError(
            f"model.name {recipe.model.name!r} returned a tensor of shape {tuple(logits.shape)}; "
            f"it must return logits of shape ({len(clips)}, {num_classes}): one for each class"
        )
    return logits
