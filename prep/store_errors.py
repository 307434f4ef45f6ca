"""What a store raises, as one error that names the object and says what to do."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING

from prep.errors import KprepError, MissingBucketError, ReplacedError, StorageError
from prep.local_files import NoPlainFileError

if TYPE_CHECKING:
    from collections.abc import Iterator

_LONGEST = 500  # characters of a server's answer that are quoted
# What obstore says of a local root that it cannot list
_LOCAL = re.compile(r"IO error for operation on (.+?): ([^:]+) \(os error \d+\)")


@contextlib.contextmanager
def store_errors(where: str) -> Iterator[None]:
    """Turn whatever a store raises into one StorageError that names the object, `where`."""
    try:
        yield
    except (KprepError, MemoryError):
        raise
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            raise MissingBucketError(
                f"{where} cannot be read: the bucket does not exist; "
                "check its name and the endpoint"
            ) from error
        what = str(error) if isinstance(error, NoPlainFileError) else "does not exist"
        raise StorageError(f"{where} {what}") from error
    except OSError as error:
        what = error.strerror or str(error)
        raise StorageError(
            f"{where} cannot be read or written: {what}; mend that, then run the same command again"
        ) from error
    except Exception as error:  # obstore's errors have no common base of their own
        if type(error).__name__ == "PreconditionError" or "recondition" in str(error):
            raise replaced(where) from error
        raise StorageError(f"{where} cannot be reached: {_reason(error, where)}") from error


@contextlib.contextmanager
def listed_file() -> Iterator[None]:
    """Say what to do where a file is not there, though the manifest lists it."""
    try:
        yield
    except StorageError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        text = f"{error}, though the manifest lists it; run `kprep verify`"
        raise StorageError(text) from error.__cause__


def _reason(error: Exception, where: str) -> str:
    """Return obstore's sentence, the cause that stands in its debug text only, and what to do."""
    text = " ".join(str(error).split())
    if "169.254.169.254" in text:  # where a cloud machine asks for its role
        needed, cloud = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY", "AWS"
        if where.startswith("gs://"):
            needed, cloud = "GOOGLE_APPLICATION_CREDENTIALS to the service account's file", "GOOGLE"
        return f"no credentials; set {needed}, or {cloud}_SKIP_SIGNATURE=true for a public bucket"
    if "RangeNotSupported" in text or "non-partial" in text:
        return "its server does not answer Range requests; serve the folder with one that does"
    if found := _LOCAL.search(text):
        return f"{found[1]}: {found[2]}; mend that, then run the same command again"
    sentence, _, debug = text.partition(" Debug source: ")
    sentence = sentence[:_LONGEST].rstrip(": ")
    if type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError"):
        return f"{sentence}; see that the credentials are right and allow it"
    if "redirect without LOCATION" in sentence:
        return f"{sentence}; set AWS_REGION to the bucket's"
    return sentence + _cause(debug)


def _cause(debug: str) -> str:
    """Return why a request got no answer, to stand behind obstore's sentence; "" where it did."""
    # `…reqwest::Error { … "tcp connect error", …, Os { …, message: "Connection refused", }, …`
    _, unanswered, debug = debug.rpartition("reqwest::Error")
    if "InvalidCertificate" in debug:
        return (
            ": its certificate is not valid, or by nobody who is trusted here; "
            "SSL_CERT_FILE names the file of an authority of your own"
        )
    causes = re.findall(r'"([^"]+)"', debug) or re.findall(r"\w+", debug)
    return f": {causes[-1]}" if unanswered and causes else ""


def is_forbidden(error: StorageError) -> bool:
    """Whether a store refused a request (403): the credentials are none, wrong, or do not allow it.

    Of a listing obstore says so in its text only.
    """
    cause = error.__cause__
    return type(cause).__name__ == "PermissionDeniedError" or "403 Forbidden" in str(cause)


def replaced(where: str) -> ReplacedError:
    """Return the error for an object that is another version by now."""
    return ReplacedError(
        f"{where} was replaced while it was being read; restart on the new version"
    )
