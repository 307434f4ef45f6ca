"""`kprep bench`: how fast this machine streams and decodes this dataset."""

from __future__ import annotations

import json
import platform
from typing import TYPE_CHECKING, Any

import click

from prep.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

_COUNT = click.IntRange(min=1)


def _common(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that every bench has."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        click.option("--fps", default="15", show_default=True, help="Frames a second of a clip."),
        click.option("--frames", type=_COUNT, default=16, show_default=True, help="Frames a clip."),
        click.option("--split", help="Split to read; by default train, or the only one."),
    ):
        function = option(function)
    return function


@click.command("stream")
@click.argument("root")
@_common
@click.option("--batch", type=_COUNT, default=24, show_default=True, help="Clips a batch.")
@click.option(
    "--workers", type=click.IntRange(min=0), default=2, show_default=True, help="Loader workers."
)
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), default=10.0,
              show_default=True, help="Measured time of each contender.")  # fmt: skip
@click.option("--rounds", type=_COUNT, default=5, show_default=True, help="Rounds in that time.")
@click.option("--layout", type=click.Choice(["rgb", "yuv420"]), default="yuv420",
              show_default=True, help="Form of decoded clips.")  # fmt: skip
@click.option("--beside", multiple=True, metavar="ROOT",
              help="Another copy of the dataset to measure in turns. Repeatable.")  # fmt: skip
def stream_command(
    root: str, as_json: bool, split: str | None, beside: tuple[str, ...], **values: Any
) -> None:
    """Measure the loader on ROOT beside the same loader fed from memory, in turns.

    Shows clips and bytes a second, CPU time a clip, requests a clip, time to the first batch and
    memory. One GPU's share of the workers is what to measure with.

    \b
    Example:
      kprep bench stream s3://bucket/dataset --beside dataset/
    """
    from prep.storage import Storage
    from stream.bench import LoaderOptions, bench_loaders, memory_baseline, table
    from stream.options import StreamOptions
    from stream.rates import parse_rate

    storage = Storage(root)
    split = _split(storage, split)
    stream = StreamOptions(
        split,
        frames=values["frames"],
        fps=parse_rate(values["fps"]),
        layout=values["layout"],
    )
    baseline = memory_baseline(storage, split)
    storages: dict[str, Storage] = {"root": storage}
    for name in beside:
        storages[name] = _copy_of(storage, split, Storage(name))
    if baseline is not None:
        storages["memory"] = baseline
    results = bench_loaders(
        storages,
        LoaderOptions(stream, values["batch"], values["workers"]),
        seconds=values["seconds"],
        rounds=values["rounds"],
        baseline=None if baseline is None else "memory",
    )
    _show("stream", root, split, results, table(results), values, as_json=as_json)
    if baseline is None and not as_json:
        click.echo("no baseline in memory: the split has more than 4 GB")


@click.command("decode")
@click.argument("root")
@_common
@click.option("--clips", type=_COUNT, default=64, show_default=True, help="Clips to decode.")
@click.option("--rounds", type=_COUNT, default=7, show_default=True, help="Rounds over them.")
def decode_command(root: str, as_json: bool, split: str | None, **values: Any) -> None:
    """Measure decoding of ROOT's clips beside its floor: libavcodec's decode calls alone.

    The same views, from memory, in one thread: the floor, planar YUV (what the loader does), RGB,
    and through the mp4 container, in turns.
    """
    from prep.storage import Storage
    from stream.bench_decode import bench_decode, decode_samples, table
    from stream.rates import parse_rate

    storage = Storage(root)
    split = _split(storage, split)
    samples = decode_samples(
        storage,
        split,
        frames=values["frames"],
        fps=parse_rate(values["fps"]),
        clips=values["clips"],
    )
    results = bench_decode(samples, rounds=values["rounds"])
    values["clips"] = len(samples)
    _show("decode", root, split, results, table(results), values, as_json=as_json)


def _copy_of(storage: Any, split: str, other: Any) -> Any:
    """Return `other`; UsageError when its split does not hold the same clips."""
    from prep.format import read_manifest

    mine, theirs = (read_manifest(one).splits.get(split) for one in (storage, other))
    if mine is None or theirs is None or mine.fingerprint != theirs.fingerprint:
        raise UsageError(
            f"--beside {other.root} holds other clips in split {split} than {storage.root}; "
            "name a copy of it"
        )
    return other


def _split(storage: Any, split: str | None) -> str:
    """Return the split that is meant; UsageError when the root does not have it."""
    from prep.format import read_manifest

    manifest = read_manifest(storage)
    if split is None:
        split = next(iter(manifest.splits)) if len(manifest.splits) == 1 else "train"
    manifest.split(split, storage.root)
    return split


def _show(
    bench: str,
    root: str,
    split: str,
    results: dict[str, Any],
    lines: list[str],
    values: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    """Print what was measured, with what it was measured on."""
    import os
    from dataclasses import asdict

    machine = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine()}
    if as_json:
        found = {name: asdict(result) for name, result in results.items()}
        head = {"bench": bench, "root": root, "split": split, "options": values, **machine}
        click.echo(json.dumps({**head, "results": found}, indent=1))
        return
    shown = ", ".join(f"{name} {value}" for name, value in values.items())
    click.echo(f"{root}, split {split}: {shown}; {machine['cores']} cores, {machine['machine']}\n")
    click.echo("\n".join(lines))
