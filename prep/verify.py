"""`kprep verify`: every file against the manifest, the index and the others."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prep import companions
from prep.assemble import energon_offsets
from prep.faults import Fault, Kind, fault_from_json
from prep.format import foreign_settings, index_path, ledger_path, read_manifest
from prep.format.layout import CLASSES_PATH, MANIFEST_PATH
from prep.shard_jobs import run_here, run_shard_jobs
from prep.temporary import temporary_folder
from prep.verify_files import (
    check_other,
    extra_files,
    ledger_faults,
    parse_index,
    read_listed,
    shard_paths,
    shared_files,
    unfinished_copy,
    unlisted_files,
    wanted_files,
)
from prep.verify_manifest import (
    blame_manifest,
    counted_manifest,
    listed_class_names,
)
from prep.verify_shard import verify_shard

if TYPE_CHECKING:
    import pyarrow as pa

    from prep.format import Manifest
    from prep.shard_jobs import ShardProgress
    from prep.storage import Storage


_SMALL_FILES_AT_ONCE = 8
_FEW_BYTES = 16 << 20  # hashed in less time than a process starts


@dataclass
class Verdict:
    """What verification found; `faults` is empty when all is well."""

    num_files: int = 0
    num_clips: int = 0
    num_bytes: int = 0
    faults: list[Fault] = field(default_factory=list)


class _Silent:
    def add(self, count: int) -> None:
        pass

    def skip(self, count: int) -> None:
        pass


@dataclass
class Findings:
    """What one reading of a dataset gave: its small files, indices, and a report of each shard."""

    manifest: Manifest
    contents: dict[str, bytes] = field(default_factory=dict)
    """The files that are what the manifest lists, but the shards."""
    tables: dict[str, pa.Table] = field(default_factory=dict)
    """Indices that can be parsed, by split."""
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What `verify_shard` returned, by path."""
    faults: list[Fault] = field(default_factory=list)
    is_listed: bool = True
    """Whether files that should not be there could be looked for."""


def verify(
    storage: Storage,
    *,
    deep: bool = False,
    workers: int = 0,
    progress: ShardProgress | None = None,
) -> Verdict:
    """Check every file's size and sha256, every index row against its tar, and the companions.

    `deep` decodes every clip too. Raises DatasetError when there is no manifest to check against.
    """
    manifest = read_manifest(storage)
    findings = examine(storage, manifest, deep=deep, workers=workers, progress=progress)
    return verdict_of(findings)


def verdict_of(findings: Findings) -> Verdict:
    """Return the sums of an examination."""
    manifest = findings.manifest
    num_clips = sum(
        shard.num_clips
        for split in manifest.splits.values()
        for shard in split.shards
        if "sha256" in findings.shards.get(shard.path, {})
    )
    num_bytes = sum(entry.bytes for entry in manifest.files.values())
    return Verdict(len(manifest.files), num_clips, num_bytes, findings.faults)


def examine(
    storage: Storage,
    manifest: Manifest,
    *,
    deep: bool = False,
    workers: int = 0,
    progress: ShardProgress | None = None,
) -> Findings:
    """Read everything once and compare it."""
    findings = Findings(manifest)
    extra = extra_files(storage, manifest)
    findings.is_listed = extra is not None
    findings.faults += [*(extra or ()), *unlisted_files(manifest)]
    shards = shard_paths(manifest)
    wanted = set(wanted_files(manifest))

    def read(path: str) -> bytes | Fault:
        check = read_listed if path in wanted else check_other
        return check(storage, manifest, path)

    paths = sorted(set(manifest.files) - shards)
    with ThreadPoolExecutor(_SMALL_FILES_AT_ONCE) as threads:
        for path, data in zip(paths, threads.map(read, paths), strict=True):
            if isinstance(data, Fault):
                findings.faults.append(data)
            elif path in wanted:
                findings.contents[path] = data
    findings.faults += shared_files(manifest, findings.contents)
    for name in sorted(manifest.splits):
        _examine_split_files(findings, name)
    findings.faults += _shared_keys(findings)
    with temporary_folder("kprep-verify-") as folder:
        jobs = _jobs(storage, findings, Path(folder), deep=deep)
        num_bytes = sum(job["bytes"] for job in jobs)
        progress = progress or _Silent()
        if deep or num_bytes > _FEW_BYTES:
            done = run_shard_jobs("verify_shard", jobs, workers, Path(folder), progress)
        else:
            progress.skip(num_bytes)
            done = run_here(verify_shard, jobs, Path(folder))
        for job, report in done:
            findings.shards[job["path"]] = report
    for path in sorted(findings.shards):
        findings.faults += map(fault_from_json, findings.shards[path]["faults"])
    findings.faults += [*_sample_counts(findings), *_shard_companions(findings)]
    findings.faults = blame_manifest(findings)
    if findings.faults:
        findings.faults[:0] = unfinished_copy(storage)
    return findings


def _examine_split_files(findings: Findings, name: str) -> None:
    manifest, contents = findings.manifest, findings.contents
    if index_path(name) in contents:
        num_classes = max(len(manifest.class_names), len(listed_class_names(findings) or ()))
        table, faults = parse_index(manifest, name, contents[index_path(name)], num_classes)
        findings.faults += faults
        if table is not None:
            findings.tables[name] = table
    if ledger_path(name) in contents:
        keys = None
        if name in findings.tables:
            found = set(findings.tables[name]["key"].to_pylist())
            keys = found if len(found) == manifest.splits[name].num_clips else None
        findings.faults += ledger_faults(manifest, name, contents[ledger_path(name)], keys)


def _shared_keys(findings: Findings) -> list[Fault]:
    """Name keys that stand in two splits."""
    holders: dict[str, str] = {}
    faults = []
    for name, table in findings.tables.items():
        for key in table["key"].to_pylist():
            other = holders.setdefault(key, name)
            if other != name:
                text = f"key {key} stands in split {other} too"
                faults.append(Fault(Kind.DUPLICATE_KEY, index_path(name), text, key))
    return faults


def _jobs(
    storage: Storage, findings: Findings, folder: Path, *, deep: bool
) -> list[dict[str, Any]]:
    """Return a job for each shard; what the workers share goes to files in `folder`."""
    manifest, jobs = findings.manifest, []
    lists = {MANIFEST_PATH: list(manifest.class_names)}
    if (listed := listed_class_names(findings)) is not None:
        lists[CLASSES_PATH] = listed
    for name, split in sorted(manifest.splits.items()):
        context = folder / f"{name}.json"
        values = {
            "split": name,
            "class_lists": lists,
            "profile": manifest.profile.name,
            "gop_frames": manifest.profile.keyframe_interval_frames,
            "foreign": foreign_settings(name, split),
        }
        context.write_text(json.dumps(values), encoding="utf-8")
        rows = folder / f"{name}.arrow"
        places = _write_rows(rows, findings.tables[name]) if name in findings.tables else None
        for shard in split.shards:
            entry = manifest.files[shard.path]
            first, end = places.get(shard.path, (0, 0)) if places is not None else (0, 0)
            jobs.append({
                "root": storage.root, "options": storage.options, "path": shard.path,
                "bytes": entry.bytes, "sha256": entry.sha256, "context": str(context),
                "index": str(rows) if places is not None else None, "first": first, "end": end,
                "deep": deep,
            })  # fmt: skip
    return jobs


def _write_rows(path: Path, table: pa.Table) -> dict[str, tuple[int, int]]:
    """Write an index for the workers to map, by shard; return each shard's rows `[first, end)`."""
    import pyarrow as pa

    table = table.unify_dictionaries().combine_chunks()
    column = table["shard"].combine_chunks()
    codes = column.indices.to_numpy()
    names = column.dictionary.to_pylist()
    table = table.take(pa.array(np.argsort(codes, kind="stable")))
    counts = np.bincount(codes, minlength=len(names))
    ends = np.cumsum(counts)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return {
        name: (int(end - count), int(end))
        for name, count, end in zip(names, counts, ends, strict=True)
    }


def _sample_counts(findings: Findings) -> list[Fault]:
    """Compare the samples of each listed tar with the manifest, from which companions count."""
    faults = []
    for split in findings.manifest.splits.values():
        for shard in split.shards:
            report = findings.shards.get(shard.path, {})
            if "offsets" not in report or _altered(report, findings, shard.path):
                continue
            num_samples = len(report["offsets"]) - 1  # the last one is the end
            if num_samples != shard.num_samples:
                text = f"{shard.path} holds {num_samples} samples, it says {shard.num_samples}"
                faults.append(Fault(Kind.MANIFEST, MANIFEST_PATH, text))
    return faults


def _shard_companions(findings: Findings) -> list[Fault]:
    """Compare `.tar.idx` and wids with what stands in the shards."""
    faults, contents = [], findings.contents
    counted = counted_manifest(findings)
    for path, report in sorted(findings.shards.items()):
        listed = contents.get(f"{path}.idx")
        known = "offsets" in report and not _altered(report, findings, path)
        if known and listed is not None and listed != energon_offsets(report["offsets"]):
            faults.append(Fault(Kind.COMPANION, f"{path}.idx", "disagrees with the tar"))
    for name in sorted(findings.manifest.splits):
        path = companions.wids_path(name)
        wanted = [wids_of(findings, name), wids_of(replace(findings, manifest=counted), name)]
        if wanted[0] is not None and path in contents and contents[path] not in wanted:
            faults.append(Fault(Kind.COMPANION, path, "disagrees with the shards"))
    return faults


def wids_of(findings: Findings, name: str) -> bytes | None:
    """Return the wids index of a split; None where not all of its shards are whole."""
    described = []
    for shard in findings.manifest.splits[name].shards:
        report = findings.shards.get(shard.path, {})
        if "offsets" not in report or _altered(report, findings, shard.path):
            return None
        described.append({"path": shard.path, "num_clips": shard.num_samples, "md5": report["md5"],
                          "bytes": report["bytes"]})  # fmt: skip
    return companions.wids_index(name, described)


def _altered(report: dict[str, Any], findings: Findings, path: str) -> bool:
    return bool(report["sha256"] != findings.manifest.files[path].sha256)
