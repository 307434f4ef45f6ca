"""Publishing a new root whose shards stand: indices, ledgers and companions, the manifest last."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from prep import companions
from prep.errors import DatasetError
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
from prep.ledger import write_ledger_table
from prep.merge_ledger import counts
from prep.publish import file_entry, write_root_files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prep.format import ClipRecord
    from prep.new_root import Plan
    from prep.storage import Storage

Built = dict[tuple[str, int], dict[str, Any]]


def publish_merged(
    storage: Storage, plan: Plan, built: Built, check_lock: Callable[[], None]
) -> Manifest:
    """Write everything that makes the new root readable; return its manifest."""
    files: dict[str, FileEntry] = {}
    written: dict[str, bytes] = {}
    splits = {}
    for name in plan.shards:
        splits[name], described = _split(plan, built, name, written)
        for item in described:
            files[item["path"]] = FileEntry(item["bytes"], item["sha256"])
            files[f"{item['path']}.idx"] = FileEntry(item["index_bytes"], item["index_sha256"])
    files |= {path: file_entry(data) for path, data in written.items()}
    manifest = Manifest(plan.profile, plan.class_names, splits, files)
    return write_root_files(storage, manifest, written, check_lock)


def _split(
    plan: Plan, built: Built, name: str, written: dict[str, bytes]
) -> tuple[Split, list[dict[str, Any]]]:
    """Make one split's own files; return it, and what is known of its shards."""
    numbers = range(len(plan.shards[name]))
    described = [{"path": shard_path(name, number), **built[name, number]} for number in numbers]
    tables = [index_table(_records(plan, built, name, number)) for number in numbers]
    fingerprint = split_fingerprint(pa.concat_tables(tables))
    if fingerprint != plan.fingerprints[name]:
        raise DatasetError(f"split {name} did not come out as planned; this is a fault in kprep")
    ledger = plan.ledgers[name]
    written |= {
        index_path(name): write_index(tables),
        ledger_path(name): write_ledger_table(ledger),
        companions.wids_path(name): companions.wids_index(name, described),
    }
    split = Split(
        fingerprint=fingerprint,
        num_clips=sum(len(clips) for clips in plan.shards[name]),
        num_rows=ledger.num_rows,
        outcomes=counts(ledger),
        shards=tuple(Shard(item["path"], item["num_clips"]) for item in described),
        settings=plan.settings[name],
        tools=plan.tools[name],
    )
    return split, described


def _records(plan: Plan, built: Built, name: str, number: int) -> Iterator[ClipRecord]:
    """Yield a shard's rows of the index: the sources' rows, at their new places."""
    clips = plan.shards[name][number]
    labels = {label: index for index, label in enumerate(plan.class_names)}
    places = {key: place for key, *place in built[name, number]["places"]}
    for clip, record in zip(clips, plan.records(clips), strict=True):
        entry_offset, entry_bytes, video_offset = places[clip.key]
        yield replace(
            record,
            key=clip.key,
            shard=shard_path(name, number),
            label=labels[clip.label] if clip.label is not None else -1,
            entry_offset=entry_offset,
            entry_bytes=entry_bytes,
            video_offset=video_offset,
        )
