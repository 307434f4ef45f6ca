"""A worker process: JSON lines of jobs on standard input, JSON lines of results on standard output.

Started as `python -P -m prep.worker TASK` by prep.worker_pool. It ends with its parent, also when
that is killed, so that no left-over writes into the next run's work.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import traceback
from typing import Any

from prep.errors import KprepError, error_to_text

TASKS = {
    "encode": "prep.encode",
    "assemble": "prep.assemble",
    "remix": "prep.remix",
    "verify_shard": "prep.verify_shard",
    "describe_shard": "prep.describe_shard",
    "draw_clip": "prep.draw_clip",
}


def main(task: str) -> None:
    """Serve jobs of one task until the input ends.

    No task needs torch, whose import takes seconds: webdataset, which tries, is told it is missing.
    """
    # Results have a descriptor of their own, so that no library's print can break the protocol. It
    # closes with the process: one that was closed sooner is taken for an end, and the way is lost.
    results = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8", closefd=False)
    os.dup2(2, 1)
    _die_with_parent()
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    module = importlib.import_module(TASKS[task])
    function: Any = getattr(module, task)
    if "av" in sys.modules:  # the tasks that look at videos
        import av

        av.logging.set_level(av.logging.PANIC)
    getattr(module, "get_ready", _nothing)()
    results.write('{"ready": true}\n')
    for line in sys.stdin:
        try:
            result = function(json.loads(line))
        except KprepError as error:  # its message is for the user, where it came from is not
            result = {"raised": error_to_text(error)}
        except Exception:  # noqa: BLE001 - whatever it is, it must reach the parent as a result
            result = {"error": traceback.format_exc()}
        results.write(json.dumps(result) + "\n")


def _nothing() -> None:
    """Be ready: most tasks have imported all that they need."""


def _die_with_parent() -> None:
    """Ask Linux for SIGKILL when the parent dies; elsewhere the end of the input ends us."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
