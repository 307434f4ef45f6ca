"""Progress of a copy: bytes, bandwidth and the time that is left."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import click

from prep.text.quantities import duration, size_text

if TYPE_CHECKING:
    from collections.abc import Callable

_PLAIN_SECONDS = 10.0


class ByteProgress:
    """Counts bytes from many threads: a bar in a terminal, a plain line now and then elsewhere."""

    def __init__(
        self, what: str, total: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total = total
        self.done = 0
        self._what = what
        self._clock = clock
        self._begun = clock()
        self._shown = self._begun
        self._lock = threading.Lock()
        self._bar: Any = None
        if sys.stderr.isatty():
            self._bar, self._task = _bar(what, total)
            self._bar.start()

    def add(self, count: int) -> None:
        """Book bytes that were moved; a negative count takes some back that must go again."""
        with self._lock:
            self.done += count
            if self._bar is not None:
                self._bar.update(self._task, completed=self.done, note=self._note())
            elif self._clock() - self._shown >= _PLAIN_SECONDS:
                self._shown = self._clock()
                click.echo(self.line(), err=True)

    def skip(self, count: int) -> None:
        """Take bytes off the total that need not be moved."""
        with self._lock:
            self.total -= count
            if self._bar is not None:
                self._bar.update(self._task, total=self.total, note=self._note())

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return max(self._clock() - self._begun, 1e-9)

    def line(self) -> str:
        """Return the state as one plain line."""
        return f"{self._what} {size_text(self.done)} of {size_text(self.total)}, {self._note()}"

    def _note(self) -> str:
        rate = self.done / self.seconds
        left = duration((self.total - self.done) / rate) if rate > 0 else "--:--"
        return f"{size_text(rate)}/s, {left} left"

    def close(self) -> None:
        """End the bar, or leave a last line; nothing is left where nothing was counted."""
        if self._bar is not None:
            self._bar.live.transient = not self.done
            self._bar.stop()
        elif self.done:
            click.echo(self.line(), err=True)


def _bar(what: str, total: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    bar = Progress(
        TextColumn(what),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )
    return bar, bar.add_task("", total=total, note="starting")
