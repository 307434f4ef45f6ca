"""`kprep index`: manifest, index, ledger and companions for tars that somebody else wrote.

The tars are read once and never written. Whatever is wrong with a tar refuses the dataset, because
its readers would not agree on what it holds; whatever is wrong with a clip refuses the clip, and
the ledger says why.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prep import __version__, companions
from prep.assemble import energon_offsets
from prep.describe_shards import describe_shards
from prep.errors import KprepError, UsageError
from prep.exclusive import exclusive
from prep.foreign_labels import check_rule, class_list
from prep.foreign_publish import (
    clip_label,
    foreign_records,
    ledger_rows,
    shared_files_of,
)
from prep.foreign_splits import assign_splits, find_tars
from prep.format import (
    FileEntry,
    Manifest,
    Shard,
    Split,
    index_path,
    index_table,
    ledger_path,
    split_fingerprint,
    write_index,
)
from prep.format.layout import CARD_PATH, MANIFEST_PATH, is_reserved
from prep.index_marker import Begun, remove_marker, write_marker
from prep.index_overwriting import is_our_card, left_behind, refuse_overwriting
from prep.index_work import IndexWork
from prep.ledger import write_ledger
from prep.outcome import RowFailure
from prep.profile import FOREIGN_PROFILE, EncodingProfile
from prep.publish import file_entry
from prep.shard_bytes import ShardBytes
from prep.temporary import temporary_folder
from prep.text.plain import short

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prep.journal import Row
    from prep.shard_jobs import ShardProgress
    from prep.storage import ObjectInfo, Storage

_FILES_AT_ONCE = 8
_AUTO_RULES = ("cls", "json", "txt")


@dataclass(frozen=True)
class IndexOptions:
    """What a user asks of `kprep index`; see its `--help`."""

    splits: tuple[str, ...] = ()
    labels: str = "auto"
    class_names: tuple[str, ...] | None = None
    keys: str = "auto"
    as_stored: bool = False
    strict: bool = False
    force: bool = False
    workers: int = 0


@dataclass
class IndexResult:
    """What was indexed, and what a user should know of it."""

    manifest: Manifest
    failures: dict[str, int]
    examples: dict[str, str]
    """For each reason the first sample that has it: where it is and what exactly."""
    labels: str
    keys: str
    notes: list[str] = field(default_factory=list)


def find_shards(
    storage: Storage, options: IndexOptions
) -> tuple[dict[str, list[str]], dict[str, ObjectInfo]]:
    """Return the tars of each split, and every file below the root by path.

    Raises UsageError where there is nothing to index, or something that would be overwritten.
    """
    check_rule(options.labels)
    root = storage.local_root
    if root is not None and not root.is_dir():
        raise UsageError(f"{root} is not a directory; give the folder that holds the tars")
    if storage.is_read_only:
        raise UsageError(f"root {storage.root} can only be read; index the copy it is served from")
    files = {info.path: info for info in storage.list() if not is_reserved(info.path)}
    tars = find_tars(files)
    if not tars:
        packed = next((path for path in files if path.endswith((".tar.gz", ".tgz"))), None)
        hint = f" ({packed} is compressed; store it uncompressed)" if packed else ""
        raise UsageError(f"{storage.root} holds no .tar files{hint}")
    splits = assign_splits(tars, options.splits)
    refuse_overwriting(storage, splits, files, force=options.force)
    return splits, files


def index_tars(
    storage: Storage,
    options: IndexOptions,
    splits: dict[str, list[str]],
    files: dict[str, ObjectInfo],
    progress: ShardProgress,
) -> IndexResult:
    """Index the tars of a root: describe every sample, decide on labels and keys, and publish.

    Raises KprepError, with nothing written, when a tar is refused, when no clip is left in a split,
    or with `strict` when any clip is refused.
    """
    with exclusive(storage) as check_lock:
        if find_shards(storage, options) != (splits, files):
            raise KprepError(
                f"{storage.root} changed before it could be locked, so nothing was written; run "
                "the same command again"
            )
        card = CARD_PATH not in files or is_our_card(storage)
        kept = IndexWork(storage.root, _context(options))
        described = _describe(storage, options, splits, files, kept, progress)
        rule, class_names = _labels(described, options)
        foreign: dict[str, Any] = {
            "keys": _keys(described, options, rule, class_names), "labels": rule,
            "as_stored": options.as_stored, "card": card,
        }  # fmt: skip
        work = _Indexing(splits, described, foreign, class_names)
        work.index()
        work.refuse(strict=options.strict)
        manifest = work.publish(storage, files, check_lock)
        kept.remove()
    result = IndexResult(manifest, dict(work.failures), work.examples, rule, foreign["keys"])
    if work.num_unlabelled and rule != "none":
        result.notes.append(f"{work.num_unlabelled} clips have no label")
    left_out = sorted(set(find_tars(files)) - {path for tars in splits.values() for path in tars})
    if left_out:
        result.notes.append(f"{len(left_out)} tars are of no split, such as {left_out[0]}")
    if work.removed:
        count = len(work.removed)
        result.notes.append(
            f"{count} file{'s' if count > 1 else ''} that kprep had made for splits or tars that "
            f"are gone {'were' if count > 1 else 'was'} removed, such as {work.removed[0]}"
        )
    return result


class _Described:
    """What was found in each shard; samples are kept packed, as there can be a million."""

    def __init__(self) -> None:
        self.reports: dict[str, dict[str, Any]] = {}

    def add(self, path: str, report: dict[str, Any]) -> None:
        packed = zlib.compress(json.dumps(report["samples"]).encode(), 1)
        self.reports[path] = {**report, "samples": packed}

    def report(self, path: str) -> dict[str, Any]:
        report = self.reports[path]
        return {**report, "samples": json.loads(zlib.decompress(report["samples"]))}

    def samples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for path in sorted(self.reports):
            for sample in self.report(path)["samples"]:
                yield path, sample


def _context(options: IndexOptions) -> dict[str, Any]:
    """Return what the workers share: what is looked for in every shard."""
    rules = _AUTO_RULES if options.labels == "auto" else (options.labels,)
    return {"foreign": {}, "as_stored": options.as_stored, "rules": [*rules, "none"]}


def _describe(
    storage: Storage,
    options: IndexOptions,
    splits: dict[str, list[str]],
    files: dict[str, ObjectInfo],
    kept: IndexWork,
    progress: ShardProgress,
) -> _Described:
    """Describe the tars, but those that an interrupted run has described."""
    paths = {path: files[path].size_bytes for tars in splits.values() for path in tars}
    described, refused = _Described(), []
    for path in list(paths):
        if (found := kept.report(files[path])) is not None:
            described.add(path, found)
            progress.skip(paths.pop(path))
    with temporary_folder("kprep-index-") as folder:
        for path, report in describe_shards(
            storage,
            paths,
            _context(options),
            folder=Path(folder),
            workers=options.workers,
            progress=progress,
        ):
            if "refused" in report:
                refused.append(report["refused"])
            else:
                kept.keep(files[path], report)
                described.add(path, report)
    if refused:
        more = f" (and {len(refused) - 1} more tars)" if len(refused) > 1 else ""
        raise KprepError(f"{min(refused)}{more}; nothing was written")
    return described


def _labels(described: _Described, options: IndexOptions) -> tuple[str, tuple[str, ...]]:
    """Return the label rule and the class list."""
    usable = [sample["labels"] for _, sample in described.samples() if "failed" not in sample]
    rule = options.labels
    if rule == "auto":
        rule = _auto_rule(usable, options)
    if options.class_names is not None:
        return rule, options.class_names
    stated = [labels[rule] for labels in usable if not isinstance(labels[rule], str)]
    return rule, class_list((index, name) for index, name in stated)


def _auto_rule(usable: list[dict[str, Any]], options: IndexOptions) -> str:
    """Return the first rule that labels every clip.

    A `.txt` is a caption more often than a label: it counts only where texts repeat, two clips a
    text on average, or where all are in the class list that was given.
    """
    for rule in _AUTO_RULES:
        stated = [labels[rule] for labels in usable]
        if not stated or any(isinstance(label, str) or label == [None, None] for label in stated):
            continue
        names = {name for _, name in stated}
        if rule != "txt":
            return rule
        if options.class_names is not None:
            if names <= set(options.class_names):
                return rule
        elif 2 * len(names) <= len(stated):
            return rule
    return "none"


def _keys(
    described: _Described, options: IndexOptions, rule: str, class_names: tuple[str, ...]
) -> str:
    """Return whether keys are the members' own or need the shard's path before them."""
    if options.keys == "shard":
        return "shard"
    indices = {name: number for number, name in enumerate(class_names)}
    holders: dict[str, str] = {}
    for path, sample in described.samples():
        try:
            clip_label(sample, rule, indices)
        except RowFailure:
            continue
        other = holders.setdefault(sample["key"], path)
        if other != path:
            if options.keys == "auto":
                return "shard"
            raise UsageError(
                f"key {sample['key']} stands in {other} and in {path}, and keys must be unique in "
                "a dataset; use --keys shard, which puts the shard's path before them"
            )
    return "member"


class _Indexing:
    """The splits, rows and small files of one dataset in the making."""

    def __init__(
        self,
        splits: dict[str, list[str]],
        described: _Described,
        foreign: dict[str, Any],
        class_names: tuple[str, ...],
    ) -> None:
        self.described, self.foreign, self.class_names = described, foreign, class_names
        self.paths = splits
        self.splits: dict[str, Split] = {}
        self.files: dict[str, FileEntry] = {}
        self.written: dict[str, bytes] = {}
        self.failures: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.num_unlabelled = 0
        self.removed: tuple[str, ...] = ()

    def index(self) -> None:
        """Make every split."""
        for name in sorted(self.paths):
            self._split(name)

    def _split(self, name: str) -> None:
        import pyarrow as pa

        tables, shards, described = [], [], []
        for path in self.paths[name]:
            report = self.described.report(path)
            records = foreign_records(path, report, self.foreign, self.class_names)
            self.num_unlabelled += sum(record.label == -1 for record in records)
            tables.append(index_table(records))
            num_samples = len(report["samples"])
            shards.append(Shard(path, len(records), num_samples))
            described.append({**report, "path": path, "num_clips": num_samples})
            self.files[path] = FileEntry(report["bytes"], report["sha256"])
            self.written[f"{path}.idx"] = energon_offsets(report["offsets"])
        counts = dict.fromkeys(("ok", "failed", "duplicate", "pending"), 0)
        self.written[ledger_path(name)] = write_ledger(self._ledger(name, counts))
        self.written[index_path(name)] = write_index(tables)
        self.written[companions.wids_path(name)] = companions.wids_index(name, described)
        self.splits[name] = Split(
            fingerprint=split_fingerprint(pa.concat_tables(tables)),
            num_clips=counts["ok"],
            num_rows=sum(counts.values()),
            outcomes=counts,
            shards=tuple(shards),
            settings={"foreign": self.foreign},
            tools=_tools(),
        )

    def _ledger(self, name: str, counts: dict[str, int]) -> Iterator[Row]:
        first = 0
        for path in self.paths[name]:
            report = self.described.report(path)
            for row in ledger_rows(name, path, first, report, self.foreign, self.class_names):
                counts[str(row.outcome.status)] += 1
                if row.outcome.reason is not None:
                    reason = str(row.outcome.reason)
                    self.failures[reason] += 1
                    where = f"{path}: {short(str(row.key))}"
                    detail = f": {row.outcome.detail}" if row.outcome.detail else ""
                    self.examples.setdefault(reason, f"{where}{detail}")
                yield row
            first += len(report["samples"])

    def refuse(self, *, strict: bool) -> None:
        """Raise KprepError where nothing, or with `strict` not everything, can be streamed."""
        why = "; ".join(
            f"{count} {reason}, such as {self.examples[reason]}"
            for reason, count in self.failures.items()
        )
        for name, split in self.splits.items():
            if not split.num_clips:
                raise KprepError(
                    f"split {name} has no clip that can be streamed exactly ({why}); "
                    "nothing was written"
                )
        if strict and self.failures:
            raise KprepError(f"{why}; nothing was written")

    def publish(
        self,
        storage: Storage,
        found: dict[str, ObjectInfo],
        check_lock: Callable[[], None],
    ) -> Manifest:
        """Write every file, the manifest last; then remove what it has left behind."""
        profile = EncodingProfile(FOREIGN_PROFILE)
        self.files |= {path: file_entry(data) for path, data in self.written.items()}
        manifest = Manifest(profile, self.class_names, self.splits, self.files)
        shared = shared_files_of(storage, manifest, self.written)
        gone = left_behind(storage, self.paths, found)
        ours = {*self.files, *shared, *gone, MANIFEST_PATH}
        others = [path for path in found if path not in ours]
        with ThreadPoolExecutor(_FILES_AT_ONCE) as threads:
            entries = threads.map(lambda path: _entry(storage, path), others)
            listed = dict(zip(others, entries, strict=True))
        listed |= {path: file_entry(data) for path, data in shared.items()}
        manifest = replace(manifest, files={**self.files, **listed})
        Manifest.from_bytes(manifest.to_bytes(), MANIFEST_PATH)  # what we write must be readable
        written = {**self.written, **shared}
        write_marker(storage, Begun(tuple(written), card=CARD_PATH in shared, gone=gone))
        for path, data in written.items():
            storage.write(path, data)
        check_lock()
        storage.write(MANIFEST_PATH, manifest.to_bytes())
        for path in gone:
            storage.delete(path)
        self.removed = gone
        remove_marker(storage)
        return manifest


def _entry(storage: Storage, path: str) -> FileEntry:
    """Return what the manifest says of a file that is not ours."""
    body = ShardBytes(storage, storage.info(path))
    body.drain()
    return FileEntry(body.size_bytes, body.sha256.hexdigest())


def _tools() -> dict[str, str]:
    import av

    return {"kprep": __version__, "pyav": av.__version__}
