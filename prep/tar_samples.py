"""Which files of a tar are one sample: webdataset's rule, applied to one member after another."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prep.text.plain import short

if TYPE_CHECKING:
    from prep.shard_bytes import TarEntry

VIDEO_EXTENSIONS = ("mp4", "mkv", "webm", "avi", "mov")
LABEL_EXTENSIONS = ("cls", "json", "txt")
_METADATA = re.compile(r"__[^/]*__($|/)")  # names that webdataset passes over


@dataclass
class Sample:
    """Adjacent members of a tar that share a key. `members`: extension to (data offset, bytes)."""

    key: str
    offset: int
    end: int
    members: dict[str, tuple[int, int]] = field(default_factory=dict)


class Grouping:
    """Assembles samples from members in the order of the tar; `problems` are what readers trip on.

    A problem is (key, sentence): a file that stands twice in a sample, a key that comes back.
    """

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.problems: list[tuple[str, str]] = []
        self._keys: set[str] = set()

    def add(self, entry: TarEntry) -> tuple[Sample, str] | None:
        """Return the sample that a member belongs to and its extension there; None for others."""
        key, extension = split_name(entry.name)
        if key is None:
            return None
        if not self.samples or self.samples[-1].key != key:
            if key in self._keys:
                self.problems.append((key, f"key {short(key)} stands twice"))
            self._keys.add(key)
            self.samples.append(Sample(key, entry.offset, entry.end))
        sample = self.samples[-1]
        sample.end = entry.end
        if extension in sample.members:
            self.problems.append((key, f"member {short(f'{key}.{extension}')} stands twice"))
        sample.members[extension] = (entry.data_offset, entry.size)
        return sample, extension


def split_name(name: str) -> tuple[str | None, str]:
    """Return key and lower-case extension of a member; a leading `./` is no part of a key.

    `a/000.seg.mp4` is ("a/000", "seg.mp4"). None for names that no reader makes a sample of.

    It is `base_plus_ext` of webdataset 1.0, whose `((?:.*/|)[^.]+)[.]([^/]*)` takes time with the
    square of a name's length. There `a/.mp4` is ("a/", "mp4"), but `a.b/.mp4` is no sample.
    """
    name = name.removeprefix("./")
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    nameless = not stem and (not slash or "." in folder.rpartition("/")[2])
    if not dot or nameless or _METADATA.match(name):
        return None, ""
    return f"{folder}{slash}{stem}", extension.lower()
