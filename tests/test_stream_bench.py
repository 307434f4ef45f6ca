"""`kprep bench`: sane numbers from a tiny dataset; nothing here depends on how fast it is."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import REPOSITORY
from fault_proxy import fault_proxy
from stream_datasets import make_dataset, without_gop_index

from prep.bench_command import bench_group
from prep.errors import StorageError, UsageError
from prep.format import read_manifest
from prep.storage import Storage
from stream.bench import memory_baseline
from stream.bench_decode import CONTENDERS, _packets, decode_samples
from stream.bench_measure import CountingStorage, Spread, cpu_seconds, own_processes, pss_bytes


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("bench"), count=10)


def run(*arguments):
    return CliRunner().invoke(bench_group, [str(argument) for argument in arguments])


def test_decode_shows_every_way_beside_the_floor(root):
    done = run("decode", root, "--clips", 3, "--rounds", 1, "--json")
    found = json.loads(done.output)
    assert found["bench"] == "decode"
    assert found["split"] == "train"
    assert list(found["results"]) == list(CONTENDERS)
    for name, result in found["results"].items():
        assert set(result) == {"cpu_ms_per_clip", "over_floor"}
        assert set(result["cpu_ms_per_clip"]) == {"median", "low", "high"}
        assert result["over_floor"]["median"] == 1 or name != "floor"
    assert "| yuv420 |" in run("decode", root, "--clips", 2, "--rounds", 1).output


def test_decode_says_how_many_clips_it_decoded(root):
    done = run("decode", root, "--clips", 64, "--rounds", 1, "--json")
    samples = decode_samples(Storage(str(root)), "train", frames=16, fps=Fraction(15), clips=64)
    assert json.loads(done.output)["options"]["clips"] == len(samples)
    assert 0 < len(samples) <= 10  # the split has no more


def test_the_floor_is_fed_exactly_the_packets_up_to_the_last_frame(root):
    storage = Storage(str(root))
    for sample in decode_samples(storage, "train", frames=16, fps=Fraction(15), clips=5):
        clip, frames = sample.request.clip, sample.request.frames
        last = int(frames[-1])
        gops = range(int(frames[0]) // clip.gop_frames, last // clip.gop_frames + 1)
        # whole GOPs before the last one, and of that one up to the last frame
        assert len(_packets(sample)) == (len(gops) - 1) * clip.gop_frames + last % clip.gop_frames + 1  # fmt: skip


def test_decode_without_a_gop_index_is_refused(root, tmp_path):

    copy = shutil.copytree(root, tmp_path / "root")
    without_gop_index(copy)
    error = run("decode", copy, "--clips", 2).exception
    assert isinstance(error, UsageError)
    assert "GOP index" in str(error)


def test_stream_shows_the_root_beside_memory(root):
    done = run("stream", root, "--workers", 0, "--batch", 4, "--seconds", 0.1, "--rounds", 2, "--json")  # fmt: skip
    found = json.loads(done.output)["results"]
    assert list(found) == ["root", "memory"]
    for result in found.values():
        assert result["clips_per_second"]["median"] > 0
        assert result["clips_per_second"]["low"] <= result["clips_per_second"]["high"]
        assert 0 < result["requests_per_clip"] <= 1.5
        assert result["memory_bytes"] > 10_000_000
        assert result["first_batch_seconds"] > 0
    assert found["memory"]["ratio"]["median"] == 1
    assert found["root"]["bytes_per_clip"] == found["memory"]["bytes_per_clip"]


def test_stream_gives_a_split_smaller_than_a_batch_more_views(root):
    done = run("stream", root, "--workers", 0, "--batch", 40, "--seconds", 0.1, "--rounds", 1)
    assert done.exit_code == 0, done.exception
    assert "| root |" in done.output


def test_stream_with_workers_as_a_user_runs_it(root):
    """In a process of its own, since workers are started by forkserver."""
    code = "from prep.bench_command import bench_group; bench_group()"
    done = subprocess.run(
        [sys.executable, "-c", code, "stream", root, "--workers", "1", "--batch", "4",
         "--seconds", "0.1", "--rounds", "1"],
        capture_output=True, text=True, timeout=120, check=False, cwd=REPOSITORY,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| root |" in done.stdout
    assert "| memory |" in done.stdout


@pytest.mark.slow
def test_a_far_bucket_beside_the_local_copy(root, s3, monkeypatch):
    """30 ms before each first byte: every request is one, and none is saved by reading more."""
    address = s3.upload(root, "bench")
    with fault_proxy(s3.endpoint) as far:
        far.latency_seconds = 0.03
        for name, value in {**s3.environment, "AWS_ENDPOINT_URL": far.endpoint}.items():
            monkeypatch.setenv(name, value)
        done = run("stream", address, "--beside", root, "--workers", 0, "--batch", 4,
                   "--seconds", 0.5, "--rounds", 1, "--json")  # fmt: skip
        assert done.exception is None, done.exception
        found = json.loads(done.output)["results"]
        assert list(found) == ["root", str(root), "memory"]
        assert len(far.gets) > 10
    bucket, local = found["root"], found[str(root)]
    assert 0 < bucket["requests_per_clip"] <= local["requests_per_clip"]  # small gaps are read over
    assert bucket["bytes_per_clip"] >= local["bytes_per_clip"]
    assert bucket["clips_per_second"]["median"] > 0


def test_what_stands_beside_must_be_a_copy(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "root")
    text = (copy / "manifest.json").read_text()
    fingerprint = json.loads(text)["splits"]["train"]["fingerprint"]
    (copy / "manifest.json").write_text(text.replace(fingerprint, fingerprint[::-1]))
    error = run("stream", root, "--beside", copy).exception
    assert isinstance(error, UsageError)
    assert "holds other clips in split train" in str(error)


def test_memory_baseline_holds_the_same_bytes_and_travels(root):
    source = Storage(str(root))
    memory = memory_baseline(source, "train")
    shard = read_manifest(source).splits["train"].shards[0].path
    other = pickle.loads(pickle.dumps(memory))  # noqa: S301 - made in this line
    assert bytes(other.read_range(shard, 10, 700)) == bytes(source.read_range(shard, 10, 700))
    assert (other.requests, other.bytes_read) == (1, 690)
    assert not memory.exists("absent")
    with pytest.raises(StorageError):
        memory.read("absent")
    memory.release()


def test_counting_storage_counts(root):
    counting = CountingStorage(str(root))
    shard = read_manifest(counting).splits["train"].shards[0].path
    counting.read_range(shard, 0, 5)
    counting.read_range(shard, 5, 512)
    assert (counting.requests, counting.bytes_read) == (2, 512)


def test_processor_time_and_memory_include_children():
    before = own_processes()
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"], stdin=subprocess.DEVNULL)
    try:
        new = own_processes() - before
        assert child.pid in new
        deadline = time.monotonic() + 30
        while cpu_seconds({child.pid}) < 0.05 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert cpu_seconds({child.pid}) >= 0.05
        assert pss_bytes({os.getpid(), child.pid}) > pss_bytes({child.pid}) > 0
    finally:
        child.kill()
        child.wait()


def test_spread():
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(median=2.0, low=1.0, high=3.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["decode", "ROOT", "--split", "none"], "it has train"),
        (["decode", "ROOT", "--fps", 60], "fps (60)"),
        (["decode", "ROOT", "--frames", 900], "900 frames"),
        (["stream", "ROOT", "--seconds", "nan"], "seconds (nan)"),
        (["stream", "ROOT", "--seconds", "inf"], "seconds (inf)"),
    ],
)
def test_mistakes_are_one_sentence(root, arguments, words):
    error = run(*[root if value == "ROOT" else value for value in arguments]).exception
    assert isinstance(error, UsageError)
    assert words in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    "arguments",
    [
        ["stream", "--batch", 0],
        ["stream", "--seconds", 0],
        ["stream", "--workers", -1],
        ["decode", "--clips", 0],
        ["decode", "--frames", 0],
    ],
)
def test_numbers_out_of_range_are_refused_as_everywhere(arguments):
    done = run(*arguments, "ROOT")
    assert done.exit_code == 2
    assert f"Invalid value for '{arguments[1]}'" in done.output
