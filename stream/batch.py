"""What the loader yields: clips of one batch, as decoded."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from stream.bad_clips import BadClip

Layout = Literal["rgb", "yuv420"]


@dataclass(frozen=True, repr=False)
class ClipBatch:
    """One batch of N clips of T frames each.

    video        uint8. Layout "rgb": (N, T, H, W, 3), full range, within one level of what
                 `yuv420_to_rgb` gives. Layout "yuv420": (N, T, F),
                 BT.601 limited range, each frame's Y plane (h * w), then U and V (h/2 * w/2).
                 Clips of other sizes than the largest are zero-padded at the end of each axis.
    size         int64 (N, 2): the height h and width w of each clip, in pixels
    label        int64 (N,): index into the manifest's class names, -1 for none
    key          N sample keys
    start_frame  int64 (N,): the first frame, counted in the stored clip
    view         int64 (N,): which of the video's `clips_per_video` clips this is
    layout       "rgb" or "yuv420"
    bad_clips    damaged clips that substitutes stand in for (training) or that were left out
                 (evaluation), see stream.bad_clips
    """

    video: torch.Tensor
    size: torch.Tensor
    label: torch.Tensor
    key: list[str]
    start_frame: torch.Tensor
    view: torch.Tensor
    layout: Layout
    bad_clips: tuple[BadClip, ...] = ()

    def __post_init__(self) -> None:
        """Check that the shapes agree with each other."""
        count = len(self.key)
        wanted = {"size": (count, 2), "label": (count,), "start_frame": (count,), "view": (count,)}
        for name, shape in wanted.items():
            tensor: torch.Tensor = getattr(self, name)
            if tuple(tensor.shape) != shape or tensor.dtype != torch.int64:
                raise ValueError(
                    f"{name} must be int64 of shape {shape}, "
                    f"not {tensor.dtype} {tuple(tensor.shape)}"
                )
        dimensions = {"rgb": 5, "yuv420": 3}[self.layout]
        shape = tuple(self.video.shape)
        if self.video.dtype != torch.uint8 or len(shape) != dimensions or shape[0] != count:
            raise ValueError(
                f"video in layout {self.layout} must be uint8 with {dimensions} axes and "
                f"{count} clips, not {self.video.dtype} {shape}"
            )
        if self.layout == "rgb" and shape[-1] != 3:
            raise ValueError(f"video in layout rgb must end in 3 channels, not {shape}")

    def __getstate__(self) -> dict[str, Any]:
        """Send a copy of pixels in a loader's memory.

        torch moves a tensor that it sends. A NumPy view of it, made before, would stay behind in
        memory that nobody seems to use any more.
        """
        from stream.batch_slots import stands_in_slot  # here, as it imports this module

        if not stands_in_slot(self.video):
            return self.__dict__
        return {**self.__dict__, "video": self.video.clone()}

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self.key)

    def __repr__(self) -> str:
        """Show shapes, never pixels."""
        parts = []
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, torch.Tensor):
                value = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
            elif isinstance(value, list):
                value = f"[{len(value)} keys]"
            elif isinstance(value, tuple):
                value = f"[{len(value)} clips]"
            parts.append(f"{entry.name}={value}")
        return f"ClipBatch({', '.join(parts)})"

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> ClipBatch:
        """Return the batch with every tensor on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ClipBatch:
        """Return the batch in page-locked memory; torch's DataLoader calls this."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> ClipBatch:
        changed: dict[str, Any] = {
            entry.name: change(getattr(self, entry.name))
            for entry in fields(self)
            if isinstance(getattr(self, entry.name), torch.Tensor)
        }
        return replace(self, **changed)
