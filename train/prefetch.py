"""Copies to the device that run beside the network, on a stream of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from train.transforms import video_on

if TYPE_CHECKING:
    from stream.batch import ClipBatch


class DeviceCopies:
    """Copies one batch of clips to the device while it still computes the batch before."""

    def __init__(self, device: torch.device) -> None:
        """Make the stream; without CUDA the clips are copied when they are used."""
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start(self, batches: list[ClipBatch]) -> list[ClipBatch]:
        """Return a list of the batches, the pixels of the first one on their way to the device."""
        if self._stream is None:
            return list(batches)
        with torch.cuda.stream(self._stream):
            return [video_on(batch, self._device) for batch in batches[:1]] + batches[1:]

    def take(self, batches: list[ClipBatch]) -> ClipBatch:
        """Take the first batch, whose copy was started, out of the list; start the next one's.

        The device's main stream waits for the copy, and this process goes on.
        """
        first = batches.pop(0)
        if self._stream is not None:
            main = torch.cuda.current_stream(self._device)
            main.wait_stream(self._stream)
            if first.video.is_cuda:
                first.video.record_stream(main)
            batches[:] = self.start(batches)
        return first
