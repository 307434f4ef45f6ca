"""PyTorch's stack, asked to give the same result twice; and its refusals, in one sentence."""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from prep.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from train.recipe import Recipe

_REFUSAL = re.compile(r"(\w+) does not have a deterministic implementation")


@contextmanager
def determinism(recipe: Recipe) -> Iterator[None]:
    """Switch PyTorch to deterministic algorithms for this run, if the recipe wants it.

    Raises UsageError for an operation that has none: on CUDA, 3-D max pooling's gradient among
    them, which S3D and MViT need.
    """
    before = torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    if recipe.run.deterministic:
        # cuBLAS reads this when it starts; without it PyTorch refuses matrix products
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(mode=True)
        torch.backends.cudnn.benchmark = False
    else:  # as torchvision's reference has it: cuDNN tries its kernels for each new shape
        torch.backends.cudnn.benchmark = True
    try:
        yield
    except RuntimeError as error:
        match = _REFUSAL.match(str(error))
        if not (recipe.run.deterministic and match):
            raise
        raise UsageError(
            f"run.deterministic: {match[1]}, which model.name {recipe.model.name!r} needs, cannot "
            "give the same result twice on this device; set run.deterministic=false, or train on "
            "a CPU"
        ) from error
    finally:
        torch.use_deterministic_algorithms(mode=before)
        torch.backends.cudnn.benchmark = benchmark
