"""`kprep shard`: its options, and what it prints at the end."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from prep.annotations import read_class_list
from prep.errors import UsageError
from prep.options import ShardOptions
from prep.outcome import EXPLANATIONS, Reason
from prep.profile import EncodingProfile, load_profile
from prep.shard import ShardResult, shard


@click.command("shard")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("root", type=str)
@click.option("--split", required=True, help="Name of the split to make, e.g. train or val.")
@click.option(
    "--annotations",
    type=click.Path(path_type=Path),
    help="Kinetics CSV of the segments; without it the class folders of SOURCE are the list.",
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
@click.option("--classes", help="Only these labels, separated by commas (quote names with spaces).")
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
    "--seed", type=int, default=0, show_default=True, help="Decides which shard has which clip."
)
@click.option("--limit", type=click.IntRange(1), help="Only so many rows, drawn by the seed.")
@click.option(
    "--min-seconds",
    type=click.FloatRange(0),
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
    "--cpu-limit",
    type=click.IntRange(1),
    default=300,
    show_default=True,
    help="CPU seconds that one clip's encode may take.",
)
@click.option("--retry", help="Try failed rows of these reasons again, separated by commas.")
@click.option("--finish", is_flag=True, help="Publish although some rows might succeed on a retry.")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="Where unfinished work is kept.  [default: ROOT/.kprep-work]",
)
def shard_command(
    source: Path, root: str, split: str, annotations: Path | None, profile_name: str,
    fps: str | None, short_side: int | None, crf: int | None, preset: str | None, tune: str | None,
    gop: int | None, scaler_flags: str | None, classes: str | None, class_list: Path | None,
    clips_per_shard: int | None, seed: int, limit: int | None, min_seconds: float, workers: int,
    cpu_limit: int, retry: str | None, finish: bool, work: Path | None,
) -> None:  # fmt: skip
    r"""Convert the videos of SOURCE into one split of the dataset at ROOT.

    SOURCE is a folder: class folders (CLASS/video.mp4), or, with --annotations, files named
    ID_ssssss_eeeeee.* (already cut) or ID.* (to be cut), in any folders.

    Run the same command again after an interruption: it continues where it ended.

    \b
    Examples:
      kprep shard videos/ dataset/ --split train --profile small
      kprep shard k400/val dataset/ --split val --annotations val.csv
    """
    if "://" in root:
        raise UsageError(
            f"root {root} must be a local folder; copy the finished dataset to a bucket"
        )
    profile: EncodingProfile = load_profile(profile_name).changed(
        fps=fps, short_side_px=short_side, crf=crf, preset=preset, tune=tune,
        keyframe_interval_frames=gop, scaler_flags=scaler_flags,
    )  # fmt: skip
    options = ShardOptions(
        source=source.absolute(),
        root=Path(root).absolute(),
        split=split,
        profile=profile,
        annotations=annotations,
        class_list=tuple(read_class_list(class_list)) if class_list else None,
        classes=frozenset(name.strip() for name in (classes or "").split(",") if name.strip()),
        clips_per_shard=clips_per_shard,
        seed=seed,
        limit=limit,
        min_seconds=min_seconds,
        workers=workers,
        work=work.absolute() if work else None,
        retry=_reasons(retry),
        finish=finish,
        cpu_seconds=cpu_limit,
    )
    _report(shard(options), options)


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
                click.echo(f"    {reason:<26}{number:>9}  {EXPLANATIONS[Reason(reason)]}")
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
    click.echo(f"published {split.num_clips} clips in {len(split.shards)} shards: {options.root}")
