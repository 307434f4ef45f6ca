"""Evaluation after real training steps, on one, two and three ranks: the same to the last row."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest
from conftest import run_kprep
from stream_datasets import make_dataset

from stream import clip_loader
from train import load_recipe, train
from train.checkpoint import load_checkpoint
from train.launch import launch

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SETTINGS = ("data.workers=0", "data.batch_size=4", "schedule.epochs=1", "augment.resize=[24, 32]",
            "augment.crop=[24, 24]", "eval.crops=3", "eval.frames=9", "schedule.warmup_epochs=0")  # fmt: skip
DAMAGED_ROW, ANOTHER_ROW = (
    18,
    3,
)  # the one is in the second half of the split, the other in the first


def _run(data: str, output: str, test: str | None, settings: tuple[str, ...]) -> None:
    recipe = load_recipe("tiny", [*SETTINGS, *settings])
    train(recipe, data, output, val_split="train", device="cpu", resume=test, test_only=bool(test))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dataset of 24 videos, one of them too short, and a run of two ranks with plain BatchNorm."""
    folder = tmp_path_factory.mktemp("ranks")
    data = make_dataset(folder)
    launch(2, _run, str(data), str(folder / "run"), None, ())
    model = load_checkpoint(folder / "run/final.pt").model
    assert any("running_var" in name and float(model[name].std()) > 0 for name in model)
    return data, folder / "run"


def _found(directory: Path) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    summary = json.loads((directory / "summary.json").read_text())
    rows = pq.read_table(directory / "videos.parquet").to_pylist()
    return summary, rows, (directory / "confusion.csv").read_text()


def _assert_same(one: Path, other: Path) -> None:
    (summary, rows, matrix), (wanted, wanted_rows, wanted_matrix) = _found(one), _found(other)
    assert matrix == wanted_matrix
    for name, value in wanted.items():
        same = pytest.approx(value, abs=1e-6) if isinstance(value, float) else value
        assert summary[name] == same, name
    assert len(rows) == len(wanted_rows)
    for row, wanted_row in zip(rows, wanted_rows, strict=True):
        close = pytest.approx(wanted_row.pop("probabilities"), abs=1e-6)
        assert row.pop("probabilities") == close
        assert row == wanted_row


def _damaged_copy(data: Path, target: Path, row: int = DAMAGED_ROW) -> tuple[Path, str]:
    """Flip a bit in the first group of pictures of one clip; return the root and the clip's key."""
    shutil.copytree(data, target)
    loader = clip_loader(str(target), split="train", batch_size=1, mode="eval", frames=9, fps="7.5")
    clip = loader.stream.index.clip(int(loader.stream.rows[row]))
    shard = target / clip.shard
    content = bytearray(shard.read_bytes())
    content[clip.video_offset + int(clip.gop_offsets[0]) + 40] ^= 1
    shard.write_bytes(content)
    return target, clip.key


# 23 videos of two clips each: batches of 30 on three ranks are 30, 16 and none, of 7 on two ranks
# 25 and 21 and they cut videos in two
TOPOLOGIES = [(2, "eval.batch_size=7"), (3, "eval.batch_size=30"), (3, "eval.batch_size=1")]


def test_ranks_find_the_same_videos_scores_and_confusions(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    data, run = trained
    final = str(run / "final.pt")
    _run(str(data), str(tmp_path / "alone"), final, ())
    alone = tmp_path / "alone/evaluation/test-train-final"
    summary, rows, _ = _found(alone)
    assert len({row["key"] for row in rows}) == len(rows) == summary["videos"] == 23
    assert summary["clips"] == 46
    assert len(summary["unscored"]) == 1  # the short one
    assert summary["protocol"].startswith(
        "2 x 9 frames @ 7.5 fps, even placement, resized to 24x32, 3"
    )
    assert (alone / "report.html").exists()
    # two ranks, in the training run itself: what each rank's BatchNorm saw differs
    _assert_same(run / "evaluation/epoch-0001", alone)
    assert (run / "report.html").read_text().count("<svg") >= 3
    for number, (ranks, batch) in enumerate(TOPOLOGIES):
        launch(ranks, _run, str(data), str(tmp_path / str(number)), final, (batch,))
        _assert_same(tmp_path / str(number) / "evaluation/test-train-final", alone)


def test_damage_that_one_rank_meets_is_named_and_counted_the_same(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    """The first clip of a video is damaged, its second is not: the video is out, wherever it is cut."""
    data, key = _damaged_copy(trained[0], tmp_path / "data")
    final = str(trained[1] / "final.pt")
    _run(str(data), str(tmp_path / "alone"), final, ())
    alone = tmp_path / "alone/evaluation/test-train-final"
    summary, rows, _ = _found(alone)
    assert key in summary["unscored"]
    assert len(summary["unscored"]) == 2
    assert key not in [row["key"] for row in rows]
    assert (summary["videos"], summary["clips"]) == (22, 44)
    for number, (ranks, batch) in enumerate(TOPOLOGIES[:2]):
        launch(ranks, _run, str(data), str(tmp_path / str(number)), final, (batch,))
        _assert_same(tmp_path / str(number) / "evaluation/test-train-final", alone)


def test_more_damage_than_the_limit_ends_all_ranks_with_one_sentence(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    """Each of the two ranks meets one damaged video, which it alone would bear."""
    once, _ = _damaged_copy(trained[0], tmp_path / "once")
    data, _ = _damaged_copy(once, tmp_path / "data", ANOTHER_ROW)
    done = run_kprep(
        "train", "--data", data, "--recipe", "tiny", "--resume", trained[1] / "final.pt",
        "--test-only", "--val-split", "train", "--nproc", 2, "--output", tmp_path / "run",
        "--device", "cpu", "--set", "data.workers=0", "--set", "eval.bad_clip_limit=1",
        "--set", "eval.batch_size=24", "--set", "eval.clips_per_video=2",
        "--set", "augment.resize=[24, 32]", "--set", "augment.crop=[24, 24]",
        check=False, OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.returncode == 1
    assert "2 different clips are bad, more than bad_clip_limit (1)" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run/evaluation").exists()
