"""From what `describe_shard` found to rows of the index."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from prep.format import ClipRecord
from prep.shard_jobs import run_shard_jobs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from prep.shard_jobs import ShardProgress
    from prep.storage import Storage


def describe_shards(
    storage: Storage,
    paths: dict[str, int],
    context: dict[str, Any],
    *,
    folder: Path,
    workers: int,
    progress: ShardProgress,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Describe shards (path to bytes) in worker processes; yield (path, report) as they are done.

    `folder` holds what the workers share.
    """
    shared = folder / "context.json"
    shared.write_text(json.dumps(context), encoding="utf-8")
    jobs = [
        {"root": storage.root, "options": storage.options, "path": path, "bytes": size,
         "context": str(shared)}
        for path, size in paths.items()
    ]  # fmt: skip
    for job, report in run_shard_jobs("describe_shard", jobs, workers, folder, progress):
        yield job["path"], report


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
