"""`kprep index`."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import click

from prep.annotation_labels import read_class_list
from prep.byte_progress import ByteProgress
from prep.storage import Storage
from prep.text.plain import few

if TYPE_CHECKING:
    from prep.foreign_index import IndexResult


@click.command("index")
@click.argument("root")
@click.option(
    "--split", "splits", multiple=True, metavar="NAME[=GLOB]",
    help="Which tars are a split, such as train='train-*.tar'; repeatable.  [default: by the first "
    "folder or the beginning of the file name, else train]",
)  # fmt: skip
@click.option(
    "--labels", default="auto", metavar="RULE", show_default=True,
    help="Where a clip's label is: cls, json (label_index, label), json:FIELD, txt, none; auto "
    "takes the first of cls, json and txt that every clip has.",
)  # fmt: skip
@click.option(
    "--classes",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Class names in label order, one a line.  [default: made from the labels]",
)
@click.option(
    "--keys", type=click.Choice(["auto", "member", "shard"]), default="auto", show_default=True,
    help="Keys as in the tars, or with the shard's path before them; auto does so where keys of "
    "the tars are not unique.",
)  # fmt: skip
@click.option(
    "--as-stored", is_flag=True,
    help="Take rotated clips and clips of non-square pixels too, as their pictures are stored.",
)  # fmt: skip
@click.option("--strict", is_flag=True, help="Write nothing if any clip is refused.")
@click.option("--force", is_flag=True, help="Overwrite an earlier index, or files in its place.")
@click.option(
    "--workers", type=click.IntRange(min=1), help="Processes.  [default: one for each core]"
)
def index_command(
    root: str, splits: tuple[str, ...], labels: str, classes: Path | None, keys: str,
    as_stored: bool, strict: bool, force: bool, workers: int | None,
) -> None:  # fmt: skip
    """Make the webdataset tars below ROOT, written by somebody else, a dataset of kprep.

    Decodes every video once and writes manifest, index, ledger and companion files beside the
    tars, which are not touched. A clip that cannot be streamed exactly is left out, and the ledger
    says why; a tar that readers would not agree on refuses the whole.

    \b
    Examples:
      kprep index tars/ --split train --labels txt
      kprep index s3://bucket/videos \\
        --split 'train=train-*.tar' --split 'val=val-*.tar'
    """
    from prep.foreign_index import IndexOptions, find_shards, index_tars

    storage = Storage(root)
    names = None if classes is None else tuple(read_class_list(classes, numbered=True))
    options = IndexOptions(splits, labels, names, keys, as_stored, strict, force, workers or 0)
    found, files = find_shards(storage, options)
    total = sum(files[path].size_bytes for tars in found.values() for path in tars)
    with closing(ByteProgress("indexing", total)) as progress:
        result = index_tars(storage, options, found, files, progress)
    _print(root, result)


def _print(root: str, result: IndexResult) -> None:
    for name, split in sorted(result.manifest.splits.items()):
        click.echo(
            f"split {name}: {split.num_clips} clips of {split.num_rows} samples in "
            f"{len(split.shards)} tars"
        )
    names = result.manifest.class_names
    shown = few(names, 4)
    if result.labels == "none":
        click.echo("labels: none; name where they are with --labels")
    else:
        click.echo(f"labels: {len(names)} classes from {result.labels}: {shown}")
    if result.keys == "shard":
        click.echo("keys: with the shard's path before them, as those of the tars are not unique")
    for reason, count in sorted(result.failures.items()):
        click.echo(f"left out: {count} {reason}, such as {result.examples[reason]}")
    for note in result.notes:
        click.echo(f"note: {note}")
    click.echo(f"{root} is indexed; `kprep verify --deep` checks it")
