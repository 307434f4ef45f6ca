"""torch.compile, and what it says where it cannot work, in one sentence."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from prep.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator


def compiled(network: nn.Module) -> nn.Module:
    """Return the network compiled; the work begins with its first clips."""
    return cast("nn.Module", torch.compile(network))


@contextmanager
def compiler_errors() -> Iterator[None]:
    """Turn what the compiler raises at the first clips into a UsageError."""
    try:
        yield
    except RuntimeError as error:
        # by name: importing torch._dynamo costs a second that runs without it need not wait
        if not any(kind.__name__ == "TorchDynamoException" for kind in type(error).__mro__):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UsageError(
            f"run.compile: the network cannot be compiled here ({lines[0] if lines else error!r}); "
            "a C++ compiler, and Triton for CUDA, must be there: set run.compile=false to do "
            "without"
        ) from error
