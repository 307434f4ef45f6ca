"""For programs that try Triton's kernels: where they run, and how a test runs such a program.

Without a GPU, Triton must be told to interpret its kernels before it is imported: hence programs of
their own, which begin with `choose_device`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import torch


def choose_device() -> str:
    """Return the device's name; without a GPU, let Triton interpret from now on."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    if torch.cuda.is_available():
        return "cuda"
    os.environ["TRITON_INTERPRET"] = "1"
    return "cpu"


def found_by(child: str) -> dict[str, Any]:
    """Run a program of this folder, on a GPU where there is one, and return the JSON it prints."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name(child)],
        capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return cast("dict[str, Any]", json.loads(done.stdout))
