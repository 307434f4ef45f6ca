"""Progress of a conversion: a bar in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from prep.text.quantities import duration

if TYPE_CHECKING:
    from collections.abc import Callable

_PLAIN_SECONDS = 10.0


class Progress:
    """Counts finished rows and shows count, rate, failures and the time that is left.

    `done` and `failed` are of the runs before: rows that are finished, and those of them that
    failed.
    """

    def __init__(
        self,
        total: int,
        *,
        done: int = 0,
        failed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self.done = done
        self.failed = failed
        self._clock = clock
        self._begun = clock()
        self._done_before = done
        self._shown = self._begun
        self._bar: Any = None
        if sys.stderr.isatty():
            self._bar, self._task = _bar(total, done)
            self._bar.start()

    def advance(self, *, failed: bool) -> None:
        """Book one finished row."""
        self.done += 1
        self.failed += failed
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=self._note())
        elif self._clock() - self._shown >= _PLAIN_SECONDS:
            self._shown = self._clock()
            click.echo(self.line(), err=True)

    def retreat(self) -> None:
        """Take one finished row back: its clip has to be made again."""
        self.done -= 1

    def line(self) -> str:
        """Return the state as one plain line."""
        return f"{self.done}/{self.total} clips, {self._note()}"

    def _note(self) -> str:
        elapsed = max(self._clock() - self._begun, 1e-9)
        rate = (self.done - self._done_before) / elapsed
        left = duration((self.total - self.done) / rate) if rate > 0 else "--:--"
        return f"{rate:.1f} clips/s, {self.failed} failed, {left} left"

    def close(self) -> None:
        """Take the bar off the screen and leave the last line."""
        if self._bar is not None:
            self._bar.stop()
        else:
            click.echo(self.line(), err=True)


def _bar(total: int, done: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as RichProgress

    bar = RichProgress(
        TextColumn("encoding"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )
    return bar, bar.add_task("", total=total, completed=done, note="starting")
