"""The errors that kprep raises on purpose.

    KprepError                 exit 1: something failed; the message is one clear sentence
    ├── UsageError             exit 2: what was asked for cannot be done
    ├── DatasetError           a dataset is not what its manifest, index or format says
    │   └── BadClipError       one clip's bytes fail their checksum or do not decode
    └── StorageError           a file or object cannot be read or written
        ├── ReplacedError      an object changed while it was being read
        └── MissingBucketError the bucket itself does not exist

Messages say what is wrong, where, and what to do. Users never see a traceback for them.
"""

from __future__ import annotations

import json


class KprepError(Exception):
    """The root of every error that kprep raises on purpose."""

    exit_code = 1


class UsageError(KprepError):
    """The command, option or argument cannot be carried out as given."""

    exit_code = 2


class DatasetError(KprepError):
    """A dataset on disk or in a bucket is damaged or not of the format."""


class BadClipError(DatasetError):
    """The stored bytes of one clip fail their checksum or do not decode."""


class StorageError(KprepError):
    """A file or object cannot be read or written."""


class ReplacedError(StorageError):
    """An object is no longer the one that was pinned when reading began."""


class MissingBucketError(StorageError):
    """There is no bucket of that name at that endpoint."""


def error_to_text(error: KprepError) -> str:
    """Return an error as text for another process: its kind, its sentence and its exit code."""
    return json.dumps([type(error).__name__, str(error), error.exit_code])


def error_from_text(text: str) -> KprepError:
    """Return the error that `error_to_text` was given.

    Of a kind that is not of this module it is a KprepError, with the same sentence and exit code.
    """
    kind, message, exit_code = json.loads(text)
    found = globals().get(kind, KprepError)
    error: KprepError = found(message)
    error.exit_code = exit_code
    return error
