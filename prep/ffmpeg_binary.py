"""Which ffmpeg encodes: one static binary, known by its sha256."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from prep.errors import UsageError

_LOOKING = threading.Lock()


@dataclass(frozen=True)
class FFmpeg:
    """An ffmpeg program: where it is, what it calls itself, and the sha256 of the file."""

    path: str
    version: str
    sha256: str


def ffmpeg_path() -> str:
    """Return where that program is, without the third of a second that running and hashing it take.

    For workers: the process that starts them has looked at theirs. Raises UsageError without one.
    """
    path = os.environ.get("KPREP_FFMPEG") or _bundled() or shutil.which("ffmpeg")
    if not path:
        raise UsageError("no ffmpeg found; pip install imageio-ffmpeg, or set KPREP_FFMPEG to one")
    return path


def look_ahead() -> None:
    """Begin to run and hash the program in a thread, so that `find_ffmpeg` soon knows it."""

    def look() -> None:
        with contextlib.suppress(UsageError):  # find_ffmpeg raises it where it is waited for
            find_ffmpeg()

    threading.Thread(target=look, name="kprep-ffmpeg").start()


def find_ffmpeg() -> FFmpeg:
    """Return the program named by KPREP_FFMPEG, else imageio-ffmpeg's, else the one on PATH.

    Raises UsageError when there is none or it does not run.
    """
    with _LOOKING:
        return _find_ffmpeg()


@lru_cache(maxsize=1)
def _find_ffmpeg() -> FFmpeg:
    path = ffmpeg_path()
    try:
        answer = subprocess.run(
            [path, "-version"], capture_output=True, text=True, timeout=30, check=True
        )
        with Path(path).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, subprocess.SubprocessError) as error:
        raise UsageError(f"ffmpeg {path!r} does not run: {error}") from error
    first_line = answer.stdout.partition("\n")[0]
    return FFmpeg(path, first_line.partition(" Copyright")[0], digest)


def check_scaler_flags(flags: str) -> None:
    """Raise UsageError where the program's scaler refuses `flags`: every clip of a list would fail.

    They are tried on a picture, as each version knows flags of its own.
    """
    program, side = find_ffmpeg().path, 16
    picture = f"-f rawvideo -video_size {side}x{side} -pix_fmt gray -i pipe:0".split()
    scaled = ["-vf", f"scale=8:8:flags={flags}", "-f", "null", "-"]
    try:
        done = subprocess.run(
            [program, "-hide_banner", *picture, *scaled],
            input=bytes(side * side), capture_output=True, timeout=30, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise UsageError(f"ffmpeg {program!r} does not run: {error}") from error
    if done.returncode:
        raise UsageError(
            f"scaler_flags ({flags!r}) must be names that ffmpeg's scaler knows, joined by '+', "
            "such as lanczos+accurate_rnd"
        )


def _bundled() -> str | None:
    try:
        import imageio_ffmpeg

        # KPREP_FFMPEG has been asked for already, and a program on PATH is the last resort
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        return None
