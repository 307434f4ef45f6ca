"""From what a worker says of a clip to its row of the index."""

from __future__ import annotations

from typing import Any

from prep.format import ClipRecord


def clip_record(path: str, key: str, clip: dict[str, Any], **about: Any) -> ClipRecord:
    """Return the row of a described clip; `about` is video id, label, times, source and short."""
    indexed = clip["gop_frames"] is not None
    return ClipRecord(
        key=key,
        shard=path,
        num_frames=clip["num_frames"],
        fps_num=clip["fps"][0],
        fps_den=clip["fps"][1],
        width=clip["width"],
        height=clip["height"],
        entry_offset=clip["entry_offset"],
        entry_bytes=clip["entry_bytes"],
        video_offset=clip["video_offset"],
        video_bytes=clip["video_bytes"],
        content_hash=bytes.fromhex(clip["content_hash"]),
        crc32=clip["crc32"],
        codec_config=bytes.fromhex(clip["codec_config"]) if indexed else None,
        gop_frames=clip["gop_frames"],
        gop_offsets=tuple(clip["gop_offsets"]) if indexed else None,
        gop_crc32=tuple(clip["gop_crc32"]) if indexed else None,
        **about,
    )
