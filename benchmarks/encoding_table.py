"""What an encoding costs and gives: bytes, quality and decode time of every choice of a profile.

    python benchmarks/encoding_table.py VIDEOS... [--profiles small] [--chart FILE.png]

VIDEOS are files and folders of them; up to `--seconds` of each are encoded by the command that
`kprep shard` runs, once for every combination of profile, GOP length, tuning and crf.

- bytes: of 10 s; of the GOPs that one view of 16 frames at 15 fps needs; of five views together
- quality: PSNR, SSIM and, where ffmpeg has libvmaf, VMAF against the source after the same filters
  (the same command at crf 0, which is lossless). VMAF's model was made for 1080 lines: read
  differences, not values
- decode: CPU time of one thread with the loader's own decoder, to planar YUV, bytes in memory: five
  views of each video by themselves (one view is a fifth of it) and in one pass, beside the floor,
  which is libavcodec's decode calls for the packets of the views by themselves

Views are those that training draws; all settings are decoded in turns, round after round.
"""

from __future__ import annotations

import argparse
import itertools
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY)]

import ffmpeg  # noqa: E402
import numpy as np  # noqa: E402
from results import MARKERS, Table, chart, in_turns, machine, parse, text, write  # noqa: E402

from prep.errors import KprepError  # noqa: E402
from prep.ffmpeg_binary import find_ffmpeg  # noqa: E402
from prep.folder_walk import walk  # noqa: E402
from prep.mp4 import check_form  # noqa: E402
from prep.outcome import RowFailure  # noqa: E402
from prep.probe import SourceFacts, probe  # noqa: E402
from prep.profile import PROFILES, EncodingProfile  # noqa: E402
from prep.transcode import Limits, command, run  # noqa: E402
from stream.bench_decode import DecodeSample, Floor, decoding  # noqa: E402
from stream.color import frame_bytes  # noqa: E402
from stream.index import IndexedClip  # noqa: E402
from stream.ranges import batch_ranges  # noqa: E402
from stream.reads import ClipBytes, ClipRequest  # noqa: E402
from stream.sampling import frame_offsets, num_starts, training_start  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_FRAMES, _FPS, _VIEWS = 16, 15, 5
_MEASURES = {
    "psnr": re.compile(r"PSNR .*average:(\S+)"),
    "ssim": re.compile(r"SSIM .*All:(\S+)"),
    "libvmaf": re.compile(r"VMAF score: (\S+)"),
}


@dataclass(frozen=True)
class Source:
    """A readable video; its first `seconds` are encoded."""

    path: Path
    facts: SourceFacts
    seconds: float


@dataclass
class Setting:
    """A profile and what came of it: one encoded clip of each source."""

    base: str
    profile: EncodingProfile
    clips: list[IndexedClip] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    quality: dict[str, list[float]] = field(default_factory=dict)

    @property
    def is_default(self) -> bool:
        """Whether the values are those of the named profile."""
        return self.profile == PROFILES[self.base]

    def views(self) -> list[list[ClipRequest]]:
        """Return five requests for every clip that is long enough for a view."""
        offsets = frame_offsets(_FRAMES, PROFILES[self.base].fps, self.profile.fps)
        found = []
        for clip in self.clips:
            starts = int(num_starts(np.array([clip.num_frames]), int(offsets[-1]) + 1)[0])
            if starts:
                begins = [training_start(0, 0, clip.key, view, starts) for view in range(_VIEWS)]
                found.append([ClipRequest(clip, begin + offsets) for begin in begins])
        return found

    def bytes_facts(self) -> dict[str, float]:
        """Return bytes of 10 s, of one view and of five views read together, over all clips."""
        seconds = sum(clip.num_frames for clip in self.clips) / float(self.profile.fps)
        groups = self.views()
        single = [_size(view.ranges) for group in groups for view in group]
        return {
            "bytes_10_seconds": sum(map(len, self.bodies)) / seconds * 10,
            "bytes_view": fmean(single),
            "bytes_five_views": fmean(_size(batch_ranges(group)) for group in groups),
        }


def _size(ranges: Iterable[Any]) -> int:
    return sum(part.end - part.start for part in ranges)


def sources(paths: list[Path], longest: float, least: float) -> list[Source]:
    """Return the videos that can be read and last at least `least` seconds."""
    found = []
    for path in paths:
        for file in [path / name for name in walk(path).paths] if path.is_dir() else [path]:
            try:
                facts = probe(file, 0.0, None)
            except RowFailure:
                continue
            if facts.end_seconds >= least:
                found.append(Source(file.absolute(), facts, min(longest, facts.end_seconds)))
    return found


def settings(asked: argparse.Namespace) -> list[Setting]:
    """Return the grid; a profile's own preset where none is asked for."""
    grid = itertools.product(
        asked.profiles, asked.presets or [None], asked.gops, asked.tunes, asked.crfs
    )
    return [
        Setting(
            base,
            PROFILES[base].changed(preset=preset, keyframe_interval_frames=gop, tune=tune, crf=crf),
        )
        for base, preset, gop, tune, crf in grid
    ]


def encode(source: Source, profile: EncodingProfile, target: Path) -> float:
    """Run the converter's command; return the CPU seconds that it took."""
    limits, before = Limits(), _children_cpu_seconds()
    arguments = command(find_ffmpeg().path, source.path, target, profile, source.facts, 0.0,
                        source.seconds, limits)  # fmt: skip
    run(arguments, source.path, limits)
    return _children_cpu_seconds() - before


def _children_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measures() -> list[str]:
    """Return the quality filters that this ffmpeg has."""
    known = subprocess.run([find_ffmpeg().path, "-hide_banner", "-filters"],
                           capture_output=True, text=True, check=True).stdout  # fmt: skip
    return [name for name in _MEASURES if f" {name} " in known]


def quality(encoded: Path, reference: Path, names: list[str]) -> dict[str, float]:
    """Return the measures of an encoded file against the lossless one."""
    picture, original = (ffmpeg.input(f"file:{path}")["v"] for path in (encoded, reference))
    for name in names:  # each filter hands its first input on
        picture = ffmpeg.filter([picture, original], name)
    arguments = ffmpeg.compile(ffmpeg.output(picture, "-", f="null"), cmd=find_ffmpeg().path)
    done = subprocess.run([*arguments, "-nostdin", "-hide_banner"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    found = {}
    for name in names:
        match = _MEASURES[name].search(done.stderr)
        if match is None:
            sys.exit(f"ffmpeg's filter {name} said nothing of {encoded.name}")
        found[name] = float(match[1])
    return found


def indexed(number: int, source: Source, data: bytes, profile: EncodingProfile) -> IndexedClip:
    """Return the row that an index would have of an encoded clip."""
    form = check_form(data, profile.keyframe_interval_frames)
    return IndexedClip(
        row=number, key=source.path.stem, shard="memory", label=0, num_frames=form.num_frames,
        width=form.width, height=form.height, video_offset=0, video_bytes=len(data), crc32=0,
        codec_config=form.gops.codec_config, gop_frames=form.gops.gop_frames,
        gop_offsets=np.array(form.gops.offsets), gop_crc32=np.array(form.gops.crc32),
    )  # fmt: skip


def fill(grid: list[Setting], videos: list[Source], folder: Path) -> None:
    """Encode every video in every setting and measure the quality."""
    names, target, reference = measures(), folder / "clip.mp4", folder / "reference.mp4"
    for number, source in enumerate(videos):
        for base, members in itertools.groupby(grid, lambda setting: setting.base):
            encode(source, PROFILES[base].changed(crf=0, preset="ultrafast"), reference)
            for setting in members:
                setting.cpu_seconds.append(encode(source, setting.profile, target))
                data = target.read_bytes()
                setting.bodies.append(data)
                setting.clips.append(indexed(number, source, data, setting.profile))
                for name, value in quality(target, reference, names).items():
                    setting.quality.setdefault(name, []).append(value)
        print(f"{number + 1}/{len(videos)} encoded: {source.path.name}", file=sys.stderr)


def decoder(setting: Setting) -> Callable[[int], dict[str, float]]:
    """Return a contender: CPU milliseconds of a view, of five, and of the floor of one view."""
    groups = setting.views()
    together = [
        ClipRequest(group[0].clip, np.concatenate([view.frames for view in group]), len(group))
        for group in groups
    ]
    rooms: dict[tuple[int, int], Any] = {}
    separate = list(_samples(setting, itertools.chain(*groups), rooms))
    calls = {
        "view_ms": (decoding(separate), len(separate)),
        "five_views_one_pass_ms": (decoding(list(_samples(setting, together, rooms))), len(groups)),
        "floor_ms": (Floor(separate).run, len(separate)),
    }
    for call, _ in calls.values():
        call()  # contexts are opened and pages touched once

    def round_of(_: int) -> dict[str, float]:
        found = {}
        for name, (call, count) in calls.items():
            begun = time.thread_time()
            call()
            found[name] = (time.thread_time() - begun) * 1000 / count
        return found

    return round_of


def _samples(
    setting: Setting, requests: Iterable[ClipRequest], rooms: dict[tuple[int, int], Any]
) -> Iterator[DecodeSample]:
    """Yield requests with their bytes; those of one shape share the room for their pixels."""
    for request in requests:
        clip, body = request.clip, memoryview(setting.bodies[request.clip.row])
        shape = len(request.frames), frame_bytes(clip.height, clip.width)
        out = rooms.setdefault(shape, np.empty(shape, dtype=np.uint8))
        gops = {
            gop: body[int(clip.gop_offsets[gop]) : int(clip.gop_offsets[gop + 1])]
            for gop in request.gops
        }
        yield DecodeSample(request, ClipBytes(gops), ClipBytes({}, body), out)


def rows(grid: list[Setting], rounds: int) -> list[dict[str, Any]]:
    """Return a row of facts for every setting; decode times are lists, one value a round."""
    names = [f"{number}" for number in range(len(grid))]
    times = in_turns(dict(zip(names, map(decoder, grid), strict=True)), rounds)
    found = []
    for setting, name in zip(grid, names, strict=True):
        seconds = sum(clip.num_frames for clip in setting.clips) / float(setting.profile.fps)
        found.append({
            "profile": setting.base,
            **{key: asdict(setting.profile)[key]
               for key in ("preset", "keyframe_interval_frames", "tune", "crf")},
            "default": setting.is_default,
            **setting.bytes_facts(),
            **{key: fmean(values) for key, values in setting.quality.items()},
            "encode_cpu_seconds_10_seconds": sum(setting.cpu_seconds) / seconds * 10,
            **times[name],
        })  # fmt: skip
    return found


def table(found: list[dict[str, Any]]) -> Table:
    """Return the table; the named profiles' own settings are in bold."""
    names = {"psnr": "PSNR", "ssim": "SSIM", "libvmaf": "VMAF"}
    has = [name for name in names if name in found[0]]
    columns = ["profile, preset", "GOP", "tune", "crf", "kB, 10 s", "kB, view", "kB, 5 views",
               *(names[name] for name in has), "encode CPU s, 10 s", "view ms", "floor ms",
               "5 views, one pass ms", "5 views, apart ms"]  # fmt: skip
    lines = []
    for row in found:
        sizes = [row[key] for key in ("bytes_10_seconds", "bytes_view", "bytes_five_views")]
        cells = [
            f"{row['profile']}, {row['preset']}", str(row["keyframe_interval_frames"]),
            row["tune"], str(row["crf"]), *(f"{size / 1000:.1f}" for size in sizes),
            *(f"{row[name]:.{3 if name == 'ssim' else 1}f}" for name in has),
            f"{row['encode_cpu_seconds_10_seconds']:.2f}", text(row["view_ms"]),
            *(text(values).partition(" ")[0] for values in (
                row["floor_ms"], row["five_views_one_pass_ms"],
                [_VIEWS * value for value in row["view_ms"]])),
        ]  # fmt: skip
        lines.append([f"**{cell}**" for cell in cells] if row["default"] else cells)
    return Table(columns, lines)


def draw(path: Path, found: list[dict[str, Any]]) -> None:
    """Draw bytes of a view against its decode time, one panel a profile, coloured by SSIM."""
    from matplotlib import ticker

    names = list(dict.fromkeys(row["profile"] for row in found))
    lengths = sorted({row["keyframe_interval_frames"] for row in found})
    low, high = min(row["ssim"] for row in found), max(row["ssim"] for row in found)
    with chart(path, len(names), width=6.0, height=4.8) as axes:
        for axis, name in zip(axes, names, strict=True):
            for row in (row for row in found if row["profile"] == name):
                place = row["bytes_view"] / 1000, float(np.median(row["view_ms"]))
                shown = axis.scatter(
                    *place, c=[row["ssim"]], cmap="cividis", vmin=low, vmax=high, s=60,
                    marker=MARKERS[lengths.index(row["keyframe_interval_frames"])],
                    edgecolors="#D55E00" if row["tune"] == "none" else "none", linewidths=1.6,
                )  # fmt: skip
                if row["default"]:
                    axis.annotate("default", place, xytext=(14, -30), textcoords="offset points",
                                  arrowprops={"arrowstyle": "->"}, fontsize=9)  # fmt: skip
            axis.set_title(f"profile {name}, {_FRAMES} frames at {_FPS} fps")
            axis.set_xlabel("kB read for a view of 16 frames")
            axis.set_ylabel("CPU ms to decode it")
            axis.set(xscale="log", yscale="log")
            for scale in (axis.xaxis, axis.yaxis):
                scale.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
                scale.set_major_formatter(ticker.FormatStrFormatter("%g"))
                scale.set_minor_formatter(ticker.NullFormatter())
            _legend(axis, lengths)
            axis.figure.colorbar(shown, ax=axis, label="SSIM")


def _legend(axis: Any, lengths: list[int]) -> None:
    for number, length in enumerate(lengths):
        axis.scatter([], [], c="#777777", marker=MARKERS[number], label=f"GOP {length}")
    axis.scatter([], [], c="#777777", edgecolors="#D55E00", linewidths=1.6, label="no fastdecode")
    axis.legend(fontsize=8, loc="upper left")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("videos", type=Path, nargs="+")
    parser.add_argument("--profiles", nargs="+", choices=list(PROFILES), default=list(PROFILES))
    parser.add_argument("--presets", nargs="+", help="in place of the profile's own")
    parser.add_argument("--gops", nargs="+", type=int, default=[8, 16, 30, 150])
    parser.add_argument("--tunes", nargs="+", default=["fastdecode", "none"])
    parser.add_argument("--crfs", nargs="+", type=int, default=[20, 23, 26])
    parser.add_argument("--seconds", type=float, default=10, help="encoded of each video, at most")
    parser.add_argument("--min-seconds", type=float, default=2, help="shorter videos stay out")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parse(parser)
    videos = sources(asked.videos, asked.seconds, asked.min_seconds)
    if not videos:
        parser.error("no video among those can be read and is long enough; name others")
    try:
        grid = settings(asked)
        with tempfile.TemporaryDirectory() as folder:
            fill(grid, videos, Path(folder))
        found = rows(grid, asked.rounds)
    except (KprepError, RowFailure) as error:
        sys.exit(f"the videos cannot be encoded so: {error}")
    total = sum(source.seconds for source in videos)
    caption = (
        f"{machine()}; {len(videos)} videos, {total:.0f} s in all; views of {_FRAMES} frames at "
        f"{_FPS} fps; medians of {asked.rounds} rounds"
    )
    write(asked, [caption, "", *table(found).lines()], {"machine": machine(), "settings": found})
    if asked.chart:
        draw(asked.chart, found)


if __name__ == "__main__":
    main()
