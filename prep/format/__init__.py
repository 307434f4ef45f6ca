"""The dataset format, version 1, as `docs/format.md` specifies it.

What reads and writes an index is imported when it is first asked for: pyarrow takes longer to
import than the encoding of a clip lets an idle core wait.
"""

from typing import TYPE_CHECKING

from prep.exact_numbers import exact_number
from prep.format.clip_record import ClipRecord
from prep.format.containers import CONTAINER_OPTIONS, open_media
from prep.format.foreign import foreign_settings
from prep.format.layout import (
    FORMAT_VERSION,
    check_new_split_name,
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

if TYPE_CHECKING:
    from prep.format.index import (
        index_schema,
        index_table,
        iter_records,
        read_index,
        write_index,
    )

__all__ = [
    "CONTAINER_OPTIONS",
    "FORMAT_VERSION",
    "ClipRecord",
    "FileEntry",
    "Manifest",
    "Shard",
    "Sidecar",
    "Split",
    "check_new_split_name",
    "check_split_name",
    "exact_number",
    "foreign_settings",
    "index_path",
    "index_schema",
    "index_table",
    "is_shard_path",
    "iter_records",
    "ledger_path",
    "open_media",
    "read_index",
    "read_manifest",
    "shard_path",
    "split_fingerprint",
    "write_index",
]

_OF_INDEX = ("index_schema", "index_table", "iter_records", "read_index", "write_index")


def __getattr__(name: str) -> object:
    if name not in _OF_INDEX:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from prep.format import index

    return getattr(index, name)
