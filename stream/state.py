"""Where a loader is in its sequence, and everything that decides that sequence."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from prep.errors import UsageError

STATE_VERSION = 1


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
        if isinstance(values, str):
            try:
                values = json.loads(values)
            except ValueError as error:
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
        if values["epoch"] < 0 or values["step"] < 0:
            raise UsageError("the loader's state has a negative epoch or step")
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
