"""Weights of a Swin for images, as the beginning of a Swin3D.

On a clip whose frames are all alike the inflated network says what the image network says of one of
them: the patch embedding takes the mean over its frames, and distances in time play no part.

Source: Liu et al., "Video Swin Transformer" (2022), section 3.3.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from torchvision.models.video import SwinTransformer3d

if TYPE_CHECKING:
    import torch
    from torch import nn

_EMBEDDING = {"0.0": "patch_embed.proj", "0.2": "patch_embed.norm"}
_STAGE = re.compile(r"features\.(\d+)\.(.+)")
_TABLE = "relative_position_bias_table"


def inflate_swin(
    model: nn.Module, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor] | None:
    """Return an image network's tensors in the names and shapes of a Swin3D.

    None where the network is no Swin3D, or the tensors are none of torchvision's Swin for images.
    """
    embedding = tensors.get("features.0.0.weight")
    if not isinstance(model, SwinTransformer3d) or embedding is None or embedding.dim() != 4:
        return None
    own, inflated = model.state_dict(), {}
    for name, tensor in tensors.items():
        new = _renamed(name)
        if new == "patch_embed.proj.weight":
            frames = own[new].shape[2]
            inflated[new] = tensor[:, :, None].repeat(1, 1, frames, 1, 1) / frames
        elif new.endswith(_TABLE) and new in own:
            inflated[new] = tensor.repeat(len(own[new]) // len(tensor), 1)
        elif new.endswith("relative_position_index"):
            continue  # no weight: which distance two places of a window have
        else:
            inflated[new] = tensor
    indices = {name: value for name, value in own.items() if name.endswith("position_index")}
    return inflated | indices


def _renamed(name: str) -> str:
    """Return a tensor's name in a Swin3D, whose features begin after the embedding."""
    match = _STAGE.fullmatch(name)
    if not match:
        return name
    number, rest = int(match[1]), match[2]
    if number:
        return f"features.{number - 1}.{rest}"
    place, _, kind = rest.rpartition(".")
    return f"{_EMBEDDING.get(f'0.{place}', f'features.0.{place}')}.{kind}"
