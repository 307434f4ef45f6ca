"""The command `kprep train`. Importing this loads no torch, so that `--help` is quick."""

from __future__ import annotations

import json
import logging
import os
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from prep.errors import UsageError
from prep.write_errors import write_to_nowhere
from stream.roots import DataRoot
from train.launch import launch
from train.recipe import Recipe, load_recipe
from train.signals import InterruptedBySignalError, ending_at_once, ignore_further

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@dataclass(frozen=True)
class _Request:
    """What was asked for; travels to the processes of `--nproc`."""

    recipe: Recipe
    data: tuple[DataRoot, ...]
    output: Path
    train_split: str
    val_split: str | None
    resume: str | None
    weights: str | None
    device: str | None
    test_only: bool
    check_weights: str | None


@contextmanager
def _ending_by_signals() -> Iterator[None]:
    """Within the block SIGTERM and SIGUSR1 end the command with their exit code."""
    try:
        with ending_at_once():
            yield
    except InterruptedBySignalError:
        ignore_further()
        raise


@click.command("train")
@click.option(
    "--data",
    required=True,
    multiple=True,
    metavar="ROOT[@WEIGHT]",
    help="The dataset: a directory or a URL. Repeatable: all are trained on together, each clip "
    "WEIGHT times an epoch (default 1). A number behind the last '@' is always the weight: "
    "write a root whose name ends so as 'clips@2@1'.",
)
@click.option(
    "--recipe",
    metavar="NAME|FILE",
    help="resnet, s3d, mvit, swin3d, tiny, resnet_modern, s3d_modern, swin3d_modern, or a .toml.",
)
@click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Change one setting."
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Where checkpoints and metrics go.  [default: runs/NAME]",
)
@click.option(
    "--nproc", type=click.IntRange(min=1), metavar="N", help="Start N processes on this machine."
)
@click.option(
    "--resume", metavar="auto|PATH", help="Go on from DIR's newest checkpoint, or from this one."
)
@click.option(
    "--weights", metavar="NAME|FILE", help="Begin with torchvision's, or a file's, weights."
)
@click.option(
    "--freeze", multiple=True, metavar="PATTERN", help="Do not train these, such as 'layer1.*'."
)
@click.option("--train-split", default="train", show_default=True, metavar="SPLIT")
@click.option(
    "--val-split", default="val", show_default=True, metavar="SPLIT", help="'none': no evaluation."
)
@click.option("--epochs", type=int, metavar="N", help="The same as --set schedule.epochs=N.")
@click.option(
    "--profile", type=int, metavar="N", help="Write a trace of N steps to the output directory."
)
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda, if there is one."
)
@click.option("--test-only", is_flag=True, help="Evaluate --resume or --weights and stop.")
@click.option(
    "--check-weights",
    metavar="NAME",
    help="Evaluate weights that torchvision published, by their own protocol, and stop.",
)
@_ending_by_signals()
def train(
    *,
    data: tuple[str, ...],
    recipe: str | None,
    overrides: tuple[str, ...],
    output: Path | None,
    nproc: int | None,
    resume: str | None,
    weights: str | None,
    freeze: tuple[str, ...],
    train_split: str,
    val_split: str,
    epochs: int | None,
    profile: int | None,
    device: str | None,
    test_only: bool,
    check_weights: str | None,
) -> None:
    """Train a video classifier on a converted dataset.

    \b
    Examples:
      kprep train --data k400 --recipe resnet --nproc 8
      kprep train --data k400 --recipe resnet --set model.name=r3d_18 \\
        --output r3d --resume auto
      kprep train --data k400 --recipe resnet --resume runs/resnet --test-only
      kprep train --data k400 --check-weights R2Plus1D_18_Weights.KINETICS400_V1
      kprep train --data k400 --data s3://bucket/words@0.5 --recipe resnet \\
        --output runs/both

    Buckets take the usual AWS variables: AWS_ENDPOINT_URL, AWS_REGION,
    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY; AWS_SKIP_SIGNATURE=true for public ones.

    Under torchrun or srun, leave out --nproc: every process runs this command.
    """
    if epochs is not None:
        overrides = _added(overrides, f"--epochs {epochs}", "schedule.epochs", str(epochs))
    if profile is not None:
        overrides = _added(overrides, f"--profile {profile}", "run.profile_steps", str(profile))
    if freeze:
        overrides = _added(overrides, "--freeze", "model.freeze", json.dumps(freeze))
    if check_weights is not None:
        others = {"--recipe": recipe, "--resume": resume, "--weights": weights,
                  "--freeze": freeze, "--epochs": epochs, "--test-only": test_only,
                  "--profile": profile}  # fmt: skip
        loaded = _published(check_weights, overrides, val_split, others)
    elif recipe is None:
        raise UsageError("--recipe NAME|FILE is missing: what to train, such as resnet")
    else:
        loaded = load_recipe(recipe, overrides)
    request = _Request(
        recipe=loaded,
        data=tuple(_absolute(DataRoot.parse(text)) for text in data),
        output=(output or Path("runs") / loaded.name).absolute(),
        train_split=train_split,
        val_split=None if val_split == "none" else val_split,
        resume=resume,
        weights=weights,
        device=device,
        test_only=test_only,
        check_weights=check_weights,
    )
    _check_torch()
    if nproc is None:
        _run(request)
    else:
        _check_alone(nproc)
        launch(nproc, _run, request)


def _added(overrides: tuple[str, ...], option: str, key: str, value: str) -> tuple[str, ...]:
    """Return the overrides with an option's; UsageError when one gives its key another value."""
    for override in overrides:
        name, _, other = override.partition("=")
        if name.strip() == key and other.strip() != value:
            raise UsageError(f"{option} and --set {override} set the same; drop one of them")
    return (*overrides, f"{key}={value}")


def _check_alone(nproc: int) -> None:
    """Refuse to start processes from each of several tasks: those would be as many runs."""
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        tasks = os.environ.get(name, "")
        if tasks not in ("", "0", "1"):
            raise UsageError(
                f"--nproc {nproc} would start {nproc} processes from each of the {tasks} that "
                f"torchrun or srun started ({name}={tasks}), each time another run; leave out "
                f"--nproc, or unset {name} where each has a run of its own"
            )


def _published(
    name: str, overrides: tuple[str, ...], split: str, others: Mapping[str, object]
) -> Recipe:
    """Return the recipe of `--check-weights`; refuse options that would contradict it."""
    given = [option for option, value in others.items() if value]
    if given:
        raise UsageError(f"--check-weights brings its own protocol and weights; drop {given[0]}")
    if split == "none":
        raise UsageError("--check-weights needs an evaluation split; name one with --val-split")
    _check_torch()
    from train.published import published_recipe

    return published_recipe(name, overrides)


def _absolute(root: DataRoot) -> DataRoot:
    return root if "://" in root.root else replace(root, root=str(Path(root.root).absolute()))


def _check_torch() -> None:
    missing = [name for name in ("torch", "torchvision") if find_spec(name) is None]
    if missing:
        raise UsageError(f"training needs {' and '.join(missing)}: pip install 'kprep[train]'")


class _Echo(logging.Handler):
    """Write log messages to the terminal as they are."""

    def emit(self, record: logging.LogRecord) -> None:
        # named, since a bar stands in its place meanwhile, which click's own stdout reaches past
        try:
            click.echo(record.getMessage(), file=sys.stdout if sys.stdout.isatty() else None)
        except OSError as error:
            _go_on_without_output(error)


def _go_on_without_output(error: OSError) -> None:
    """Write to nowhere from here on: a run is worth more than its lines, which nobody gets."""
    write_to_nowhere()
    with suppress(OSError):
        click.echo(
            f"standard output cannot be written ({error.strerror}); the run goes on, and "
            "metrics.jsonl has its values",
            err=True,
        )


def _run(request: _Request) -> None:
    """Be one rank of the run."""
    from train.run import check_published
    from train.run import train as run_training

    logger = logging.getLogger("kprep")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _Echo) for handler in logger.handlers):
        logger.addHandler(_Echo())
    if request.check_weights is not None:
        check_published(
            request.check_weights,
            request.recipe,
            request.data,
            request.output,
            split=request.val_split or "",
            device=request.device,
        )
        return
    run_training(
        request.recipe,
        request.data,
        request.output,
        train_split=request.train_split,
        val_split=request.val_split,
        resume=request.resume,
        weights=request.weights,
        device=request.device,
        test_only=request.test_only,
    )
