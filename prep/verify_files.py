"""What `kprep verify` compares without opening a shard: files, index, ledger and companions."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import TYPE_CHECKING, Any

from prep import companions
from prep.errors import DatasetError, StorageError
from prep.faults import Fault, Kind
from prep.format import (
    index_path,
    ledger_path,
    read_index,
    split_fingerprint,
)
from prep.format.layout import (
    CARD_PATH,
    CLASSES_PATH,
    COPY_MARKER_PATH,
    MANIFEST_PATH,
    classes_file,
    is_reserved,
)
from prep.ledger import read_ledger
from prep.local_files import NoPlainFileError, files_left_out
from prep.shard_bytes import ShardBytes
from prep.store_errors import is_forbidden

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pyarrow as pa

    from prep.format import Manifest
    from prep.storage import Storage

ALTERED = "altered (sha256 differs from the manifest's)"
OTHER_FINGERPRINT = "its fingerprint is not the manifest's"


def shard_paths(manifest: Manifest) -> set[str]:
    """Return the paths of all shards."""
    return {shard.path for split in manifest.splits.values() for shard in split.shards}


def extra_files(storage: Storage, manifest: Manifest) -> list[Fault] | None:
    """Name files that the manifest does not list; None where they cannot be looked for.

    That is a web server, or a bucket that these credentials may read and not list.
    """
    if storage.is_read_only:
        return None
    try:
        found = {info.path: "" for info in storage.list()}
    except StorageError as error:
        if is_forbidden(error):  # and not wrong credentials: they have read the manifest
            return None
        raise
    if storage.local_root is not None:
        found |= {path: f" (it is {what})" for path, what in files_left_out(storage.local_root)}
    return [
        Fault(Kind.EXTRA, path, f"not listed in the manifest{what}")
        for path, what in sorted(found.items())
        if path not in manifest.files and path != MANIFEST_PATH and not is_reserved(path)
    ]


def unlisted_files(manifest: Manifest) -> Iterator[Fault]:
    """Name files that a dataset must have and the manifest does not list."""
    for path in wanted_files(manifest):
        if path not in manifest.files:
            yield Fault(Kind.MANIFEST, path, "the manifest has no size and sha256")


def unfinished_copy(storage: Storage) -> Iterator[Fault]:
    """Name a copy into this root that was not completed: other faults may be of its making."""
    if storage.is_read_only:
        return
    try:
        if not storage.exists(COPY_MARKER_PATH):
            return
    except StorageError as error:
        if is_forbidden(error):  # S3's answer for what is not there, to who may not list
            return
        raise
    text = "a copy into this root is not finished; let it end, or repeat its `kprep push` or pull"
    yield Fault(Kind.EXTRA, COPY_MARKER_PATH, text)


def wanted_files(manifest: Manifest) -> list[str]:
    """Return every file that a dataset with these splits must have, but the manifest."""
    wanted = [CARD_PATH, CLASSES_PATH, *companions.energon_files(manifest.splits)]
    for name, split in manifest.splits.items():
        for shard in split.shards:
            wanted += [shard.path, f"{shard.path}.idx"]
        wanted += [index_path(name), ledger_path(name), companions.wids_path(name)]
    return wanted


def read_listed(storage: Storage, manifest: Manifest, path: str) -> bytes | Fault:
    """Return a file that is what the manifest lists, or the fault."""
    entry = manifest.files[path]
    try:
        info = storage.info(path)
        if info.size_bytes != entry.bytes:
            return size_fault(path, info.size_bytes, entry.bytes)
        data = storage.read(path, entry.bytes)
    except StorageError as error:
        return storage_fault(path, error)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        return Fault(Kind.ALTERED, path, ALTERED)
    return data


def check_other(storage: Storage, manifest: Manifest, path: str) -> bytes | Fault:
    """Compare a file that only the manifest speaks of, such as one beside somebody else's tars.

    It can be of any size, so it is not kept: returns b"" where all is well.
    """
    entry = manifest.files[path]
    try:
        info = storage.info(path)
        if info.size_bytes != entry.bytes:
            return size_fault(path, info.size_bytes, entry.bytes)
        body = ShardBytes(storage, info)
        body.drain()
    except StorageError as error:
        return storage_fault(path, error)
    if body.sha256.hexdigest() != entry.sha256:
        return Fault(Kind.ALTERED, path, ALTERED)
    return b""


def size_fault(path: str, found: int, listed: int) -> Fault:
    """Return the fault of a file that is longer or shorter than listed."""
    kind = Kind.TRUNCATED if found < listed else Kind.SIZE
    return Fault(kind, path, f"{found} bytes, the manifest says {listed}")


def storage_fault(path: str, error: StorageError) -> Fault:
    """Return the fault of a file that is not there, or cannot be read."""
    if isinstance(error.__cause__, NoPlainFileError):
        return Fault(Kind.MISSING, path, f"missing: its path {error.__cause__}")
    if isinstance(error.__cause__, FileNotFoundError):
        return Fault(Kind.MISSING, path, "missing")
    return Fault(Kind.UNREADABLE, path, f"unreadable ({error})")


def shared_files(manifest: Manifest, contents: dict[str, bytes]) -> Iterator[Fault]:
    """Compare what follows from the manifest with what is there."""
    classes = {CLASSES_PATH: classes_file(manifest.class_names)}
    wanted = {**classes, **companions.energon_files(manifest.splits)}
    for path, data in wanted.items():
        if path in contents and contents[path] != data:
            yield Fault(Kind.COMPANION, path, "disagrees with the manifest")


def parse_index(
    manifest: Manifest, name: str, data: bytes, num_classes: int
) -> tuple[pa.Table | None, list[Fault]]:
    """Return a split's index, None where it is none, and what is wrong with its sums."""
    path = index_path(name)
    try:
        table = read_index(data, path)
    except DatasetError as error:
        return None, [Fault(Kind.INDEX, path, str(error).removeprefix(f"{path} "))]
    return table, list(_index_sums(manifest, name, table, num_classes))


def _index_sums(
    manifest: Manifest, name: str, table: pa.Table, num_classes: int
) -> Iterator[Fault]:
    split, path = manifest.splits[name], index_path(name)

    def fault(message: str) -> Fault:
        return Fault(Kind.INDEX, path, message)

    if table.num_rows != split.num_clips:
        yield fault(f"{table.num_rows} rows, the manifest says {split.num_clips} clips")
    if split_fingerprint(table) != split.fingerprint:
        yield fault(OTHER_FINGERPRINT)
    rows = Counter(table["shard"].to_pylist())
    for shard in split.shards:
        if rows[shard.path] != shard.num_clips:
            yield fault(f"{rows[shard.path]} rows of {shard.path}, not {shard.num_clips}")
    for other in sorted(set(rows) - {shard.path for shard in split.shards}):
        yield fault(f"rows of {other}, which the split does not have")
    keys = table["key"].to_pylist()
    yield from (
        Fault(Kind.DUPLICATE_KEY, path, f"key {key} stands {count} times", key)
        for key, count in Counter(keys).items() if count > 1
    )  # fmt: skip
    for key, label in zip(keys, table["label"].to_pylist(), strict=True):
        if label >= num_classes:
            yield fault(f"{key} has label {label}, the manifest {num_classes} classes")


def ledger_faults(
    manifest: Manifest, name: str, data: bytes, keys: set[str] | None = None
) -> list[Fault]:
    """Compare a split's ledger with the counts in the manifest.

    Where they agree, its clips are compared with the `keys` of the index, if they are known.
    """
    path = ledger_path(name)
    try:
        ledger = read_ledger(data, path)
    except DatasetError as error:
        return [Fault(Kind.LEDGER, path, str(error).removeprefix(f"{path} "))]
    return list(_ledger_sums(manifest, name, ledger)) or list(_ledger_keys(path, ledger, keys))


def _ledger_sums(manifest: Manifest, name: str, ledger: pa.Table) -> Iterator[Fault]:
    path, split = ledger_path(name), manifest.splits[name]
    counted = Counter(ledger["status"].to_pylist())
    recorded = {status: count for status, count in split.outcomes.items() if count}
    if dict(counted) != recorded or ledger.num_rows != split.num_rows:
        text = f"counts {dict(counted)}, the manifest says {recorded}"
        yield Fault(Kind.LEDGER, path, text)
    if sum(split.outcomes.values()) != split.num_rows:
        text = f"{split.num_rows} rows, but the outcomes are {sum(split.outcomes.values())}"
        yield Fault(Kind.LEDGER, MANIFEST_PATH, f"split {name}: {text}")
    if counted["ok"] != split.num_clips:
        text = f"{counted['ok']} rows are ok, the manifest says {split.num_clips} clips"
        yield Fault(Kind.LEDGER, path, text)


def _ledger_keys(path: str, ledger: pa.Table, keys: set[str] | None) -> Iterator[Fault]:
    if keys is None:
        return
    ok: set[Any] = {
        key
        for key, status in zip(ledger["key"].to_pylist(), ledger["status"].to_pylist(), strict=True)
        if status == "ok"
    }
    for key in sorted(map(str, ok ^ keys))[:1]:
        where = "the index" if key in ok else "the ledger"
        yield Fault(Kind.LEDGER, path, f"its clips are not the index's: {where} lacks {key}", key)
