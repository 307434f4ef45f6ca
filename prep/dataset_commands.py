"""`kprep verify`."""

from __future__ import annotations

import sys

import click

from prep.storage import Storage
from prep.verify import verify


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
