"""A split's index and ledger as Arrow tables, checked against the manifest before a row is used."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from prep.errors import DatasetError
from prep.format import index_path, ledger_path, read_index
from prep.ledger import read_ledger
from prep.store_errors import listed_file

if TYPE_CHECKING:
    import pyarrow as pa

    from prep.format import Manifest
    from prep.storage import Storage


def open_index(storage: Storage, manifest: Manifest, split: str) -> pa.Table:
    """Return the rows of a split's index; DatasetError when they are not the manifest's."""
    path = index_path(split)
    data = _checked(storage, manifest, path)
    return read_index(data, storage.where(path), manifest.splits[split].num_clips)


def open_ledger(storage: Storage, manifest: Manifest, split: str) -> pa.Table:
    """Return the rows of a split's ledger; DatasetError when they are not the manifest's."""
    path = ledger_path(split)
    data = _checked(storage, manifest, path)
    return read_ledger(data, storage.where(path), manifest.splits[split].num_rows)


def _checked(storage: Storage, manifest: Manifest, path: str) -> bytes:
    entry = manifest.files.get(path)
    data = b""
    if entry is not None:
        with listed_file():
            data = storage.read(path, entry.bytes)
    if entry is None or hashlib.sha256(data).hexdigest() != entry.sha256:
        raise DatasetError(
            f"{storage.where(path)} is not the file that the manifest lists; run `kprep verify`"
        )
    return data
