"""What a person should look at before training on a dataset, found in its columns."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prep.clip_statistics import Int64, class_counts, column

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from prep.format import Manifest

_EXAMPLES = 5
_SPLIT_PAIRS = 28  # of eight splits; nobody looks at more
_TINY_SHARE = 0.1  # of the split's median class
_MISSING_SHARE = 0.05


@dataclass(frozen=True)
class Finding:
    """One thing to look at: a sentence, why it matters, and some names."""

    kind: str
    title: str
    advice: str
    examples: tuple[str, ...] = ()


def find_warnings(manifest: Manifest, tables: Mapping[str, pa.Table]) -> list[Finding]:
    """Look for leaks between splits, clips that repeat, odd classes and missing rows.

    `tables` holds each split's index.
    """
    return [
        *_shared_videos(tables),
        *_same_content(tables),
        *_similar_keys(tables),
        *_overlaps(tables),
        *_classes(manifest, tables),
        *_missing(manifest),
        *_short(tables),
    ]


def _shared_videos(tables: Mapping[str, pa.Table]) -> Iterator[Finding]:
    """Videos of which two splits have clips.

    Ids that are paths of files say nothing here: two splits can come from two folders in which
    different videos have the same name.
    """
    videos = {name: _video_ids(table) for name, table in sorted(tables.items())}
    for first, second in itertools.islice(itertools.combinations(videos, 2), _SPLIT_PAIRS):
        shared = videos[first].filter(pc.is_in(videos[first], value_set=videos[second]))
        if len(shared):
            yield Finding(
                "leak",
                f"{_count(len(shared), 'video')} in both {first} and {second}",
                "A model that is trained on one split and evaluated on the other has seen them.",
                _names(shared),
            )


def _video_ids(table: pa.Table) -> pa.Array:
    ids = pc.unique(table["video_id"])
    is_path = pc.match_substring_regex(ids, r"[/.]")
    return ids.filter(pc.invert(is_path)).sort()


def _same_content(tables: Mapping[str, pa.Table]) -> Iterator[Finding]:
    """Clips whose bytes are equal."""
    parts = [
        pa.table(
            {
                "hash": table["content_hash"].cast(pa.binary()),
                "key": table["key"],
                "split": pa.array(np.full(table.num_rows, number, np.int32)),
            }
        )
        for number, (_, table) in enumerate(sorted(tables.items()))
    ]
    if not parts:
        return
    clips = pa.concat_tables(parts)
    # one thread: see parquet.py
    across = clips.group_by("hash", use_threads=False).aggregate(
        [("key", "min"), ("split", "min"), ("split", "max")]
    )
    across = across.filter(pc.not_equal(across["split_min"], across["split_max"]))
    within = clips.group_by(["hash", "split"], use_threads=False).aggregate(
        [("key", "count"), ("key", "min")]
    )
    within = within.filter(pc.greater(within["key_count"], 1))
    for kind, title, advice, found in (
        (
            "leak",
            "in more than one split, byte for byte",
            "They leak from training into evaluation.",
            across,
        ),
        (
            "duplicate",
            "more than once in a split, byte for byte",
            "They count twice in training; the same file may stand under two names.",
            within,
        ),
    ):
        if found.num_rows:
            keys = found.sort_by("key_min")["key_min"]
            yield Finding(kind, f"{_count(len(keys), 'clip')} {title}", advice, _names(keys))


def _similar_keys(tables: Mapping[str, pa.Table]) -> Iterator[Finding]:
    """Keys that only case, or `-` for `_`, tells apart: some file systems and people do not."""
    if not tables:
        return
    keys = pa.concat_tables([table.select(["key"]) for _, table in sorted(tables.items())])
    plain = pc.replace_substring(pc.utf8_lower(keys["key"]), "-", "_")
    groups = keys.append_column("plain", plain).group_by("plain", use_threads=False)
    found = groups.aggregate([("key", "count_distinct"), ("key", "min")])
    found = found.filter(pc.greater(found["key_count_distinct"], 1)).sort_by("key_min")
    if found.num_rows:
        yield Finding(
            "similar keys",
            f"{_count(found.num_rows, 'group')} of keys that only case or '-' for '_' tells apart",
            "Unpacked on a file system that ignores case, one replaces the other.",
            _names(found["key_min"]),
        )


def _overlaps(tables: Mapping[str, pa.Table]) -> Iterator[Finding]:
    """Clips of one video whose segments share time."""
    for name, table in sorted(tables.items()):
        rows = overlapping_rows(table)
        if len(rows):
            yield Finding(
                "overlap",
                f"{_count(len(rows), 'clip')} of {name} overlapping another clip of the video",
                "Nearly the same pictures count more than once.",
                _names(table["key"].take(pa.array(rows[:_EXAMPLES]))),
            )


def overlapping_rows(table: pa.Table) -> Int64:
    """Return the rows of an index that begin before an earlier segment of their video has ended.

    Clips that were cut before they came to us (start 0, a key of another form) are left out: where
    in their video they stood is not known.
    """
    prefix = pc.binary_join_element_wise(table["video_id"], "", "_")
    key = table["key"]
    named = pc.or_(
        pc.equal(pc.utf8_slice_codeunits(key, 0, 12), prefix),
        pc.equal(pc.utf8_slice_codeunits(key, 1, 13), prefix),
    )
    start, end = column(table, "start_seconds"), column(table, "end_seconds")
    known = pc.fill_null(named, fill_value=False).combine_chunks().to_numpy(zero_copy_only=False)
    usable = np.flatnonzero((known | (start > 0)) & np.isfinite(start) & np.isfinite(end))
    if not usable.size:
        return usable
    ids = table["video_id"].combine_chunks().dictionary_encode().indices.to_numpy()[usable]
    start, end = start[usable], end[usable]
    order = np.lexsort((end, start, ids))
    ids, start, end = ids[order], start[order], end[order]
    # the latest end so far within a video: ranks of (video, end) make one ascending scale
    rank = np.empty(len(ids), np.int64)
    rank[np.lexsort((end, ids))] = np.arange(len(ids))
    latest = np.maximum.accumulate(rank)
    by_rank = np.empty(len(ids))
    by_rank[rank] = end
    overlaps = (ids[1:] == ids[:-1]) & (start[1:] < by_rank[latest[:-1]])
    return np.sort(usable[order[1:][overlaps]])


def _classes(manifest: Manifest, tables: Mapping[str, pa.Table]) -> Iterator[Finding]:
    names = np.array(manifest.class_names, dtype=object)
    for name, table in sorted(tables.items()):
        counts = class_counts(table, len(names))
        unlabelled, counts = int(counts[-1]), counts[:-1]
        if unlabelled and unlabelled < table.num_rows:
            yield Finding(
                "unlabelled",
                f"{_count(unlabelled, 'clip')} of {name} without a class",
                "They cannot be trained on or scored.",
            )
        if not counts.any():
            continue
        empty = np.flatnonzero(counts == 0)
        if empty.size:
            yield Finding(
                "empty class",
                f"{_count(len(empty), 'class')} of {name} without a clip",
                "A model never learns them, or is never asked about them.",
                tuple(names[empty[:_EXAMPLES]]),
            )
        limit = _TINY_SHARE * float(np.median(counts[counts > 0]))
        tiny = np.flatnonzero((counts > 0) & (counts < limit))
        if tiny.size:
            tiny = tiny[np.argsort(counts[tiny], kind="stable")]
            yield Finding(
                "tiny class",
                f"{_count(len(tiny), 'class')} of {name} with less than a tenth of the usual clips",
                "Accuracy on them says little; weight or leave out.",
                tuple(f"{names[index]} ({counts[index]})" for index in tiny[:_EXAMPLES]),
            )


def _missing(manifest: Manifest) -> Iterator[Finding]:
    for name, split in sorted(manifest.splits.items()):
        lost = split.outcomes.get("failed", 0) + split.outcomes.get("pending", 0)
        if split.num_rows and lost / split.num_rows > _MISSING_SHARE:
            yield Finding(
                "missing",
                f"{100 * lost / split.num_rows:.0f} % of the rows of {name} have no clip",
                "Results are not comparable with those on the whole list.",
            )


def _short(tables: Mapping[str, pa.Table]) -> Iterator[Finding]:
    for name, table in sorted(tables.items()):
        short = int(pc.sum(table["short"].cast("int64")).as_py() or 0)
        if short:
            yield Finding(
                "short",
                f"{_count(short, 'clip')} of {name} shorter than annotated",
                "Their source ended earlier or began later; training leaves out those that are too "
                "short for it.",
            )


def _count(count: int, noun: str) -> str:
    plural = {"class": "classes"}.get(noun, f"{noun}s")
    return f"{count:,} {noun if count == 1 else plural}"


def _names(values: Any) -> tuple[str, ...]:
    return tuple(str(value.as_py()) for value in values[:_EXAMPLES])
