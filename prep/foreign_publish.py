"""What `kprep index` writes for tars that somebody else wrote: rows, ledger, card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prep.clip_rows import clip_record
from prep.companions import wids_path
from prep.foreign_labels import label_index
from prep.format import foreign_settings, index_path, ledger_path
from prep.format.layout import CARD_PATH
from prep.journal import Row
from prep.outcome import Outcome, Reason, RowFailure, Status
from prep.publish import root_files
from prep.segment import Segment
from prep.verify_shard import index_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from prep.format import ClipRecord, Manifest
    from prep.storage import Storage

SOURCE = "tar"


def clip_label(clip: dict[str, Any], rule: str, indices: dict[str, int]) -> int:
    """Return the label of a described sample; RowFailure where it is no clip of the dataset."""
    if "failed" in clip:
        reason, detail = clip["failed"]
        raise RowFailure(Reason(reason), detail)
    stated = clip["labels"][rule]
    if isinstance(stated, str):
        raise RowFailure(Reason.BAD_LABEL, stated)
    return label_index((stated[0], stated[1]), indices)


def foreign_records(
    path: str, report: dict[str, Any], foreign: dict[str, Any], class_names: tuple[str, ...]
) -> list[ClipRecord]:
    """Return the rows of the index for one shard: of those samples that can be streamed exactly."""
    indices = {name: number for number, name in enumerate(class_names)}
    records = []
    for clip in report["samples"]:
        try:
            label = clip_label(clip, foreign["labels"], indices)
        except RowFailure:
            continue  # the ledger names it
        key = index_key(foreign, path, clip["key"])
        records.append(clip_record(
            path, key, clip, video_id=key, label=label, start_seconds=0.0,
            end_seconds=_seconds(clip), source=SOURCE, short=False,
        ))  # fmt: skip
    return records


def ledger_rows(
    split: str,
    path: str,
    first_row: int,
    report: dict[str, Any],
    foreign: dict[str, Any],
    class_names: tuple[str, ...],
) -> Iterator[Row]:
    """Yield a row of the ledger for every sample of a shard."""
    indices = {name: number for number, name in enumerate(class_names)}
    for number, clip in enumerate(report["samples"]):
        label, end = None, None
        facts: dict[str, Any] = {"source": SOURCE}
        outcome = Outcome(Status.OK)
        try:
            index = clip_label(clip, foreign["labels"], indices)
            label, end = class_names[index] if index >= 0 else None, _seconds(clip)
            facts |= {"seconds": end, "short": False}
        except RowFailure as failure:
            outcome = Outcome(Status.FAILED, failure.reason, failure.detail)
        key = index_key(foreign, path, clip["key"])
        segment = Segment(key, 0.0, end, label, split)
        yield Row(first_row + number, segment, key, None, None, outcome, facts)


def _seconds(clip: dict[str, Any]) -> float:
    return float(clip["num_frames"] * clip["fps"][1] / clip["fps"][0])


def shared_files_of(
    storage: Storage, manifest: Manifest, written: dict[str, bytes]
) -> dict[str, bytes]:
    """Return the files that speak of all splits; a README that was there before is left alone."""
    shared = dict(root_files(storage, manifest, written))
    if not has_our_card(manifest):
        del shared[CARD_PATH]
    return shared


def has_our_card(manifest: Manifest) -> bool:
    """Whether README.md is kprep's to write, or was beside the tars before."""
    found = [foreign_settings(name, split) for name, split in manifest.splits.items()]
    return all(settings is None or settings["card"] for settings in found)


def companion_paths(split: str) -> list[str]:
    """Return the files that a split has besides its shards."""
    return [index_path(split), ledger_path(split), wids_path(split)]


def companions_of(splits: Mapping[str, Iterable[str]]) -> set[str]:
    """Return the files that kprep makes for splits and their tars, by path."""
    return {
        path
        for name, tars in splits.items()
        for path in (*companion_paths(name), *(f"{tar}.idx" for tar in tars))
    }


def is_companion(path: str) -> bool:
    """Whether a path is of the form that kprep gives to a file of a split or a tar."""
    name = path.rpartition("/")[2].partition(".")[0].removeprefix("wids-")
    return path.endswith(".tar.idx") or path in companion_paths(name)
