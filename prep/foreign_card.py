"""The dataset card of tars that somebody else wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prep.format.layout import yaml_name

if TYPE_CHECKING:
    from prep.format import Manifest


def foreign_card(manifest: Manifest) -> bytes:
    """Return the dataset card of tars that somebody else wrote; Hugging Face reads its head."""
    lines = ["---", "configs:", "- config_name: default", "  data_files:"]
    for name, split in sorted(manifest.splits.items()):
        lines += [f"  - split: {yaml_name(name)}", "    path:"]
        lines += [f'    - "{shard.path}"' for shard in split.shards]
    lines += [
        "tags: [video, webdataset, kprep]",
        "---",
        "",
        "# Video clips in webdataset tars, indexed by kprep",
        "",
        (
            f"Clips of {len(manifest.class_names)} classes as they were found in these tars, which "
            "`kprep index` has not changed. Codec, rate and size are each clip's own: "
            "`index/<split>.parquet` has them."
        ),
        "",
        "| split | clips | samples | without a clip | shards | bytes |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, split in sorted(manifest.splits.items()):
        size = sum(manifest.files[shard.path].bytes for shard in split.shards)
        lines.append(
            f"| {name} | {split.num_clips} | {split.num_rows} | "
            f"{split.outcomes.get('failed', 0)} | {len(split.shards)} | {size} |"
        )
    lines += [
        "",
        "`ledger/<split>.parquet` says for every sample whether it can be streamed, and why not.",
        "The videos remain under the terms of their sources.",
        "",
    ]
    return "\n".join(lines).encode("utf-8")
