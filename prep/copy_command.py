"""`kprep push` and `kprep pull`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from prep.copy_dataset import CopyResult, copy_dataset
from prep.storage import Storage
from prep.text.quantities import duration, size_text

if TYPE_CHECKING:
    from collections.abc import Callable

_SHOWN = 10


def _options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options that both commands have."""
    options = [
        click.option("--split", "splits", multiple=True, help="Copy only this split. Repeatable."),
        click.option(
            "--jobs",
            type=click.IntRange(1, 128),
            default=8,
            show_default=True,
            help="Files that are copied at a time.",
        ),
        click.option("--dry-run", is_flag=True, help="Say what would be copied; write nothing."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@click.command("push")
@click.argument("root")
@click.argument("destination")
@_options
def push_command(root: str, destination: str, **options: Any) -> None:
    """Copy the dataset at ROOT to DESTINATION, a bucket or another folder, and verify it.

    Tars go first and the manifest last, so that readers never see half a dataset. Every file's
    sha256 is checked on the way. The same command continues after an interruption, and sends only
    what differs. A published split never changes: splits can be added, nothing is replaced.

    \b
    Examples:
      kprep push dataset/ s3://bucket/k400
      kprep push dataset/ s3://bucket/k400 --split val --dry-run
    """
    _copy(root, destination, **options)


@click.command("pull")
@click.argument("source")
@click.argument("root")
@_options
def pull_command(source: str, root: str, **options: Any) -> None:
    """Copy the dataset at SOURCE, a bucket or an https:// address, to the folder ROOT.

    The same as push, the other way: parallel, verified, and continued by the same command, also
    inside a large file.

    \b
    Examples:
      kprep pull s3://bucket/k400 dataset/
      kprep pull https://data.example.org/k400 dataset/ --split val
    """
    _copy(source, root, **options)


def _copy(source: str, destination: str, splits: tuple[str, ...], jobs: int, dry_run: bool) -> None:
    result = copy_dataset(
        Storage(source), Storage(destination), splits=splits, jobs=jobs, dry_run=dry_run
    )
    if result.interrupted_by:
        click.echo("Interrupted; run the same command again to continue.", err=True)
        sys.exit(128 + result.interrupted_by)
    if dry_run:
        _report_estimate(result)
    else:
        _report(result, destination)


def _report_estimate(result: CopyResult) -> None:
    for path in result.sent[:_SHOWN]:
        click.echo(f"  {size_text(result.manifest.files[path].bytes):>10}  {path}")
    if len(result.sent) > _SHOWN:
        click.echo(f"  … and {len(result.sent) - _SHOWN} more")
    click.echo(f"to copy          {result.num_sent} files, {size_text(result.bytes_sent)}")
    click.echo(
        f"there already    {result.num_there} files, {size_text(result.bytes_there)}, by their size"
    )
    click.echo("nothing was written")


def _report(result: CopyResult, destination: str) -> None:
    if result.num_sent:
        rate = size_text(result.bytes_sent / result.seconds)
        click.echo(
            f"copied {result.num_sent} files, {size_text(result.bytes_sent)} in "
            f"{duration(result.seconds)} ({rate}/s); {result.num_there} were there already"
        )
    else:
        click.echo(f"all {result.num_there} files were there already")
    for name, split in sorted(result.manifest.splits.items()):
        shards = f"{len(split.shards)} shard{'s' * (len(split.shards) != 1)}"
        click.echo(f"  split {name:<12}{split.num_clips:>9} clips in {shards}")
    click.echo(f"whole: {destination}")
