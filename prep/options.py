"""What a user asks of one conversion."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from prep.cvdf_layout import DEFAULT_BASE
from prep.errors import UsageError
from prep.storage import Storage

if TYPE_CHECKING:
    from pathlib import Path

    from prep.outcome import Reason
    from prep.profile import EncodingProfile


@dataclass(frozen=True)
class ShardOptions:
    """What a user asks of one conversion.

    `sources` are folders, `cvdf:VERSION` or `youtube:`, in the order in which they are tried.
    `clips_per_shard` None: by the profile's picture size. `workers` 0: one for each core.
    `work` None: a folder in the root, which then must be local.
    """

    sources: tuple[str, ...]
    root: str
    split: str
    profile: EncodingProfile
    annotations: Path | None = None
    class_list: tuple[str, ...] | None = None
    classes: frozenset[str] = frozenset()
    clips_per_shard: int | None = None
    seed: int = 0
    limit: int | None = None
    min_seconds: float = 1.0
    workers: int = 0
    work: Path | None = None
    retry: tuple[Reason, ...] = ()
    finish: bool = False
    force: bool = False
    cpu_seconds: int = 300
    wall_seconds: int = 1800
    engine: Literal["local", "dask"] = "local"
    scheduler: str | None = None
    mirror: str = DEFAULT_BASE
    youtube: dict[str, str] = field(default_factory=dict)

    @functools.cached_property
    def storage(self) -> Storage:
        """The root as something to read and write: one client for all who ask."""
        return Storage(self.root)

    @property
    def work_root(self) -> Path:
        """Where unfinished work of all splits is kept; UsageError where there can be none."""
        from prep.format.layout import WORK_NAME  # the package's other parts import pyarrow

        if self.storage.is_read_only:
            raise UsageError(f"{self.root} is read only; convert into a directory, s3:// or gs://")
        if self.work is not None:
            return self.work
        local = self.storage.local_root
        if local is None:
            raise UsageError(
                f"root {self.root} is not on this machine; say with --work DIR where clips are "
                "kept until their shards are complete"
            )
        return local / WORK_NAME
