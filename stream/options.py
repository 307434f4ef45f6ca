"""What decides a stream's batches: the options of the sequence, and the address of one batch."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal, NamedTuple

from prep.errors import UsageError
from stream.rates import parse_rate
from stream.sampling import MOST_FRAMES
from stream.whole_numbers import LEAST, MOST, whole_number

if TYPE_CHECKING:
    from stream.bad_clips import Policy
    from stream.batch import Layout
    from stream.order import Grouping
    from stream.sampling import Placement

Mode = Literal["train", "eval"]
Short = Literal["skip", "pad"]


class BatchAddress(NamedTuple):
    """Names one rank's micro-batch: everything that is in it follows from this and the options."""

    epoch: int
    step: int
    micro: int


@dataclass(frozen=True)
class StreamOptions:
    """What decides a stream's sequence of clips and their form."""

    split: str
    mode: Mode = "train"
    frames: int = 16
    fps: Fraction = Fraction(15)
    """Or what `clip_loader` takes, 7.5 and "30000/1001", which becomes a fraction: the
    nearest with a denominator of at most 100,000."""
    clips_per_video: int = 1
    grouping: Grouping = "spread"
    shuffle_block: int = 1
    seed: int = 0
    short: Short = "skip"
    placement: Placement = "even"
    layout: Layout = "rgb"
    bad_clips: Policy = "raise"

    def __post_init__(self) -> None:
        """Take numbers as they are written, and refuse values that have no meaning."""
        limits = {"frames": (1, MOST_FRAMES), "clips_per_video": (1, MOST),
                  "shuffle_block": (1, MOST), "seed": (LEAST, MOST)}  # fmt: skip
        for name, (least, most) in limits.items():
            value = whole_number(name, getattr(self, name), least=least, most=most)
            object.__setattr__(self, name, value)
        object.__setattr__(self, "fps", parse_rate(self.fps))
        choices = {
            "mode": ("train", "eval"),
            "grouping": ("spread", "together"),
            "short": ("skip", "pad"),
            "placement": ("even", "middle", "torchvision"),
            "layout": ("rgb", "yuv420"),
            "bad_clips": ("raise", "substitute"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} ({getattr(self, name)!r}) must be {' or '.join(allowed)}")
