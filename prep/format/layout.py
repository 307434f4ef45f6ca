"""Where things stand below a dataset's root."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from prep.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

FORMAT_VERSION = 1
MAX_PIXELS = 8192 * 4320
"""Of a picture, of a source or a clip: a larger one is a mistake, or made to exhaust memory."""
MANIFEST_PATH = "manifest.json"
CARD_PATH = "README.md"
CLASSES_PATH = "classes.txt"
ENERGON_FOLDER = ".nv-meta"
LOCK_NAME = ".kprep-lock"
WORK_NAME = ".kprep-work"
COPY_MARKER_PATH = f"{WORK_NAME}/copy.json"
"""What an unfinished copy into a root is of; removed when the copy is whole."""
_SHARD_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=-]*(/[A-Za-z0-9_][A-Za-z0-9_.=-]*)*")


# What YAML 1.1 takes for a truth value or nothing, so that it cannot be a name without quotes
_YAML_WORDS = frozenset(("y", "n", "yes", "no", "on", "off", "true", "false", "null"))
_NOT_NEW = _YAML_WORDS | {"all"}  # Hugging Face's word for all splits together


def check_new_split_name(split: str) -> str:
    """Return `split` when every reader of the dataset can use it; UsageError otherwise."""
    if split in _NOT_NEW:
        raise UsageError(
            f"split name {split!r} means something else to YAML or to Hugging Face, whose readers "
            "could not load the dataset; choose another one"
        )
    return check_split_name(split)


def yaml_name(split: str) -> str:
    """Return a split's name as a value or key of YAML."""
    return f'"{split}"' if split in _YAML_WORDS else split


def check_split_name(split: str) -> str:
    """Return `split` when it is a name of the format; UsageError otherwise.

    Hugging Face wants a word, the tar names want ASCII; `index` and `ledger` are folders already.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", split) or split in ("index", "ledger"):
        raise UsageError(
            f"split name {split!r} must be 1 to 32 of a-z, 0-9 and '_', begin with a letter, "
            "and not be 'index' or 'ledger'"
        )
    return split


def is_reserved(path: str) -> bool:
    """Whether a path below a root is for work in progress and its locks: no file of a dataset."""
    return path == WORK_NAME or path.startswith((f"{WORK_NAME}/", LOCK_NAME))


def classes_file(names: Iterable[str]) -> bytes:
    """Return the contents of classes.txt."""
    return "".join(f"{name}\n" for name in names).encode()


def is_shard_path(path: str) -> bool:
    """Whether a path can be a shard's: it goes into YAML, JSON and globs that others interpret."""
    return path.endswith(".tar") and _SHARD_PATH.fullmatch(path) is not None


def shard_path(split: str, shard: int) -> str:
    """Return the path of a tar; `("train", 7)` is `train/train-000007.tar`."""
    return f"{split}/{split}-{shard:06d}.tar"


def index_path(split: str) -> str:
    """Return the path of a split's index."""
    return f"index/{split}.parquet"


def ledger_path(split: str) -> str:
    """Return the path of a split's ledger."""
    return f"ledger/{split}.parquet"
