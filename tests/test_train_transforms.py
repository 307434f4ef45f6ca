from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import transforms as tv
from torchvision.transforms import functional as tv_functional

from stream import ClipBatch, yuv420_to_rgb
from train.augment import Draws, draw, draw_clip, resized_size
from train.clip_random import ClipDraw
from train.recipe import AugmentRecipe
from train.transforms import clips_from_draws, train_clips

RECIPE = AugmentRecipe()


def _batch(sizes: list[tuple[int, int]], layout: str = "rgb", frames: int = 3) -> ClipBatch:
    generator = torch.Generator().manual_seed(1)
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    shape = (len(sizes), frames, height, width, 3)
    if layout == "yuv420":
        shape = (len(sizes), frames, height * width * 3 // 2)
    count = len(sizes)
    return ClipBatch(
        video=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        size=torch.tensor(sizes),
        label=torch.arange(count),
        key=[f"clip{number}" for number in range(count)],
        start_frame=torch.zeros(count, dtype=torch.int64),
        view=torch.arange(count),
        layout=layout,
    )


def _rgb_of(batch: ClipBatch, member: int) -> torch.Tensor:
    """Return one clip as torchvision's transforms take it: uint8 (T, 3, h, w)."""
    height, width = batch.size[member].tolist()
    video = batch.video[member]
    if batch.layout == "yuv420":
        return yuv420_to_rgb(video, height, width).permute(0, 3, 1, 2)
    return video[:, :height, :width].permute(0, 3, 1, 2)


def _reference(clip: torch.Tensor, draws: Draws) -> torch.Tensor:
    """VideoClassificationPresetTrain, with the draws given."""
    height, width = RECIPE.crop
    clip = tv.ConvertImageDtype(torch.float32)(clip)
    clip = tv.Resize(RECIPE.resize, antialias=False)(clip)
    clip = tv_functional.hflip(clip) if draws.flip else clip
    clip = tv.Normalize(mean=RECIPE.mean, std=RECIPE.std)(clip)
    clip = tv_functional.crop(clip, draws.top, draws.left, height, width)
    return clip.permute(1, 0, 2, 3)


SIZES = [(128, 170), (96, 128), (128, 170), (226, 128)]


@pytest.mark.parametrize("layout", ["rgb", "yuv420"])
def test_training_clips_equal_torchvisions_given_the_same_draws(layout: str) -> None:
    batch = _batch(SIZES, layout)
    places = [(False, 0, 0), (True, 16, 59), (True, 7, 11), (False, 3, 40)]
    draws = [Draws(flip=flip, top=top, left=left) for flip, top, left in places]
    ours = clips_from_draws(batch, RECIPE, draws)
    assert ours.shape == (4, 3, 3, 112, 112)
    assert ours.dtype == torch.float32
    for member, drawn in enumerate(draws):
        wanted = _reference(_rgb_of(batch, member), drawn)
        torch.testing.assert_close(ours[member], wanted, rtol=0, atol=1e-6)


@given(height=st.integers(1, 500), width=st.integers(1, 500), short_side=st.integers(1, 300))
def test_the_short_side_is_torchvisions(height: int, width: int, short_side: int) -> None:
    found = resized_size((height, width), AugmentRecipe(short_side=short_side))
    assert list(found) == tv_functional._compute_resized_output_size((height, width), [short_side])


def test_random_crops_of_frames_that_keep_their_aspect_are_torchvisions() -> None:
    recipe = AugmentRecipe(short_side=64, crop=(56, 56))
    batch = _batch([(80, 96), (96, 80), (80, 96)])
    ours = train_clips(batch, recipe, seed=3, epoch=0)
    flips = set()
    for member in range(len(batch)):
        size = tuple(batch.size[member].tolist())
        drawn = draw_clip(ClipDraw(3, 0, batch.key[member], int(batch.view[member])), recipe, size)
        flips.add(drawn.flip)
        clip = tv.Resize([64], antialias=False)(_rgb_of(batch, member).float().div(255))
        clip = tv_functional.hflip(clip) if drawn.flip else clip
        clip = tv_functional.crop(clip, drawn.top, drawn.left, 56, 56)
        wanted = tv.Normalize(recipe.mean, recipe.std)(clip).permute(1, 0, 2, 3)
        torch.testing.assert_close(ours[member], wanted, rtol=0, atol=1e-6)
    assert flips == {True, False}


def test_a_clip_is_augmented_alike_in_any_batch() -> None:
    batch = _batch(SIZES)
    together = train_clips(batch, RECIPE, seed=5, epoch=2)
    for member in range(len(batch)):
        alone = replace(
            batch,
            video=batch.video[member : member + 1],
            size=batch.size[member : member + 1],
            label=batch.label[member : member + 1],
            key=batch.key[member : member + 1],
            start_frame=batch.start_frame[member : member + 1],
            view=batch.view[member : member + 1],
        )
        assert torch.equal(train_clips(alone, RECIPE, seed=5, epoch=2)[0], together[member])
    other_epoch = train_clips(batch, RECIPE, seed=5, epoch=3)
    assert not torch.equal(together, other_epoch)


ARGUMENTS = {"flip": 0.5, "resize": (128, 171), "crop": (112, 112)}


def test_draws_are_what_they_have_always_been() -> None:
    # Golden: a change here changes every resumed run; give the draws a new version instead.
    drawn = [
        draw(ClipDraw(7, epoch, "abc_000001_000011", view), **ARGUMENTS)
        for epoch, view in ((0, 0), (0, 1), (3, 0), (4, 2), (5, 0))
    ]
    assert drawn == GOLDEN


def test_draws_depend_on_each_of_their_inputs() -> None:
    base = {"seed": 1, "epoch": 2, "key": "a", "view": 3}
    changes = [{"seed": 2}, {"epoch": 3}, {"key": "b"}, {"view": 4}]
    resize, crop = (10_000, 10_000), (1, 1)
    first = draw(ClipDraw(**base), flip=0.5, resize=resize, crop=crop)
    assert draw(ClipDraw(**base), flip=0.5, resize=resize, crop=crop) == first
    for change in changes:
        assert draw(ClipDraw(**{**base, **change}), flip=0.5, resize=resize, crop=crop) != first


def test_draws_are_uniform_and_flips_have_their_probability() -> None:
    count = 6000
    draws = [
        draw(ClipDraw(0, 0, str(n), 0), flip=0.25, resize=(14, 12), crop=(12, 12))
        for n in range(count)
    ]
    flips = sum(d.flip for d in draws)
    # 5 standard deviations of a binomial: sqrt(6000 * 0.25 * 0.75) = 33.5
    assert abs(flips - count * 0.25) < 5 * 33.6
    for top in range(3):
        assert abs(sum(d.top == top for d in draws) - count / 3) < 5 * 36.6
    assert {d.left for d in draws} == {0}


@given(seed=st.integers(0, 2**63), probability=st.sampled_from([0.0, 1.0]), key=st.text())
@settings(max_examples=50)
def test_draws_stay_inside(seed: int, probability: float, key: str) -> None:
    drawn = draw(ClipDraw(seed, 0, key, 0), flip=probability, resize=(128, 171), crop=(112, 112))
    assert drawn.flip == bool(probability)
    assert 0 <= drawn.top <= 16
    assert 0 <= drawn.left <= 59


GOLDEN = [
    Draws(flip=False, top=10, left=10),
    Draws(flip=False, top=12, left=17),
    Draws(flip=False, top=5, left=54),
    Draws(flip=False, top=16, left=31),
    Draws(flip=True, top=2, left=40),
]
