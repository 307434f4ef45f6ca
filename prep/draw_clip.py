"""The work of a process that draws clips for a page: one clip of a file, as a picture."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from prep.clip_sprite import draw_sprite
from prep.errors import BadClipError
from prep.worker_marks import cpu_limit


def draw_clip(job: dict[str, Any]) -> dict[str, Any]:
    """Return the picture of a clip, its data in base64, or `problem`: what is wrong with the clip.

    The job: video (a file that holds the clip alone), num_frames as in the index, most (how many of
    them are drawn), cpu_seconds (past them, SIGPROF ends this process).
    """
    data = Path(job["video"]).read_bytes()
    try:
        with cpu_limit(job["cpu_seconds"]):
            sprite = draw_sprite(data, job["num_frames"], job["most"])
    except BadClipError as error:
        return {"problem": str(error)}
    return {
        "kind": sprite.kind,
        "data": base64.b64encode(sprite.data).decode("ascii"),
        "num_frames": sprite.num_frames,
        "width": sprite.width,
        "height": sprite.height,
    }
