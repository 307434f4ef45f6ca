from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_train_transforms import SIZES, _batch, _rgb_of
from torchvision import transforms as tv
from torchvision.transforms import functional as tv_functional
from torchvision.transforms._presets import VideoClassification

from train.eval_transforms import crop_places, eval_clips
from train.recipe import AugmentRecipe, Recipe

RECIPE = Recipe()


@pytest.mark.parametrize("layout", ["rgb", "yuv420"])
def test_evaluation_clips_equal_torchvisions(layout: str) -> None:
    batch, augment = _batch(SIZES, layout), RECIPE.augment
    preset = tv.Compose(
        [
            tv.ConvertImageDtype(torch.float32),
            tv.Resize(augment.resize, antialias=False),
            tv.Normalize(mean=augment.mean, std=augment.std),
            tv.CenterCrop(augment.crop),
        ]
    )
    (ours,) = eval_clips(batch, RECIPE)
    for member in range(len(batch)):
        wanted = preset(_rgb_of(batch, member)).permute(1, 0, 2, 3)
        torch.testing.assert_close(ours[member], wanted, rtol=0, atol=1e-6)


WEIGHTS = {
    # what torchvision's weights of these networks come with
    "resnet": {"resize": (128, 171), "crop": (112, 112)},
    "s3d": {"resize": (256, 256), "crop": (224, 224)},
    "mvit": {"short_side": 256, "crop": (224, 224), "mean": (0.45,) * 3, "std": (0.225,) * 3},
    "swin3d": {
        "short_side": 256,
        "crop": (224, 224),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    },
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("round_resized", [False, True])
def test_evaluation_clips_equal_those_of_torchvisions_weights(
    name: str, *, round_resized: bool
) -> None:
    """`VideoClassification` resizes what it is given: levels in [0, 1], or uint8, and rounds."""
    recipe = AugmentRecipe(**WEIGHTS[name], round_resized=round_resized)
    preset = VideoClassification(
        crop_size=recipe.crop,
        resize_size=(recipe.short_side,) if recipe.short_side else recipe.resize,
        mean=recipe.mean,
        std=recipe.std,
    )
    batch = _batch([(128, 170), (226, 128), (256, 340)], frames=2)
    (ours,) = eval_clips(batch, Recipe(augment=recipe))
    for member in range(len(batch)):
        clip = _rgb_of(batch, member)
        wanted = preset(clip if round_resized else clip.float().div(255))
        torch.testing.assert_close(ours[member], wanted, rtol=0, atol=1e-6)


def test_three_crops_equal_torchvisions_at_the_ends_and_in_the_middle() -> None:
    batch, augment = _batch(SIZES), RECIPE.augment
    recipe = replace(RECIPE, eval=replace(RECIPE.eval, crops=3))
    ours = eval_clips(batch, recipe)
    assert ours.shape == (3, 4, 3, 3, 112, 112)
    for member in range(len(batch)):
        clip = tv.ConvertImageDtype(torch.float32)(_rgb_of(batch, member))
        clip = tv.Resize(augment.resize, antialias=False)(clip)
        clip = tv.Normalize(mean=augment.mean, std=augment.std)(clip)
        for crop, left in enumerate((0, 30, 171 - 112)):
            wanted = tv_functional.crop(clip, 8, left, 112, 112).permute(1, 0, 2, 3)
            torch.testing.assert_close(ours[crop, member], wanted, rtol=0, atol=1e-6)
    assert torch.equal(ours[1], eval_clips(batch, RECIPE)[0])


def test_crops_stand_along_the_side_that_leaves_more_room() -> None:
    assert crop_places((256, 340), (224, 224), 3) == [(16, 0), (16, 58), (16, 116)]
    assert crop_places((340, 256), (224, 224), 3) == [(0, 16), (58, 16), (116, 16)]
    assert crop_places((256, 256), (224, 224), 3) == [(16, 0), (16, 16), (16, 32)]
    assert crop_places((256, 300), (200, 290), 3) == [(0, 5), (28, 5), (56, 5)]
    # torchvision's center_crop rounds half to even
    assert crop_places((128, 171), (112, 112), 1) == [(8, 30)]
    assert crop_places((129, 173), (112, 112), 1) == [(8, 30)]


def test_padding_of_smaller_clips_is_never_seen() -> None:
    batch = _batch([(64, 64), (128, 170)])
    noisy = batch.video.clone()
    noisy[0, :, 64:] = 255
    noisy[0, :, :, 64:] = 255
    changed = replace(batch, video=noisy)
    assert torch.equal(eval_clips(batch, RECIPE), eval_clips(changed, RECIPE))
