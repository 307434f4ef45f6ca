"""`kprep push` and `kprep pull`: a dataset from one root to another, readable when it is whole.

Tars go first, then what describes them, the manifest last. Nothing that stands complete at the
destination is sent again, so the same command continues after any interruption.
"""

from __future__ import annotations

import concurrent.futures
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from prep.byte_progress import ByteProgress
from prep.copy_plan import CopyPlan, check_unfinished, identity, plan_copy
from prep.copy_roots import check_roots, destination_lock, patient, remove_lock
from prep.downloads import stop_waiting
from prep.errors import DatasetError, KprepError, StorageError, UsageError
from prep.foreign_publish import shared_files_of
from prep.format import (
    FileEntry,
    Manifest,
    ledger_path,
    read_manifest,
)
from prep.format.layout import COPY_MARKER_PATH, LOCK_NAME, MANIFEST_PATH, WORK_NAME
from prep.format.manifest import read_manifest_bytes
from prep.open_index import open_index
from prep.publish import file_entry
from prep.signals import handling
from prep.text.plain import few
from prep.transfer import DamagedError, StoppedCopyError, Transfer
from prep.write_errors import write_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from prep.storage import Storage

_PARTS = "copy-parts"
_NAMED = 3  # damaged files that an error lists


@dataclass
class CopyResult:
    """What a copy came to. Of a dry run, what it would have sent."""

    manifest: Manifest
    num_sent: int = 0
    bytes_sent: int = 0
    num_there: int = 0
    bytes_there: int = 0
    seconds: float = 0.0
    interrupted_by: int = 0
    sent: list[str] = field(default_factory=list)


@dataclass
class _Copy:
    """One copy under way; `source_manifest` is the source's as it stood when it began."""

    destination: Storage
    plan: CopyPlan
    source_manifest: bytes
    existing: Manifest | None
    check_lock: Callable[[], None]
    transfer: Transfer
    jobs: int
    result: CopyResult
    damaged: list[DamagedError] = field(default_factory=list)
    standing: dict[str, FileEntry] = field(default_factory=dict)
    """Those of `plan.kept` that were found intact."""

    def run(self) -> None:
        """Copy what is missing, phase by phase, and publish."""
        sizes = sizes_at(self.destination)
        with ThreadPoolExecutor(self.jobs, thread_name_prefix="kprep-copy") as pool:
            self._phase(pool, self.plan.shards, sizes)
            self._phase(pool, self.plan.companions, sizes)
            self._refuse_damaged()
            if self.plan.made_anew:
                self._publish_anew()
            else:
                self._phase(pool, self.plan.root_files, sizes)
                self._refuse_damaged()
                manifest = self._manifest()
                same = manifest == self.plan.manifest
                self._publish(manifest, self.source_manifest if same else manifest.to_bytes())

    def _phase(self, pool: ThreadPoolExecutor, paths: Sequence[str], sizes: dict[str, int]) -> None:
        """Bring files over, many at a time; the first error that is not a file's ends the rest."""
        self.check_lock()
        futures = [pool.submit(self._file, path, sizes.get(path)) for path in paths]
        try:
            for future in concurrent.futures.as_completed(futures):
                try:
                    path, sent = future.result()
                except DamagedError as error:  # the others go on, so that all are named at once
                    self.damaged.append(error)
                else:
                    self._book(path, sent=sent)
        except BaseException:
            self.transfer.stop.set()
            stop_waiting()
            for future in futures:
                future.cancel()
            raise

    def _file(self, path: str, size: int | None) -> tuple[str, bool]:
        entry = self.plan.manifest.files[path]
        if self.transfer.stop.is_set():
            raise StoppedCopyError("interrupted")
        kept = self.plan.kept.get(path)
        if kept is not None and size == kept.bytes and self.transfer.holds(path, kept):
            self.standing[path] = kept
            self.transfer.progress.skip(entry.bytes)
            return path, False
        if size == entry.bytes and self.transfer.holds(path, entry):
            self.transfer.progress.skip(entry.bytes)
            return path, False
        self.check_lock()
        self.transfer.copy(path, entry)
        return path, True

    def _book(self, path: str, *, sent: bool) -> None:
        count_file(self.result, path, self.plan.manifest.files[path], sent=sent)

    def _refuse_damaged(self) -> None:
        if not self.damaged:
            return
        more = len(self.damaged) - _NAMED
        named = "; ".join(str(error) for error in self.damaged[:_NAMED])
        raise DatasetError(named + (f"; and {more} more files" if more > 0 else ""))

    def _manifest(self) -> Manifest:
        """Return the planned manifest with what stays of the destination's own files."""
        splits, published = dict(self.plan.manifest.splits), self.existing
        for name in splits:
            if published is not None and ledger_path(name) in self.standing:
                splits[name] = published.splits[name]  # it counts that ledger's rows
        files = {**self.plan.manifest.files, **self.standing}
        return replace(self.plan.manifest, splits=splits, files=files)

    def _publish_anew(self) -> None:
        """Make the files that speak of all splits for the splits that the destination has."""
        planned = self._manifest()
        made = shared_files_of(self.destination, planned, {})
        files = {**planned.files, **{path: file_entry(made[path]) for path in made}}
        manifest = replace(planned, files=files)
        for path, data in made.items():
            if self.existing is None or self.existing.files.get(path) != files[path]:
                self.destination.write(path, data)
        self._publish(manifest, manifest.to_bytes())

    def _publish(self, manifest: Manifest, data: bytes) -> None:
        """Look once more at what stands there, then make it a dataset."""
        if self.transfer.stop.is_set():
            raise StoppedCopyError("interrupted")
        found = sizes_at(self.destination)
        for path, entry in manifest.files.items():
            if found.get(path) != entry.bytes:
                raise StorageError(
                    f"{self.destination.where(path)} has {found.get(path, 'no')} bytes after the "
                    f"copy, not {entry.bytes}; somebody else writes there, or it lost them: repeat"
                )
        self.check_lock()
        if self.existing is None or self.destination.read(MANIFEST_PATH) != data:
            self.destination.write(MANIFEST_PATH, data)
        self.result.manifest = manifest


def copy_dataset(
    source: Storage,
    destination: Storage,
    *,
    splits: Sequence[str] = (),
    jobs: int = 8,
    dry_run: bool = False,
) -> CopyResult:
    """Copy splits (none: all) of a dataset to another root; continue where an earlier run ended.

    Raises UsageError when the destination holds something else, DatasetError when files of the
    source are damaged, StorageError when either side cannot be reached.
    """
    check_roots(source, destination)
    manifest, data = read_manifest_bytes(source)
    plan_copy(manifest, splits, None, destination.root)
    if dry_run:
        return _estimate(source, destination, manifest, splits)
    root = destination.local_root
    if root is not None:
        with write_errors(root):
            root.mkdir(parents=True, exist_ok=True)
    with destination_lock(destination) as check_lock:
        try:
            plan, existing = _plan(destination, manifest, splits)
            _check_keys(source, destination, plan)
        except KprepError:
            remove_lock(destination)
            raise
        if existing != plan.manifest:
            marker = json.dumps(identity(manifest, plan.splits)).encode()
            destination.write(COPY_MARKER_PATH, marker)
        copied = _copy(source, destination, plan, data, existing, check_lock, jobs)
        if not copied.interrupted_by:
            _clean(destination)
    return copied


def _copy(
    source: Storage,
    destination: Storage,
    plan: CopyPlan,
    data: bytes,
    existing: Manifest | None,
    check_lock: Callable[[], None],
    jobs: int,
) -> CopyResult:
    """Run a planned copy, with its progress and its signals."""
    result = CopyResult(plan.manifest)
    progress = ByteProgress("copied", sum(plan.manifest.files[path].bytes for path in plan.paths))
    stop = threading.Event()
    parts = _parts_folder(destination)
    with ThreadPoolExecutor(2 * jobs, thread_name_prefix="kprep-read") as readers:
        transfer = Transfer(source, patient(destination), progress, stop, parts, readers)
        run = _Copy(destination, plan, data, existing, check_lock, transfer, jobs, result)
        with handling(_stopper(stop, result)):
            try:
                run.run()
            except StoppedCopyError:
                pass  # the command says so
            except StorageError:
                if not result.interrupted_by:
                    raise
            finally:
                progress.close()
    result.seconds = progress.seconds
    return result


def _plan(
    destination: Storage, manifest: Manifest, splits: Sequence[str]
) -> tuple[CopyPlan, Manifest | None]:
    """Plan the copy on what the destination holds; UsageError when that is something else."""
    root = destination.root
    existing = read_manifest(destination) if destination.exists(MANIFEST_PATH) else None
    plan = plan_copy(manifest, splits, existing, root)
    begun = _marker(destination)
    if begun is not None:
        check_unfinished(begun, plan, existing, root)
    elif existing is None:
        strange = sorted(path for path in sizes_at(destination) if not _is_ours(path))
        if strange:
            raise UsageError(
                f"{root} is not empty and no kprep dataset (it holds {few(strange)}); "
                "give a new root"
            )
    return plan, existing


def _estimate(
    source: Storage, destination: Storage, manifest: Manifest, splits: Sequence[str]
) -> CopyResult:
    """Say what a copy would send, by the sizes of what is there; write nothing."""
    root = destination.local_root
    absent = root is not None and not root.is_dir()
    if absent:
        plan, sizes = plan_copy(manifest, splits, None, destination.root), {}
    else:
        plan, _ = _plan(destination, manifest, splits)
        _check_keys(source, destination, plan)
        sizes = sizes_at(destination)
    result = CopyResult(plan.manifest)
    for path in plan.paths:
        entry = plan.manifest.files[path]
        there = {entry.bytes, plan.kept.get(path, entry).bytes}
        count_file(result, path, entry, sent=sizes.get(path) not in there)
    return result


def count_file(result: CopyResult, path: str, entry: FileEntry, *, sent: bool) -> None:
    """Book one file as sent or as there already."""
    if sent:
        result.num_sent += 1
        result.bytes_sent += entry.bytes
        result.sent.append(path)
    else:
        result.num_there += 1
        result.bytes_there += entry.bytes


def sizes_at(storage: Storage) -> dict[str, int]:
    """Return the size of every file below a root."""
    return {info.path: info.size_bytes for info in storage.list()}


def _check_keys(source: Storage, destination: Storage, plan: CopyPlan) -> None:
    """Raise UsageError when a split that is added has keys of a split that is there."""
    others = [name for name in plan.manifest.splits if name not in plan.splits]
    if not others or not plan.added:
        return
    keys = {key: name for name in others for key in _keys(destination, plan.manifest, name)}
    for name in plan.added:
        for key in _keys(source, plan.manifest, name):
            if key in keys:
                raise UsageError(
                    f"clip {key} of split {name} stands in split {keys[key]} of {destination.root} "
                    "already, and a key is unique in a dataset; choose another root"
                )


def _keys(storage: Storage, manifest: Manifest, name: str) -> list[str]:
    keys: list[str] = open_index(storage, manifest, name)["key"].to_pylist()
    return keys


def _marker(destination: Storage) -> dict[str, Any] | None:
    """Return what an unfinished copy at the destination is of; None where there is none."""
    if not destination.exists(COPY_MARKER_PATH):
        return None
    try:
        found = json.loads(destination.read(COPY_MARKER_PATH))
        return {"splits": {str(name): str(text) for name, text in found["splits"].items()}}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{destination.where(COPY_MARKER_PATH)} is not kprep's; remove it, then run again"
        ) from error


def _is_ours(path: str) -> bool:
    return path in (LOCK_NAME, f"{WORK_NAME}/lock") or path.startswith(f"{WORK_NAME}/{_PARTS}/")


def _parts_folder(destination: Storage) -> Path | None:
    if destination.local_root is None:
        return None
    folder = destination.local_root / WORK_NAME / _PARTS
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _clean(destination: Storage) -> None:
    """Remove what only an unfinished copy needs."""
    if destination.exists(COPY_MARKER_PATH):
        destination.delete(COPY_MARKER_PATH)
    if destination.local_root is not None:
        shutil.rmtree(destination.local_root / WORK_NAME / _PARTS, ignore_errors=True)
        remove_lock(destination)


def _stopper(stop: threading.Event, result: CopyResult) -> Callable[[int], None]:
    """Return what ends a copy after the parts in flight; a second signal ends it at once."""

    def handler(number: int) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        result.interrupted_by = number
        stop.set()
        stop_waiting()

    return handler
