import string

from hypothesis import given
from hypothesis import strategies as st

from prep.segment import Segment

YOUTUBE = st.text(string.ascii_letters + string.digits + "_-", min_size=11, max_size=11)


def segment(video_id, start=1.0, end=11.0, **more):
    return Segment(video_id, start, end, "x", "val", **more)


def test_key_is_the_kinetics_file_name():
    assert segment("0wR5jVB-WPk", 417.0, 427.0).key == "0wR5jVB-WPk_000417_000427"


def test_an_id_that_begins_with_two_underscores_gets_a_prefix():
    # Hugging Face drops tar members whose names begin with "__"
    assert segment("__NrybzYzUg").key == "v__NrybzYzUg_000001_000011"


@given(YOUTUBE, st.integers(0, 90_000), st.integers(1, 600))
def test_youtube_keys_are_usable_in_every_reader(video_id, start, length):
    key = segment(video_id, float(start), float(start + length)).key
    assert key.isascii()
    assert "." not in key
    assert not key.startswith("__")
    assert len(key + ".json") <= 100


@given(st.text(min_size=1, max_size=300), st.text(min_size=1, max_size=300))
def test_any_path_gives_a_safe_key_and_two_paths_two_keys(one, two):
    first, second = (Segment(path, 0.0, None, None, "val", path=path) for path in (one, two))
    for key in (first.key, second.key):
        assert key.isascii()
        assert set(key) <= set(string.ascii_letters + string.digits + "-")
        assert not key.startswith("-")
        assert len(key) <= 80
    assert (first.key == second.key) == (one == two)


@given(st.floats(0, 1000), st.floats(0, 1000))
def test_float_times_give_distinct_keys(one, two):
    keys = {segment("0wR5jVB-WPk", start, start + 10).key for start in (one, two)}
    assert len(keys) == (1 if one == two else 2)


def test_the_same_path_in_two_splits_has_two_keys():
    keys = {
        Segment("a/1.mp4", 0.0, None, "a", split, path="a/1.mp4").key for split in ("train", "val")
    }
    assert len(keys) == 2
