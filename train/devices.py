"""What devices can compute at most: the denominator of model FLOP utilisation."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Peak:
    """Dense 10^12 operations a second of one device, without structured sparsity; 0: none.

    float32  with TensorFloat-32 where the device has it: PyTorch's convolutions use it
    bf16     tensor cores, accumulated in float32
    fp16     likewise
    """

    name: str
    float32: float
    bf16: float
    fp16: float


# Names as torch.cuda.get_device_name gives them, matched whole: a slice of a device (MIG) or
# another variant of it is another device. Numbers are those of NVIDIA's data sheets, halved where
# they are given with sparsity.
_PEAKS: tuple[tuple[str, Peak], ...] = (
    # "NVIDIA H100 Tensor Core GPU" and "NVIDIA H200 Tensor Core GPU", data sheets
    (r"NVIDIA H100 80GB HBM3", Peak("H100 SXM", 494.7, 989.4, 989.4)),
    (r"NVIDIA H100 PCIe", Peak("H100 PCIe", 378, 756, 756)),
    (r"NVIDIA H100 NVL", Peak("H100 NVL", 417.5, 835.5, 835.5)),
    (r"NVIDIA H200", Peak("H200 SXM", 494.7, 989.4, 989.4)),
    (r"NVIDIA H200 NVL", Peak("H200 NVL", 417.5, 835.5, 835.5)),
    # "NVIDIA A100 Tensor Core GPU", data sheet; SXM and PCIe alike
    (r"NVIDIA A100(-SXM4|-PCIE|-PG\d+)?(-| )[48]0GB( PCIe)?", Peak("A100", 156, 312, 312)),
    # "NVIDIA V100 Tensor Core GPU", data sheet; no bfloat16
    (r"Tesla V100-SXM[23]-(16|32)GB", Peak("V100 SXM", 15.7, 0, 125)),
    (r"Tesla V100-PCIE-(16|32)GB", Peak("V100 PCIe", 14, 0, 112)),
    (r"Tesla V100S-PCIE-32GB", Peak("V100S PCIe", 16.4, 0, 130)),
    # "NVIDIA L4 Tensor Core GPU", "NVIDIA L40S", "NVIDIA A10 Tensor Core GPU", data sheets
    (r"NVIDIA L4", Peak("L4", 60, 121, 121)),
    (r"NVIDIA L40S", Peak("L40S", 183, 362, 362)),
    (r"NVIDIA A10", Peak("A10", 62.5, 125, 125)),
    # "NVIDIA T4 Tensor Core GPU", data sheet; no bfloat16
    (r"(Tesla|NVIDIA) T4", Peak("T4", 8.1, 0, 65)),
    # "NVIDIA Ada GPU Architecture" and "NVIDIA Ampere GA102 GPU Architecture", white papers:
    # these accumulate in float32 at half the advertised rate
    (r"NVIDIA GeForce RTX 4090", Peak("RTX 4090", 82.6, 165.2, 165.2)),
    (r"NVIDIA GeForce RTX 3090", Peak("RTX 3090", 35.6, 71, 71)),
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Return the operations a second that a device can do at most, or None where it is not known.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it.
        precision: "float32", "bf16" or "fp16".
    """
    for pattern, peak in _PEAKS:
        if re.fullmatch(pattern, device_name):
            teraflops: float = getattr(peak, precision)
            return teraflops * 1e12 or None
    return None
