"""What a user asks of one conversion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from prep.outcome import Reason
    from prep.profile import EncodingProfile


@dataclass(frozen=True)
class ShardOptions:
    """What a user asks of one conversion. `clips_per_shard` None: by the profile's picture size."""

    source: Path
    root: Path
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
    cpu_seconds: int = 300
    wall_seconds: int = 1800
