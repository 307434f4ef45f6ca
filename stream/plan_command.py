"""`kprep plan`: what a training run takes, before a GPU is rented."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from prep.errors import UsageError
from prep.text.quantities import rough_duration, size_text
from prep.text.terminal import folded, pair

if TYPE_CHECKING:
    from stream.plan_cache import CachePlan
    from stream.plan_reads import ReadSample
    from stream.planning import Plan, PlanOptions, ReadPlan
    from stream.shuffle_quality import ShuffleQuality


@click.command("plan")
@click.argument("root", required=False)
@click.option("--split", default="train", show_default=True, help="Split to train on.")
@click.option(
    "--synthetic",
    type=click.IntRange(min=1),
    metavar="CLIPS",
    help="Plan for so many made-up clips.",
)
@click.option("--nodes", type=int, default=1, show_default=True, help="Machines.")
@click.option("--gpus", type=int, default=8, show_default=True, help="GPUs on each machine.")
@click.option("--workers", type=int, default=10, show_default=True, help="Loader workers a GPU.")
@click.option("--batch", type=int, default=24, show_default=True, help="Clips a GPU and step.")
@click.option("--accumulate", type=int, default=1, show_default=True, help="Batches a step.")
@click.option("--epochs", type=int, default=45, show_default=True, help="Epochs of the run.")
@click.option("--clips-per-second", type=float, default=600.0, show_default=True,
              help="Clips a second that all GPUs together train on.")  # fmt: skip
@click.option("--frames", type=int, default=16, show_default=True, help="Frames a clip.")
@click.option("--fps", default="15", show_default=True, help="Frames a second of a clip.")
@click.option("--clips-per-video", type=int, default=5, show_default=True, help="Views an epoch.")
@click.option("--grouping", type=click.Choice(["spread", "together"]), default="spread",
              show_default=True, help="Where a video's views stand in an epoch.")  # fmt: skip
@click.option("--shuffle-block", type=int, default=1, show_default=True,
              help="Neighbours of the index that stay together.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the order.")
@click.option("--layout", type=click.Choice(["rgb", "yuv420"]), default="yuv420",
              show_default=True, help="Form of decoded clips, for the memory.")  # fmt: skip
@click.option("--cache-limit", metavar="SIZE", help="Cache on each machine, such as 100GB.")
@click.option("--price-per-1000-requests", type=float, default=0.0004, show_default=True,
              help="Price of 1,000 requests.")  # fmt: skip
@click.option("--price-per-gb", type=float, default=0.0, show_default=True,
              help="Price of 10^9 bytes of traffic.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan_command(
    root: str | None,
    split: str,
    synthetic: int | None,
    as_json: bool,
    cache_limit: str | None,
    fps: str,
    **values: Any,
) -> None:
    """Simulate a training run on the dataset at ROOT: steps, bytes, requests, memory, shuffling.

    Reads the manifest and the index only. Exits 1 when the run cannot work, and says why.

    \b
    Examples:
      kprep plan s3://bucket/k400 --nodes 8 --gpus 8 --workers 10 --batch 24 \\
        --epochs 45
      kprep plan --synthetic 10000000 --nodes 128
    """
    import time

    from stream.cache import parse_bytes
    from stream.plan_splits import StoredSplit, SyntheticSplit
    from stream.planning import PlanOptions, make_plan
    from stream.rates import parse_rate

    if (root is None) == (synthetic is None):
        raise UsageError("give either ROOT or --synthetic CLIPS")
    options = PlanOptions(
        fps=parse_rate(fps),
        cache_limit_bytes=None if cache_limit is None else parse_bytes(cache_limit),
        **values,
    )
    begun = time.perf_counter()
    if synthetic is not None:
        plan = make_plan(SyntheticSplit(synthetic), options)
    else:
        from prep.storage import Storage

        plan = make_plan(StoredSplit(Storage(str(root)), split), options)
    seconds = time.perf_counter() - begun
    if as_json:
        named = {"root": root, "split": split if root else None, "planning_seconds": seconds}
        click.echo(json.dumps({**named, **plan.to_json()}, indent=1))
    else:
        name = f"{root}, split {split}" if root else f"{synthetic:,} synthetic clips"
        click.echo("\n".join(_lines(name, plan, options)))
        click.echo(f"planned in {seconds:.2f} s")
    if plan.problems:
        sys.exit(1)


def _lines(name: str, plan: Plan, options: PlanOptions) -> list[str]:
    """Return the lines for a terminal of 80 columns; what is longer goes on below."""
    views = _counted(options.clips_per_video, "view")
    lines = folded(f"{name}: {_counted(plan.clips, 'clip')} x {views}", "", "  ")
    for problem in plan.problems:
        lines += folded(f"cannot work: {problem}", "  ", "    ")
    for warning in plan.warnings:
        lines += folded(f"warning: {warning}", "  ", "    ")
    if plan.reads is None or plan.memory is None or plan.sample is None or plan.cache is None:
        return lines
    lines += pair(
        "steps",
        f"{plan.steps_per_epoch:,} an epoch and rank, {plan.steps_run:,} in all; "
        f"{_counted(plan.global_batch, 'clip')} each on {_counted(options.world_size, 'rank')}; "
        f"{_counted(plan.left_out_per_epoch, 'clip')} of an epoch in no step",
    )
    lines += pair(
        "time",
        f"{rough_duration(plan.epoch_seconds)} an epoch, {rough_duration(plan.run_seconds)} in all "
        f"at {options.clips_per_second:,g} clips/s",
    )
    lines += _read_lines(plan.reads, plan.sample, options)
    lines += _cache_lines(plan.cache)
    memory = plan.memory
    lines += pair(
        "memory",
        f"{size_text(memory.rank_bytes)} a rank, {size_text(memory.node_bytes)} a node; index "
        f"{size_text(memory.index_bytes)}, mapped once a node; {memory.batches:,} decoded "
        f"batches of {size_text(memory.batch_bytes)} a rank",
    )
    for what, quality in (("step", plan.shuffle_step), ("rank's batch", plan.shuffle_rank)):
        if quality is not None:
            lines += _quality_lines(what, quality)
    return lines


def _read_lines(reads: ReadPlan, sample: ReadSample, options: PlanOptions) -> list[str]:
    whole = sample.whole_epoch
    how = "every batch of an epoch" if whole else _counted(sample.batches, "batch")
    return [
        *pair(
            "a clip",
            f"{size_text(reads.bytes_per_clip)} in {reads.requests_per_clip:.2f} requests, "
            f"{reads.clip_share:.0%} of the stored clip "
            f"(exact for {how}, {_counted(sample.clips, 'clip')})",
        ),
        *pair(
            "",
            f"each by itself {size_text(reads.alone_bytes_per_clip)} in "
            f"{reads.alone_requests_per_clip:.2f} requests: what reading a batch together gives "
            f"with shuffle_block {options.shuffle_block}",
        ),
        *pair(
            "a second",
            f"{size_text(reads.bytes_per_second)} in {reads.requests_per_second:,.0f} requests; "
            f"a node {size_text(reads.bytes_per_second_node)} in "
            f"{reads.requests_per_second_node:,.0f}",
        ),
        *pair(
            "an epoch",
            f"{size_text(reads.bytes_per_epoch)} in {reads.requests_per_epoch:,.0f} requests",
        ),
        *pair("the run", f"{size_text(reads.bytes_run)} in {reads.requests_run:,.0f} requests"),
        *pair(
            "cost",
            f"{reads.cost_epoch:,.2f} an epoch, {reads.cost_run:,.2f} in all, in the currency of "
            f"the prices: {options.price_per_1000_requests:g} for 1,000 requests, "
            f"{options.price_per_gb:g} for a GB",
        ),
    ]


def _cache_lines(cache: CachePlan) -> list[str]:
    shares = ", ".join(
        f"{share.held_share:.0%} on {_counted(share.nodes, 'node')}" for share in cache.second_epoch
    )
    limit = (
        "that limit"
        if cache.limit_bytes is None
        else f"a limit of {size_text(cache.limit_bytes)}, which keeps {cache.kept_share:.0%} of it,"
    )
    return [
        *pair(
            "cache",
            f"{size_text(cache.split_bytes)} of clips need a limit of "
            f"{size_text(cache.needed_limit_bytes)} a node; then no node fetches a clip twice",
        ),
        *pair(
            "",
            f"{limit} makes {cache.requests_run:,.0f} requests for {size_text(cache.bytes_run)} "
            "in the run on all nodes",
        ),
        *pair("", f"in the second epoch a node has of its clips: {shares}"),
    ]


def _quality_lines(what: str, quality: ShuffleQuality) -> list[str]:
    if quality.class_repeats is not None:
        repeats = f"{quality.class_repeats:.2f} x the class repeats of perfect shuffling"
    else:
        repeats = "one clip repeats no class" if quality.batch_clips == 1 else "no labels"
    return pair(
        "shuffling",
        f"a {what} of {quality.batch_clips:,}: {repeats}; {quality.company:.2%} stand beside their "
        f"neighbour (perfect: {quality.company_ideal:.2%}; {_counted(quality.batches, 'batch')})",
    )


def _counted(count: int, noun: str) -> str:
    plural = "batches" if noun == "batch" else f"{noun}s"
    return f"{count:,} {noun if count == 1 else plural}"
