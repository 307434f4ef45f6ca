"""The bar at the bottom of a terminal while a run trains."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from train.progress import log

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.progress import Task, TaskID
    from rich.text import Text

    from stream.batch import ClipBatch


def wants_bar() -> bool:
    """Return whether there is a terminal to draw on, and somebody who asked to see the run."""
    return sys.stdout.isatty() and log.isEnabledFor(logging.INFO)


class _News(TextColumn):
    """The values of the newest report: what gives way, at its end, where the line is too short."""

    def __init__(self) -> None:
        super().__init__("{task.fields[news]}", table_column=Column())

    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


class ProgressBar:
    """Shows steps, loss, clips/s, the share of waiting, and the time that is left.

    Lines that are written to `sys.stdout` meanwhile appear above it.
    """

    def __init__(self) -> None:
        """Draw nothing yet."""
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            _News(),
            TextColumn("left"),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            refresh_per_second=4,
            transient=True,
        )
        self._training: TaskID | None = None

    def start(self, num_steps: int, step: int) -> None:
        """Draw the bar: `step` of `num_steps` steps are complete."""
        self._training = self._progress.add_task("", total=num_steps, completed=step, news="")
        self._progress.start()

    def show_step(self, step: int, epoch: str) -> None:
        """Move to `step` complete steps."""
        if self._training is not None:
            self._progress.update(self._training, completed=step, description=epoch)

    def show_news(self, news: str) -> None:
        """Show the values of the newest report."""
        if self._training is not None:
            self._progress.update(self._training, news=news)

    def count_scored(self, batches: Iterable[ClipBatch], num_batches: int) -> Iterator[ClipBatch]:
        """Yield the `num_batches` batches of an evaluation, with a line that counts them."""
        task = self._progress.add_task("evaluating", total=num_batches, news="batches")
        try:
            for batch in batches:
                yield batch
                self._progress.advance(task)
        finally:
            self._progress.remove_task(task)

    def stop(self) -> None:
        """Take the bar away and leave the terminal as it was."""
        self._progress.stop()
