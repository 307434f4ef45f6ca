"""A clip holds the seconds of its segment, however the demuxer seeks and the source's pictures come."""

import subprocess

import av
import numpy as np
import pytest
from test_prep_encode import LIBX264, convert, make, pictures, standing

from prep.ffmpeg_binary import find_ffmpeg

GREY = "geq=lum='min(235,12*floor(T)+20)':cb=128:cr=128"


def seconds_of(data, tmp_path):
    """Return which second of a source drawn with GREY each frame shows."""
    levels = np.array([frame.mean() for frame in pictures(data, tmp_path)])
    return np.rint((levels * 219 / 255 + 16 - 20) / 12).astype(int).tolist()


@pytest.fixture(autouse=True)
def _quiet_libav():
    av.logging.set_level(av.logging.PANIC)


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", ("-c:v", "libx264", "-bf", "3", "-f", "mpegts")),  # as yt-dlp can leave them
        ("a.mpg", ("-c:v", "mpeg2video", "-q:v", "3")),
    ],
)
def test_a_demuxer_that_seeks_to_any_packet_does_not_move_a_segment(tmp_path, name, codec):
    """There is a keyframe at 0, and the next at 12 s."""
    codec += ("-g", "300", "-sc_threshold", "1000000000")
    source = make(
        tmp_path / name, "-vf", GREY, *codec, source="color=size=64x48:rate=25:duration=16"
    )
    for start in (1, 11, 13):  # from 11 on, ffmpeg could take the time at 0 for a mistake
        result, data = convert(tmp_path, source, float(start), start + 2.0)
        assert (result["status"], result["short"], result["detail"]) == ("ok", False, "")
        shown = seconds_of(data, tmp_path)
        assert len(shown) == 30
        assert (shown[1:14], shown[16:29]) == ([start] * 13, [start + 1] * 13)


def test_an_mp4_whose_keyframe_is_decoded_before_the_start_and_shown_behind_it(tmp_path):
    """B-frames and a still of 6 s: the keyframe at 8 s is decoded at 1.9 s."""
    codec = ("-g", "3", "-bf", "2", "-x264-params", "b-adapt=0:scenecut=0")
    source = standing(tmp_path / "a.mp4", codec=("-c:v", "libx264", *codec))
    result, data = convert(tmp_path, source, 4.0, 10.0)
    assert (result["status"], result["num_frames"]) == ("ok", 90)
    assert convert(tmp_path, source, 7.0, 17.0)[0]["detail"] == "ends 5.00 s early"
    levels = np.array([frame.mean() for frame in pictures(data, tmp_path)])
    assert np.abs(levels[:58] - (18 * 2 + 4) * 255 / 219).max() < 5


@pytest.mark.parametrize(
    ("rate", "start", "end", "frames"),
    [
        ("1", 2.1, 4.1, {2: 13.5, 3: 15, 4: 1.5}),
        ("1/3", 4.5, 8.5, {3: 22.5, 6: 37.5}),
        ("4", 2.05, 4.05, {2: 14.25, 3: 15, 4: 0.75}),
    ],
)
def test_a_source_slower_than_the_profile_is_cut_as_exactly(tmp_path, rate, start, end, frames):
    source = make(
        tmp_path / "a.mp4",
        "-vf",
        GREY,
        *LIBX264,
        source=f"color=size=64x48:rate={rate}:duration=15",
    )
    result, data = convert(tmp_path, source, start, end)
    shown = seconds_of(data, tmp_path)
    assert result["short"] is False
    assert all(abs(shown.count(second) - number) <= 1 for second, number in frames.items())
    assert sum(map(shown.count, frames)) == len(shown)


@pytest.mark.parametrize("rate", ["2", "10"])
def test_b_frames_of_a_slow_avi_do_not_make_its_beginning_late(tmp_path, rate):
    """AVI has no time of showing: what is guessed for the first picture is a frame late."""
    source = make(tmp_path / "a.avi", "-vf", GREY, "-c:v", "libx264", "-bf", "2",
                  source=f"color=size=64x48:rate={rate}:duration=8")  # fmt: skip
    result, data = convert(tmp_path, source, 0.0, 4.0)
    assert (result["short"], result["detail"]) == (False, "")
    assert seconds_of(data, tmp_path) == [0] * 15 + [1] * 15 + [2] * 15 + [3] * 15


def joined(tmp_path, *looks):
    """Return one stream of 15 pictures of each look, as of a recording with adverts."""
    parts = []
    for number, look in enumerate(looks):
        part = make(tmp_path / f"{number}.h264", "-vf", look, *LIBX264, "-crf", "5",
                    source="color=c=0xC04020:size=320x240:rate=15:duration=1")  # fmt: skip
        parts.append(part.read_bytes())
    (tmp_path / "all.h264").write_bytes(b"".join(parts))
    subprocess.run([find_ffmpeg().path, "-loglevel", "error", "-y", "-fflags", "+genpts", "-r", "15",
                    "-i", tmp_path / "all.h264", "-c", "copy", tmp_path / "a.mp4"], check=True, timeout=60)  # fmt: skip
    return tmp_path / "a.mp4"


COLOURS = "format=yuv420p,scale=out_color_matrix={0}:out_range=limited,setparams=colorspace={0}"


@pytest.mark.parametrize(
    ("before", "behind"),
    [
        ("format=yuv420p", "scale=160:240,format=yuv444p"),
        (COLOURS.format("smpte170m"), COLOURS.format("bt709")),
    ],
)
def test_pictures_may_change_within_a_segment(tmp_path, before, behind):
    result, data = convert(tmp_path, joined(tmp_path, before, behind), 0.0, 2.0)
    assert (result["num_frames"], result["width"], result["height"]) == (30, 170, 128)
    assert result["detail"] == "its size or colours change within it"
    for frame in pictures(data, tmp_path):
        assert np.allclose(frame.reshape(-1, 3).mean(axis=0), (0xC0, 0x40, 0x20), atol=5)


def test_pictures_that_change_and_are_turned_are_refused(tmp_path):
    """The filter that turns them reads every picture as it was told of the first."""
    source = joined(tmp_path, "format=yuv420p", "scale=160:240,format=yuv420p")
    turned = tmp_path / "turned.mp4"
    subprocess.run([find_ffmpeg().path, "-loglevel", "error", "-display_rotation", "90", "-i", source,
                    "-c", "copy", turned], check=True, timeout=60)  # fmt: skip
    result, _ = convert(tmp_path, turned, 0.0, 2.0)
    assert (result["status"], result["reason"]) == ("failed", "encode failed")


@pytest.mark.parametrize(
    ("name", "codec", "start"), [("a.h264", LIBX264, 0.0), ("a.m2v", ("-c:v", "mpeg2video"), 1.0)]
)
def test_a_bare_stream_is_named_as_what_it_is(tmp_path, name, codec, start):
    source = make(tmp_path / name, *codec, source="testsrc2=size=64x48:rate=25:duration=4")
    result, _ = convert(tmp_path, source, start, 3.0)
    assert result["reason"] == "not a video"
    assert "put it into an mp4 or mkv file" in result["detail"]


def test_a_file_that_has_more_of_the_segment_wins(tmp_path):
    """A cut file that was cut off stands before the whole video."""
    cut = make(tmp_path / "cut.mp4", *LIBX264, source="testsrc2=size=64x48:rate=15:duration=1.2")
    whole = make(tmp_path / "whole.mp4", *LIBX264, source="testsrc2=size=64x48:rate=15:duration=7")
    (tmp_path / "empty.mp4").touch()
    shared = {"source": "folder", "was_there": True}
    candidates = [{"path": str(cut), "start": 0.0, "end": 3.0, **shared}]
    candidates += [{"path": str(tmp_path / "empty.mp4"), "start": 2.0, "end": 5.0, **shared}]
    assert convert(tmp_path, cut, candidates=candidates)[0]["short"] is True
    candidates += [{"path": str(whole), "start": 2.0, "end": 5.0, **shared}]
    result, _ = convert(tmp_path, cut, candidates=candidates)
    assert (result["short"], result["num_frames"]) == (False, 45)
