"""Runs `child.py`, in whichever Python has the contender, and ends it when it hangs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peers.task import Task

CHILD = Path(__file__).with_name("child.py")
REPOSITORY = CHILD.parent.parent.parent
_PACKAGES = {
    "kprep": "av",
    "webdataset": "webdataset",
    "mosaicml-streaming": "streaming",
    "litdata": "litdata",
    "megatron-energon": "megatron.energon",
}
CONTENDERS = tuple(_PACKAGES)
_FIND = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"


class ChildFailedError(Exception):
    """A process that ended with an error or was ended because it hung; says so in one sentence."""


@dataclass(frozen=True)
class Children:
    """Where contenders run: `pythons` by name, else this process's own; `scratch` for files."""

    scratch: Path
    timeout_seconds: float
    pythons: dict[str, str] = field(default_factory=dict)

    def python(self, contender: str) -> str:
        """Return the interpreter of a contender."""
        return self.pythons.get(contender, sys.executable)

    def has(self, contender: str) -> bool:
        """Whether the contender's package is installed where it would run."""
        command = [self.python(contender), "-c", _FIND, _PACKAGES[contender].partition(".")[0]]
        return subprocess.run(command, check=False).returncode == 0

    def prepare(self, contender: str, source: Path, folder: Path, copies: int) -> None:
        """Write a contender's own form of a dataset, however long it takes."""
        self._run(contender, "prepare", [contender, str(source), str(folder), str(copies)], None)

    def run(self, task: Task) -> dict[str, Any]:
        """Do a task; return what was found."""
        return self._run(task.contender, "run", [task.to_json()], self.timeout_seconds)

    def _run(
        self, contender: str, verb: str, arguments: list[str], timeout_seconds: float | None
    ) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            result, log = Path(folder, "result.json"), Path(folder, "log")
            with log.open("w") as sink:
                process = subprocess.Popen(
                    [self.python(contender), "-P", CHILD, str(time.time()), result, verb,
                     *arguments],
                    stdout=sink, stderr=sink, start_new_session=True, env=_environment(folder),
                )  # fmt: skip
                try:
                    code = process.wait(timeout_seconds)
                except subprocess.TimeoutExpired as error:
                    raise ChildFailedError(f"hung: {timeout_seconds:g} s") from error
                finally:
                    _end_session(process)
            if code or not result.exists():
                raise ChildFailedError(_last_line(log.read_text(errors="replace"), code))
            found: dict[str, Any] = json.loads(result.read_text())
            return found


def _environment(folder: str) -> dict[str, str]:
    """Return an environment in which nothing is kept from one run to the next."""
    own = {
        "TMPDIR": folder,
        "HOME": folder,
        "XDG_CACHE_HOME": folder,
        "PYTHONPATH": str(REPOSITORY),
    }  # workers are of this checkout, whatever is installed
    quiet = {"WDS_VERBOSE_CACHE": "0", "GOPEN_VERBOSE": "0", "PYTHONWARNINGS": "ignore"}
    return {**os.environ, **own, **quiet}


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(log: str, code: int) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return f"exit status {code}: {lines[-1][:300] if lines else 'it said nothing'}"
