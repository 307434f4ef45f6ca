"""MViT for clips of any size: torchvision builds it for 16 frames of 224 x 224 pixels only.

Position tables are made for the grids that clips of a size really give, and those of weights are
interpolated between grids, linearly along each axis. MViT v1 has one table of places in a frame and
one of frames; MViT v2 has tables of distances, by rows, columns and frames, in every block.

Source: Fan et al., "Multiscale Vision Transformers" (2021), Li et al., "MViTv2" (2022); their
published code interpolates its tables linearly, too.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn import functional
from torchvision.models.video import MViT

from prep.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

BUILT_FOR = (16, 224, 224)
"""Frames, height and width of the clips that torchvision's builders make tables for."""

Grid = tuple[int, int, int]
"""Frames, rows and columns."""

_TABLES = ("temporal_pos", "rel_pos_h", "rel_pos_w", "rel_pos_t")  # along one axis


def set_clip_size(model: nn.Module, clip: Grid) -> None:
    """Give a fresh MViT tables for clips of other frames, height and width; drawn as its own are.

    A MViT for `BUILT_FOR` stays as it is, and so does any other network.
    """
    if not isinstance(model, MViT) or clip == BUILT_FOR:
        return
    places = pooled(clip, model.conv_proj)
    encoding = model.pos_encoding
    encoding.temporal_size, encoding.spatial_size = places[0], places[1:]
    if encoding.spatial_pos is not None:
        encoding.spatial_pos = _table(encoding.spatial_pos, places[1] * places[2])
        encoding.temporal_pos = _table(encoding.temporal_pos, places[0])
    for block in model.blocks:
        attention = block.attn
        keys = pooled(places, attention.pool_k.pool) if attention.pool_k else places
        places = pooled(places, attention.pool_q.pool) if attention.pool_q else places
        if attention.rel_pos_h is not None:
            frames, rows, columns = (2 * max(pair) - 1 for pair in zip(places, keys, strict=True))
            attention.rel_pos_t = _table(attention.rel_pos_t, frames)
            attention.rel_pos_h = _table(attention.rel_pos_h, rows)
            attention.rel_pos_w = _table(attention.rel_pos_w, columns)


def pooled(size: Grid, layer: nn.Module) -> Grid:
    """Return the grid that a 3-D convolution makes of another."""
    convolution = cast("nn.Conv3d", layer)
    padding = cast("Sequence[int]", convolution.padding)
    return cast(
        "Grid",
        tuple(
            (length + 2 * pad - kernel) // stride + 1
            for length, pad, kernel, stride in zip(
                size, padding, convolution.kernel_size, convolution.stride, strict=True
            )
        ),
    )


def fit_position_tables(
    model: nn.Module, tensors: dict[str, torch.Tensor], crop: tuple[int, int] | None, source: str
) -> dict[str, torch.Tensor]:
    """Return those tables of weights that a MViT has at another length, interpolated to its own.

    Args:
        model: to be loaded; {} is returned where it is no MViT.
        tensors: of the weights, by name.
        crop: height and width of the clips that the weights are for; None takes them as square.
        source: of the weights, for errors.

    Raises UsageError when the grid of a table of places cannot be told.
    """
    if not isinstance(model, MViT):
        return {}
    fitted = {}
    for name, own in model.state_dict().items():
        kind, saved = name.rpartition(".")[2], tensors.get(name)
        if saved is None or saved.dim() != 2:
            continue
        if kind == "spatial_pos":
            old = _saved_grid(model, len(saved), crop, source)
            new = cast("tuple[int, int]", tuple(model.pos_encoding.spatial_size))
            if old != new:
                fitted[name] = _interpolated_places(saved, old, new)
        elif kind in _TABLES and len(saved) != len(own):
            fitted[name] = _interpolated(saved, len(own))
    return fitted


def _table(old: nn.Parameter, length: int) -> nn.Parameter:
    table = torch.empty((length, old.shape[1]), dtype=old.dtype, device=old.device)
    return nn.Parameter(nn.init.trunc_normal_(table, std=0.02))  # as torchvision draws them


def _saved_grid(
    model: MViT, places: int, crop: tuple[int, int] | None, source: str
) -> tuple[int, int]:
    """Return rows and columns of the frames that a table of `places` is for."""
    if crop is not None:
        _, rows, columns = pooled((1, *crop), model.conv_proj)
    else:
        rows = columns = math.isqrt(places)
    if rows * columns != places:
        raise UsageError(
            f"--weights {source} have positions for {places} places in a frame, which are no "
            "square; begin with a checkpoint of kprep, whose recipe tells height and width"
        )
    return rows, columns


def _interpolated(table: torch.Tensor, length: int) -> torch.Tensor:
    """Stretch a table (L, C) to (length, C), linearly, as torchvision does for distances."""
    columns = table.float().T[None]
    stretched = functional.interpolate(columns, size=length, mode="linear", align_corners=False)
    return stretched[0].T.to(table.dtype).contiguous()


def _interpolated_places(
    table: torch.Tensor, old: tuple[int, int], new: tuple[int, int]
) -> torch.Tensor:
    """Stretch a table (rows x columns, C) from one grid to another, bilinearly."""
    picture = table.float().T.reshape(1, table.shape[1], *old)
    stretched = functional.interpolate(picture, size=new, mode="bilinear", align_corners=False)
    return stretched.flatten(2)[0].T.to(table.dtype).contiguous()
