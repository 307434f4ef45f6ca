"""`kprep bench shard`: the same work in both ways, all of it, and clear mistakes."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import run_kprep

from prep.bench_shard import choose
from prep.demo_videos import draw_class_folders, random_motion, write_video


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "videos"
    draw_class_folders(folder, 4, seed=3)
    (folder / "left").mkdir(exist_ok=True)
    (folder / "left" / "broken.mp4").write_bytes(b"no video")
    return folder


@pytest.mark.slow
def test_both_ways_are_measured_round_by_round(videos):
    done = run_kprep(
        "bench", "shard", videos, "--clips", 6, "--rounds", 2, "--workers", 1, "--json"
    )
    found = json.loads(done.stdout)
    assert found["num_clips"] == 6  # four videos, two of them again; the broken file in neither
    assert found["workers"] == 1
    assert found["left_out"] == {"not a video": 1}
    for way in ("ffmpeg", "kprep"):
        assert len(found[way]["clips_per_second"]) == 2
        assert min(found[way]["clips_per_second"]) > 0
    # kprep runs the same encoders and does more besides
    assert min(found["kprep"]["cpu_seconds_per_clip"]) > min(
        found["ffmpeg"]["cpu_seconds_per_clip"]
    )
    rates = [found[way]["clips_per_second"] for way in ("kprep", "ffmpeg")]
    ratios = sorted(mine / floor for mine, floor in zip(*rates, strict=True))
    assert found["ratio"] == pytest.approx(sum(ratios) / 2)


def test_what_cannot_be_converted_is_left_out_and_counted(videos, tmp_path):
    folder = tmp_path / "videos"
    shutil.copytree(videos, folder)
    motion = replace(random_motion("left", np.random.default_rng(1)), seconds=0.3)
    write_video(folder / "a.mp4", motion, "libx264")  # reads well, and is below --min-seconds
    chosen, left_out = choose(folder, tmp_path / "work", 6, "small", 1)
    assert left_out == {"not a video": 1, "too short": 1}
    good = {path for path in folder.rglob("*") if path.is_file()}
    good -= {folder / "a.mp4", folder / "left" / "broken.mp4"}
    assert len(chosen) == 6
    assert {link.resolve() for link, _ in chosen} == good
    assert {path.resolve() for path in (tmp_path / "work/videos").rglob("*.*")} == good


def test_a_folder_without_a_video_is_told_so(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.mp4").write_bytes(b"no video")
    done = run_kprep("bench", "shard", tmp_path, check=False)
    assert done.returncode == 2
    assert "holds no video that can be read" in done.stderr
    assert "Traceback" not in done.stderr
