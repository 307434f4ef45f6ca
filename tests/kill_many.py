"""Kill a conversion at many random moments, continue it, and compare every byte.

python tests/kill_many.py --kills 50           into a local root
python tests/kill_many.py --kills 50 --bucket  into a bucket of a real S3 server

Each of the kills is a SIGKILL at a random moment of a conversion that is then continued; when it
ends, its files are compared with those of an uninterrupted run and the next conversion begins.
The tests run the same with a few kills.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import obstore
from s3_server import S3Server, s3_server

from prep.demo_videos import random_motion, write_video


def make_videos(folder: Path, count: int = 24) -> Path:
    """Draw short videos in three class folders."""
    rng = np.random.default_rng(4)
    for number in range(count):
        target = folder / ("left", "right", "up")[number % 3] / f"{number}.mp4"
        target.parent.mkdir(parents=True, exist_ok=True)
        motion = dataclasses.replace(random_motion("left", rng), seconds=1.5)
        write_video(target, motion, "libx264")
    return folder


def command(videos: Path, root: str, work: Path) -> list[str]:
    return [sys.executable, "-P", "-m", "prep", "shard", str(videos), root, "--split", "train",
            "--profile", "small", "--clips-per-shard", "8", "--work", str(work)]  # fmt: skip


def local_files(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def bucket_files(server: S3Server, prefix: str) -> dict[str, str]:
    store = server.store(prefix)
    return {
        meta["path"]: hashlib.sha256(bytes(obstore.get(store, meta["path"]).bytes())).hexdigest()
        for page in obstore.list(store)
        for meta in page
    }


def run(words: list[str], environment: dict[str, str]) -> float:
    begun = time.monotonic()
    subprocess.run(words, check=True, capture_output=True, timeout=300, env=environment)
    return time.monotonic() - begun


def convert_with_kills(
    words: list[str], environment: dict[str, str], rng: random.Random, seconds: float, most: int
) -> int:
    """Start, kill, start again … until a run ends by itself; return the number of kills."""
    kills = 0
    while True:
        process = subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
        )
        try:
            code = process.wait(rng.uniform(0.05, seconds) if kills < most else 300)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        if code:
            raise SystemExit(f"a continued run ended with {code}: {' '.join(words)}")
        return kills


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bucket", action="store_true", help="convert into a bucket")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kprep-kills-") as name:
        if options.bucket:
            (Path(name) / "s3").mkdir()
            with s3_server(Path(name) / "s3") as server:
                repeat(Path(name), options.kills, options.seed, server)
        else:
            repeat(Path(name), options.kills, options.seed, None)


def repeat(folder: Path, kills: int, seed: int, server: S3Server | None) -> None:
    """Convert again and again until so many kills have happened; every result must be the same."""
    videos, rng = make_videos(folder / "videos"), random.Random(seed)
    environment = {**os.environ, **(server.environment if server else {})}
    seconds = run(command(videos, str(folder / "whole"), folder / "work0"), environment)
    wanted = local_files(folder / "whole")
    done = conversions = 0
    while done < kills:
        conversions += 1
        root = f"s3://kprep/run{conversions}" if server else str(folder / f"run{conversions}")
        words = command(videos, root, folder / "work")
        done += convert_with_kills(words, environment, rng, seconds, kills - done)
        found = bucket_files(server, f"run{conversions}") if server else local_files(Path(root))
        if found != wanted:
            different = sorted(
                path for path in {*found, *wanted} if found.get(path) != wanted.get(path)
            )
            raise SystemExit(f"after {done} kills these files differ: {different}")
        if not server:
            shutil.rmtree(root)
    print(f"{done} kills in {conversions} conversions of {len(wanted)} files: all byte-identical")


if __name__ == "__main__":
    main()
