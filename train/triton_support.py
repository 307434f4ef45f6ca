"""Whether a device can run kernels in Triton."""

from __future__ import annotations

from importlib.util import find_spec

import torch


def why_no_triton(device: torch.device) -> str | None:
    """Return why a device has no kernels in Triton, or None: whether they work is to be tried."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None if find_spec("triton") else "Triton is not installed"


def failure(error: Exception) -> str:
    """Say in one line what the compiler raised, which may be anything."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"Triton failed with {type(error).__name__}: {lines[-1] if lines else 'no reason'}"
