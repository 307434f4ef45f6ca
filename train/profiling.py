"""`--profile N`: a trace of some steps, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from prep.errors import KprepError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# The first steps allocate memory and choose algorithms: they are not what a run is like.
_WARM_UP_STEPS = 2


class StepProfiler:
    """Records `num_steps` steps after two of warm-up, once, and writes them to a file.

    Args:
        num_steps: to record; 0 records nothing.
        directory: that `trace-steps-A-B.json.gz` is written to.
        say: shows one line, a format string and its values.
    """

    def __init__(self, num_steps: int, directory: Path, say: Callable[..., None]) -> None:
        self._directory = directory
        self._say = say
        self._num_steps = num_steps
        self._first = self._last = 0
        self._recording: profile | None = None
        self._is_done = num_steps == 0

    def start(self, step: int) -> None:
        """Begin when `step` steps are complete, unless there is a trace already."""
        if self._is_done or self._recording is not None:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._first, self._last = step + _WARM_UP_STEPS + 1, step
        self._recording = profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=_WARM_UP_STEPS, active=self._num_steps, repeat=1),
            on_trace_ready=self._write,
            acc_events=True,
        )
        self._recording.start()

    def add_step(self, step: int) -> None:
        """Count one complete step."""
        if self._recording is None:
            return
        self._last = step
        self._recording.step()
        if self._is_done:
            self.stop()

    def stop(self) -> None:
        """End; a run that is over too early gives the steps that there were."""
        recording, self._recording = self._recording, None
        if recording is None:
            return
        recording.stop()
        if not self._is_done:
            self._say("no trace: the run ended before step %d", self._first)

    def _write(self, recording: profile) -> None:
        if self._is_done:
            return
        self._is_done = True
        path = self._directory / f"trace-steps-{self._first}-{self._last}.json.gz"
        try:
            recording.export_chrome_trace(str(path))
        except OSError as error:
            raise KprepError(f"trace {path} cannot be written: {error}") from error
        self._say("trace of steps %d to %d: %s", self._first, self._last, path)
        self._say("open it in ui.perfetto.dev or chrome://tracing")
