"""What a run leaves in its output directory; rank 0 writes, all ranks call."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from prep.errors import KprepError
from prep.storage import write_atomic
from prep.write_errors import write_error
from train.agreement import raising_together
from train.attempts import note_launch
from train.checkpoint import (
    ABANDONED_NAME,
    BEST_NAME,
    abandon_checkpoints,
    checkpoint_before,
    checkpoint_path,
    load_checkpoint,
    rotate_checkpoints,
    save_checkpoint,
)
from train.curves import open_curves
from train.distributed import broadcast_text
from train.evaluation_files import (
    SOURCE_NAME,
    abandon_evaluations,
    place_of_test,
    write_evaluation,
)
from train.progress import MetricsFile, log
from train.report_page import read_metrics, report_page

if TYPE_CHECKING:
    from pathlib import Path

    from train.accuracy import Accuracy
    from train.checkpoint import Checkpoint
    from train.curves import Curves
    from train.distributed import World
    from train.recipe import Recipe
    from train.scores import VideoScores

_PAGE_NAME = "report.html"


class RunOutput:
    """`checkpoints/`, `evaluation/`, metrics, curves, `recipe.toml`, `final.pt` of one run."""

    def __init__(self, directory: Path, world: World, recipe: Recipe) -> None:
        """Write nothing yet; `recipe` is the one that was given, for `recipe.toml`."""
        self._directory = directory
        self._checkpoints = directory / "checkpoints"
        self._world = world
        self._recipe = recipe
        self._metrics: MetricsFile | None = None
        self._curves: list[Curves] = []
        self._saved_at = time.monotonic()
        self._best: float | None = None
        self.place = ""
        """Path of the checkpoint that was written last, on all ranks; "" for none."""

    def open(self, step: int, epoch: int, *, in_epoch: bool) -> None:
        """Make the directory; put aside what an earlier attempt left beyond `step`.

        Its metrics are dropped, its checkpoints moved to `checkpoints/abandoned/`, `best.pt` among
        them, and its evaluations to `evaluation/abandoned/`. `in_epoch` says whether epoch number
        `epoch` has begun. Raises, on all ranks, UsageError where the directory cannot be written or
        curves are asked for that a package is missing for.
        """
        self._saved_at = time.monotonic()
        with raising_together(self._world):
            if self._world.is_first:
                self._open_on_first(step, epoch, step if in_epoch else None)

    def _open_on_first(self, step: int, epoch: int, step_in_epoch: int | None) -> None:
        self.close()
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            beyond = abandon_checkpoints(self._checkpoints, epoch, step_in_epoch)
            abandon_evaluations(self._directory / "evaluation", epoch)
            if beyond:
                names = ", ".join(path.name for path in beyond)
                log.info("beyond step %d, moved to checkpoints/%s: %s", step, ABANDONED_NAME, names)
            note_launch(self._directory)
            text = self._recipe.to_toml()
            (self._directory / "recipe.toml").write_text(text, encoding="utf-8")
            self._metrics = MetricsFile(self._directory / "metrics.jsonl", keep_until_step=step)
            self._best = self._score_of_best(self._metrics.video_top1)
            self._curves = open_curves(self._recipe, self._directory, self._metrics.entries)
        except OSError as error:
            place = error.filename or self._directory
            raise write_error(f"--output {place}", error) from error

    def write(self, kind: str, **values: Any) -> None:
        """Append a line to the metrics and the curves, on rank 0 of a run that was opened."""
        if self._metrics is not None:
            entry = self._metrics.write(kind, **values)
            for curves in self._curves:
                curves.add(entry)

    def close(self) -> None:
        """Finish the curves."""
        opened, self._curves = self._curves, []
        for curves in opened:
            curves.close()

    def is_evaluated(self, step: int) -> bool:
        """Return, on all ranks, whether the metrics hold an evaluation after `step` steps."""
        found = self._metrics is not None and step in self._metrics.video_top1
        return bool(broadcast_text(self._world, "yes" if found else ""))

    def is_best(self, video_top1: float) -> bool:
        """Return, on all ranks, whether an evaluation beats that of `best.pt`; it is the best then.

        Where there is no `best.pt`, as after going back to before it, any does.
        """
        is_best = self._best is None or video_top1 > self._best
        if is_best:
            self._best = video_top1
        return bool(broadcast_text(self._world, "yes" if is_best else ""))

    def _score_of_best(self, scores: dict[int, float]) -> float | None:
        """Return the video top-1 of `best.pt`; None without it, or where nothing was evaluated."""
        try:
            step = load_checkpoint(self._checkpoints / BEST_NAME, in_place=True).step
        except KprepError:
            return None
        # one that was written before its line in the metrics is better than all of those
        return scores.get(step, max(scores.values(), default=None))

    def is_checkpoint_late(self) -> bool:
        """Return whether `run.checkpoint_minutes` are over; rank 0's clock counts."""
        minutes = self._recipe.run.checkpoint_minutes
        if not minutes or not self._world.is_first:
            return False
        return time.monotonic() - self._saved_at >= 60 * minutes

    def save(self, checkpoint: Checkpoint, *, step: int | None) -> None:
        """Write a checkpoint and delete old ones; return when it is on disk, on all ranks.

        `step` is given in mid-epoch. Raises KprepError, on all ranks, when it cannot be written.
        """
        path = checkpoint_path(self._checkpoints, checkpoint.epoch, step)
        with raising_together(self._world):
            if self._world.is_first:
                save_checkpoint(path, checkpoint)
                rotate_checkpoints(self._checkpoints, self._recipe.run.keep_checkpoints)
        self._saved_at, self.place = time.monotonic(), str(path)

    def save_network(self, checkpoint: Checkpoint, *, best: bool) -> None:
        """Write the network alone: the best so far, or the final one.

        Raises KprepError, on all ranks, when it cannot be written.
        """
        path = self._checkpoints / BEST_NAME if best else self._directory / "final.pt"
        with raising_together(self._world):
            if self._world.is_first:
                save_checkpoint(path, checkpoint)

    def save_evaluation(
        self,
        name: str,
        accuracy: Accuracy,
        scores: VideoScores | None,
        class_names: list[str],
        *,
        step: int | None = None,
        extra: dict[str, str] | None = None,
    ) -> Path:
        """Write `evaluation/NAME/` and a page to look at; return the page's path, on all ranks.

        `extra` holds names and texts of further files of the directory.
        `scores` are rank 0's. In training `step` counts the steps that are complete, and the page
        is the run's `report.html`; else it stands in the directory, whose name gets a number where
        NAME holds the result of another source. Raises KprepError, on all ranks, when something
        cannot be written.
        """
        directory = asked = self._directory / "evaluation" / name
        alone = step is None
        with raising_together(self._world):
            try:
                if scores is not None:
                    if alone:
                        directory = place_of_test(asked, (extra or {}).get(SOURCE_NAME, ""))
                    lines = read_metrics(self._directory / "metrics.jsonl")
                    # the line of this evaluation is written last, so that a cut is made up for
                    lines += [] if alone else [{"kind": "eval", "step": step, **asdict(accuracy)}]
                    title = f"{self._recipe.name}: {directory.name}"
                    text = report_page(title, accuracy, scores, class_names, lines)
                    texts = {**(extra or {}), **({_PAGE_NAME: text} if alone else {})}
                    write_evaluation(directory, accuracy, scores, class_names, texts)
                    if not alone:
                        write_atomic(self._directory / _PAGE_NAME, text.encode())
            except OSError as error:
                raise KprepError(f"evaluation {directory} cannot be written: {error}") from error
        if directory != asked:  # on rank 0
            log.info("%s is kept: it is of other weights, clips or another protocol", asked)
        if not alone:
            return self._directory / _PAGE_NAME
        return asked.with_name(broadcast_text(self._world, directory.name)) / _PAGE_NAME

    def newest_before(self, step: int, steps_per_epoch: int) -> str:
        """Return, on all ranks, what `checkpoint_before` finds; "" where there is none."""
        first = self._world.is_first
        found = checkpoint_before(self._checkpoints, step, steps_per_epoch) if first else None
        return broadcast_text(self._world, str(found or ""))
