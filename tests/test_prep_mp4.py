import subprocess

import pytest

from prep.ffmpeg_binary import find_ffmpeg
from prep.mp4 import FormError, boxes, check_form, is_encrypted

GOOD = {
    "-c:v": "libx264", "-g": "16", "-keyint_min": "16", "-sc_threshold": "0", "-bf": "0",
    "-x264-params": "slices=1", "-bsf:v": "filter_units=remove_types=6", "-flags": "+cgop",
    "-movflags": "+faststart", "-use_editlist": "0", "-pix_fmt": "yuv420p", "-preset": "veryfast",
    "-threads": "1",
}  # fmt: skip
TAGS = "setparams=range=limited:colorspace=smpte170m"


def encode(tmp_path, changed=None, *, sound=False, filters=TAGS):
    """Encode 40 frames with the good options, some of them changed (None: left out)."""
    options = {**GOOD, **(changed or {})}
    inputs = ["-f", "lavfi", "-i", "testsrc2=size=128x96:rate=15"]
    if sound:
        inputs += ["-f", "lavfi", "-i", "sine=duration=2", "-c:a", "aac"]
    flags = [word for name, value in options.items() if value is not None for word in (name, value)]
    target = tmp_path / "clip.mp4"
    subprocess.run(
        [find_ffmpeg().path, "-loglevel", "error", "-y", *inputs, "-frames:v", "40", "-vf", filters, *flags, str(target)],
        check=True, timeout=60,
    )  # fmt: skip
    return target.read_bytes()


def test_the_form_is_accepted_and_indexed(tmp_path):
    data = encode(tmp_path)
    form = check_form(data, 16)
    assert (form.num_frames, form.width, form.height) == (40, 128, 96)
    assert len(form.gops.crc32) == 3  # 40 frames in GOPs of 16: 16, 16, 8
    for start in form.gops.offsets[:-1]:
        assert data[start + 4] & 31 == 5  # an IDR slice behind its 4-byte length
    assert form.gops.offsets[-1] == len(data)
    assert form.gops.codec_config[0] == 1


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"-bf": "2"}, "reordered"),
        ({"-g": "8", "-keyint_min": "8"}, "IDR|P slice"),
        ({"-bsf:v": None}, "slice"),  # x264's options SEI stands before the first IDR
        ({"-x264-params": "slices=2"}, "slice"),
        ({"-use_editlist": "1"}, "edts"),
        ({"-movflags": None}, "before mdat"),
        ({"-movflags": "+frag_keyframe+empty_moov"}, "moof|mdat"),
        ({"-pix_fmt": "yuv444p"}, "yuv420p"),
        (
            {
                "-c:v": "mpeg4",
                "-x264-params": None,
                "-bsf:v": None,
                "-preset": None,
                "-keyint_min": None,
                "-flags": None,
            },
            "h264",
        ),
    ],
)
def test_other_forms_are_refused(tmp_path, changed, word):
    with pytest.raises(FormError, match=word):
        check_form(encode(tmp_path, changed), 16)


def test_a_second_track_is_refused(tmp_path):
    with pytest.raises(FormError, match="one track"):
        check_form(encode(tmp_path, sound=True), 16)


def test_other_colour_tags_are_refused(tmp_path):
    with pytest.raises(FormError, match="BT.601"):
        check_form(encode(tmp_path, filters="setparams=range=limited:colorspace=bt709"), 16)


def test_every_cut_and_flip_is_an_error_or_changes_no_pixel_data(tmp_path):
    data = encode(tmp_path)
    whole = check_form(data, 16)
    for end in range(0, len(data), 997):
        with pytest.raises(FormError):
            check_form(data[:end], 16)
    position = whole.gops.offsets[1] + 4
    altered = data[:position] + bytes([data[position] ^ 0x1F]) + data[position + 1 :]
    with pytest.raises(FormError):
        check_form(altered, 16)


def test_boxes_of_nonsense_end():
    assert list(boxes(b"\0\0\0\0mdat" + bytes(20))) == [(b"mdat", 8, 28)]
    assert list(boxes(b"\0\0\0\4free")) == []
    assert list(boxes(bytes(1000)))[:1] == [(b"\0\0\0\0", 8, 1000)]


def test_encrypted_sample_description(corpus):
    data = (corpus / "odd/mp4parse/av1-clearkey-cbcs-video.mp4").read_bytes()
    assert is_encrypted(data)
    assert not is_encrypted((corpus / "actions/singles/abseiling_k400.mp4").read_bytes())
