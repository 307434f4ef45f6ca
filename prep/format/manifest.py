"""The manifest: `manifest.json`, written last. A split exists when the manifest lists it."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from prep.errors import DatasetError, KprepError, MissingBucketError, StorageError, UsageError
from prep.format.layout import (
    COPY_MARKER_PATH,
    FORMAT_VERSION,
    MANIFEST_PATH,
    check_split_name,
    is_shard_path,
)
from prep.profile import FOREIGN_PROFILE, EncodingProfile, profile_from_json
from prep.storage import Storage, check_relative_path

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pyarrow as pa

_MAX_COUNT = (1 << 63) - 1  # what readers in other languages, and Arrow, can hold
_MAX_DEPTH = 32  # of the JSON; a manifest of kprep has 6
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """Size and sha256 of one file of the dataset."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """One tar of a split."""

    path: str
    num_clips: int
    samples: int | None = None
    """What stands in the tar, where that is not just the clips."""

    @property
    def num_samples(self) -> int:
        """Samples in the tar: the clips, and in somebody else's tars what is no clip."""
        return self.num_clips if self.samples is None else self.samples

    def to_json(self) -> dict[str, Any]:
        """Return the shard as JSON values; without `samples` where it says nothing."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Split:
    """One split: its shards in order, what it holds, and how it was made.

    `outcomes` counts the annotation rows by what became of them; its values add up to `num_rows`.
    `settings` are what decided the shards' contents; `tools` made them.
    """

    fingerprint: str
    num_clips: int
    num_rows: int
    outcomes: dict[str, int]
    shards: tuple[Shard, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    tools: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What a dataset consists of: every file except the manifest itself, with size and sha256."""

    profile: EncodingProfile
    class_names: tuple[str, ...]
    splits: dict[str, Split]
    files: dict[str, FileEntry]

    @property
    def is_foreign(self) -> bool:
        """Whether somebody else encoded the clips, so that the profile says nothing of them."""
        return self.profile.name == FOREIGN_PROFILE

    def split(self, name: str, where: str) -> Split:
        """Return a split; UsageError, with where the dataset is, when there is none of the name."""
        if name not in self.splits:
            raise no_split_error(where, name, self.splits)
        return self.splits[name]

    def to_bytes(self) -> bytes:
        """Return the manifest as it stands on disk."""
        values = {
            "format": "kprep",
            "format_version": FORMAT_VERSION,
            "profile": self.profile.to_json(),
            "class_names": list(self.class_names),
            "splits": {name: _split_json(split) for name, split in sorted(self.splits.items())},
            "files": {path: asdict(entry) for path, entry in sorted(self.files.items())},
        }
        return (json.dumps(values, indent=1, ensure_ascii=True) + "\n").encode("ascii")

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Manifest:
        """Parse a manifest; DatasetError says where it is wrong."""
        try:
            values = json.loads(data)
            json.dumps(values, ensure_ascii=False).encode()  # names and paths go where text goes
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise DatasetError(
                f"{where} holds {half}, half a character, so it is damaged"
            ) from error
        except (ValueError, RecursionError) as error:
            raise DatasetError(
                f"{where} is not JSON: {_not_json(error)}; get it from another copy"
            ) from error
        try:
            return cls._parse(_Field(values))
        except ValueError as error:
            raise DatasetError(
                f"{where} is not a kprep manifest: {error}; get it from another copy"
            ) from error
        except KprepError as error:
            raise DatasetError(f"{where}: {error}") from error

    @classmethod
    def _parse(cls, values: _Field) -> Manifest:
        _check_depth(values.value)
        if values.member("format").value != "kprep":
            raise ValueError(f"format is {_shown(values.member('format').value)}")
        version = values.member("format_version").whole_number()
        if version != FORMAT_VERSION:
            raise DatasetError(
                f"format version {version} is not {FORMAT_VERSION}; install a kprep that reads it"
            )
        files = {
            check_relative_path(path): FileEntry(
                entry.member("bytes").whole_number(), _sha256(entry.member("sha256"))
            )
            for path, entry in values.member("files").members().items()
        }
        splits = {
            check_split_name(name): _split(split)
            for name, split in values.member("splits").members().items()
        }
        _check_shards([shard.path for split in splits.values() for shard in split.shards], files)
        names = tuple(name.text() for name in values.member("class_names").elements())
        if len(set(names)) != len(names):
            raise ValueError("class_names must be distinct strings")
        profile = profile_from_json(values.member("profile").value)
        return cls(profile, names, splits, files)


def _check_shards(paths: list[str], files: dict[str, FileEntry]) -> None:
    """Raise ValueError where a shard is not listed, twice there, or could be another file."""
    for path in paths:
        if not is_shard_path(path):
            raise ValueError(
                f"shard {path!r} must be of A-Z, a-z, 0-9, '.', '_', '=', '-' and end in .tar"
            )
        if path not in files:
            raise ValueError(f"{path} has no bytes and sha256")
    for path, count in Counter(paths).most_common(1):
        if count > 1:
            raise ValueError(f"shard {path} stands {count} times")


def _split_json(split: Split) -> dict[str, Any]:
    return {**asdict(split), "shards": [shard.to_json() for shard in split.shards]}


def _split(values: _Field) -> Split:
    return Split(
        fingerprint=_sha256(values.member("fingerprint")),
        num_clips=values.member("num_clips").whole_number(),
        num_rows=values.member("num_rows").whole_number(),
        outcomes={
            name: count.whole_number()
            for name, count in values.member("outcomes").members().items()
        },
        shards=tuple(_shard(shard) for shard in values.member("shards").elements()),
        settings={
            name: setting.value for name, setting in values.member("settings").members().items()
        },
        tools={name: tool.text() for name, tool in values.member("tools").members().items()},
    )


def _shard(values: _Field) -> Shard:
    return Shard(
        check_relative_path(values.member("path").text()),
        values.member("num_clips").whole_number(),
        values.member("samples").whole_number() if "samples" in values.value else None,
    )


def _not_json(error: Exception) -> str:
    """Return what is wrong with bytes that cannot be parsed, in our own words."""
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno}, column {error.colno} is not what JSON has there"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is of no UTF-8 text"
    if isinstance(error, RecursionError):
        return f"it is nested more than {_MAX_DEPTH} deep"
    return "it has a number of thousands of digits"


def _shown(value: Any) -> str:
    """Return a value of a stranger for a message."""
    return ascii(str(value)[:40])


class _Field(NamedTuple):
    """A value of the manifest and its place, such as `splits.train.outcomes`.

    Each method returns the value as what it must be; ValueError names the field where it is not.
    """

    value: Any
    place: tuple[str | int, ...] = ()

    @property
    def name(self) -> str:
        """The place as a message names it."""
        text = ""
        for part in self.place:
            shown = part if isinstance(part, int) or part.isprintable() else ascii(part)[1:-1]
            text += f"[{part}]" if isinstance(part, int) else f".{shown}"
        return text.removeprefix(".")

    def members(self) -> dict[str, _Field]:
        """Return the fields of an object."""
        if not isinstance(self.value, dict):
            raise self._wrong("an object")
        return {name: _Field(value, (*self.place, name)) for name, value in self.value.items()}

    def member(self, name: str) -> _Field:
        """Return a field that an object must have."""
        if not isinstance(self.value, dict):
            raise self._wrong("an object")
        if name not in self.value:
            raise ValueError(f"{_Field(None, (*self.place, name)).name} is missing")
        return _Field(self.value[name], (*self.place, name))

    def elements(self) -> list[_Field]:
        """Return the fields of a list."""
        if not isinstance(self.value, list):
            raise self._wrong("a list")
        return [_Field(value, (*self.place, number)) for number, value in enumerate(self.value)]

    def text(self) -> str:
        """Return a string."""
        if not isinstance(self.value, str):
            raise self._wrong("a string")
        return self.value

    def whole_number(self) -> int:
        """Return an integer that readers in other languages can hold, 0 or more."""
        value: Any = self.value
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_COUNT:
            raise self._wrong(f"a whole number from 0 to {_MAX_COUNT}")
        return value

    def _wrong(self, wanted: str) -> ValueError:
        return ValueError(f"{self.name or 'it'} must be {wanted}")


def _check_depth(values: Any) -> None:
    """Raise ValueError where lists and objects stand in each other deeper than in any manifest.

    What follows them down (asdict, str, json.dumps) ends with a RecursionError somewhere.
    """
    level = [values]
    for _ in range(_MAX_DEPTH):
        objects = [value.values() for value in level if isinstance(value, dict)]
        lists = [value for value in level if isinstance(value, list)]
        level = [inner for outer in (*objects, *lists) for inner in outer]
        if not level:
            return
    raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")


def _sha256(field: _Field) -> str:
    if not _SHA256.fullmatch(text := field.text()):
        raise ValueError(f"{field.name} ({_shown(text)}) must be a sha256")
    return text


def no_split_error(where: str, name: str | None, known: Iterable[str]) -> UsageError:
    """Return what is said where a split that was asked for, or any split, is not there."""
    if name is None:
        return UsageError(f"{where} has no split yet")
    return UsageError(f"{where} has no split {name!r}; it has {', '.join(sorted(known)) or 'none'}")


def read_manifest(storage: Storage) -> Manifest:
    """Read the manifest of a root; DatasetError when the root is no dataset."""
    return read_manifest_bytes(storage)[0]


def read_manifest_bytes(storage: Storage) -> tuple[Manifest, bytes]:
    """Return what `read_manifest` does, and the very bytes that it was read from.

    Raises MissingBucketError where there is no manifest because there is no bucket.
    """
    root = storage.local_root
    if root is not None and root.exists() and not root.is_dir():
        raise DatasetError(f"{root} is a file; give the folder of a dataset")
    if root is not None and not root.is_dir():
        raise DatasetError(f"{root} does not exist; make a dataset there with `kprep shard`")
    if not storage.exists(MANIFEST_PATH):
        _refuse_missing_bucket(storage)
        if storage.exists(COPY_MARKER_PATH):
            raise DatasetError(
                f"{storage.root} holds no {MANIFEST_PATH} yet: a copy into this root is not "
                "finished; repeat its push or pull"
            )
        raise DatasetError(
            f"{storage.root} holds no {MANIFEST_PATH}, so it is no kprep dataset "
            "(or its conversion is not finished: run the same `kprep shard` again)"
        )
    data = storage.read(MANIFEST_PATH)
    return Manifest.from_bytes(data, storage.where(MANIFEST_PATH)), data


def _refuse_missing_bucket(storage: Storage) -> None:
    """Raise MissingBucketError where there is no bucket: only an answer with a body can tell."""
    if storage.local_root is not None:
        return
    try:
        storage.read(MANIFEST_PATH)
    except MissingBucketError:
        raise
    except StorageError:
        pass  # the caller says what is missing


def split_fingerprint(table: pa.Table) -> str:
    """Return the sha256 over (key, num_frames, label, content hash) of an index's rows, in order.

    Nothing else enters: not the other splits, the tools, or the companion files.
    """
    digest = hashlib.sha256(b"kprep split 1\n")
    columns = ("key", "num_frames", "label", "content_hash")
    for batch in table.select(list(columns)).to_batches(max_chunksize=4096):
        values = [batch.column(name).to_pylist() for name in columns]
        for key, num_frames, label, content_hash in zip(*values, strict=True):
            digest.update(f"{key} {num_frames} {label} {content_hash.hex()}\n".encode())
    return digest.hexdigest()
