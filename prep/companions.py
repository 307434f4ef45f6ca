"""The companion files that make one directory readable by wids, Megatron-Energon and Hugging Face.

Sources: the wids index form of webdataset 0.2; Megatron-Energon 7 (`.nv-meta`); the `configs` of
Hugging Face dataset cards.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prep.format import FileEntry, Split
    from prep.profile import EncodingProfile

ENERGON_VERSION = "7.4.0"
_DATASET_YAML = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"


def wids_path(split: str) -> str:
    """Return the path of a split's wids index."""
    return f"wids-{split}.json"


def wids_index(split: str, shards: list[dict[str, Any]]) -> bytes:
    """Return the wids index of one split from its shards (path, num_clips, md5, bytes)."""
    values = {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "name": split,  # no "base": the urls are relative to the index's own folder
        "shardlist": [
            {
                "url": shard["path"],
                "nsamples": shard["num_clips"],
                "md5sum": shard["md5"],
                "filesize": shard["bytes"],
            }
            for shard in shards
        ],
    }
    return (json.dumps(values, indent=1) + "\n").encode("ascii")


def energon_files(splits: dict[str, Split]) -> dict[str, bytes]:
    """Return the files of `.nv-meta`: which shard holds how much, and which split it belongs to."""
    counts = {
        shard.path: shard.num_clips for _, split in sorted(splits.items()) for shard in split.shards
    }
    parts = "".join(
        f"  {name}:\n" + "".join(f"  - {shard.path}\n" for shard in split.shards)
        for name, split in sorted(splits.items())
    )
    info = {"energon_version": ENERGON_VERSION, "shard_counts": counts}
    return {
        ".nv-meta/.info.json": (json.dumps(info, indent=1) + "\n").encode("ascii"),
        ".nv-meta/split.yaml": f"exclude: []\nsplit_parts:\n{parts}".encode("ascii"),
        ".nv-meta/dataset.yaml": _DATASET_YAML.encode("ascii"),
    }


def dataset_card(
    profile: EncodingProfile,
    class_names: tuple[str, ...],
    splits: dict[str, Split],
    files: dict[str, FileEntry],
) -> bytes:
    """Return README.md: the dataset card, with the globs that Hugging Face needs."""
    globs = "".join(f'  - split: {name}\n    path: "{name}/*.tar"\n' for name in sorted(splits))
    lines = [
        "---",
        "configs:",
        "- config_name: default",
        "  data_files:",
        globs.rstrip("\n"),
        "tags: [video, webdataset, kprep]",
        "---",
        "",
        "# Video clips for training, made with kprep",
        "",
        (
            f"Clips of {len(class_names)} classes at {float(profile.fps):g} frames a second, "
            f"short side {profile.short_side_px} pixels, H.264 with a keyframe every "
            f"{profile.keyframe_interval_frames} frames (profile `{profile.name}`)."
        ),
        "",
        "| split | clips | annotation rows | without a clip | shards | bytes |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, split in sorted(splits.items()):
        size = sum(files[shard.path].bytes for shard in split.shards)
        missing = split.outcomes.get("failed", 0) + split.outcomes.get("pending", 0)
        lines.append(
            f"| {name} | {split.num_clips} | {split.num_rows} | {missing} | "
            f"{len(split.shards)} | {size} |"
        )
    lines += [
        "",
        "`ledger/<split>.parquet` says for every annotation row what became of it and why.",
        "Read it with kprep, `webdataset`, `wids`, Megatron-Energon or Hugging Face `datasets`.",
        "The videos remain under the terms of their sources.",
        "",
    ]
    return "\n".join(lines).encode("utf-8")
