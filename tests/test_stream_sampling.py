from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prep.errors import UsageError
from stream.options import StreamOptions
from stream.order import ORDER_VERSION
from stream.placed_clips import PlacedClips
from stream.sampling import evaluation_start, frame_offsets, num_starts, training_start


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


def starts_of(clips, starts, placement="even"):
    return [evaluation_start(view, clips, starts, placement) for view in range(clips)]


@given(st.integers(1, 12), st.integers(1, 500))
def test_torchvision_placement_is_the_floor_of_linspace(clips, starts):
    # as torchvision's UniformClipSampler does it: floor of torch.linspace(first, last, n)
    expected = [i * Fraction(starts - 1, max(clips - 1, 1)) // 1 for i in range(clips)]
    assert starts_of(clips, starts, "torchvision") == expected


@given(st.integers(1, 12), st.integers(1, 500))
def test_even_placement_spans_the_video(clips, starts):
    found = starts_of(clips, starts)
    if clips == 1:
        assert found == [(starts - 1) // 2]
    else:
        assert (found[0], found[-1]) == (0, starts - 1)
        assert np.diff(found).max() - np.diff(found).min() <= 1


@given(st.integers(1, 12), st.integers(1, 500))
def test_middle_placement_is_the_middle_of_equal_parts(clips, starts):
    found = starts_of(clips, starts, "middle")
    middles = [Fraction((2 * i + 1) * (starts - 1), 2 * clips) for i in range(clips)]
    assert found == [middle // 1 for middle in middles]
    if clips == 1:
        assert found == starts_of(1, starts)
    # as far from the beginning as from the end, within the rounding down
    assert 0 <= (starts - 1 - found[-1]) - found[0] <= 1


def test_one_of_very_many_views_is_placed_by_itself():
    """In exact arithmetic: 10**21 is more than 64 bits hold."""
    assert evaluation_start(10**12 - 1, 10**12, 10**9) == 10**9 - 1


# Four frames at 15 fps span 4 of a clip stored at 15, and 7 of one stored at 30 (0, 2, 4, 6).
NUM_FRAMES = np.array([4, 3, 20, 7, 6])
RATES = {Fraction(15): np.array([0, 1, 2]), Fraction(30): np.array([3, 4])}


def placed(**options):
    options = StreamOptions("train", frames=4, fps=Fraction(15), **options)
    return PlacedClips(options, RATES, NUM_FRAMES)


def clip(row):
    return SimpleNamespace(row=row, key=f"clip{row}", num_frames=int(NUM_FRAMES[row]))


def test_clips_of_a_split_are_placed_by_hand():
    found = placed()
    assert found.starts.tolist() == [1, 0, 17, 1, 0]
    assert found.rows.tolist() == [0, 2, 3]
    assert found.left_out.tolist() == [1, 4]
    assert found.frames(clip(2), 5).tolist() == [5, 6, 7, 8]
    assert found.frames(clip(3), 0).tolist() == [0, 2, 4, 6]
    clips = [clip(2), clip(3)]
    drawn = [training_start(0, 3, one.key, 1, int(found.starts[one.row])) for one in clips]
    assert found.start_frames(3, clips, [1, 1]) == drawn


def test_padded_clips_repeat_their_last_frame():
    found = placed(short="pad")
    assert found.rows.tolist() == [0, 1, 2, 3, 4]
    assert found.left_out.tolist() == []
    assert found.frames(clip(1), 0).tolist() == [0, 1, 2, 2]
    assert found.frames(clip(4), 0).tolist() == [0, 2, 4, 5]


def test_evaluation_clips_of_a_split_are_spread_evenly():
    found = placed(mode="eval", clips_per_video=3)
    assert found.start_frames(0, [clip(2)] * 3, [0, 1, 2]) == [0, 8, 16]
