"""How fast a folder converts, beside the floor: the same ffmpeg commands in a bare loop."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from prep.errors import KprepError, UsageError
from prep.ffmpeg_binary import find_ffmpeg
from prep.folder_walk import walk
from prep.outcome import RowFailure
from prep.probe import probe
from prep.profile import load_profile
from prep.temporary import temporary_folder
from prep.transcode import Limits, command, run

if TYPE_CHECKING:
    from collections.abc import Callable

    from prep.probe import SourceFacts


@dataclass(frozen=True)
class ShardResult:
    """Rounds of one contender: clips a second and CPU seconds a clip, each one value a round."""

    clips_per_second: list[float]
    cpu_seconds_per_clip: list[float]


@dataclass(frozen=True)
class ShardBench:
    """`ratio` is kprep's clips a second over bare ffmpeg's, the median over rounds.

    `left_out` counts by reason the files that `kprep shard` does not convert; nobody got them.
    """

    num_clips: int
    workers: int
    left_out: dict[str, int]
    ffmpeg: ShardResult
    kprep: ShardResult

    @property
    def ratio(self) -> float:
        """Return kprep's share of the floor's throughput."""
        pairs = zip(self.kprep.clips_per_second, self.ffmpeg.clips_per_second, strict=True)
        return median(mine / floor for mine, floor in pairs)


def bench_shard(
    videos: Path, profile_name: str, *, workers: int, rounds: int, clips: int
) -> ShardBench:
    """Convert `clips` videos of a folder in both ways, in turn, `rounds` times.

    Bare ffmpeg runs the commands that `kprep shard` would run, `workers` at a time, and throws the
    clips away: no probe, no check, no hash, no tar, no index. kprep is the whole command, from the
    start of its process to the published dataset. Where the folder has fewer videos, they are taken
    again; files that `kprep shard` does not convert are left out of both. UsageError when none can
    be read, KprepError when none can be converted.
    """
    with temporary_folder("kprep-bench-") as folder:
        chosen, left_out = choose(videos, Path(folder), clips, profile_name, workers)

        def ffmpeg(_: int) -> None:
            convert_bare(chosen, Path(folder), profile_name, workers)

        def kprep(number: int) -> None:
            root = Path(folder) / f"root-{number}"
            convert(Path(folder) / "videos", root, profile_name, workers, len(chosen))

        results = _rounds(ffmpeg, kprep, len(chosen), rounds)
        return ShardBench(len(chosen), workers, left_out, results["ffmpeg"], results["kprep"])


def convert_bare(
    chosen: list[tuple[Path, SourceFacts]], folder: Path, profile_name: str, workers: int
) -> None:
    """Run the commands that `kprep shard` would run, and throw the clips away."""
    profile, limits, binary = load_profile(profile_name), Limits(), find_ffmpeg().path

    def bare(number: int) -> None:
        path, facts = chosen[number]
        target = folder / f"{number}.mp4"
        run(command(binary, path, target, profile, facts, 0.0, None, limits), path, limits)
        target.unlink()

    with ThreadPoolExecutor(workers) as threads:
        list(threads.map(bare, range(len(chosen))))


def choose(
    videos: Path, folder: Path, count: int, profile: str, workers: int
) -> tuple[list[tuple[Path, SourceFacts]], dict[str, int]]:
    """Link videos below `folder`/videos, from the first again where they are too few.

    Each is converted once before, since only that tells whether it can be; returns the links, and
    how many files were left out for which reason.
    """
    readable, left_out = _readable(videos, count)
    tried, root = folder / "tried", folder / "first"
    links = _linked(readable, tried)
    shard(tried, root, profile, workers)
    ledger = pq.read_table(root / "ledger" / "train.parquet", columns=["video_id", "reason"])
    reasons = dict(zip(*ledger.to_pydict().values(), strict=True))
    shutil.rmtree(root)
    failed = [reasons[link.relative_to(tried).as_posix()] for link in links]
    good = [one for one, reason in zip(readable, failed, strict=True) if reason is None]
    left_out.update(reason for reason in failed if reason is not None)
    again = list(islice(cycle(good), count))
    chosen = zip(_linked(again, folder / "videos"), (facts for _, facts in again), strict=True)
    return list(chosen), dict(left_out)


def _readable(videos: Path, count: int) -> tuple[list[tuple[Path, SourceFacts]], Counter[str]]:
    """Return the first `count` files that can be probed, and the reasons of those that cannot."""
    readable: list[tuple[Path, SourceFacts]] = []
    left_out: Counter[str] = Counter()
    for path in walk(videos).paths:
        try:
            readable.append(((videos / path).absolute(), probe(videos / path, 0.0, None)))
        except RowFailure as failure:
            left_out[str(failure.reason)] += 1
        if len(readable) == count:
            break
    if not readable:
        raise UsageError(f"{videos} holds no video that can be read; name a folder of videos")
    return readable, left_out


def _linked(videos: list[tuple[Path, SourceFacts]], folder: Path) -> list[Path]:
    """Make a folder with one class, of links to the videos."""
    (folder / "bench").mkdir(parents=True)
    links = []
    for number, (file, _) in enumerate(videos):
        link = folder / "bench" / f"{number:06d}{file.suffix}"
        link.symlink_to(file)
        links.append(link)
    return links


def convert(videos: Path, root: Path, profile: str, workers: int, count: int) -> None:
    """Run `kprep shard` as a user does; KprepError when it fails or loses a clip."""
    if f"published {count} clips" not in shard(videos, root, profile, workers):
        raise KprepError("`kprep shard` did not convert every video that it converted before")


def shard(videos: Path, root: Path, profile: str, workers: int) -> str:
    """Run `kprep shard` and return its standard output; KprepError when it fails."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "prep", "shard", str(videos), str(root), "--split", "train",
         "--workers", str(workers), "--profile", profile],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise KprepError(f"`kprep shard` ended with {done.returncode}: {' '.join(last)}")
    return done.stdout


def _rounds(
    ffmpeg: Callable[[int], None],
    kprep: Callable[[int], None],
    count: int,
    rounds: int,
) -> dict[str, ShardResult]:
    """Run both in turns; who begins changes with every round."""
    contenders = {"ffmpeg": ffmpeg, "kprep": kprep}
    results = {name: ShardResult([], []) for name in contenders}
    for number in range(rounds):
        for name in list(contenders) if number % 2 == 0 else reversed(contenders):
            cpu, begun = cpu_seconds(), time.perf_counter()
            contenders[name](number)
            results[name].clips_per_second.append(count / (time.perf_counter() - begun))
            results[name].cpu_seconds_per_clip.append((cpu_seconds() - cpu) / count)
    return results


def cpu_seconds() -> float:
    """Return CPU time of this process and of all children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def table(bench: ShardBench) -> list[str]:
    """Return a Markdown table."""
    lines = ["| way | clips/s (low to high) | CPU s a clip | of ffmpeg |", "|---|---|---|---|"]
    for name, one, ratio in (
        ("bare ffmpeg", bench.ffmpeg, 1.0),
        ("kprep", bench.kprep, bench.ratio),
    ):
        rates = one.clips_per_second
        lines.append(
            f"| {name} | {median(rates):.2f} ({min(rates):.2f} to {max(rates):.2f}) "
            f"| {median(one.cpu_seconds_per_clip):.3f} | {ratio:.2f} |"
        )
    return lines
