"""Generated videos for the demo and the tests: shapes that move in one of four directions.

The direction is the class. A shape starts anywhere and wraps around the edges, so that one frame
alone says nothing about it; only the motion does.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from pathlib import Path

DIRECTIONS = {"down": (0, 1), "left": (-1, 0), "right": (1, 0), "up": (0, -1)}
_SIZES = ((160, 120), (128, 96), (120, 160), (192, 108), (144, 144), (176, 144))  # width, height
_RATES = (
    Fraction(15),
    Fraction(24),
    Fraction(25),
    Fraction(30),
    Fraction(30000, 1001),
    Fraction(12),
)
_FORMS = (
    ("mp4", "libx264"),
    ("mkv", "libx264"),
    ("avi", "mpeg4"),
    ("mp4", "mpeg4"),
    ("webm", "libvpx"),
)


@dataclass(frozen=True)
class Motion:
    """One video: where a shape starts, and where and how fast it goes.

    Position and speed are in widths (or heights) of the picture, the speed a second.
    """

    direction: str
    start: tuple[float, float]
    speed: float
    shape: str
    radius: float
    colour: tuple[int, int, int]
    background: tuple[int, int, int]
    size: tuple[int, int]
    rate: Fraction
    seconds: float


def random_motion(direction: str, random: np.random.Generator) -> Motion:
    """Draw everything but the direction."""
    colour, background = random.integers(0, 256, 3), random.integers(0, 256, 3)
    while np.abs(colour - background).sum() < 200:  # a shape that cannot be seen has no direction
        background = random.integers(0, 256, 3)
    return Motion(
        direction=direction,
        start=(float(random.random()), float(random.random())),
        speed=float(random.uniform(0.3, 0.6)),
        shape=str(random.choice(["disc", "square", "diamond"])),
        radius=float(random.uniform(0.12, 0.2)),
        colour=(int(colour[0]), int(colour[1]), int(colour[2])),
        background=(int(background[0]), int(background[1]), int(background[2])),
        size=_SIZES[int(random.integers(len(_SIZES)))],
        rate=_RATES[int(random.integers(len(_RATES)))],
        seconds=float(random.uniform(1.5, 3.0)),
    )


def draw_frame(motion: Motion, seconds: float) -> npt.NDArray[np.uint8]:
    """Return the picture at a time: uint8 (height, width, 3), RGB."""
    width, height = motion.size
    move = DIRECTIONS[motion.direction]
    centre = [(motion.start[axis] + move[axis] * motion.speed * seconds) % 1 for axis in (0, 1)]
    # distance on a torus, in units of the shorter side, so that shapes keep their form
    across = np.abs((np.arange(width) + 0.5) / width - centre[0])
    down = np.abs((np.arange(height) + 0.5) / height - centre[1])
    dx = np.minimum(across, 1 - across)[None, :] * width / min(width, height)
    dy = np.minimum(down, 1 - down)[:, None] * height / min(width, height)
    inside = {
        "disc": dx**2 + dy**2 < motion.radius**2,
        "square": np.maximum(dx, dy) < motion.radius,
        "diamond": dx + dy < motion.radius * 1.3,
    }[motion.shape]
    colours = np.array([motion.background, motion.colour], dtype=np.uint8)
    picture: npt.NDArray[np.uint8] = colours[inside.astype(np.intp)]
    return picture


def write_video(
    path: Path, motion: Motion, codec: str, options: dict[str, str] | None = None
) -> None:
    """Encode a motion; the container follows from the path's extension."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=motion.rate)
        stream.width, stream.height = motion.size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = options or _speed(codec)
        for number in range(round(motion.seconds * motion.rate)):
            picture = draw_frame(motion, float(number / motion.rate))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def _speed(codec: str) -> dict[str, str]:
    if codec == "libx264":
        return {"preset": "ultrafast", "crf": "20"}
    if codec == "libvpx":
        return {"deadline": "realtime", "cpu-used": "8", "b": "600k"}
    return {"b": "800k"}


def draw_class_folders(folder: Path, count: int, seed: int) -> None:
    """Write `count` videos into a folder for each direction, in varied sizes, rates and codecs."""
    random = np.random.default_rng(seed)
    directions = list(DIRECTIONS)
    for number in range(count):
        direction = directions[number % len(directions)]
        extension, codec = _FORMS[int(random.integers(len(_FORMS)))]
        target = folder / direction / f"{number:04d}.{extension}"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_video(target, random_motion(direction, random), codec)


def write_broken_files(folder: Path, seed: int) -> None:
    """Write three files that are no videos: a truncated one, an empty one, and text."""
    motion = random_motion("left", np.random.default_rng(seed))
    whole = folder / "left" / "truncated.mp4"
    whole.parent.mkdir(parents=True, exist_ok=True)
    write_video(whole, motion, "libx264")
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    (folder / "left" / "empty.mp4").touch()
    (folder / "left" / "page.mp4").write_text("<html>404 Not Found</html>\n")
