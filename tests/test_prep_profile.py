from fractions import Fraction

import pytest

from prep.errors import UsageError
from prep.profile import PROFILES, EncodingProfile, load_profile, parse_rate, profile_from_json


def test_named_profiles_are_what_the_format_says():
    assert PROFILES["general"].short_side_px == 256
    assert PROFILES["small"].short_side_px == 128
    for profile in PROFILES.values():
        assert (profile.fps, profile.crf, profile.preset) == (Fraction(15), 23, "veryfast")
        assert (profile.keyframe_interval_frames, profile.tune) == (16, "fastdecode")


def test_a_changed_profile_gets_a_name_of_its_own():
    small = PROFILES["small"]
    changed = small.changed(fps="7.5")
    assert changed.fps == Fraction(15, 2)
    assert changed.name != "small"
    assert changed.name == small.changed(fps="15/2").name
    assert small.changed(fps=15, crf=None) == small


def test_fingerprint_is_of_the_values_alone():
    small = PROFILES["small"]
    assert small.fingerprint() == EncodingProfile("other", short_side_px=128).fingerprint()
    assert small.fingerprint() != PROFILES["general"].fingerprint()


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_json_round_trip(profile):
    assert profile_from_json(profile.to_json()) == profile


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"crf": 99}, "crf"),
        ({"fps": "0"}, "fps"),
        ({"fps": "a lot"}, "fps"),
        ({"short_side_px": 127}, "even"),
        ({"preset": "-f"}, "preset"),
        ({"codec": "libx265"}, "codec"),
        ({"scaler_flags": "bicubic,scale=1"}, "scaler_flags"),
    ],
)
def test_values_out_of_range_are_refused_by_name(values, word):
    with pytest.raises(UsageError, match=word):
        PROFILES["small"].changed(**values)


def test_toml_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('base = "small"\nfps = 7.5\ncrf = 20\n')
    profile = load_profile(str(path))
    assert (profile.name, profile.fps, profile.crf, profile.short_side_px) == (
        "mine",
        Fraction(15, 2),
        20,
        128,
    )


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("crf = ", "not TOML"),
        ("colour_space = 3", "fields"),
        ('base = "large"', "base"),
        ('name = "small"\ncrf = 20', "built-in"),
        ('crf = "low"', "type int"),
    ],
)
def test_toml_mistakes_are_named(tmp_path, text, word):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=word):
        load_profile(str(path))


def test_unknown_profile_names_the_known_ones():
    with pytest.raises(UsageError, match="general, small"):
        load_profile("smal")


@pytest.mark.parametrize(
    ("text", "rate"),
    [(15, Fraction(15)), ("30000/1001", Fraction(30000, 1001)), (7.5, Fraction(15, 2))],
)
def test_rates(text, rate):
    assert parse_rate(text, "fps") == rate


@pytest.mark.parametrize(
    "text", ["x", "1/0", "nan", "1e999", "1e99999999", "1e9_999_999", "9" * 5000, None]
)
def test_what_is_no_rate_or_takes_hours_to_compute_is_refused_at_once(text):
    with pytest.raises(UsageError, match="fps .* must be a number such as 15"):
        parse_rate(text, "fps")
