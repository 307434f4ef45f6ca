"""A contender of conversion.py: encode in processes that are kept, with PyAV instead of ffmpeg.

Reads JSON from standard input: `workers`, the options of the encoder and a list of jobs, each with
`source`, `stream`, `target` and `filters` (the chain as ffmpeg's -vf has it). Same filters, same
encoder, one thread each. Nothing of kprep is imported.
"""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from functools import partial
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import av
import av.filter

if TYPE_CHECKING:
    from collections.abc import Iterator


def filtered(stream: Any, frames: Iterator[Any], chain: str) -> Iterator[Any]:
    """Yield the frames that come out of a chain of filters."""
    graph = av.filter.Graph()
    graph.threads = 1
    nodes: list[Any] = [graph.add_buffer(template=stream)]
    for part in chain.split(","):
        name, _, values = part.partition("=")
        nodes.append(graph.add(name, values))
    nodes.append(graph.add("buffersink"))
    graph.link_nodes(*nodes).configure()
    for frame in frames:
        graph.vpush(frame)
        yield from _ready(graph)
    graph.vpush(None)
    yield from _ready(graph)


def _ready(graph: Any) -> Iterator[Any]:
    while True:
        try:
            yield graph.vpull()
        except (av.BlockingIOError, av.EOFError):
            return


def encode(options: dict[str, str], job: dict[str, Any]) -> int:
    """Encode one clip; return its frames."""
    count = 0
    with (
        av.open(job["source"]) as source,
        av.open(job["target"], "w", format="mp4", options={"movflags": "faststart"}) as target,
    ):
        stream: Any = source.streams[job["stream"]]
        stream.codec_context.thread_count = 1
        encoded: Any = None
        for frame in filtered(stream, source.decode(stream), job["filters"]):
            if encoded is None:
                encoded = target.add_stream("libx264", rate=Fraction(job["fps"]), options=options)
                encoded.width, encoded.height = frame.width, frame.height
                encoded.pix_fmt, encoded.codec_context.thread_count = "yuv420p", 1
            target.mux(encoded.encode(frame))
            count += 1
        target.mux(encoded.encode(None))
    return count


def main() -> None:
    asked = json.load(sys.stdin)
    with get_context("fork").Pool(asked["workers"]) as pool:
        work = partial(encode, asked["options"])
        frames = pool.map(work, asked["jobs"], chunksize=1)
        pool.close()
        pool.join()
    print(json.dumps(frames))


if __name__ == "__main__":
    main()
