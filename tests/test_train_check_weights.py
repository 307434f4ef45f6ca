"""Published weights under their own protocol; a generated state dict stands in the hub's cache."""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from conftest import run_kprep
from torchvision.models import get_model_weights
from torchvision.models.video import R3D_18_Weights, r3d_18

import train.published
from prep.demo_videos import random_motion, write_video
from prep.errors import KprepError, UsageError
from stream import clip_loader
from train.check_weights import Comparison, label_map
from train.cli import train as command
from train.models import TORCHVISION_MODELS
from train.published import PROTOCOLS, Protocol, find_published, published_recipe

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAME = "R3D_18_Weights.KINETICS400_V1"
CATEGORIES = R3D_18_Weights.KINETICS400_V1.meta["categories"]

# https://docs.pytorch.org/vision/stable/models.html#table-of-all-available-video-classification-weights
PUBLISHED = {
    "R3D_18_Weights.KINETICS400_V1": (63.200, 83.479),
    "MC3_18_Weights.KINETICS400_V1": (63.960, 84.130),
    "R2Plus1D_18_Weights.KINETICS400_V1": (67.463, 86.175),
    "S3D_Weights.KINETICS400_V1": (68.368, 88.050),
    "MViT_V1_B_Weights.KINETICS400_V1": (78.477, 93.582),
    "MViT_V2_S_Weights.KINETICS400_V1": (80.757, 94.665),
    "Swin3D_T_Weights.KINETICS400_V1": (77.715, 93.519),
    "Swin3D_S_Weights.KINETICS400_V1": (79.521, 94.158),
    "Swin3D_B_Weights.KINETICS400_V1": (79.427, 94.386),
    "Swin3D_B_Weights.KINETICS400_IMAGENET22K_V1": (81.643, 95.574),
}


def test_the_table_is_what_torchvision_says_of_its_weights() -> None:
    """Frames, rate and clips stand in the documentation of the weights only, as text."""
    everything = [
        str(weights) for name in TORCHVISION_MODELS for weights in get_model_weights(name)
    ]
    assert sorted(PROTOCOLS) == sorted(everything) == sorted(PUBLISHED)
    for name, protocol in PROTOCOLS.items():
        text = train.published._weights(name).meta["_docs"]
        settings = {key: float(value) for key, value in re.findall(r"`(\w+)=([\d.]+)`", text)}
        assert settings == {
            "frame_rate": protocol.fps,
            "clips_per_video": protocol.clips_per_video,
            "clip_len": protocol.frames,
        }
        assert f"estimated on {protocol.level}-level" in text.replace("\n", " ")
        found = find_published(name)
        assert (found.top1, found.top5) == pytest.approx([part / 100 for part in PUBLISHED[name]])
        assert len(found.class_names) == 400
        assert re.fullmatch(r"[0-9a-f]{8}", found.sha256_prefix)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_recipe_is_the_preset_of_the_weights(name: str) -> None:
    """That evaluation clips equal the preset's, given these settings, is tested with the clips."""
    recipe, preset = published_recipe(name), train.published._weights(name).transforms()
    resize = preset.resize_size
    assert recipe.augment.short_side == (resize[0] if len(resize) == 1 else 0)
    assert len(resize) == 1 or list(recipe.augment.resize) == resize
    assert list(recipe.augment.crop) == preset.crop_size
    assert (list(recipe.augment.mean), list(recipe.augment.std)) == (preset.mean, preset.std)
    assert recipe.augment.round_resized
    assert recipe.model.name in TORCHVISION_MODELS
    assert (recipe.eval.placement, recipe.eval.crops, recipe.eval.average) == (
        "torchvision",
        1,
        "probabilities",
    )


def test_settings_that_change_the_protocol_are_refused() -> None:
    recipe = published_recipe(NAME, ["data.batch_size=3", "run.precision=bf16"])
    assert (recipe.data.batch_size, recipe.run.precision) == (3, "bf16")
    for override in ("eval.crops=3", "data.frames=8", "model.name=s3d", "data.batch_sizes=1"):
        with pytest.raises(UsageError, match="would make another protocol"):
            published_recipe(NAME, [override])


def test_classes_are_translated_by_name_or_refused() -> None:
    known = ["abseiling", "bowling", "yoga"]
    assert label_map(["yoga", "abseiling"], known, "w").tolist() == [2, 0]
    with pytest.raises(UsageError, match=r"w does not know: 'Yoga' and 1 more .* is 'yoga'\)"):
        label_map(["Yoga", "bowling", "golf"], known, "w")


def test_the_comparison_says_what_it_compares() -> None:
    values: dict[str, Any] = {
        "weights": NAME, "level": "video", "top1": 0.62, "top5": 0.83, "published_top1": 0.632,
        "published_top5": 0.83479, "videos": 19_000, "classes_present": 400, "classes": 400,
        "is_published_file": True, "protocol": "5 x 16 frames",
    }  # fmt: skip
    text = str(Comparison(**values))
    assert text.startswith(f"{NAME}: 5 x 16 frames\n")
    assert re.search(r"video top-1 +62.00 +63.20 +-1.20 +\(standard error 0.35\)", text)
    assert "NOT" not in text
    assert "classes" not in text
    text = str(Comparison(**values | {"classes_present": 3, "is_published_file": False}))
    assert "the dataset has 3 of the 400 classes" in text
    assert "NOT the published weights" in text


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three of Kinetics' classes, not in its order, as splits val and odd; odd has a fourth."""
    folder, rng = tmp_path_factory.mktemp("words"), np.random.default_rng(5)
    for split, names in (
        ("val", ["yoga", "abseiling", "golf driving"]),
        ("odd", ["yoga", "tiling"]),
    ):
        for number, name in enumerate(names):
            target = folder / f"videos-{split}" / name / "0.mp4"
            target.parent.mkdir(parents=True)
            write_video(target, random_motion(("left", "up", "down")[number], rng), "libx264")
        run_kprep("shard", folder / f"videos-{split}", folder / split, "--split", "val",
                  "--profile", "small")  # fmt: skip
    return folder


@pytest.fixture
def short_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the work."""
    monkeypatch.setitem(PROTOCOLS, NAME, Protocol(4, 15, 2, "video"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of torch's hub that holds weights under the name of the published file."""
    path = tmp_path / "hub/checkpoints/r3d_18-b3b3357e.pth"
    path.parent.mkdir(parents=True)
    torch.manual_seed(7)
    torch.save(r3d_18().state_dict(), path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return path


def _check(*arguments: object) -> str:
    options = ["--device", "cpu", "--set", "data.workers=0", *map(str, arguments)]
    result = CliRunner().invoke(command, options, catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def _by_torchvision(root: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Score videos with torchvision's network, weights and preset, one clip after the other."""
    weights = R3D_18_Weights.KINETICS400_V1
    network, preset = r3d_18(weights=weights).eval(), weights.transforms()
    loader = clip_loader(
        str(root), split="val", mode="eval", batch_size=2, frames=4, fps=15, clips_per_video=2,
        placement="torchvision", layout="rgb",
    )  # fmt: skip
    for batch in loader:
        assert len(set(batch.key)) == 1
        clips = torch.stack([preset(clip.permute(0, 3, 1, 2)) for clip in batch.video])
        with torch.no_grad():
            yield batch.key[0], network(clips).softmax(dim=1).mean(dim=0)


@pytest.mark.slow
@pytest.mark.usefixtures("short_protocol")
def test_weights_are_scored_as_torchvision_would(words: Path, hub: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    text = _check("--data", words / "val", "--check-weights", NAME, "--output", output)
    assert "2 x 4 frames @ 15 fps, torchvision placement, resized to 128x171" in text
    assert "63.20" in text
    assert "the dataset has 3 of the 400 classes" in text
    assert "NOT the published weights" in text  # the generated file has another sha256
    directory = output / "evaluation" / f"test-val-{NAME}"
    rows = pq.read_table(directory / "videos.parquet").to_pylist()
    wanted = dict(_by_torchvision(words / "val"))
    assert sorted(wanted) == [row["key"] for row in rows]
    for row in rows:
        scores = torch.tensor(row["probabilities"])
        torch.testing.assert_close(scores, wanted[row["key"]], rtol=0, atol=1e-5)
        # labels are the weights', found by name: yoga is class 0 of the dataset, 399 of the weights
        assert CATEGORIES[row["label"]] == row["label_name"]
        assert row["label_name"].replace(" ", "-") in row["key"].replace("_", "-")
    hits = [row["label"] == row["prediction"] for row in rows]
    found = json.loads((directory / "published.json").read_text())
    assert found["top1"] == pytest.approx(sum(hits) / 3)
    assert (found["published_top1"], found["is_published_file"]) == (pytest.approx(0.632), False)


@pytest.mark.slow
@pytest.mark.usefixtures("short_protocol")
def test_what_cannot_be_compared_is_refused(
    words: Path, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("--check-weights", NAME, "--output", tmp_path / "run")
    with pytest.raises(UsageError, match="does not know: 'tiling'"):
        _check("--data", words / "odd", *common)
    torch.save({"fc.weight": torch.ones(3)}, hub)
    with pytest.raises(UsageError, match="the file is of another network"):
        _check("--data", words / "val", *common)
    hub.write_bytes(b"<html>")
    with pytest.raises(KprepError, match="b3b3357e.pth cannot be read as tensors only"):
        _check("--data", words / "val", *common)
    assert not (tmp_path / "run").exists()


def test_the_published_file_is_known_by_its_hash(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train.check_weights import _is_published_file

    found = find_published(NAME)
    assert not _is_published_file(found)
    prefix = hashlib.sha256(hub.read_bytes()).hexdigest()[:8]
    monkeypatch.setattr(type(found), "sha256_prefix", prefix)
    assert _is_published_file(found)
