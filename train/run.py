"""One call for a whole run: dataset in, trained network and metrics out."""

from __future__ import annotations

import re
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prep.errors import UsageError
from stream import clip_loader
from stream.clip_stream import check_all_labelled
from train.agreement import raising_together
from train.attempts import is_restarted
from train.check_weights import Comparison, check_weights
from train.checkpoint import checkpoints_in, find_checkpoint
from train.data_roots import describe_enlarged, describe_roots
from train.determinism import determinism
from train.distributed import World, broadcast_text, joined_world
from train.output_lock import output_lock
from train.progress import log
from train.published import find_published
from train.regroup import keep_global_batch
from train.signals import ending_at_once
from train.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stream.batch import ClipBatch
    from stream.loader import ClipLoader
    from stream.roots import RootLike, WeightedRootLike
    from train.loader import Loader
    from train.recipe import Recipe

    Roots = RootLike | Sequence[WeightedRootLike]

_COUNTED_OVER_ALL_RANKS = 2**62  # a loader knows the bad clips of its own rank only


def train(
    recipe: Recipe,
    data: Roots,
    output: str | Path,
    *,
    train_split: str = "train",
    val_split: str | None = "val",
    resume: str | None = None,
    weights: str | None = None,
    device: str | None = None,
    test_only: bool = False,
    transform_batch: Callable[[ClipBatch], ClipBatch] | None = None,
) -> dict[str, float]:
    """Train on a dataset, or only evaluate; called by every rank of a distributed run.

    Args:
        recipe: from `load_recipe`.
        data: root of the dataset: a directory, s3://, gs://, https:// or http://; or a list of
            roots and of (root, weight) pairs, see `stream.clip_loader`.
        output: directory for checkpoints and metrics.
        train_split: split to train on.
        val_split: split to evaluate; None evaluates nothing.
        resume: "auto" goes on from the newest checkpoint in `output`, if there is one; else a
            checkpoint, or a run's output directory. None starts from the beginning; that and
            another run's checkpoint are refused where `output` has checkpoints of its own. When
            torchrun or SLURM starts again what had begun to train into `output`, it is "auto".
        weights: to begin with, where there is no checkpoint to resume from: see `find_weights`.
        device: "cpu" or "cuda"; None takes CUDA where there is a GPU.
        test_only: evaluate the checkpoint named by `resume`, or `weights`; train nothing. The
            result goes to `output`/evaluation/.
        transform_batch: changes every decoded batch before augmentation.

    Returns:
        The final metrics: epochs, steps, loss, and clip and video top-1 and top-5 in [0, 1].

    Raises UsageError for what cannot be done as asked, DatasetError and StorageError for what is
    wrong with the dataset, and KprepError when training fails.
    """
    output = Path(output)
    with (
        ending_at_once(),
        joined_world(device, recipe.data.storage_patience_seconds) as world,
        determinism(recipe),
        nullcontext() if test_only else output_lock(output, world, resume),
    ):
        checkpoint = _checkpoint_to_load(resume, output, world, overwrites=not test_only)
        if test_only and val_split is None:
            raise UsageError("--test-only needs an evaluation split; name one with --val-split")
        if test_only and checkpoint is None and weights is None:
            raise UsageError(
                "--test-only needs a checkpoint; name one with --resume PATH or --weights NAME"
            )
        given = recipe
        if checkpoint is not None and not test_only:
            recipe = keep_global_batch(recipe, checkpoint, world)
        training = None
        if not test_only:
            training = training_loader(
                recipe, data, train_split, world, is_labelled=transform_batch is None
            )
        scored = _val_loader(recipe, data, val_split, world) if val_split else None
        trainer = Trainer(
            recipe, world, training, scored, output, transform_batch=transform_batch, given=given
        )
        if checkpoint is not None:
            trainer.restore(checkpoint, weights_only=test_only)
        elif weights is not None:
            trainer.start_from(weights)
        if not test_only:
            return trainer.fit()
        source = str(checkpoint or weights)
        return trainer.test(test_name(val_split or "", source), source)


def check_published(
    name: str,
    recipe: Recipe,
    data: Roots,
    output: str | Path,
    *,
    split: str = "val",
    device: str | None = None,
) -> Comparison:
    """Evaluate published weights on a split of a dataset; called by every rank.

    `recipe` comes from `published_recipe`, so that the protocol is that of the published accuracy.
    The result goes to `output`/evaluation/. Raises UsageError when the dataset has classes that
    the weights do not know, or the weights cannot be had.
    """
    with (
        ending_at_once(),
        joined_world(device, recipe.data.storage_patience_seconds) as world,
        determinism(recipe),
    ):
        loader = _val_loader(recipe, data, split, world)
        return check_weights(
            recipe, find_published(name), loader, Path(output), world, test_name(split, name)
        )


def test_name(split: str, source: str) -> str:
    """Return the name of the directory for an evaluation of `source` by itself.

    Such as "test-val-epoch-0007"; characters that no file name should have become "_".
    """
    stem = Path(source).stem if Path(source).suffix in (".pt", ".pth") else Path(source).name
    return re.sub(r"[^A-Za-z0-9._-]", "_", f"test-{split}-{stem}")


def _checkpoint_to_load(
    resume: str | None, output: Path, world: World, *, overwrites: bool
) -> Path | None:
    """Return the checkpoint to begin with; rank 0 looks, so that all ranks take the same one.

    Raises UsageError, on all ranks, where the output directory has those of another run.
    """
    found = None
    with raising_together(world):
        if world.is_first:
            found = _look_for_checkpoint(resume, output, overwrites=overwrites)
    shared = broadcast_text(world, str(found or ""))
    return Path(shared) if shared else None


def _look_for_checkpoint(resume: str | None, output: Path, *, overwrites: bool) -> Path | None:
    if overwrites and resume != "auto" and _goes_on_by_itself(output):
        resume = "auto"
    found = find_checkpoint(resume, output / "checkpoints") if resume is not None else None
    own = (output / "checkpoints").resolve()
    is_own = found is not None and found.parent.resolve().is_relative_to(own)
    if overwrites and not is_own and checkpoints_in(own):
        beside = f", and --resume {resume} is none of them" if found else ""
        raise UsageError(
            f"--output {output} has the checkpoints of an earlier run{beside}; go on with "
            "--resume auto, or choose another directory"
        )
    return found


def _goes_on_by_itself(output: Path) -> bool:
    """Return whether an earlier attempt of this launch left checkpoints."""
    goes_on = bool(checkpoints_in(output / "checkpoints")) and is_restarted(output)
    if goes_on:
        log.info("started again by torchrun or SLURM: going on as with --resume auto")
    return goes_on


def training_loader(
    recipe: Recipe, data: Roots, split: str, world: World, *, is_labelled: bool = True
) -> Loader:
    """Open a split for this rank's part of a training, as the recipe says.

    Raises DatasetError for a clip without a label, unless the labels come later (`is_labelled`).
    """
    loader = _loader(
        recipe,
        world,
        data,
        split,
        mode="train",
        frames=recipe.data.frames,
        clips_per_video=recipe.data.clips_per_video,
        batch_size=recipe.data.batch_size,
        accumulate=recipe.data.accumulate,
        grouping=recipe.data.grouping,
        shuffle_block=recipe.data.shuffle_block,
        bad_clips=recipe.data.bad_clips,
        bad_clip_limit=_COUNTED_OVER_ALL_RANKS,
    )
    if is_labelled:
        check_all_labelled(loader.stream)
    lines = describe_enlarged(loader.stream.index.sizes, recipe.augment)
    for line in lines if world.is_first else ():
        log.info("%s", line)
    return loader


def _val_loader(recipe: Recipe, data: Roots, split: str, world: World) -> Loader:
    return _loader(
        recipe,
        world,
        data,
        split,
        mode="eval",
        frames=recipe.eval_frames,
        clips_per_video=recipe.eval.clips_per_video,
        batch_size=recipe.eval.batch_size or recipe.data.batch_size,
        placement=recipe.eval.placement,
        bad_clips="substitute",  # which evaluation never does: they are left out and named
        bad_clip_limit=_COUNTED_OVER_ALL_RANKS,
    )


def _loader(
    recipe: Recipe, world: World, data: Roots, split: str, *, frames: int, **more: Any
) -> ClipLoader:
    """Make a loader with what training and evaluation have in common; say what it reads."""
    settings = recipe.data
    loader = clip_loader(
        data,
        split=split,
        frames=frames,
        fps=Fraction(str(settings.fps)),
        seed=recipe.run.seed,
        num_workers=settings.workers,
        rank=world.rank,
        world_size=world.size,
        layout=settings.layout,
        short=settings.short,
        pin_memory=world.device.type == "cuda",
        prefetch_batches=settings.prefetch_batches,
        cache_dir=settings.cache_dir or None,
        cache_limit=settings.cache_limit or None,
        storage_patience_seconds=settings.storage_patience_seconds,
        **more,
    )
    for line in describe_roots(loader, split) if world.is_first else ():
        log.info("%s", line)
    return loader
