"""One ffmpeg process per clip: the command, and running it within limits."""

from __future__ import annotations

import errno
import re
import resource
import signal
import subprocess
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import ffmpeg

from prep.format.layout import MAX_PIXELS
from prep.outcome import Reason, RowFailure
from prep.probe import FORMAT_WHITELIST, SourceFacts

if TYPE_CHECKING:
    from pathlib import Path

    from prep.profile import EncodingProfile

# ITU-T H.273 matrix coefficients by the names that ffmpeg's scaler knows
_MATRICES = {1: "bt709", 4: "fcc", 5: "bt470", 6: "smpte170m", 7: "smpte240m", 9: "bt2020"}
_MAX_ASPECT = 16
_SOURCE, _TARGET = "the source", "the target"
# ffmpeg told by the system that its CPU time is over, and killed a second later
_AT_ITS_LIMIT = (255, -signal.SIGXCPU, -signal.SIGKILL)
# An input/output error is also what demuxers say of a file that is cut short
_NOT_WRITTEN = re.compile(
    r"No space left on device|Disk quota exceeded|Read-only file system"
    r"|(?:writing|\bmux|opening output).*: Input/output error"
)


# Of ffmpeg and its libraries where a limit of the process, the cgroup or the machine gives them no
# memory or no thread. A decoder that gets no buffer leaves pictures out, and ffmpeg ends with 0.
_STARVED = re.compile(
    r"(?:Cannot|Could not|Failed to) allocate(?: memory)?|out of memory|malloc of size \d+ failed"
    r"|pthread_create\(\) failed|error while loading shared libraries|get_buffer\(\) failed",
    re.IGNORECASE,
)
_TOO_LARGE = re.compile(r"Picture size \S+ |image parameters invalid")  # no buffer on purpose


class OutputError(OSError):
    """No clip can be written, whatever the source."""


@dataclass(frozen=True)
class Limits:
    """How long one encode may take: CPU time ends it for good, wall-clock time means a stall."""

    cpu_seconds: int = 300
    wall_seconds: int = 1800


def picture_size(facts: SourceFacts, short_side_px: int) -> tuple[int, int]:
    """Return the encoded (width, height): square pixels, upright, even, short side as given.

    640x480 with a short side of 128 becomes 170x128: 128 * 640 / 480 = 170.7, to the nearest even.
    """
    width, height = Fraction(facts.width) * facts.sample_aspect, Fraction(facts.height)
    if facts.rotation_degrees % 180 == 90:
        width, height = height, width
    ratio = max(width, height) / min(width, height)
    if ratio > _MAX_ASPECT:
        raise RowFailure(Reason.PICTURE_SIZE, f"{facts.width}x{facts.height} is too long a strip")
    long_side = 2 * round(short_side_px * ratio / 2)
    return (long_side, short_side_px) if width >= height else (short_side_px, long_side)


def input_matrix(facts: SourceFacts) -> str:
    """Return the source's YUV matrix; untagged it is BT.601 below 720 lines, else BT.709."""
    untagged = "bt709" if facts.height >= 720 else "smpte170m"
    return _MATRICES.get(facts.matrix, untagged)


def _changing_matrix(facts: SourceFacts) -> str:
    """Return how to read pictures that change: each by its own tag, and untagged ones as BT.601.

    As ffmpeg knows no rule by size, all are BT.709 where the first is untagged and that large.
    """
    matrix = input_matrix(facts)
    return matrix if facts.matrix not in _MATRICES and matrix == "bt709" else "auto"


def filters(
    profile: EncodingProfile,
    facts: SourceFacts,
    window: tuple[float, float] | None = None,
    *,
    changing: bool = False,
) -> str:
    """Return the filter chain: rate, timestamps from zero, size, square pixels, BT.601 limited.

    `window` is what to keep, in seconds from the segment's start; see `command`, also for
    `changing`.
    """
    matrix = _changing_matrix(facts) if changing else input_matrix(facts)
    width, height = picture_size(facts, profile.short_side_px)
    rate = f"fps={profile.fps.numerator}/{profile.fps.denominator}"
    if window is not None:
        rate += f":start_time={window[0]:.6f},trim=end={window[1]:.6f}"
    return ",".join(
        (
            rate,
            "setpts=PTS-STARTPTS",
            (
                f"scale={width}:{height}:flags={profile.scaler_flags}"
                f":in_color_matrix={matrix}:out_color_matrix=smpte170m"
                ":out_range=limited"
            ),
            "setsar=1",
            "setparams=range=limited:colorspace=smpte170m",
            f"format={profile.pixel_format}",
        )
    )


def command(
    binary: str,
    source: Path,
    target: Path,
    profile: EncodingProfile,
    facts: SourceFacts,
    start_seconds: float,
    end_seconds: float | None,
    limits: Limits,
    *,
    standing: bool = False,
    changing: bool = False,
) -> list[str]:
    """Return the arguments of the one process that cuts, resamples, scales and encodes a clip.

    Everything that could make two machines write different bytes is switched off: x264 and the
    scaler choose code by CPU model unless `cpu-independent=1` and `accurate_rnd+bitexact`, and
    threads change x264's rate control.

    The plain cut lets a picture that begins before the segment, or behind its end, move its edges.
    `standing` cuts at the segment's times instead: a picture that stands when the segment begins is
    in the clip from there on, and nothing is longer than the segment (which must have an end).

    `changing` is for pictures whose size or format changes within the segment. ffmpeg would make
    the filters anew there, which begin at time 0 again; instead the scaler takes every picture as
    it is, to the size of the first. Other filters could not, so nothing may be turned.
    """
    window = None
    cut: dict[str, str | None] = {}
    if start_seconds > 0:
        # before the input: seek, then drop up to the exact frame
        cut["ss"] = f"{start_seconds:.6f}"
        if facts.sought_seconds is not None:  # from an earlier point; the times stay as they were
            earlier = start_seconds - facts.sought_seconds
            cut["ss"] = f"{facts.sought_seconds:.6f}"
            cut["itsoffset"] = f"{-earlier:.6f}"
            # ffmpeg takes a first time that is 10 s off, as this one can be, for a mistake
            cut["dts_delta_threshold"] = f"{earlier + 10:.0f}"
    if standing and end_seconds is not None:
        cut["noaccurate_seek"] = None
        late = max(0.0, facts.first_seconds - start_seconds)
        window = late, end_seconds - start_seconds
    elif end_seconds is not None:
        cut["t"] = f"{end_seconds - start_seconds:.6f}"
    if changing:
        cut |= {"reinit_filter": "0", "noautorotate": None}
    opened = ffmpeg.input(
        _SOURCE,
        nostdin=None, hide_banner=None, loglevel="error", filter_threads=1,
        timelimit=limits.cpu_seconds, max_pixels=MAX_PIXELS, threads=1,
        format_whitelist=FORMAT_WHITELIST, protocol_whitelist="file", **cut,
    )  # fmt: skip
    tune = {} if profile.tune == "none" else {"tune": profile.tune}
    encoded = ffmpeg.output(
        opened[str(facts.stream_index)],
        _TARGET,
        an=None, sn=None, dn=None, map_metadata=-1, map_chapters=-1,
        vf=filters(profile, facts, window, changing=changing), fps_mode="passthrough",
        vcodec=profile.codec, preset=profile.preset, crf=profile.crf, **tune,
        g=profile.keyframe_interval_frames, keyint_min=profile.keyframe_interval_frames,
        sc_threshold=0, bf=0, threads=1,
        flags="+cgop+bitexact", fflags="+bitexact", movflags="+faststart", use_editlist=0,
        f="mp4", **{"bsf:v": "filter_units=remove_types=6", "x264-params": "cpu-independent=1"},
    )  # fmt: skip
    arguments: list[str] = ffmpeg.compile(encoded, cmd=binary, overwrite_output=True)
    # put in here: ffmpeg-python takes no path with bytes that are no UTF-8
    places = {_SOURCE: f"file:{source}", _TARGET: f"file:{target}"}
    return [places.get(argument, argument) for argument in arguments]


def run(arguments: list[str], source: Path, limits: Limits) -> None:
    """Run the command.

    Raises RowFailure with ffmpeg's last word when it fails, OutputError when no clip can be
    written.
    """
    before = _children_cpu_seconds()
    try:
        done = subprocess.run(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=limits.wall_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RowFailure(Reason.STALLED, f"no result in {limits.wall_seconds} s") from error
    except OSError as error:
        raise RowFailure(Reason.STORAGE, f"ffmpeg cannot be started: {error.strerror}") from error
    message = done.stderr.decode("utf-8", "surrogateescape")  # as in `source`
    starved = None if _TOO_LARGE.search(message) else _STARVED.search(message)
    if done.returncode == 0 and not starved:
        return
    spent = _children_cpu_seconds() - before
    if done.returncode in _AT_ITS_LIMIT and spent >= limits.cpu_seconds * 0.9:
        raise RowFailure(Reason.CPU_LIMIT, f"over {limits.cpu_seconds} s of CPU time")
    if done.returncode < 0:
        raise RowFailure(Reason.CRASHED, f"ffmpeg ended with signal {-done.returncode}")
    if refused := _NOT_WRITTEN.search(message):
        raise OutputError(errno.ENOSPC, refused[0].rpartition(": ")[2])
    if starved:
        raise RowFailure(Reason.CRASHED, f"ffmpeg: {starved[0]}")
    raise RowFailure(Reason.ENCODE_FAILED, last_word(message, source))


def last_word(message: str, source: Path) -> str:
    """Return the first line of ffmpeg's complaint without paths and addresses.

    The ledger is part of the dataset: the same failure must read the same on every machine.
    """
    text = message.replace(f"file:{source}", source.name).replace(str(source), source.name)
    text = re.sub(r" @ 0x[0-9a-f]+", "", text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:200] if lines else "no message"


def _children_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
