"""Reduced precision: autocast and, for fp16, the scaling of gradients."""

from __future__ import annotations

import torch

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the context for the network's forward pass; it changes nothing for float32."""
    kind = _TYPES.get(precision)
    return torch.autocast(device.type, dtype=kind or torch.bfloat16, enabled=kind is not None)


def reduced_type(precision: str) -> torch.dtype | None:
    """Return the type in which the network computes, or None for float32."""
    return _TYPES.get(precision)


def gradient_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Return the scaler that keeps fp16's gradients in range; it changes nothing otherwise.

    Steps whose gradients overflow are left out, on all ranks alike since gradients are summed
    first, and the scale is halved.
    """
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
