"""What a run reports while it trains: log lines for people, `metrics.jsonl` for programs."""

from __future__ import annotations

import json
import logging
import time
from typing import TYPE_CHECKING, Any

from prep.errors import KprepError
from prep.storage import write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from stream.batch import ClipBatch

log = logging.getLogger("kprep.train")


class Meter:
    """Loss and throughput since the last report.

    Clips a second are end to end: the time covers everything from one report to the next, with the
    wait for data, the transforms and the optimiser.
    """

    def __init__(self, global_batch: int) -> None:
        """Start the clock."""
        self._global_batch = global_batch
        self._losses: list[float] = []
        self.start()

    def start(self) -> None:
        """Set the clock to now, after something that is not training."""
        self._started = time.perf_counter()
        self._steps = 0
        self._waited_seconds = 0.0

    def timed(self, batches: Iterable[ClipBatch]) -> Iterator[ClipBatch]:
        """Yield the batches and count the time that each one is waited for."""
        iterator = iter(batches)
        while True:
            before = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                self._waited_seconds += time.perf_counter() - before
            yield batch

    def add_step(self) -> None:
        """Count one optimiser step."""
        self._steps += 1

    def add_loss(self, loss: float) -> None:
        """Count the loss of a step, the mean over all ranks."""
        self._losses.append(loss)

    @property
    def has_losses(self) -> bool:
        """Whether there is a loss to report; they arrive up to two steps late."""
        return bool(self._losses)

    def report(self) -> dict[str, float]:
        """Return the mean loss, and the throughput since the last report; start anew."""
        seconds = max(time.perf_counter() - self._started, 1e-9)
        values = {
            "loss": sum(self._losses) / len(self._losses),
            "clips_per_second": self._steps * self._global_batch / seconds,
            "data_wait_share": self._waited_seconds / seconds,
            "seconds_per_step": seconds / max(self._steps, 1),
        }
        self._losses.clear()
        self.start()
        return values


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, written by rank 0."""

    def __init__(self, path: Path, *, keep_until_step: int) -> None:
        """Open the file; lines of an earlier attempt beyond `keep_until_step` are dropped."""
        self._path = path
        kept = b""
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            kept = b"".join(line for line in lines if _step_of(line) <= keep_until_step)
        self.entries = [json.loads(line) for line in kept.splitlines()]
        """The lines that were kept."""
        self.video_top1 = _video_top1(self.entries)
        """Video top-1 of each evaluation in the file, by the steps that were complete."""
        write_atomic(path, kept)

    def write(self, kind: str, **values: Any) -> dict[str, Any]:
        """Append one line, and return it; `kind` is "train", "eval" or "bad_clips"."""
        entry = {"kind": kind, "time": round(time.time(), 3), **values}
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise KprepError(f"{self._path} cannot be written: {error}") from error
        if kind == "eval":
            self.video_top1[values["step"]] = values["video_top1"]
        return entry


def _step_of(line: bytes) -> float:
    """Return the step of a metrics line; infinity for one that a crash cut off."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _video_top1(entries: list[dict[str, Any]]) -> dict[int, float]:
    return {entry["step"]: entry["video_top1"] for entry in entries if entry["kind"] == "eval"}
