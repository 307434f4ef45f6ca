"""The lock of a bucket: answers that are lost, runs that take it, processes that were suspended."""

import json
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
from copy_datasets import noise_dataset

from prep import root_lock
from prep.errors import KprepError, StorageError, UsageError
from prep.format import read_manifest
from prep.publish import write_root_files
from prep.root_lock import LOCK_NAME, _BucketLock
from prep.storage import Storage

TTL = 0.02  # renewed every 5 ms of real time; the clock that makes it void is the test's


class Store:
    """One object with conditional writes; the answers to some of them get lost."""

    root = "s3://bucket/root"

    def __init__(self, lost_answers=()) -> None:
        self.data: bytes | None = None
        self.version = 0
        self.lost_answers = set(lost_answers)
        self.puts = 0
        self.reached = threading.Event()  # some puts after the last answer that is lost
        self.deleted = False

    def put_if(self, path, data, etag):
        assert path == LOCK_NAME
        self.puts += 1
        if self.puts > max(self.lost_answers, default=0) + 3:
            self.reached.set()
        if etag != (None if self.data is None else str(self.version)):
            raise FileExistsError(path)
        self.data, self.version = data, self.version + 1
        if self.puts in self.lost_answers:
            raise StorageError("the answer was lost")
        return str(self.version)

    def read_with_etag(self, path):
        assert path == LOCK_NAME
        if self.data is None:
            raise StorageError("there is none") from FileNotFoundError()
        return self.data, str(self.version)

    def delete(self, path):
        self.deleted = path == LOCK_NAME


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until the test sets it, or somebody sleeps."""
    found = SimpleNamespace(now=1000.0, sleeps=0, while_asleep=lambda: None)

    def sleep(seconds):
        found.now += seconds
        found.sleeps += 1
        found.while_asleep()

    monkeypatch.setattr(root_lock, "_TTL_SECONDS", TTL)
    given = SimpleNamespace(time=lambda: found.now, monotonic=lambda: found.now, sleep=sleep)
    monkeypatch.setattr(root_lock, "time", given)
    return found


def test_a_renewal_whose_answer_is_lost_is_not_a_lock_that_is_lost(clock):
    store = Store(lost_answers=[2, 5])
    lock = _BucketLock(store, "me")
    lock.acquire()
    assert store.reached.wait(60)
    lock.check()
    lock.release()
    assert store.deleted


def test_a_lock_that_another_run_took_is_lost_and_stays_theirs(clock):
    store = Store()
    lock = _BucketLock(store, "me")
    lock.acquire()
    store.data, store.version = json.dumps({"owner": "you", "expires": 2000.0}).encode(), 99
    lock._thread.join(60)
    with pytest.raises(KprepError, match="another run took the lock; run again"):
        lock.check()
    lock.release()
    assert not store.deleted


def theirs(expires: float) -> bytes:
    return json.dumps({"owner": "you", "expires": expires}).encode()


@pytest.mark.parametrize("ahead", [30, -3600], ids=["our clock is ahead", "our clock is behind"])
def test_a_lock_is_not_taken_from_a_living_holder_by_the_clock(clock, ahead):
    store = Store()
    store.data = theirs(clock.now - ahead)

    def renew():
        if clock.sleeps == 5:
            store.data, store.version = theirs(clock.now - ahead), 6

    clock.while_asleep = renew
    with pytest.raises(UsageError, match="another kprep is converting into s3://bucket/root; wait"):
        _BucketLock(store, "me").acquire()
    assert (clock.sleeps, store.version) == (5, 6)


@pytest.mark.parametrize("ahead", [30, -3600], ids=["void by our clock", "our clock is behind"])
def test_a_lock_that_nobody_renews_for_its_whole_time_is_taken(clock, ahead, caplog):
    store = Store()
    store.data = theirs(clock.now - ahead)
    begun = clock.now
    lock = _BucketLock(store, "me")
    lock.acquire()
    assert clock.now >= begun + TTL
    assert json.loads(store.data)["owner"] == "me"
    assert "s3://bucket/root has a lock that seems to be left behind" in caplog.text
    lock.release()


def test_a_lock_that_its_holder_gives_back_meanwhile_is_ours(clock):
    store = Store()
    store.data = theirs(clock.now - 30)

    def give_back():
        store.data = None

    clock.while_asleep = give_back
    lock = _BucketLock(store, "me")
    lock.acquire()
    lock.check()
    assert clock.sleeps == 1
    lock.release()


def test_a_lock_in_a_real_store_goes_over_when_its_holder_is_dead(s3, monkeypatch):
    monkeypatch.setattr(root_lock, "_TTL_SECONDS", 4.0)
    storage = Storage("s3://kprep/lock", s3.options)
    holder, taker = _BucketLock(storage, "you"), _BucketLock(storage, "me")
    holder.acquire()
    monkeypatch.setattr(root_lock, "_holder", lambda _: ("you", 0.0))  # void by the taker's clock
    with pytest.raises(UsageError, match="another kprep is converting"):
        taker.acquire()
    holder.check()
    holder._ended.set()  # no longer renewed, as after kill -9
    holder._thread.join()
    taker.acquire()
    taker.release()
    assert not storage.exists(LOCK_NAME)


def test_a_process_that_was_suspended_does_not_go_on(clock, monkeypatch):
    monkeypatch.setattr(root_lock, "_TTL_SECONDS", 120.0)  # so that no renewal comes meanwhile
    store = Store()
    lock = _BucketLock(store, "me")
    lock.acquire()
    clock.now += 119
    lock.check()
    clock.now += 2
    with pytest.raises(KprepError, match="not renewed for 120 s; run again"):
        lock.check()
    lock.release()
    assert not store.deleted  # by now it may be another run's


def test_a_run_that_lost_its_lock_publishes_nothing(tmp_path, monkeypatch):
    root = noise_dataset(tmp_path / "root", shards=1, shard_bytes=1 << 16)
    before, storage = (root / "manifest.json").read_bytes(), Storage(str(root))
    manifest = replace(read_manifest(storage), class_names=("other",))
    monkeypatch.setattr("prep.publish.root_files", lambda *_: {})  # a card needs a real dataset

    def lost():
        raise KprepError("another run took the lock")

    with pytest.raises(KprepError, match="took the lock"):
        write_root_files(storage, manifest, {}, lost)
    assert (root / "manifest.json").read_bytes() == before
    assert write_root_files(storage, manifest, {}, lambda: None) == manifest
    assert (root / "manifest.json").read_bytes() != before
