"""One annotation row, and the key under which its clip stands in the dataset."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

YOUTUBE_ID = re.compile(r"[A-Za-z0-9_-]{11}")


@dataclass(frozen=True)
class Segment:
    """A stretch of a video, as a list or a folder names it.

    `end_seconds` None means to the end of the file. `extra` is a JSON object of the list's other
    columns. `path` is the file below the source folder where the folder itself is the list.
    """

    video_id: str
    start_seconds: float
    end_seconds: float | None
    label: str | None
    split: str
    extra: str = "{}"
    path: str | None = None

    @property
    def key(self) -> str:
        """The name of the sample: ASCII, without a dot, at most 80 characters.

        `<video_id>_<start:06d>_<end:06d>` for YouTube ids and whole seconds. An id that begins
        with `__` gets the prefix `v`, because Hugging Face drops such members of a tar. Everything
        else is a readable remnant and a hash, so that two files never share a key.
        """
        if (
            self.path is None
            and self.end_seconds is not None
            and YOUTUBE_ID.fullmatch(self.video_id)
        ):
            prefix = "v" if self.video_id.startswith("__") else ""
            stem = f"{prefix}{self.cut_name}"
            return stem if self.in_whole_seconds else f"{stem}-{self._hash()}"
        remnant = re.sub(r"\.[A-Za-z0-9]{1,5}$", "", self.path or self.video_id)
        remnant = re.sub(r"[^A-Za-z0-9]+", "-", remnant).strip("-")[-60:].strip("-")
        return f"{remnant or 'clip'}-{self._hash()}"

    @property
    def cut_name(self) -> str | None:
        """What Kinetics calls a file that holds just this segment, without its extension."""
        if self.path is not None or self.end_seconds is None:
            return None
        return f"{self.video_id}_{int(self.start_seconds):06d}_{int(self.end_seconds):06d}"

    @property
    def in_whole_seconds(self) -> bool:
        """Whether the cut name says the segment exactly: segments of other times can share it."""
        end = self.end_seconds
        return self.start_seconds.is_integer() and end is not None and end.is_integer()

    def _hash(self) -> str:
        name = self.path or self.video_id
        identity = f"{self.split}\0{name}\0{self.start_seconds!r}\0{self.end_seconds!r}"
        return hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:10]


@dataclass(frozen=True)
class BadRow:
    """An annotation row that cannot be read: where it stands and what is wrong with it."""

    line: int
    detail: str
