"""The cache of whole clips: below its limit at every moment, right after any kill, nothing of others lost."""

import contextlib
import fcntl
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fault_proxy import fault_proxy
from processes import descendants, is_running
from stream_datasets import make_dataset, sequence, without_gop_index

from prep.errors import StorageError, UsageError
from prep.storage import Storage
from stream import clip_loader
from stream.cache import ClipCache, disk_space, parse_bytes

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - looked at, not written to
KILLS = 20


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("cache"), 12)


def loader(root, **more):
    return clip_loader(
        str(root),
        **{"split": "train", "batch_size": 4, "seed": 3, "layout": "yuv420", **more},
    )


def clip(number: int, size: int = 10_000):
    """A clip of random bytes as far as a cache cares, and its payload."""
    rng = random.Random(number)
    name = rng.randbytes(16)
    return SimpleNamespace(content_hash=name, video_bytes=size), memoryview(rng.randbytes(size))


def disk_use(folder: Path) -> int:
    """What `du` says, in bytes: blocks of the folder's files and directories."""
    used = folder.lstat().st_blocks * 512
    for path in folder.rglob("*"):
        try:
            used += path.lstat().st_blocks * 512
        except FileNotFoundError:
            continue
    return used


def read(cache, one, spans):
    """Return what a cache has of a clip."""
    begun = cache.begin(one, spans)
    return None if begun is None else begun.read()


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.clip"))


# -- the directory -------------------------------------------------------------------------------


def test_what_is_put_is_read(tmp_path):
    cache = ClipCache(tmp_path, 10**7)
    one, payload = clip(1)
    assert read(cache, one, [(0, 10)]) is None
    assert cache.put(one, payload)
    assert cache.put(one, payload)
    parts = read(cache, one, [(0, 10), (500, 10_000)])
    assert [bytes(part) for part in parts] == [payload[:10], payload[500:]]
    (path,) = files(tmp_path)
    name = one.content_hash.hex()
    assert path.relative_to(tmp_path).as_posix() == f"kprep-clips-1/{name[:2]}/{name}-10000.clip"
    cache.drop(one)
    assert read(cache, one, [(0, 10)]) is None


def test_a_file_that_a_power_failure_cut_is_replaced(tmp_path):
    cache = ClipCache(tmp_path, 10**7)
    one, payload = clip(1)
    cache.put(one, payload)
    os.truncate(cache._path(one), 5000)
    assert read(cache, one, [(0, 10)]) is None
    assert cache.put(one, payload)
    (part,) = read(cache, one, [(0, len(payload))])
    assert part == payload


@pytest.mark.timeout(30)
def test_a_named_pipe_in_a_clips_place_is_not_waited_for(tmp_path):
    """As whoever may write to a shared cache could make."""
    cache = ClipCache(tmp_path, 10**7)
    one, payload = clip(1)
    cache.put(one, payload)
    cache._path(one).unlink()
    os.mkfifo(cache._path(one))
    assert read(cache, one, [(0, 10)]) is None
    assert cache.put(one, payload)
    assert read(cache, one, [(0, 10)]) == [payload[:10]]


def test_a_time_of_use_that_cannot_be_set_costs_nothing(tmp_path, monkeypatch):
    """As where another user keeps the clip."""
    cache = ClipCache(tmp_path, 10**7)
    one, payload = clip(1)
    cache.put(one, payload)
    os.utime(cache._path(one), (1, 1))

    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("stream.cache.os.utime", refused)
    (part,) = read(cache, one, [(0, len(payload))])
    assert part == payload


def open_clips() -> int:
    found = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    return sum(".clip" in file for file in found)


def test_what_is_begun_is_read_later_and_holds_few_files(tmp_path, monkeypatch):
    monkeypatch.setattr("stream.cache._MOST_BEGUN", 3)
    cache = ClipCache(tmp_path, 10**7)
    clips = [clip(number) for number in range(6)]
    for one, payload in clips:
        cache.put(one, payload)
    asked = []
    monkeypatch.setattr("stream.cache.os.posix_fadvise", lambda _, *span: asked.append(span))
    begun = [cache.begin(one, [(0, 10), (500, 900)]) for one, _ in clips]
    assert open_clips() == 3
    assert len(asked) == 6
    assert asked[:2] == [(0, 10, os.POSIX_FADV_WILLNEED), (500, 400, os.POSIX_FADV_WILLNEED)]
    for file in files(tmp_path):
        file.unlink()  # what is begun is had all the same
    for _ in range(2):
        parts = [[bytes(part) for part in one.read()] for one in begun[1:]]
        assert parts == [[payload[:10], payload[500:900]] for _, payload in clips[1:]]
    assert open_clips() == 1
    del begun  # given up
    assert open_clips() == 0


FEW_FILES = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from test_stream_cache import clip
from stream.cache import ClipCache
cache = ClipCache(Path(sys.argv[1]), 10**8)
clips = [clip(number, 100) for number in range(300)]
assert all(cache.put(*one) for one in clips)
begun = [cache.begin(one, [(0, 100)]) for one, _ in clips]
others = [open(sys.argv[0]) for _ in range(128)]
assert [one.read()[0] for one in begun] == [payload for _, payload in clips]
"""


def test_where_few_files_may_be_open_room_is_left_for_others(tmp_path):
    (tmp_path / "few.py").write_text(FEW_FILES)
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, tmp_path / "few.py", tmp_path / "cache"],
        env={**os.environ, "PYTHONPATH": path}, check=True,
    )  # fmt: skip


def test_equal_hashes_of_other_lengths_do_not_mix(tmp_path):
    cache = ClipCache(tmp_path, 10**7)
    one, payload = clip(1)
    other = SimpleNamespace(content_hash=one.content_hash, video_bytes=9_000)
    cache.put(one, payload)
    assert read(cache, other, [(0, 10)]) is None


def test_the_limit_holds_after_every_clip_and_the_oldest_go(tmp_path):
    limit = 500_000
    cache = ClipCache(tmp_path, limit)
    clips = [clip(number, 3000 + 500 * (number % 20)) for number in range(150)]
    for number, (one, payload) in enumerate(clips):
        assert cache.put(one, payload)
        os.utime(cache._path(one), (number, number))
        assert disk_use(tmp_path / "kprep-clips-1") <= limit
    held = [read(cache, one, [(0, 1)]) is not None for one, _ in clips]
    first = held.index(True)
    assert first > 0
    assert all(held[first:])  # exactly the most recently used
    assert disk_use(tmp_path) > 0.8 * limit


def test_a_clip_larger_than_the_limit_is_not_kept(tmp_path):
    cache = ClipCache(tmp_path, 50_000)
    small, payload = clip(2, 20_000)
    assert cache.put(small, payload)
    large, much = clip(1, 60_000)
    assert not cache.put(large, much)
    assert not cache.takes(large)  # so it is not read whole either
    assert read(cache, small, [(0, 9)]) is not None  # nothing had to go for it


def test_a_file_that_is_being_read_survives_its_eviction(tmp_path, monkeypatch):
    """Evicted between the opening and the reading of it: the reader gets its bytes all the same."""
    cache = ClipCache(tmp_path, 10**7)
    one, payload = clip(1)
    cache.put(one, payload)
    real = os.fstat

    def fstat(descriptor):
        cache.drop(one)
        return real(descriptor)

    monkeypatch.setattr("stream.cache.os.fstat", fstat)
    (part,) = read(cache, one, [(0, 10_000)])
    assert part == payload
    assert not files(tmp_path)


def test_files_of_others_are_never_touched(tmp_path):
    cache = ClipCache(tmp_path, 200_000)
    folder = tmp_path / "kprep-clips-1"
    others = [
        tmp_path / "mine.clip",
        folder / "notes.txt",
        folder / "ab" / "photo.jpg",
        folder / "ab" / "123-4.clip",
        folder / "mine" / ("0" * 32 + "-5.clip"),
    ]
    for path in others:
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(b"x" * 5000)
        os.utime(path, (1, 1))
    (folder / "cd").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / ("0" * 32 + "-5.clip")).write_bytes(b"x" * 5)
    for number in range(60):
        cache.put(*clip(number))
    assert all(path.read_bytes() == b"x" * 5000 for path in others)
    assert (tmp_path / "elsewhere" / ("0" * 32 + "-5.clip")).exists()
    assert disk_use(folder) - disk_use(folder / "mine") <= 200_000


def test_left_overs_and_wrong_accounts_mend_themselves(tmp_path):
    cache = ClipCache(tmp_path, 300_000)
    cache.put(*clip(0))
    folder = files(tmp_path)[0].parent
    (folder / ".4711.tmp").write_bytes(b"x" * 50_000)
    lock = tmp_path / "kprep-clips-1" / "lock"
    for account in (b"", b"rubbish", b"kprepcl1" + (2**40).to_bytes(8, "little")):
        lock.write_bytes(account)
        assert cache.put(*clip(len(account) + 1))
        assert not list(folder.glob(".*.tmp"))
    assert len(files(tmp_path)) == 4


def test_who_cannot_have_the_lock_goes_on_without(tmp_path, monkeypatch):
    monkeypatch.setattr("stream.cache._LOCK_SECONDS", 0.01)
    cache = ClipCache(tmp_path, 10**6)
    cache.put(*clip(0))
    with (tmp_path / "kprep-clips-1" / "lock").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert not cache.put(*clip(1))
    assert not cache.put(*clip(1))  # nor is it asked for again at once
    cache._avoid_until = 0
    assert cache.put(*clip(1))


def test_a_full_disk_or_a_lost_directory_only_cost_the_cache(tmp_path, monkeypatch):
    cache = ClipCache(tmp_path / "c", 10**6)

    def replace(self, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        assert cache.takes(clip(0)[0])
        assert not cache.put(*clip(0))
    assert not cache.takes(clip(0)[0])  # for a while, it is not read whole in vain
    cache._avoid_until = 0
    assert not list(tmp_path.rglob("*.tmp"))
    shutil.rmtree(tmp_path / "c")
    assert read(cache, clip(0)[0], [(0, 1)]) is None
    assert cache.put(*clip(0))


def test_a_share_is_admitted_where_the_split_is_larger(tmp_path):
    clips = [clip(number, 10) for number in range(4000)]
    cache = ClipCache(tmp_path, 10**6, split_bytes=4 * 10**6)
    admitted = [cache.admits(one) for one, _ in clips]
    assert 0.2 < np.mean(admitted) < 0.27  # 0.95 of a quarter
    assert admitted == [
        ClipCache(tmp_path, 10**6, split_bytes=4 * 10**6).admits(one) for one, _ in clips
    ]
    assert all(ClipCache(tmp_path, 10**6, split_bytes=10**6).admits(one) for one, _ in clips)


def test_disk_space_is_never_below_what_du_says(tmp_path):
    sizes = [1, 4096, 4097, 10_000, 50_000] * 30
    cache = ClipCache(tmp_path, 10**9)
    for number, size in enumerate(sizes):
        cache.put(*clip(number, size))
    assert disk_use(tmp_path / "kprep-clips-1") <= disk_space(np.array(sizes))


@pytest.mark.parametrize(
    ("text", "expected"),
    [(5, 5), ("5", 5), ("50GB", 50 * 10**9), ("1.5 TB", 15 * 10**11), ("64MiB", 64 * 2**20), ("1k", 1000)],
)  # fmt: skip
def test_sizes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-5", "5 apples", "5iB", "1e9", "9" * 400])
def test_sizes_that_are_none(text):
    with pytest.raises(UsageError, match="cache_limit"):
        parse_bytes(text)


def test_places_and_limits_that_cannot_serve(root, tmp_path):
    with pytest.raises(UsageError, match="shared memory"):
        loader(root, cache_dir=f"{SHARED_MEMORY}/kprep", cache_limit=10**6)
    with pytest.raises(UsageError, match="together"):
        loader(root, cache_dir=tmp_path)
    with pytest.raises(UsageError, match="cache_limit"):
        loader(root, cache_dir=tmp_path, cache_limit=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cache_dir"):
        loader(root, cache_dir=tmp_path / "file", cache_limit=10**6)


# -- a loader with a cache -----------------------------------------------------------------------


def reference(root, epochs=2, **more):
    found = []
    for epoch in range(epochs):
        one = loader(root, **more)
        one.set_epoch(epoch)
        found.append(sequence(one))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_with_the_split_inside_the_limit_later_epochs_make_no_request(root, s3, tmp_path, workers):
    url = s3.upload(root, "cached")
    expected = reference(root, 3, short="pad")
    with fault_proxy(s3.endpoint) as proxy:
        options = {**s3.options, "endpoint": proxy.endpoint}
        one = loader(
            url, short="pad", num_workers=workers, storage_options=options, cache_dir=tmp_path,
            cache_limit=disk_space(loader(root).stream.index.video_bytes),
        )  # fmt: skip
        opened = len(proxy.gets)
        for epoch in range(3):
            one.set_epoch(epoch)
            assert sequence(one) == expected[epoch]
            tars = [get for get in proxy.gets if get.path.endswith(".tar")]
            assert 0 < len(tars) <= 12
            # an epoch reads 12 of the 12 clips, since nothing is left out: 12 is 3 times 4
            assert len(proxy.gets) == opened + len(tars)
        assert len(files(tmp_path)) == 12
    # the server is gone: a second job finds everything it needs but the manifest
    assert len({path.name for path in files(tmp_path)}) == 12


def test_a_cache_serves_foreign_clips_and_local_roots_too(root, tmp_path, monkeypatch):
    plain = Path(shutil.copytree(root, tmp_path / "plain"))
    without_gop_index(plain)
    expected = reference(root, 1, short="pad")[0]
    options = {"short": "pad", "cache_dir": tmp_path / "cache", "cache_limit": "10MB"}
    assert sequence(loader(root, **options)) == expected
    one = loader(plain, **options)
    monkeypatch.setattr(Storage, "read_range", lambda *a, **k: pytest.fail("a request"))
    assert sequence(one) == expected  # the same content, so the same files


def test_clips_of_the_cache_are_asked_for_ahead_and_read_when_decoded(root, tmp_path, monkeypatch):
    options = {"short": "pad", "cache_dir": tmp_path, "cache_limit": "10MB"}
    expected = reference(root, 1, short="pad")[0]
    assert sequence(loader(root, **options)) == expected
    one, reads = loader(root, **options), []
    real = os.pread
    monkeypatch.setattr("stream.cache.os.pread", lambda *given: reads.append(1) or real(*given))
    batches = iter(one)
    found = sequence([next(batches), next(batches)])  # the second begins what is behind it
    assert 0 < len(reads) <= 2 * 2 * one.global_batch  # of these batches alone
    assert open_clips() > 0
    assert found + sequence(batches) == expected
    del batches
    assert open_clips() == 0
    batches = iter(one)
    sequence([next(batches), next(batches)])
    del batches, one  # given up in the middle
    gc.collect()
    assert open_clips() == 0


def test_a_damaged_cached_file_is_dropped_and_read_fresh(root, tmp_path, monkeypatch):
    options = {"short": "pad", "cache_dir": tmp_path, "cache_limit": "10MB"}
    expected = reference(root, 1, short="pad")[0]
    sequence(loader(root, **options))
    for number, path in enumerate(files(tmp_path)):
        data = bytearray(path.read_bytes())
        if number % 3 == 0:
            data = data[:-100]
        elif number % 3 == 1:
            data[:] = bytes(len(data))
        else:
            for at in range(0, len(data), 50):
                data[at] ^= 4
        path.write_bytes(data)
    one = loader(root, **options, bad_clips="substitute")
    assert sequence(one) == expected
    assert not one.bad_clip_summary().clips
    monkeypatch.setattr(Storage, "read_range", lambda *a, **k: pytest.fail("a request"))
    assert sequence(one) == expected  # what was dropped is kept again


def test_a_damaged_clip_never_enters_the_cache(root, tmp_path):
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    one = loader(copy, cache_dir=tmp_path / "cache", cache_limit="10MB", bad_clips="substitute")
    record = one.stream.index.clip(int(one.stream.rows[0]))
    with (copy / record.shard).open("r+b") as file:
        file.seek(record.video_offset)
        file.write(bytes(record.video_bytes))
    os.utime(copy / record.shard, ns=(0, 0))
    one = loader(copy, cache_dir=tmp_path / "cache", cache_limit="10MB", bad_clips="substitute")
    for epoch in range(4):
        one.set_epoch(epoch)
        sequence(one)
    names = [path.name for path in files(tmp_path / "cache")]
    assert not any(name.startswith(record.content_hash.hex()) for name in names)


def test_a_small_cache_keeps_its_share_and_its_limit(root, tmp_path):
    limit = disk_space(loader(root).stream.index.video_bytes) // 2
    expected = reference(root, 3)
    one = loader(root, cache_dir=tmp_path, cache_limit=limit)
    for epoch in range(3):
        one.set_epoch(epoch)
        assert sequence(one) == expected[epoch]
        assert disk_use(tmp_path / "kprep-clips-1") <= limit
    assert 0 < len(files(tmp_path)) < 11


# -- several processes, and kills ----------------------------------------------------------------

JOB = """
import json, sys
from multiprocessing import resource_tracker
sys.path.insert(0, sys.argv[1])
from stream_datasets import sequence
from stream import clip_loader

register = resource_tracker.register

def noted(name, kind):
    register(name, kind)
    with open(sys.argv[6], "a") as file:
        file.write(name + "\\n")

def main():
    resource_tracker.register = noted
    one = clip_loader(sys.argv[2], split="train", batch_size=2, seed=3, layout="yuv420", num_workers=2,
                      cache_dir=sys.argv[3], cache_limit=sys.argv[4])
    print("ready", flush=True)
    for epoch in range(int(sys.argv[5])):
        one.set_epoch(epoch)
        print(json.dumps(sequence(one)), flush=True)

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def job(root, tmp_path):
    """Start the job above, in a process group of its own."""
    script = tmp_path / "job.py"
    script.write_text(JOB)
    started = []

    def start(limit: int, epochs: int) -> subprocess.Popen:
        command = [
            sys.executable,
            script,
            Path(__file__).parent,
            root,
            tmp_path / "cache",
            limit,
            epochs,
            tmp_path / "registered",
        ]
        process = subprocess.Popen(
            [*map(str, command)], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()


class Watch(threading.Thread):
    """Measures a folder over and over while others write to it."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder, self.most, self.ended = folder, 0, threading.Event()

    def run(self):
        while not self.ended.wait(0.01):
            if self.folder.exists():
                self.most = max(self.most, disk_use(self.folder))

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.ended.set()
        self.join()


def left_in_shared_memory() -> set[str]:
    """Files in shared memory that no living process has mapped or open: nobody will remove them."""
    names = {str(path) for path in SHARED_MEMORY.iterdir()} if SHARED_MEMORY.is_dir() else set()
    used = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            used |= {name for name in names if name in (process / "maps").read_text()}
        with contextlib.suppress(OSError):
            used |= {str(entry.readlink()) for entry in (process / "fd").iterdir()}
    return names - used


def sequences(process: subprocess.Popen) -> list:
    return [
        [tuple(clip) for clip in json.loads(line)] for line in process.stdout if line != "ready\n"
    ]


@pytest.mark.slow
def test_two_jobs_share_a_cache_below_its_limit(root, tmp_path, job):
    limit = disk_space(loader(root).stream.index.video_bytes) * 6 // 10
    expected = reference(root, 3, batch_size=2)
    with Watch(tmp_path / "cache") as watch:
        for one in [job(limit, 3), job(limit, 3)]:
            assert sequences(one) == expected
            assert one.wait() == 0
    assert 0 < watch.most <= limit + 4096  # and the cache's own directory, which we were given


@pytest.mark.slow
def test_after_kills_the_cache_is_right_without_a_clean_up(root, tmp_path, job):
    """SIGKILL of a job at seeded moments; its workers may go on for a moment beside the next job."""
    limit = disk_space(loader(root).stream.index.video_bytes) * 7 // 10
    before = left_in_shared_memory()
    rng = random.Random(5)
    with Watch(tmp_path / "cache") as watch:
        for _ in range(KILLS):
            one = job(limit, 50)
            assert one.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0, 1.5))
            one.kill()
            one.wait()
        last = job(limit, 2)
        assert sequences(last) == reference(root, 2, batch_size=2)
        assert last.wait() == 0
    assert watch.most <= limit + 4096
    # Python's own tracker removes the semaphores of the killed, but for one that a kill kept from
    # being registered
    registered = {
        name.replace("/", "sem.") for name in (tmp_path / "registered").read_text().split()
    }
    assert len(registered) >= KILLS

    def left():
        names = left_in_shared_memory() - before
        return {name for name in names if Path(name).name in registered or "/sem." not in name}

    until = time.monotonic() + 600
    while left() and time.monotonic() < until:
        time.sleep(0.2)
    assert not left()


@pytest.mark.slow
def test_workers_end_with_a_killed_trainer(job):
    """Nobody asks them to: the fork server, which is their parent, would keep them for ever."""
    one = job(10**9, 50)
    assert one.stdout.readline() == "ready\n"
    assert one.stdout.readline()  # an epoch: workers are up and busy with the next one
    helpers = descendants(one.pid)
    assert len(helpers) >= 3  # fork server, two workers (and Python's own tracker)
    one.kill()
    one.wait()
    until = time.monotonic() + 600
    while any(is_running(pid) for pid in helpers) and time.monotonic() < until:
        time.sleep(0.1)
    assert not [pid for pid in helpers if is_running(pid)]


def test_killed_at_each_step_of_a_put_the_account_is_never_too_low(tmp_path):
    """A fork dies at the n-th system call that changes the disk; what is left is right and mends itself."""
    code = (
        "import os, random, sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from types import SimpleNamespace\n"
        "from stream.cache import ClipCache\n"
        "import stream.cache as module\n"
        "left = int(sys.argv[3])\n"
        "def hook(event, args):\n"
        "    global left\n"
        "    if event in ('os.rename', 'os.mkdir') or event == 'open' and '.tmp' in str(args[0]) or event == 'os.remove':\n"
        "        left -= 1\n"
        "        if left < 0: os.kill(os.getpid(), 9)\n"
        "rng = random.Random(3)\n"
        "clips = [SimpleNamespace(content_hash=rng.randbytes(16), video_bytes=20000) for _ in range(12)]\n"
        "sys.addaudithook(hook)\n"
        "cache = ClipCache(Path(sys.argv[2]), 150000)\n"
        "for clip in clips: cache.put(clip, memoryview(bytes(20000)))\n"
    )  # fmt: skip
    repository = Path(__file__).parent.parent
    for step in range(0, 40, 5):
        folder = tmp_path / str(step)
        folder.mkdir()
        command = [sys.executable, "-c", code, repository, folder, step]
        done = subprocess.run([*map(str, command)], check=False, timeout=60)
        assert done.returncode == -9  # twelve puts are more than 35 steps
        assert disk_use(folder) <= 150_000 + 4096  # and the directory that we were given
        account = folder / "kprep-clips-1" / "lock"
        if account.exists() and len(account.read_bytes()) == 16:
            used = int.from_bytes(account.read_bytes()[8:], "little")
            assert used >= disk_use(folder / "kprep-clips-1")
        cache = ClipCache(folder, 150_000)
        for number in range(100, 108):
            assert cache.put(*clip(number, 20_000))
            assert disk_use(folder / "kprep-clips-1") <= 150_000
        assert not list(folder.rglob("*.tmp"))
