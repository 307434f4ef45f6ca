"""Copies to the device that run beside the network, on a stream of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from train.transforms import video_on

if TYPE_CHECKING:
    from stream.batch import ClipBatch


class DeviceCopies:
    """Starts the copy of a step's clips while the device still computes the step before."""

    def __init__(self, device: torch.device) -> None:
        """Make the stream; without CUDA the clips are copied when they are used."""
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start(self, batches: list[ClipBatch]) -> list[ClipBatch]:
        """Return the batches with their pixels on the device, or on their way to it."""
        if self._stream is None:
            return batches
        with torch.cuda.stream(self._stream):
            return [video_on(batch, self._device) for batch in batches]

    def await_copies(self, batches: list[ClipBatch]) -> None:
        """Make the device's main stream wait for the copies; this process goes on."""
        if self._stream is None:
            return
        main = torch.cuda.current_stream(self._device)
        main.wait_stream(self._stream)
        for batch in batches:
            if batch.video.is_cuda:
                batch.video.record_stream(main)
