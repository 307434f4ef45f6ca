"""What `kprep verify` decides where the manifest contradicts files that are as it lists them.

Either can be wrong. What the tars hold tells: where an index, a ledger or a companion says what
they say, it is the manifest whose class names or counts are not those of the dataset.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from prep import companions
from prep.errors import DatasetError
from prep.faults import Fault, Kind
from prep.format import index_path, ledger_path
from prep.format.layout import CLASSES_PATH, MANIFEST_PATH, classes_file
from prep.ledger import read_ledger
from prep.verify_files import OTHER_FINGERPRINT

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prep.format import Manifest
    from prep.verify import Findings


def blame_manifest(findings: Findings) -> list[Fault]:
    """Return the faults, those of right files made faults of the manifest that contradicts them."""
    faults = [
        fault for fault in findings.faults
        if fault.kind is not Kind.COMPANION or not _counts_are_right(findings, fault.path)
    ]  # fmt: skip
    faults = _class_names(findings, faults)
    for name in findings.manifest.splits:
        if not _index_is_right(findings, name):
            continue
        wrong = {index_path(name)}
        if _ledger_is_right(findings, name):
            wrong.add(ledger_path(name))
        faults = [_counts(fault) if fault.path in wrong else fault for fault in faults]
    return faults


def listed_class_names(findings: Findings) -> list[str] | None:
    """Return the names of a classes.txt that is as listed and not of the manifest; else None."""
    data = findings.contents.get(CLASSES_PATH)
    if data is None or data == classes_file(findings.manifest.class_names):
        return None
    names = data.decode(errors="replace").split("\n")[:-1]
    return names if data == classes_file(names) else None


def is_as_listed(findings: Findings, path: str) -> bool:
    """Whether a shard could be read to its end and has the sha256 that the manifest lists."""
    return findings.shards.get(path, {}).get("sha256") == findings.manifest.files[path].sha256


def counted_manifest(findings: Findings) -> Manifest:
    """Return the manifest with the samples that were counted in the tars."""

    def counted(path: str, listed: int) -> int:
        report = findings.shards.get(path, {})
        whole = is_as_listed(findings, path) and "offsets" in report
        return len(report["offsets"]) - 1 if whole else listed  # the last one is the end

    splits = {
        name: replace(split, shards=tuple(
            replace(shard, samples=counted(shard.path, shard.num_samples)) for shard in split.shards
        ))
        for name, split in findings.manifest.splits.items()
    }  # fmt: skip
    return replace(findings.manifest, splits=splits)


def _counts_are_right(findings: Findings, path: str) -> bool:
    """Whether a file of `.nv-meta`, compared with the manifest, is what the tars give."""
    wanted = companions.energon_files(counted_manifest(findings).splits)
    return path in wanted and findings.contents.get(path) == wanted[path]


def _class_names(findings: Findings, faults: list[Fault]) -> list[Fault]:
    """Name the manifest where the clips do not have its class names but those of classes.txt.

    Where the clips say nothing of the classes in question it is the manifest too: classes.txt
    has the sha256 that was listed when it was written.
    """
    listed, mine = listed_class_names(findings), findings.manifest.class_names
    if listed is None:
        return faults
    held = {
        path
        for shard, report in findings.shards.items() if is_as_listed(findings, shard)
        for path in report["class_lists"]
    }  # fmt: skip
    if held == {MANIFEST_PATH}:
        return faults
    if MANIFEST_PATH not in held:
        faults = [fault for fault in faults if fault.path != CLASSES_PATH]
    if len(listed) != len(mine):
        text = f"it names {len(mine)} classes, classes.txt, which is as listed, {len(listed)}"
    else:
        number = next(n for n, name in enumerate(listed) if name != mine[n])
        text = (
            f"class {number} is {mine[number]} in it, and {listed[number]} in classes.txt, "
            "which is as listed"
        )
    return [*faults, Fault(Kind.MANIFEST, MANIFEST_PATH, text)]


def _index_is_right(findings: Findings, name: str) -> bool:
    """Whether every row of an index agrees with the tars of its split, and the other way round."""
    table, shards = findings.tables.get(name), findings.manifest.splits[name].shards
    paths = {shard.path for shard in shards}
    return (
        table is not None
        and set(table["shard"].to_pylist()) <= paths
        and all(is_as_listed(findings, path) for path in paths)
        and not any(_has_index_fault(findings.shards[path]["faults"]) for path in paths)
    )


def _has_index_fault(faults: Iterable[dict[str, str]]) -> bool:
    return any(fault["kind"] in (Kind.INDEX, Kind.TAR, Kind.DUPLICATE_KEY) for fault in faults)


def _ledger_is_right(findings: Findings, name: str) -> bool:
    """Whether a ledger has the clips of the index, and one of the two sums that a manifest has."""
    path, split = ledger_path(name), findings.manifest.splits[name]
    if path not in findings.contents:
        return False
    try:
        ledger = read_ledger(findings.contents[path], path)
    except DatasetError:
        return False
    rows = list(zip(ledger["key"].to_pylist(), ledger["status"].to_pylist(), strict=True))
    clips = Counter(key for key, status in rows if status == "ok")
    outcomes = {status: count for status, count in split.outcomes.items() if count}
    return clips == Counter(findings.tables[name]["key"].to_pylist()) and (
        len(rows) == split.num_rows or Counter(status for _, status in rows) == outcomes
    )


def _counts(fault: Fault) -> Fault:
    """Return the fault of a right file as the manifest's."""
    if fault.kind not in (Kind.INDEX, Kind.LEDGER) or fault.message == OTHER_FINGERPRINT:
        return fault
    text = f"it contradicts {fault.path}, which is as listed: {fault.message}"
    return Fault(Kind.MANIFEST, MANIFEST_PATH, text, fault.key)
