"""kprep's loader against other streaming loaders: the same clips, the same decoding, in turns.

    pip install "kprep[bench]"
    apt-get install nginx-light libnginx-mod-http-echo
    python benchmarks/stream_peers.py ROOT --work DIR [--json FILE] [--markdown FILE] [--chart FILE]

ROOT is a local dataset with split `train`. DIR, on the same file system, gets each contender's own
form of it, every clip `--copies` times under other names (hard links), so that an epoch takes
some seconds; it is used again by the next run. A contender that is not installed is left out, in
one sentence. `--python NAME=PROGRAM` runs one in another environment: mosaicml-streaming 0.13 pins
an older numpy than the others have.

Every contender runs in a process of its own, one after the other, in every round:

- memory: kprep fed from memory, the baseline
- local disk: files, in the page cache
- S3: a bucket on this machine (nginx), nothing kept on this machine yet: the first epoch
- S3 + 30 ms: the same, first bytes late
- warm cache: S3 again, after an epoch that filled the loader's own cache

With five views a video, from S3 + 30 ms: kprep takes them spread over the epoch or together from
one read, the others together; spread, they cost them five epochs with one view.

Two workers, the same batch size, the same number of batches ahead, shuffled; clips are decoded to
planar YUV by kprep's decoder for all of them (peers/whole_clips.py). Requests and bytes are those
of one whole epoch from the bucket, opening included, counted from nginx's log. The pictures of each
run's first batch are compared with those that the mp4 files hold.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

BENCHMARKS = Path(__file__).resolve().parent
sys.path[:0] = [str(BENCHMARKS.parent), str(BENCHMARKS)]

import nginx_bucket  # noqa: E402
import results  # noqa: E402
from enlarged import enlarge  # noqa: E402
from peers.processes import CONTENDERS, ChildFailedError, Children  # noqa: E402
from peers.report import Cell, Measured, chart, markdown  # noqa: E402
from peers.task import SPLIT, Task  # noqa: E402
from peers.truth import Truth  # noqa: E402

from prep.format import read_manifest  # noqa: E402
from prep.storage import Storage  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nginx_bucket import Buckets

_OWN_FORMAT = ("mosaicml-streaming", "litdata")
_VIEWS = 5
_STORAGES = ("memory", "local", "near", "far", "cache")
_INSTALL = dict.fromkeys(CONTENDERS, "pip install 'kprep[bench]'") | {
    "mosaicml-streaming": "pip install 'kprep[train]' mosaicml-streaming in an environment of its "
    "own, and say --python mosaicml-streaming=PROGRAM"
}


class Bench:
    """What all runs share."""

    def __init__(self, asked: argparse.Namespace, work: Path, buckets: Buckets | None) -> None:
        self.asked = asked
        self.work = work
        self.buckets = buckets
        self.children = Children(work, asked.timeout, dict(asked.python))
        self.truth = Truth(asked.root, asked.frames)
        self.copies: int = asked.copies

    def installed(self) -> list[str]:
        """Return the contenders that can run; say in a sentence which cannot."""
        found = []
        for name in self.asked.contenders:
            if self.children.has(name):
                found.append(name)
            else:
                print(f"{name} is not installed and is left out: {_INSTALL[name]}")
        return found

    def prepare(self, contenders: list[str]) -> list[str]:
        """Make what is not there yet of each contender's own form of the dataset.

        Return the contenders that have theirs; say in a sentence which has not.
        """
        ready = list(contenders)
        split = read_manifest(Storage(str(self.asked.root))).splits[SPLIT]
        made = {"fingerprint": split.fingerprint, "copies": self.copies}
        for name in ["kprep", *(one for one in contenders if one in _OWN_FORMAT)]:
            folder, mark = self.work / "data" / name, self.work / f"{name}.json"
            if mark.exists() and json.loads(mark.read_text()) == made:
                continue
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(exist_ok=True)
            if name == "kprep":
                enlarge(self.asked.root, folder, self.copies * len(split.shards))
            else:
                try:
                    self.children.prepare(name, self.asked.root, folder, self.copies)
                except ChildFailedError as error:
                    print(f"{name} cannot write its form of the dataset and is left out: {error}")
                    ready.remove(name)
                    continue
            mark.write_text(json.dumps(made))
        return ready

    def task(self, cell: Cell, seed: int, cache: Path) -> Task:
        """Return what a process is told."""
        form = cell.contender if cell.contender in _OWN_FORMAT else "kprep"
        local = cell.place in ("memory", "local")
        # kprep reads a bucket without a cache, unless it is asked for one
        keeps = not local and (cell.contender != "kprep" or cell.place == "cache")
        if cell.contender == "webdataset" and cell.place in ("near", "far"):
            keeps = False
        endpoint = ""
        if self.buckets is not None:
            endpoint = self.buckets.far if cell.place == "far" else self.buckets.near
        return Task(
            contender=cell.contender, place=cell.place, dataset=str(self.work / "data" / "kprep"),
            index=str(self.truth.index_path),
            root=str(self.work / "data" / form) if local else f"s3://{nginx_bucket.BUCKET}/{form}",
            endpoint=endpoint, access_key="bench", secret_key="bench",  # noqa: S106 - not looked at
            cache=str(cache) if keeps else "",
            batch=self.asked.batch, workers=self.asked.workers, prefetch=self.asked.prefetch,
            frames=self.asked.frames, views=cell.views, together=cell.together,
            seconds=self.asked.seconds, seed=seed,
        )  # fmt: skip

    def run(self, measured: Measured, number: int) -> None:
        """Measure a cell once; a failure is kept with its reason."""
        cell = measured.cell
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            cache = self.cache(cell.contender) if cell.place == "cache" else Path(folder, "cache")
            try:
                found = self.children.run(self.task(cell, number, cache))
            except ChildFailedError as error:
                measured.failures.append(str(error))
                return
        found["checked_pictures"] = self.truth.check_pictures(cell.contender, found["pictures"])
        measured.rounds.append(found)

    def cache(self, contender: str) -> Path:
        """Return where a contender keeps what it has read."""
        return self.work / "caches" / contender

    def count(self, cell: Cell, *, fill: bool) -> dict[str, Any]:
        """Go through an epoch from the bucket without decoding; with `fill`, fill the cache."""
        if self.buckets is None:
            raise ValueError("there is no bucket")
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            cache = self.cache(cell.contender) if fill else Path(folder, "cache")
            task = self.task(replace(cell, place="cache" if fill else "near"), 0, cache)
            before = self.buckets.log.stat().st_size
            found = self.children.run(replace(task, place="pass"))
        keys = Counter[str](found["keys"])
        times = self.copies * (cell.views if cell.contender == "kprep" else 1)
        left_out = self.truth.check_keys(cell.contender, keys, times)
        with self.buckets.log.open() as log:
            log.seek(before)
            sizes = [int(line.split()[2]) for line in log]
        clips = keys.total()
        return {"requests_per_clip": len(sizes) / clips, "bytes_per_clip": sum(sizes) / clips,
                "left_out": left_out}  # fmt: skip


def cells(contenders: list[str], storages: list[str]) -> Iterator[Cell]:
    """Yield what is measured, storage by storage."""
    for place in storages:
        for name in contenders:
            if place != "memory" or name == "kprep":
                yield Cell(name, place, 1, together=False)
    if "far" in storages:
        for name in contenders:
            if name == "kprep":
                yield Cell(name, "far", _VIEWS, together=False)
            yield Cell(name, "far", _VIEWS, together=True)


def count_all(bench: Bench, measured: list[Measured]) -> list[dict[str, Any]]:
    """Count requests and bytes of each way of reading once; fill the caches on the way."""
    counted: dict[tuple[Any, ...], dict[str, Any]] = {}
    shutil.rmtree(bench.work / "caches", ignore_errors=True)
    (bench.work / "caches").mkdir()
    for one in measured:
        cell = one.cell
        fills = cell.contender != "kprep" or cell.place == "cache"
        ways = (cell.views, cell.together, fills) if cell.contender == "kprep" else ()
        key = (cell.contender, *ways)
        try:
            if key not in counted:
                print(f"an epoch of {cell.loader}, not decoded", file=sys.stderr, flush=True)
                counted[key] = {"way": key, **bench.count(cell, fill=fills)}
        except ChildFailedError as error:
            counted[key] = {"way": key, "failed": str(error)}
        found = counted[key]
        if "failed" not in found:
            views = cell.views if not ways else 1  # of a peer's whole clip
            one.requests_per_clip = found["requests_per_clip"] / views
            one.bytes_per_clip = found["bytes_per_clip"] / views
    return list(counted.values())


def all_rounds(bench: Bench, measured: list[Measured]) -> None:
    """Let the contenders take turns, every other round backwards."""
    for number in range(bench.asked.rounds):
        for one in measured if number % 2 == 0 else reversed(measured):
            bench.run(one, number)
            last = one.rounds[-1]["clips_per_second"] if one.rounds else 0.0
            print(f"round {number + 1}: {one.cell.loader}, {one.cell.place}: {last:.0f} clips/s",
                  file=sys.stderr, flush=True)  # fmt: skip
    baseline = next((one for one in measured if one.cell.place == "memory"), None)
    if baseline is None or baseline.failures:
        return
    for one in measured:
        if not one.failures:
            pairs = zip(one.rounds, baseline.rounds, strict=True)
            one.of_memory = [mine["clips_per_second"] / its["clips_per_second"]
                             for mine, its in pairs]  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="a folder for what is made")
    parser.add_argument("--copies", type=int, default=4, help="names each clip gets")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--storages", nargs="+", choices=_STORAGES, default=list(_STORAGES))
    parser.add_argument("--python", nargs="+", default=[], metavar="NAME=PROGRAM",
                        type=lambda text: text.split("=", 1))  # fmt: skip
    parser.add_argument("--milliseconds", type=float, default=30)
    parser.add_argument("--seconds", type=float, default=3, help="measured, a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--prefetch", type=int, default=2, help="batches a worker prepares ahead")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--timeout", type=float, default=90, help="seconds until a run is ended")
    return results.parse(parser)


def main() -> None:
    asked = arguments()
    asked.root = asked.root.absolute()
    work = asked.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    if not nginx_bucket.available() and set(asked.storages) & {"near", "far", "cache"}:
        print(f"nginx is missing, so nothing is read from S3: {nginx_bucket.INSTALL}")
        asked.storages = [one for one in asked.storages if one in ("memory", "local")]
    with contextlib.ExitStack() as stack:
        buckets = None
        if set(asked.storages) & {"near", "far", "cache"}:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            (work / "data").mkdir(exist_ok=True)
            served = nginx_bucket.nginx_buckets(work / "data", folder, asked.milliseconds)
            buckets = stack.enter_context(served)
        bench = Bench(asked, work, buckets)
        contenders = bench.prepare(bench.installed())
        found = [Measured(cell) for cell in cells(contenders, asked.storages)]
        counted = count_all(bench, found) if buckets else []
        all_rounds(bench, found)
    report(bench, found, counted)


def incomplete(counted: list[dict[str, Any]]) -> list[str]:
    """Return a line for each way of reading whose epoch failed or lacks clips."""
    lines = []
    for one in counted:
        if "failed" in one:
            lines.append(f"- {one['way'][0]}: an epoch without decoding failed ({one['failed']})")
        elif one["left_out"] and len(one["way"]) == 1:  # kprep says what fills no batch
            lines.append(f"- {one['way'][0]}: an epoch lacks {one['left_out']} clips")
    return lines


def report(bench: Bench, found: list[Measured], counted: list[dict[str, Any]]) -> None:
    """Print and write what was found."""
    asked = bench.asked
    titles = {"memory": "memory", "local": "local disk", "near": "S3", "cache": "warm cache",
              "far": f"S3 + {asked.milliseconds:g} ms"}  # fmt: skip
    clips = len(bench.truth)
    head = (
        f"{clips} clips of {bench.truth.video_bytes / clips / 1000:.0f} kB, each under "
        f"{bench.copies} names; {asked.frames} frames, batch {asked.batch}, {asked.workers} "
        f"workers, {asked.prefetch} batches ahead; medians of {asked.rounds} rounds of "
        f"{asked.seconds:g} s; {results.machine()}"
    )
    values = {"head": head, "results": [one.to_json() for one in found], "counted": counted}
    lines = [head, "", *markdown(found, titles), *incomplete(counted)]
    results.write(asked, lines, values)
    if asked.chart:
        chart(found, titles, asked.chart)


if __name__ == "__main__":
    main()
