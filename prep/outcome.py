"""What becomes of an annotation row, and the fixed list of reasons why it can fail."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """Why a row gave no clip. The words are part of the format: the ledger holds them."""

    MISSING = "missing"
    MISSING_UPSTREAM = "missing upstream"
    PRIVATE = "private"
    REMOVED = "removed"
    COPYRIGHT = "copyright"
    GEO_BLOCKED = "geo-blocked"
    SIGN_IN = "sign-in"
    BOT_CHECK = "bot check"
    RATE_LIMITED = "rate-limited"
    NOT_YET = "not available yet"
    EXTRACTOR_FAILED = "extractor failed"
    NETWORK = "network"
    BAD_ROW = "bad row"
    CONFLICT = "conflicting rows"
    EMPTY_FILE = "empty file"
    NOT_A_VIDEO = "not a video"
    UNSAFE_INPUT = "unsafe input"
    NO_VIDEO_STREAM = "no video stream"
    NO_FRAMES = "no frames"
    ENCRYPTED = "encrypted"
    TRUNCATED = "truncated"
    DAMAGED = "damaged"
    HDR = "hdr"
    PICTURE_SIZE = "picture size"
    ODD_SIZE = "odd size"
    ROTATED = "rotated"
    PIXEL_ASPECT = "pixels not square"
    VARIABLE_RATE = "variable frame rate"
    SEVERAL_VIDEOS = "several videos"
    BAD_LABEL = "bad label"
    BAD_NAME = "bad name"
    OUTSIDE = "segment outside the video"
    TOO_SHORT = "too short"
    ENCODE_FAILED = "encode failed"
    CPU_LIMIT = "cpu limit"
    STALLED = "stalled"
    CRASHED = "worker crashed"
    STORAGE = "storage"

    @property
    def retryable(self) -> bool:
        """Whether trying again later can give another result."""
        return self in _RETRYABLE


_RETRYABLE = frozenset(
    {
        Reason.BOT_CHECK,
        Reason.RATE_LIMITED,
        Reason.NOT_YET,
        Reason.EXTRACTOR_FAILED,
        Reason.NETWORK,
        Reason.STALLED,
        Reason.CRASHED,
        Reason.STORAGE,
    }
)

EXPLANATIONS = {
    Reason.MISSING: "no source has a file for this row",
    Reason.MISSING_UPSTREAM: "the mirror or site does not have it",
    Reason.PRIVATE: "the owner made the video private",
    Reason.REMOVED: "the video or its account is gone",
    Reason.COPYRIGHT: "taken down after a copyright claim",
    Reason.GEO_BLOCKED: "not available in this country",
    Reason.SIGN_IN: "needs an account: age limit, members only",
    Reason.BOT_CHECK: "the site asked whether we are a bot",
    Reason.RATE_LIMITED: "the site asked for fewer requests",
    Reason.NOT_YET: "a live stream or premiere that is not over",
    Reason.EXTRACTOR_FAILED: "yt-dlp no longer understands the site; update it",
    Reason.NETWORK: "no answer, or a broken one",
    Reason.BAD_ROW: "the row, or in a folder the file's name, cannot be read",
    Reason.CONFLICT: "the segment has two labels in the list, or stands in another split",
    Reason.EMPTY_FILE: "the file has no bytes",
    Reason.NOT_A_VIDEO: "no allowed demuxer reads the file, or it is a bare stream without times",
    Reason.UNSAFE_INPUT: "a playlist, a script or a web page, which could open other files",
    Reason.NO_VIDEO_STREAM: "audio, subtitles or cover art only",
    Reason.NO_FRAMES: "a video stream without a frame",
    Reason.ENCRYPTED: "the samples are encrypted",
    Reason.TRUNCATED: "the file ends before its index",
    Reason.DAMAGED: "its frames do not all decode, or are not as many as stated",
    Reason.HDR: "high dynamic range; tone-map it first",
    Reason.PICTURE_SIZE: "no size, changing sizes, or a size or length beyond the limits",
    Reason.ODD_SIZE: "a width or height that 4:2:0 cannot have",
    Reason.ROTATED: "to be shown turned; stored clips are read as they are",
    Reason.PIXEL_ASPECT: "to be shown stretched; stored clips are read as they are",
    Reason.VARIABLE_RATE: "its frames do not come at a constant rate",
    Reason.SEVERAL_VIDEOS: "one sample with more than one video",
    Reason.BAD_LABEL: "a label that is missing, unreadable or of no class",
    Reason.BAD_NAME: "a name that not every reader takes for the same key",
    Reason.OUTSIDE: "the video ends before the segment begins",
    Reason.TOO_SHORT: "less than --min-seconds",
    Reason.ENCODE_FAILED: "ffmpeg refused, or what it wrote is not of the format",
    Reason.CPU_LIMIT: "the encode took more CPU time than allowed",
    Reason.STALLED: "no result within the time limit",
    Reason.CRASHED: "the worker process died twice over it, or ffmpeg was killed or got no memory",
    Reason.STORAGE: "a source could not be read",
}


class Status(StrEnum):
    """The four things that a row can be; their counts always add up to the number of rows."""

    OK = "ok"
    FAILED = "failed"
    DUPLICATE = "duplicate"
    PENDING = "pending"


@dataclass(frozen=True)
class Outcome:
    """What became of one row.

    `reason` is set when and only when the row failed; `detail` says more, or for a duplicate
    names the key that has the clip.
    """

    status: Status
    reason: Reason | None = None
    detail: str = ""


class RowFailure(Exception):  # noqa: N818 - it ends a row, not the run
    """Ends the conversion of one row; caught by the worker and written to the ledger."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
