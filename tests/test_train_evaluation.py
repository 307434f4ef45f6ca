from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prep.errors import DatasetError, KprepError, UsageError
from stream import ClipBatch
from train.accuracy import Accuracy, count_hits, label_ranks
from train.distributed import World, joined_world
from train.evaluation import evaluate
from train.launch import launch
from train.protocol import protocol
from train.recipe import Recipe, load_recipe
from train.scores import Scores, VideoScores, keys_to_tensor, tensor_to_keys

if TYPE_CHECKING:
    from collections.abc import Iterator

CPU = World(0, 1, torch.device("cpu"), None)


def _recipe(clips: int = 1, **settings: object) -> Recipe:
    recipe = Recipe()
    return replace(recipe, eval=replace(recipe.eval, clips_per_video=clips, **settings))


def _scores(rows: list[tuple[str, int, int, list[float]]]) -> Scores:
    return Scores(
        key=[row[0] for row in rows],
        view=torch.tensor([row[1] for row in rows], dtype=torch.int64),
        label=torch.tensor([row[2] for row in rows], dtype=torch.int64),
        score=torch.tensor([row[3] for row in rows]).reshape(
            len(rows), len(rows[0][3]) if rows else 3
        ),
    )


def _count(
    rows: list[tuple[str, int, int, list[float]]],
    clips: int = 1,
    unscored: tuple[str, ...] = (),
    **settings: object,
) -> tuple[Accuracy, VideoScores]:
    return count_hits([_scores(rows)], _recipe(clips, **settings), "by hand", unscored)


# video a (label 0): one clip right, one wrong; their mean is (0.55, 0.35, 0.1): right.
# video b (label 2): both wrong.
BY_HAND = [
    ("a", 0, 0, [0.8, 0.1, 0.1]),
    ("a", 1, 0, [0.3, 0.6, 0.1]),
    ("b", 0, 2, [0.5, 0.3, 0.2]),
    ("b", 1, 2, [0.2, 0.5, 0.3]),
]


def test_clips_and_videos_are_counted_by_hand() -> None:
    result, videos = _count(BY_HAND, 2, ("short",))
    assert (result.clip_top1, result.video_top1, result.mean_class_top1) == (0.25, 0.5, 0.5)
    assert (result.clip_top5, result.video_top5) == (1, 1)  # 3 classes: the best 3 are all
    assert (result.clips, result.videos, result.unscored) == (4, 2, ["short"])
    assert "by hand" in str(result)
    assert "not scored: 1 (short)" in str(result)
    assert (videos.key, videos.label.tolist(), videos.prediction.tolist()) == (
        ["a", "b"],
        [0, 2],
        [0, 1],
    )
    wanted = torch.tensor([[0.55, 0.35, 0.1], [0.35, 0.4, 0.25]]).double()
    torch.testing.assert_close(videos.probability, wanted, rtol=0, atol=1e-7)


def test_top5_counts_the_best_five() -> None:
    probability = [0.3, 0.2, 0.15, 0.12, 0.1, 0.08, 0.05]
    result, _ = _count([(f"v{label}", 0, label, probability) for label in range(7)])
    assert result.video_top5 == pytest.approx(5 / 7)
    assert result.video_top1 == result.mean_class_top1 == pytest.approx(1 / 7)


def test_the_mean_of_the_classes_weighs_classes_alike() -> None:
    rows = [(f"v{number}", 0, 0, [0.9, 0.1, 0.0]) for number in range(3)]
    result, _ = _count([*rows, ("w", 0, 1, [0.9, 0.1, 0.0])])  # class 2 does not occur
    assert (result.video_top1, result.mean_class_top1) == (0.75, 0.5)


def test_equal_scores_stand_in_class_order() -> None:
    scores, labels = torch.tensor([[0.25] * 4] * 4), torch.arange(4)
    assert label_ranks(scores, labels).tolist() == [0, 1, 2, 3]
    _, videos = _count([("a", 0, 2, [0.1, 0.4, 0.4, 0.1])])
    assert videos.prediction.tolist() == [1]
    assert label_ranks(videos.probability, videos.label).tolist() == [1]


@given(st.integers(1, 8), st.integers(1, 40), st.integers(0, 10_000))
def test_ranks_are_places_in_a_stable_sort(classes: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (rows, classes), generator=generator).float()  # with ties
    labels = torch.randint(0, classes, (rows,), generator=generator)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    wanted = (order == labels[:, None]).int().argmax(dim=1)
    assert label_ranks(scores, labels).tolist() == wanted.tolist()


def test_averaged_logits_are_not_averaged_probabilities() -> None:
    # one clip is very sure of class 0, two are a little for class 1
    logits = [[9.0, 0.0], [0.0, 2.0], [0.0, 2.0]]
    by_logits, videos = _count(
        [("a", v, 0, row) for v, row in enumerate(logits)], 3, average="logits"
    )
    assert by_logits.video_top1 == 1
    mean = torch.tensor([[3.0, 4 / 3]]).double()
    torch.testing.assert_close(videos.probability, mean.softmax(dim=1), rtol=0, atol=1e-7)
    shares = torch.tensor(logits).softmax(dim=1).tolist()
    by_shares, _ = _count([("a", v, 0, row) for v, row in enumerate(shares)], 3)
    assert by_shares.video_top1 == 0


def test_a_video_that_lacks_a_clip_is_named_and_none_of_its_clips_counts() -> None:
    result, videos = _count([*BY_HAND, ("c", 1, 0, [0.9, 0.1, 0.0])], 2, ("d",))
    whole, _ = _count(BY_HAND, 2)
    assert result == replace(whole, unscored=["c", "d"])
    assert videos.key == ["a", "b"]
    assert "not scored: 2 (c, d)" in str(result)
    again, _ = _count(BY_HAND, 2, ("a", "d"))  # a was damaged in an earlier epoch
    assert again == replace(whole, unscored=["d"])


@settings(max_examples=30)
@given(data=st.data())
def test_the_split_over_ranks_does_not_matter(data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    rows = [
        (f"v{video}", view, video % 3, torch.rand(3, generator=generator).tolist())
        for video in range(5)
        for view in range(2)
    ]
    whole, videos = _count(rows, 2)
    cut = data.draw(st.integers(0, 10))
    shuffled = data.draw(st.permutations(rows))
    parts = [_scores(shuffled[:cut]), _scores(shuffled[cut:])]
    result, other = count_hits(parts, _recipe(2), "by hand", ())
    assert result == whole
    assert other.key == videos.key
    assert torch.equal(other.probability, videos.probability)


def test_repeats_and_missing_labels_are_not_counted_silently() -> None:
    row = ("a", 0, 0, [0.8, 0.2])
    with pytest.raises(KprepError, match=r"clip a \(view 0\) was scored twice"):
        count_hits([_scores([row]), _scores([row])], _recipe(), "", ())
    unlabeled = ("b", 0, -1, [0.9, 0.1])
    result, videos = _count([row, unlabeled])
    assert (result.videos, result.unlabeled, result.video_top1) == (1, 1, 1)
    assert videos.key == ["a", "b"]
    with pytest.raises(UsageError, match="2 were not scored, 1 of them for want of all 2 clips"):
        _count([row], 2, ("short",))
    with pytest.raises(UsageError, match="1 have none, 2 were not scored"):
        _count([unlabeled], 1, ("y", "z"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_never_a_hit(value: float) -> None:
    with pytest.raises(KprepError, match="scores of 1 clips are not finite, of b the first"):
        _count([("a", 0, 0, [0.8, 0.2]), ("b", 0, 0, [value, 0.2])])


def test_a_label_that_is_no_class_is_refused() -> None:
    with pytest.raises(DatasetError, match="clip a has label 2 of 2 classes"):
        _count([("a", 0, 2, [0.8, 0.2])])


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))))
def test_keys_survive_as_tensors(keys: list[str]) -> None:
    tensor = keys_to_tensor(keys)
    wider = torch.zeros(len(keys), tensor.shape[1] + 3, dtype=torch.uint8)
    wider[:, : tensor.shape[1]] = tensor
    assert tensor_to_keys(tensor) == tensor_to_keys(wider) == keys


def test_the_protocol_says_all_that_changes_the_number() -> None:
    recipe = load_recipe("resnet")
    assert protocol(recipe) == (
        "5 x 16 frames @ 15 fps, torchvision placement, resized to 128x171, "
        "centre crop 112x112, averaged probabilities"
    )
    changes = ["eval.crops=3", "eval.average=logits", "eval.placement=middle", "data.short=pad",
               "run.precision=bf16", "eval.frames=8", "eval.clips_per_video=2",
               "data.fps=7.5", "augment.crop=[96, 96]", "augment.resize=[112, 150]"]  # fmt: skip
    assert len({protocol(load_recipe("resnet", [change])) for change in changes}) == len(changes)
    assert protocol(recipe, is_averaged=True) == protocol(recipe) + ", averaged weights"
    assert "3 crops 112x112, averaged logits" in protocol(load_recipe("resnet", changes[:2]))
    with pytest.raises(UsageError, match="eval.crops=3 needs augment.resize"):
        load_recipe("resnet", ["eval.crops=3", "augment.crop=[128, 171]"])


class _Brightness(nn.Module):
    """Knows the answer: class k has brightness k; counts what its BatchNorm holds as an offset."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        level = (clips.mean(dim=(1, 2, 3, 4)) * 0.25 + 0.5) * 255 / 20
        offset = self.norm.running_mean
        return -((level[:, None] + offset - torch.arange(4)) ** 2)


RECIPE = load_recipe("tiny", ["eval.clips_per_video=1"])


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
    unscored: list[str] = []

    def found() -> list[str]:
        return ["z", *unscored]

    def read(batches: list[ClipBatch]) -> Iterator[ClipBatch]:
        yield from batches
        unscored.append("y")  # damage is found while reading

    result, videos = evaluate(
        model, read(batches), RECIPE, CPU, num_classes=4, unscored=found, num_videos=7
    )
    assert (result.video_top1, result.videos) == (0.8, 5)
    assert result.unscored == ["y", "z"]
    assert result.protocol.startswith("1 x 8 frames @ 7.5 fps, even placement, resized to 40x40")
    assert videos is not None
    assert videos.prediction.tolist() == [0, 1, 2, 3, 0]
    assert model.training
    assert model.norm.training
    with pytest.raises(KprepError, match="2 of the split's 7 videos were neither scored nor"):
        evaluate(model, batches, RECIPE, CPU, num_classes=4, num_videos=7)


class _Growing(nn.Module):
    """Keeps a table over time that grows when a longer clip comes, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        self.table = torch.empty(0)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        if len(self.table) < clips.shape[2]:
            self.table = torch.linspace(0, 1, clips.shape[2])
        levels = clips.mean(dim=(1, 3, 4)) * self.table[: clips.shape[2]]
        return levels.sum(dim=1, keepdim=True) * self.gain * self.table[1]


def test_what_a_network_keeps_of_an_evaluation_can_be_trained_with() -> None:
    model = _Growing()
    evaluate(model, [_batch([0, 1])], RECIPE, CPU, num_classes=4)
    assert len(model.table) == 2
    model(torch.ones(1, 3, 2, 8, 8)).sum().backward()
    assert model.gain.grad is not None


def _evaluate_unevenly(folder: str) -> None:
    """Rank 0 has three batches, rank 1 none, and rank 1's BatchNorm statistics are off."""
    with joined_world("cpu") as world:
        model = _Brightness()
        if world.rank == 1:
            model.norm.running_mean += 1000
        slices = {0: [_batch([0, 1]), _batch([2, 3]), _batch([4])], 1: [], 2: [_batch([5])]}
        result, videos = evaluate(
            model, slices[world.rank], RECIPE, world, num_classes=4,
            unscored=lambda: ["short", f"bad on {world.rank}"], num_videos=10,
        )  # fmt: skip
        assert float(model.norm.running_mean) == 0
        assert (videos is None) == (world.rank > 0)
        Path(folder, str(world.rank)).write_text(repr(result))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_ranks_with_uneven_slices_agree_on_one_exact_result(tmp_path: Path) -> None:
    launch(3, _evaluate_unevenly, str(tmp_path))
    results = {path.read_text() for path in tmp_path.iterdir()}
    unscored = ["bad on 0", "bad on 1", "bad on 2", "short"]
    alone, _ = evaluate(
        _Brightness(), [_batch([0, 1, 2, 3, 4, 5])], RECIPE, CPU, num_classes=4,
        unscored=lambda: unscored,
    )  # fmt: skip
    assert results == {repr(alone)}
    assert alone.video_top1 == pytest.approx(5 / 6)
    assert alone.unscored == unscored


def _score_twice(folder: str) -> None:
    with joined_world("cpu") as world:
        try:
            evaluate(_Brightness(), [_batch([world.rank // 2])], RECIPE, world, num_classes=4)
        except KprepError as error:
            Path(folder, str(world.rank)).write_text(str(error))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_what_rank_0_finds_while_counting_ends_all_ranks(tmp_path: Path) -> None:
    launch(3, _score_twice, str(tmp_path))
    texts = [path.read_text() for path in tmp_path.iterdir()]
    assert len(texts) == 3
    assert all("clip video0 (view 0) was scored twice" in text for text in texts)
