"""`kprep bench train`."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict

import click

from train.recipe import load_recipe


@click.command("train")
@click.argument("root")
@click.option("--recipe", default="resnet", show_default=True, metavar="NAME|FILE", help="Recipe.")
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE",
              help="Change one setting of the recipe.")  # fmt: skip
@click.option("--split", default="train", show_default=True, help="Split to train on.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda, if there is one."
)
@click.option("--steps", type=click.IntRange(min=1), default=20, show_default=True,
              help="Measured steps of each contender and round.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True,
              help="Rounds.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def bench_train_command(
    root: str,
    recipe: str,
    overrides: tuple[str, ...],
    split: str,
    device: str | None,
    steps: int,
    rounds: int,
    *,
    as_json: bool,
) -> None:
    """Measure training on ROOT beside the network alone and the loader alone, in turns.

    Is the GPU waiting? The network alone trains on clips that stay on the device; the loader alone
    throws its batches away; training is both. One process, nothing is written.

    \b
    Examples:
      kprep bench train dataset/ --recipe resnet --set model.name=r3d_18
      kprep bench train dataset/ --recipe tiny --steps 5
    """
    loaded = load_recipe(recipe, overrides)
    from train.bench import (
        bench_train,
        table,
    )  # imports torch, which reading a recipe does not need

    bench = bench_train(loaded, root, split=split, steps=steps, rounds=rounds, device=device)
    head = {"bench": "train", "root": root, "split": split, "recipe": loaded.name,
            "model": loaded.model.name, "batch": loaded.data.batch_size,
            "workers": loaded.data.workers, "precision": loaded.run.precision,
            "steps": steps, "rounds": rounds, "cores": len(os.sched_getaffinity(0)),
            "machine": platform.machine()}  # fmt: skip
    if as_json:
        click.echo(json.dumps({**head, **asdict(bench)}, indent=1))
        return
    click.echo(
        f"{root}, split {split}: {loaded.model.name}, batch {loaded.data.batch_size}, "
        f"{loaded.data.workers} workers, {loaded.run.precision}, {steps} steps x {rounds} rounds; "
        f"{bench.device}, {head['cores']} cores, {head['machine']}\n"
    )
    click.echo("\n".join(table(bench)))
