"""`kprep shard` from the mirror, from YouTube, from several sources, into a bucket, on Dask."""

import contextlib
import csv
import dataclasses
import gzip
import io
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import obstore
import pyarrow.parquet as pq
import pytest
from conftest import run_kprep, without
from mirror_server import Fault, mirror
from test_prep_shard import files_of, kinetics_csv, ledger

from prep.demo_videos import random_motion, write_video
from prep.errors import KprepError, UsageError
from prep.folder_source import FolderSource
from prep.format import read_index
from prep.journal import Answer, Journal
from prep.outcome import Outcome, Reason, Status
from prep.pending_rows import JournalRows
from prep.segment import Segment
from prep.sources import _youtube_options

IDS = [f"{letter * 11}" for letter in "abcdefghij"]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Ten clips of two seconds, named as Kinetics names them, and their list."""
    folder, rng = tmp_path_factory.mktemp("clips"), np.random.default_rng(3)
    (folder / "videos").mkdir()
    for name in IDS:
        motion = dataclasses.replace(random_motion("left", rng), seconds=2.0)
        write_video(folder / "videos" / f"{name}_000003_000005.mp4", motion, "libx264")
    rows = [
        (("bee keeping", "abseiling")[i % 2], name, 3, 5, "val", 0) for i, name in enumerate(IDS)
    ]
    kinetics_csv(folder / "val.csv", [*rows, ("abseiling", "zzzzzzzzzzz", 3, 5, "val", 0)])
    return folder


def archive(members: dict[str, bytes], *, compress: bool = True) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return gzip.compress(sink.getvalue(), 1) if compress else sink.getvalue()


def serve(server, clips: Path, *faults: Fault) -> None:
    """Put the list and three archives on a server: one damaged in every way that has been seen."""
    data = {path.name: path.read_bytes() for path in (clips / "videos").iterdir()}
    names = sorted(data)
    first = {f"./{name}": data[name] for name in names[:4]}
    first |= {
        f"./._{names[0]}": b"apple",
        "./readme.txt": b"x",
        "./yyyyyyyyyyy_000001_000011.mp4": data[names[0]],
    }
    second = {f"/data/somebody/{name}": data[name] for name in names[4:7]}
    second[f"../../{names[7]}"] = data[names[7]]
    third = {f"a class/{name}": data[name] for name in names[8:]}
    third["a class/zzzzzzzzzzz_000003_000005.mp4"] = b""
    server.put("400/annotations/val.csv", (clips / "val.csv").read_bytes())
    paths = [f"400/val/part_{number}.tar.gz" for number in range(4)]
    text = "".join(f"https://s3.amazonaws.com/kinetics/{path}\n" for path in paths)
    server.put("400/val/k400_val_path.txt", text.encode())
    server.put(paths[0], archive(first), *faults)
    server.put(paths[1], archive(second, compress=False))  # a plain tar named .gz
    server.put(paths[2], archive(third))
    server.put(paths[3], b"")  # an empty archive


def convert_folder(clips: Path, root: Path, *more) -> None:
    run_kprep("shard", clips / "videos", root, "--split", "val", "--profile", "small", "--clips-per-shard", 4,
              "--annotations", clips / "val.csv", *more)  # fmt: skip


def hashes(root: Path) -> dict[str, bytes]:
    table = read_index((root / "index/val.parquet").read_bytes(), "index")
    return dict(zip(table["key"].to_pylist(), table["content_hash"].to_pylist(), strict=True))


@pytest.fixture(scope="module")
def reference(clips, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("reference") / "root"
    convert_folder(clips, root)
    return root


# -- the mirror ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [True, False])
def test_the_mirror_gives_the_clips_that_a_folder_gives(clips, reference, tmp_path, ranges):
    faults = [Fault(status=503), Fault(after=3000, ends="reset"), Fault(after=9000, ends="close")]
    root = tmp_path / "root"
    with mirror() as server:
        server.ranges = ranges
        serve(server, clips, *faults)
        done = run_kprep("shard", "cvdf:k400", root, "--split", "val", "--profile", "small",
                         "--mirror", server.base, "--clips-per-shard", 4)  # fmt: skip
    assert hashes(root) == hashes(reference)
    rows = {row["video_id"]: row for row in ledger(root, "val")}
    assert Counter(row["status"] for row in rows.values()) == {"ok": 10, "failed": 1}
    assert rows["zzzzzzzzzzz"]["reason"] == "missing upstream"
    assert rows[IDS[0]]["source"] == "cvdf"
    assert "empty archive" in done.stdout
    assert "fetched" in done.stdout
    run_kprep("verify", root)


def test_what_is_stored_of_an_archive_is_what_is_in_work(clips, tmp_path):
    """After a kill no archive and no extracted tree is there; the next run skips finished clips."""
    root, work = tmp_path / "root", tmp_path / "work"
    with mirror() as server:
        serve(server, clips)
        command = [sys.executable, "-P", "-m", "prep", "shard", "cvdf:k400", str(root), "--split", "val", "--profile", "small",
                   "--mirror", server.base, "--clips-per-shard", "4", "--work", str(work), "--workers", "1"]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not list(work.glob("val/staged/*.pack")) and process.poll() is None:
            time.sleep(0.005)
        process.kill()
        process.wait()
        stored = [path for path in work.rglob("*") if path.is_file() and path.suffix == ".video"]
        assert len(stored) <= 4  # those in flight; a whole archive has more members
        run_kprep(*command[4:])
        assert not work.exists()
    assert len(hashes(root)) == 10


def test_a_mirror_that_goes_away_leaves_rows_to_another_run(clips, reference, tmp_path):
    root = tmp_path / "root"
    with mirror() as server:
        serve(server, clips)
        held = server.files["/kinetics/400/val/part_1.tar.gz"]
        arguments = ("shard", "cvdf:k400", root, "--split", "val", "--profile", "small", "--mirror", server.base,
                     "--clips-per-shard", 4)  # fmt: skip
        server.put("400/val/part_1.tar.gz", b"<html>come back later</html>")
        done = run_kprep(*arguments, check=False)
        assert done.returncode == 1
        assert "network" in done.stdout
        assert not (root / "manifest.json").exists()
        server.put("400/val/part_1.tar.gz", held)
        before = len(server.asked("400/val/part_0.tar.gz"))
        run_kprep(*arguments)
        assert (
            len(server.asked("400/val/part_0.tar.gz")) == before
        )  # read to its end, not read again
    assert hashes(root) == hashes(reference)


def test_clips_that_a_power_cut_took_are_read_again_from_archives_that_were_done(
    clips, reference, tmp_path
):
    root = tmp_path / "root"
    with mirror() as server:
        serve(server, clips)
        third = server.files["/kinetics/400/val/part_2.tar.gz"]
        server.put("400/val/part_2.tar.gz", b"<html>come back later</html>")
        command = ("shard", "cvdf:k400", root, "--split", "val", "--profile", "small", "--clips-per-shard", 4,
                   "--mirror", server.base)  # fmt: skip
        assert run_kprep(*command, check=False).returncode == 1
        for pack in root.glob(".kprep-work/val/staged/*.pack"):
            pack.write_bytes(bytes(pack.stat().st_size))
        server.put("400/val/part_2.tar.gz", third)
        run_kprep(*command)
    assert hashes(root) == hashes(reference)


def serve_parts(server, clips: Path, *parts: bytes) -> list[str]:
    """Put the list and these archives on a server; return their paths."""
    paths = [f"400/val/part_{number}.tar.gz" for number in range(len(parts))]
    text = "".join(f"https://s3.amazonaws.com/kinetics/{path}\n" for path in paths)
    server.put("400/annotations/val.csv", (clips / "val.csv").read_bytes())
    server.put("400/val/k400_val_path.txt", text.encode())
    for path, data in zip(paths, parts, strict=True):
        server.put(path, data)
    return paths


def members(clips: Path, *ids: str) -> dict[str, bytes]:
    names = [f"{name}_000003_000005.mp4" for name in ids]
    return {name: (clips / "videos" / name).read_bytes() for name in names}


def convert_mirror(server, root: Path, *more, **options):
    return run_kprep("shard", "cvdf:k400", root, "--split", "val", "--profile", "small", "--clips-per-shard", 4,
                     "--mirror", server.base, *more, **options)  # fmt: skip


def test_no_archive_is_opened_when_no_row_waits_any_more(clips, tmp_path):
    with mirror() as server:
        paths = serve_parts(server, clips, *(archive(members(clips, name)) for name in IDS))
        convert_mirror(server, tmp_path / "r", "--limit", 2)
        last = max(IDS.index(row["video_id"]) for row in ledger(tmp_path / "r", "val"))
        asked = [bool(server.asked(path)) for path in paths]
    assert asked == [number <= last for number in range(len(IDS))]
    assert last < len(IDS) - 1  # or the seed leaves nothing to see


def test_a_mirror_behind_a_folder_that_has_all_is_not_asked(clips, tmp_path):
    kinetics_csv(tmp_path / "val.csv", [("x", name, 3, 5, "val", 0) for name in IDS])
    with mirror() as server:
        serve(server, clips)
        run_kprep("shard", clips / "videos", tmp_path / "r", "--split", "val", "--profile", "small", "--annotations",
                  tmp_path / "val.csv", "--source", "cvdf:k400", "--mirror", server.base)  # fmt: skip
        assert not server.requests


@pytest.mark.parametrize("workers", [1, 2])
def test_the_last_row_in_work_may_need_the_next_archive(clips, tmp_path, workers):
    """Nothing waits when the first archive ends, but the clip in work is refused, and comes back."""
    kinetics_csv(tmp_path / "val.csv", [("x", IDS[0], 3, 5, "val", 0)])
    [(name, data)] = members(clips, IDS[0]).items()
    with mirror() as server:
        cut = archive({name: data[: len(data) * 6 // 10]})
        serve_parts(server, clips, cut, archive({name: data}), cut)
        convert_mirror(
            server, tmp_path / "r", "--annotations", tmp_path / "val.csv", "--workers", workers
        )
        assert [len(server.asked(f"400/val/part_{number}.tar.gz")) for number in range(3)] == [
            1,
            1,
            0,
        ]
    assert [row["status"] for row in ledger(tmp_path / "r", "val")] == ["ok"]


def test_rows_that_may_be_in_a_broken_archive_say_so(clips, tmp_path):
    plain = archive(members(clips, *IDS), compress=False)
    with mirror() as server:
        whole = archive(members(clips, *IDS[:2]))
        serve_parts(server, clips, plain[: len(plain) // 2], whole, plain[: len(plain) // 3])
        convert_mirror(server, tmp_path / "r")
    rows = {row["video_id"]: row for row in ledger(tmp_path / "r", "val")}
    failed = {(row["reason"], row["detail"]) for row in rows.values() if row["status"] == "failed"}
    where = "400/val/part_0.tar.gz (truncated archive) and 1 more"
    assert failed == {("missing upstream", f"or in what cannot be read of {where}")}
    assert rows[IDS[0]]["status"] == "ok"
    assert rows[IDS[9]]["status"] == "failed"


def with_wrong_checksum(files: dict[str, bytes]) -> bytes:
    """Return an archive that ends with a megabyte of something else, and the wrong crc32 of it."""
    data = bytearray(archive({**files, "z.bin": random.Random(0).randbytes(1 << 20)}))
    data[-8] ^= 1
    return bytes(data)


def test_clips_of_an_archive_whose_checksum_is_wrong_say_so(clips, tmp_path):
    first = with_wrong_checksum(members(clips, *IDS[:4]))
    with mirror() as server:
        serve_parts(server, clips, first, archive(members(clips, *IDS[4:])))
        done = convert_mirror(server, tmp_path / "r")
    assert "part_0.tar.gz: 4 clips taken from it; their details in the ledger say so" in done.stdout
    details = {row["video_id"]: row["detail"] for row in ledger(tmp_path / "r", "val")}
    damaged = "from a damaged archive, 400/val/part_0.tar.gz"
    assert [details[name] for name in IDS] == [damaged] * 4 + [""] * 6
    run_kprep("verify", tmp_path / "r")


DIE_AT_CALL = """
import itertools, os
from prep.cli import main
from prep.taken_clips import TakenClips

method, calls, whole = "{method}", itertools.count(1), TakenClips.{method}
def dies(*arguments):
    return os._exit(9) if next(calls) == {call} else whole(*arguments)
setattr(TakenClips, method, dies)
main()
"""


@pytest.mark.parametrize("sound", [False, True])
@pytest.mark.parametrize(("method", "call"), [("mark", 4), ("judge", 1)])
def test_a_kill_before_an_archives_checksum_changes_no_ledger(clips, tmp_path, sound, method, call):
    """Also when all clips are there, so that no row waits, but not whether the archive was whole."""
    kinetics_csv(tmp_path / "val.csv", [("x", name, 3, 5, "val", 0) for name in IDS])
    data = bytearray(with_wrong_checksum(members(clips, *IDS)))
    data[-8] ^= sound
    arguments = ("--split", "val", "--profile", "small", "--clips-per-shard", 4, "--annotations", tmp_path / "val.csv")  # fmt: skip
    with mirror() as server:
        [path] = serve_parts(server, clips, bytes(data))
        for root in ("whole", "killed"):
            command = ("shard", "cvdf:k400", tmp_path / root, *arguments, "--mirror", server.base)
            if root == "killed":
                script = DIE_AT_CALL.format(method=method, call=call)
                died = subprocess.run(
                    [sys.executable, "-P", "-c", script, *map(str, command)],
                    check=False,
                    capture_output=True,
                )
                assert died.returncode == 9
            run_kprep(*command)
        assert len(server.asked(path)) == 3
    for name in ("ledger/val.parquet", "index/val.parquet"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    fault = "" if sound else f"from a damaged archive, {path}"
    assert {row["detail"] for row in ledger(tmp_path / "killed", "val")} == {fault}


def test_an_archive_that_is_gone_before_it_was_judged_is_told(tmp_path):
    journal = Journal(tmp_path / "journal.sqlite", "val")
    rows = [Segment(f"aaaaaaaaaa{number}", 0.0, 1.0, "x", "val") for number in range(3)]
    journal.plan(rows, seed=0, clips_per_shard=3, limit=None, classes=frozenset(),
                 taken_keys=frozenset())  # fmt: skip
    for row, told in ((1, ""), (2, "folder: missing"), (3, "")):
        journal.record(row, Outcome(Status.OK, None, told), {}, "b.tar" if row < 3 else "a.tar")
    journal.commit()
    assert journal.taken.archives() == {"a.tar", "b.tar"}
    journal.lose(1)  # its clip is taken again, from whatever archive has it
    journal.commit()
    assert journal.taken.judge("a.tar", "") == 1
    journal.taken.give_up()
    assert journal.taken.archives() == set()
    unread = "from an archive not read to its end, b.tar"
    details = [row.outcome.detail for row in journal.all_rows()]
    assert details == ["", f"folder: missing; {unread}", ""]
    assert not journal.damage()
    journal.close()


def test_another_version_of_the_mirror_is_another_conversion(clips, tmp_path):
    with mirror() as server:
        serve(server, clips)
        server.put("400/val/part_2.tar.gz", b"<html>come back later</html>")
        command = ("--split", "val", "--profile", "small", "--mirror", server.base)
        assert (
            run_kprep("shard", "cvdf:k400", tmp_path / "r", *command, check=False).returncode == 1
        )
        done = run_kprep("shard", "cvdf:k600", tmp_path / "r", *command, check=False)
    assert done.returncode == 2
    assert "was begun with the list of cvdf:k400, not of cvdf:k600" in done.stderr


def test_kinetics_700_of_2019_is_not_silently_replaced(tmp_path):
    done = run_kprep("shard", "cvdf:k700", tmp_path / "r", "--split", "val", check=False)
    assert done.returncode == 2
    assert "2019" in done.stderr


# -- several sources -----------------------------------------------------------------------------


def test_the_next_source_fills_the_gaps(clips, tmp_path):
    """A folder that lacks some clips, the mirror for others, YouTube for the rest."""
    folder, root = tmp_path / "v", tmp_path / "root"
    folder.mkdir()
    for name in IDS[:3]:
        (folder / f"{name}_000003_000005.mp4").write_bytes(
            (clips / "videos" / f"{name}_000003_000005.mp4").read_bytes()
        )
    (folder / f"{IDS[3]}_000003_000005.mp4").touch()  # a zero-byte file is no hit
    with mirror() as server:
        serve(server, clips)
        del server.files["/kinetics/400/val/part_2.tar.gz"]
        motion = dataclasses.replace(random_motion("up", np.random.default_rng(0)), seconds=8.0)
        write_video(tmp_path / "whole.mp4", motion, "libx264")
        for name in IDS[8:]:
            server.put(f"watch/{name}.mp4", (tmp_path / "whole.mp4").read_bytes())
        done = run_kprep(
            "shard", folder, root, "--split", "val", "--profile", "small", "--annotations", clips / "val.csv",
            "--source", "cvdf:k400", "--mirror", server.base, "--source", "youtube:",
            "--youtube", f"url_template={server.base}/watch/{{id}}.mp4", "--youtube", "extractors=generic",
            "--youtube", "seconds_between_videos=0", "--youtube", "seconds_between_requests=0",
        )  # fmt: skip
    rows = {row["video_id"]: row for row in ledger(root, "val")}
    assert [rows[name]["source"] for name in IDS] == ["folder"] * 3 + ["cvdf"] * 5 + ["youtube"] * 2
    assert [rows[name]["detail"] for name in (IDS[0], *IDS[3:5], IDS[9])] == [
        "", "folder: empty file", "folder: missing", "folder: missing; cvdf: missing upstream",
    ]  # fmt: skip
    lost = rows["zzzzzzzzzzz"]
    assert lost["status"] == "failed"
    assert all(f"{source}: " in lost["detail"] for source in ("folder", "cvdf", "youtube"))
    assert rows[IDS[9]]["seconds"] == 2.0
    assert "part_2" in done.stdout
    run_kprep("verify", root)


@pytest.mark.parametrize("is_there", [True, False])
def test_the_ledger_knows_no_server_clock_or_other_row(clips, tmp_path, is_there):
    name, ledgers = f"{IDS[0]}_000003_000005.mp4", set()
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / name).write_bytes((clips / "videos" / name).read_bytes())
    with mirror() as server:
        for video in IDS:
            server.put(video, b"x", *[Fault(status=429)] * 99)
        for seconds in (1, 2):
            root = tmp_path / f"root-{seconds}"
            options = [
                f"url_template={server.base if is_there else 'http://127.0.0.1:9'}/{{id}}", "extractors=generic",
                "attempts=1", "bot_checks=2", f"circuit_seconds={seconds}", "seconds_between_videos=0",
                "seconds_between_requests=0",
            ]  # fmt: skip
            done = run_kprep(
                "shard", tmp_path / "v", root, "--split", "val", "--annotations", clips / "val.csv",
                "--profile", "small", "--source", "youtube:", "--finish",
                *(part for option in options for part in ("--youtube", option)),
            )  # fmt: skip
            ledgers.add((root / "ledger/val.parquet").read_bytes())
    assert len(ledgers) == 1
    for row in ledger(root, "val"):
        others = {name for name in IDS if name != row["video_id"]}
        assert not any(word in row["detail"] for word in ("127.0.0.1", "left alone", *others))
    assert ("left alone" if is_there else "127.0.0.1") in done.stdout


def planned(tmp_path: Path, segments: list[Segment]) -> JournalRows:
    journal = Journal(tmp_path / "planned.sqlite", "val")
    journal.forget_plan()
    journal.plan(segments, seed=0, clips_per_shard=9, limit=None, classes=frozenset(),
                 taken_keys=frozenset())  # fmt: skip
    return JournalRows(journal, "folder", lambda: None, lambda: True)


@pytest.mark.parametrize(
    ("files", "times", "wanted"),
    [
        # a name of whole seconds is that segment's, and stands before the whole video
        ("cut whole", [(2.0, 4.0)], {(2.0, 4.0): ["cut 0-2", "whole 2-4"]}),
        # it says too little of other times: the whole video has them for sure
        ("cut whole", [(2.9, 4.9)], {(2.9, 4.9): ["whole 2.9-4.9", "cut 0-2"]}),
        ("cut", [(2.9, 4.9)], {(2.9, 4.9): ["cut 0-2"]}),
        # and no two rows of different times take the same file
        ("cut whole", [(2.9, 4.9), (2.0, 4.0)], {(2.9, 4.9): ["whole 2.9-4.9"], (2.0, 4.0): ["cut 0-2", "whole 2-4"]}),
        ("cut", [(2.0, 4.0), (2.9, 4.9)], {(2.0, 4.0): ["cut 0-2"], (2.9, 4.9): []}),
        ("cut", [(2.1, 4.1), (2.9, 4.9)], {(2.1, 4.1): [], (2.9, 4.9): []}),
        # the same segment twice is one clip
        ("cut", [(2.9, 4.9), (2.9, 4.9)], {(2.9, 4.9): ["cut 0-2"]}),
    ],
)  # fmt: skip
def test_a_cut_file_is_taken_for_no_other_seconds(tmp_path, files, times, wanted):
    names = {"cut": "aaaaaaaaaaa_000002_000004.mp4", "whole": "aaaaaaaaaaa.mp4"}
    (tmp_path / "v").mkdir()
    for name in files.split():
        (tmp_path / "v" / names[name]).touch()
    rows = planned(tmp_path, [Segment("aaaaaaaaaaa", *pair, "x", "val") for pair in times])
    by_name = {name: what for what, name in names.items()}
    found = {}
    for offer in FolderSource(tmp_path / "v").offers(rows):
        segment = offer.row.segment
        found[segment.start_seconds, segment.end_seconds] = [
            f"{by_name[one.path.name]} {one.start_seconds:g}-{one.end_seconds:g}"
            for one in offer.candidates
        ]
        refusal = (
            Reason.MISSING,
            f"{names['cut']} may hold the seconds of another row of the list",
        )
        assert offer.refusal == (None if offer.candidates else refusal)
    assert found == wanted


def test_a_folder_finds_a_file_in_its_own_place_whatever_links_to_it(tmp_path):
    """As its class folders are listed: a link says nothing of the class or split of a file."""
    folder, disk = tmp_path / "v", tmp_path / "disk"
    for place in (folder / "val/running", disk):
        place.mkdir(parents=True)
    (folder / "val/running/aaaaaaaaaaa.mp4").touch()
    (disk / "bbbbbbbbbbb.mp4").touch()
    (folder / "jogging").symlink_to("val/running")
    (folder / "all").symlink_to("..")
    (folder / "outside").symlink_to(disk)
    source = FolderSource(folder)
    places = {"aaaaaaaaaaa": "val/running", "bbbbbbbbbbb": "outside"}
    for video, place in places.items():
        segment = Segment(video, 0.0, 1.0, "jogging", "train")
        found = source.candidates(segment, planned(tmp_path, [segment]))
        assert [one.path for one in found] == [folder / place / f"{video}.mp4"]
    assert source.notes() == []


def test_a_folder_knows_what_was_there_when_it_was_opened(tmp_path):
    folder = tmp_path / "v"
    folder.mkdir()
    with pytest.raises(UsageError, match="holds no file; see that it is mounted"):
        FolderSource(folder)
    (folder / "a.mp4").touch()
    (folder / "linked.mp4").symlink_to("a.mp4")
    (folder / "dead.mp4").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    source = FolderSource(folder)
    paths = {"a.mp4": True, "linked.mp4": True, "dead.mp4": False, "unlisted.mp4": False}
    for path, was_there in paths.items():
        segment = Segment(path, 0.0, None, None, "val", path=path)
        (found,) = source.candidates(segment, planned(tmp_path, [segment]))
        assert (found.path, found.was_there) == (folder / path, was_there)
    source.check()
    folder.rename(tmp_path / "w")
    folder.mkdir()
    with pytest.raises(KprepError, match="no longer the folder"):
        source.check()


def test_the_last_sources_can_be_left_out_and_nothing_is_asked_again(tmp_path):
    journal = Journal(tmp_path / "journal.sqlite", "val")
    journal.plan([Segment("aaaaaaaaaaa", 0.0, 1.0, "x", "val")], seed=0, clips_per_shard=4, limit=None,
                 classes=frozenset(), taken_keys=frozenset())  # fmt: skip
    journal.use_sources(["cvdf:k400", "youtube:"])
    journal.record_answers(1, (Answer("cvdf", Reason.MISSING_UPSTREAM, ""),))
    journal.mark_done("cvdf", "a.tar")
    journal.use_sources(["cvdf:k400"])
    assert next(journal.pending()).answers
    assert journal.is_done("cvdf", "a.tar")
    journal.use_sources(["videos", "cvdf:k400"])
    assert not next(journal.pending()).answers
    assert not journal.is_done("cvdf", "a.tar")
    journal.close()


def test_sources_that_have_no_list(tmp_path):
    done = run_kprep("shard", "youtube:", tmp_path / "r", "--split", "val", check=False)
    assert (done.returncode, "--annotations" in done.stderr) == (2, True)
    done = run_kprep(
        "shard",
        tmp_path,
        tmp_path / "r",
        "--split",
        "val",
        "--source",
        "youtube:",
        "--youtube",
        "colour=red",
        check=False,
    )
    assert done.returncode == 2


# -- asking first, trying again, starting over ---------------------------------------------------


def test_a_dry_run_writes_nothing_and_tells_what_is_to_come(clips, tmp_path):
    done = run_kprep("shard", clips / "videos", tmp_path / "root", "--split", "val", "--profile", "small",
                     "--annotations", clips / "val.csv", "--dry-run")  # fmt: skip
    assert not (tmp_path / "root").exists()
    assert "rows             11" in done.stdout
    assert "expected clips   10, in 1 shards" in done.stdout
    assert "from 8 clips" in done.stdout
    with mirror() as server:
        serve(server, clips)
        done = run_kprep("shard", "cvdf:k400", tmp_path / "root", "--split", "val", "--profile", "small",
                         "--mirror", server.base, "--dry-run")  # fmt: skip
        assert "archives         4, " in done.stdout
    assert not (tmp_path / "root").exists()


def test_a_dry_run_expects_clips_of_the_listed_paths_that_are_there(clips, tmp_path):
    there = sorted(path.name for path in (clips / "videos").rglob("*.mp4"))[:2]
    names = [*(f"none-{number}.mp4" for number in range(9)), *there]
    (tmp_path / "list.txt").write_text("".join(f"{name} x\n" for name in names))
    done = run_kprep("shard", clips / "videos", tmp_path / "root", "--split", "val", "--profile", "small",
                     "--annotations", tmp_path / "list.txt", "--dry-run")  # fmt: skip
    assert "rows             11" in done.stdout
    assert "expected clips   2, in 1 shards" in done.stdout
    assert "from 2 clips" in done.stdout


def test_rows_that_cannot_be_read_say_why_at_once(clips, tmp_path):
    rows = [("x", name, "0:03", 5, "val", 0) for name in IDS]
    kinetics_csv(tmp_path / "val.csv", rows)
    command = ("shard", clips / "videos", tmp_path / "root", "--split", "val", "--annotations",
               tmp_path / "val.csv", "--workers", 1)  # fmt: skip
    why = "val.csv, line 2: time_start and time_end ('0:03' and '5') must be seconds"
    assert f"bad row          10, the first: {why}" in run_kprep(*command, "--dry-run").stdout
    done = run_kprep(*command, check=False)
    assert done.returncode == 1
    assert f"nothing was published (10 bad row); the first: {why}" in done.stderr


def test_retry_tries_just_the_reasons_asked_for(clips, tmp_path):
    source, root = tmp_path / "v", tmp_path / "root"
    source.mkdir()
    for name in IDS[:4]:
        (source / f"{name}_000003_000005.mp4").write_bytes(
            (clips / "videos" / f"{name}_000003_000005.mp4").read_bytes()
        )
    (source / f"{IDS[4]}_000003_000005.mp4").touch()
    arguments = ("shard", source, root, "--split", "val", "--profile", "small", "--annotations", clips / "val.csv",
                 "--clips-per-shard", 4)  # fmt: skip
    env = {"KPREP_FFMPEG": str(_crashing(tmp_path, IDS[3]))}
    assert run_kprep(*arguments, check=False, **env).returncode == 1  # one row's worker crashed
    (source / f"{IDS[4]}_000003_000005.mp4").write_bytes(
        (clips / "videos" / f"{IDS[4]}_000003_000005.mp4").read_bytes()
    )
    again = run_kprep(*arguments, "--retry", "empty-file", "--finish", **env)
    assert "worker crashed" in again.stdout
    rows = {row["video_id"]: row for row in ledger(root, "val")}
    assert rows[IDS[4]]["status"] == "ok"
    assert Counter(row["reason"] for row in rows.values())["missing"] == 6
    run_kprep("verify", root)


def test_rows_that_are_tried_again_have_their_shard_built_again(tmp_path):
    """A kill between reopening and building must not leave the old tar as a finished one."""
    journal = Journal(tmp_path / "journal.sqlite", "val")
    rows = [Segment(f"aaaaaaaaaa{number}", 0.0, 1.0, "x", "val") for number in range(3)]
    journal.plan(rows, seed=0, clips_per_shard=1, limit=None, classes=frozenset(),
                 taken_keys=frozenset())  # fmt: skip
    for row in list(journal.pending()):
        reason = Reason.EMPTY_FILE if row.shard == 1 else Reason.MISSING
        journal.record(row.row, Outcome(Status.FAILED, reason, ""))
        journal.commit()
        journal.record_shard(row.shard, {"num_clips": 0}, {})
    assert journal.reopen([Reason.EMPTY_FILE]) == 1
    assert set(journal.shards()) == {0, 2}
    journal.close()


def _crashing(tmp_path: Path, victim: str) -> Path:
    from prep.ffmpeg_binary import find_ffmpeg

    script = tmp_path / "ffmpeg"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *{victim}*) kill -9 $PPID ;; esac\nexec "{find_ffmpeg().path}" "$@"\n'
    )
    script.chmod(0o755)
    return script


def test_force_throws_unfinished_work_away_and_nothing_else(clips, reference, tmp_path):
    root = tmp_path / "root"
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "prep", "shard", str(clips / "videos"), str(root), "--split", "val", "--profile", "small",
         "--annotations", str(clips / "val.csv"), "--seed", "5"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    while not list(root.glob(".kprep-work/val/staged/*.pack")) and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait()
    convert_folder(clips, root, "--force")
    assert files_of(root) == files_of(reference)
    done = run_kprep("shard", clips / "videos", root, "--split", "val", "--profile", "small", "--annotations", clips / "val.csv",
                     "--force", check=False)  # fmt: skip
    assert (done.returncode, "is published" in done.stderr) == (2, True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    done = run_kprep("shard", clips / "videos", tmp_path / "mine", "--split", "val", "--annotations", clips / "val.csv",
                     "--force", check=False)  # fmt: skip
    assert done.returncode == 2
    assert (tmp_path / "mine" / "thesis.txt").exists()


# -- scale ---------------------------------------------------------------------------------------


def _peak_kilobytes(*arguments) -> int:
    """Run the command; return the peak memory of its main process, not of its workers.

    Not by getrusage: what that tells began with the memory of the process that started this one.
    """
    code = (
        "import sys\nfrom prep.cli import main\nsys.argv = ['kprep', *sys.argv[1:]]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('peak', open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code, *map(str, arguments)], capture_output=True, text=True,
                          timeout=300, check=True)  # fmt: skip
    return int(done.stdout.rpartition("peak ")[2])


@pytest.mark.slow
def test_memory_is_flat_in_the_number_of_rows_that_fail(tmp_path):
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "readme.mp4").touch()
    peaks = {}
    for count in (1_000, 100_000):
        rows = [("abseiling", f"{number:011d}", 0, 10, "val", 0) for number in range(count)]
        listing = kinetics_csv(tmp_path / f"{count}.csv", rows)
        peaks[count] = _peak_kilobytes("shard", tmp_path / "v", tmp_path / f"r{count}", "--split", "val", "--profile", "small",
                                       "--annotations", listing)  # fmt: skip
    assert peaks[100_000] < 1.1 * peaks[1_000], peaks


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int):
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=False
    )
    if mounted.returncode:
        without("a small file system can only be mounted by root")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_loses_nothing(clips, reference, tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, 1):
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(850_000))
        done = run_kprep("shard", clips / "videos", disk / "root", "--split", "val", "--profile", "small", "--clips-per-shard", 4,
                         "--annotations", clips / "val.csv", check=False)  # fmt: skip
        assert done.returncode == 1
        assert done.stderr.strip().splitlines()[-1].startswith("Error: ")
        assert "full" in done.stderr or "No space" in done.stderr
        for path in (disk / "root").glob("val/val-*.tar"):
            assert path.read_bytes() == (reference / "val" / path.name).read_bytes()
        assert not (disk / "root" / "manifest.json").exists()
        ballast.unlink()
        convert_folder(clips, disk / "root")
        assert files_of(disk / "root") == files_of(reference)


# -- a bucket ------------------------------------------------------------------------------------


def download(s3, prefix: str, folder: Path) -> Path:
    store = s3.store(prefix)
    for page in obstore.list(store):
        for meta in page:
            target = folder / meta["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(bytes(obstore.get(store, meta["path"]).bytes()))
    return folder


@pytest.mark.slow
def test_a_bucket_gets_the_same_bytes_after_any_kill(clips, reference, s3, tmp_path):
    url, rng = "s3://kprep/converted", random.Random(1)
    command = [sys.executable, "-P", "-m", "prep", "shard", str(clips / "videos"), url, "--split", "val", "--profile", "small",
               "--clips-per-shard", "4", "--annotations", str(clips / "val.csv"), "--work", str(tmp_path / "work")]  # fmt: skip
    env = {**os.environ, **s3.environment}
    for _ in range(4):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env
        )
        try:
            process.wait(rng.uniform(0.5, 3.0))
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    if process.returncode:
        run_kprep(*command[4:], **s3.environment)
    assert files_of(download(s3, "converted", tmp_path / "copy")) == files_of(reference)
    run_kprep("verify", url, **s3.environment)


@pytest.mark.slow
def test_two_runs_into_one_bucket_are_kept_apart(clips, s3, tmp_path):
    store = s3.store("locked")
    text = json.dumps({"owner": "somebody else", "expires": time.time() + 60}).encode()
    obstore.put(store, ".kprep-lock", text)
    arguments = ("shard", clips / "videos", "s3://kprep/locked", "--split", "val", "--profile", "small",
                 "--annotations", clips / "val.csv", "--work", tmp_path / "work")  # fmt: skip
    done = run_kprep(*arguments, check=False, **s3.environment)
    assert done.returncode == 2
    assert "another kprep" in done.stderr
    ours = (tmp_path / "work/val/owner").read_text()  # as a run leaves it that was killed
    left = json.dumps({"owner": ours, "expires": time.time() + 60}).encode()
    obstore.put(store, ".kprep-lock", left)
    run_kprep(*arguments, **s3.environment)
    assert ".kprep-lock" not in [meta["path"] for page in obstore.list(store) for meta in page]
    done = run_kprep(
        "shard",
        clips / "videos",
        "s3://kprep/locked2",
        "--split",
        "val",
        check=False,
        **s3.environment,
    )
    assert (done.returncode, "--work" in done.stderr) == (2, True)


def test_nothing_is_converted_into_a_web_address(clips, tmp_path):
    done = run_kprep(
        "shard", clips / "videos", "http://127.0.0.1:9/x", "--split", "val", "--work", tmp_path, check=False
    )  # fmt: skip
    assert (done.returncode, "127.0.0.1:9/x is read only" in done.stderr) == (2, True)


# -- Dask ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def dask_cluster(count: int, folder: Path):
    """A scheduler and `count` workers on this machine; yields the address, it, and the workers."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    dask = [sys.executable, "-m", "distributed.cli.dask_scheduler"]
    address = f"tcp://127.0.0.1:{port}"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
    processes = [
        subprocess.Popen(
            [*dask, "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"], **quiet
        )
    ]
    try:
        _wait_for_port(port)
        processes += [dask_worker(address, folder) for _ in range(count)]
        _wait_for_workers(address, count)
        yield address, processes[0], processes[1:]
    finally:
        for process in reversed(processes):
            process.kill()
            process.wait()


def dask_worker(address: str, folder: Path, **environment: str) -> subprocess.Popen[bytes]:
    options = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--host", "127.0.0.1"]
    return subprocess.Popen(
        [sys.executable, "-m", "distributed.cli.dask_worker", address, *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={**os.environ, **environment},
    )


@contextlib.contextmanager
def dask_conversion(clips, root: Path, address: str):
    """A conversion on a cluster, which has encoded its first clip."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "prep", "shard", str(clips / "videos"), str(root), "--split", "val", "--profile", "small",
         "--clips-per-shard", "4", "--annotations", str(clips / "val.csv"), "--engine", "dask", "--scheduler", address],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    try:
        while not list(root.glob(".kprep-work/val/staged/*.pack")) and process.poll() is None:
            time.sleep(0.005)
        yield process
    finally:
        process.kill()
        process.communicate()


def _until(holds: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a file is there, or the process has ended."""
    while not holds.exists() and process.poll() is None:
        time.sleep(0.01)


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise RuntimeError("the Dask scheduler did not start")


def _wait_for_workers(address: str, count: int) -> None:
    code = f"from distributed import Client; c = Client({address!r}); c.wait_for_workers({count}, 60); c.close()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True)


@pytest.mark.slow
def test_dask_gives_the_same_bytes_also_when_a_worker_dies(clips, reference, tmp_path):
    root = tmp_path / "root"
    with (
        dask_cluster(2, tmp_path) as (address, _, workers),
        dask_conversion(clips, root, address) as process,
    ):
        workers[0].kill()
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    assert files_of(root) == files_of(reference)


def test_a_result_that_is_lost_with_its_dask_worker_is_made_again(tmp_path, monkeypatch):
    from distributed import LocalCluster

    from prep import dask_pool
    from prep.ffmpeg_binary import find_ffmpeg
    from prep.worker_pool import Job

    monkeypatch.setattr(dask_pool, "run_job", len)
    (tmp_path / "temporary").mkdir()
    with (
        LocalCluster(1, processes=False, dashboard_address=None) as cluster,
        dask_pool.DaskPool(
            cluster.scheduler_address, tmp_path, [], find_ffmpeg().sha256, 60
        ) as pool,
    ):
        pool.submit(Job("tag", {"of": 1}))
        (future,) = pool._futures
        while pool._answers.empty():
            time.sleep(0.01)
        pool._client._handle_lost_data(key=future.key)  # what the scheduler has it do
        found = []
        while pool.unfinished:
            found += pool.results(1)
    assert [(job.tag, value) for job, value in found] == [("tag", 1)]


def test_what_listens_and_says_nothing_is_no_dask_scheduler(tmp_path, monkeypatch):
    from prep import dask_pool

    monkeypatch.setattr(dask_pool, "_ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(dask_pool, "_CLOSE_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UsageError, match="nothing is said within"):
            dask_pool.DaskPool(address, tmp_path, [], "", 60)


@pytest.mark.slow
def test_a_dask_scheduler_that_is_stopped_is_taken_for_lost(tmp_path, monkeypatch):
    from prep import dask_pool
    from prep.ffmpeg_binary import find_ffmpeg

    (tmp_path / "temporary").mkdir()
    with dask_cluster(1, tmp_path) as (address, scheduler, _):
        pool = dask_pool.DaskPool(address, tmp_path, [], find_ffmpeg().sha256, 60)
        monkeypatch.setattr(dask_pool, "_ANSWER_SECONDS", 1)
        scheduler.send_signal(signal.SIGSTOP)
        time.sleep(1)
        with pytest.raises(KprepError, match="went away"), pool:
            while True:
                list(pool.results(1))


@pytest.mark.slow
def test_a_dask_worker_that_is_stopped_from_the_start_is_one_sentence(tmp_path, monkeypatch):
    from prep import dask_pool

    monkeypatch.setattr(dask_pool, "_CHECK_SECONDS", 2)
    (tmp_path / "temporary").mkdir()
    with dask_cluster(1, tmp_path) as (address, _, workers):
        workers[0].send_signal(signal.SIGSTOP)
        with pytest.raises(UsageError, match="not every Dask worker at .* within 2 s"):
            dask_pool.DaskPool(address, tmp_path, [], "", 60)
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.slow
def test_a_dask_worker_that_comes_later_gets_work_if_it_is_like_the_others(
    clips, tmp_path, monkeypatch
):
    from prep.ffmpeg_binary import find_ffmpeg

    go, log = tmp_path / "go", tmp_path / "log"
    # the first clip is encoded at once, the others later
    waits = f"mkdir {tmp_path}/first || until [ -e {go} ]; do sleep 0.1; done"
    for name, does in (("ffmpeg", waits), ("other", "")):
        script = tmp_path / name
        script.write_text(
            f'#!/bin/sh\ncase "$*" in *videos*) {does}\necho {name} $PPID >> {log} ;; esac\n'
            f'exec "{find_ffmpeg().path}" "$@"\n'
        )
        script.chmod(0o755)
    monkeypatch.setenv("KPREP_FFMPEG", str(tmp_path / "ffmpeg"))
    root = tmp_path / "root"
    with (
        dask_cluster(1, tmp_path) as (address, _, workers),
        dask_conversion(clips, root, address) as process,
    ):
        other = dask_worker(address, tmp_path, KPREP_FFMPEG=str(tmp_path / "other"))
        try:
            refused = next(line for line in process.stderr if "gets no work" in line)
            assert "it has another ffmpeg (sha256" in refused
            alike = dask_worker(address, tmp_path)
            go.touch()
            _until(log, process)
            workers[0].kill()  # what is left is done by the one that is alike
            _, err = process.communicate(timeout=300)
            assert process.returncode == 0, err
        finally:
            other.kill()
            other.wait()
            alike.kill()
            alike.wait()
    ran = [line.split() for line in log.read_text().splitlines()]
    assert {name for name, _ in ran} == {"ffmpeg"}
    assert str(alike.pid) in {pid for _, pid in ran}


@pytest.mark.slow
def test_a_dask_scheduler_that_goes_away_is_one_sentence_and_no_rows_fault(clips, tmp_path):
    root = tmp_path / "root"
    with (
        dask_cluster(1, tmp_path) as (address, scheduler, _),
        dask_conversion(clips, root, address) as process,
    ):
        process.send_signal(signal.SIGSTOP)
        scheduler.kill()
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert f"the Dask scheduler at {address} went away" in err
    assert "Traceback" not in err
    with sqlite3.connect(root / ".kprep-work/val/journal.sqlite") as journal:
        found = journal.execute("SELECT DISTINCT status FROM rows").fetchall()
    journal.close()
    assert {status for (status,) in found} <= {"ok", "pending"}


def test_what_a_dask_worker_reports(tmp_path):
    from prep.dask_pool import report
    from prep.ffmpeg_binary import find_ffmpeg

    marker, mounted = tmp_path / "work/val/temporary/marker", tmp_path / "videos"
    for folder in (marker.parent, mounted / "a", tmp_path / "unmounted"):
        folder.mkdir(parents=True)
    folders = [str(mounted), str(tmp_path / "unmounted")]
    assert report(str(marker), folders) == (find_ffmpeg().sha256, str(tmp_path / "work/val"))
    marker.touch()
    assert report(str(marker), folders)[1] == folders[1]
    assert report(str(marker), [*folders[:1], str(tmp_path / "none")])[1] == str(tmp_path / "none")
    assert report(str(marker), folders[:1])[1] == ""


@pytest.mark.slow
def test_dask_mistakes_get_one_sentence(clips, tmp_path):
    arguments = (
        "shard",
        clips / "videos",
        tmp_path / "r",
        "--split",
        "val",
        "--annotations",
        clips / "val.csv",
        "--engine",
        "dask",
    )
    assert "needs --scheduler" in run_kprep(*arguments, check=False).stderr
    done = run_kprep(*arguments, "--scheduler", "tcp://127.0.0.1:9", check=False)
    assert (done.returncode, "no Dask scheduler answers" in done.stderr) == (2, True)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("wrong", [
    ("--engine", "dask"), ("--engine", "dask", "--scheduler", "foo"), ("--source", "no/folder"),
])  # fmt: skip
def test_a_mistake_leaves_no_plan_behind(clips, tmp_path, wrong):
    root = tmp_path / "root"
    arguments = (
        "shard",
        clips / "videos",
        root,
        "--split",
        "val",
        "--annotations",
        clips / "val.csv",
    )
    done = run_kprep(*arguments, *wrong, check=False)
    assert (done.returncode, root.exists()) == (2, False), done.stderr


def test_the_ledger_as_csv(clips, reference, tmp_path):
    run_kprep("info", reference, "--csv", tmp_path / "ledger.csv")
    with (tmp_path / "ledger.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = pq.read_table(reference / "ledger/val.parquet").to_pylist()
    assert [(row["split"], row["key"], row["status"], row["reason"]) for row in rows] == [
        ("val", row["key"], row["status"], row["reason"] or "") for row in found
    ]
    done = run_kprep("overlap", tmp_path / "ledger.csv", clips / "val.csv")
    assert f"{len(found)} rows (100.0 %) are of shared ids" in done.stdout.splitlines()[0]


@pytest.mark.parametrize("text", ["soon", "1e999", "1e99999999", "1/0"])
def test_seconds_that_are_no_number_are_refused_at_once(text):
    with pytest.raises(
        UsageError, match=f"--youtube seconds_between_videos={text} must be of type"
    ):
        _youtube_options({"seconds_between_videos": text})
    assert _youtube_options({"seconds_between_videos": "1/2"}).seconds_between_videos == 0.5
