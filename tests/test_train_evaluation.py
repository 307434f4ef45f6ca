from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prep.errors import KprepError, UsageError
from stream import ClipBatch
from train.distributed import World, joined_world
from train.evaluation import (
    Scores,
    count_hits,
    evaluate,
    keys_to_tensor,
    tensor_to_keys,
)
from train.launch import launch
from train.recipe import load_recipe

CPU = World(0, 1, torch.device("cpu"), None)


def _scores(rows: list[tuple[str, int, int, list[float]]]) -> Scores:
    return Scores(
        key=[row[0] for row in rows],
        view=torch.tensor([row[1] for row in rows], dtype=torch.int64),
        label=torch.tensor([row[2] for row in rows], dtype=torch.int64),
        probability=torch.tensor([row[3] for row in rows], dtype=torch.float32).reshape(
            len(rows), -1
        ),
    )


def test_clips_and_videos_are_counted_by_hand() -> None:
    # video a (label 0): one clip right, one wrong; their mean is (0.55, 0.45): right.
    # video b (label 2): both wrong.
    rows = [
        ("a", 0, 0, [0.8, 0.1, 0.1]),
        ("a", 1, 0, [0.3, 0.6, 0.1]),
        ("b", 0, 2, [0.5, 0.3, 0.2]),
        ("b", 1, 2, [0.2, 0.5, 0.3]),
    ]
    result = count_hits([_scores(rows)], "by hand", ["short"])
    assert (result.clip_top1, result.video_top1) == (0.25, 0.5)
    assert (result.clip_top5, result.video_top5) == (1, 1)  # 3 classes: the best 3 are all
    assert (result.clips, result.videos, result.unscored) == (4, 2, ["short"])
    assert "by hand" in str(result)
    assert "1 not scored" in str(result)


def test_top5_counts_the_best_five() -> None:
    probability = [0.3, 0.2, 0.15, 0.12, 0.1, 0.08, 0.05]
    rows = [(f"v{label}", 0, label, probability) for label in range(7)]
    result = count_hits([_scores(rows)], "", [])
    assert result.video_top5 == pytest.approx(5 / 7)
    assert result.video_top1 == pytest.approx(1 / 7)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_the_split_over_ranks_does_not_matter(data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    rows = [
        (f"v{video}", view, video % 3, torch.rand(3, generator=generator).tolist())
        for video in range(5)
        for view in range(2)
    ]
    whole = count_hits([_scores(rows)], "", [])
    cut = data.draw(st.integers(1, 9))
    shuffled = data.draw(st.permutations(rows))
    assert count_hits([_scores(shuffled[:cut]), _scores(shuffled[cut:])], "", []) == whole


def test_repeats_and_missing_labels_are_not_counted_silently() -> None:
    row = ("a", 0, 0, [0.8, 0.2])
    with pytest.raises(KprepError, match=r"clip a \(view 0\) was scored twice"):
        count_hits([_scores([row]), _scores([row])], "", [])
    unlabeled = ("b", 0, -1, [0.9, 0.1])
    result = count_hits([_scores([row, unlabeled])], "", [])
    assert (result.videos, result.unlabeled, result.video_top1) == (1, 1, 1)
    with pytest.raises(UsageError, match="labels"):
        count_hits([_scores([unlabeled])], "", [])


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))))
def test_keys_survive_as_tensors(keys: list[str]) -> None:
    tensor = keys_to_tensor(keys)
    wider = torch.zeros(len(keys), tensor.shape[1] + 3, dtype=torch.uint8)
    wider[:, : tensor.shape[1]] = tensor
    assert tensor_to_keys(tensor) == tensor_to_keys(wider) == keys


class _Brightness(nn.Module):
    """Knows the answer: class k has brightness k; counts what its BatchNorm holds as an offset."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        level = (clips.mean(dim=(1, 2, 3, 4)) * 0.25 + 0.5) * 255 / 20
        offset = self.norm.running_mean
        return -((level[:, None] + offset - torch.arange(4)) ** 2)


RECIPE = load_recipe("tiny")


def _batch(numbers: list[int]) -> ClipBatch:
    """Clips whose brightness says their label, except that number 3 is labelled wrongly."""
    labels = [number % 4 if number != 3 else 0 for number in numbers]
    levels = torch.tensor([number % 4 * 20 for number in numbers], dtype=torch.uint8)
    count = len(numbers)
    return ClipBatch(
        video=levels.view(count, 1, 1, 1, 1).expand(count, 2, 40, 40, 3).contiguous(),
        size=torch.full((count, 2), 40),
        label=torch.tensor(labels),
        key=[f"video{number}" for number in numbers],
        start_frame=torch.zeros(count, dtype=torch.int64),
        view=torch.zeros(count, dtype=torch.int64),
        layout="rgb",
    )


def test_evaluation_scores_every_clip_and_restores_the_mode() -> None:
    model = _Brightness().train()
    batches = [_batch([0, 1, 2]), _batch([3, 4])]
    result = evaluate(model, batches, RECIPE, CPU, num_classes=4, unscored=["z", "y"])
    assert (result.video_top1, result.videos) == (0.8, 5)
    assert result.unscored == ["y", "z"]
    assert result.protocol == "2 x 8 frames @ 7.5 fps, even placement, centre crop"
    assert model.training
    assert model.norm.training


def _evaluate_unevenly(folder: str) -> None:
    """Rank 0 has three batches, rank 1 none, and rank 1's BatchNorm statistics are off."""
    with joined_world("cpu") as world:
        model = _Brightness()
        if world.rank == 1:
            model.norm.running_mean += 1000
        slices = {0: [_batch([0, 1]), _batch([2, 3]), _batch([4])], 1: [], 2: [_batch([5])]}
        result = evaluate(model, slices[world.rank], RECIPE, world, num_classes=4)
        assert float(model.norm.running_mean) == 0
        Path(folder, str(world.rank)).write_text(repr(result))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_ranks_with_uneven_slices_agree_on_one_exact_result(tmp_path: Path) -> None:
    launch(3, _evaluate_unevenly, str(tmp_path))
    results = {path.read_text() for path in tmp_path.iterdir()}
    alone = evaluate(_Brightness(), [_batch([0, 1, 2, 3, 4, 5])], RECIPE, CPU, num_classes=4)
    assert results == {repr(alone)}
    assert alone.video_top1 == pytest.approx(5 / 6)
