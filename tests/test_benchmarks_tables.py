"""The benchmarks of encodings, conversion and order run, and their numbers agree with each other."""

import importlib.util
import json
import math
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from prep.demo_videos import draw_class_folders

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
pytestmark = pytest.mark.slow


def run(name, folder, *arguments, check=True):
    """Run a benchmark; return its JSON, its Markdown and, where it can be drawn, its chart."""
    files = {"--json": folder / "found.json", "--markdown": folder / "found.md"}
    if HAS_MATPLOTLIB:
        files["--chart"] = folder / "found.png"
    given = [*arguments, *(part for pair in files.items() for part in pair)]
    done = subprocess.run(
        [sys.executable, REPOSITORY / "benchmarks" / name, *map(str, given)],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    if not check:
        return done
    assert done.returncode == 0, done.stderr
    markdown = files["--markdown"].read_text()
    assert done.stdout == markdown
    if HAS_MATPLOTLIB:
        assert files["--chart"].read_bytes().startswith(b"\x89PNG\r\n")
    return json.loads(files["--json"].read_text()), markdown.splitlines()


def table_rows(lines):
    return [line for line in lines if line.startswith("|")][2:]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks") / "videos"
    draw_class_folders(folder, 3, seed=5)
    (folder / "left").mkdir(exist_ok=True)
    (folder / "left" / "broken.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture(scope="module")
def encodings(videos, tmp_path_factory):
    return run(
        "encoding_table.py", tmp_path_factory.mktemp("encodings"), videos, "--profiles", "small",
        "--gops", 8, 16, "--crfs", 23, 35, "--rounds", 2, "--min-seconds", 1,
    )  # fmt: skip


def test_every_encoding_has_a_row_and_the_default_is_marked(encodings):
    found, lines = encodings
    settings = [
        (row["keyframe_interval_frames"], row["tune"], row["crf"]) for row in found["settings"]
    ]
    assert settings == [
        (gop, tune, crf) for gop in (8, 16) for tune in ("fastdecode", "none") for crf in (23, 35)
    ]
    assert [row["default"] for row in found["settings"]].index(True) == settings.index(
        (16, "fastdecode", 23)
    )
    rows = table_rows(lines)
    assert len(rows) == 8
    assert [number for number, row in enumerate(rows) if "**" in row] == [4]
    assert "3 videos" in lines[0]  # the broken one is left out


def test_bytes_and_quality_of_encodings_are_consistent(encodings):
    found, _ = encodings
    for row in found["settings"]:
        assert 0 < row["bytes_view"] <= row["bytes_five_views"] <= row["bytes_10_seconds"]
        assert math.isfinite(row["psnr"])
        assert 20 < row["psnr"] < 70
        assert 0.5 < row["ssim"] < 1
        assert len(row["view_ms"]) == len(row["floor_ms"]) == 2
        assert min(row["floor_ms"]) > 0
    by_setting = {
        (row["keyframe_interval_frames"], row["tune"], row["crf"]): row for row in found["settings"]
    }
    for (gop, tune, crf), row in by_setting.items():
        if crf == 23:  # a higher crf is a smaller and a worse picture
            worse = by_setting[gop, tune, 35]
            assert worse["bytes_10_seconds"] < row["bytes_10_seconds"]
            assert worse["psnr"] < row["psnr"]
            assert worse["ssim"] < row["ssim"]
        if gop == 8:  # twice the keyframes
            assert by_setting[16, tune, crf]["bytes_10_seconds"] < row["bytes_10_seconds"]


def test_the_reference_of_the_quality_is_lossless(videos, tmp_path):
    """Its pictures are those of the filters alone, as hashed by ffmpeg."""
    import ffmpeg

    sys.path.append(str(REPOSITORY / "benchmarks"))
    import encoding_table

    from prep.profile import PROFILES
    from prep.transcode import filters

    source = encoding_table.sources([videos], 10, 1)[0]
    reference = tmp_path / "reference.mp4"
    profile = PROFILES["small"].changed(crf=0, preset="ultrafast")
    encoding_table.encode(source, profile, reference)
    binary = encoding_table.find_ffmpeg().path

    def pictures(path, **options):
        output = ffmpeg.output(ffmpeg.input(str(path)), "-", f="md5", an=None, **options)
        return output.run(cmd=binary, capture_stdout=True, quiet=True)[0]

    filtered = pictures(
        source.path, vf=filters(profile, source.facts), fps_mode="passthrough", vcodec="rawvideo"
    )
    assert pictures(reference, vcodec="rawvideo") == filtered
    itself = encoding_table.quality(reference, reference, ["psnr", "ssim"])
    assert itself == {"psnr": math.inf, "ssim": 1.0}


def test_contenders_of_conversion_convert_every_clip(videos, tmp_path):
    found, lines = run(
        "conversion.py", tmp_path, videos, "--clips", 4, "--rounds", 1, "--workers", 1
    )
    assert found["clips"] == 4  # three videos, one of them again
    rounds = found["rounds"]
    assert list(rounds) == ["bare ffmpeg", "kprep shard", "PyAV in process"]
    for one in rounds.values():
        assert min(*one["clips_per_second"], *one["cpu_seconds_per_clip"]) > 0
    assert len(table_rows(lines)) == 3
    assert table_rows(lines)[0].endswith("| 1.00 |")
    assert "video2dataset was not measured" in lines[-1]


def test_a_conversion_that_cannot_be_measured_is_one_sentence(videos, tmp_path):
    done = run(
        "conversion.py", tmp_path, videos, "--clips", 1, "--rounds", 1, "--video2dataset",
        sys.executable, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "video2dataset_convert.py ended with 1" in done.stderr
    assert "Traceback" not in done.stderr


def test_orders_are_measured_at_three_places(tmp_path):
    found, lines = run(
        "order.py", tmp_path, "--clips", 3000, "--batch", 64, "--rounds", 1,
        "--leave-out", "torch", "sampler", "buffer",
    )  # fmt: skip
    assert list(found["rounds"]) == ["kprep", "numpy", "plan"]
    for name in ("kprep", "numpy"):
        one = found["rounds"][name]
        assert min(one[f"seconds_{percent}"][0] for percent in (0, 50, 90)) > 0
        assert 10e6 < one["peak_bytes"][0] < 1e9
    assert len(table_rows(lines)) == 2
    assert "Planning the whole run on 1,024 ranks" in lines[-1]


def test_every_order_gives_clips_and_views_of_the_epoch():
    sys.path.append(str(REPOSITORY / "benchmarks"))
    import order_child

    clips, views = 700, 5
    for make in (order_child.kprep, order_child.numpy, order_child.torch, order_child.sampler,
                 order_child.buffer):  # fmt: skip
        whole = make(clips, views)(0, clips * views)
        everything = {(clip, view) for clip in range(clips) for view in range(views)}
        assert len(whole) == clips * views
        assert set(whole) == everything, make.__name__
        assert make(clips, views)(3150, 64) == whole[3150:3214], make.__name__


def test_every_way_to_run_a_network_has_a_row(tmp_path):
    found, lines = run(
        "network_step.py", tmp_path, "--model", "r3d_18", "--batch", 2, "--clip", 4, 24, 24,
        "--steps", 1, "--rounds", 2,
    )  # fmt: skip
    assert list(found["rounds"]) == ["contiguous", "channels last", "kprep's convolutions"]
    assert all(len(one["clips_per_second"]) == 2 for one in found["rounds"].values())
    assert [row.split(" | ")[0] for row in table_rows(lines)] == [
        "| contiguous",
        "| channels last",
        "| kprep's convolutions",
    ]
    assert table_rows(lines)[0].split(" | ")[2] == "1.00"


def test_every_way_to_prepare_clips_has_a_row(tmp_path):
    found, lines = run(
        "clip_preparation.py", tmp_path, "--batch", 2, "--frames", 2, "--size", 32, 40,
        "--batches", 1, "--rounds", 2,
    )  # fmt: skip
    assert list(found["rounds"]) == ["torchvision", "PyTorch", "copy"]
    assert all(len(one["ms"]) == len(one["host"]) == 2 for one in found["rounds"].values())
    assert [row.split(" | ")[0] for row in table_rows(lines)] == [
        "| torchvision",
        "| PyTorch",
        "| copy",
    ]
    assert table_rows(lines)[0].split(" | ")[3] == "1.0 |"
