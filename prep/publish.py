"""Publishing a split: its index, ledger and companions, and the manifest last."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from prep import companions
from prep.clip_rows import clip_record
from prep.dataset_card import card_of_root
from prep.format import (
    FileEntry,
    Manifest,
    Shard,
    Split,
    index_path,
    index_table,
    ledger_path,
    shard_path,
    split_fingerprint,
    write_index,
)
from prep.format.layout import CARD_PATH, CLASSES_PATH, MANIFEST_PATH, classes_file
from prep.ledger import write_ledger
from prep.parquet import forgo_pandas

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prep.format import ClipRecord
    from prep.journal import Journal, Row
    from prep.storage import Storage


def publish(
    storage: Storage,
    manifest: Manifest,
    journal: Journal,
    tools: dict[str, str],
    check_lock: Callable[[], None],
) -> Manifest:
    """Write everything that makes the journaled split readable; return the new manifest.

    The shards, indices and ledgers of other splits are not touched, so their readers notice
    nothing. README.md, classes.txt and .nv-meta speak of all splits and are replaced just before
    the manifest that lists them: `kprep verify` at that moment finds them ahead of it. `check_lock`
    raises when the root is no longer ours.
    """
    import pyarrow as pa

    forgo_pandas()
    split = journal.split
    shards = {number: facts for number, facts in journal.shards().items() if facts["num_clips"]}
    labels = {name: index for index, name in enumerate(manifest.class_names)}
    tables = [index_table(_records(journal, number, labels, manifest)) for number in shards]
    files = dict(manifest.files)
    for number, facts in shards.items():
        files[shard_path(split, number)] = FileEntry(facts["bytes"], facts["sha256"])
        index = FileEntry(facts["index_bytes"], facts["index_sha256"])
        files[shard_path(split, number) + ".idx"] = index
    described = [{"path": shard_path(split, n), **facts} for n, facts in shards.items()]
    written = {
        index_path(split): write_index(tables),
        ledger_path(split): write_ledger(journal.all_rows()),
        companions.wids_path(split): companions.wids_index(split, described),
    }
    counts = journal.counts()
    added = Split(
        fingerprint=split_fingerprint(pa.concat_tables(tables)),
        num_clips=counts["ok"],
        num_rows=sum(counts.values()),
        outcomes=counts,
        shards=tuple(Shard(item["path"], item["num_clips"]) for item in described),
        settings=journal.setting("settings"),
        tools=tools,
    )
    files.update({path: file_entry(data) for path, data in written.items()})
    published = replace(manifest, splits={**manifest.splits, split: added}, files=files)
    return write_root_files(storage, published, written, check_lock)


def write_root_files(
    storage: Storage,
    manifest: Manifest,
    written: dict[str, bytes],
    check_lock: Callable[[], None],
) -> Manifest:
    """Write a split's own files, then those that speak of all splits, then the manifest."""
    shared = root_files(storage, manifest, written)
    files = {**manifest.files, **{path: file_entry(data) for path, data in shared.items()}}
    complete = replace(manifest, files=files)
    for path, data in {**written, **shared}.items():
        storage.write(path, data)
    check_lock()
    storage.write(MANIFEST_PATH, complete.to_bytes())
    return complete


def root_files(storage: Storage, manifest: Manifest, written: dict[str, bytes]) -> dict[str, bytes]:
    """Return the files that speak of all splits."""
    return {
        CLASSES_PATH: classes_file(manifest.class_names),
        **companions.energon_files(manifest.splits),
        CARD_PATH: card_of_root(storage, manifest, written),
    }


def file_entry(data: bytes) -> FileEntry:
    """Return what the manifest says of a file."""
    return FileEntry(len(data), hashlib.sha256(data).hexdigest())


def _records(
    journal: Journal, shard: int, labels: dict[str, int], manifest: Manifest
) -> Iterator[ClipRecord]:
    fps = manifest.profile.fps.as_integer_ratio()
    for row in journal.shard_rows(shard):
        segment = _segment(row)
        yield clip_record(
            shard_path(journal.split, shard),
            str(row.key),
            {**row.facts, "fps": fps},
            label=labels[segment.label] if segment.label is not None else -1,
            video_id=segment.video_id,
            start_seconds=segment.start_seconds,
            end_seconds=row.annotated_end(),
            source=row.facts["source"],
            short=row.facts["short"],
        )


def _segment(row: Row) -> Any:
    if row.segment is None:
        raise ValueError(f"row {row.row} has a clip but no segment")
    return row.segment
