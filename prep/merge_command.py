"""`kprep merge` and `kprep subset`."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prep.annotation_labels import chosen_classes
from prep.errors import UsageError
from prep.merge import MergeOptions, MergeResult, merge
from prep.merge_plan import Selection
from prep.profile import parse_rate
from prep.signals import handling
from prep.storage import Storage
from prep.text.quantities import size_text

if TYPE_CHECKING:
    from collections.abc import Callable
    from fractions import Fraction


def _common(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options that both commands have."""
    options = [
        click.option("--split", "splits", multiple=True, help="Only this split. Repeatable."),
        click.option(
            "--clips-per-shard",
            type=click.IntRange(1, 100_000),
            help="Clips in a shard.  [default: as in the source]",
        ),
        click.option(
            "--seed",
            type=click.IntRange(0, 2**63 - 1),
            default=0,
            show_default=True,
            help="Decides which clips are drawn, and which shard has which clip.",
        ),
        click.option(
            "--workers",
            type=click.IntRange(0, 1024),
            default=0,
            show_default="one per core",
            help="Processes that write shards.",
        ),
        click.option(
            "--work",
            type=click.Path(path_type=Path),
            help="Where unfinished work is kept; needed for a bucket.  [default: OUT/.kprep-work]",
        ),
        click.option("--dry-run", is_flag=True, help="Say what would be made; write nothing."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@click.command("merge")
@click.argument("out")
@click.argument("roots", nargs=-1, required=True, metavar="ROOT...")
@click.option(
    "--on-conflict",
    type=click.Choice(["error", "first", "last"]),
    default="error",
    show_default=True,
    help="Whose clip is taken where roots have different ones under one key.",
)
@click.option(
    "--class-list",
    type=click.Choice(["all", "present"]),
    default="all",
    show_default=True,
    help="Keep all classes of the roots, or only those that have a clip.",
)
@_common
def merge_command(
    out: str, roots: tuple[str, ...], on_conflict: Any, class_list: Any, **common: Any
) -> None:
    """Make one dataset at OUT of the datasets at ROOT..., without encoding again.

    Classes and splits are put together by name, and clips are shuffled over new shards. Equal clips
    are taken once. A clip that failed in one root and is there in another comes out ok: so late
    clips come in. The roots must have one profile; they are not changed.

    \b
    Examples:
      kprep merge all/ k400/ late-clips/
      kprep merge s3://bucket/all s3://bucket/k400 extra/ --work /tmp/work
    """
    _run("kprep merge", out, roots, Selection(), common, on_conflict=on_conflict,
         class_list=class_list)  # fmt: skip


@click.command("subset")
@click.argument("root")
@click.argument("out")
@click.option("--classes", help="Only these classes, separated by commas.")
@click.option(
    "--classes-file",
    type=click.Path(path_type=Path),
    help="Only the classes in this file, one a line.",
)
@click.option("--per-class", type=click.IntRange(1), help="At most so many clips of each class.")
@click.option("--count", type=click.IntRange(1), help="At most so many clips of each split.")
@click.option("--min-fps", help="Only clips of so many frames a second or more.")
@click.option(
    "--class-list",
    type=click.Choice(["chosen", "all", "present"]),
    default="chosen",
    show_default=True,
    help="Which classes the new dataset knows: those that were named (all where none were), "
    "all of ROOT, or those that have a clip.",
)
@_common
def subset_command(
    root: str,
    out: str,
    classes: str | None,
    classes_file: Path | None,
    per_class: int | None,
    count: int | None,
    min_fps: str | None,
    class_list: Any,
    **common: Any,
) -> None:
    """Make a smaller dataset at OUT of the one at ROOT, without encoding again.

    Clips are drawn by the seed: the same command always gives the same bytes. With classes alone
    the ledger keeps every row of theirs; with --per-class, --count or --min-fps, those of the clips
    taken.

    \b
    Examples:
      kprep subset k400/ ten/ --classes-file ten.txt
      kprep subset k400/ tiny/ --per-class 20 --split val
      kprep subset s3://bucket/k400 sample/ --count 1000 --seed 7
    """
    selection = Selection(
        classes=chosen_classes(classes, classes_file),
        per_class=per_class,
        count=count,
        min_fps=_rate(min_fps),
    )
    _run("kprep subset", out, (root,), selection, common, class_list=class_list)


def _rate(text: str | None) -> Fraction | None:
    rate = parse_rate(text, "--min-fps") if text is not None else None
    if rate is not None and rate <= 0:
        raise UsageError(f"--min-fps ({text}) must be above 0")
    return rate


def _run(
    made_by: str,
    out: str,
    roots: tuple[str, ...],
    selection: Selection,
    common: dict[str, Any],
    **more: Any,
) -> None:
    splits = frozenset(common["splits"]) or None
    work = common["work"]
    options = MergeOptions(
        roots=tuple(Storage(root) for root in roots),
        destination=Storage(out),
        made_by=made_by,
        selection=replace(selection, splits=splits),
        clips_per_shard=common["clips_per_shard"],
        seed=common["seed"],
        workers=common["workers"],
        work=work.absolute() if work else None,
        **more,
    )
    with handling(_interrupter()):
        try:
            result = merge(options, dry_run=common["dry_run"])
        except _Interrupted as interrupted:
            click.echo("Interrupted; run the same command again to continue.", err=True)
            sys.exit(128 + interrupted.number)
    _report(result, out)


class _Interrupted(BaseException):
    """Ctrl-C or SIGTERM; shards that stand are kept."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _interrupter() -> Callable[[int], None]:
    """Return what raises _Interrupted at a signal."""
    last = -math.inf

    def handler(number: int) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before > 1:  # several at once, as a terminal and a batch system send, are one
            raise _Interrupted(number)

    return handler


def _report(result: MergeResult, out: str) -> None:
    plan, chosen = result.plan, result.plan.chosen
    for note in chosen.notes:
        click.echo(note)
    if chosen.num_equal:
        click.echo(f"{chosen.num_equal} clips stand in several roots alike and are taken once")
    if chosen.num_conflicts:
        click.echo(f"{chosen.num_conflicts} clips of other content under one key were left out")
    click.echo(f"classes   {len(plan.class_names)}")
    for name, shards in plan.shards.items():
        size = sum(plan.shard_bytes(name, number) for number in range(len(shards)))
        ledger = plan.ledgers[name]
        click.echo(
            f"split {name:<12}{sum(map(len, shards)):>9} clips of {ledger.num_rows} rows, "
            f"{size_text(size)} in {len(shards)} shard{'s' * (len(shards) != 1)}"
        )
    if result.manifest is None:
        click.echo("nothing was written")
    elif result.was_there:
        click.echo(f"{out} is complete already; nothing to do")
    else:
        click.echo(f"made {out}")
