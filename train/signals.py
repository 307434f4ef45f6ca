"""Signals that ask a run to end: noted when they come, acted upon between two steps."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self, TypeVar

from prep.errors import KprepError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

T = TypeVar("T")

EX_TEMPFAIL = 75
"""Exit code of a run that was asked to end and can go on (sysexits.h: try again later)."""
EXIT_CODES = {signal.SIGTERM: EX_TEMPFAIL, signal.SIGUSR1: EX_TEMPFAIL, signal.SIGINT: 130}

# A terminal sends Ctrl-C to every process, and the launcher of `--nproc` passes it on: what comes
# this soon after the first is its echo, not a second request.
_ECHO_SECONDS = 1.0


class InterruptedBySignalError(KprepError):
    """The run ended because a signal asked for it; it can be resumed."""

    def __init__(self, number: int, message: str) -> None:
        """Take the exit code of the signal's kind."""
        super().__init__(message)
        self.number = number
        self.exit_code = EXIT_CODES.get(signal.Signals(number), EX_TEMPFAIL)


class _EndNow(BaseException):
    """Raised by the handler where nothing needs to be saved; no `except Exception` holds it up."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.exit_code = EXIT_CODES[signal.Signals(number)]


_unanswered: list[int] = []
"""Signals that were raised as `_EndNow`, and that have not ended the run yet.

Some code goes on after any exception, as pyarrow does in the modules that it tries to import.
"""


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Within the block SIGTERM and SIGUSR1 raise InterruptedBySignalError, for its exit code.

    For what comes before and after the steps of a run, where the last checkpoint is all there is
    to go on from. `SignalWatch` takes over while it is entered, also for a signal whose exception
    got lost before; the end of the block takes what is left. Outside of the main thread nothing
    changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: FrameType | None) -> None:
        _unanswered.append(number)
        raise _EndNow(number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGUSR1)}
    number = 0
    cause: Exception | None = None
    try:
        yield
    except _EndNow as caught:
        number = caught.number
    except InterruptedBySignalError:
        raise
    except Exception as caught:
        if not _unanswered:
            raise
        cause = caught  # the signal's doing, as in SignalWatch.wait_for
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        lost = _first_unanswered()
    number = number or lost
    if number:
        name = signal.Signals(number).name
        raise InterruptedBySignalError(
            number, f"stopped by {name} before training began, or after it"
        ) from cause


def _first_unanswered() -> int:
    """Return the first signal whose exception got lost, which is answered now; 0 for none."""
    number = _unanswered[0] if _unanswered else 0
    _unanswered.clear()
    return number


def ignore_further() -> None:
    """Ignore SIGTERM and SIGUSR1 from here on, where this process is about to end from one.

    A scheduler may send another: it must not take the first one's exit code away.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)


class _WakeUp(Exception):  # noqa: N818 - control flow, seen by nobody outside of this module
    """Raised by the handler to leave a wait."""


class SignalWatch:
    """While entered, SIGTERM, SIGUSR1 and Ctrl-C only set `received`.

    A second Ctrl-C ends the process at once. Outside of the main thread, where Python allows no
    handlers, nothing is watched.
    """

    def __init__(self) -> None:
        """Watch nothing yet."""
        self.received = 0
        """Number of the first signal that came; 0 for none."""
        self._received_at = 0.0
        self._waiting = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        """Install the handlers; a signal that `ending_at_once` could not act upon has come."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in EXIT_CODES}
            for number in EXIT_CODES:
                signal.signal(number, self._note)
            self.received = self.received or _first_unanswered()
        return self

    def __exit__(self, *_: object) -> None:
        """Put the former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def wait_for(self, work: Callable[[], T]) -> T | None:
        """Return what `work` returns, or None as soon as a signal comes, or has come before.

        For waits that a signal must be able to end, such as the one for a batch. An error that
        `work` raises after a signal (a terminal's Ctrl-C reaches the loader's workers too) is
        the signal's doing and left out.
        """
        if self.received:
            return None
        self._waiting = True
        try:
            # a handler can run between any two lines: asked again now that it would wake us up
            return None if self._has_received() else work()
        except _WakeUp:
            return None
        except Exception:
            if self._has_received():
                return None
            raise
        finally:
            self._waiting = False

    def _has_received(self) -> bool:
        return bool(self.received)

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.received:
            if number == signal.SIGINT and now - self._received_at > _ECHO_SECONDS:
                raise KeyboardInterrupt
            return
        self.received, self._received_at = number, now
        if self._waiting:
            raise _WakeUp
