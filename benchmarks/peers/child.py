"""One contender in a process of its own: `python child.py STARTED RESULT prepare|run ARGUMENTS`.

STARTED is the time.time() at which the process was started, RESULT the file for what was found,
as JSON. `prepare` takes contender, source, folder and copies; `run` takes a Task.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

BENCHMARKS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(BENCHMARKS.parent), str(BENCHMARKS)]

import torch  # noqa: E402, F401 - its import is no contender's
from peers.task import Task  # noqa: E402

from stream.bench_measure import cpu_seconds, own_processes, pss_bytes  # noqa: E402

if TYPE_CHECKING:
    from peers.task import Epochs

    from stream.batch import ClipBatch

MODULES = {
    "kprep": "kprep_loader",
    "webdataset": "webdataset_loader",
    "mosaicml-streaming": "mosaicml_loader",
    "litdata": "litdata_loader",
    "megatron-energon": "energon_loader",
}
_SETTLE_SECONDS = 0.3
_LONGEST_EPOCH = 4


def measure(task: Task, open_epochs: Any) -> dict[str, Any]:
    """Open the loader, time its first batch, then its throughput, then a new epoch."""
    begun = time.perf_counter()
    epochs: Epochs = open_epochs(task)
    batches = epochs(0)
    batch = next(batches)
    first = time.perf_counter() - begun
    found = {"first_batch_seconds": first, "pictures": pictures(batch)}
    for _ in range(task.workers * task.prefetch + 1):  # what was made while nobody waited
        next(batches)
    memory = pss_bytes(own_processes())
    found |= throughput(task, epochs, batches)
    time.sleep(_SETTLE_SECONDS)  # the queues fill
    found["memory_bytes"] = max(memory, pss_bytes(own_processes()))
    begun = time.perf_counter()
    next(epochs(99))
    found["warm_first_batch_seconds"] = time.perf_counter() - begun
    return found


def throughput(task: Task, epochs: Epochs, batches: Any) -> dict[str, Any]:
    """Take batches for `task.seconds`; of a bucket to the end of the first epoch.

    A loader that downloads whole shards does so in bursts, which an epoch contains; later epochs of
    one that keeps them read no bucket. Where the epoch takes four times as long, it is cut.
    """
    from_bucket = task.place in ("near", "far")
    limit = task.seconds * (_LONGEST_EPOCH if from_bucket else 1)
    clips = epoch = 0
    begun_with = own_processes()
    cpu, begun = cpu_seconds(begun_with, ended=True), time.perf_counter()
    while (wall := time.perf_counter() - begun) < limit:
        batch = next(batches, None)
        if batch is None and from_bucket:
            break
        if batch is None:
            epoch += 1
            batches = epochs(epoch)
        else:
            clips += len(batch)
    spent = cpu_seconds(begun_with | own_processes(), ended=True) - cpu
    if not clips:
        raise SystemExit("the epoch ended before anything was measured: more --copies")
    return {"clips_per_second": clips / wall, "cpu_ms_per_clip": spent * 1000 / clips}


def pictures(batch: ClipBatch) -> list[list[Any]]:
    """Return key, start and crc32 of the frames of each clip, to be compared with the truth."""
    found = []
    for video, (height, width), key, start in zip(
        batch.video, batch.size.tolist(), batch.key, batch.start_frame.tolist(), strict=True
    ):
        frames = video[:, : height * width * 3 // 2].contiguous()
        found.append([key, start, zlib.crc32(frames.numpy())])
    return found


def count(task: Task, open_epochs: Any) -> dict[str, Any]:
    """Go through one epoch without decoding; return how often each key came."""
    keys: Counter[str] = Counter()
    for batch in open_epochs(task)(0):
        keys.update(batch)
    return {"keys": keys}


def main() -> None:
    started, result, verb, *arguments = sys.argv[1:]
    with contextlib.redirect_stdout(sys.stderr):  # some of them talk
        if verb == "prepare":
            contender, source, folder, copies = arguments
            module = importlib.import_module(f"peers.{MODULES[contender]}")
            module.prepare(Path(source), Path(folder), int(copies))
            found: dict[str, Any] = {}
        else:
            task = Task.of(arguments[0])
            module = importlib.import_module(f"peers.{MODULES[task.contender]}")
            imports = time.time() - float(started)
            run = measure if task.decodes else count
            found = {"imports_seconds": imports, **run(task, module.open_epochs)}
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
