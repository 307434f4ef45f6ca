"""A contender of conversion.py, run by a Python that has video2dataset 1.3:

    PYTHON video2dataset_convert.py LIST.csv OUTPUT HEIGHT FPS WORKERS

Resolution and frame rate are changed by its own subsamplers, as its documentation configures them,
and written as webdataset. Two of its bugs are worked around: the download worker asks subsamplers
for `encode_formats`, which they do not have, and the frame subsampler changes the dictionary that
the worker iterates over.
"""

from __future__ import annotations

import sys
from typing import Any

import video2dataset
from video2dataset import subsamplers

subsamplers.ResolutionSubsampler.encode_formats = {"video": "mp4"}
_call = subsamplers.FrameSubsampler.__call__


def _on_a_copy(self: Any, streams: dict[str, Any], metadata: Any = None) -> Any:
    return _call(self, dict(streams), metadata)


subsamplers.FrameSubsampler.__call__ = _on_a_copy


def main() -> None:
    table, output, height, fps, workers = sys.argv[1:]
    video2dataset.video2dataset(
        url_list=table,
        input_format="csv",
        output_folder=output,
        output_format="webdataset",
        config={
            "subsampling": {
                "ResolutionSubsampler": {"args": {"height": int(height), "resize_mode": "scale"}},
                "FrameSubsampler": {"args": {"frame_rate": float(fps)}},
            },
            "reading": {"yt_args": {}, "timeout": 60, "sampler": None},
            "storage": {
                "number_sample_per_shard": 1000, "oom_shard_count": 5,
                "captions_are_subtitles": False,
            },
            "distribution": {
                "processes_count": int(workers), "thread_count": int(workers),
                "subjob_size": 1000, "distributor": "multiprocessing",
            },
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
