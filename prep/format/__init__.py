"""The dataset format, version 1, as `docs/format.md` specifies it."""

from prep.format.clip_record import ClipRecord
from prep.format.containers import CONTAINER_OPTIONS
from prep.format.foreign import foreign_settings
from prep.format.index import index_schema, index_table, iter_records, read_index, write_index
from prep.format.layout import (
    FORMAT_VERSION,
    check_split_name,
    index_path,
    is_shard_path,
    ledger_path,
    shard_path,
)
from prep.format.manifest import (
    FileEntry,
    Manifest,
    Shard,
    Split,
    read_manifest,
    split_fingerprint,
)
from prep.format.sidecar import Sidecar

__all__ = [
    "CONTAINER_OPTIONS",
    "FORMAT_VERSION",
    "ClipRecord",
    "FileEntry",
    "Manifest",
    "Shard",
    "Sidecar",
    "Split",
    "check_split_name",
    "foreign_settings",
    "index_path",
    "index_schema",
    "index_table",
    "is_shard_path",
    "iter_records",
    "ledger_path",
    "read_index",
    "read_manifest",
    "shard_path",
    "split_fingerprint",
    "write_index",
]
