"""`kprep report`: one page to look at a dataset with."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from prep.atomic_files import write_atomic
from prep.errors import UsageError
from prep.outside import check_outside
from prep.storage import Storage
from prep.text.plain import plain
from prep.text.quantities import size_text
from prep.write_errors import write_errors


@click.command("report")
@click.argument("root")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--samples",
    type=click.IntRange(0, 5000),
    default=200,
    show_default=True,
    help="Clips to show, drawn evenly from all classes and splits; about 35 kB of page each.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of that draw."
)
def report_command(root: str, out: Path, samples: int, seed: int) -> None:
    """Write a page about the dataset at ROOT to OUT, an .html file that needs nothing else.

    Sample clips that play when pointed at, by class, split and text; histograms of duration,
    picture size and bytes; class balance; failures by reason; and warnings: videos in two splits,
    clips that repeat or overlap, empty and tiny classes. Reads the manifest, the indices, the
    ledgers, and of the tars the sampled clips only. An earlier page at OUT is replaced.

    \b
    Example:
      kprep report dataset/ dataset.html
      kprep report s3://bucket/k400 k400.html --samples 400
    """
    from prep.report import make_report
    from prep.report_html import report_page

    storage = Storage(root)
    _check_out(out, storage)
    report = make_report(storage, samples=samples, seed=seed, progress=_progress)
    page = report_page(report, seed)
    with write_errors(out):
        write_atomic(out, page)
    for finding in report.findings:
        click.echo(f"warning: {finding.title}")
    bad = [clip for clip in report.clips if clip.sprite is None]
    if bad:
        first = plain(f"{bad[0].row['key']}, which {bad[0].problem}")
        click.echo(
            f"warning: {len(bad)} of the sampled clips cannot be shown, such as {first}; run "
            "`kprep verify --deep`"
        )
    click.echo(f"{out}: {len(report.clips) - len(bad)} clips, {size_text(len(page))}")


def _check_out(out: Path, storage: Storage) -> None:
    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"OUT ({out}) must end in .html; the page is one HTML file")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UsageError(f"{out} cannot be written: it is a folder, or its folder does not exist")
    check_outside(out, storage)


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        click.echo(f"\rlooking at clips: {done}/{total}{end}", err=True, nl=False)
