"""Converting a folder: kprep beside a bare ffmpeg loop, PyAV in process, and video2dataset.

    python benchmarks/conversion.py VIDEOS [--clips 200] [--video2dataset PYTHON] [--chart FILE.png]

Every contender converts the same clips with as many workers, one encoding thread each:

- bare ffmpeg: the commands that `kprep shard` runs, and nothing else; the clips are thrown away
- kprep: `kprep shard`, from the start of its process to the published dataset
- PyAV: the same filters and encoder in processes that are kept, clips as files
- video2dataset: resize and frame rate by its own subsamplers, its encoder settings, webdataset out;
  only where `--video2dataset` names the Python of an environment that has it (`pip install
  video2dataset 'pyarrow<20'`; its dependencies do not fit kprep's), and on the first
  `--video2dataset-clips` clips, because it is slow. Its threads are ffmpeg's choice

CPU time is that of all processes that a contender starts. Where the folder has fewer videos than
clips are asked for, they are taken again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY)]

from results import Rounds, Table, bars, chart, in_turns, machine, parse, ratio, text, write  # noqa: E402

from prep.bench_shard import choose, convert, convert_bare, cpu_seconds  # noqa: E402
from prep.errors import KprepError  # noqa: E402
from prep.ffmpeg_binary import find_ffmpeg  # noqa: E402
from prep.profile import EncodingProfile, load_profile  # noqa: E402
from prep.transcode import filters  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    from prep.probe import SourceFacts

_FLOOR = "bare ffmpeg"
_NOT_INSTALLED = (
    "video2dataset was not measured: pip install video2dataset 'pyarrow<20' in an environment of "
    "its own, and name that environment's Python with --video2dataset"
)


class Work:
    """The clips to convert and a folder for what comes of them."""

    def __init__(self, asked: argparse.Namespace, folder: Path) -> None:
        self.folder = folder
        self.workers: int = asked.workers
        self.profile_name: str = asked.profile
        self.profile: EncodingProfile = load_profile(asked.profile)
        self.chosen: list[tuple[Path, SourceFacts]]
        self.chosen, _ = choose(asked.videos, folder, asked.clips, asked.profile, asked.workers)
        self.rival_python: str | None = asked.video2dataset
        self.rival_clips: int = min(asked.video2dataset_clips, len(self.chosen))

    def ffmpeg(self) -> int:
        convert_bare(self.chosen, self.folder, self.profile_name, self.workers)
        return len(self.chosen)

    def kprep(self) -> int:
        root = self.folder / "root"
        shutil.rmtree(root, ignore_errors=True)
        convert(self.folder / "videos", root, self.profile_name, self.workers, len(self.chosen))
        return len(self.chosen)

    def pyav(self) -> int:
        profile, out = self.profile, self.folder / "pyav"
        out.mkdir(exist_ok=True)
        tune = {} if profile.tune == "none" else {"tune": profile.tune}
        gop = str(profile.keyframe_interval_frames)
        jobs = [
            {"source": str(path), "stream": facts.stream_index, "target": f"{out}/{number}.mp4",
             "filters": filters(profile, facts), "fps": str(profile.fps)}
            for number, (path, facts) in enumerate(self.chosen)
        ]  # fmt: skip
        options = {
            "preset": profile.preset, "crf": str(profile.crf), **tune, "g": gop, "keyint_min": gop,
            "sc_threshold": "0", "bf": "0", "x264-params": "cpu-independent=1",
        }  # fmt: skip
        _run([sys.executable, str(Path(__file__).with_name("pyav_encode.py"))],
             json.dumps({"workers": self.workers, "options": options, "jobs": jobs}))  # fmt: skip
        return len(jobs)

    def video2dataset(self) -> int:
        out, programs = self.folder / "video2dataset", self.folder / "programs"
        shutil.rmtree(out, ignore_errors=True)
        programs.mkdir(exist_ok=True)
        if not (programs / "ffmpeg").exists():
            (programs / "ffmpeg").symlink_to(find_ffmpeg().path)
        table = self.folder / "videos.csv"
        with table.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["url"])
            rows.writerows([path] for path, _ in self.chosen[: self.rival_clips])
        profile = self.profile
        arguments = [profile.short_side_px, float(profile.fps), self.workers]
        _run([str(self.rival_python), str(Path(__file__).with_name("video2dataset_convert.py")),
              str(table), str(out), *map(str, arguments)],
             PYTHONPATH="", PATH=f"{programs}{os.pathsep}{os.environ['PATH']}")  # fmt: skip
        count = 0
        for shard in out.glob("*.tar"):
            with tarfile.open(shard) as members:
                count += sum(name.endswith(".mp4") for name in members.getnames())
        if count != self.rival_clips:
            raise KprepError(f"video2dataset made {count} of {self.rival_clips} clips")
        return count


def _run(arguments: list[str], given: str = "", **environment: str) -> None:
    done = subprocess.run(arguments, input=given, capture_output=True, text=True, check=False,
                          env={**os.environ, **environment})  # fmt: skip
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise KprepError(f"{Path(arguments[1]).name} ended with {done.returncode}: {last}")


def measured(convert_all: Callable[[], int]) -> Callable[[int], dict[str, float]]:
    """Return a contender: clips a second and CPU seconds a clip of a call."""

    def round_of(_: int) -> dict[str, float]:
        cpu, begun = cpu_seconds(), time.perf_counter()
        count = convert_all()
        seconds = time.perf_counter() - begun
        return {
            "clips_per_second": count / seconds,
            "cpu_seconds_per_clip": (cpu_seconds() - cpu) / count,
        }

    return round_of


def table(found: Rounds) -> Table:
    """Return the table; the last column is the median over rounds of the ratio within a round."""
    floor = found[_FLOOR]["clips_per_second"]
    return Table(
        ["way", "clips/s (low to high)", "CPU s a clip", "of bare ffmpeg"],
        [
            [
                name,
                text(one["clips_per_second"]),
                text(one["cpu_seconds_per_clip"], 3),
                f"{ratio(one['clips_per_second'], floor):.2f}",
            ]
            for name, one in found.items()
        ],
    )


def main() -> None:
    os.environ["PYTHONPATH"] = str(REPOSITORY)  # processes, too, are of this checkout
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("videos", type=Path)
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--profile", default="small")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--video2dataset", metavar="PYTHON", help="a Python that has it")
    parser.add_argument("--video2dataset-clips", type=int, default=16)
    asked = parse(parser)
    try:
        with tempfile.TemporaryDirectory() as folder:
            work = Work(asked, Path(folder))
            ways = {_FLOOR: work.ffmpeg, "kprep shard": work.kprep, "PyAV in process": work.pyav}
            if asked.video2dataset:
                ways["video2dataset"] = work.video2dataset
            found = in_turns({name: measured(way) for name, way in ways.items()}, asked.rounds)
    except KprepError as error:
        sys.exit(str(error))
    caption = (
        f"{machine()}; {len(work.chosen)} clips, profile {asked.profile}, {asked.workers} workers; "
        f"medians of {asked.rounds} rounds"
    )
    lines = [caption, "", *table(found).lines()]
    if not asked.video2dataset:
        lines += ["", _NOT_INSTALLED]
    write(asked, lines, {"machine": machine(), "clips": len(work.chosen), "rounds": found})
    if asked.chart:
        with chart(asked.chart, 2, height=2.8) as axes:
            for axis, measure, label in zip(
                axes, ("clips_per_second", "cpu_seconds_per_clip"), ("clips/s", "CPU s a clip"),
                strict=True,
            ):  # fmt: skip
                bars(axis, {name: one[measure] for name, one in found.items()}, label)


if __name__ == "__main__":
    main()
