"""`kprep merge` and `kprep subset`: a new root from clips of others, without encoding again.

Plan, copy, publish. The plan is made anew by every run and is always the same; what is kept between
runs is which shards stand, so that the same command continues after any interruption.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prep.atomic_files import remove_leftovers
from prep.byte_progress import ByteProgress
from prep.conversion import check_fatal
from prep.copy_roots import check_roots, destination_lock, patient, remove_lock
from prep.errors import DatasetError, KprepError, UsageError
from prep.format import Manifest, read_manifest, shard_path
from prep.format.layout import MANIFEST_PATH, WORK_NAME, is_reserved
from prep.job_bytes import JobBytes
from prep.merge_plan import ClassList, OnConflict, Selection
from prep.merge_publish import publish_merged
from prep.merge_work import MergeWork
from prep.new_root import Plan, plan_root
from prep.standing_shards import altered_shards, note_on
from prep.text.plain import few
from prep.worker_pool import Job, WorkerPool, usable_cores
from prep.write_errors import write_errors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from prep.merge_plan import Clip
    from prep.storage import Storage

_WALL_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class MergeOptions:
    """What a user asks of a new root.

    `clips_per_shard` None: as the roots have it, where they agree, else by the picture size.
    `workers` 0: one for each core. `work` None: a folder in the root, which then must be local.
    """

    roots: tuple[Storage, ...]
    destination: Storage
    made_by: str
    selection: Selection = field(default_factory=Selection)
    class_list: ClassList = "all"
    on_conflict: OnConflict = "error"
    clips_per_shard: int | None = None
    seed: int = 0
    workers: int = 0
    work: Path | None = None

    @property
    def work_folder(self) -> Path:
        """Where it is kept which shards stand; UsageError when a bucket has no place."""
        if self.work is not None:
            if self.work.exists() and not self.work.is_dir():
                raise UsageError(f"--work {self.work} is a file; give a folder")
            return self.work / "merge-work"  # no split has a '-' in its name
        root = self.destination.local_root
        if root is None:
            raise UsageError(
                f"root {self.destination.root} is not on this machine; say with --work DIR where "
                "shards are built before they are uploaded"
            )
        return root / WORK_NAME / "merge-work"


@dataclass
class MergeResult:
    """What became of it: `manifest` is None after a dry run; `was_there` when nothing was left."""

    plan: Plan
    manifest: Manifest | None = None
    was_there: bool = False


def merge(options: MergeOptions, *, dry_run: bool = False) -> MergeResult:
    """Make the new root; continue where an earlier run of the same command ended.

    Raises UsageError when roots do not fit together or the destination holds something else,
    DatasetError for damaged clips, StorageError where a root cannot be reached.
    """
    for root in options.roots:
        check_roots(root, options.destination)
    folder = options.work_folder
    plan = plan_root(options)
    if dry_run:
        return MergeResult(plan)
    local = options.destination.local_root
    if local is not None:
        with write_errors(local):
            local.mkdir(parents=True, exist_ok=True)
    with destination_lock(options.destination) as check_lock:
        try:
            existing = _existing(options, plan, folder)
        except KprepError:
            remove_lock(options.destination)
            raise
        manifest = existing or _make(options, plan, folder, check_lock)
        shutil.rmtree(folder, ignore_errors=True)
        remove_lock(options.destination)
    return MergeResult(plan, manifest, was_there=existing is not None)


def _existing(options: MergeOptions, plan: Plan, folder: Path) -> Manifest | None:
    """Return the finished root; None when it is to be made. UsageError for anything else there."""
    destination = options.destination
    if destination.exists(MANIFEST_PATH):
        manifest = read_manifest(destination)
        same = {name: split.fingerprint for name, split in manifest.splits.items()}
        if same == plan.fingerprints and manifest.class_names == plan.class_names and all(
            split.settings == plan.settings[name] for name, split in manifest.splits.items()
        ):  # fmt: skip
            return manifest
        raise UsageError(
            f"{destination.root} holds a dataset already, of other clips or made otherwise; give a "
            "new root"
        )
    work = MergeWork(folder)
    if work.check(destination.root, plan.identity):
        return None
    strange = sorted(info.path for info in destination.list() if not is_reserved(info.path))
    if strange:
        raise UsageError(
            f"{destination.root} is not empty (it holds {few(strange)}); give a new root"
        )
    return None


def _make(
    options: MergeOptions, plan: Plan, folder: Path, check_lock: Callable[[], None]
) -> Manifest:
    work = MergeWork(folder)
    work.begin(options.destination.root, plan.identity)
    if options.destination.local_root is not None:
        remove_leftovers(options.destination.local_root)
    remove_leftovers(folder)
    built = _build(options, plan, work)
    check_lock()
    return publish_merged(options.destination, plan, built, check_lock)


def _build(
    options: MergeOptions, plan: Plan, work: MergeWork
) -> dict[tuple[str, int], dict[str, Any]]:
    """Have every shard written that does not stand yet; return what is known of each."""
    tasks = [
        (name, number) for name in sorted(plan.shards) for number in range(len(plan.shards[name]))
    ]
    built = {task: facts for task in tasks if (facts := work.shard(*task))}
    faults = altered_shards(options.destination, built, options.workers)
    built = {task: facts for task, facts in built.items() if task not in faults}
    plan.chosen.notes += note_on(faults)
    progress = ByteProgress("copied", sum(plan.shard_bytes(*task) for task in tasks))
    for task in built:
        progress.skip(plan.shard_bytes(*task))
    count = options.workers or usable_cores()
    job_bytes = JobBytes(progress)
    try:
        with WorkerPool("remix", count, _WALL_SECONDS, ahead=1) as pool:
            for task in tasks:
                if task not in built:
                    job_bytes.begin(work.mark(*task), plan.shard_bytes(*task))
                    pool.submit(Job(task, _job(options, plan, work, *task)))
                while not pool.wants_jobs:
                    _book(pool, work, built, job_bytes)
            while pool.unfinished:
                _book(pool, work, built, job_bytes)
    finally:
        progress.close()
    return built


def _book(
    pool: WorkerPool,
    work: MergeWork,
    built: dict[tuple[str, int], dict[str, Any]],
    job_bytes: JobBytes,
) -> None:
    """Store what has been answered by now."""
    for job, result in pool.results(0.2):
        check_fatal(result)
        split, number = job.tag
        if "damaged" in result:
            raise DatasetError(result["damaged"])
        if "sha256" not in result:
            why = result.get("crashed") or result.get("stalled")
            raise KprepError(
                f"the process that wrote {shard_path(split, number)} ended ({why}); run the same "
                "command again"
            )
        work.record(split, number, result)
        built[split, number] = result
        job_bytes.end(work.mark(split, number))
    job_bytes.book()


def _job(
    options: MergeOptions, plan: Plan, work: MergeWork, split: str, number: int
) -> dict[str, Any]:
    """Return the JSON of one shard; see prep.remix.remix."""
    destination = patient(options.destination)
    return {
        "root": destination.root,
        "options": destination.options,
        "path": shard_path(split, number),
        "work": str(work.folder),
        "mark": str(work.mark(split, number)),
        "split": split,
        "as_they_are": plan.is_foreign,
        "sources": [
            {"root": source.storage.root, "options": source.storage.options}
            for source in plan.sources
        ],
        "clips": _clip_jobs(plan, plan.shards[split][number]),
    }


def _clip_jobs(plan: Plan, clips: list[Clip]) -> list[dict[str, Any]]:
    labels = {name: index for index, name in enumerate(plan.class_names)}
    names = ("entry_offset", "entry_bytes", "video_offset", "video_bytes", "crc32")
    jobs: list[dict[str, Any]] = []
    for clip, record in zip(clips, plan.records(clips), strict=True):
        jobs.append(
            {
                "source": clip.root,
                "shard": record.shard,
                "key": clip.key,
                "label": clip.label or "",
                "label_index": labels[clip.label] if clip.label is not None else -1,
                "content_hash": record.content_hash.hex(),
                **{name: getattr(record, name) for name in names},
            }
        )
    return jobs
