"""`kprep info` and `kprep verify`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from prep.errors import UsageError
from prep.format.layout import MANIFEST_PATH
from prep.info import DatasetInfo, SplitInfo, dataset_info, write_ledger_csv
from prep.progress import size_text
from prep.root_state import unfinished
from prep.storage import Storage
from prep.verify import verify


@click.command("info")
@click.argument("root")
@click.option(
    "--csv",
    "csv_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the ledger of all splits here: what became of every annotation row.",
)
def info_command(root: str, csv_path: Path | None) -> None:
    """Show what the dataset at ROOT holds: splits, classes, clips, hours, bytes, failures.

    \b
    Example:
      kprep info dataset/
    """
    storage = Storage(root)
    begun = unfinished(storage.local_root) if storage.local_root is not None else {}
    if not begun or storage.exists(MANIFEST_PATH):
        _print_info(dataset_info(storage))
    for name, (counts, failures) in begun.items():
        outcomes = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        click.echo(f"  split {name}, not published yet: {sum(counts.values())} rows, {outcomes}")
        for reason, count in failures.items():
            click.echo(f"      {reason:<26}{count:>9}")
    if not storage.exists(MANIFEST_PATH):
        return
    if csv_path is not None:
        try:
            write_ledger_csv(storage, csv_path)
        except OSError as error:
            raise UsageError(f"{csv_path} cannot be written: {error.strerror}") from error


def _print_info(info: DatasetInfo) -> None:
    profile = info.manifest.profile
    click.echo(f"{info.root}")
    click.echo(
        f"  profile   {profile.name}: {float(profile.fps):g} fps, "
        f"short side {profile.short_side_px} px, "
        f"keyframe every {profile.keyframe_interval_frames} frames, crf {profile.crf}"
    )
    names = info.manifest.class_names
    shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
    click.echo(f"  classes   {len(names)}{': ' + shown if names else ''}")
    for split in info.splits:
        _print_split(split, names)


def _print_split(split: SplitInfo, names: tuple[str, ...]) -> None:
    click.echo(f"  split {split.name}")
    click.echo(
        f"    {split.num_clips} clips, {split.hours:.2f} hours, {size_text(split.bytes)} "
        f"in {split.num_shards} shards"
    )
    outcomes = ", ".join(f"{count} {status}" for status, count in split.outcomes.items() if count)
    click.echo(f"    {split.num_rows} annotation rows: {outcomes}")
    for reason, count in split.failures.items():
        click.echo(f"      {reason:<26}{count:>9}")
    if split.num_short:
        click.echo(f"    {split.num_short} clips are shorter than annotated")
    if names:
        counts = [split.clips_by_label.get(label, 0) for label in range(len(names))]
        click.echo(f"    clips a class: {min(counts)} to {max(counts)}")


@click.command("verify")
@click.argument("root")
def verify_command(root: str) -> None:
    """Check the dataset at ROOT: every hash, every index entry against its tar, every companion.

    Prints one line for each fault, beginning with the file, and exits 1 when there is any.

    \b
    Example:
      kprep verify dataset/
    """
    verdict = verify(Storage(root))
    for fault in verdict.faults:
        click.echo(fault)
    if verdict.faults:
        click.echo(f"{len(verdict.faults)} faults in {root}", err=True)
        sys.exit(1)
    click.echo(f"{root} is whole: {verdict.num_files} files, {verdict.num_clips} clips")
