"""`kprep verify --repair`: index and companions made anew from the tars; no tar is touched."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prep.assemble import energon_offsets
from prep.clip_rows import clip_record
from prep.companions import wids_path
from prep.describe_shards import describe_shards
from prep.errors import KprepError
from prep.exclusive import exclusive
from prep.faults import Fault, Kind
from prep.foreign_publish import foreign_records, shared_files_of
from prep.format import (
    ClipRecord,
    FileEntry,
    Manifest,
    foreign_settings,
    index_path,
    index_table,
    ledger_path,
    read_manifest,
    split_fingerprint,
    write_index,
)
from prep.format.layout import MANIFEST_PATH
from prep.ledger import read_ledger
from prep.publish import file_entry
from prep.temporary import temporary_folder
from prep.verify import Findings, examine, wids_of
from prep.verify_files import ledger_faults

if TYPE_CHECKING:
    import pyarrow as pa

    from prep.shard_jobs import ShardProgress
    from prep.storage import Storage


@dataclass
class Repair:
    """What was rebuilt, what could not be and why, and what is found afterwards."""

    findings: Findings
    rebuilt: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def repair(
    storage: Storage,
    findings: Findings,
    *,
    workers: int = 0,
    progress: ShardProgress,
) -> Repair:
    """Rebuild what verification found wrong and the tars can tell; then verify again.

    A tar is trusted when it is, byte for byte, the one that the manifest lists: the index cannot
    vouch for captions, extra columns and whatever else stands beside the clips. Where one is
    altered, damaged or missing, or the manifest contradicts what is as it lists it, nothing is
    written at all. New files are written first and the manifest last, at once. KprepError where the
    manifest is not the one that was examined.
    """
    done = Repair(findings)
    if not findings.faults:
        return done
    done.refused += _damaged_shards(findings) or _wrong_manifest(findings)
    if done.refused:
        return done
    with exclusive(storage) as check_lock:
        if read_manifest(storage) != findings.manifest:
            raise KprepError(
                f"{storage.where(MANIFEST_PATH)} changed while the dataset was being checked, so "
                "nothing was written; run the same command again"
            )
        work = _Rebuilding(storage, findings, workers, progress)
        work.rebuild()
        done.rebuilt, done.refused = work.names, work.refused
        if not work.names:
            return done
        for path, data in work.written.items():
            storage.write(path, data)
        check_lock()
        storage.write(MANIFEST_PATH, work.manifest.to_bytes())
    if not work.described:
        progress.skip(sum(entry.bytes for entry in findings.manifest.files.values()))
    videos = [fault for fault in findings.faults if fault.kind is Kind.VIDEO]
    done.findings = examine(storage, work.manifest, workers=workers, progress=progress)
    done.findings.faults += videos  # this time nothing was decoded
    return done


def _damaged_shards(findings: Findings) -> list[str]:
    """Return a sentence for each shard that cannot be trusted."""
    anew = "`kprep index --force`" if findings.manifest.is_foreign else "`kprep shard`"
    sentences = []
    for path, report in sorted(findings.shards.items()):
        listed = report.get("sha256") == findings.manifest.files[path].sha256
        inside = [
            fault for fault in report["faults"]
            if not listed or fault["kind"] in (Kind.TAR, Kind.DUPLICATE_KEY)
        ]  # fmt: skip
        if inside:
            what = Fault(Kind.TAR, path, inside[0]["message"])
            sentences.append(
                f"{what}; get this shard from another copy of the dataset (`kprep pull` sends "
                f"what differs), or make the dataset anew with {anew}"
            )
    return sentences


def _wrong_manifest(findings: Findings) -> list[str]:
    """Return a sentence where the manifest is what is wrong: nothing can be made anew by it."""
    if all(fault.path != MANIFEST_PATH for fault in findings.faults):
        return []
    why = "it contradicts itself, or files that are as it lists them, so nothing is made anew by it"
    return [f"{MANIFEST_PATH}: {why}; get it from another copy of the dataset"]


class _Rebuilding:
    """One repair: files to write by path, the manifest that lists them, and a line for each."""

    def __init__(
        self, storage: Storage, findings: Findings, workers: int, progress: ShardProgress
    ) -> None:
        self.storage, self.findings = storage, findings
        self.workers, self.progress = workers, progress
        self.manifest: Manifest = findings.manifest
        self.written: dict[str, bytes] = {}
        self.names: list[str] = []
        self.refused: list[str] = []
        self.described = False
        """Whether the tars had to be read for it."""

    def rebuild(self) -> None:
        """Rebuild, from the tars outwards: their entries, indices, companions, shared files."""
        faulty = {fault.path for fault in self.findings.faults}
        for path, report in sorted(self.findings.shards.items()):
            entry = FileEntry(report["bytes"], report["sha256"])
            if entry != self.manifest.files[path]:
                self._list(path, entry)
        for name in sorted(self.manifest.splits):
            self._split(name, faulty)
        shared = shared_files_of(self.storage, self.manifest, self.written)
        wrong = [path for path in shared if path in faulty or path not in self.manifest.files]
        for path in wrong:
            self._write(path, shared[path])
        for path in sorted(faulty - set(self.written) - set(self.findings.shards)):
            self._explain(path)

    def _split(self, name: str, faulty: set[str]) -> None:
        shards = [shard.path for shard in self.manifest.splits[name].shards]
        disagree = any(
            fault.kind is Kind.INDEX and fault.path in shards for fault in self.findings.faults
        )
        if disagree or index_path(name) in faulty:
            try:
                self._index(name)
            except KprepError as error:
                self.refused.append(f"{index_path(name)}: {error}")
        for path in shards:
            data = energon_offsets(self.findings.shards[path]["offsets"])
            if f"{path}.idx" in faulty:
                self._write(f"{path}.idx", data)
        wids = wids_of(replace(self.findings, manifest=self.manifest), name)
        if wids is not None and self.findings.contents.get(wids_path(name)) != wids:
            self._write(wids_path(name), wids)
        self._ledger(name)

    def _index(self, name: str) -> None:
        """Rebuild a split's index; KprepError where the tars do not give the published split."""
        import pyarrow as pa

        self.described = True
        split = self.manifest.splits[name]
        ledger = self._readable_ledger(name)
        foreign = foreign_settings(name, split)
        profile = self.manifest.profile
        context: dict[str, Any] = {
            "foreign": foreign,
            "gop_frames": profile.keyframe_interval_frames,
        }
        if foreign is not None:
            context |= {"as_stored": foreign["as_stored"], "rules": [foreign["labels"]]}
        with temporary_folder("kprep-repair-") as folder:
            reports = dict(
                describe_shards(
                    self.storage,
                    {shard.path: self.manifest.files[shard.path].bytes for shard in split.shards},
                    context,
                    folder=Path(folder),
                    workers=self.workers,
                    progress=self.progress,
                )
            )
        tables: list[pa.Table] = []
        for shard in split.shards:
            report = reports[shard.path]
            if "refused" in report:
                raise KprepError(report["refused"])
            if foreign is not None:
                records = foreign_records(shard.path, report, foreign, self.manifest.class_names)
            else:
                records = _records(shard.path, report, ledger)
            tables.append(index_table(records))
        if split_fingerprint(pa.concat_tables(tables)) != split.fingerprint:
            raise KprepError(
                "the tars give another fingerprint than the manifest has for this split, so they "
                "are not the clips that were published; get the manifest or the shards from "
                "another copy of the dataset"
            )
        path, data = index_path(name), write_index(tables)
        if self.findings.contents.get(path) == data:
            raise KprepError(
                "it is what the tars give already, so that a tar or the manifest is wrong where "
                "it disagrees; get them from another copy of the dataset"
            )
        self._write(path, data)

    def _readable_ledger(self, name: str) -> pa.Table | None:
        data = self.findings.contents.get(ledger_path(name))
        try:
            return None if data is None else read_ledger(data, ledger_path(name))
        except KprepError:
            return None

    def _ledger(self, name: str) -> None:
        """List a ledger that is there and adds up; its failures are in no tar."""
        path = ledger_path(name)
        if path in self.manifest.files or not self.storage.exists(path):
            return
        data = self.storage.read(path)
        if not ledger_faults(self.manifest, name, data):
            self._list(path, file_entry(data))

    def _write(self, path: str, data: bytes) -> None:
        if path in self.findings.shards:
            raise KprepError(
                f"{path} is a shard, and no shard is ever written; nothing was written"
            )
        self.written[path] = data
        self.names.append(path)
        self._enter(path, file_entry(data))

    def _list(self, path: str, entry: FileEntry) -> None:
        self.names.append(f"the manifest's entry of {path}")
        self._enter(path, entry)

    def _enter(self, path: str, entry: FileEntry) -> None:
        self.manifest = replace(self.manifest, files={**self.manifest.files, path: entry})

    def _explain(self, path: str) -> None:
        """Say why a faulty file stays as it is."""
        if path in self.manifest.files and path.startswith("ledger/"):
            why = "the tars do not hold the rows that failed; get it from another copy"
        elif path in self.manifest.files:
            why = "it cannot be made from the tars; get it from another copy"
        else:
            why = "it is not the dataset's; remove it yourself if nobody needs it"
        if not any(line.startswith(f"{path}:") for line in self.refused):
            self.refused.append(f"{path}: {why}")


def _records(path: str, report: dict[str, Any], ledger: pa.Table | None) -> list[ClipRecord]:
    """Return the rows of one of kprep's own tars; DatasetError where a clip is not of the form."""
    short: dict[str, bool] = {}
    if ledger is not None:
        keys, flags = ledger["key"].to_pylist(), ledger["short"].to_pylist()
        short = {key: bool(flag) for key, flag in zip(keys, flags, strict=True)}
    records = []
    for clip in report["samples"]:
        if "failed" in clip:
            reason, detail = clip["failed"]
            raise KprepError(f"clip {clip['key']} in {path} cannot be indexed: {reason} ({detail})")
        records.append(clip_record(
            path, clip["key"], clip, video_id=clip["video_id"], label=clip["label_index"],
            start_seconds=clip["start_seconds"], end_seconds=clip["end_seconds"],
            source=clip["source"], short=short.get(clip["key"], _ends_early(clip)),
        ))  # fmt: skip
    return records


def _ends_early(clip: dict[str, Any]) -> bool:
    """Whether a clip is shorter than annotated, as the conversion decides it."""
    annotated = clip["end_seconds"] - clip["start_seconds"]
    return bool(annotated * clip["fps"][0] / clip["fps"][1] - clip["num_frames"] > 1.5)
