"""`kprep bench`: how fast this machine converts, streams, decodes and trains."""

from __future__ import annotations

import click

from prep.lazy_group import LazyGroup

BENCHES = {
    "shard": ("prep.bench_shard_command", "bench_shard_command", "Converting, beside bare ffmpeg."),
    "stream": ("stream.bench_command", "stream_command", "The loader, beside one fed from memory."),
    "decode": ("stream.bench_command", "decode_command", "Decoding, beside its floor."),
    "train": ("train.bench_command", "bench_train_command", "Training, beside the network alone."),
}


@click.group("bench", cls=LazyGroup, table=BENCHES)
def bench_group() -> None:
    """Measure how fast this machine converts, streams, decodes and trains.

    \b
    Examples:
      kprep bench shard videos/
      kprep bench stream dataset/
      kprep bench decode dataset/
      kprep bench train dataset/ --recipe resnet
    """
