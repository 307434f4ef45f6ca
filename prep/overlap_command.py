"""`kprep overlap`: which videos two annotation lists share."""

from __future__ import annotations

from pathlib import Path

import click

from prep.annotation_overlap import ListCounts, SharedVideo, overlap
from prep.annotations import ANY_SPLIT, open_annotations
from prep.atomic_files import text_output
from prep.errors import UsageError
from prep.write_errors import write_errors


@click.command("overlap")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option(
    "--ids", type=click.Path(dir_okay=False, path_type=Path), help="Write the shared ids here."
)
def overlap_command(a: Path, b: Path, ids: Path | None) -> None:
    """Show which videos the annotation lists A and B share, by id, in all their splits.

    A model that is trained on one list and evaluated on the other has seen these videos:
    Kinetics-400's val sits largely inside Kinetics-700's train.

    \b
    Example:
      kprep overlap k400/val.csv k700_2020/train.csv --ids seen.txt
    """
    for path in (a, b):
        if ids is not None and ids.exists() and path.exists() and ids.samefile(path):
            raise UsageError(f"--ids {ids} would replace the list {path}; write to another file")
    report = overlap(open_annotations(a, ANY_SPLIT), open_annotations(b, ANY_SPLIT))
    click.echo(_side("A", a, report.a))
    click.echo(_side("B", b, report.b))
    click.echo(f"{len(report.shared_ids)} ids are in both; {report.same_segments} segments of "
               "them have the same start and end")  # fmt: skip
    for video in report.examples:
        click.echo(_example(video))
    if len(report.shared_ids) > len(report.examples):
        click.echo(f"  … and {len(report.shared_ids) - len(report.examples)} more")
    if ids is not None:
        _write(ids, report.shared_ids)


def _side(name: str, path: Path, counts: ListCounts) -> str:
    share = 100 * counts.rows_shared / counts.rows if counts.rows else 0.0
    bad = f", {counts.bad_rows} rows cannot be read" if counts.bad_rows else ""
    return (
        f"{name} {path}: {counts.rows} rows, {counts.ids} ids; "
        f"{counts.rows_shared} rows ({share:.1f} %) are of shared ids{bad}"
    )


def _example(video: SharedVideo) -> str:
    return f"  {video.video_id}  A: {', '.join(video.in_a)}  B: {', '.join(video.in_b)}"


def _write(path: Path, ids: tuple[str, ...]) -> None:
    with write_errors(path, "--ids"), text_output(path) as file:
        file.writelines(f"{video_id}\n" for video_id in ids)
