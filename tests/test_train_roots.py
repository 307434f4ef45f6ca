"""Training on several datasets, from buckets, and on damaged ones: as one user runs it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import run_kprep
from stream_datasets import make_dataset, make_other_dataset, relist

import train.run
from prep.errors import DatasetError, KprepError, UsageError
from stream import clip_loader
from stream.bad_clips import BadClip, BadClipSummary
from train import build_model, evaluate, load_recipe
from train.bad_clips import SharedBadClips
from train.checkpoint import load_checkpoint
from train.distributed import World, all_texts, joined_world
from train.launch import launch
from train.run import train as run_training
from train.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from s3_server import S3Server

    from stream import ClipBatch, ClipLoader

SMALL = ("data.frames=8", "data.clips_per_video=1", "data.workers=0", "data.batch_size=4", "schedule.epochs=2",
         "run.deterministic=true", "eval.batch_size=4")  # fmt: skip


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 clips of at least 8 frames, classes left and up; split train."""
    return make_dataset(tmp_path_factory.mktemp("first"), 12)


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 and 4 clips of another rate and size, classes Left, down and left; splits train and val."""
    return make_other_dataset(tmp_path_factory.mktemp("second"))


def _set(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def _lines(output: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def _train(output: Path, *data: object, **environment: str) -> str:
    roots = [word for root in data for word in ("--data", str(root))]
    done = run_kprep("train", *roots, "--recipe", "tiny", "--device", "cpu", "--output", output,
                     *_set(*SMALL), OMP_NUM_THREADS="1", **environment)  # fmt: skip
    return done.stdout


def _same_weights(one: Path, other: Path) -> None:
    models = [load_checkpoint(output / "final.pt").model for output in (one, other)]
    torch.testing.assert_close(models[0], models[1], rtol=0, atol=0)


# -- several roots -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_mixture_with_a_bucket_trains_the_weights_of_the_local_copies(
    first: Path, second: Path, s3: S3Server, tmp_path: Path
) -> None:
    url = s3.upload(second, "train-mixed")
    text = _train(tmp_path / "mixed", f"{first}@1.5", f"{url}@0.5", **s3.environment)
    _train(tmp_path / "local", f"{first}@1.5", f"{second}@0.5")
    _same_weights(tmp_path / "mixed", tmp_path / "local")
    # 18 and 6 draws: 6 steps of 4 an epoch; the first root has no split val
    assert _lines(tmp_path / "mixed", "train")[-1]["step"] == 12
    assert _lines(tmp_path / "mixed", "eval")[-1]["videos"] == 4
    saved = load_checkpoint(tmp_path / "mixed" / "final.pt")
    assert saved.class_names == ["left", "up", "Left", "down"]
    assert f"train 0/: {first}: 12 clips, weight 1.5: 18 draws an epoch" in text
    assert f"train 1/: {url}: 12 clips, weight 0.5: 6 draws an epoch" in text
    assert f"val 0/: {first}: left out, it has no split 'val'" in text
    assert "classes of 2 + 3, joined by name: 4" in text


@pytest.mark.slow
def test_a_bucket_trains_the_weights_of_the_local_copy(
    second: Path, s3: S3Server, tmp_path: Path
) -> None:
    url = s3.upload(second, "train-alone")
    text = _train(tmp_path / "bucket", url, **s3.environment)
    _train(tmp_path / "local", second)
    _same_weights(tmp_path / "bucket", tmp_path / "local")
    assert "train 0/" not in text


def test_a_resumed_mixture_equals_an_uninterrupted_one(
    first: Path, second: Path, tmp_path: Path
) -> None:
    data = [(first, "1.5"), (second, 0.5)]
    for name, resume, epochs in (("whole", None, 2), ("cut", None, 1), ("cut", "auto", 2)):
        recipe = load_recipe("tiny", [*SMALL, f"schedule.epochs={epochs}"])
        run_training(recipe, data, tmp_path / name, val_split=None, resume=resume, device="cpu")
    _same_weights(tmp_path / "whole", tmp_path / "cut")
    with pytest.raises(UsageError, match="cannot resume: weights was 3/2,1/2 and is 1,1/2 now"):
        run_training(
            load_recipe("tiny", [*SMALL, "schedule.epochs=3"]),
            [first, (second, 0.5)], tmp_path / "cut", val_split=None, resume="auto", device="cpu",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (["clips@0"], "weight (0) of clips must be a number above 0"),
        (["nowhere@1", "elsewhere"], "nowhere does not exist"),
        (["twice", "twice@2"], "twice is named twice; name it once, with a weight"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_sentence(
    tmp_path: Path, data: list[str], message: str
) -> None:
    roots = [word for root in data for word in ("--data", root)]
    done = run_kprep("train", *roots, "--recipe", "tiny", "--output", tmp_path / "run", check=False)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_clips_without_a_label_are_refused_before_the_first_step(
    first: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(first, tmp_path / "root")
    table = pq.read_table(root / "index/train.parquet")
    labels = table["label"].to_pylist()
    labels[3] = labels[9] = -1
    place = table.column_names.index("label")
    table = table.set_column(place, table.schema.field(place), pa.array(labels, pa.int32()))
    pq.write_table(table, root / "index/train.parquet")
    relist(root, "index/train.parquet")
    recipe = load_recipe("tiny", [*SMALL, "schedule.epochs=1"])
    with pytest.raises(DatasetError, match=f"2 clips without a label, {table['key'][3]} the first"):
        run_training(recipe, root, tmp_path / "run", val_split=None, device="cpu")
    assert not (tmp_path / "run").exists()

    def label(batch: ClipBatch) -> ClipBatch:
        return replace(batch, label=batch.label.clamp(min=0))

    labelled = {"val_split": None, "device": "cpu", "transform_batch": label}
    assert run_training(recipe, root, tmp_path / "run", **labelled)["steps"] == 3


_EVALUATED = [
    "data.frames=16", "data.fps=15", "data.short=skip", "eval.clips_per_video=1",
    "augment.resize=[16, 16]", "augment.crop=[16, 16]",
]  # fmt: skip
_CPU = World(0, 1, torch.device("cpu"), None)


def _eval_loader(root: Path, **change: Any) -> ClipLoader:
    options = {"split": "train", "mode": "eval", "batch_size": 6, "frames": 16, "fps": 15}
    return clip_loader(root, **{**options, **change})


def test_an_evaluation_asks_the_loader_what_it_is_not_told(first: Path) -> None:
    recipe = load_recipe("tiny", _EVALUATED)
    model, loader = build_model(recipe, 2), _eval_loader(first)
    accuracy, _ = evaluate(model, loader, recipe, _CPU, num_classes=2)
    assert (accuracy.videos, accuracy.unscored) == (11, loader.unscored)
    assert loader.num_videos == 12
    half = _eval_loader(first, rank=0, world_size=2)
    with pytest.raises(KprepError, match="5 of the split's 12 videos were neither scored nor"):
        evaluate(model, half, recipe, _CPU, num_classes=2)


@pytest.mark.parametrize(
    "change",
    [{"mode": "train"}, {"frames": 8}, {"fps": 7.5}, {"clips_per_video": 2},
     {"placement": "middle"}, {"short": "pad"}],
)  # fmt: skip
def test_an_evaluation_refuses_clips_of_another_protocol(
    first: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    """Its words, which stand beside the accuracy, would be of other clips."""
    recipe = load_recipe("tiny", _EVALUATED)
    loader = _eval_loader(first, **change)
    with pytest.raises(UsageError, match=f"the loader's {next(iter(change))} .* must be"):
        evaluate(torch.nn.Identity(), loader, recipe, _CPU, num_classes=2)
    with pytest.raises(UsageError, match=f"the loader's {next(iter(change))} .* must be"):
        Trainer(recipe, _CPU, None, loader, tmp_path).evaluate()


@pytest.mark.parametrize(
    "change",
    [{"mode": "eval"}, {"frames": 8}, {"fps": 7.5}, {"clips_per_video": 2}, {"short": "pad"},
     {"batch_size": 2}, {"accumulate": 2}],
)  # fmt: skip
def test_a_training_refuses_batches_that_its_recipe_does_not_say(
    first: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    """The recipe stands in every checkpoint, and would be of another training."""
    settings = [
        "data.frames=16",
        "data.fps=15",
        "data.short=skip",
        "data.batch_size=3",
        "data.clips_per_video=1",
    ]
    recipe = load_recipe("tiny", settings)
    options = {"split": "train", "batch_size": 3, "frames": 16, "fps": 15}
    Trainer(recipe, _CPU, clip_loader(first, **options), None, tmp_path)
    loader = clip_loader(first, **{**options, **change})
    with pytest.raises(UsageError, match=f"the training loader's {next(iter(change))} .* must be"):
        Trainer(recipe, _CPU, loader, None, tmp_path)


def test_a_video_that_a_rank_loses_is_missed_beside_those_too_short(
    first: Path, tmp_path: Path
) -> None:
    class Losing:
        """A loader whose last batch never comes."""

        def __init__(self) -> None:
            self._loader = clip_loader(
                first, split="train", frames=16, batch_size=1, mode="eval", short="skip"
            )

        def __getattr__(self, name: str) -> Any:
            return getattr(self._loader, name)

        def __iter__(self) -> Iterator[ClipBatch]:
            yield from islice(self._loader, self.num_clips - 1)

    recipe = load_recipe("tiny", _EVALUATED)
    loader = Losing()
    assert len(loader.unscored) == 1
    trainer = Trainer(recipe, _CPU, None, loader, tmp_path)
    with pytest.raises(KprepError, match="1 of the split's 12 videos were neither scored nor"):
        trainer.evaluate()


def test_every_stream_option_reaches_the_loaders(
    second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, dict[str, Any]] = {}

    def spy(*roots: Any, **options: Any) -> Any:
        seen[options["mode"]] = options
        return clip_loader(*roots, **options)

    monkeypatch.setattr(train.run, "clip_loader", spy)
    given = {
        "grouping": "together", "shuffle_block": 3, "prefetch_batches": 3, "cache_limit": "50MB",
        "cache_dir": str(tmp_path / "cache"), "storage_patience_seconds": 5.0,
        "bad_clips": "substitute", "bad_clip_limit": 7,
    }  # fmt: skip
    recipe = load_recipe(
        "tiny",
        [*SMALL, "schedule.epochs=1", *(f"data.{name}={value}" for name, value in given.items())],
    )
    run_training(recipe, second, tmp_path / "run", device="cpu")
    shared = ("prefetch_batches", "cache_dir", "cache_limit", "storage_patience_seconds")
    for mode in ("train", "eval"):
        assert {name: seen[mode][name] for name in shared} == {name: given[name] for name in shared}
    order = ("grouping", "shuffle_block", "bad_clips")
    assert {name: seen["train"][name] for name in order} == {name: given[name] for name in order}
    assert list((tmp_path / "cache").rglob("*.clip"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.cache_dir=/tmp/x", "data.cache_dir and data.cache_limit must be given together"),
        ("data.shuffle_block=0", "data.shuffle_block"),
        ("data.prefetch_batches=0", "data.prefetch_batches"),
        ("data.bad_clip_limit=-1", "data.bad_clip_limit"),
        ("data.storage_patience_seconds=-1", "data.storage_patience_seconds"),
        ("data.bad_clips=skip", "raise"),
    ],
)
def test_stream_options_of_no_use_are_refused(setting: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_recipe("tiny", [setting])


# -- what a run says of its data ------------------------------------------------------------------


@pytest.mark.parametrize(("recipe", "enlarged"), [("mvit", 224), ("s3d", 256), ("tiny", None)])
def test_clips_that_are_enlarged_are_said(
    first: Path, recipe: str, enlarged: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    few = load_recipe(
        recipe, ["data.frames=2", "data.batch_size=2", "data.workers=0", "eval.frames=2"]
    )
    with joined_world("cpu", 60) as world, caplog.at_level("INFO", logger="kprep"):
        train.run.training_loader(few, str(first), "train", world)
    if enlarged is None:
        assert not caplog.messages
        return
    table = pq.read_table(first / "index" / "train.parquet")
    least = min(map(min, zip(*(table[name].to_pylist() for name in ("height", "width")), strict=True)))  # fmt: skip
    said = f"12 of 12 clips are stored with a short side of {least} pixels or more, and enlarged to {enlarged}, "
    assert [line.startswith(said) for line in caplog.messages] == [True]


# -- bad clips -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged(second: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """The second dataset with a byte of each GOP altered in 5 of its 12 training clips, and their keys."""
    root = tmp_path_factory.mktemp("damaged") / "root"
    shutil.copytree(second, root)
    index = clip_loader(str(second), split="train", batch_size=1).stream.index
    keys = set()
    for row in range(0, 10, 2):
        clip = index.clip(row)
        data = bytearray((root / clip.shard).read_bytes())
        for offset in clip.gop_offsets[:-1]:
            data[clip.video_offset + int(offset) + 40] ^= 255
        (root / clip.shard).write_bytes(data)
        keys.add(clip.key)
    return root, keys


def _note(data: str, output: str, settings: tuple[str, ...]) -> None:
    """Train as one rank, and write down what its steps were made of and how it ended."""
    steps: list[list[str]] = []

    def keep(batch: ClipBatch) -> ClipBatch:
        steps.append(batch.key)
        return batch

    rank, error = os.environ["RANK"], ""
    recipe = load_recipe("tiny", [*SMALL, "data.batch_size=2", *settings])
    try:
        run_training(recipe, data, output, val_split=None, device="cpu", transform_batch=keep)
    except KprepError as caught:
        error = f"{type(caught).__name__}: {caught}"
    Path(output, f"rank-{rank}.json").write_text(json.dumps({"steps": steps, "error": error}))


def _ranks(output: Path) -> list[dict[str, Any]]:
    return [json.loads((output / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_substitutes_keep_two_ranks_in_step_and_are_accounted_for_together(
    damaged: tuple[Path, set[str]], tmp_path: Path
) -> None:
    root, keys = damaged
    output = tmp_path / "run"
    settings = ("data.bad_clips=substitute", "schedule.epochs=8", "data.workers=1")
    launch(2, _note, str(root), str(output), settings)
    ranks = _ranks(output)
    assert [rank["error"] for rank in ranks] == ["", ""]
    assert [len(rank["steps"]) for rank in ranks] == [24, 24]  # 8 epochs of 12 / (2 x 2) steps
    used = {key for rank in ranks for step in rank["steps"] for key in step}
    assert not used & keys
    assert {len(step) for rank in ranks for step in rank["steps"]} == {2}
    lines = _lines(output, "bad_clips")
    assert {clip["key"] for clip in lines[-1]["clips"]} == keys
    assert lines[-1]["different"] == 5
    # each of the 5 has its turn in each of 8 epochs; substitutes can be bad, too
    assert lines[-1]["occurrences"] >= 40
    named = [clip["key"] for line in lines[:-1] for clip in line["clips"]]
    assert sorted(named) == sorted(keys)  # each one when it was new, once
    assert all(clip["shard"].startswith("train/") for clip in lines[-1]["clips"])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_budget_that_only_both_ranks_together_exceed_ends_both_at_one_step(
    damaged: tuple[Path, set[str]], tmp_path: Path
) -> None:
    root, keys = damaged
    output = tmp_path / "run"
    settings = ("data.bad_clips=substitute", "data.bad_clip_limit=3", "schedule.epochs=8",
                "run.checkpoint_steps=0")  # fmt: skip
    launch(2, _note, str(root), str(output), settings)
    ranks = _ranks(output)
    assert ranks[0]["error"] == ranks[1]["error"]
    assert ranks[0]["error"].startswith("DatasetError: ")
    assert "different clips are bad, more than bad_clip_limit (3): " in ranks[0]["error"]
    steps = [len(rank["steps"]) for rank in ranks]
    assert steps[0] == steps[1] < 24
    line = _lines(output, "bad_clips")[-1]
    assert line["different"] in (4, 5)
    named = ranks[0]["error"].partition("(3): ")[2].partition(";")[0].split(", ")
    assert len(named) == line["different"]
    assert set(named) <= keys
    # the complete steps are saved: repaired, the run goes on from there
    saved = [load_checkpoint(path).step for path in sorted((output / "checkpoints").glob("*.pt"))]
    assert (saved[-1] if saved else 0) == steps[0]


def test_a_clip_that_two_ranks_meet_counts_once() -> None:
    clip = BadClip("a", "train/0.tar", 5, "train/0.tar: clip a is damaged")
    said, written = [], []
    shared = SharedBadClips(
        World(0, 1, torch.device("cpu"), None), 1,
        lambda text, *values: said.append(text % values),
        lambda kind, **values: written.append((kind, values)),
    )  # fmt: skip

    class Batch:
        bad_clips = (clip, clip)

    assert shared.note([Batch()]) == (2, 1)
    assert shared.agree(4, 2, step=7) is None  # another rank met it twice as well
    assert shared.note([Batch()]) == (2, 0)
    assert shared.agree(2, 0, step=8) is None
    assert said == ["bad clip 1 (of at most 1), replaced: train/0.tar: clip a is damaged"]
    shared.end(9)
    assert said[1:] == ["over all ranks: 1 bad clips, met 6 times: a"]
    assert [(kind, values["step"], values["occurrences"]) for kind, values in written] == [
        ("bad_clips", 7, 4), ("bad_clips", 9, 6),
    ]  # fmt: skip
    Batch.bad_clips = (clip._replace(key="b"),)
    assert shared.note([Batch()]) == (1, 1)
    error = shared.agree(1, 1, step=10)
    assert isinstance(error, DatasetError)
    assert "2 different clips are bad, more than bad_clip_limit (1): a, b; the last:" in str(error)


def test_a_summary_names_ten_at_most() -> None:
    summary = BadClipSummary(100)
    summary.add(BadClip(f"k{number:02d}", "s", 0, "r") for number in range(12))
    assert str(summary).endswith("k08, k09, …")
    assert summary.occurrences == 12


def _texts(folder: str) -> None:
    with joined_world("cpu") as world:
        found = [all_texts(world, "é" * world.rank), all_texts(world, "")]
        Path(folder, str(world.rank)).write_text(json.dumps(found))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_texts_of_all_ranks_reach_all_ranks(tmp_path: Path) -> None:
    launch(3, _texts, str(tmp_path))
    for rank in range(3):
        assert json.loads((tmp_path / str(rank)).read_text()) == [["", "é", "éé"], ["", "", ""]]
