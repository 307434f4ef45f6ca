"""How a source is asked: rate, patience and the circuit breaker; no network in here."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prep.errors import UsageError
from prep.fetch_errors import StoppedError
from prep.outcome import Reason

if TYPE_CHECKING:
    from collections.abc import Callable

_SLICE_SECONDS = 0.5  # a pause of minutes must notice `stop` soon


@dataclass(frozen=True)
class Politeness:
    """How a source is asked: how often, how patiently, and when to leave it alone.

    `read_seconds` without a byte are a stall. `attempts` are those of one request, and also the
    breaks of one body between which less than 64 KiB arrived. Pauses double from
    `first_pause_seconds` up to `longest_pause_seconds`, which also caps Retry-After.
    `circuit_failures` failed attempts in a row open the circuit for `circuit_seconds`.
    """

    user_agent: str = "kprep (Kinetics converter)"
    requests_per_second: float = 10.0
    attempts: int = 8
    first_pause_seconds: float = 1.0
    longest_pause_seconds: float = 120.0
    connect_seconds: float = 10.0
    read_seconds: float = 60.0
    circuit_failures: int = 8
    circuit_seconds: float = 300.0

    def __post_init__(self) -> None:
        """Refuse values with which nothing could ever be fetched."""
        for name in ("requests_per_second", "attempts", "read_seconds", "circuit_failures"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} ({getattr(self, name)}) must be positive")


@dataclass(frozen=True)
class Timing:
    """The clocks and the chance that a client uses; tests bring their own."""

    monotonic: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    random: Callable[[], float] = random.random


class Turns:
    """The turns of those who ask one source, and their pauses, which `stop` ends."""

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._next = timing.monotonic()
        self._lock = threading.Lock()
        self.stopped = False

    def stop(self) -> None:
        """Make every pause end soon with StoppedError; safe in a signal handler."""
        self.stopped = True

    def check_stopped(self) -> None:
        """Raise StoppedError after `stop`."""
        if self.stopped:
            raise StoppedError(Reason.NETWORK, "the run is being stopped")

    def pause(self, seconds: float) -> None:
        """Sleep in slices, so that `stop` ends it."""
        while seconds > 0:
            self.check_stopped()
            self._timing.sleep(min(seconds, _SLICE_SECONDS))
            seconds -= _SLICE_SECONDS
        self.check_stopped()

    def wait(self, interval_seconds: float) -> None:
        """Return when it is the caller's turn; the next one's is `interval_seconds` later."""
        with self._lock:
            now = self._timing.monotonic()
            turn = max(now, self._next)
            self._next = turn + interval_seconds
        self.pause(turn - now)


class CircuitBreaker:
    """Counts failures in a row. Open: no request. After a pause one trial decides."""

    def __init__(self, failures: int, seconds: float, clock: Callable[[], float]) -> None:
        self._limit = failures
        self._seconds = seconds
        self._clock = clock
        self._failures = 0
        self._open_until = 0.0
        self._lock = threading.Lock()

    @property
    def seconds_left(self) -> float:
        """How long no request will be made."""
        if self._failures < self._limit:
            return 0.0
        return max(0.0, self._open_until - self._clock())

    def admit(self) -> bool:
        """Whether a request may be made; the first one after the pause is the trial."""
        with self._lock:
            if self.seconds_left > 0:
                return False
            self._open_until = self._clock() + self._seconds
            return True

    def succeeded(self) -> None:
        """Close the circuit."""
        with self._lock:
            self._failures = 0

    def failed(self) -> bool:
        """Book a failure; return whether the circuit is open now."""
        with self._lock:
            self._failures += 1
            self._open_until = self._clock() + self._seconds
            return self._failures >= self._limit
