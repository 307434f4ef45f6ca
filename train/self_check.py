"""A look at the machine's arithmetic before hours are spent on it."""

from __future__ import annotations

import torch
from torch import nn

from prep.errors import KprepError
from train.precision import autocast

# bfloat16 has 8 bits of mantissa: single products are off by up to 2^-9 = 0.2 %, and so is their
# sum, measured as norms. A wrong kernel (cuDNN 9.10 had one) is off by tens of percent.
_TOLERANCE = 0.02


def check_first_convolution(
    model: nn.Module, precision: str, clip: tuple[int, int, int], device: torch.device
) -> float | None:
    """Compare the first 3-D convolution in reduced precision with float32.

    Args:
        model: the network, on `device`.
        precision: `run.precision`.
        clip: frames, height and width of a clip.
        device: that it runs on.

    Returns:
        The relative error |reduced - float32| / |float32|; None for float32, and for a network
        without a convolution of RGB clips.

    Raises KprepError when the error is above 2 %.
    """
    first = next((layer for layer in model.modules() if isinstance(layer, nn.Conv3d)), None)
    if precision == "float32" or first is None or first.in_channels != 3:
        return None
    generator = torch.Generator().manual_seed(0)  # the run's own generators stay untouched
    clips = torch.randn((2, 3, *clip), generator=generator).to(device)
    with torch.no_grad():
        wanted = first(clips)
        with autocast(precision, device):
            found = first(clips).float()
    error = float((found - wanted).norm() / wanted.norm())
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    if not error <= _TOLERANCE:
        raise KprepError(
            f"the first convolution is off by {error:.1%} in {precision} (float32 is right, "
            f"{_TOLERANCE:.0%} would be too much): this PyTorch {torch.__version__} with cuDNN "
            f"{cudnn} computes wrong results here; "
            "use --set run.precision=float32, or other versions"
        )
    return error
