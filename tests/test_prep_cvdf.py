"""The CVDF mirror as a source, against a local server with the same layout and every known damage."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mirror_server import PAGE, FakeTime, Fault, Mirror, mirror

from prep.cvdf_layout import (
    LAYOUTS,
    SplitLayout,
    address,
    archive_path,
    check_base,
    parse_archive_list,
    split_layout,
)
from prep.cvdf_source import ArchiveFault, CvdfSource, printable
from prep.demo_videos import random_motion, write_video
from prep.errors import StorageError, UsageError
from prep.fetch_errors import FetchError, StoppedError
from prep.http_client import HttpClient
from prep.journal import Row
from prep.outcome import Outcome, Reason, RowFailure, Status
from prep.politeness import Politeness
from prep.probe import probe
from prep.segment import Segment

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from prep.source import Offer

A, B, C = "aaaaaaaaaaa_000001_000011", "-b_bbbbbbbb_000000_000010", "ccccccccccc_000020_000025"
CLIPS = {A: b"clip a" * 100, B: b"clip b" * 200, C: b"clip c" * 300}
OFFICIAL = "https://s3.amazonaws.com/kinetics"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server() -> Iterator[Mirror]:
    with mirror() as held:
        yield held


@pytest.fixture
def clock() -> FakeTime:
    return FakeTime()


@pytest.fixture
def client(clock: FakeTime) -> Iterator[HttpClient]:
    with HttpClient(Politeness(requests_per_second=1e9, attempts=3), timing=clock.timing()) as held:
        yield held


class Rows:
    """What a journal is to a source: rows by the name of their cut, and archives that are done."""

    def __init__(self, *stems: str) -> None:
        self.rows = {stem: _row(number, stem) for number, stem in enumerate(stems, 1)}
        self.clips: dict[str, bytes] = {}
        self.done: list[str] = []
        self.asked: list[str] = []

    def by_cut_name(self, stem: str) -> Row | None:
        self.asked.append(stem)
        return None if stem in self.clips else self.rows.get(stem)

    def known(self, stem: str) -> bool:
        return stem in self.rows

    def archive_done(self, path: str) -> bool:
        return path in self.done

    def mark_done(self, path: str) -> None:
        self.done.append(path)

    def settle(self) -> None:
        """Release nothing: no consumer is there that could."""

    def unread(self) -> set[str]:
        return set()

    def judge(self, *_: str) -> int:
        return 0

    def waiting(self) -> bool:
        return True

    def take(self, offer: Offer) -> None:
        """Book an offer as a success and let go of it."""
        [candidate] = offer.candidates
        stem = next(stem for stem, row in self.rows.items() if row.row == offer.row.row)
        assert stem not in self.clips
        self.clips[stem] = candidate.path.read_bytes()
        offer.release()
        assert not candidate.path.exists()

    def take_all(self, source: CvdfSource) -> None:
        for offer in source.offers(self):
            self.take(offer)


def _row(number: int, stem: str) -> Row:
    video_id, start, end = stem[:11], float(stem[12:18]), float(stem[19:25])
    segment = Segment(video_id, start, end, "label", "val")
    return Row(number, segment, segment.key, 0, number, Outcome(Status.PENDING), {})


def tgz(files: dict[str, bytes], pack: bool = True) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return gzip.compress(out.getvalue(), 1) if pack else out.getvalue()


def flat(*stems: str) -> dict[str, bytes]:
    return {f"./{stem}.mp4": CLIPS[stem] for stem in stems}


def publish(server: Mirror, split: str, *parts: bytes) -> list[str]:
    """Serve parts of Kinetics-400 and the list of them, which names the official address."""
    names = [f"400/{split}/part_{number}.tar.gz" for number in range(len(parts))]
    for name, data in zip(names, parts, strict=True):
        server.put(name, data)
    lines = "".join(f"{OFFICIAL}/{name}\n" for name in names)
    server.put(f"400/{split}/k400_{split}_path.txt", lines.encode())
    return names


@pytest.fixture
def source(server: Mirror, client: HttpClient, tmp_path: Path) -> CvdfSource:
    return CvdfSource("k400", "val", tmp_path, client, base=server.base)


def stored(tmp_path: Path) -> list[Path]:
    return sorted(path for path in tmp_path.rglob("*") if path.is_file())


# -- layout ---------------------------------------------------------------------------------------


def test_the_table_holds_three_versions_of_three_splits() -> None:
    assert {(row.version, row.split) for row in LAYOUTS} == {
        (version, split)
        for version in ("k400", "k600", "k700-2020")
        for split in ("train", "val", "test")
    }
    assert split_layout("k600", "val").annotations == "600/annotations/val.txt"
    assert split_layout("k600", "test").annotations == "600/annotations/test.csv"
    lists = split_layout("k700-2020", "train").archive_list
    assert lists == "700_2020/train/k700_2020_train_path.txt"
    first = {row.version + row.split: row.read_first for row in LAYOUTS if row.read_first}
    assert first == {"k400train": ("400/replacement_for_corrupted_k400.tgz",)}


@pytest.mark.parametrize(
    ("version", "split", "words"),
    [
        ("k700", "val", "does not have Kinetics-700 of 2019"),
        ("k401", "val", "must be one of cvdf:k400, cvdf:k600, cvdf:k700-2020"),
        ("k400", "dev", "must be one of train, val, test"),
    ],
)
def test_what_the_mirror_lacks_is_refused(version: str, split: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        split_layout(version, split)


@pytest.mark.parametrize("base", ["s3://kinetics", "/data", "https://", "https://x/?a=1", ""])
def test_a_base_that_is_no_web_address_is_refused(base: str) -> None:
    with pytest.raises(UsageError, match="must be an address like"):
        check_base(base)


@pytest.mark.parametrize(
    ("line", "path"),
    [
        (f"{OFFICIAL}/600/train/air drumming.tar.gz", "600/train/air drumming.tar.gz"),
        (
            f"{OFFICIAL}/600/train/passing%20American%20football%20%28in%20game%29.tar.gz",
            "600/train/passing American football (in game).tar.gz",
        ),
        ("http://other.example:8080/a/b/600/train/x.tar.gz", "600/train/x.tar.gz"),
        ("https://host/600/train/x.tar.gz", "600/train/x.tar.gz"),
        (f"{OFFICIAL}/600/val/x.tar.gz", None),  # another split
        (f"{OFFICIAL}/600/train/x.zip", None),
        (f"{OFFICIAL}/600/train/sub/x.tar.gz", None),
        (f"{OFFICIAL}/600/train/.tar.gz", None),
        (f"{OFFICIAL}/600/train/..%2F..%2Fx.tar.gz", None),
        (f"{OFFICIAL}/600/train/a%2Fx.tar.gz", None),
        (f"{OFFICIAL}/600/train/a%5Cx.tar.gz", None),
        (f"{OFFICIAL}/600/train/x.tar.gz?a=1", None),
        (f"{OFFICIAL}/600/train/x%00.tar.gz", None),
        ("file:///kinetics/600/train/x.tar.gz", None),
        ("600/train/x.tar.gz", None),
        ("<html>", None),
        ("https://[x/600/train/x.tar.gz", None),
    ],
)
def test_lines_are_mapped_below_the_base_or_refused(line: str, path: str | None) -> None:
    layout = split_layout("k600", "train")
    assert archive_path(line, layout) == path
    found = parse_archive_list(f"\n{line}\r\n{line}\n", layout)
    assert found.archives == ((path,) if path else ())
    assert len(found.refused) == (0 if path else 2)


def test_addresses_are_quoted() -> None:
    path = "600/train/passing American football (in game).tar.gz"
    quoted = "passing%20American%20football%20%28in%20game%29.tar.gz"
    assert address(OFFICIAL, path) == f"{OFFICIAL}/600/train/{quoted}"


_NAMES = st.text(st.characters(categories=["L", "N", "P", "Zs"]), min_size=1, max_size=40)


@given(_NAMES.filter(lambda name: name.isprintable() and not set(name) & set("/\\")))
def test_every_class_name_survives_its_address(name: str) -> None:
    path = f"600/train/{name}.tar.gz"
    if name.startswith("."):
        assert archive_path(address(OFFICIAL, path), split_layout("k600", "train")) is None
    else:
        assert archive_path(address(OFFICIAL, path), split_layout("k600", "train")) == path


@given(
    st.text(max_size=30) | st.text("ab./%2F", max_size=30),
    st.text("ab./%2Fe\\ ?#\n", max_size=30),
    st.sampled_from(LAYOUTS),
)
def test_no_list_leads_out_of_the_layout(above: str, name: str, layout: SplitLayout) -> None:
    folders, _, pattern = layout.archives.rpartition("/")
    plain = layout.archives.replace("*", "plain")
    for folder in (folders, above):
        text = f"{OFFICIAL}/{plain}\n{OFFICIAL}/{folder}/{pattern.replace('*', name)}"
        first, *others = parse_archive_list(text, layout).archives
        assert first == plain
        for path in others:
            assert path.rpartition("/")[0] == folders
            assert folder.endswith(folders)


# -- lists ----------------------------------------------------------------------------------------


def test_lists_are_kept_with_their_sha256(
    server: Mirror, client: HttpClient, tmp_path: Path
) -> None:
    rows, archives = b"label,youtube_id\n", f"{OFFICIAL}/600/val/a b.tar.gz\n".encode()
    server.put("600/annotations/val.txt", rows)
    server.put("600/val/k600_val_path.txt", archives)
    source = CvdfSource("k600", "val", tmp_path / "work", client, base=server.base)
    lists = source.fetch_lists(tmp_path / "lists")
    assert [found.path.name for found in lists] == ["k600-val.txt", "k600-val-archives.txt"]
    assert [found.path.read_bytes() for found in lists] == [rows, archives]
    assert [found.sha256 for found in lists] == [
        hashlib.sha256(x).hexdigest() for x in (rows, archives)
    ]
    assert lists[0].url == f"{server.base}/600/annotations/val.txt"
    assert source.archives() == ["600/val/a b.tar.gz"]
    assert len(server.asked("600/val/k600_val_path.txt")) == 1


@pytest.mark.parametrize("data", [PAGE, b"", b"  \n"])
def test_a_page_instead_of_a_list_is_refused(
    server: Mirror, source: CvdfSource, data: bytes
) -> None:
    server.put("400/val/k400_val_path.txt", data)
    with pytest.raises(FetchError, match="is no list"):
        source.archives()


def test_a_list_of_another_layout_is_refused(server: Mirror, source: CvdfSource) -> None:
    server.put("400/val/k400_val_path.txt", b"https://x/400/val/clips_1.tar.gz\n")
    with pytest.raises(FetchError, match=r"names no archive like 400/val/part_\*\.tar\.gz"):
        source.archives()


@pytest.mark.parametrize("data", [PAGE, None], ids=["page", "absent"])
def test_without_its_list_a_pass_ends_and_no_row_is_missing(
    server: Mirror, source: CvdfSource, data: bytes | None
) -> None:
    if data is not None:
        server.put("400/val/k400_val_path.txt", data)
    with pytest.raises(FetchError):
        next(source.offers(Rows(A)))
    assert [finding.retryable for finding in source.findings] == [True]


def test_sizes_come_from_head(server: Mirror, source: CvdfSource) -> None:
    first, second = publish(server, "val", b"x" * 10, b"y" * 20)
    del server.files[f"/kinetics/{second}"]
    assert list(source.archive_sizes()) == [(first, 10), (second, None)]


def test_repairs_come_first(server: Mirror, client: HttpClient, tmp_path: Path) -> None:
    parts = publish(server, "train", b"", b"")
    source = CvdfSource("k400", "train", tmp_path, client, base=server.base)
    assert source.archives() == ["400/replacement_for_corrupted_k400.tgz", *parts]


# -- clips ----------------------------------------------------------------------------------------


def test_pending_clips_are_offered_and_nothing_stays(
    server: Mirror, source: CvdfSource, tmp_path: Path
) -> None:
    parts = publish(server, "val", tgz(flat(A, B)), tgz(flat(C)))
    rows = Rows(A, B, C)
    rows.take_all(source)
    assert rows.clips == CLIPS
    assert rows.done == parts
    assert source.findings == []
    assert source.tallies == {}
    assert stored(tmp_path) == []


def test_a_candidate_is_the_whole_file(server: Mirror, source: CvdfSource) -> None:
    publish(server, "val", tgz(flat(C)))
    rows = Rows(C)
    for offer in source.offers(rows):
        [candidate] = offer.candidates
        assert (candidate.source, candidate.start_seconds, candidate.end_seconds) == (
            "cvdf",
            0.0,
            5.0,
        )
        rows.take(offer)
    assert source.name == "cvdf"


def test_finished_and_unknown_members_are_not_stored(
    server: Mirror, source: CvdfSource, tmp_path: Path
) -> None:
    names = {**flat(A, B, C), "readme.txt": b"x", "short_000001_000002.mp4": b"x"}
    publish(server, "val", tgz(names))
    rows = Rows(A, B)
    rows.clips[A] = b"finished before"
    offers = source.offers(rows)
    offer = next(offers)
    assert offer.row.row == rows.rows[B].row
    assert len(stored(tmp_path)) == 1
    rows.take(offer)
    assert list(offers) == []
    counts = {kind: tally.count for kind, tally in source.tallies.items()}
    assert counts == {"not pending": 1, "segment in no list": 1, "not named like a clip": 2}
    assert source.tallies["segment in no list"].examples == [f"400/val/part_0.tar.gz: {C}.mp4"]


DAMAGE = {
    "plain tar named gz, deep absolute paths": (
        tgz({f"/mnt/data/kinetics/deep/er/{A}.mp4": CLIPS[A]}, pack=False), {A}, None, {}),
    "AppleDouble members": (
        tgz({f"x/._{A}.mp4": b"rsrc", **flat(A)}), {A}, None, {"AppleDouble file": 1}),
    "class folders with spaces": (
        tgz({f"playing drums (solo)/{A}.mp4": CLIPS[A], f"air drumming/{B}.mp4": CLIPS[B]}),
        {A, B}, None, {}),
    "empty archive": (b"", set(), "empty archive", {}),
    "gzip of nothing": (gzip.compress(b""), set(), "empty archive", {}),
    "tar without members": (tgz({}), set(), "empty archive", {}),
    "zero-byte mp4": (tgz({f"{A}.mp4": b"", **flat(B)}), {B}, None, {"empty file": 1}),
    "ids in no list": (tgz(flat(C, A)), {A}, None, {"segment in no list": 1}),
    "members that point elsewhere": (
        tgz({f"../../../{A}.mp4": CLIPS[A], "../../etc/passwd": b"x"}), {A}, None,
        {"not named like a clip": 1}),
    "gzip cut off": (
        gzip.compress(tgz(flat(A, B), pack=False), 0)[:1600], {A}, "truncated archive", {}),
    "tar cut off inside a member": (
        tgz(flat(A, B), pack=False)[:2000], {A}, "truncated archive", {}),
    "tar cut off between members": (
        tgz(flat(A, B), pack=False)[:1536], {A}, "truncated archive", {}),
    "a page instead of an archive": (PAGE * 20, set(), "not an archive", {}),
    "nothing for a row": (tgz(flat(B)), {B}, None, {}),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_known_damage_gives_the_right_clips_and_the_right_finding(
    server: Mirror, source: CvdfSource, tmp_path: Path, damage: str
) -> None:
    data, clips, reason, counts = DAMAGE[damage]
    good = {"zzzzzzzzzzz_000000_000001": b"the next archive goes on"}
    name, after = publish(server, "val", data, tgz({f"{stem}.mp4": x for stem, x in good.items()}))
    rows = Rows(A, B, *good)
    rows.take_all(source)
    assert rows.clips == {**{stem: CLIPS[stem] for stem in clips}, **good}
    assert [(finding.archive, finding.reason) for finding in source.findings] == (
        [(name, reason)] if reason else []
    )
    assert {
        kind: tally.count for kind, tally in source.tallies.items() if kind != "not pending"
    } == counts
    whole = reason in (None, "empty archive")
    assert sorted(rows.done) == sorted([name, after] if whole else [after])
    assert stored(tmp_path) == []


def test_links_and_devices_are_counted(server: Mirror, source: CvdfSource) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for number, kind in enumerate(
            (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE)
        ):
            info = tarfile.TarInfo(f"{number}/{A}.mp4")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    publish(server, "val", out.getvalue())
    rows = Rows(A)
    rows.take_all(source)
    assert rows.clips == {}
    counts = {kind: tally.count for kind, tally in source.tallies.items()}
    assert counts == {"link": 2, "special file": 1, "folder": 1}
    assert source.tallies["link"].examples == ["400/val/part_0.tar.gz"]


def test_a_real_clip_passes_and_a_truncated_one_is_refused(
    server: Mirror, source: CvdfSource, tmp_path: Path
) -> None:
    video = tmp_path / "video.mp4"
    write_video(video, random_motion("left", np.random.default_rng(0)), "libx264")
    data = video.read_bytes()
    publish(server, "val", tgz({f"{A}.mp4": data, f"{B}.mp4": data[: len(data) * 6 // 10]}))
    rows = Rows(A, B)
    offers = source.offers(rows)
    whole = next(offers).candidates[0]
    assert probe(whole.path, whole.start_seconds, whole.end_seconds).width > 0
    cut = next(offers).candidates[0]
    with pytest.raises(RowFailure) as caught:
        probe(cut.path, cut.start_seconds, cut.end_seconds)
    assert caught.value.reason == Reason.TRUNCATED


def test_an_archive_is_done_when_its_last_clip_is_released(
    server: Mirror, source: CvdfSource
) -> None:
    name, other = publish(server, "val", tgz(flat(A, B)), tgz(flat(C)))
    rows = Rows(A, B, C)
    offers = source.offers(rows)
    first, second, third = next(offers), next(offers), next(offers)
    assert rows.done == []  # part_0 was read to its end, but its clips are in work
    first.release()
    first.release()  # twice is once
    assert rows.done == []
    second.release()
    assert rows.done == [name]
    third.release()
    assert rows.done == [name]  # part_1 has not been read to its end
    assert list(offers) == []
    assert rows.done == [name, other]


def test_a_consumer_that_breaks_off_leaves_the_archive_undone(
    server: Mirror, source: CvdfSource, tmp_path: Path
) -> None:
    publish(server, "val", tgz(flat(A, B)))
    rows = Rows(A, B)
    offers = source.offers(rows)
    offer = next(offers)
    offers.close()  # type: ignore[attr-defined]
    offer.release()
    assert rows.done == []
    assert stored(tmp_path) == []
    rows.take_all(source)  # and the next pass brings both
    assert rows.clips.keys() == {A, B}


def test_archives_that_are_done_are_not_asked_for(server: Mirror, source: CvdfSource) -> None:
    name, other = publish(server, "val", tgz(flat(A)), tgz(flat(B)))
    rows = Rows(A, B)
    rows.done.append(name)
    rows.take_all(source)
    assert rows.clips.keys() == {B}
    assert server.asked(name) == []
    assert len(server.asked(other)) == 1


def test_what_a_killed_run_left_is_removed(
    server: Mirror, source: CvdfSource, tmp_path: Path
) -> None:
    publish(server, "val", tgz(flat(A)))
    folder = tmp_path / "cvdf-k400-val"
    folder.mkdir()
    (folder / "incoming-000000000.video").write_bytes(b"half a clip")
    (folder / "somebody's.txt").write_text("not ours")
    rows = Rows(A)
    rows.take_all(source)
    assert rows.clips == {A: CLIPS[A]}
    assert [path.name for path in stored(tmp_path)] == ["somebody's.txt"]


def repaired(server: Mirror, client: HttpClient, tmp_path: Path) -> CvdfSource:
    publish(server, "train", tgz(flat(A, B)))
    server.put("400/replacement_for_corrupted_k400.tgz", tgz({f"repairs/{A}.mp4": b"repaired"}))
    return CvdfSource("k400", "train", tmp_path, client, base=server.base)


def test_repairs_win(server: Mirror, client: HttpClient, tmp_path: Path) -> None:
    rows = Rows(A, B)
    rows.take_all(repaired(server, client, tmp_path))
    assert rows.clips == {A: b"repaired", B: CLIPS[B]}


@pytest.mark.parametrize("good", [True, False], ids=["repair good", "repair refused"])
def test_a_repeat_waits_until_the_first_file_is_judged(
    server: Mirror, client: HttpClient, tmp_path: Path, good: bool
) -> None:
    source, rows = repaired(server, client, tmp_path), Rows(A, B)
    held: list[Offer] = []

    def settle() -> None:
        while held:
            offer = held.pop()
            if good:
                rows.take(offer)
            else:
                offer.release()

    offers = source.offers(rows)
    rows.settle = settle  # type: ignore[method-assign]
    held.append(next(offers))  # the repair, still being encoded when the original comes
    for offer in offers:
        rows.take(offer)
    assert rows.clips == {A: b"repaired" if good else CLIPS[A], B: CLIPS[B]}
    assert len(rows.done) == 2


def test_a_repeat_of_a_file_that_stays_in_work_leaves_its_archive_undone(
    server: Mirror, client: HttpClient, tmp_path: Path
) -> None:
    source, rows = repaired(server, client, tmp_path), Rows(A, B)
    offers = list(source.offers(rows))
    assert [offer.row.row for offer in offers] == [1, 2]
    for offer in offers:
        offer.release()
    assert rows.done == ["400/replacement_for_corrupted_k400.tgz"]
    assert source.tallies["again in another place, while the first was in work"].count == 1


# -- the network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_transfer_goes_on_inside_an_archive(
    server: Mirror, source: CvdfSource, ranges: bool
) -> None:
    server.ranges = ranges
    data = gzip.compress(tgz(flat(A, B, C), pack=False), 0)
    [name] = publish(server, "val", data)
    server.faults[f"/kinetics/{name}"] = [
        Fault(after=1000, ends="close"),
        Fault(after=1500, ends="reset"),
    ]
    rows = Rows(A, B, C)
    rows.take_all(source)
    assert rows.clips == CLIPS
    assert source.findings == []
    assert len(server.asked(name)) == 3


def test_an_absent_archive_is_found_and_the_next_goes_on(
    server: Mirror, source: CvdfSource
) -> None:
    name, other = publish(server, "val", b"", tgz(flat(A)))
    del server.files[f"/kinetics/{name}"]
    rows = Rows(A)
    rows.take_all(source)
    assert rows.clips.keys() == {A}
    assert source.findings == [
        ArchiveFault(name, "missing upstream", f"{server.base}/{name}: HTTP 404", retryable=False)
    ]
    assert rows.done == [other]
    assert len(server.asked(name)) == 1


def test_a_failed_archive_is_tried_again_behind_the_others(
    server: Mirror, source: CvdfSource
) -> None:
    name, other = publish(server, "val", tgz(flat(A)), tgz(flat(B)))
    server.faults[f"/kinetics/{name}"] = [Fault(503)] * 3  # the three attempts of the first try
    rows = Rows(A, B)
    rows.take_all(source)
    assert list(rows.clips) == [B, A]
    assert rows.done == [other, name]
    assert source.findings == []


def test_an_archive_that_keeps_failing_is_found_retryable(
    server: Mirror, source: CvdfSource
) -> None:
    name, other = publish(server, "val", tgz(flat(A)), tgz(flat(B)))
    server.faults[f"/kinetics/{name}"] = [Fault(429)] * 6
    rows = Rows(A, B)
    rows.take_all(source)
    assert rows.done == [other]
    [finding] = source.findings
    assert (finding.archive, finding.reason, finding.retryable) == (name, "rate-limited", True)


def test_an_outage_is_waited_out(server: Mirror, clock: FakeTime, tmp_path: Path) -> None:
    [name] = publish(server, "val", tgz(flat(A)))
    server.faults[f"/kinetics/{name}"] = [Fault(503)] * 4
    polite = Politeness(requests_per_second=1e9, circuit_failures=4, circuit_seconds=300)
    with HttpClient(polite, timing=clock.timing()) as client:
        source = CvdfSource("k400", "val", tmp_path, client, base=server.base)
        rows = Rows(A)
        rows.take_all(source)
    assert rows.clips.keys() == {A}
    assert source.findings == []
    assert clock.slept >= 300


def test_many_failures_in_a_row_end_the_pass(
    server: Mirror, client: HttpClient, tmp_path: Path
) -> None:
    names = publish(server, "val", *[tgz(flat(A))] * 5)
    for name in names:
        server.faults[f"/kinetics/{name}"] = [Fault(503)] * 3
    source = CvdfSource("k400", "val", tmp_path, client, base=server.base, patience=3)
    rows = Rows(A)
    rows.take_all(source)
    assert rows.clips == {}
    assert [finding.archive for finding in source.findings] == [names[2], ""]
    assert source.findings[1].detail == "4 more archives were not read to their end"
    assert all(finding.retryable for finding in source.findings)


def test_originals_are_not_read_while_their_repairs_cannot_be(
    server: Mirror, client: HttpClient, tmp_path: Path
) -> None:
    source, rows = repaired(server, client, tmp_path), Rows(A, B)
    repairs = "400/replacement_for_corrupted_k400.tgz"
    server.faults[f"/kinetics/{repairs}"] = [Fault(503)] * 6
    rows.take_all(source)
    assert rows.clips == {}
    assert [finding.archive for finding in source.findings] == [repairs, ""]
    rows.take_all(source)  # another run
    assert rows.clips == {A: b"repaired", B: CLIPS[B]}


def test_originals_are_read_where_there_are_no_repairs(
    server: Mirror, client: HttpClient, tmp_path: Path
) -> None:
    source, rows = repaired(server, client, tmp_path), Rows(A, B)
    del server.files["/kinetics/400/replacement_for_corrupted_k400.tgz"]
    rows.take_all(source)
    assert rows.clips == {A: CLIPS[A], B: CLIPS[B]}
    assert [finding.reason for finding in source.findings] == ["missing upstream"]


@pytest.mark.parametrize("lengths", [True, False])
def test_a_cut_that_no_length_proves_may_be_the_network(
    server: Mirror, source: CvdfSource, lengths: bool
) -> None:
    server.lengths = lengths
    [name] = publish(server, "val", gzip.compress(tgz(flat(A, B), pack=False), 0)[:1600])
    rows = Rows(A, B)
    rows.take_all(source)
    assert rows.clips.keys() == {A}
    [finding] = source.findings
    assert (finding.reason, finding.retryable) == ("truncated archive", not lengths)
    assert len(server.asked(name)) == (1 if lengths else 2)


def test_stop_ends_the_pass_and_leaves_the_archive_undone(
    server: Mirror, source: CvdfSource, client: HttpClient
) -> None:
    publish(
        server,
        "val",
        gzip.compress(
            tgz({**flat(A), **{f"{n}.mp4": bytes(99_999) for n in range(9)}}, pack=False), 0
        ),
    )
    rows = Rows(A)
    with pytest.raises(StoppedError):
        for offer in source.offers(rows):
            rows.take(offer)
            client.stop()
    assert rows.done == []


def test_lines_of_the_list_that_are_refused_are_found(server: Mirror, source: CvdfSource) -> None:
    [name] = publish(server, "val", tgz(flat(A)))
    server.files["/kinetics/400/val/k400_val_path.txt"] += b"https://evil.example/\x1b[31mx\n"
    rows = Rows(A)
    rows.take_all(source)
    assert rows.done == [name]
    [finding] = source.findings
    assert finding.archive == r"https://evil.example/\x1b[31mx"
    assert finding.reason == "not of the known layout"


def test_a_disk_that_cannot_be_written_ends_the_pass(
    server: Mirror, source: CvdfSource, tmp_path: Path
) -> None:
    publish(server, "val", tgz(flat(A, B)))
    rows = Rows(A, B)
    offers = source.offers(rows)
    rows.take(next(offers))
    (tmp_path / "cvdf-k400-val").rmdir()
    with pytest.raises(StorageError, match="cannot be written"):
        next(offers)
    assert rows.done == []


def test_class_archives_with_spaces_and_parentheses_are_read(
    server: Mirror, client: HttpClient, tmp_path: Path
) -> None:
    name = "600/val/passing American football (in game).tar.gz"
    server.put(name, tgz({f"a class/{A}.mp4": CLIPS[A]}))
    server.put("600/val/k600_val_path.txt", f"{OFFICIAL}/{name}\n".encode())
    source = CvdfSource("k600", "val", tmp_path, client, base=server.base)
    rows = Rows(A)
    rows.take_all(source)
    assert rows.clips == {A: CLIPS[A]}
    assert rows.done == [name]


def test_members_beyond_the_limit_are_counted(
    server: Mirror, client: HttpClient, tmp_path: Path
) -> None:
    publish(server, "val", tgz(flat(A, C)))
    source = CvdfSource(
        "k400", "val", tmp_path, client, base=server.base, max_member_bytes=len(CLIPS[A])
    )
    rows = Rows(A, C)
    rows.take_all(source)
    assert rows.clips.keys() == {A}
    assert source.tallies["too large"].count == 1


@given(st.text(max_size=1000))
def test_strangers_text_can_be_shown(text: str) -> None:
    shown = printable(text)
    assert shown.isascii()
    assert shown.isprintable()
    assert len(shown) <= 300
