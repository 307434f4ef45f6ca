"""`kprep bench shard`."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path

import click

from prep.bench_shard import bench_shard, table
from prep.worker_pool import usable_cores


@click.command("shard")
@click.argument("videos", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--profile", default="small", show_default=True, help="Profile, or a .toml file.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes.  [default: one a core]")
@click.option("--clips", type=click.IntRange(min=1), default=200, show_default=True,
              help="Clips to convert; few videos are taken again.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True,
              help="Rounds over them.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def bench_shard_command(
    videos: Path, profile: str, workers: int | None, clips: int, rounds: int, *, as_json: bool
) -> None:
    """Measure the conversion of a folder of VIDEOS beside its floor, in turns.

    The floor is a bare loop over the same ffmpeg commands, as many at a time, whose clips are
    thrown away. kprep is the whole of `kprep shard`, from the start of its process to the published
    dataset: with few clips, its start weighs more. All are converted once before, and what cannot
    be is left out and counted.

    \b
    Example:
      kprep bench shard videos/ --clips 400
    """
    cores = usable_cores()
    bench = bench_shard(videos, profile, workers=workers or cores, rounds=rounds, clips=clips)
    if as_json:
        found = {**asdict(bench), "ratio": bench.ratio, "profile": profile, "cores": cores}
        click.echo(json.dumps({"bench": "shard", "machine": platform.machine(), **found}, indent=1))
        return
    click.echo(
        f"{videos}: {bench.num_clips} clips, profile {profile}, {bench.workers} workers, "
        f"rounds {rounds}; {cores} cores, {platform.machine()}"
    )
    if bench.left_out:
        counts = ", ".join(f"{count} {reason}" for reason, count in bench.left_out.items())
        click.echo(f"left out, since `kprep shard` does not convert them: {counts}")
    click.echo()
    click.echo("\n".join(table(bench)))
