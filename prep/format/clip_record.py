"""One row of the index: everything that a reader needs to know of a clip before it reads it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ClipRecord:
    """One clip of a split.

    Byte ranges are half-open. `gop_offsets` are relative to `video_offset` and one longer than
    `gop_crc32`: GOP i is bytes `[gop_offsets[i], gop_offsets[i + 1])` of the video payload and
    holds frames `[i * gop_frames, (i + 1) * gop_frames)`. `codec_config` is the mp4's avcC. The
    three are None where the clip does not have the form of mp4 v1 and must be read whole and
    opened as a container.
    """

    key: str
    shard: str
    label: int
    num_frames: int
    fps_num: int
    fps_den: int
    width: int
    height: int
    entry_offset: int
    """Of the sample's first tar header, in bytes from the start of the shard."""
    entry_bytes: int
    """Of all members of the sample, headers and padding included."""
    video_offset: int
    video_bytes: int
    content_hash: bytes
    """16 bytes: BLAKE2b-128 of the video payload, as `prep.checksums.content_hash` says."""
    crc32: int
    """Of the video payload (zlib's polynomial)."""
    video_id: str
    start_seconds: float
    end_seconds: float
    source: str
    short: bool
    """The source ended before the annotated end, or began behind the annotated start."""
    codec_config: bytes | None = None
    gop_frames: int | None = None
    gop_offsets: tuple[int, ...] | None = None
    gop_crc32: tuple[int, ...] | None = None
