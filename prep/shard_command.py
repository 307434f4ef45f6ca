"""`kprep shard`: its options, and what it prints at the end."""

from __future__ import annotations

import math
import os
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from prep.annotation_labels import chosen_classes, read_class_list
from prep.cvdf_layout import DEFAULT_BASE
from prep.errors import UsageError
from prep.ffmpeg_binary import check_scaler_flags, look_ahead
from prep.local_encoders import local_encoders
from prep.options import ShardOptions
from prep.outcome import EXPLANATIONS, Reason
from prep.profile import EncodingProfile, load_profile
from prep.text.quantities import duration, size_text
from prep.text.terminal import folded

if TYPE_CHECKING:
    from prep.shard import ShardResult


@click.command("shard")
@click.argument("source")
@click.argument("root")
@click.option("--split", required=True, help="Name of the split to make, e.g. train or val.")
@click.option(
    "--annotations",
    type=click.Path(path_type=Path),
    help="List of the segments: CSV, JSON, or a path a line. Without it the class folders "
    "of SOURCE are the list, or the mirror's own list is fetched.",
)
@click.option(
    "--source",
    "more_sources",
    multiple=True,
    help="Another source, tried for what the ones before it do not have. Repeatable.",
)
@click.option(
    "--profile",
    "profile_name",
    default="general",
    show_default=True,
    help="general (short side 256), small (128), or a TOML file.",
)
@click.option("--fps", help="Frames a second, e.g. 15, 7.5 or 30000/1001.  [profile: 15]")
@click.option("--short-side", type=int, help="Shorter side in pixels.  [profile: 256 or 128]")
@click.option("--crf", type=int, help="x264's quality, lower is better.  [profile: 23]")
@click.option("--preset", help="x264's preset.  [profile: veryfast]")
@click.option("--tune", help="x264's tuning, or none.  [profile: fastdecode]")
@click.option("--gop", type=int, help="Frames between keyframes.  [profile: 16]")
@click.option("--scaler-flags", help="Flags of ffmpeg's scaler.  [profile: exact bicubic]")
@click.option("--classes", help="Only these labels, separated by commas.")
@click.option(
    "--classes-file",
    type=click.Path(path_type=Path),
    help="Only the labels in this file, one a line.",
)
@click.option(
    "--class-list",
    type=click.Path(path_type=Path),
    help="File of class names in label order.  [default: the list's labels, sorted]",
)
@click.option(
    "--clips-per-shard",
    type=click.IntRange(1, 100_000),
    help="Places in a shard.  [default: 1000; 4000 up to 128 pixels]",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Decides which shard has which clip.",
)
@click.option(
    "--limit", type=click.IntRange(1, 2**31), help="Only so many rows, drawn by the seed."
)
@click.option(
    "--min-seconds",
    type=click.FloatRange(0, 86400),
    default=1.0,
    show_default=True,
    help="Shorter clips fail as too short.",
)
@click.option(
    "--workers",
    type=click.IntRange(0, 1024),
    default=0,
    show_default="one per core",
    help="Encoding processes.",
)
@click.option(
    "--engine",
    type=click.Choice(["local", "dask"]),
    default="local",
    show_default=True,
    help="Where clips are encoded.",
)
@click.option("--scheduler", help="Address of a Dask scheduler, e.g. tcp://10.0.0.1:8786.")
@click.option(
    "--cpu-limit",
    type=click.IntRange(1, 86400),
    default=300,
    show_default=True,
    help="CPU seconds that one clip's encode may take.",
)
@click.option("--retry", help="Try failed rows of these reasons again, separated by commas.")
@click.option("--finish", is_flag=True, help="Publish although some rows might succeed on a retry.")
@click.option("--force", is_flag=True, help="Throw unfinished work on this split away first.")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="Where unfinished work is kept; needed for a bucket.  [default: ROOT/.kprep-work]",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Encode a few clips, say what the conversion would take, and write nothing.",
)
@click.option("--mirror", default=DEFAULT_BASE, show_default=True, help="Base address for cvdf:.")
@click.option(
    "--youtube",
    multiple=True,
    metavar="NAME=VALUE",
    help="Setting for youtube:, e.g. cookies=FILE, proxy=URL, sections=true. Repeatable.",
)
def shard_command(
    source: str, root: str, split: str, annotations: Path | None, more_sources: tuple[str, ...],
    profile_name: str, fps: str | None, short_side: int | None, crf: int | None,
    preset: str | None, tune: str | None, gop: int | None, scaler_flags: str | None,
    classes: str | None, classes_file: Path | None, class_list: Path | None,
    clips_per_shard: int | None, seed: int, limit: int | None, min_seconds: float, workers: int,
    engine: Literal["local", "dask"], scheduler: str | None, cpu_limit: int, retry: str | None,
    finish: bool, force: bool, work: Path | None, dry_run: bool, mirror: str,
    youtube: tuple[str, ...],
) -> None:  # fmt: skip
    """Convert videos into one split of the dataset at ROOT, a folder or s3://bucket/prefix.

    SOURCE is a folder (class folders, or with --annotations files named ID_ssssss_eeeeee.* that
    are already cut or ID.* to be cut), cvdf:k400, cvdf:k600 or cvdf:k700-2020 (the public mirror,
    read as a stream), or youtube: (through yt-dlp).

    Run the same command again after an interruption: it continues where it ended.

    \b
    Examples:
      kprep shard videos/ dataset/ --split train --profile small
      kprep shard k400/val kinetics/ --split val --annotations val.csv
      kprep shard cvdf:k400 from-mirror/ --split val --source youtube: --dry-run
    """
    profile: EncodingProfile = load_profile(profile_name).changed(
        fps=fps, short_side_px=short_side, crf=crf, preset=preset, tune=tune,
        keyframe_interval_frames=gop, scaler_flags=scaler_flags,
    )  # fmt: skip
    if math.isnan(min_seconds):
        raise UsageError("--min-seconds must be a number")
    options = ShardOptions(
        sources=tuple(_absolute(text) for text in (source, *more_sources)),
        root=_absolute(root),
        split=split,
        profile=profile,
        annotations=annotations,
        class_list=tuple(read_class_list(class_list)) if class_list else None,
        classes=chosen_classes(classes, classes_file) or frozenset(),
        clips_per_shard=clips_per_shard,
        seed=seed,
        limit=limit,
        min_seconds=min_seconds,
        workers=workers,
        work=work.absolute() if work else None,
        retry=_reasons(retry),
        finish=finish,
        force=force,
        cpu_seconds=cpu_limit,
        engine=engine,
        scheduler=scheduler,
        mirror=mirror,
        youtube=_pairs(youtube),
    )
    _refuse_without_effect(options)
    if profile.scaler_flags != EncodingProfile.scaler_flags:
        check_scaler_flags(profile.scaler_flags)
    if any(text.startswith("cvdf:") for text in options.sources):
        click.echo(f"asking {options.mirror} for its lists", err=True)
    if dry_run:
        _report_estimate(options)
    else:
        _report(_convert(options), options)


def _refuse_without_effect(options: ShardOptions) -> None:
    """Raise UsageError for an option that nothing would use: something else was meant."""

    def asked(prefix: str) -> bool:
        return any(text.startswith(prefix) for text in options.sources)

    if options.scheduler is not None and options.engine != "dask":
        raise UsageError(
            "--scheduler has no effect without --engine dask; add that, or leave it out to convert "
            "on this machine"
        )
    if options.mirror != DEFAULT_BASE and not asked("cvdf:"):
        raise UsageError("--mirror has no effect without a source cvdf:…; add one, or leave it out")
    if options.youtube and not asked("youtube:"):
        raise UsageError(
            "--youtube has no effect without the source youtube:; add --source youtube:, or leave "
            "it out"
        )


def _convert(options: ShardOptions) -> ShardResult:
    """Convert; start what takes a while and needs nothing of the rest, then import the rest."""
    # pyarrow imports numpy, whose OpenBLAS starts threads that would take 40 ms and do nothing
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    look_ahead()
    local = options.engine == "local"
    with local_encoders(options, ahead=True) if local else nullcontext() as encoders:
        from prep.shard import shard

        return shard(options, encoders)


def _absolute(text: str) -> str:
    """Return a folder as an absolute path, and an address or `cvdf:…` as it is."""
    return text if re.match(r"[a-z][a-z0-9+.-]*:", text) else str(Path(text).absolute())


def _pairs(texts: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--youtube {text} must be NAME=VALUE")
        found[name] = value
    return found


def _report_estimate(options: ShardOptions) -> None:
    from prep.dry_run import estimate

    found = estimate(options)
    for note in found.notes:
        click.echo(note)
    click.echo(f"rows             {found.num_rows}")
    for reason, (count, detail) in found.refused.items():
        click.echo(f"{reason:<17}{count}{', the first: ' if detail else ''}{detail}")
    click.echo(f"expected clips   {found.expected_clips}, in {found.num_shards} shards")
    if found.archives:
        unknown = sum(size is None for _, size in found.archives)
        more = f" and {unknown} of unknown size" if unknown else ""
        click.echo(
            f"archives         {len(found.archives)}, {size_text(found.network_bytes)}{more}"
        )
    if not found.sampled:
        click.echo("no clip could be encoded as a sample, so time and disk are unknown")
        return
    click.echo(
        f"dataset          {size_text(found.output_bytes)} "
        f"({size_text(found.bytes_per_clip)} a clip, from {found.sampled} clips)"
    )
    click.echo(f"disk at the most {size_text(found.peak_bytes)} in ROOT and the work folder")
    click.echo(f"encoding         {duration(found.seconds)} with {found.workers} workers here")
    click.echo("nothing was written")


def _reasons(text: str | None) -> tuple[Reason, ...]:
    known = {str(reason).replace(" ", "-"): reason for reason in Reason}
    found = []
    for name in (text or "").split(","):
        if not name.strip():
            continue
        reason = known.get(name.strip().lower().replace(" ", "-"))
        if reason is None:
            raise UsageError(f"--retry {name.strip()!r} must be of {', '.join(known)}")
        found.append(reason)
    return tuple(found)


def _report(result: ShardResult, options: ShardOptions) -> None:
    for note in result.notes:
        click.echo(note)
    counts = result.counts
    click.echo(f"\nsplit {options.split}: {sum(counts.values())} rows")
    for status, count in counts.items():
        click.echo(f"  {status:<28}{count:>9}")
        if status == "failed":
            for reason, number in result.failures.items():
                first = f"    {reason:<26}{number:>9}  "
                for line in folded(EXPLANATIONS[Reason(reason)], first, " " * len(first)):
                    click.echo(line)
    if result.interrupted_by:
        click.echo("Interrupted; run the same command again to continue.", err=True)
        sys.exit(128 + result.interrupted_by)
    if result.manifest is None:
        click.echo(
            "Not published: rows that failed for a passing reason may succeed on another run; "
            "run the same command again, or add --finish to publish without them.",
            err=True,
        )
        sys.exit(1)
    split = result.manifest.splits[options.split]
    shards = f"{len(split.shards)} shard{'s' * (len(split.shards) != 1)}"
    click.echo(f"published {split.num_clips} clips in {shards}: {options.root}")
