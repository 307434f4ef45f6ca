"""The sidecar: `<key>.json` beside every `<key>.mp4` in a shard, always all fields and types."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from prep.errors import DatasetError


@dataclass(frozen=True)
class Sidecar:
    """What travels with a clip to every reader of the tars.

    `label` is "" and `label_index` -1 where there is none. `end_seconds` is the annotated end.
    `extra` is a JSON object of the annotation's other columns, as a string, so that every sample
    has the same fields of the same types (Hugging Face infers a schema from five samples).
    """

    key: str
    video_id: str
    split: str
    label: str
    label_index: int
    start_seconds: float
    end_seconds: float
    num_frames: int
    fps_num: int
    fps_den: int
    width: int
    height: int
    source: str
    profile: str
    extra: str

    def to_bytes(self) -> bytes:
        """Return the sidecar as it stands in the tar: one line of ASCII JSON."""
        return json.dumps(asdict(self), ensure_ascii=True, separators=(",", ":")).encode("ascii")

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Sidecar:
        """Parse a sidecar; DatasetError names `where` when a field is missing or wrong."""
        try:
            values: Any = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{where} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise DatasetError(f"{where} must be a JSON object")
        kinds = {"str": str, "int": int, "float": float}
        for field in fields(cls):
            kind = kinds[str(field.type)]
            if not isinstance(values.get(field.name), kind):
                raise DatasetError(f"{where} must have the field {field.name} of type {field.type}")
        return cls(**{field.name: values[field.name] for field in fields(cls)})
