"""Where a loader is in its sequence, and everything that decides that sequence."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from prep.errors import UsageError
from stream.order import ORDER_VERSION
from stream.whole_numbers import LEAST, whole_number

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stream.clip_stream import ClipStream

STATE_VERSION = 1
_LONGEST_LIST = 120  # characters


@dataclass(frozen=True)
class StreamState:
    """A position in the global sequence of clips; under 1 KiB as JSON.

    `step` counts optimiser steps of `epoch` that were consumed. The other fields decide the
    sequence; a state is refused by the name of the first one that differs. `roots` tells several
    roots apart, by the beginnings of their splits' fingerprints in order; it is empty for one.
    `placement` is empty in training, where it decides nothing.
    """

    version: int
    order_version: int
    epoch: int
    step: int
    seed: int
    global_batch: int
    roots: str
    weights: str
    fingerprint: str
    objects: str
    frames: int
    fps: str
    clips_per_video: int
    grouping: str
    shuffle_block: int
    short: str
    bad_clips: str
    mode: str
    placement: str

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> StreamState:
        """Read what `to_json` (or its JSON text) gave; UsageError when it is something else."""
        if isinstance(values, cls):
            values = values.to_json()
        if isinstance(values, str):
            try:
                values = json.loads(values)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"the loader's state is not JSON: {error}") from error
        if isinstance(values, dict):  # what older states do not say: they have one root, and train
            values = {"roots": "", "weights": "1", "mode": "train", "placement": "", **values}
        kinds = {field.name: {"int": int, "str": str}[str(field.type)] for field in fields(cls)}
        if not isinstance(values, dict) or values.get("version") != STATE_VERSION:
            raise UsageError(
                f"the loader's state must be of version {STATE_VERSION}; "
                "resume with the kprep that wrote it, or start anew"
            )
        for name, kind in kinds.items():
            if type(values.get(name)) is not kind:  # True is an int by isinstance
                raise UsageError(f"the loader's state has no {name} of type {kind.__name__}")
            if kind is int:
                least = 0 if name in ("epoch", "step") else LEAST
                whole_number(f"{name} of the loader's state", values[name], least=least)
        return cls(**{name: values[name] for name in kinds})

    def check_continues(self, current: StreamState) -> None:
        """Raise UsageError when this state belongs to another sequence than `current`'s."""
        for field in fields(self):
            if field.name in ("epoch", "step"):
                continue
            saved, now = getattr(self, field.name), getattr(current, field.name)
            if saved != now:
                raise UsageError(
                    f"cannot resume: {field.name} was {saved} and is {now} now; the sequence of "
                    f"clips depends on it, so set it as it was or start anew"
                )


def state_of(stream: ClipStream, epoch: int, step: int) -> StreamState:
    """Return the state of a stream of which `step` optimiser steps of an epoch were consumed."""
    options = stream.options
    several = stream.mixture.shares if len(stream.mixture.shares) > 1 else ()
    return StreamState(
        version=STATE_VERSION,
        order_version=ORDER_VERSION,
        epoch=epoch,
        step=step,
        seed=options.seed,
        global_batch=stream.plan.global_batch,
        roots=_short(share.fingerprint[:8] for share in several),
        weights=_short(str(share.weight) for share in stream.mixture.shares),
        fingerprint=stream.mixture.fingerprint,
        objects=_objects_digest(stream),
        frames=options.frames,
        fps=str(options.fps),
        clips_per_video=options.clips_per_video,
        grouping=options.grouping,
        shuffle_block=options.shuffle_block,
        short=options.short,
        bad_clips=options.bad_clips,
        mode=options.mode,
        placement=options.placement if options.mode == "eval" else "",
    )


def _objects_digest(stream: ClipStream) -> str:
    """Return a digest of the objects that the rows point into: path, size and sha256 of each shard.

    Taken from the manifest rather than from ETags, so that a copy of the dataset in another place
    continues a run. What changes while a run goes on is found by ETag and by crc32.
    """
    texts = []
    for root in stream.roots:
        shards = root.split.shards if root.split is not None else ()
        entries = ((shard.path, root.manifest.files[shard.path]) for shard in shards)
        texts.append("\n".join(f"{path} {entry.bytes} {entry.sha256}" for path, entry in entries))
    return hashlib.sha256("\n\n".join(texts).encode()).hexdigest()[:16]


def _short(parts: Iterable[str]) -> str:
    """Return a list for a state, which must stay small: as it is, or a digest of a long one."""
    text = ",".join(parts)
    return text if len(text) <= _LONGEST_LIST else hashlib.sha256(text.encode()).hexdigest()[:16]
