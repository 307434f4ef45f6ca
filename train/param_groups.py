"""Which weights share a learning rate and a weight decay: blocks of a network, kinds of weights.

A network is taken as a row of blocks, in the order in which it registers them: its direct children,
with plain `Sequential`, `ModuleList` and `ModuleDict` opened, and a lone child too. A BatchNorm
joins the block before it, another norm (a transformer's, before what it normalises) the block after
it; tensors of the network itself and modules that hold only bare tensors (class tokens, position
tables) join the first block. The last one holds the classifier.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from prep.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from train.recipe import OptimRecipe


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_OTHER_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
# pos_embed, rel_pos_h, spatial_pos, class_token, relative_position_bias_table
_POSITION = re.compile(r"(^|_)(pos|position|positional|token)(_|$)")


def parameter_groups(model: nn.Module, optim: OptimRecipe) -> list[dict[str, Any]]:
    """Return the optimiser's groups over all weights that are trained.

    Each has `params`, pairs of name and weight; `lr_scale`, its share of the learning rate; and
    `weight_decay`. Without `layer_decay`, `head_rate` and `no_decay` there is one group.

    Raises UsageError where `layer_decay` finds no row of blocks.
    """
    scales = rate_scales(model, optim.layer_decay, optim.head_rate)
    kinds = weight_kinds(model)
    groups: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            decay = 0.0 if kinds[name] in optim.no_decay else optim.weight_decay
            groups[scales[name], decay].append((name, weight))
    return [
        {"params": weights, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), weights in groups.items()
    ]


def rate_scales(model: nn.Module, layer_decay: float, head_rate: float) -> dict[str, float]:
    """Return each weight's share of the learning rate, by name.

    A block that is n blocks before the last one has `layer_decay` to the power of n; the
    classifier's weight and bias have `head_rate`.
    """
    blocks = weight_blocks(model)
    if layer_decay != 1 and len(blocks) < 2:
        raise UsageError(
            f"optim.layer_decay ({layer_decay:g}) needs a network with several blocks; this one "
            "registers all its weights in one module: set it to 1"
        )
    last = len(blocks) - 1
    scales = {
        name: layer_decay ** (last - place) for place, names in enumerate(blocks) for name in names
    }
    return scales | dict.fromkeys(head_names(model), head_rate)


def head_names(model: nn.Module) -> list[str]:
    """Return the names of the classifier's tensors: those of the last Linear or Conv3d."""
    layers = [
        name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv3d)
    ]
    return [name for name in model.state_dict() if name.rpartition(".")[0] in layers[-1:]]


def weight_blocks(model: nn.Module) -> list[list[str]]:
    """Return the names of the weights of each block, from the input to the classifier."""
    prefix, network = _without_wrapper(model)
    first = [f"{prefix}{name}" for name, _ in network.named_parameters(recurse=False)]
    blocks: list[list[str]] = []
    waiting: list[str] = []
    for name, module in _opened(prefix, network):
        names = [f"{name}.{weight}" for weight, _ in module.named_parameters()]
        if _is_bare(module):
            first += names
        elif isinstance(module, _NormBase) and blocks:
            blocks[-1] += names
        elif isinstance(module, _OTHER_NORMS):
            waiting += names
        elif names:
            blocks.append(waiting + names)
            waiting = []
    if not blocks:
        return [first + waiting]
    blocks[0] = first + blocks[0]
    blocks[-1] += waiting
    return blocks


def weight_kinds(model: nn.Module) -> dict[str, str]:
    """Return what each weight is: "norm", "bias", "position" or "weight", by name."""
    kinds = {}
    for module_name, module in model.named_modules():
        for name, _ in module.named_parameters(module_name, recurse=False):
            last = name.rpartition(".")[2]
            if isinstance(module, (_NormBase, *_OTHER_NORMS)):
                kinds[name] = "norm"
            elif _POSITION.search(last):
                kinds[name] = "position"
            elif last == "bias" or last.endswith("_bias"):
                kinds[name] = "bias"
            else:
                kinds[name] = "weight"
    return kinds


def _without_wrapper(model: nn.Module) -> tuple[str, nn.Module]:
    """Go into modules that hold one child and nothing else; return its name's prefix and it."""
    prefix = ""
    children = list(model.named_children())
    while len(children) == 1 and not any(True for _ in model.parameters(recurse=False)):
        name, model = children[0]
        prefix = f"{prefix}{name}."
        children = list(model.named_children())
    return prefix, model


def _opened(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the blocks below a module with their names; plain containers are opened."""
    for child_name, child in module.named_children():
        name = f"{prefix}{child_name}"
        # a subclass, such as the stem of a ResNet, is a block of its own
        if type(child) in _CONTAINERS:
            yield from _opened(f"{name}.", child)
        else:
            yield name, child


def _is_bare(module: nn.Module) -> bool:
    """Whether a module holds tensors of its own and no layer: a position encoding, say."""
    is_layer = isinstance(module, nn.Linear | _ConvNd | nn.Embedding)
    is_norm = isinstance(module, (_NormBase, *_OTHER_NORMS))
    has_children = any(True for _ in module.children())
    return not (is_layer or is_norm or has_children) and any(True for _ in module.parameters())
