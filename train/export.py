"""A trained network for other programs: a state dict, a torch.export program or ONNX.

Every file is read back and compared with the network before it appears under its name.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

import torch
import torchvision
from torch import nn

from prep.errors import KprepError, UsageError
from prep.storage import write_atomic
from prep.write_errors import write_error, write_errors
from train.checkpoint import Checkpoint, load_checkpoint
from train.models import TORCHVISION_MODELS, build_model, model_names
from train.mvit import BUILT_FOR, set_clip_size
from train.protocol import protocol
from train.random_state import kept_random_state
from train.recipe import parse_recipe

if TYPE_CHECKING:
    from pathlib import Path

    from train.recipe import Recipe

# Two sizes: a program that was fixed to the size of the example it was made with fails for one.
_BATCHES = (1, 3)
# Other kernels and another order of sums; more than this is another network.
_TOLERANCE = 1e-4

Network = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Parity:
    """How far the logits of a written file are from those of the network.

    largest_difference and largest_logit are absolute values, over batches of 1 and 3 clips.
    """

    program: str
    largest_difference: float
    largest_logit: float

    @property
    def is_close(self) -> bool:
        """Whether the difference is one of rounding; False where there is a NaN."""
        return self.largest_difference <= _TOLERANCE * max(1.0, self.largest_logit)

    def __str__(self) -> str:
        """Say so."""
        return (
            f"{self.program}: logits differ by at most {self.largest_difference:.2g} "
            f"(the largest is {self.largest_logit:.3g}), in batches of 1 and 3 clips"
        )


@dataclass(frozen=True)
class Trained:
    """A network out of a checkpoint, in evaluation mode on the CPU."""

    network: nn.Module
    recipe: Recipe
    class_names: list[str]
    epochs: int
    steps: int
    is_averaged: bool

    @property
    def clip(self) -> tuple[int, int, int]:
        """Frames, height and width of the clips that it takes."""
        return (self.recipe.eval_frames, *self.recipe.augment.crop)

    def __str__(self) -> str:
        """Say what it is."""
        weights = "averaged weights" if self.is_averaged else "weights"
        return (
            f"{self.recipe.model.name}: {weights} after {self.epochs} epochs ({self.steps} steps), "
            f"{len(self.class_names)} classes"
        )


def load_trained(
    path: Path, *, averaged: bool | None = None, model_name: str | None = None
) -> Trained:
    """Read the network of a checkpoint, or of a run's output directory (its `final.pt`).

    Args:
        path: the file or directory.
        averaged: whether to take the averaged weights; None takes them where there are some.
        model_name: `package.module:function`, needed where the checkpoint names such a function:
            a file alone must not decide what code runs.

    Raises UsageError for what cannot be done as asked, KprepError for a damaged file.
    """
    path = path / "final.pt" if path.is_dir() else path
    saved = load_checkpoint(path)
    recipe = parse_recipe(saved.recipe, str(path))
    name = recipe.model.name
    if name not in model_names() and name != model_name:
        raise UsageError(
            f"checkpoint {path} is of a network that is not kprep's; "
            f"if you trust {name!r}, say --model {name}"
        )
    tensors = _tensors(saved, path, averaged=averaged)
    # ranks are nobody's concern any more, and freezing none of the weights' names
    recipe = replace(recipe, model=replace(recipe.model, sync_batchnorm=False))
    with kept_random_state():
        network = build_model(recipe, len(saved.class_names))
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        text = str(error).splitlines()[-1].strip()
        raise UsageError(f"checkpoint {path} does not fit {name!r}: {text}") from error
    return Trained(
        network=network.eval().requires_grad_(requires_grad=False),
        recipe=recipe,
        class_names=saved.class_names,
        epochs=saved.epoch,
        steps=saved.step,
        is_averaged=tensors is saved.ema,
    )


def export(trained: Trained, form: str, output: Path) -> Parity:
    """Write a network as `form`, a key of `_WAYS`, and what it needs to be used beside it as JSON.

    The file takes normalised clips, float32 (N, 3, T, H, W) for any N, and returns logits float32
    (N, classes). It appears when it has given the network's logits. Raises UsageError where a
    package is missing, the path cannot be right or is a checkpoint, which would be lost;
    StorageError where the disk fails; KprepError where the network cannot be exported or gives
    other logits.
    """
    if not output.parent.is_dir():
        raise UsageError(f"--output {output}: the directory {output.parent} does not exist")
    if _is_checkpoint(output):
        raise UsageError(f"--output {output} is a checkpoint of kprep; name another file")
    if form == "onnx":
        _check_onnx()
    # the suffix stays the last: torch.export wants its own
    temporary = output.with_name(f".{output.stem}.{os.getpid()}.tmp{output.suffix}")
    to_bytes, read = _WAYS[form]
    try:
        with kept_random_state():
            parity = _compare(trained, *_write_and_read(trained, temporary, to_bytes, read))
        if not parity.is_close:
            raise KprepError(f"{output} is not written, it is another network: {parity}")
        temporary.replace(output)
    except OSError as error:
        raise write_error(f"--output {output}", error) from error
    finally:
        temporary.unlink(missing_ok=True)
    beside = sidecar_path(output)
    with write_errors(beside):
        write_atomic(beside, _sidecar(trained, form, parity))
    return parity


def sidecar_path(output: Path) -> Path:
    """Return the path of the JSON file beside an exported network."""
    return output.with_name(f"{output.name}.json")


def _is_checkpoint(path: Path) -> bool:
    try:
        load_checkpoint(path, in_place=True)
    except KprepError:
        return False
    return True


def _tensors(saved: Checkpoint, path: Path, *, averaged: bool | None) -> dict[str, Any]:
    if averaged and saved.ema is None:
        raise UsageError(f"checkpoint {path} holds no averaged weights; leave out --averaged")
    return saved.ema if saved.ema is not None and averaged is not False else saved.model


def _check_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"--format onnx needs {' and '.join(missing)}: pip install 'kprep[export]'"
        )


def _write_and_read(
    trained: Trained,
    path: Path,
    to_bytes: Callable[[Trained], bytes],
    read: Callable[[Trained, Path], tuple[str, Network]],
) -> tuple[str, Network]:
    try:
        # exporters would write themselves, and say of a full disk what they met, or abort
        path.write_bytes(to_bytes(trained))
        return read(trained, path)
    except OSError:
        raise
    except Exception as error:  # exporters raise whatever they meet
        text = str(error).strip().partition("\n")[0] or type(error).__name__
        raise KprepError(f"{trained.recipe.model.name} cannot be exported: {text}") from error


def _compare(trained: Trained, program: str, network: Network) -> Parity:
    difference = logit = 0.0
    for size in _BATCHES:
        generator = torch.Generator().manual_seed(size)
        clips = torch.randn(size, 3, *trained.clip, generator=generator)
        with torch.inference_mode():
            wanted = trained.network(clips)
        found = network(clips)
        # torch's maximum keeps a NaN, Python's would lose it
        worst = torch.stack([(found - wanted).abs().max(), torch.tensor(difference)]).max()
        difference, logit = float(worst), max(logit, float(wanted.abs().max()))
    return Parity(program, difference, logit)


def _example(trained: Trained) -> torch.Tensor:
    # two clips: a batch of one would be taken as a constant
    return torch.zeros(2, 3, *trained.clip)


def _state_dict(trained: Trained) -> bytes:
    tensors = {name: value.contiguous() for name, value in trained.network.state_dict().items()}
    file = io.BytesIO()
    torch.save(tensors, file)
    return file.getvalue()


def _read_state_dict(trained: Trained, path: Path) -> tuple[str, Network]:
    name, clip = trained.recipe.model.name, trained.clip
    if name in TORCHVISION_MODELS:
        builder = getattr(torchvision.models.video, name)
        network = cast("nn.Module", builder(num_classes=len(trained.class_names)))
        set_clip_size(network, clip)
        program = f"torchvision {torchvision.__version__}"
        if name.startswith("mvit") and clip != BUILT_FOR:
            program += " after train.mvit.set_clip_size"
    else:
        network, program = build_model(trained.recipe, len(trained.class_names)), name
    network.load_state_dict(torch.load(path, weights_only=True), strict=True)
    return program, torch.inference_mode()(network.eval())


def _torch_export(trained: Trained) -> bytes:
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(
        trained.network, (_example(trained),), dynamic_shapes=({0: batch},)
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def _read_torch_export(_: Trained, path: Path) -> tuple[str, Network]:
    with path.open("rb") as file:
        program = torch.export.load(file)
    return f"torch.export, torch {torch.__version__}", torch.inference_mode()(program.module())


def _onnx(trained: Trained) -> bytes:
    batch = torch.export.Dim("batch", min=1)
    program = torch.onnx.export(
        trained.network,
        (_example(trained),),
        dynamo=True,
        input_names=["clips"],
        output_names=["logits"],
        dynamic_shapes=({0: batch},),
        verbose=False,
    )
    content: bytes = cast("torch.onnx.ONNXProgram", program).model_proto.SerializeToString()
    return content


def _read_onnx(_: Trained, path: Path) -> tuple[str, Network]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(clips: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(["logits"], {"clips": clips.numpy()})[0])

    return f"onnxruntime {onnxruntime.__version__}", run


_WAYS: dict[str, Any] = {
    "state-dict": (_state_dict, _read_state_dict),
    "torch-export": (_torch_export, _read_torch_export),
    "onnx": (_onnx, _read_onnx),
}


def _sidecar(trained: Trained, form: str, parity: Parity) -> bytes:
    """Return what somebody needs to use the network, as JSON."""
    augment, recipe = trained.recipe.augment, trained.recipe
    size = {"short_side": augment.short_side} if augment.short_side else {"size": augment.resize}
    values = {
        "model": recipe.model.name,
        "format": form,
        "weights": "averaged" if trained.is_averaged else "as trained",
        "epochs": trained.epochs,
        "steps": trained.steps,
        "class_names": trained.class_names,
        "input": {"name": "clips", "dtype": "float32", "shape": ["N", 3, *trained.clip]},
        "output": {"name": "logits", "dtype": "float32", "shape": ["N", len(trained.class_names)]},
        "preprocessing": {
            "frames": recipe.eval_frames,
            "fps": recipe.data.fps,
            "color": "RGB in [0, 1], frames x height x width after the colour",
            "resize": {**size, "interpolation": "bilinear", "antialias": False},
            "round_to_levels_after_resize": augment.round_resized,
            "center_crop": augment.crop,
            "mean": augment.mean,
            "std": augment.std,
        },
        "protocol": protocol(recipe, is_averaged=trained.is_averaged),
        "parity": {**vars(parity), "batches": _BATCHES},
        "made_with": {"torch": torch.__version__, "torchvision": torchvision.__version__},
    }
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
