"""What a store raises, as one error that names the object and says what to do."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from prep.errors import KprepError, MissingBucketError, ReplacedError, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def store_errors(where: str) -> Iterator[None]:
    """Turn whatever a store raises into one StorageError that names the object, `where`."""
    try:
        yield
    except KprepError:
        raise
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            raise MissingBucketError(
                f"{where} cannot be read: the bucket does not exist; "
                "check its name and the endpoint"
            ) from error
        raise StorageError(f"{where} does not exist") from error
    except OSError as error:
        what = error.strerror or str(error)
        raise StorageError(
            f"{where} cannot be read or written: {what}; mend that, then run the same command again"
        ) from error
    except Exception as error:  # obstore's errors have no common base of their own
        text = " ".join(str(error).split())
        if type(error).__name__ == "PreconditionError" or "recondition" in text:
            raise replaced(where) from error
        if "169.254.169.254" in text:  # where a cloud machine asks for its role
            text = (
                "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                "AWS_SKIP_SIGNATURE=true for a public bucket"
            )
        raise StorageError(f"{where} cannot be reached: {text[:300]}") from error


def replaced(where: str) -> ReplacedError:
    """Return the error for an object that is another version by now."""
    return ReplacedError(
        f"{where} was replaced while it was being read; restart on the new version"
    )
