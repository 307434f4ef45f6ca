"""Ctrl-C and SIGTERM in the hands of whoever can end in good order."""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextlib.contextmanager
def handling(handler: Callable[[int], None]) -> Iterator[None]:
    """Call `handler` with the number of each SIGINT and SIGTERM that comes in the block.

    In another thread than the main one nothing is handled: the caller's signals are not ours.
    """

    def handle(number: int, _: object) -> None:
        handler(number)

    try:
        previous = {
            number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)
        }
    except ValueError:
        previous = {}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
