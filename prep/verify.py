"""`kprep verify`: every file against the manifest, the index and the others."""

from __future__ import annotations

import hashlib
import io
import itertools
import tarfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prep import companions
from prep.assemble import energon_index
from prep.errors import DatasetError, KprepError
from prep.format import (
    Sidecar,
    index_path,
    iter_records,
    ledger_path,
    read_index,
    read_manifest,
    split_fingerprint,
)
from prep.format.layout import MANIFEST_PATH
from prep.ledger import read_ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prep.format import ClipRecord, Manifest
    from prep.storage import Storage

_BLOCK = 512
_UNFINISHED = (".kprep-work/", ".kprep-lock")  # of conversions that run; no part of the dataset


@dataclass
class Verdict:
    """What verification found: one line per fault, beginning with the file's path."""

    num_files: int = 0
    num_clips: int = 0
    faults: list[str] = field(default_factory=list)


def verify(storage: Storage, *, progress: Callable[[str], None] = lambda _: None) -> Verdict:
    """Check every file's size and sha256, every index row against its tar, and the companions."""
    manifest = read_manifest(storage)
    verdict = Verdict()
    verdict.faults += _file_set(storage, manifest)
    contents: dict[str, bytes] = {}
    shards = {shard.path for split in manifest.splits.values() for shard in split.shards}
    for path in sorted(manifest.files):
        if path in shards:
            continue
        verdict.num_files += 1
        data = _read(storage, manifest, path, verdict.faults)
        if data is not None:
            contents[path] = data
    verdict.faults += _shared_files(manifest, contents)
    holders: dict[str, str] = {}
    for split in sorted(manifest.splits):
        progress(f"split {split}")
        for key in _verify_split(storage, manifest, split, contents, verdict):
            other = holders.setdefault(key, split)
            if other != split:
                path = index_path(split)
                verdict.faults.append(f"{path}: key {key} stands in split {other} too")
    return verdict


def _file_set(storage: Storage, manifest: Manifest) -> Iterator[str]:
    """Name files that the manifest does not list; missing ones are named where they are read."""
    for info in storage.list():
        known = info.path in manifest.files or info.path == MANIFEST_PATH
        if not known and not info.path.startswith(_UNFINISHED):
            yield f"{info.path}: not listed in the manifest"
    for name, split in manifest.splits.items():
        wanted = [shard.path for shard in split.shards]
        wanted += [index_path(name), ledger_path(name), companions.wids_path(name)]
        yield from (f"{path}: the manifest has no size and sha256" for path in wanted
                    if path not in manifest.files)  # fmt: skip


def _read(storage: Storage, manifest: Manifest, path: str, faults: list[str]) -> bytes | None:
    """Return a file whose hash is right; name the fault and return None otherwise."""
    entry = manifest.files.get(path)
    if entry is None:
        return None
    try:
        data = storage.read(path)
    except KprepError as error:
        faults.append(f"{path}: missing or unreadable ({error})")
        return None
    if len(data) != entry.bytes:
        faults.append(f"{path}: {len(data)} bytes, the manifest says {entry.bytes}")
        return None
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        faults.append(f"{path}: altered (sha256 differs from the manifest's)")
        return None
    return data


def _shared_files(manifest: Manifest, contents: dict[str, bytes]) -> Iterator[str]:
    names = "".join(f"{name}\n" for name in manifest.class_names).encode()
    wanted = {"classes.txt": names, **companions.energon_files(manifest.splits)}
    for path, data in wanted.items():
        if path not in manifest.files:
            yield f"{path}: missing from the manifest"
        elif path in contents and contents[path] != data:
            yield f"{path}: disagrees with the manifest"


def _verify_split(
    storage: Storage, manifest: Manifest, name: str, contents: dict[str, bytes], verdict: Verdict
) -> list[str]:
    """Check one split; return its keys."""
    split = manifest.splits[name]
    faults = verdict.faults
    rows: dict[str, list[ClipRecord]] = {shard.path: [] for shard in split.shards}
    path = index_path(name)
    if path in contents:
        try:
            table = read_index(contents[path], path)
            for record in iter_records(table):
                rows.setdefault(record.shard, []).append(record)
            faults += _index_sums(manifest, name, table, rows)
        except DatasetError as error:
            faults.append(str(error))
    if ledger_path(name) in contents:
        faults += _ledger_sums(contents[ledger_path(name)], manifest, name)
    described = []
    for shard in split.shards:
        verdict.num_files += 1
        data = _read(storage, manifest, shard.path, faults)
        if data is None:
            continue
        digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
        described.append({"path": shard.path, "num_clips": shard.num_clips, "md5": digest,
                          "bytes": len(data)})  # fmt: skip
        verdict.num_clips += len(rows[shard.path])
        index_file = contents.get(f"{shard.path}.idx")
        faults += verify_shard(shard.path, data, rows[shard.path], manifest, index_file)
    wids = companions.wids_path(name)
    complete = len(described) == len(split.shards)
    if complete and wids in contents and contents[wids] != companions.wids_index(name, described):
        faults.append(f"{wids}: disagrees with the shards")
    return [row.key for records in rows.values() for row in records]


def _index_sums(
    manifest: Manifest, name: str, table: Any, rows: dict[str, list[ClipRecord]]
) -> Iterator[str]:
    split, path = manifest.splits[name], index_path(name)
    if table.num_rows != split.num_clips:
        yield f"{path}: {table.num_rows} rows, the manifest says {split.num_clips} clips"
    if split_fingerprint(table) != split.fingerprint:
        yield f"{path}: its fingerprint is not the manifest's"
    for shard in split.shards:
        if len(rows[shard.path]) != shard.num_clips:
            yield f"{path}: {len(rows[shard.path])} rows of {shard.path}, not {shard.num_clips}"
    for shard_path in set(rows) - {shard.path for shard in split.shards}:
        yield f"{path}: rows of {shard_path}, which the split does not have"
    keys = Counter(table["key"].to_pylist())
    yield from (f"{path}: key {key} stands {n} times" for key, n in keys.items() if n > 1)
    highest = len(manifest.class_names)
    for records in rows.values():
        yield from (f"{path}: {record.key} has label {record.label}, the manifest {highest} classes"
                    for record in records if record.label >= highest)  # fmt: skip


def _ledger_sums(data: bytes, manifest: Manifest, name: str) -> Iterator[str]:
    path, split = ledger_path(name), manifest.splits[name]
    try:
        ledger = read_ledger(data, path)
    except DatasetError as error:
        yield str(error)
        return
    counted = Counter(ledger["status"].to_pylist())
    recorded = {status: count for status, count in split.outcomes.items() if count}
    if dict(counted) != recorded or ledger.num_rows != split.num_rows:
        yield f"{path}: counts {dict(counted)}, the manifest says {recorded}"
    if counted["ok"] != split.num_clips:
        yield f"{path}: {counted['ok']} rows are ok, the manifest says {split.num_clips} clips"


def verify_shard(
    path: str, data: bytes, rows: list[ClipRecord], manifest: Manifest, index_file: bytes | None
) -> Iterator[str]:
    """Yield the faults of one tar: against its index rows, its sidecars and its `.tar.idx`."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            members = list(tar)
    except tarfile.TarError as error:
        yield f"{path}: not a tar ({error})"
        return
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in members:
        key, _, extension = member.name.partition(".")
        if not member.isreg() or extension in samples.get(key, {}):
            yield f"{path}: member {member.name} is no plain file or stands twice"
            return
        samples.setdefault(key, {})[extension] = member
    if [*samples] != [row.key for row in rows]:
        yield f"{path}: its samples are not those of the index, in that order"
        return
    places = []
    for row in rows:
        yield from _verify_clip(path, data, row, samples[row.key], manifest)
        places.append((row.key, row.entry_offset, row.entry_bytes, row.video_offset))
    end = max((row.entry_offset + row.entry_bytes for row in rows), default=0)
    if index_file is not None and index_file != energon_index(places, end):
        yield f"{path}.idx: disagrees with the tar"


def _verify_clip(
    path: str,
    data: bytes,
    row: ClipRecord,
    members: dict[str, tarfile.TarInfo],
    manifest: Manifest,
) -> Iterator[str]:
    where = f"{path}: {row.key}"
    if set(members) != {"mp4", "json"}:
        yield f"{where} has the members {', '.join(sorted(members))}, not mp4 and json"
        return
    first = min(member.offset for member in members.values())
    last = max(
        member.offset_data + -(-member.size // _BLOCK) * _BLOCK for member in members.values()
    )
    video = members["mp4"]
    if (first, last - first) != (row.entry_offset, row.entry_bytes) or (
        video.offset_data, video.size) != (row.video_offset, row.video_bytes):  # fmt: skip
        yield f"{where} does not stand where the index says"
        return
    payload = data[video.offset_data : video.offset_data + video.size]
    if hashlib.blake2b(payload, digest_size=16).digest() != row.content_hash:
        yield f"{where}: its video is not the one that the index describes"
    if zlib.crc32(payload) != row.crc32 or not _gops_agree(payload, row):
        yield f"{where}: its checksums in the index are wrong"
    sidecar = members["json"]
    text = data[sidecar.offset_data : sidecar.offset_data + sidecar.size]
    try:
        values = Sidecar.from_bytes(text, f"{where}.json")
    except DatasetError as error:
        yield str(error)
        return
    if not _sidecar_agrees(values, row, manifest):
        yield f"{where}.json disagrees with the index"


def _gops_agree(payload: bytes, row: ClipRecord) -> bool:
    if row.gop_offsets is None or row.gop_crc32 is None:
        return row.gop_offsets is None and row.gop_crc32 is None and row.gop_frames is None
    if row.codec_config is None or b"avcC" + row.codec_config not in payload:
        return False
    offsets = row.gop_offsets
    pairs = list(itertools.pairwise(offsets))
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


def _sidecar_agrees(sidecar: Sidecar, row: ClipRecord, manifest: Manifest) -> bool:
    names = manifest.class_names
    label = names[row.label] if 0 <= row.label < len(names) else ""
    shared = ("key", "video_id", "start_seconds", "end_seconds", "num_frames", "fps_num", "fps_den",
              "width", "height", "source")  # fmt: skip
    return (
        all(getattr(sidecar, name) == getattr(row, name) for name in shared)
        and (sidecar.label, sidecar.label_index) == (label, row.label)
        and sidecar.profile == manifest.profile.name
    )
