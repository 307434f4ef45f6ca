"""The work of a verifying process: one shard against the manifest, its index rows and itself."""

from __future__ import annotations

import functools
import itertools
import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prep.checksums import content_hash
from prep.clip_check import deep_faults
from prep.errors import DatasetError, StorageError
from prep.faults import Fault, Kind
from prep.foreign_labels import label_index, stated_label
from prep.format import Sidecar, iter_records
from prep.outcome import RowFailure
from prep.shard_bytes import ShardBytes, TarEntry, shown, walk
from prep.storage import Storage
from prep.tar_samples import Grouping, Sample
from prep.tar_stream import ArchiveError
from prep.text.plain import few
from prep.verify_files import ALTERED, size_fault, storage_fault
from prep.worker_marks import Mark

if TYPE_CHECKING:
    from prep.format import ClipRecord

_MAX_TEXT_BYTES = 4 << 20  # of a sidecar or label


def verify_shard(job: dict[str, Any]) -> dict[str, Any]:
    """Read one shard once; return its faults, hashes and where its samples begin.

    The job: root, options, path; bytes and sha256 as listed; index (an Arrow file, or None where
    the split's index cannot be used) with the rows `[first, end)`; context (a JSON file of what
    all shards of the split share); mark; deep; skip (clips that a worker died of).
    """
    storage, path = Storage(job["root"], job["options"]), job["path"]
    mark = Mark(job["mark"])
    try:
        body = ShardBytes(storage, storage.info(path), mark.add_bytes)
        return _check(job, body, mark)
    except StorageError as error:
        return {"faults": [storage_fault(path, error).to_json()]}
    finally:
        mark.close()


def _check(job: dict[str, Any], body: ShardBytes, mark: Mark) -> dict[str, Any]:
    check = ShardCheck(job, mark)
    try:
        for entry in walk(body):
            check.add(entry)
        check.finish()
    except ArchiveError as error:
        check.fault(Kind.TAR, f"not a whole tar ({error})")
    body.drain()
    faults = check.faults
    if body.sha256.hexdigest() != job["sha256"]:
        faults = [_altered(job, body, faults)]
    elif body.size_bytes != job["bytes"]:
        faults.append(size_fault(job["path"], body.size_bytes, job["bytes"]))
    samples = check.grouping.samples
    return {
        "faults": [fault.to_json() for fault in faults],
        "bytes": body.size_bytes,
        "sha256": body.sha256.hexdigest(),
        "md5": body.md5.hexdigest(),
        "class_lists": sorted(check.class_lists),
        "offsets": [*(sample.offset for sample in samples), samples[-1].end if samples else 0],
    }


def _altered(job: dict[str, Any], body: ShardBytes, inside: list[Fault]) -> Fault:
    """Return one fault for a shard that is not the listed one, with the first that is inside."""
    fault = Fault(Kind.ALTERED, job["path"], ALTERED)
    if body.size_bytes != job["bytes"]:
        fault = size_fault(job["path"], body.size_bytes, job["bytes"])
    first = f": {inside[0].message}" if inside else ""
    more = f"; and {len(inside) - 1} more" if len(inside) > 1 else ""
    return replace(fault, message=f"{fault.message}{first}{more}")


@functools.lru_cache(maxsize=2)
def _context(path: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    values["indices"] = {
        path: {name: number for number, name in enumerate(names)}
        for path, names in values["class_lists"].items()
    }
    return values


def index_rows(path: str, first: int, end: int) -> list[ClipRecord]:
    """Return rows `[first, end)` of the Arrow file that the parent wrote."""
    import pyarrow as pa

    with pa.memory_map(path) as source:
        table = pa.ipc.open_file(source).read_all()
        return list(iter_records(table.slice(first, end - first)))


class ShardCheck:
    """Compares the members of one tar, as they come, with the rows of the index."""

    def __init__(self, job: dict[str, Any], mark: Mark) -> None:
        self.path: str = job["path"]
        self.faults: list[Fault] = []
        self.grouping = Grouping()
        self.context = _context(job["context"])
        self.rows: list[ClipRecord] | None = None
        if job["index"] is not None:
            self.rows = index_rows(job["index"], job["first"], job["end"])
        self._by_key = {row.key: row for row in self.rows or ()}
        self._deep: bool = job["deep"]
        self._skip: dict[str, str] = job["skip"]
        self._mark = mark
        self._texts: dict[str, bytes] = {}
        self.class_lists: set[str] = set()
        """Where manifest and classes.txt have other names: which of them the clips agree with."""

    @property
    def foreign(self) -> dict[str, Any] | None:
        """How somebody else's tars were indexed; None for tars of kprep."""
        foreign: dict[str, Any] | None = self.context["foreign"]
        return foreign

    def fault(self, kind: Kind, message: str, key: str | None = None) -> None:
        """Book a fault of this shard."""
        self.faults.append(Fault(kind, self.path, message, key))

    def add(self, entry: TarEntry) -> None:
        """Check one member."""
        before = len(self.grouping.samples)
        found = self.grouping.add(entry)
        if found is None:
            if self.foreign is None:
                self.fault(Kind.TAR, f"member {shown(entry.name)} belongs to no sample")
            return
        sample, extension = found
        if len(self.grouping.samples) > before:
            if before:
                self._close(self.grouping.samples[before - 1])
            self._texts = {}
        row = self._by_key.get(self._key(sample))
        if row is not None and entry.data_offset == row.video_offset:
            if entry.size == row.video_bytes:
                self._check_video(entry.read(), row, entry.data_offset)
        elif extension in ("json", "cls", "txt") and entry.size <= _MAX_TEXT_BYTES:
            self._texts[extension] = entry.read()

    def finish(self) -> None:
        """Check the last sample, and the tar as a whole."""
        if self.grouping.samples:
            self._close(self.grouping.samples[-1])
        for key, problem in self.grouping.problems:
            kind = Kind.DUPLICATE_KEY if problem.startswith("key") else Kind.TAR
            self.fault(kind, problem, key)
        if self.rows is None:
            return
        keys = [self._key(sample) for sample in self.grouping.samples]
        if self.foreign is not None:
            keys = [key for key in keys if key in self._by_key]
        wanted = [row.key for row in self.rows]
        if keys != wanted:
            self.faults = [fault for fault in self.faults if fault.kind is not Kind.INDEX]
            self.fault(Kind.INDEX, _other_samples(keys, wanted))

    def _key(self, sample: Sample) -> str:
        return index_key(self.foreign, self.path, sample.key)

    def _close(self, sample: Sample) -> None:
        """Check a sample whose members have all come."""
        key = self._key(sample)
        if self.foreign is None and set(sample.members) != {"mp4", "json"}:
            names = ", ".join(sorted(sample.members))
            self.fault(Kind.TAR, f"{key} has the members {names}, not mp4 and json", key)
            return
        row = self._by_key.get(key)
        if row is None:
            return
        place = (row.video_offset, row.video_bytes)
        entry = (row.entry_offset, row.entry_bytes)
        if place not in sample.members.values() or entry != (
            sample.offset, sample.end - sample.offset):  # fmt: skip
            self.fault(Kind.INDEX, f"{key} does not stand where the index says", key)
        elif self.foreign is None:
            self._check_sidecar(row)
        else:
            self._check_label(self.foreign["labels"], row)

    def _check_video(self, payload: bytes, row: ClipRecord, offset: int) -> None:
        if content_hash(payload) != row.content_hash:
            text = f"{row.key}: its video is not the one that the index describes"
            self.fault(Kind.INDEX, text, row.key)
            return
        if zlib.crc32(payload) != row.crc32 or not gops_agree(payload, row):
            self.fault(Kind.INDEX, f"{row.key}: its checksums in the index are wrong", row.key)
        if not self._deep:
            return
        if str(offset) in self._skip:
            text = f"{row.key}: the decoder ended over it ({self._skip[str(offset)]})"
            self.fault(Kind.VIDEO, text, row.key)
            return
        interval = None if self.foreign is not None else self.context["gop_frames"]
        with self._mark.clip(offset):
            for text in deep_faults(payload, row, interval):
                self.fault(Kind.VIDEO, f"{row.key}: {text}", row.key)

    def _check_sidecar(self, row: ClipRecord) -> None:
        name = f"{row.key}.json"
        try:
            values = Sidecar.from_bytes(self._texts.get("json", b""), name)
        except DatasetError as error:
            self.fault(Kind.TAR, str(error), row.key)
            return
        lists, profile = self.context["class_lists"], self.context["profile"]
        if not self._agrees(
            [path for path in lists if sidecar_agrees(values, row, lists[path], profile)]
        ):
            self.fault(Kind.INDEX, f"{name} disagrees with the index", row.key)
        elif values.split != self.context["split"]:
            text = f"{name} says split {shown(values.split)}, it stands in {self.context['split']}"
            self.fault(Kind.INDEX, text, row.key)

    def _check_label(self, rule: str, row: ClipRecord) -> None:
        agreeing, problems = [], []
        for path, indices in self.context["indices"].items():
            try:
                label = label_index(stated_label(rule, self._texts), indices)
            except RowFailure as failure:
                problems.append(f"bad label ({failure.detail})")
                continue
            if label == row.label:
                agreeing.append(path)
            else:
                problems.append(f"its label is {label}, the index says {row.label}")
        if not self._agrees(agreeing):
            self.fault(Kind.INDEX, f"{row.key}: {problems[0]}", row.key)

    def _agrees(self, agreeing: list[str]) -> bool:
        """Whether a clip agrees with any class list; remember which, if not with both."""
        if len(agreeing) < len(self.context["class_lists"]):
            self.class_lists.update(agreeing)
        return bool(agreeing)


def index_key(foreign: dict[str, Any] | None, path: str, key: str) -> str:
    """Return the key of the index for a key of a tar: its own, or behind the shard's path."""
    qualified = foreign is not None and foreign["keys"] == "shard"
    return f"{path.removesuffix('.tar')}/{key}" if qualified else key


def _other_samples(found: list[str], wanted: list[str]) -> str:
    text = "its samples are not those of the index, in that order"
    only_tar, only_index = sorted(set(found) - set(wanted)), sorted(set(wanted) - set(found))
    if only_tar:
        text += f"; not in the index: {few([shown(key) for key in only_tar])}"
    if only_index:
        text += f"; not in the tar: {few([shown(key) for key in only_index])}"
    return text


def gops_agree(payload: bytes, row: ClipRecord) -> bool:
    """Whether every group of pictures has its checksum and as many frames as it should."""
    if row.gop_offsets is None or row.gop_crc32 is None:
        return row.gop_offsets is None and row.gop_crc32 is None and row.gop_frames is None
    if row.codec_config is None or b"avcC" + row.codec_config not in payload:
        return False
    pairs = list(itertools.pairwise(row.gop_offsets))
    if len(pairs) != len(row.gop_crc32):
        return False
    left = row.num_frames
    for (a, b), crc in zip(pairs, row.gop_crc32, strict=True):
        if not 0 <= a < b <= len(payload) or zlib.crc32(payload[a:b]) != crc:
            return False
        if _num_frames(payload[a:b]) != min(left, row.gop_frames or 0):
            return False
        left -= row.gop_frames or 0
    return left <= 0


def _num_frames(gop: bytes) -> int | None:
    """Count the length-prefixed NAL units of a GOP, one a frame; None when they do not fill it."""
    position = count = 0
    while position + 4 <= len(gop):
        position += 4 + int.from_bytes(gop[position : position + 4], "big")
        count += 1
    return count if position == len(gop) else None


def sidecar_agrees(sidecar: Sidecar, row: ClipRecord, names: list[str], profile: str) -> bool:
    """Whether a sidecar says of its clip what the index says."""
    label = names[row.label] if 0 <= row.label < len(names) else ""
    shared = ("key", "video_id", "start_seconds", "end_seconds", "num_frames", "fps_num", "fps_den",
              "width", "height", "source")  # fmt: skip
    return (
        all(getattr(sidecar, name) == getattr(row, name) for name in shared)
        and (sidecar.label, sidecar.label_index) == (label, row.label)
        and sidecar.profile == profile
    )
