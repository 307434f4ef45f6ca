"""Tars as streams: every kind of damage that is known of the mirror, and hostile ones."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import tracemalloc
import zlib
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prep.tar_stream import ArchiveError, TarStream

if TYPE_CHECKING:
    from collections.abc import Callable

FILES = {"a.mp4": b"first" * 300, "b.mp4": b"", "c.mp4": bytes(range(256)) * 40}


class Drip:
    """A body that gives at most so many bytes at a time, as sockets do."""

    def __init__(self, data: bytes, most: int = 1 << 16) -> None:
        self._file = io.BytesIO(data)
        self._most = most
        self.read_bytes = 0

    def read(self, size: int, /) -> bytes:
        data = self._file.read(min(size, self._most))
        self.read_bytes += len(data)
        return data


def tar_of(files: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def tar_with(change: Callable[[tarfile.TarInfo], None], data: bytes = b"") -> bytes:
    """Return a tar of one odd member between two good ones."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in ("before.mp4", "odd.mp4", "after.mp4"):
            info = tarfile.TarInfo(name)
            info.size = 4
            body = b"good"
            if name == "odd.mp4":
                info.size, body = len(data), data
                change(info)
            tar.addfile(info, io.BytesIO(body))
    return out.getvalue()


def contents(stream: TarStream, size: int = 1 << 16) -> dict[str, bytes]:
    found = {}
    for member in stream:
        parts = []
        while data := member.read(size):
            parts.append(data)
        found[member.name] = b"".join(parts)
        assert len(found[member.name]) == member.size_bytes
    return found


def read_until_broken(data: bytes) -> tuple[dict[str, bytes], ArchiveError]:
    found = {}
    with pytest.raises(ArchiveError) as caught:
        for member in TarStream(Drip(data)):
            body = b""
            while part := member.read(1 << 16):
                body += part
            found[member.name] = body
    return found, caught.value


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_content_decides_not_the_name(pack: Callable[[bytes], bytes], form: int) -> None:
    assert contents(TarStream(Drip(pack(tar_of(FILES, form)), 777))) == FILES


def test_gzip_in_several_parts_with_padding_is_one_tar() -> None:
    plain = tar_of(FILES)
    packed = gzip.compress(plain[:700]) + gzip.compress(plain[700:]) + bytes(100)
    assert contents(TarStream(Drip(packed, 1))) == FILES


@settings(max_examples=60)
@given(
    files=st.dictionaries(
        st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=150),
        st.binary(max_size=3000),
        max_size=6,
    ).filter(bool),
    form=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    packed=st.booleans(),
    most=st.integers(1, 5000),
)
def test_members_come_out_as_they_went_in(
    files: dict[str, bytes], form: int, packed: bool, most: int
) -> None:
    plain = tar_of(files, form)
    data = gzip.compress(plain, 1) if packed else plain
    assert contents(TarStream(Drip(data, most))) == files


def test_only_the_base_name_is_kept() -> None:
    names = ["/deep/abs/x.mp4", "../../etc/y.mp4", "a class (of 3)/z.mp4", "./w.mp4"]
    stream = TarStream(Drip(tar_of(dict.fromkeys(names, b"1"))))
    assert [member.name for member in stream] == ["x.mp4", "y.mp4", "z.mp4", "w.mp4"]


def kind(type_: bytes) -> Callable[[tarfile.TarInfo], None]:
    def change(info: tarfile.TarInfo) -> None:
        info.type = type_
        info.linkname = "/etc/passwd"

    return change


def named(name: str) -> Callable[[tarfile.TarInfo], None]:
    def change(info: tarfile.TarInfo) -> None:
        info.name = name

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (kind(tarfile.DIRTYPE), "folder"),
        (kind(tarfile.SYMTYPE), "link"),
        (kind(tarfile.LNKTYPE), "link"),
        (kind(tarfile.CHRTYPE), "special file"),
        (kind(tarfile.BLKTYPE), "special file"),
        (kind(tarfile.FIFOTYPE), "special file"),
        (named("folder/._odd.mp4"), "AppleDouble file"),
        (named("folder/.."), "no name"),
        (named("folder/"), "no name"),
    ],
)
def test_what_is_no_file_is_counted_and_skipped(
    change: Callable[[tarfile.TarInfo], None], reason: str
) -> None:
    stream = TarStream(Drip(tar_with(change)))
    assert contents(stream) == {"before.mp4": b"good", "after.mp4": b"good"}
    assert dict(stream.skipped) == {reason: 1}


def test_members_beyond_the_limit_are_skipped() -> None:
    data = tar_with(lambda info: None, b"x" * 5000)
    stream = TarStream(Drip(data), max_member_bytes=4999)
    assert contents(stream) == {"before.mp4": b"good", "after.mp4": b"good"}
    assert dict(stream.skipped) == {"too large": 1}
    assert len(contents(TarStream(Drip(data), max_member_bytes=5000))) == 3


def test_members_that_nobody_reads_are_passed_over() -> None:
    stream = TarStream(Drip(gzip.compress(tar_of(FILES))))
    assert [(member.name, member.size_bytes) for member in stream] == [
        (name, len(data)) for name, data in FILES.items()
    ]


@pytest.mark.parametrize(
    "data",
    [b"", gzip.compress(b""), tar_of({}), gzip.compress(tar_of({}))],
    ids=["no bytes", "gzip of nothing", "tar of nothing", "gzip of a tar of nothing"],
)
def test_an_empty_archive_says_so(data: bytes) -> None:
    found, error = read_until_broken(data)
    assert not found
    assert error.reason == "empty archive"


@pytest.mark.parametrize(
    "data",
    [
        b"<!DOCTYPE html><html>404</html>",
        b"<!DOCTYPE html>" + b"x" * 2000,
        gzip.compress(b"no tar " * 200),
        bz2.compress(tar_of(FILES)),
        lzma.compress(tar_of(FILES)),
        b"PK\x03\x04" + bytes(600),
        b"\x28\xb5\x2f\xfd" + bytes(600),
    ],
    ids=["short page", "page", "gzip of text", "bzip2", "xz", "zip", "zstd"],
)
def test_what_is_no_tar_says_so(data: bytes) -> None:
    found, error = read_until_broken(data)
    assert not found
    assert error.reason == "not an archive"


@pytest.mark.parametrize("packed", [False, True])
@given(data=st.data())
@settings(max_examples=60)
def test_a_cut_is_always_noticed_after_the_members_before_it(
    packed: bool, data: st.DataObject
) -> None:
    files = {f"{number}.mp4": bytes([number]) * 700 for number in range(5)}
    whole = tar_of(files)
    end = 5 * (512 + 1024)  # where the zeros begin: header, then 700 bytes in two blocks
    whole = whole[: end + 512]  # tarfile takes one block of zeros for the end, and so do we
    stored = gzip.compress(whole, 0) if packed else whole
    cut = data.draw(st.integers(600, len(stored) - 1))
    found, error = read_until_broken(stored[:cut])
    assert error.reason == "truncated archive"
    plain = cut - 30 if packed else cut  # level 0 stores; its headers are shorter than 30 bytes
    complete = max(0, (plain - 512 - 700)) // 1536 + (plain >= 512 + 700)
    assert list(found) == list(files)[: len(found)]
    assert len(found) >= min(complete, 5)
    assert all(files[name] == body for name, body in found.items())


def test_a_cut_between_members_is_noticed() -> None:
    found, error = read_until_broken(tar_of(FILES)[: 512 + 1536])  # behind a.mp4 (1,500 bytes)
    assert list(found) == ["a.mp4"]
    assert error.reason == "truncated archive"
    assert "zeros" in error.detail


def test_a_flipped_bit_in_a_header_is_noticed() -> None:
    data = bytearray(tar_of(FILES))
    data[512 + 1536 + 3] ^= 1  # in the name of the second member
    found, error = read_until_broken(bytes(data))
    assert list(found) == ["a.mp4"]
    assert error.reason == "damaged archive"


def test_a_header_that_tarfile_gives_up_on_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer tarfiles refuse more headers, and take each of them for the end of the archive."""
    processed = tarfile.TarInfo._proc_member  # type: ignore[attr-defined]

    def refuse(info: tarfile.TarInfo, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if info.name == "c.mp4":
            raise tarfile.InvalidHeaderError("odd")  # type: ignore[attr-defined]
        result: tarfile.TarInfo = processed(info, archive)
        return result

    monkeypatch.setattr(tarfile.TarInfo, "_proc_member", refuse)
    found, error = read_until_broken(tar_of(FILES))
    assert list(found) == ["a.mp4", "b.mp4"]
    assert error.reason == "damaged archive"


def test_a_wrong_gzip_checksum_is_noticed() -> None:
    data = bytearray(gzip.compress(tar_of(FILES)))
    data[-6] ^= 1
    found, error = read_until_broken(bytes(data))
    assert found == FILES
    assert error.reason == "damaged archive"


@settings(max_examples=150)
@given(data=st.data(), packed=st.booleans())
def test_no_damage_leads_to_anything_but_an_archive_error(
    data: st.DataObject, packed: bool
) -> None:
    whole = tar_of(FILES, tarfile.PAX_FORMAT)
    broken = bytearray(gzip.compress(whole) if packed else whole)
    for _ in range(data.draw(st.integers(1, 8))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    reason = ""
    try:
        contents(TarStream(Drip(bytes(broken), 1000), max_member_bytes=1 << 20))
    except ArchiveError as error:
        reason = error.reason
    named = ("empty archive", "truncated archive", "damaged archive", "not an archive")
    assert reason in ("", *named)


def header(name: bytes, size: bytes, type_: bytes) -> bytes:
    """Return a ustar header block with a good checksum, whatever it claims."""
    block = bytearray(512)
    block[0 : len(name)] = name
    block[100:108] = b"0000644\0"
    block[124:136] = size
    block[148:156] = b" " * 8
    block[156:157] = type_
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("type_", [b"L", b"K", b"x", b"g"])
def test_an_extended_header_cannot_fill_the_memory(type_: bytes) -> None:
    bomb = header(b"h", b"77777777777\0", type_) + bytes(8 << 20)  # claims 8 GiB
    tracemalloc.start()
    _, error = read_until_broken(gzip.compress(bomb, 1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error.reason == "damaged archive"
    assert peak < 4 << 20


def extended(records: bytes, type_: bytes = b"x") -> bytes:
    return header(b"p", b"%011o\0" % len(records), type_) + records + bytes(-len(records) % 512)


def record(key: bytes, value: bytes = b"") -> bytes:
    """Return a pax record: its own length in decimal digits, then KEY=VALUE and a line break."""
    rest = len(b" =\n") + len(key) + len(value)
    length = next(n for n in range(rest, rest + 9) if len(b"%d" % n) + rest == n)
    return b"%d %s=%s\n" % (length, key, value)


def test_global_headers_do_not_pile_up() -> None:
    comment = extended(record(b"comment", b"0123456789abcdef" * 4), b"g")  # as of `git archive`
    assert contents(TarStream(Drip(comment * 100 + tar_of(FILES)))) == FILES
    keys = (b"".join(record(b"%d" % n) for n in range(k, k + 500)) for k in range(0, 5000, 500))
    found, error = read_until_broken(b"".join(extended(some, b"g") for some in keys))
    assert not found
    assert error.detail == "its global headers have over 16,384 bytes"


@pytest.mark.parametrize(
    "records",
    [
        b"3 a" * 300_000 + b"=",  # tarfile: 300,000 keys of 450,000 characters on average
        b"9" * (1 << 20),  # older tarfiles: a regular expression that takes an hour
        record(b"comment", b"9" * (1 << 19)),
        record(b"path", b"b.mp4") + b"x",
        b"0 a=\n",
        b"99 a=\n",
        b"5 aa\n",
        b"6 a=bc",
        b"\xb2 a=\n",  # a digit, but of another script
    ],
)
@pytest.mark.parametrize("type_", [b"x", b"X"])
def test_records_of_an_extended_header_that_are_none_are_damage(
    records: bytes, type_: bytes
) -> None:
    first = tar_of(FILES)[: 512 + 1536]  # a.mp4
    found, error = read_until_broken(first + extended(records, type_) + tar_of(FILES))
    assert list(found) == ["a.mp4"]
    assert error.reason == "damaged archive"
    assert "an extended header" in error.detail


def test_the_map_of_a_sparse_file_cannot_fill_the_memory() -> None:
    """Version 1.0 has it in the file, where tarfile reads as many numbers as it claims."""
    keys = {b"major": b"1", b"minor": b"0", b"name": b"b.mp4", b"realsize": b"1"}
    records = b"".join(record(b"GNU.sparse." + key, value) for key, value in keys.items())
    numbers = b"9999999999\n" + b"1\n" * (4 << 20)
    bomb = extended(records) + header(b"b.mp4", b"%011o\0" % len(numbers), b"0") + numbers
    packed = gzip.compress(bomb, 1)
    tracemalloc.start()
    _, error = read_until_broken(packed)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error.detail == "a sparse file, which is not supported"
    assert peak < 4 << 20


def test_records_that_are_followed_by_zeros_are_read() -> None:
    named = extended(record(b"path", b"n" * 200 + b".mp4") + bytes(7))
    assert list(contents(TarStream(Drip(named + tar_of({"a": b"1"}))))) == ["n" * 200 + ".mp4"]


def test_a_gzip_bomb_is_read_in_small_steps() -> None:
    size = 64 << 20
    packer = zlib.compressobj(9, wbits=31)
    bomb = packer.compress(header(b"b.mp4", b"%011o\0" % size, b"0"))
    bomb += b"".join(packer.compress(bytes(1 << 20)) for _ in range(64)) + packer.compress(
        bytes(1024)
    )
    bomb += packer.flush()
    tracemalloc.start()
    stream = TarStream(Drip(bomb), max_member_bytes=1 << 20)
    assert contents(stream) == {}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert stream.skipped["too large"] == 1
    assert peak < 4 << 20


@pytest.mark.parametrize("size", [b"\xff" * 12, b"\x80" + b"\xff" * 11], ids=["negative", "huge"])
def test_impossible_sizes_are_damage(size: bytes) -> None:
    good = tar_of({"a.mp4": b"x"})[:1024]
    found, error = read_until_broken(good + header(b"b.mp4", size, b"0") + bytes(2048))
    assert found == {"a.mp4": b"x"}
    assert error.reason in ("damaged archive", "truncated archive")


def test_a_chain_of_extended_headers_is_damage() -> None:
    link = header(b"l", b"%011o\0" % 5, b"L") + b"name\0".ljust(512, b"\0")
    _, error = read_until_broken(link * 3000 + tar_of(FILES))
    assert error.reason == "damaged archive"


def test_a_negative_size_in_a_pax_header_is_damage() -> None:
    record = b"%d size=-100000000\n" % len(b"19 size=-100000000\n")
    bad = header(b"p", b"%011o\0" % len(record), b"x") + record.ljust(512, b"\0")
    bad += header(b"b.mp4", b"%011o\0" % 1, b"0") + b"x".ljust(512, b"\0")
    _, error = read_until_broken(bad + tar_of(FILES))
    assert error.reason == "damaged archive"


def test_many_members_do_not_stay_in_memory() -> None:
    def peak(count: int) -> int:
        data = gzip.compress(tar_of({f"{n:06d}.mp4": b"" for n in range(count)}), 1)
        tracemalloc.start()
        assert sum(1 for _ in TarStream(Drip(data))) == count
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    assert peak(4000) < 1.2 * peak(1000)


def test_errors_of_the_body_come_through_as_they_are() -> None:
    class Broken(Drip):
        def read(self, size: int, /) -> bytes:
            if self.read_bytes > 1000:
                raise struct.error("the network, say")
            return super().read(size)

    with pytest.raises(struct.error, match="the network"):
        contents(TarStream(Broken(gzip.compress(tar_of(FILES), 0), 500)))
