"""torchvision's published video weights and the protocols that their accuracies were made by.

Sizes, mean and standard deviation come from `weights.transforms()`, accuracies and class names from
`weights.meta`. Frames, rate and clips per video stand in the documentation of the weights only, as
text ("estimated on video-level with parameters `frame_rate=15`, `clips_per_video=5`, and
`clip_len=16`"); they are the table below. All were made with torchvision's reference script, whose
evaluation takes the clips of its `UniformClipSampler` and averages probabilities.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchvision.models import get_weight

from prep.errors import UsageError
from train.recipe import Recipe, override_recipe, recipe_from_dict
from train.toml_values import nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchvision.models import WeightsEnum


@dataclass(frozen=True)
class Protocol:
    """How the accuracy of published weights was estimated.

    `level` says what was counted: "video", the mean over its clips, or "clip".
    """

    frames: int
    fps: float
    clips_per_video: int
    level: str


_RESNET = Protocol(16, 15, 5, "video")
_MVIT = Protocol(16, 7.5, 5, "video")
_SWIN = Protocol(32, 15, 12, "video")

PROTOCOLS = {
    "R3D_18_Weights.KINETICS400_V1": _RESNET,
    "MC3_18_Weights.KINETICS400_V1": _RESNET,
    "R2Plus1D_18_Weights.KINETICS400_V1": _RESNET,
    "S3D_Weights.KINETICS400_V1": Protocol(128, 15, 1, "clip"),
    "MViT_V1_B_Weights.KINETICS400_V1": _MVIT,
    "MViT_V2_S_Weights.KINETICS400_V1": _MVIT,
    "Swin3D_T_Weights.KINETICS400_V1": _SWIN,
    "Swin3D_S_Weights.KINETICS400_V1": _SWIN,
    "Swin3D_B_Weights.KINETICS400_V1": _SWIN,
    "Swin3D_B_Weights.KINETICS400_IMAGENET22K_V1": _SWIN,
}

# what may be changed without leaving the protocol
_FREE = re.compile(
    r"(data\.(batch_size|workers|layout|cache_dir|cache_limit)"
    r"|eval\.(batch_size|bad_clip_limit)|run\..*)"
)


@dataclass(frozen=True)
class Published:
    """Weights with what their authors say of them; accuracies are shares in [0, 1]."""

    name: str
    protocol: Protocol
    class_names: list[str]
    top1: float
    top5: float
    url: str

    @property
    def file_name(self) -> str:
        """Name of the file in torch's hub cache."""
        return self.url.rpartition("/")[2]

    @property
    def sha256_prefix(self) -> str:
        """First digits of the file's sha256, which stand in its name: r3d_18-b3b3357e.pth."""
        return self.file_name.rpartition("-")[2].partition(".")[0]


def find_published(name: str) -> Published:
    """Return what is published of weights, such as "R3D_18_Weights.KINETICS400_V1".

    Raises UsageError for a name that is not in the table.
    """
    found = _weights(name)
    accuracy = found.meta["_metrics"]["Kinetics-400"]
    return Published(
        name=name,
        protocol=PROTOCOLS[name],
        class_names=list(found.meta["categories"]),
        top1=accuracy["acc@1"] / 100,
        top5=accuracy["acc@5"] / 100,
        url=found.url,
    )


def published_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return a recipe that evaluates weights as they were evaluated for publication.

    Raises UsageError for an override that would make it another protocol.
    """
    for override in overrides:
        key = override.partition("=")[0].strip()
        if not _FREE.fullmatch(key):
            raise UsageError(
                f"--set {key} would make another protocol than that of the published accuracy; "
                "only batch sizes, data.workers, data.layout, data.cache_dir, data.cache_limit, "
                "eval.bad_clip_limit and [run] can be set with --check-weights; for other "
                "protocols use --test-only --weights"
            )
    preset, protocol = _weights(name).transforms(), PROTOCOLS[name]
    values: dict[str, dict[str, Any]] = {
        "data": {"frames": protocol.frames, "fps": protocol.fps},
        "model": {"name": _model_name(name)},
        "augment": {
            **_resize(list(preset.resize_size)),
            "crop": list(preset.crop_size),
            "mean": list(preset.mean),
            "std": list(preset.std),
            "round_resized": True,  # the preset resizes uint8
        },
        "eval": {"clips_per_video": protocol.clips_per_video, "placement": "torchvision"},
    }
    recipe = recipe_from_dict({"name": name, **values}, where=name)
    return override_recipe(recipe, overrides)


def _resize(size: list[int]) -> dict[str, Any]:
    """Return the settings for a preset's size: [height, width], or the short side alone."""
    return {"short_side": size[0]} if len(size) == 1 else {"resize": size}


def _model_name(name: str) -> str:
    # MViT_V2_S_Weights.KINETICS400_V1 are the weights of mvit_v2_s
    return name.partition("_Weights.")[0].lower()


def _weights(name: str) -> WeightsEnum:
    if name not in PROTOCOLS:
        raise UsageError(
            f"--check-weights {name}: no such weights of torchvision's; "
            f"{nearest(name, list(PROTOCOLS))}"
        )
    return get_weight(name)
