"""`kprep demo`: the real commands, one after the other, on generated videos."""

from __future__ import annotations

import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import click

from prep.demo_videos import draw_class_folders, write_broken_files
from prep.errors import KprepError, UsageError
from prep.lazy_group import torch_missing

_MARKER = "made-by-kprep-demo"


@click.command("demo")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--videos",
    "count",
    type=click.IntRange(min=20),
    default=200,
    show_default=True,
    help="How many to draw, a fifth of them for val. Of few, nothing is learnt.",
)
def demo_command(out: Path, count: int) -> None:
    """Draw videos below OUT, then convert, verify and show them and train on them.

    Four classes by direction of motion; one frame alone cannot tell them apart. A truncated file,
    an empty one and a web page are among them. Takes about three minutes on two cores.

    \b
    Example:
      kprep demo demo/
    """
    if (
        find_spec("torch") is None or find_spec("torchvision") is None
    ):  # before it draws and converts
        raise UsageError(torch_missing("demo"))
    num_val = count // 5
    videos, dataset, run = out / "videos", out / "dataset", out / "run"
    if out.exists() and any(out.iterdir()) and not (out / _MARKER).exists():
        raise UsageError(f"{out} is not empty and no earlier demo; give a new folder")
    _clear(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).touch()
    click.echo(f"drawing {count} videos of moving shapes below {videos}")
    draw_class_folders(videos / "train", count - num_val, seed=1)
    draw_class_folders(videos / "val", num_val, seed=2)
    write_broken_files(videos / "train", seed=3)
    shard = ["--profile", "small", "--clips-per-shard", "64"]
    _kprep("shard", str(videos), str(dataset), "--split", "train", *shard)
    _kprep("shard", str(videos), str(dataset), "--split", "val", *shard)
    _kprep("verify", str(dataset))
    _kprep("info", str(dataset))
    _kprep("report", str(dataset), str(out / "report.html"))
    _kprep("train", "--data", str(dataset), "--recipe", "tiny", "--output", str(run))
    click.echo(
        f"\nDone. The dataset is {dataset}: its README.md says what is in it, and "
        f"{out / 'report.html'} shows it. The run is {run}.\n"
        "Next: `kprep shard --help` to convert your own videos, README.md for a first training run."
    )


def _clear(out: Path) -> None:
    """Remove what an earlier demo left, and nothing else."""
    import shutil

    for name in ("videos", "dataset", "run"):
        if (out / _MARKER).exists() and (out / name).is_dir():
            shutil.rmtree(out / name)


def _kprep(*arguments: str) -> None:
    click.echo(f"\n$ kprep {shlex.join(arguments)}", err=False)
    sys.stdout.flush()
    done = subprocess.run([sys.executable, "-P", "-m", "prep", *arguments], check=False)
    if done.returncode:
        raise KprepError(
            f"`kprep {arguments[0]}` ended with exit code {done.returncode}; see above"
        )
