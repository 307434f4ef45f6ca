"""The lock of a bucket: answers that are lost, runs that take it, processes that were suspended."""

import json
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
from copy_datasets import noise_dataset

from prep import root_lock
from prep.errors import KprepError, StorageError
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
        return self.data, str(self.version)

    def delete(self, path):
        self.deleted = path == LOCK_NAME


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until the test sets it."""
    found = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(root_lock, "_TTL_SECONDS", TTL)
    given = SimpleNamespace(time=lambda: found.now, monotonic=lambda: found.now)
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
