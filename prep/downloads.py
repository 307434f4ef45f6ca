"""Reads that go on: how far one came, whether to try again, and how long to wait before that."""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401 - before the registration below
import logging
import random
import re
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from prep.errors import ReplacedError, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable

_FINAL = ("FileNotFoundError", "PermissionDeniedError", "UnauthenticatedError")
_DOUBTFUL_TRIES = 3  # of errors that should be final, but a broken answer can cause too
_MOST_GROWTHS = 64  # far beyond any limit of a wait, and far within what a float holds

_log = logging.getLogger("kprep.storage")


def growing_wait(first: float, longest: float, failures: int, factor: float = 2.0) -> float:
    """Return the seconds to wait after the n-th failure: `first`, times `factor` for each further.

    Never more than `longest`, and for any number of failures: hours of them are no error.
    """
    return min(longest, first * factor ** min(failures - 1, _MOST_GROWTHS))


@dataclass(frozen=True)
class RetryPolicy:
    """How long reads go on against a store that fails, and how long they wait in between.

    patience_seconds      since the last byte that arrived; then the error is raised
    first_wait_seconds    the wait before the second try, at most; doubled for each further one
    longest_wait_seconds  the limit of that doubling
    sleep, clock, draw    replaced by tests: seconds to wait, seconds now, uniform in [0, 1);
                          without `sleep`, `stop_waiting` ends a wait
    """

    patience_seconds: float = 60.0
    first_wait_seconds: float = 0.1
    longest_wait_seconds: float = 5.0
    sleep: Callable[[float], object] | None = None
    clock: Callable[[], float] = time.monotonic
    draw: Callable[[], float] = random.random

    def wait_seconds(self, failures: int) -> float:
        """Return the wait after so many failures in a row, drawn from the upper half of its limit.

        Many readers that fail together must not come back together.
        """
        limit = growing_wait(self.first_wait_seconds, self.longest_wait_seconds, failures)
        return limit * (0.5 + self.draw() / 2)


@dataclass
class Download:
    """Bytes `[start, end)` of an object, filled front to back; `end` None is the object's end.

    An object that is asked for whole has `most` bytes at the most.
    """

    path: str
    start: int = 0
    end: int | None = None
    etag: str | None = None
    most: int = 0
    body: bytearray = field(default_factory=bytearray)
    received: int = 0

    @property
    def complete(self) -> bool:
        return self.end is not None and self.received == self.end - self.start

    def options(self) -> dict[str, Any]:
        """Return what to ask for: the rest, of the version that the first part is of."""
        # a weak ETag never satisfies If-Match (RFC 9110, 13.1.1); the answer's own is compared
        strong = self.etag is not None and not self.etag.startswith("W/")
        found: dict[str, Any] = {"if_match": self.etag} if strong else {}
        if self.end is not None:
            found["range"] = (self.start + self.received, self.end)
        return found

    def begin(self, size: int, etag: str | None) -> None:
        """Take size and version from the first answer where they were not given."""
        self.etag = self.etag or etag
        if self.end is None:
            self.end = size
        if not self.body:
            self.body = bytearray(self.end - self.start)

    def add(self, chunk: memoryview) -> None:
        """Append what arrived."""
        after = self.received + len(chunk)
        if after > len(self.body):
            raise OSError("the answer is longer than what was asked for")
        self.body[self.received : after] = chunk
        self.received = after


def seconds_of(duration: str | timedelta) -> float:
    """Return the seconds of a duration as stores' clients take it: "1m 30s", "400ms"; else 0."""
    if isinstance(duration, timedelta):
        return duration.total_seconds()
    units = {
        **dict.fromkeys(("ms", "msec", "millis"), 0.001),
        **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1.0),
        **dict.fromkeys(("m", "min", "mins", "minute", "minutes"), 60.0),
        **dict.fromkeys(("h", "hr", "hour", "hours"), 3600.0),
    }
    parts = re.findall(r"(\d+)\s*([a-z]+)", duration)
    return sum(int(number) * units.get(unit, 0.0) for number, unit in parts)


_stop = threading.Event()


def stop_waiting() -> None:
    """Make every read of this process that has begun fail at its next error instead of waiting.

    For Ctrl-C and errors that end a run: the interpreter does not end before its threads do.
    """
    global _stop  # noqa: PLW0603 - reads that begin later wait for another one
    _stop.set()
    _stop = threading.Event()


# Called when the interpreter ends, before concurrent.futures (imported above) joins its threads
_at_exit = vars(threading).get("_register_atexit")
if _at_exit is not None:
    _at_exit(stop_waiting)


class Tries:
    """Decides, after each failure of one read, whether to wait and try again or to give up."""

    def __init__(self, policy: RetryPolicy, what: str) -> None:
        self.policy, self.what = policy, what
        self.since = policy.clock()
        self.failures = 0
        self.stopped = _stop

    def progress(self) -> None:
        """Bytes arrived: the patience begins anew."""
        self.since, self.failures = self.policy.clock(), 0

    def after(self, error: StorageError) -> None:
        """Wait before the next try, or raise `error`, which is final or has come too often."""
        self.failures += 1
        tries = _tries_worth(error)
        if self.stopped.is_set() or (tries is not None and self.failures >= tries):
            raise error
        waited = self.policy.clock() - self.since
        if waited >= self.policy.patience_seconds:
            raise StorageError(
                f"{error} (given up after {waited:.0f} s and {self.failures} tries)"
            ) from error
        if self.failures in (5, 10) or self.failures % 20 == 0:
            _log.warning("waiting for %s since %.0f s: %s", self.what, waited, error)
        (self.policy.sleep or self.stopped.wait)(self.policy.wait_seconds(self.failures))


class ShortAnswerError(StorageError):
    """An answer ended properly, but before the bytes that were asked for."""


def _tries_worth(error: StorageError) -> int | None:
    """Return after how many failures in a row this error is final; None: patience decides."""
    cause = error.__cause__
    text, kind = str(cause), type(cause).__name__
    status = re.search(r"status code: (\d{3})", text)
    if isinstance(error, ShortAnswerError):
        return None
    if isinstance(error, ReplacedError) or cause is None or kind in _FINAL:
        return 1
    # the service that hands out credentials; an answer of another form; another region's bucket
    doubtful = (
        "169.254.169.254", "non-partial", "TooManyRedirects", "redirect without LOCATION",
        "InvalidCertificate", "status code: 501",
    )  # fmt: skip
    if kind != "GenericError" or any(words in text for words in doubtful):
        return _DOUBTFUL_TRIES
    if status and not (status[1] >= "500" or status[1] in ("408", "429")):
        return 1
    return None
