from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prep.errors import UsageError
from stream.order import ORDER_VERSION
from stream.sampling import evaluation_starts, frame_offsets, num_starts, training_start


def test_frame_offsets_by_hand():
    assert frame_offsets(4, Fraction(15), Fraction(15)).tolist() == [0, 1, 2, 3]
    assert frame_offsets(4, Fraction(15, 2), Fraction(15)).tolist() == [0, 2, 4, 6]
    assert frame_offsets(5, Fraction(10), Fraction(15)).tolist() == [0, 1, 3, 4, 6]


def test_a_rate_above_the_stored_one_is_refused():
    with pytest.raises(UsageError, match="at most the stored 15"):
        frame_offsets(4, Fraction(16), Fraction(15))


@given(st.integers(1, 64), st.fractions(Fraction(1), Fraction(30), max_denominator=1001))
def test_frame_offsets_rise_and_never_drift(frames, fps):
    offsets = frame_offsets(frames, fps, Fraction(30))
    assert offsets[0] == 0
    assert all(np.diff(offsets) >= 1)
    assert offsets[-1] == (frames - 1) * Fraction(30) // fps


def test_num_starts():
    # 10 s at 15 fps = 150 frames; 16-frame clips start at 0..134
    assert num_starts(np.array([150, 16, 15, 0]), 16).tolist() == [135, 1, 0, 0]


def test_golden_training_starts_of_order_version_1():
    """These numbers never change while ORDER_VERSION is 1: resumed runs depend on them."""
    assert ORDER_VERSION == 1
    starts = [
        training_start(3, 1, "abcdefghijk_000001_000011", view, count)
        for view, count in ((0, 135), (1, 135), (0, 5000))
    ]
    assert starts == [67, 48, 3067]


def test_training_starts_are_uniform():
    draws = [training_start(0, 0, f"clip{number}", 0, 135) for number in range(13_500)]
    counts = np.bincount(draws, minlength=135)
    # chi-square, 134 degrees of freedom: p = 0.001 at 192
    assert ((counts - 100) ** 2 / 100).sum() < 192


@given(
    st.integers(1, 200), st.integers(1, 12), st.text(min_size=1, max_size=20), st.integers(0, 99)
)
def test_views_are_distinct_while_there_are_starts(starts, views, key, epoch):
    found = [training_start(3, epoch, key, view, starts) for view in range(views)]
    assert all(0 <= start < starts for start in found)
    assert len(set(found)) == min(views, starts)


def test_training_starts_depend_on_each_argument():
    base = [training_start(0, 0, f"k{n}", 0, 1000) for n in range(50)]
    assert base == [training_start(0, 0, f"k{n}", 0, 1000) for n in range(50)]
    for other in (
        [training_start(1, 0, f"k{n}", 0, 1000) for n in range(50)],
        [training_start(0, 1, f"k{n}", 0, 1000) for n in range(50)],
        [training_start(0, 0, f"k{n}", 1, 1000) for n in range(50)],
        [training_start(0, 0, f"l{n}", 0, 1000) for n in range(50)],
    ):
        assert sum(a == b for a, b in zip(base, other, strict=True)) < 5


@given(st.integers(1, 12), st.integers(1, 500))
def test_torchvision_placement_is_the_floor_of_linspace(clips, starts):
    # as torchvision's UniformClipSampler does it: floor of torch.linspace(first, last, n)
    expected = [i * Fraction(starts - 1, max(clips - 1, 1)) // 1 for i in range(clips)]
    assert evaluation_starts(clips, starts, "torchvision").tolist() == expected


@given(st.integers(1, 12), st.integers(1, 500))
def test_even_placement_spans_the_video(clips, starts):
    found = evaluation_starts(clips, starts)
    if clips == 1:
        assert found.tolist() == [(starts - 1) // 2]
    else:
        assert (found[0], found[-1]) == (0, starts - 1)
        assert np.diff(found).max() - np.diff(found).min() <= 1


@given(st.integers(1, 12), st.integers(1, 500))
def test_middle_placement_is_the_middle_of_equal_parts(clips, starts):
    found = evaluation_starts(clips, starts, "middle")
    middles = [Fraction((2 * i + 1) * (starts - 1), 2 * clips) for i in range(clips)]
    assert found.tolist() == [middle // 1 for middle in middles]
    if clips == 1:
        assert found.tolist() == evaluation_starts(1, starts).tolist()
    # as far from the beginning as from the end, within the rounding down
    assert 0 <= (starts - 1 - found[-1]) - found[0] <= 1
