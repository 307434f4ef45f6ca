"""The companion files that make one directory readable by wids and Megatron-Energon.

Sources: the wids index form of webdataset 0.2; Megatron-Energon 7 (`.nv-meta`). What Hugging Face
needs stands in the dataset card (dataset_card.py).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from prep.format.layout import ENERGON_FOLDER, yaml_name

if TYPE_CHECKING:
    from prep.format import Split

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
        shard.path: shard.num_samples
        for _, split in sorted(splits.items())
        for shard in split.shards
    }
    parts = "".join(
        f"  {yaml_name(name)}:\n" + "".join(f"  - {shard.path}\n" for shard in split.shards)
        for name, split in sorted(splits.items())
    )
    info = {"energon_version": ENERGON_VERSION, "shard_counts": counts}
    return {
        f"{ENERGON_FOLDER}/.info.json": (json.dumps(info, indent=1) + "\n").encode("ascii"),
        f"{ENERGON_FOLDER}/split.yaml": f"exclude: []\nsplit_parts:\n{parts}".encode("ascii"),
        f"{ENERGON_FOLDER}/dataset.yaml": _DATASET_YAML.encode("ascii"),
    }
