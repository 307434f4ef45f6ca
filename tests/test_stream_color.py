from fractions import Fraction

import numpy as np
import pytest
import torch

from stream.batch_memory import private_room, rgb_of_planar
from stream.color import frame_bytes, write_rgb, yuv420_to_rgb, yuv420_to_rgb_planes


def reference(y, cb, cr, *, clamp=True):
    """BT.601 by its own definition, in exact fractions: Kr = 0.299, Kb = 0.114."""
    kr, kb = Fraction(299, 1000), Fraction(114, 1000)
    luma = Fraction(y - 16, 219)
    blue, red = Fraction(cb - 128, 224), Fraction(cr - 128, 224)
    r = luma + 2 * (1 - kr) * red
    b = luma + 2 * (1 - kb) * blue
    g = (luma - kr * r - kb * b) / (1 - kr - kb)
    levels = [255 * value for value in (r, g, b)]
    return [min(255, max(0, level)) for level in levels] if clamp else levels


def test_against_the_definition():
    rng = np.random.default_rng(0)
    for y, cb, cr in [
        (16, 128, 128),
        (235, 128, 128),
        (0, 0, 0),
        (255, 255, 255),
        (44, 37, 1),  # G is 171.49999932, which float32 takes for 171.5
        *rng.integers(0, 256, (400, 3)),
    ]:
        frame = torch.tensor([y, y, y, y, cb, cr], dtype=torch.uint8)
        pixel = yuv420_to_rgb(frame, 2, 2)[0, 0].tolist()
        for got, exact in zip(pixel, reference(int(y), int(cb), int(cr)), strict=True):
            assert abs(got - exact) < Fraction(1, 2)


@pytest.mark.parametrize("luma", [44, 255])
def test_every_pair_of_chroma_is_exact(luma):
    """In whole numbers: what `reference` is, over one denominator; no value lies at a half."""
    cb, cr = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    frame = np.concatenate([np.full(512 * 512, luma), cb.ravel(), cr.ravel()]).astype(np.uint8)
    found = yuv420_to_rgb(torch.from_numpy(frame), 512, 512)[::2, ::2].numpy()
    whole = 73 * 587 * 22_400
    for channel in range(3):
        ends = [
            reference(luma, *pair, clamp=False)[channel]
            for pair in ((128, 128), (129, 128), (128, 129))
        ]
        base, blue, red = (int(value * whole) for value in ends)
        exact = base + (cb - 128) * (blue - base) + (cr - 128) * (red - base)
        levels = (2 * exact + whole) // (2 * whole)
        assert np.array_equal(found[..., channel], np.clip(levels, 0, 255))


def test_each_chroma_sample_serves_two_by_two_pixels():
    frame = torch.zeros(frame_bytes(4, 6), dtype=torch.uint8)
    frame[:24] = 120
    frame[24:30] = torch.tensor([10, 60, 110, 160, 210, 250])
    frame[30:] = 128
    picture = yuv420_to_rgb(frame, 4, 6)
    for row in range(4):
        for column in range(6):
            assert torch.equal(picture[row, column], picture[row // 2 * 2, column // 2 * 2])
    assert len({tuple(p) for p in picture.reshape(-1, 3).tolist()}) == 6


def test_planes_and_padding_and_leading_axes():
    frames = torch.randint(0, 256, (2, 3, frame_bytes(4, 6) + 7), dtype=torch.uint8)
    picture = yuv420_to_rgb(frames, 4, 6)
    assert picture.shape == (2, 3, 4, 6, 3)
    assert torch.equal(yuv420_to_rgb_planes(frames, 4, 6), picture.movedim(-1, -3))
    assert torch.equal(picture[1, 2], yuv420_to_rgb(frames[1, 2], 4, 6))


@pytest.mark.parametrize("size", [(4, 6), (128, 170)])
def test_close_to_libswscale(size):
    import av

    height, width = size
    smooth = np.add.outer(np.arange(height * 3 // 2), np.arange(width)) % 200 + 20
    frame = av.VideoFrame.from_ndarray(smooth.astype(np.uint8), format="yuv420p")
    ours = yuv420_to_rgb(
        torch.from_numpy(smooth.astype(np.uint8).reshape(-1)), height, width
    ).numpy()
    theirs = frame.reformat(format="rgb24", src_colorspace="itu601", src_color_range="MPEG",
                            interpolation="POINT").to_ndarray()  # fmt: skip
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 4


def test_the_fast_conversion_is_within_one_level_everywhere():
    """Every pair of Cb and Cr with 18 values of Y each, ends included: R and B see every pair with Y too."""
    cb, cr = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    lumas = sorted({*range(0, 256, 16), 255, 235})
    frames = np.empty((len(lumas), frame_bytes(512, 512)), np.uint8)
    for number, luma in enumerate(lumas):
        frames[number] = np.concatenate([np.full(512 * 512, luma), cb.ravel(), cr.ravel()])
    out = np.empty((len(lumas), 512, 512, 3), np.uint8)
    write_rgb(frames, out)
    exact = yuv420_to_rgb(torch.from_numpy(frames), 512, 512).numpy()
    differs = np.abs(out.astype(np.int16) - exact)
    assert differs.max() == 1
    assert (differs > 0).mean() < 0.02
    assert out[0, 0, 0].tolist() == exact[0, 0, 0].tolist()


def test_clips_of_several_sizes_are_converted_into_the_corner_of_the_largest():
    planar = torch.randint(0, 256, (2, 11, frame_bytes(6, 8)), dtype=torch.uint8)
    video = rgb_of_planar(planar, [(6, 8), (4, 6)], private_room)
    assert video.shape == (2, 11, 6, 8, 3)
    for number, (height, width) in enumerate([(6, 8), (4, 6)]):
        exact = yuv420_to_rgb(planar[number], height, width)
        inside = video[number, :, :height, :width].short() - exact
        assert inside.abs().max() <= 1
    assert not video[1, :, 4:].any()
    assert not video[1, :, :, 6:].any()
