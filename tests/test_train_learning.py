"""Does training here learn as well as a plain PyTorch loop, with the same network and videos?

The loop is what one would write without kprep: PyAV on the source files, torchvision's transforms
and schedulers, clips drawn by PyTorch's generator. It shares the network and the numbers of the
recipe, and no code.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import av
import pytest
import torch
from conftest import run_kprep
from torch.optim.lr_scheduler import LinearLR, MultiStepLR, SequentialLR
from torchvision import transforms as tv

from train import load_recipe, train
from train.models import tiny

if TYPE_CHECKING:
    from pathlib import Path

    from train.recipe import Recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("one_thread")]
STORED_FPS = 15


@dataclass
class Videos:
    """Decoded class folders: uint8 (T, 3, h, w) at 15 frames a second, and their labels."""

    frames: list[torch.Tensor]
    labels: list[int]


def _read_folders(folder: Path, size: tuple[int, int]) -> Videos:
    """Decode all videos below class folders, squashed to `size`; broken files are passed over."""
    found = Videos([], [])
    resize = tv.Resize(size, antialias=False)
    for label, class_folder in enumerate(
        sorted(path for path in folder.iterdir() if path.is_dir())
    ):
        for path in sorted(class_folder.iterdir()):
            try:
                with av.open(str(path)) as container:
                    step = float(container.streams.video[0].average_rate) / STORED_FPS
                    frames = [
                        frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)
                    ]
            except (av.error.FFmpegError, IndexError, OSError):
                continue
            chosen = [frames[int(i * step)] for i in range(int(len(frames) / step))]
            clip = torch.stack([torch.from_numpy(frame).permute(2, 0, 1) for frame in chosen])
            found.frames.append(resize(clip))
            found.labels.append(label)
    return found


def _clip(video: torch.Tensor, start: int, recipe: Recipe) -> torch.Tensor:
    step = STORED_FPS / recipe.data.fps
    return video[[start + int(i * step) for i in range(recipe.data.frames)]]


def _starts(video: torch.Tensor, recipe: Recipe) -> int:
    return len(video) - int((recipe.data.frames - 1) * STORED_FPS / recipe.data.fps)


def _preset(recipe: Recipe, crop: torch.nn.Module) -> tv.Compose:
    return tv.Compose(
        [tv.ConvertImageDtype(torch.float32), tv.Normalize(recipe.augment.mean, recipe.augment.std), crop]
    )  # fmt: skip


def _plain_training(videos: Videos, num_classes: int, recipe: Recipe) -> torch.nn.Module:
    optim, plan = recipe.optim, recipe.schedule
    model = tiny(num_classes).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=optim.lr, betas=(0.9, optim.beta2), weight_decay=optim.weight_decay
    )
    views = len(videos.frames) * recipe.data.clips_per_video
    steps = views // recipe.data.batch_size
    warm = int(plan.warmup_epochs * steps)
    linear = LinearLR(optimizer, start_factor=plan.warmup_factor, total_iters=warm)
    after = MultiStepLR(optimizer, [int(m * steps) - warm for m in plan.milestones], plan.gamma)
    scheduler = SequentialLR(optimizer, [linear, after], milestones=[warm])
    transform = _preset(recipe, tv.RandomCrop(recipe.augment.crop))
    for _ in range(plan.epochs):
        order = torch.randperm(views).tolist()
        for step in range(steps):
            chosen = [
                order[step * recipe.data.batch_size + i] % len(videos.frames)
                for i in range(recipe.data.batch_size)
            ]
            clips = []
            for number in chosen:
                video = videos.frames[number]
                start = int(torch.randint(_starts(video, recipe), ()))
                clips.append(transform(_clip(video, start, recipe)).permute(1, 0, 2, 3))
            labels = torch.tensor([videos.labels[number] for number in chosen])
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(torch.stack(clips)), labels).backward()
            optimizer.step()
            scheduler.step()
    return model.eval()


@torch.no_grad()
def _plain_accuracy(model: torch.nn.Module, videos: Videos, recipe: Recipe) -> float:
    transform = _preset(recipe, tv.CenterCrop(recipe.augment.crop))
    hits = 0
    for video, label in zip(videos.frames, videos.labels, strict=True):
        starts = torch.linspace(0, _starts(video, recipe) - 1, recipe.eval.clips_per_video)
        clips = [
            transform(_clip(video, int(start), recipe)).permute(1, 0, 2, 3) for start in starts
        ]
        hits += int(model(torch.stack(clips)).softmax(1).mean(0).argmax()) == label
    return hits / len(videos.frames)


def _plain(train_folder: Path, val_folder: Path, recipe: Recipe) -> float:
    torch.manual_seed(0)
    seen = _read_folders(train_folder, recipe.augment.resize)
    unseen = _read_folders(val_folder, recipe.augment.resize)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR uses a deprecated argument of its own
        model = _plain_training(seen, len(set(seen.labels)), recipe)
    return _plain_accuracy(model, unseen, recipe)


def test_generated_motion_is_generalised_as_well_as_by_a_plain_loop(
    motion_videos: Path, motion_dataset: Path, tmp_path: Path
) -> None:
    """Four directions, told from videos never seen; one video of 40 is the measure's grain."""
    recipe = load_recipe("tiny", ["schedule.epochs=12", "schedule.milestones=[8, 10]"])
    metrics = train(recipe, motion_dataset, tmp_path / "run", device="cpu")
    plain = _plain(motion_videos / "train", motion_videos / "val", recipe)
    assert metrics["video_top1"] > 0.9
    assert metrics["video_top1"] >= plain - 1 / 40


def test_real_words_are_memorised_as_well_as_by_a_plain_loop(corpus: Path, tmp_path: Path) -> None:
    """Twelve signed words, one real video of each: a network that learns knows them all by heart."""
    source, root = corpus / "actions/asl_words", tmp_path / "data"
    run_kprep("shard", source, root, "--split", "train", "--profile", "small")
    recipe = load_recipe("tiny", [
        "data.batch_size=12", "data.clips_per_video=4", "optim.lr=0.005", "optim.lr_batch=12",
        "schedule.epochs=30", "schedule.milestones=[25]", "augment.resize=[29, 38]",
        "augment.crop=[28, 36]", "eval.every_epochs=30",
    ])  # fmt: skip
    metrics = train(recipe, root, tmp_path / "run", val_split="train", device="cpu")
    plain = _plain(source, source, recipe)
    assert metrics["video_top1"] >= plain
    assert metrics["video_top1"] == 1.0  # chance is 1/12
