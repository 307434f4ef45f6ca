"""`kprep verify`."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from prep.byte_progress import ByteProgress
from prep.errors import DatasetError, StorageError, UsageError
from prep.faults import Fault, Kind
from prep.format import read_manifest
from prep.format.layout import MANIFEST_PATH
from prep.storage import Storage

if TYPE_CHECKING:
    from prep.repair import Repair
    from prep.verify import Verdict


@click.command("verify")
@click.argument("root")
@click.option("--deep", is_flag=True, help="Decode every clip too: frames, rate, size, keyframes.")
@click.option(
    "--repair",
    "wants_repair",
    is_flag=True,
    help="Rebuild index and companions from the tars, which are never touched.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--workers", type=click.IntRange(min=1), help="Processes.  [default: one for each core]"
)
def verify_command(
    root: str, deep: bool, wants_repair: bool, as_json: bool, workers: int | None
) -> None:
    """Check the dataset at ROOT: every hash, every index entry against its tar, every companion.

    Prints one line for each fault, beginning with the file, and exits 1 when there is any.

    \b
    Examples:
      kprep verify dataset/
      kprep verify s3://bucket/dataset --deep --workers 16
      kprep verify dataset/ --repair
    """
    from prep.repair import repair
    from prep.verify import examine, verdict_of

    storage = Storage(root)
    if wants_repair and storage.is_read_only:
        raise UsageError(f"root {root} can only be read; repair the copy that it is served from")
    place = MANIFEST_PATH
    try:
        manifest = read_manifest(storage)
        num_bytes = sum(entry.bytes for entry in manifest.files.values())
        place = "."
        with closing(ByteProgress("checking", num_bytes)) as progress:
            findings = examine(
                storage, manifest, deep=deep, workers=workers or 0, progress=progress
            )
    except (DatasetError, StorageError) as error:
        if not as_json:
            raise
        kind = Kind.MANIFEST if isinstance(error, DatasetError) else Kind.UNREADABLE
        _print_json(root, deep, [Fault(kind, place, str(error))], None, None)
        sys.exit(1)
    repaired = None
    if wants_repair:
        with closing(ByteProgress("repairing", 2 * num_bytes)) as progress:
            repaired = repair(storage, findings, workers=workers or 0, progress=progress)
        findings = repaired.findings
    if not findings.is_listed:
        click.echo(
            f"{root} cannot be listed with these credentials, or at all; so files that should not "
            "be there are not looked for",
            err=True,
        )
    verdict = verdict_of(findings)
    if as_json:
        _print_json(root, deep, verdict.faults, verdict, repaired)
    else:
        _print_text(root, deep, verdict, repaired)
    sys.exit(1 if verdict.faults else 0)


def _print_json(
    root: str, deep: bool, faults: list[Fault], verdict: Verdict | None, repaired: Repair | None
) -> None:
    values: dict[str, Any] = {
        "root": root,
        "whole": not faults,
        "deep": deep,
        "files": verdict.num_files if verdict else 0,
        "clips": verdict.num_clips if verdict else 0,
        "bytes": verdict.num_bytes if verdict else 0,
        "faults": [fault.to_json() for fault in faults],
    }
    if repaired is not None:
        values["rebuilt"] = list(repaired.rebuilt)
        values["refused"] = list(repaired.refused)
    click.echo(json.dumps(values, indent=1))


def _print_text(root: str, deep: bool, verdict: Verdict, repaired: Repair | None) -> None:
    if repaired is not None:
        for what in repaired.rebuilt:
            click.echo(f"rebuilt {what}")
        for why in repaired.refused:
            click.echo(f"not repaired: {why}")
    for fault in verdict.faults:
        click.echo(str(fault))
    if verdict.faults:
        count = len(verdict.faults)
        click.echo(f"{count} fault{'s' if count > 1 else ''} in {root}", err=True)
        return
    decoded = ", every one of which decodes" if deep else ""
    click.echo(f"{root} is whole: {verdict.num_files} files, {verdict.num_clips} clips{decoded}")
