"""How to load a dataset with each of the five readers: the last part of the dataset card."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_USUAL_FPS = Fraction(15)

_SNIPPETS = {
    "kprep": """\
from stream import clip_loader

loader = clip_loader(ROOT, split="{split}", frames=16, fps={fps}, batch_size=8)
for batch in loader:  # video uint8 (N, T, H, W, 3), label int64, key, start_frame, view
    height, width = batch.size[0].tolist()  # of the first clip; zeros fill the rest up to H and W
    print(batch.key, batch.video[0, :, :height, :width].shape, batch.label)
    break
""",
    "webdataset": """\
import glob
import json

import webdataset

shards = sorted(glob.glob(f"{{ROOT}}/{split}/*.tar"))
for sample in webdataset.WebDataset(shards, shardshuffle=False):
    video, facts = sample["mp4"], json.loads(sample["json"])
    print(sample["__key__"], len(video), facts["label"])
    break
""",
    "wids": """\
import json

import wids

dataset = wids.ShardListDataset(f"{{ROOT}}/wids-{split}.json", base=ROOT, transformations=[])
sample = dataset[0]
video, facts = sample[".mp4"].read(), json.load(sample[".json"])
print(sample["__key__"], len(video), facts["label"])
""",
    "Megatron-Energon": """\
import json

from megatron.energon import (
    Cooker, TaskEncoder, WorkerConfig, get_loader, get_val_dataset, stateless
)


@stateless
def cook(sample):
    return sample


class Clips(TaskEncoder):
    decoder = None  # the bytes of the mp4 as they are
    cookers = (Cooker(cook),)


one = WorkerConfig(rank=0, world_size=1, num_workers=0)
dataset = get_val_dataset(  # get_train_dataset: shuffled, without an end
    ROOT, split_part="{split}", worker_config=one, batch_size=None, task_encoder=Clips()
)
for sample in get_loader(dataset):
    print(sample["__key__"], len(sample["mp4"]), json.loads(sample["json"])["label"])
    break
""",
    "Hugging Face datasets": """\
from datasets import Video, load_dataset

dataset = load_dataset(ROOT, split="{split}", streaming=True)
dataset = dataset.cast_column("mp4", Video(decode=False))  # the bytes, without torchcodec
sample = next(iter(dataset))
print(sample["__key__"], len(sample["mp4"]["bytes"]), sample["json"]["label"])
""",
}


def loading_snippets(splits: Sequence[str], stored_fps: Fraction) -> str:
    """Return one short program for each reader, of the first split in order of name.

    Clips are read at 15 frames a second, or at the stored rate where that is less.
    """
    split = "train" if "train" in splits else next(iter(splits), "train")
    fps = min(_USUAL_FPS, stored_fps)
    number = str(fps) if fps.denominator == 1 else f'"{fps}"'
    parts = ['`ROOT` is this directory, `ROOT = "path/to/it"`.']
    for reader, code in _SNIPPETS.items():
        parts += [f"With {reader}:", f"```python\n{code.format(split=split, fps=number)}```"]
    return "\n\n".join(parts)
