"""What one row's encode gives: the pictures, the cut, the limits, and what hostile files get."""

import hashlib
import io
import itertools
import json
import os
import subprocess
import sys
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from prep.encode import encode, expectation
from prep.ffmpeg_binary import find_ffmpeg
from prep.mp4 import check_form
from prep.outcome import Reason, RowFailure
from prep.probe import FORMAT_WHITELIST, SourceFacts, _key_picture, _options, probe
from prep.profile import PROFILES
from prep.source import Candidate
from prep.transcode import Limits, command, filters, input_matrix, last_word, picture_size, run

SMALL = PROFILES["small"]


@pytest.fixture(autouse=True)
def _quiet_libav():
    av.logging.set_level(av.logging.PANIC)


def make(path, *arguments, source="testsrc2=size=320x240:rate=30:duration=4"):
    subprocess.run(
        [find_ffmpeg().path, "-loglevel", "error", "-y", "-f", "lavfi", "-i", source, *map(str, arguments), str(path)],
        check=True, timeout=120,
    )  # fmt: skip
    return path


def convert(tmp_path, source, start=0.0, end=None, profile=SMALL, **more):
    """Run the worker's task on one file; return its result and the clip's bytes."""
    work = tmp_path / "work"
    for name in ("staged", "temporary"):
        (work / name).mkdir(parents=True, exist_ok=True)
    job = {
        "profile": profile.to_json(), "cpu_seconds": 60, "wall_seconds": 60, "min_seconds": 1.0,
        "work": str(work), "shard": 0,
        "candidates": [{"path": str(source), "source": "folder", "start": start, "end": end,
                        "was_there": True}], **more,
    }  # fmt: skip
    result = encode(json.loads(json.dumps(job)))
    data = b""
    if result.get("status") == "ok":
        data = (work / "staged" / result["pack"]).read_bytes()[result["pack_offset"] :][
            : result["video_bytes"]
        ]
    assert not list((work / "temporary").iterdir())
    return result, data


def pictures(data, tmp_path):
    target = tmp_path / "clip.mp4"
    target.write_bytes(data)
    with av.open(str(target)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


def test_a_clip_holds_what_its_facts_say(tmp_path):
    result, data = convert(tmp_path, make(tmp_path / "a.mp4"))
    assert (result["num_frames"], result["width"], result["height"]) == (60, 170, 128)
    assert zlib.crc32(data) == result["crc32"]
    offsets = result["gop_offsets"]
    assert [zlib.crc32(data[a:b]) for a, b in itertools.pairwise(offsets)] == result["gop_crc32"]
    assert check_form(data, 16).num_frames == 60


def test_the_cut_is_exact(tmp_path):
    """Each second of the source has its own grey level; [2, 4) must hold exactly seconds 2 and 3."""
    source = make(tmp_path / "a.mp4", "-vf", "geq=lum='40*floor(T)+20':cb=128:cr=128", "-g", "250",
                  source="color=size=160x120:rate=30:duration=6")  # fmt: skip
    result, data = convert(tmp_path, source, 2.0, 4.0)
    assert result["num_frames"] == 30
    levels = [frame.mean() for frame in pictures(data, tmp_path)]
    expected = [(40 * second + 20 - 16) * 255 / 219 for second in (2, 3)]
    assert np.allclose(levels[:15], expected[0], atol=4)
    assert np.allclose(levels[15:], expected[1], atol=4)


LIBX264 = ("-c:v", "libx264", "-preset", "ultrafast", "-g", "10")
CODECS = {
    "mp4": LIBX264,
    "mkv": LIBX264,
    "webm": ("-c:v", "libvpx", "-deadline", "realtime"),
    "avi": ("-c:v", "mpeg4"),
}


def fake_ffmpeg(folder, script):
    """A shell script in ffmpeg's place."""
    path = folder / "ffmpeg"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def standing(path, seconds=12, codec=None):
    """10 pictures a second, but none between 2 and 8 s; each second has its grey level."""
    grey = "geq=lum='min(235,18*floor(T)+20)':cb=128:cr=128"
    return make(path, "-vf", f"select='lt(t,2.05)+gt(t,7.95)',{grey}", "-fps_mode", "vfr",
                *(codec or CODECS[path.suffix[1:]]),
                source=f"testsrc2=size=160x120:rate=10:duration={seconds}")  # fmt: skip


@pytest.mark.parametrize("extension", [*CODECS])
@pytest.mark.parametrize(
    ("start", "end", "seconds"),
    [
        (0.0, 6.0, [(0, 15), (1, 15), (2, 60)]),  # stands over the end
        (4.0, 10.0, [(2, 60), (8, 15), (9, 15)]),  # over the start
        (1.0, 11.0, [(1, 15), (2, 90), (8, 15), (9, 15), (10, 15)]),  # inside, as it always was
    ],
)
def test_a_picture_that_stands_over_an_edge_is_in_the_clip(
    tmp_path, extension, start, end, seconds
):
    result, data = convert(tmp_path, standing(tmp_path / f"a.{extension}"), start, end)
    assert (result["status"], result["short"], result["detail"]) == ("ok", False, "")
    assert abs(result["num_frames"] - 15 * (end - start)) <= 1
    levels = np.array([frame.mean() for frame in pictures(data, tmp_path)])
    wanted = np.concatenate([np.full(n, (18 * second + 4) * 255 / 219) for second, n in seconds])
    most = min(len(levels), len(wanted))
    odd = np.abs(levels[:most] - wanted[:most]) > 5
    assert odd.sum() <= len(seconds)  # a frame at each change may be one of its neighbours


@pytest.mark.parametrize("extension", [*CODECS])
def test_a_picture_over_the_start_is_in_the_clip_however_long_the_source_goes_on(
    tmp_path, extension
):
    """ffmpeg's plain cut has the right length there, and holds 8 to 14 s."""
    source = standing(tmp_path / f"a.{extension}", seconds=12 + 6)
    result, data = convert(tmp_path, source, 4.0, 10.0)
    assert (result["status"], result["short"], result["detail"]) == ("ok", False, "")
    assert abs(result["num_frames"] - 15 * 6) <= 1
    levels = np.array([frame.mean() for frame in pictures(data, tmp_path)])
    assert np.abs(levels[2:58] - (18 * 2 + 4) * 255 / 219).max() < 5
    assert levels.max() < (18 * 9 + 4) * 255 / 219 + 5


@pytest.mark.parametrize(("start", "late"), [(0.0, 1.0), (0.5, 0.5)])
@pytest.mark.parametrize("extension", ["mp4", "mkv"])
def test_a_first_picture_that_comes_late_makes_a_short_clip(tmp_path, extension, start, late):
    sound = ("-i", "testsrc2=size=160x120:rate=30:duration=6", "-map", "0:a", "-map", "1:v")
    source = make(tmp_path / f"a.{extension}", "-itsoffset", "1", "-f", "lavfi", *sound, *LIBX264,
                  source="sine=duration=7")  # fmt: skip
    result, _ = convert(tmp_path, source, start, 5.0)
    assert (result["status"], result["short"]) == ("ok", True)
    assert result["detail"] == f"begins {late:.2f} s late"
    assert abs(result["num_frames"] - 15 * 4) <= 1


def test_a_last_picture_that_stands_for_long_is_a_clip(tmp_path):
    longer = r"setts=duration=if(eq(N\,19)\,10/TB\,DURATION)"
    source = make(tmp_path / "a.mp4", *LIBX264, "-bf", "0", "-bsf:v", longer,
                  source="testsrc2=size=160x120:rate=10:duration=2")  # fmt: skip
    for start, end in ((0.0, 6.0), (4.0, 10.0)):  # ffmpeg's plain cut of the second is empty
        result, _ = convert(tmp_path, source, start, end)
        assert (result["status"], result["num_frames"]) == ("ok", 15 * 6)


def test_frames_that_the_packets_promise_and_that_do_not_decode_are_damage(tmp_path):
    """What stands over an edge must not be taken for an excuse, nor hide them in a still."""
    source = standing(tmp_path / "a.mp4")
    with av.open(str(source)) as file:
        late = [packet for packet in file.demux(video=0) if packet.size and packet.pts is not None]
        late = [packet for packet in late if float(packet.pts * packet.time_base) > 10.45]
    data = bytearray(source.read_bytes())
    for packet in late:
        data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    source.write_bytes(data)
    result, _ = convert(tmp_path, source, 4.0, 11.0)
    assert (result["status"], result["reason"]) == ("failed", "damaged")


@pytest.mark.parametrize("end", [3.0, 3.05])
def test_clips_that_fit_are_cut_as_they_always_were(tmp_path, monkeypatch, end):
    asked = []
    monkeypatch.setattr("prep.encode.plain_cut_seconds", lambda *_: asked.append(1))
    convert(tmp_path, make(tmp_path / "a.mp4", *LIBX264), 1.0, end)
    assert not asked


@pytest.mark.parametrize("extension", ["mp4", "mkv", "avi", "webm", "ts", "mpg"])
def test_containers(tmp_path, extension):
    codec = {"webm": ["-c:v", "libvpx", "-deadline", "realtime"], "avi": ["-c:v", "mpeg4"]}.get(
        extension, []
    )
    result, _ = convert(tmp_path, make(tmp_path / f"a.{extension}", *codec), 1.0, 3.0)
    assert result["status"] == "ok"
    assert abs(result["num_frames"] - 30) <= 1


def test_a_video_that_ends_early_is_ok_and_marked(tmp_path):
    result, _ = convert(tmp_path, make(tmp_path / "a.mp4"), 1.0, 11.0)
    assert (result["status"], result["short"], result["num_frames"]) == ("ok", True, 45)
    assert "7.00 s early" in result["detail"]


def test_a_truncated_file_whose_index_stands_first_is_ok_and_marked(tmp_path):
    source = make(tmp_path / "a.mp4", "-movflags", "+faststart")
    source.write_bytes(source.read_bytes()[: source.stat().st_size * 2 // 3])
    result, _ = convert(tmp_path, source)
    assert result["status"] == "ok"
    assert result["short"]
    assert 15 <= result["num_frames"] < 59


@pytest.mark.parametrize(
    ("start", "end", "reason"), [(5.0, 9.0, "segment outside the video"), (3.5, 9.0, "too short")]
)
def test_segments_that_the_video_does_not_have(tmp_path, start, end, reason):
    result, _ = convert(tmp_path, make(tmp_path / "a.mp4"), start, end)
    assert (result["status"], result["reason"]) == ("failed", reason)


def test_a_clock_of_milliseconds_makes_no_clip_too_short(tmp_path):
    source = make(tmp_path / "a.mkv", source="testsrc2=size=320x240:rate=15:duration=8")
    result, _ = convert(tmp_path, source, 7.0, 12.0)  # the last picture ends at 7.999 s
    assert (result["status"], result["num_frames"]) == ("ok", 15)
    result, _ = convert(tmp_path, source, 7.01, 12.0)
    assert (result["reason"], result["detail"]) == ("too short", "0.989 s")


def test_rotation_is_applied(tmp_path):
    upright = make(tmp_path / "a.mp4", "-vf", "geq=lum='if(lt(Y,H/2),220,30)':cb=128:cr=128")
    turned = tmp_path / "b.mp4"
    subprocess.run([find_ffmpeg().path, "-loglevel", "error", "-y", "-display_rotation", "90", "-i", upright,
                    "-c", "copy", turned], check=True, timeout=60)  # fmt: skip
    result, data = convert(tmp_path, turned)
    assert (result["width"], result["height"]) == (128, 170)
    frame = pictures(data, tmp_path)[10].mean(axis=2)
    assert (
        abs(frame[:, :50].mean() - frame[:, -50:].mean()) > 150
    )  # bright above is bright at one side


def test_an_aspect_that_only_the_pictures_state_counts(tmp_path):
    source = make(tmp_path / "a.mp4", "-bsf:v", "h264_metadata=sample_aspect_ratio=2/1")
    assert probe(source, 0.0, None).sample_aspect == 1  # the container says so
    source.write_bytes(source.read_bytes().replace(b"pasp", b"free"))
    assert probe(source, 0.0, None).sample_aspect == 2


def test_pixels_become_square(tmp_path):
    source = make(tmp_path / "a.mp4", "-vf", "setsar=2")
    result, data = convert(tmp_path, source)
    assert (result["width"], result["height"]) == (342, 128)  # 640:240 at a short side of 128, even
    assert len(pictures(data, tmp_path)) == result["num_frames"]


@pytest.mark.parametrize(
    ("width", "height", "aspect", "rotation", "size"),
    [
        (640, 480, 1, 0, (170, 128)),
        (480, 640, 1, 0, (128, 170)),
        (640, 480, 1, 90, (128, 170)),
        (720, 576, Fraction(16, 15), 0, (170, 128)),
        (64, 64, 1, 0, (128, 128)),
        (227, 128, 1, 270, (128, 228)),
    ],
)
def test_picture_size(width, height, aspect, rotation, size):
    facts = SourceFacts(0, width, height, rotation, Fraction(aspect), 2, 0.0, 1.0, 0.0, 0.04, None)
    assert picture_size(facts, 128) == size


def test_a_strip_is_refused():
    with pytest.raises(RowFailure, match="strip"):
        picture_size(SourceFacts(0, 4000, 16, 0, Fraction(1), 2, 0.0, 1.0, 0.0, 0.04, None), 128)


def test_untagged_sources_are_601_below_720_lines():
    def matrix(height, tag):
        return input_matrix(
            SourceFacts(0, 16, height, 0, Fraction(1), tag, 0.0, 1.0, 0.0, 0.04, None)
        )

    assert (matrix(719, 2), matrix(720, 2)) == ("smpte170m", "bt709")
    assert (matrix(100, 1), matrix(1080, 6)) == ("bt709", "smpte170m")


@pytest.mark.parametrize(
    ("size", "tagged"),
    [("320x240", "bt709"), ("320x240", "smpte170m"), ("1280x720", None), ("320x240", None)],
)
def test_colours_survive_whatever_the_source_is_tagged(tmp_path, size, tagged):
    """A plain colour, encoded in the matrix that its tag (or its size) says, comes out as itself."""
    matrix = tagged or ("bt709" if size == "1280x720" else "smpte170m")
    mark = f",setparams=colorspace={tagged}" if tagged else ""
    source = make(tmp_path / "a.mp4", "-vf", f"scale=out_color_matrix={matrix}:out_range=limited,format=yuv420p{mark}",
                  "-crf", "5", source=f"color=c=0xC04020:size={size}:rate=15:duration=2")  # fmt: skip
    _, data = convert(tmp_path, source)
    colour = pictures(data, tmp_path)[5].reshape(-1, 3).mean(axis=0)
    assert np.allclose(colour, (0xC0, 0x40, 0x20), atol=5)


def test_full_range_becomes_limited(tmp_path):
    source = make(tmp_path / "a.mp4", "-vf", "scale=out_range=full,format=yuvj420p", "-color_range", "pc",
                  source="color=c=white:size=160x120:rate=15:duration=2")  # fmt: skip
    _, data = convert(tmp_path, source)
    (tmp_path / "c.mp4").write_bytes(data)
    with av.open(str(tmp_path / "c.mp4")) as file:
        luma = next(file.decode(video=0)).to_ndarray(format="yuv420p")[:100]
    assert abs(float(luma.mean()) - 235) <= 1


@pytest.mark.parametrize("extension", ["mp4", "mkv"])
def test_the_first_picture_costs_no_other(tmp_path, extension):
    """A decoder of a stream with B-frames gives it only after the packets of some others."""
    source = make(tmp_path / f"a.{extension}", "-bf", "3")
    with av.open(str(source)) as file:
        second = [packet.pos for packet in file.demux(video=0)][1]
    with av.open(str(source)) as file:
        stream = file.streams.video[0]
        assert _key_picture(file, stream).width == 320
        assert next(file.demux(stream)).pos == second


@pytest.mark.parametrize("first", [0, 1])
def test_an_mp4_is_opened_without_reading_on(tmp_path, first, monkeypatch):
    """What libavformat would find in more of it, its boxes say: also where sound comes first."""
    source = make(tmp_path / "a.mp4", "-itsoffset", "0.5", "-f", "lavfi", "-i", "sine=duration=4",
                  "-map", first, "-map", 1 - first, "-c:a", "aac", "-b:a", "320k",
                  "-movflags", "+faststart")  # fmt: skip
    facts = probe(source, 0.0, None)
    data = source.read_bytes()
    reads = io.BytesIO(data)
    with av.open(reads, options=_options(data)) as file:
        read = reads.tell()
        assert file.streams.video[0].average_rate == 30
    assert read < 150_000 < len(data)
    whitelist = {"format_whitelist": FORMAT_WHITELIST}
    monkeypatch.setattr("prep.probe._options", lambda _: whitelist)
    assert probe(source, 0.0, None) == facts


def test_hdr_is_refused(tmp_path):
    source = make(tmp_path / "a.mp4", "-vf", "setparams=color_trc=smpte2084:colorspace=bt2020nc")
    result, _ = convert(tmp_path, source)
    assert result["reason"] == "hdr"


def test_the_command_is_the_documented_one(tmp_path):
    facts = probe(make(tmp_path / "a.mp4"), 1.0, 3.0)
    words = command(
        "ffmpeg", tmp_path / "-a.mp4", tmp_path / "out.mp4", SMALL, facts, 1.0, 3.0, Limits()
    )
    text = " ".join(words)
    assert words.count("-i") == 1
    assert text.index("-ss 1.000000") < text.index(" -i ")
    for part in ("-threads 1", "cpu-independent=1", "+cgop+bitexact", "filter_units=remove_types=6",
                 "-timelimit 300", "-protocol_whitelist file", f"file:{tmp_path}/-a.mp4", "-use_editlist 0"):  # fmt: skip
        assert part in text
    assert "accurate_rnd" in filters(SMALL, facts)


@pytest.mark.slow
def test_other_cpu_models_write_the_same_coded_pictures(tmp_path):
    """ffmpeg and x264 choose code by CPU; with our flags the choice leaves no trace in the bytes."""
    source = make(tmp_path / "a.mp4", source="testsrc2=size=426x240:rate=28:duration=4")
    facts = probe(source, 0.0, None)
    coded = set()
    for number, (flags, asm) in enumerate(
        [([], ""), (["-cpuflags", "sse2"], ":asm=sse2"), (["-cpuflags", "0"], ":asm=0")]
    ):
        target = tmp_path / f"{number}.mp4"
        words = command(find_ffmpeg().path, source, target, SMALL, facts, 0.0, None, Limits())
        words = [
            words[0],
            *flags,
            *(word + asm if word == "cpu-independent=1" else word for word in words[1:]),
        ]
        run(words, source, Limits())
        data = target.read_bytes()
        form = check_form(data, 16)
        coded.add(data[form.gops.offsets[0] : form.gops.offsets[-1]])
    assert len(coded) == 1


def test_an_encode_that_burns_cpu_is_ended(tmp_path):
    source = make(tmp_path / "a.mp4", source="testsrc2=size=1280x720:rate=60:duration=30")
    result, _ = convert(
        tmp_path, source, cpu_seconds=1, profile=PROFILES["general"].changed(preset="veryslow")
    )
    assert (result["status"], result["reason"]) == ("failed", "cpu limit")


def test_ffmpeg_is_run_once_to_be_known(tmp_path):
    fake = fake_ffmpeg(tmp_path, f"echo run >> {tmp_path}/log\nsleep 0.3\necho ffmpeg version fake")
    code = (
        "from prep.ffmpeg_binary import *; look_ahead(); look_ahead(); print(find_ffmpeg().sha256)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True,
                          timeout=60, env={**os.environ, "KPREP_FFMPEG": str(fake)})  # fmt: skip
    assert done.stdout.strip() == hashlib.sha256(fake.read_bytes()).hexdigest()
    assert (tmp_path / "log").read_text() == "run\n"


def test_a_stalled_encode_is_ended(tmp_path, monkeypatch):
    fake = fake_ffmpeg(
        tmp_path, '[ "$1" = -version ] && echo ffmpeg version fake && exit\nsleep 60'
    )
    source = make(tmp_path / "a.mp4")
    monkeypatch.setenv("KPREP_FFMPEG", str(fake))
    result, _ = convert(tmp_path, source, wall_seconds=1)
    assert result["reason"] == "stalled"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.mp4", b"", "empty file"),
        ("zeros.mp4", bytes(5000), "not a video"),
        ("page.mp4", b"<!DOCTYPE html><html>404</html>", "unsafe input"),
        ("page5.mp4", b"\n<!doctype html><title>404</title>", "unsafe input"),
        ("old page.mp4", b"<HTML><BODY>404</BODY></HTML>", "unsafe input"),
        ("noise.mp4", bytes(range(256)) * 40, "not a video"),
        (
            "list.mp4",
            b"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nsecret.mp4\n#EXT-X-ENDLIST\n",
            "unsafe input",
        ),
        ("concat.mp4", b"ffconcat version 1.0\nfile secret.mp4\n", "unsafe input"),
        ("concat2.mp4", b"file 'secret.mp4'\n" * 20, "not a video"),
        (
            "dash.mp4",
            b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>',
            "unsafe input",
        ),
    ],
)
def test_files_that_are_no_videos(tmp_path, name, content, reason):
    make(tmp_path / "secret.mp4")
    (tmp_path / name).write_bytes(content)
    result, _ = convert(tmp_path, tmp_path / name)
    assert (result["status"], result["reason"]) == ("failed", reason)


def test_ffmpeg_itself_opens_no_other_file(tmp_path):
    """Also past the probe: the encoder's own allow-list refuses a script that names a file."""
    secret = make(tmp_path / "secret.mp4")
    script = tmp_path / "script.mp4"
    script.write_bytes(b"ffconcat version 1.0\nfile secret.mp4\n")
    words = command(
        find_ffmpeg().path,
        script,
        tmp_path / "out.mp4",
        SMALL,
        probe(secret, 0.0, None),
        0.0,
        None,
        Limits(),
    )
    with pytest.raises(RowFailure) as failure:
        run(words, script, Limits())
    assert failure.value.reason == Reason.ENCODE_FAILED
    assert not (tmp_path / "out.mp4").exists() or not (tmp_path / "out.mp4").stat().st_size


def test_a_file_name_that_looks_like_an_option(tmp_path):
    result, _ = convert(tmp_path, make(tmp_path / "a.mp4").rename(tmp_path / "-i %d $(x) 'q'.mp4"))
    assert result["status"] == "ok"


def test_the_next_candidate_is_tried(tmp_path):
    (tmp_path / "empty.mp4").touch()
    good = make(tmp_path / "a.mp4")
    both = [
        {"path": str(path), "source": "folder", "start": 0.0, "end": None, "was_there": False}
        for path in (tmp_path / "empty.mp4", good)
    ]
    assert convert(tmp_path, good, candidates=both)[0]["status"] == "ok"
    result, _ = convert(
        tmp_path, good, candidates=[both[0], {**both[0], "path": str(tmp_path / "nowhere.mp4")}]
    )
    assert (result["reason"], result["detail"]) == ("empty file", "then missing")


def test_expectation_comes_from_what_the_source_holds():
    facts = SourceFacts(0, 16, 16, 0, Fraction(1), 2, 0.5, 8.0, 0.5, 1 / 30, 10.0)
    wanted = expectation(facts, Candidate(None, "folder", 0.0, 10.0), SMALL)
    assert (wanted.seconds, wanted.frames, wanted.short) == (7.5, 112.5, True)
    assert not expectation(facts, Candidate(None, "folder", 0.0, 8.0), SMALL).short


def test_a_clip_two_frames_short_of_what_was_asked_is_marked():
    """At 15 fps; half a frame more or less is rounding."""
    facts = SourceFacts(0, 16, 16, 0, Fraction(1), 2, 0.0, 8.0, 0.0, 1 / 30, 10.0)
    asked = [Candidate(None, "folder", 0.0, 8 + frames / 15) for frames in (0, 1, 2)]
    assert [expectation(facts, one, SMALL).short for one in asked] == [False, False, True]


def test_a_clip_of_fewer_frames_than_the_source_holds_is_refused(tmp_path, monkeypatch):
    """As where ffmpeg ends early over damage and reports success."""

    def three_frames_short(*arguments, **form):
        *rest, start, end, limits = arguments
        return command(*rest, start, end - 3 / 15, limits, **form)

    monkeypatch.setattr("prep.encode.command", three_frames_short)
    result, _ = convert(tmp_path, make(tmp_path / "a.mp4"), 0.0, 4.0)
    assert (result["status"], result["reason"]) == ("failed", "damaged")
    assert result["detail"] == "57 frames came out where 60.0 were due"


def test_messages_carry_no_path_and_no_address(tmp_path):
    source = tmp_path / "x.mp4"
    text = f"[mov,mp4 @ 0x55d0c0ffee] error reading file:{source}\nError opening {source}: no\n"
    assert last_word(text, source) == "[mov,mp4] error reading x.mp4"


def test_a_folder_whose_name_is_no_utf8_is_not_in_a_message(tmp_path, monkeypatch):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/f\xff"))
    folder.mkdir()
    fake = fake_ffmpeg(
        tmp_path,
        'for word; do case "$word" in file:*a.mp4) echo "no: $word" >&2; exit 1;; esac; done',
    )
    source = make(folder / "a.mp4")
    monkeypatch.setenv("KPREP_FFMPEG", str(fake))
    result, _ = convert(tmp_path, source)
    assert (result["reason"], result["detail"]) == ("encode failed", "no: a.mp4")


def test_rows_that_fail_leave_nothing_behind(tmp_path):
    (tmp_path / "zeros.mp4").write_bytes(bytes(1000))
    convert(tmp_path, tmp_path / "zeros.mp4")
    assert not list((tmp_path / "work" / "staged").iterdir())


@pytest.mark.parametrize(
    ("ends", "reason"),
    [
        ("kill -9 $$", "worker crashed"),
        ("echo 'Error while filtering: Cannot allocate memory' >&2; exit 244", "worker crashed"),
        (
            "echo '[out#0/mp4] pthread_create() failed: Resource temporarily unavailable' >&2; exit 245",
            "worker crashed",
        ),
        ("echo 'x264 [error]: malloc of size 246208 failed' >&2; exit 187", "worker crashed"),
        (
            "echo 'ffmpeg: error while loading shared libraries: libmvec.so.1' >&2; exit 127",
            "worker crashed",
        ),
        ("echo '[h264] get_buffer() failed' >&2; exit 0", "worker crashed"),
        (
            "echo '[h264] Picture size 0x9 is invalid; get_buffer() failed' >&2; exit 69",
            "encode failed",
        ),
        ("echo '[in#0] Error during demuxing: Input/output error' >&2; exit 251", "encode failed"),
        ("rm {source}; exit 254", "storage"),
        ("echo 'Error writing trailer: Disk quota exceeded' >&2; exit 1", None),
        ("echo 'Could not open file: Read-only file system' >&2; exit 1", None),
        ("echo 'Error submitting a packet to the muxer: Input/output error' >&2; exit 1", None),
    ],
)
def test_what_the_machine_does_to_ffmpeg_is_not_the_fault_of_a_file(
    tmp_path, monkeypatch, ends, reason
):
    source = make(tmp_path / "a.mp4")
    fake = fake_ffmpeg(tmp_path, ends.format(source=source))
    monkeypatch.setenv("KPREP_FFMPEG", str(fake))
    result, _ = convert(tmp_path, source)
    assert result.get("reason") == reason
    assert ("cannot be written" in result.get("fatal", "")) == (reason is None)


@pytest.mark.parametrize(
    "error", [MemoryError(), av.error.MemoryError(12, "Cannot allocate memory")]
)
def test_want_of_memory_in_the_worker_is_not_the_fault_of_a_file(tmp_path, monkeypatch, error):
    def starved(*_):
        raise error

    source = make(tmp_path / "a.mp4")
    monkeypatch.setattr("prep.probe._key_picture", starved)
    result, _ = convert(tmp_path, source)
    assert (result["reason"], result["detail"]) == ("worker crashed", "the worker: out of memory")


def test_a_file_that_was_there_is_not_missing(tmp_path):
    found = {"path": str(tmp_path / "gone.mp4"), "source": "folder", "start": 0.0, "end": None}
    result, _ = convert(tmp_path, None, candidates=[{**found, "was_there": True}])
    assert result["reason"] == "storage"
    result, _ = convert(tmp_path, None, candidates=[{**found, "was_there": False}])
    assert result["reason"] == "missing"
    empty = {**found, "path": str(tmp_path / "empty.mp4"), "was_there": True}
    (tmp_path / "empty.mp4").touch()
    result, _ = convert(tmp_path, None, candidates=[empty, {**found, "was_there": True}])
    assert (result["reason"], result["detail"].endswith("then empty file")) == ("storage", True)


@pytest.mark.parametrize("content", [b"no video" * 999, None], ids=["no video", "ends early"])
def test_a_file_that_cannot_be_read_to_its_end_is_not_blamed(tmp_path, monkeypatch, content):
    source = make(tmp_path / "a.mp4")
    if content is not None:
        source.write_bytes(content)

    def breaks(path):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr("prep.encode._read_through", breaks)
    result, _ = convert(tmp_path, source, 1.0, 9.0)
    assert (result["reason"], result["detail"].endswith("Input/output error")) == ("storage", True)


def test_a_full_disk_is_fatal_and_nobodys_row(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdatasync", full)
    result, _ = convert(tmp_path, make(tmp_path / "a.mp4"))
    assert "No space left" in result["fatal"]
