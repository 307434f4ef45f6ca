"""Encoding profiles: everything that decides the bytes of an encoded clip, by name."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from prep.errors import UsageError
from prep.exact_numbers import exact_number

FOREIGN_PROFILE = "foreign"  # the name where somebody else encoded; its fields then say nothing
_PRESETS = (
    "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow",
)  # fmt: skip
_TUNES = ("fastdecode", "film", "animation", "grain", "stillimage", "psnr", "ssim", "none")
_FIXED = {"codec": ("libx264",), "pixel_format": ("yuv420p",), "colour": ("bt601-limited",)}


@dataclass(frozen=True)
class EncodingProfile:
    """How every clip of a dataset is encoded.

    The picture is scaled so that its shorter side is `short_side_px` (square pixels, even sizes)
    and resampled to the constant rate `fps`. A keyframe stands at every multiple of
    `keyframe_interval_frames`; groups of pictures are closed and frames are never reordered.
    """

    name: str
    fps: Fraction = Fraction(15)
    short_side_px: int = 256
    codec: str = "libx264"
    crf: int = 23
    preset: str = "veryfast"
    tune: str = "fastdecode"
    keyframe_interval_frames: int = 16
    scaler_flags: str = "bicubic+accurate_rnd+full_chroma_int+bitexact"
    pixel_format: str = "yuv420p"
    colour: str = "bt601-limited"

    def __post_init__(self) -> None:
        """Refuse what cannot be encoded or could not be read back exactly."""
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", self.name):
            raise UsageError(
                f"profile name {self.name!r} must be 1 to 64 of a-z, 0-9, '.', '_' and '-'"
            )
        _within("fps", self.fps, Fraction(1, 10), Fraction(120))
        _within("short_side_px", self.short_side_px, 16, 2160)
        _within("crf", self.crf, 0, 51)
        _within("keyframe_interval_frames", self.keyframe_interval_frames, 1, 600)
        if self.short_side_px % 2:
            raise UsageError(f"short_side_px ({self.short_side_px}) must be even, as 4:2:0 needs")
        _one_of("preset", self.preset, _PRESETS)
        _one_of("tune", self.tune, _TUNES)
        for name, allowed in _FIXED.items():
            _one_of(name, getattr(self, name), allowed)
        if not re.fullmatch(r"[a-z0-9_+]+", self.scaler_flags):
            raise UsageError(f"scaler_flags ({self.scaler_flags!r}) must be names joined by '+'")

    @property
    def usual_clips_per_shard(self) -> int:
        """How many clips a shard has unless told otherwise: more where they are small."""
        return 4000 if self.short_side_px <= 128 else 1000

    def to_json(self) -> dict[str, Any]:
        """Return the profile as JSON values; fps becomes "num/den"."""
        return {**asdict(self), "fps": f"{self.fps.numerator}/{self.fps.denominator}"}

    def fingerprint(self) -> str:
        """Return the sha256 of everything but the name: equal when the bytes are."""
        values = {key: value for key, value in self.to_json().items() if key != "name"}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def differences(self, other: EncodingProfile) -> list[str]:
        """Return `field: ours, not theirs` for every field in which two profiles differ."""
        return self.differences_from_json(other.to_json())

    def differences_from_json(self, theirs: dict[str, Any]) -> list[str]:
        """Return the same for the JSON values of a profile, which another kprep may have written.

        A field that it did not know is None.
        """
        mine = self.to_json()
        return [
            f"{key}: {mine.get(key)}, not {theirs.get(key)}"
            for key in {**mine, **theirs}
            if mine.get(key) != theirs.get(key)
        ]

    def changed(self, **values: Any) -> EncodingProfile:
        """Return the profile with other values, under a name of its own.

        A named profile never has other values than its name says, so a changed one is called
        after its fingerprint. Values that are None are left as they are.
        """
        given = {key: value for key, value in values.items() if value is not None}
        if "fps" in given:
            given["fps"] = parse_rate(given["fps"], "fps")
        changed = replace(self, **given)
        if changed == self:
            return self
        return replace(changed, name=f"custom-{changed.fingerprint()[:8]}")


def _within(name: str, value: Any, low: Any, high: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | Fraction) or not low <= value <= high:
        raise UsageError(f"{name} ({value}) must be a number from {low} to {high}")


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{name} ({value!r}) must be one of {', '.join(allowed)}")


def parse_rate(value: Any, name: str) -> Fraction:
    """Read a frame rate: 15, 7.5, "7.5" or "30000/1001"."""
    rate = exact_number(value)
    if rate is None:
        raise UsageError(f"{name} ({value!r}) must be a number such as 15, 7.5 or 30000/1001")
    return rate.limit_denominator(100_000)


PROFILES = {
    "general": EncodingProfile("general"),
    "small": EncodingProfile("small", short_side_px=128),
}


def profile_from_json(values: Any) -> EncodingProfile:
    """Read what `to_json` wrote; raise UsageError for anything else."""
    known = {field.name for field in fields(EncodingProfile)}
    if not isinstance(values, dict) or not set(values) <= known or "name" not in values:
        raise UsageError(f"an encoding profile has the fields {', '.join(sorted(known))}")
    given = dict(values)
    if "fps" in given:
        given["fps"] = parse_rate(given["fps"], "fps")
    for key, value in given.items():
        wanted = int if key in ("short_side_px", "crf", "keyframe_interval_frames") else str
        if key != "fps" and (not isinstance(value, wanted) or isinstance(value, bool)):
            raise UsageError(f"profile field {key} ({value!r}) must be of type {wanted.__name__}")
    return EncodingProfile(**given)


def load_profile(name_or_file: str) -> EncodingProfile:
    """Return a named profile, or the one that a TOML file describes.

    A file holds the fields of EncodingProfile; `base = "small"` takes the rest from a named one.
    """
    if name_or_file in PROFILES:
        return PROFILES[name_or_file]
    path = Path(name_or_file)
    if path.suffix != ".toml":
        raise UsageError(
            f"profile {name_or_file!r} is unknown; use {', '.join(PROFILES)} or a .toml file"
        )
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"profile file {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"profile file {path} is not TOML: {error}") from error
    base = values.pop("base", "general")
    if base not in PROFILES:
        raise UsageError(f"profile file {path}: base ({base!r}) must be {' or '.join(PROFILES)}")
    inherited = {key: value for key, value in PROFILES[base].to_json().items() if key != "name"}
    try:
        profile = profile_from_json({"name": path.stem.lower(), **inherited, **values})
    except UsageError as error:
        raise UsageError(f"profile file {path}: {error}") from error
    if profile.name == FOREIGN_PROFILE:
        raise UsageError(f"profile file {path}: {profile.name} is a reserved name; choose another")
    named = PROFILES.get(profile.name)
    if named is not None and named != profile:
        raise UsageError(
            f"profile file {path}: {profile.name} is a built-in name with other values; "
            "choose another name"
        )
    return profile
