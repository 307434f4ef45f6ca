"""Time to the first batch of a large dataset: 240,000 clips in 60 shards, local and from S3.

    python benchmarks/first_batch.py ROOT [--clips 240000] [--milliseconds 30] [--json FILE]

ROOT is a small local dataset whose shards are listed again and again under other names (hard links)
until the index has as many rows as asked for: a reader sees a large index and many objects, and the
disk holds the clips once. Every measurement is a process of its own, local and S3 in turns, round
after round. Cold: no mapped index on this machine yet; the time from the start of the process to
the first batch, and the part of it that imports take. Known: the index is mapped already. Warm: a
new epoch with the workers up.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "benchmarks")]

from enlarged import INDEX, enlarge  # noqa: E402
from s3_server import s3_server  # noqa: E402 - the tests' helpers
from stream_latency import delayed  # noqa: E402

_SHARDS = 60
CHILD = """
import time
begun = time.time()
import json, sys
started = float(sys.argv[1])
import torch
import stream.loader, stream.clip_stream, av, obstore, pyarrow
imported = time.time()

def main():
    from stream import clip_loader
    loader = clip_loader(sys.argv[2], split="train", batch_size=24, num_workers=int(sys.argv[3]),
                         layout="yuv420", storage_options=json.loads(sys.argv[4]))
    opened = time.time()
    next(iter(loader))
    first = time.time()
    found = {"imports": imported - started, "open": opened - imported, "first": first - opened}
    for epoch in (1, 2, 3):
        loader.set_epoch(epoch)
        begun = time.time()
        next(iter(loader))
        found["warm"] = min(found.get("warm", 9e9), time.time() - begun)
    print(json.dumps(found))

if __name__ == "__main__":
    main()
"""


def measure(root: str, options: dict[str, Any], temp: Path, workers: int, *, cold: bool) -> Any:
    """Run one process; return its times in seconds."""
    if cold:
        shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir(exist_ok=True)
    script = temp / "child.py"
    script.write_text(CHILD)
    done = subprocess.run(
        [sys.executable, script, str(time.time()), root, str(workers), json.dumps(options)],
        env={**os.environ, "TMPDIR": str(temp), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--clips", type=int, default=240_000)
    parser.add_argument("--milliseconds", type=float, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with contextlib.ExitStack() as stack:
        # beside the root: hard links do not cross file systems
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=asked.root.parent)))
        large = folder / "large"
        enlarge(asked.root, large, _SHARDS, -(-asked.clips // _SHARDS))
        server = stack.enter_context(s3_server(folder))
        address = server.upload(large, "large")
        slow = stack.enter_context(delayed(server.endpoint, asked.milliseconds))
        roots = {
            "local disk": (str(large), {}),
            "S3": (address, server.options),
            f"S3 + {asked.milliseconds:g} ms": (address, {**server.options, "endpoint": slow}),
        }
        found: dict[str, list[Any]] = {}
        for _ in range(asked.rounds):
            for name, (root, options) in roots.items():
                for state in ("cold", "known"):
                    one = measure(root, options, folder / "temp", asked.workers,
                                  cold=state == "cold")  # fmt: skip
                    found.setdefault(f"{name}, {state}", []).append(one)
        size = (large / INDEX).stat().st_size
    print(f"{asked.clips} clips, index {size / 1e6:.1f} MB; {asked.workers} workers; "
          f"{os.cpu_count()} cores, {platform.machine()}; medians of {asked.rounds}\n")  # fmt: skip
    print(
        "| root | imports | open | first batch | after imports | warm |\n|---|---|---|---|---|---|"
    )
    for name, times in found.items():
        middle = {key: statistics.median(one[key] for one in times) for key in times[0]}
        print(f"| {name} | {middle['imports']:.2f} s | {middle['open']:.2f} s "
              f"| {middle['first']:.2f} s | {middle['open'] + middle['first']:.2f} s "
              f"| {middle['warm']:.3f} s |")  # fmt: skip
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
