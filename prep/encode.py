"""The work of an encode worker: one annotation row in, one checked clip in a pack file out.

Jobs and results are JSON objects, so that a worker can be a plain process on this machine or on
another one. This module never imports torch.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import threading
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prep.checksums import content_hash
from prep.ffmpeg_binary import ffmpeg_path
from prep.mp4 import ClipForm, FormError, TimesError, check_form
from prep.outcome import Reason, RowFailure
from prep.packet_times import TICK_SECONDS
from prep.probe import SourceFacts, is_turned, plain_cut_seconds, probe
from prep.profile import EncodingProfile, profile_from_json
from prep.source import Candidate
from prep.transcode import Limits, OutputError, command, run

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_NO_MEMORY = "the worker: out of memory"
_ROUNDED_SECONDS = 1.5 * TICK_SECONDS
"""What a clock may take of a length: half a tick of the start, of the last picture's time and of
that picture's duration."""
_MOST_READ = 1 << 30  # of a file that failed


@dataclass(frozen=True)
class Expectation:
    """What the output must hold, from what the source really holds."""

    seconds: float
    frames: float
    tolerance_frames: float
    short: bool
    detail: str
    late_seconds: float = 0.0
    """Between the start that was asked for and the first picture."""

    def lacks(self, profile: EncodingProfile) -> bool:
        """Whether the source lacks some of the segment, at its end or its beginning."""
        return self.short or self.late_seconds * float(profile.fps) > 1.5

    def fits(self, num_frames: int) -> bool:
        """Whether a clip has as many frames as it should."""
        return abs(num_frames - self.frames) <= self.tolerance_frames


def encode(job: dict[str, Any]) -> dict[str, Any]:
    """Try the candidates of a row in order; return the first clip that passes, or why none did.

    One that does not have all of the segment is tried after one that has more of it.

    What may pass with time outweighs the rest. A disk that takes no more is nobody's row: it is
    reported as `fatal`, and the run stops.
    """
    profile = profile_from_json(job["profile"])
    limits = Limits(job["cpu_seconds"], job["wall_seconds"])
    failures: list[RowFailure] = []
    candidates = [
        Candidate(
            Path(values["path"]),
            values["source"],
            values["start"],
            values["end"],
            values["was_there"],
        )
        for values in job["candidates"]
    ]
    while candidates:
        candidate = candidates.pop(0)
        try:
            facts = probe(candidate.path, candidate.start_seconds, candidate.end_seconds)
            wanted = expectation(facts, candidate, profile)
            better = _with_more(candidates, wanted, profile) if wanted.lacks(profile) else None
            if better is not None:
                candidates.remove(better)
                candidates[:0] = better, candidate
                continue
            return _encode_one(candidate, facts, wanted, profile, limits, job)
        except RowFailure as failure:
            failures.append(_fair(failure, candidate))
        except MemoryError:
            failures.append(RowFailure(Reason.CRASHED, _NO_MEMORY))
        except OSError as error:
            if isinstance(error, OutputError) or error.errno in _DISK_ERRORS:
                return {"fatal": f"{job['work']} cannot be written: {error.strerror}"}
            failures.append(RowFailure(Reason.STORAGE, f"{error.strerror}"))
    first = min(failures, key=lambda failure: not failure.reason.retryable)
    failures.remove(first)
    others = "; ".join(f"then {failure.reason}" for failure in failures)
    detail = "; ".join(part for part in (first.detail, others) if part)
    return {"status": "failed", "reason": str(first.reason), "detail": detail}


def _fair(failure: RowFailure, candidate: Candidate) -> RowFailure:
    """Return the failure, or that of the machine where memory is short or the file cannot be read.

    Libraries tell a file that cannot be read on from one that ends there only by chance.
    """
    if failure.reason.retryable or failure.reason == Reason.UNSAFE_INPUT:
        return failure
    if isinstance(failure.__cause__, MemoryError):  # PyAV's own is one
        return RowFailure(Reason.CRASHED, _NO_MEMORY)
    name = candidate.path.name
    if failure.reason != Reason.MISSING:
        try:
            _read_through(candidate.path)
        except OSError as error:
            return RowFailure(Reason.STORAGE, f"{name}: {error.strerror}")
    elif candidate.was_there:
        return RowFailure(Reason.STORAGE, f"{name} was there when the run began, and is gone")
    return failure


def _read_through(path: Path) -> None:
    """Raise OSError where a file cannot be read, in its first gigabyte."""
    with path.open("rb", buffering=0) as file:
        while file.tell() < _MOST_READ and file.read(1 << 20):
            pass


def _with_more(
    candidates: list[Candidate], wanted: Expectation, profile: EncodingProfile
) -> Candidate | None:
    """Return the candidate that has the most of the segment, if that is more than `wanted`."""
    most, found = wanted.seconds + 1.5 / float(profile.fps), None
    for candidate in candidates:
        with contextlib.suppress(RowFailure):
            facts = probe(candidate.path, candidate.start_seconds, candidate.end_seconds)
            seconds = expectation(facts, candidate, profile).seconds
            if seconds > most:
                most, found = seconds, candidate
    return found


def _encode_one(
    candidate: Candidate,
    facts: SourceFacts,
    wanted: Expectation,
    profile: EncodingProfile,
    limits: Limits,
    job: dict[str, Any],
) -> dict[str, Any]:
    if wanted.seconds < job["min_seconds"] - _ROUNDED_SECONDS:
        raise RowFailure(Reason.TOO_SHORT, f"{wanted.seconds:.3f} s")
    if wanted.short:
        _read_through(candidate.path)
    work, worker = Path(job["work"]), _worker_name()
    target = work / "temporary" / f"{worker}.mp4"
    try:
        cut, wanted = _cut_segment(candidate, target, profile, facts, limits, wanted)
    finally:
        target.unlink(missing_ok=True)
    pack = work / "staged" / f"{job['shard']:06d}-{worker}.pack"
    data, form = cut.data, cut.form
    offset = append(pack, data)
    changes = "its size or colours change within it" if cut.changing else ""
    return {
        "status": "ok",
        "detail": "; ".join(part for part in (wanted.detail, changes) if part),
        "short": wanted.short,
        "seconds": round(form.num_frames / float(profile.fps), 6),
        "source": candidate.source,
        "pack": pack.name,
        "pack_offset": offset,
        "video_bytes": len(data),
        "num_frames": form.num_frames,
        "width": form.width,
        "height": form.height,
        "content_hash": content_hash(data).hex(),
        "crc32": zlib.crc32(data),
        "codec_config": form.gops.codec_config.hex(),
        "gop_frames": form.gops.gop_frames,
        "gop_offsets": list(form.gops.offsets),
        "gop_crc32": list(form.gops.crc32),
    }


def expectation(facts: SourceFacts, candidate: Candidate, profile: EncodingProfile) -> Expectation:
    """Return what `[start, end)` of the source must give: (end there is - start) x fps, within 1.

    The last frame of a slow source stands for a while that not every container states, so where
    the clip ends with the source, the tolerance is the source's frame if that is longer than ours.
    """
    rate = float(profile.fps)
    start = max(candidate.start_seconds, facts.first_seconds)
    asked = (
        candidate.end_seconds if candidate.end_seconds is not None else facts.declared_end_seconds
    )
    end = facts.end_seconds
    if candidate.end_seconds is not None:
        end = min(end, candidate.end_seconds)
    seconds = max(0.0, end - start)
    short = asked is not None and (asked - end) * rate > 1.5
    detail = f"ends {asked - end:.2f} s early" if short and asked is not None else ""
    goes_on = facts.end_seconds - facts.frame_seconds >= end
    tolerance = 1.5 if goes_on else _source_tolerance(facts, profile)
    late = start - candidate.start_seconds
    return Expectation(seconds, seconds * rate, tolerance, short, detail, late)


def _source_tolerance(facts: SourceFacts, profile: EncodingProfile) -> float:
    """Return how many frames the length of a plain cut may be off: one, the source's or ours."""
    return max(1.0, facts.frame_seconds * float(profile.fps)) + 0.5


@dataclass(frozen=True)
class _Cut:
    """A clip that came out, whatever its length; `changing` as in `transcode.command`."""

    data: bytes
    form: ClipForm
    changing: bool = False


def _cut_segment(
    candidate: Candidate,
    target: Path,
    profile: EncodingProfile,
    facts: SourceFacts,
    limits: Limits,
    wanted: Expectation,
) -> tuple[_Cut, Expectation]:
    """Return the clip of the segment and what to say of it; RowFailure for another one.

    A picture that stands over an edge of the segment, or a first one that comes late, gives the
    plain cut another length, or the same of what comes later. Where the times of the packets
    explain it, the segment is cut again.
    """
    is_late = _begins_late(candidate, profile, facts)
    came_out = 0
    try:
        cut = _cut(candidate, target, profile, facts, limits)
        if wanted.fits(came_out := cut.form.num_frames):
            if not is_late:
                return cut, wanted
            failure = RowFailure(Reason.DAMAGED, "its pictures do not come when its packets say")
        else:
            failure = _other_length(cut, wanted)
        changing = cut.changing
    except RowFailure as refused:
        if refused.reason != Reason.ENCODE_FAILED:  # as a cut without a picture is
            raise
        failure, changing = refused, False
    if not _moved(candidate, profile, facts, came_out):
        raise failure
    cut = _cut(candidate, target, profile, facts, limits, standing=True, changing=changing)
    if not wanted.fits(cut.form.num_frames):
        raise _other_length(cut, wanted)
    return cut, _late(wanted, profile)


def _begins_late(candidate: Candidate, profile: EncodingProfile, facts: SourceFacts) -> bool:
    """Whether a plain cut begins more than a frame of the clip behind the segment's start."""
    if candidate.end_seconds is None:  # all of a file
        return False
    late = facts.next_seconds - candidate.start_seconds
    return late > 1 / float(profile.fps) + TICK_SECONDS


def _other_length(cut: _Cut, wanted: Expectation) -> RowFailure:
    text = f"{cut.form.num_frames} frames came out where {wanted.frames:.1f} were due"
    return RowFailure(Reason.DAMAGED, text)


def _cut(
    candidate: Candidate,
    target: Path,
    profile: EncodingProfile,
    facts: SourceFacts,
    limits: Limits,
    *,
    standing: bool = False,
    changing: bool = False,
) -> _Cut:
    """Cut and encode the segment; a second time where its pictures change within it."""
    arguments = command(
        ffmpeg_path(), candidate.path, target, profile, facts,
        candidate.start_seconds, candidate.end_seconds, limits,
        standing=standing, changing=changing,
    )  # fmt: skip
    run(arguments, candidate.path, limits)
    data = target.read_bytes()
    try:
        return _Cut(data, check_form(data, profile.keyframe_interval_frames), changing)
    except FormError as error:
        if not isinstance(error, TimesError) or changing or is_turned(candidate.path):
            text = f"the output check refused it: {error}"
            raise RowFailure(Reason.ENCODE_FAILED, text) from error
    return _cut(candidate, target, profile, facts, limits, standing=standing, changing=True)


def _moved(
    candidate: Candidate, profile: EncodingProfile, facts: SourceFacts, came_out: int
) -> bool:
    """Whether the times of the source's packets explain the number of frames of a plain cut.

    Where frames are missing that the packets promise, the source is damaged, and another cut, in
    which a picture stands until the next one, must not hide it.
    """
    if candidate.end_seconds is None:
        return False
    start, end = candidate.start_seconds, candidate.end_seconds
    seconds = plain_cut_seconds(candidate.path, facts, start, end)
    if seconds is None:
        return False
    return abs(seconds * float(profile.fps) - came_out) <= _source_tolerance(facts, profile)


def _late(wanted: Expectation, profile: EncodingProfile) -> Expectation:
    """Return the expectation with a first picture that comes late counted as what is missing."""
    if wanted.late_seconds * float(profile.fps) <= 1.5:
        return wanted
    begins = f"begins {wanted.late_seconds:.2f} s late"
    detail = "; ".join(part for part in (begins, wanted.detail) if part)
    return replace(wanted, short=True, detail=detail)


def _worker_name() -> str:
    """Name this thread of this process on this machine, for files that only it writes."""
    return f"{platform.node()}-{os.getpid()}-{threading.get_ident()}"


def append(pack: Path, data: bytes) -> int:
    """Append a clip to a pack file and return its offset; bytes of a broken run before it stay."""
    try:
        with pack.open("ab") as file:
            offset = file.tell()
            file.write(data)
            file.flush()
            os.fdatasync(file.fileno())
    except OSError as error:
        raise OutputError(error.errno, error.strerror) from error
    return offset
