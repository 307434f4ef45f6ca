"""Many shards described by worker processes: the jobs of prep.describe_shard."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

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
