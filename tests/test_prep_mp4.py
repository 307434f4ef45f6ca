import io
import itertools
import struct
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prep.ffmpeg_binary import find_ffmpeg
from prep.format import open_media
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


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """40 frames in GOPs of 16."""
    return encode(tmp_path_factory.mktemp("clip"))


def place(data, kind):
    """Return where the payload of the one box of a kind begins, and where it ends."""
    ((start, stop),) = [(start, stop) for found, start, stop in boxes(data) if found == kind]
    return start, stop


def patched(data, kind, at, layout, *values):
    """Write numbers into a box, `at` bytes behind the beginning of its payload."""
    changed = bytearray(data)
    struct.pack_into(layout, changed, place(data, kind)[0] + at, *values)
    return bytes(changed)


def with_box(data, parents, kind, payload):
    """Put a box at the end of the last of its parents; the clip's bytes move behind it."""
    box = struct.pack(">I4s", 8 + len(payload), kind) + payload
    changed = bytearray(data)
    for parent in parents:
        start, stop = place(data, parent)
        struct.pack_into(">I", changed, start - 8, stop - start + 8 + len(box))
    for found, start, _ in boxes(data):
        if found == b"stco":  # of one chunk
            struct.pack_into(">I", changed, start + 8, first_byte(data) + len(box))
    end = place(data, parents[-1])[1]
    return bytes(changed[:end] + box + changed[end:])


def first_byte(data):
    """Return where the first frame begins: all of them fill the mdat."""
    return place(data, b"mdat")[0]


STBL = (b"moov", b"trak", b"mdia", b"minf", b"stbl")


def test_tables_of_another_form_are_accepted(clip):
    whole = check_form(clip, 16)
    (length,) = struct.unpack_from(">I", clip, place(clip, b"stts")[0] + 12)
    # 24 frames, 15 of the same length, and the last, behind which nothing is late
    rows = struct.pack(">8I", 0, 3, 24, length, 15, length, 1, 5 * length)
    without = patched(clip, b"stts", -4, ">4s", b"free")
    for other in (
        with_box(without, STBL, b"stts", rows),
        with_box(clip, STBL, b"ctts", struct.pack(">3Ii", 0, 1, 40, 0)),
    ):
        form = check_form(other, 16)
        assert (form.num_frames, form.gops.crc32) == (whole.num_frames, whole.gops.crc32)


@pytest.mark.parametrize(
    ("kind", "at", "layout", "value", "word"),
    [
        (b"mvhd", 0, ">B", 2, "version"),
        (b"mdhd", 0, ">B", 3, "version"),
        (b"hdlr", 8, ">4s", b"soun", "video"),
        (b"dref", 4, ">I", 2, "dref"),
        (b"dref", 8, ">I", 8, "dref"),
        (b"stsd", 4, ">I", 2, "h264"),  # entries
        (b"stsd", 12, ">4s", b"hev1", "h264 in yuv420p, not hev1"),
        (b"stsd", 40, ">H", 126, "126x96"),  # width
        (b"stsd", 98, ">4s", b"avcD", "avcC"),
        (b"stsd", 106, ">B", 0xFC, "4-byte lengths"),  # 6 bits of ones, then length - 1
        (b"stsz", 8, ">I", 0, "no frames"),
        (b"stsz", 8, ">I", 39, "constant rate"),  # one less than has a time
        (b"stsz", 8, ">I", 0xFFFFFFFF, "4,294,967,295 rows"),
        (b"stsz", 4, ">I", 1 << 30, "larger than the file"),  # all are of one size
        (b"stsz", 12, ">I", 1 << 30, "cut short"),  # the first frame's
        (b"stts", 4, ">I", 2, "cut short"),
        (b"stts", 8, ">I", 41, "constant rate"),
        (b"stts", 12, ">I", 0, "constant rate"),
        (b"stsc", 4, ">I", 9, "cut short"),
        (b"stsc", 8, ">I", 2, "numbered from 1"),
        (b"stsc", 12, ">I", 39, "39 frames have a place"),
        (b"stsc", 12, ">I", 0xFFFFFFFF, "frames have a place"),
        (b"stsc", 16, ">I", 2, "one description"),
        (b"stco", 4, ">I", 0, "numbered from 1"),
        (b"stco", 4, ">I", 2, "cut short"),
        (b"stco", 8, ">I", 40, "IDR slice"),
        (b"stco", 8, ">I", 0xFFFFFF00, "cut short"),
        (b"stss", 4, ">I", 2, "keyframes"),
        (b"stss", 12, ">I", 18, "keyframes"),
        (b"stss", -4, ">4s", b"free", "keyframes"),  # without it, all are
        (b"stco", -4, ">4s", b"free", "one co64 box"),
        (b"stsz", -4, ">4s", b"stts", "one stsz box"),
        (b"stsc", -4, ">4s", b"stps", "no stps"),
        (b"stsc", -4, ">4s", b"sbgp", "no sbgp"),
    ],
)
def test_a_damaged_table_is_refused(clip, kind, at, layout, value, word):
    with pytest.raises(FormError, match=word):
        check_form(patched(clip, kind, at, layout, value), 16)


def in_two_chunks(data, gap):
    """Say with 64-bit numbers where the first and the 21st frame are, the latter wrongly by gap."""
    sizes = struct.unpack_from(">20I", data, place(data, b"stsz")[0] + 12)
    changed = patched(patched(data, b"stsc", 12, ">I", 20), b"stco", -4, ">4s", b"free")
    first = first_byte(data) + 8 + 8 + 2 * 8  # the new box stands before it
    return with_box(
        changed, STBL, b"co64", struct.pack(">2I2Q", 0, 2, first, first + sum(sizes) + gap)
    )


def test_frames_that_are_not_contiguous_late_or_reordered_are_refused(clip):
    assert check_form(in_two_chunks(clip, 0), 16).gops.crc32 == check_form(clip, 16).gops.crc32
    with pytest.raises(FormError, match="frame 20 is not contiguous"):
        check_form(in_two_chunks(clip, 1), 16)
    with pytest.raises(FormError, match="reordered"):
        check_form(with_box(clip, STBL, b"ctts", struct.pack(">3Ii", 0, 1, 40, 512)), 16)
    (length,) = struct.unpack_from(">I", clip, place(clip, b"stts")[0] + 12)
    rows = struct.pack(">6I", 0, 2, 20, length, 20, length + 1)
    without = patched(clip, b"stts", -4, ">4s", b"free")
    with pytest.raises(FormError, match="late"):
        check_form(with_box(without, STBL, b"stts", rows), 16)


def test_coded_pictures_that_are_damaged_or_cut_are_refused(clip):
    start, stop = place(clip, b"mdat")
    cut = bytearray(clip[:-1])
    struct.pack_into(">I", cut, start - 8, stop - start + 7)
    with pytest.raises(FormError, match="last frame is cut short"):
        check_form(bytes(cut), 16)
    config = clip.index(b"avcC") + 4
    blank = bytearray(clip)  # the sequence parameter set, behind its length
    blank[config + 9 : config + 15] = bytes(6)
    with pytest.raises(FormError, match="frame 0 does not decode"):
        check_form(bytes(blank), 16)
    zeros = bytearray(clip)  # the first slice, behind its NAL header
    zeros[start + 5 : start + 200] = bytes(195)
    with pytest.raises(FormError, match="frame 0 does not decode"):
        check_form(bytes(zeros), 16)
    zeros = bytearray(clip)
    second = start + 4 + struct.unpack_from(">I", clip, start)[0]
    (length,) = struct.unpack_from(">I", clip, second)
    zeros[second + 5 : second + 4 + length] = bytes(length - 1)
    with pytest.raises(FormError, match="frame 1 does not decode"):
        check_form(bytes(zeros), 16)


def test_colours_can_stand_in_the_container_alone(tmp_path):
    bare = encode(tmp_path, filters="setparams=range=unknown:colorspace=unknown")
    parents = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd")
    for matrix, full, wanted in ((6, 0, True), (1, 0, False), (6, 128, False)):
        payload = b"nclx" + struct.pack(">3HB", 2, 2, matrix, full)
        tagged = with_box(bare, parents, b"colr", payload)
        entry = place(tagged, b"stsd")[0] + 8
        (size,) = struct.unpack_from(">I", tagged, entry)
        tagged = patched(tagged, b"stsd", 8, ">I", size + 8 + len(payload))
        if wanted:
            assert check_form(tagged, 16).num_frames == 40
        else:
            with pytest.raises(FormError, match="BT.601|yuvj420p"):
                check_form(tagged, 16)
    with pytest.raises(FormError, match="BT.601"):
        check_form(bare, 16)


def as_libavformat_reads_it(data):
    """Return (position, size, shown, is it a keyframe) of each frame, and the picture's size."""
    with open_media(io.BytesIO(data), {}) as file:
        stream = file.streams.video[0]
        packets = [packet for packet in file.demux(stream) if packet.size]
        assert all(packet.pts == packet.dts for packet in packets)
        size = (stream.codec_context.width, stream.codec_context.height)
        return (
            [(p.pos, p.size, p.pts, p.is_keyframe) for p in packets],
            size,
            bytes(stream.codec_context.extradata),
        )


@given(
    changes=st.lists(
        st.tuples(
            st.floats(0, 1, exclude_max=True),
            st.one_of(
                st.binary(min_size=1, max_size=1),
                st.sampled_from([0, 1, 2, 3, 16, 40, 2**31 - 1, 2**32 - 1]).map(
                    lambda number: struct.pack(">I", number)
                ),
            ),
        ),
        min_size=1,
        max_size=2,
    )
)
def test_what_is_accepted_is_what_libavformat_reads(clip, changes):
    changed = bytearray(clip)
    header = place(clip, b"mdat")[0]
    for where, text in changes:
        at = int(where * header)
        changed[at : at + len(text)] = text
    data = bytes(changed)
    try:
        form = check_form(data, 16)
    except FormError:
        return
    frames, size, config = as_libavformat_reads_it(data)
    assert [position for position, *_ in frames[::16]] == list(form.gops.offsets[:-1])
    assert sum(frames[-1][:2]) == form.gops.offsets[-1]
    assert all(a + b == c for (a, b, *_), (c, *_) in itertools.pairwise(frames))
    steps = {later - earlier for (*_, earlier, _), (*_, later, _) in itertools.pairwise(frames)}
    assert len(steps) == 1
    assert [key for *_, key in frames] == [number % 16 == 0 for number in range(len(frames))]
    assert (len(frames), size) == (form.num_frames, (form.width, form.height))
    assert config == form.gops.codec_config


def test_boxes_of_nonsense_end():
    assert list(boxes(b"\0\0\0\0mdat" + bytes(20))) == [(b"mdat", 8, 28)]
    assert list(boxes(b"\0\0\0\4free")) == []
    assert list(boxes(bytes(1000)))[:1] == [(b"\0\0\0\0", 8, 1000)]


def test_encrypted_sample_description(corpus):
    data = (corpus / "odd/mp4parse/av1-clearkey-cbcs-video.mp4").read_bytes()
    assert is_encrypted(data)
    assert not is_encrypted((corpus / "actions/singles/abseiling_k400.mp4").read_bytes())


def test_boxes_within_each_other_without_end_are_no_recursion(tmp_path):
    nested = b""
    for _ in range(3000):
        nested = struct.pack(">I4s", len(nested) + 8, b"moov") + nested
    assert len(list(boxes(nested))) == 11
    assert not is_encrypted(nested)
    with pytest.raises(FormError, match="one moov"):
        check_form(encode(tmp_path) + nested, 16)


def test_boxes_without_number_are_refused(tmp_path):
    with pytest.raises(FormError, match="more than 10,000 boxes"):
        check_form(encode(tmp_path) + struct.pack(">I4s", 8, b"free") * 10_001, 16)


@pytest.mark.parametrize(("kind", "place"), [(b"stsz", 8), (b"stts", 4), (b"stco", 4)])
def test_tables_of_more_rows_than_any_clip_has_are_refused(tmp_path, kind, place):
    data = bytearray(encode(tmp_path))
    (start,) = [start for name, start, _ in boxes(data) if name == kind]
    struct.pack_into(">I", data, start + place, (1 << 20) + 1)
    with pytest.raises(FormError, match="1,048,577 rows"):
        check_form(bytes(data), 16)


def test_a_strangers_name_of_a_coding_is_shown_escaped(tmp_path):
    data = encode(tmp_path).replace(b"avc1\0\0\0\0", b"\x1b[2J\0\0\0\0", 1)
    with pytest.raises(FormError, match=r"'\\x1b\[2J'"):
        check_form(data, 16)
