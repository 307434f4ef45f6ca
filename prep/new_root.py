"""The plan of a new root: its classes, its clips shard by shard, its ledgers, its fingerprints."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from prep.errors import DatasetError, UsageError
from prep.format import ClipRecord, iter_records, split_fingerprint
from prep.merge_ledger import merge_ledgers
from prep.merge_plan import (
    Chosen,
    Clip,
    case_notes,
    check_classes,
    choose,
    deal,
    kept_classes,
    merge_classes,
)
from prep.merge_sources import SourceRoot, clips_of, foreign_rules, open_sources

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prep.format import Split
    from prep.merge import MergeOptions
    from prep.profile import EncodingProfile


@dataclass
class Plan:
    """Everything that decides the bytes of a new root."""

    sources: list[SourceRoot]
    profile: EncodingProfile
    class_names: tuple[str, ...]
    shards: dict[str, list[list[Clip]]]
    ledgers: dict[str, pa.Table]
    settings: dict[str, dict[str, Any]]
    tools: dict[str, dict[str, str]]
    fingerprints: dict[str, str]
    chosen: Chosen

    @property
    def is_foreign(self) -> bool:
        """Whether samples are copied as they are, without a sidecar of kprep's."""
        return self.sources[0].manifest.is_foreign

    @property
    def identity(self) -> str:
        """The sha256 of what decides the bytes: another one is another root."""
        values = {
            "fingerprints": self.fingerprints,
            "class_names": self.class_names,
            "settings": self.settings,
            "sources": [source.digest for source in self.sources],
        }
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def shard_bytes(self, split: str, number: int) -> int:
        """Bytes of the samples of a shard, as they stand in their sources."""
        return sum(clip.entry_bytes for clip in self.shards[split][number])

    def records(self, clips: Sequence[Clip]) -> list[ClipRecord]:
        """Return the rows that the sources' indices have for some clips, in their order."""
        found: dict[tuple[int, str, int], ClipRecord] = {}
        places: dict[tuple[int, str], list[int]] = {}
        for clip in clips:
            places.setdefault((clip.root, clip.split), []).append(clip.row)
        for (root, split), rows in places.items():
            table = self.sources[root].indices[split].take(pa.array(rows, pa.int64()))
            for row, record in zip(rows, iter_records(table), strict=True):
                found[root, split, row] = record
        return [found[clip.root, clip.split, clip.row] for clip in clips]


def plan_root(options: MergeOptions) -> Plan:
    """Read the roots and decide on everything; UsageError where they do not fit together."""
    selection = options.selection
    sources = open_sources(options.roots, selection.splits)
    merged = merge_classes([source.manifest.class_names for source in sources])
    if selection.classes is not None:
        check_classes(selection.classes, merged)
    clips = (clip for number, source in enumerate(sources) for clip in clips_of(number, source))
    chosen = choose(clips, selection, options.seed, options.on_conflict)
    found = {clip.label for taken in chosen.clips.values() for clip in taken if clip.label}
    chosen.notes += case_notes(merged)
    names = kept_classes(merged, selection, options.class_list, found)
    _check_foreign(sources, names)
    per_shard = options.clips_per_shard or _clips_per_shard(sources)
    shards = {name: deal(taken, per_shard) for name, taken in sorted(chosen.clips.items()) if taken}
    _note_empty(sources, shards, chosen)
    return Plan(
        sources=sources,
        profile=sources[0].manifest.profile,
        class_names=names,
        shards=shards,
        ledgers={name: _ledger(options, sources, chosen, name) for name in shards},
        settings={name: _settings(options, sources, name, per_shard) for name in shards},
        tools={name: _tools(sources, name) for name in shards},
        fingerprints={
            name: _fingerprint(sources, names, [clip for shard in shards[name] for clip in shard])
            for name in shards
        },
        chosen=chosen,
    )


def _clips_per_shard(sources: Sequence[SourceRoot]) -> int:
    found = [
        split.settings.get("clips_per_shard")
        for source in sources
        for split in source.manifest.splits.values()
    ]
    common = found[0]
    if isinstance(common, int) and common > 0 and found.count(common) == len(found):
        return common
    return sources[0].manifest.profile.usual_clips_per_shard


def _check_foreign(sources: Sequence[SourceRoot], names: tuple[str, ...]) -> None:
    """Raise UsageError where samples that are copied as they are would not say their labels."""
    if not sources[0].manifest.is_foreign:
        return
    if len({source.manifest.class_names for source in sources}) > 1:
        raise UsageError(
            "these roots were indexed from somebody else's tars, whose labels are not rewritten, "
            "and their class lists differ; index each again with one list of all classes "
            "(`kprep index ROOT --classes FILE --force`)"
        )
    rules = set()
    for source in sources:
        if source.manifest.class_names != names:
            raise UsageError(
                f"{source.storage.root} was indexed from somebody else's tars, whose labels are "
                "not rewritten, so its class list cannot change; use --class-list all"
            )
        for name, split in source.manifest.splits.items():
            rules.add(json.dumps(_rules(name, split), sort_keys=True))
    if len(rules) != 1:
        raise UsageError(
            "these roots were indexed with different label rules; index them alike to merge them"
        )


def _note_empty(
    sources: Sequence[SourceRoot], shards: dict[str, list[list[Clip]]], chosen: Chosen
) -> None:
    empty = sorted({name for source in sources for name in source.indices} - set(shards))
    if not shards:
        raise UsageError("no clip is left by these options, so there is nothing to make")
    chosen.notes += [f"split {name} is left out: no clip of it is left" for name in empty]


def _ledger(
    options: MergeOptions, sources: Sequence[SourceRoot], chosen: Chosen, name: str
) -> pa.Table:
    ledgers = {
        number: source.ledgers[name]
        for number, source in enumerate(sources)
        if name in source.ledgers
    }
    taken = frozenset(clip.key for clip in chosen.clips[name])
    return merge_ledgers(name, ledgers, chosen.winners, taken, options.selection)


def _settings(
    options: MergeOptions, sources: Sequence[SourceRoot], name: str, per_shard: int
) -> dict[str, Any]:
    """Return what decided the contents: which splits were put together, and the options."""
    selection = options.selection
    parents = [source.manifest.splits[name] for source in sources if name in source.manifest.splits]
    chosen = {
        "classes": sorted(selection.classes) if selection.classes is not None else None,
        "per_class": selection.per_class,
        "count": selection.count,
        "min_fps": str(selection.min_fps) if selection.min_fps is not None else None,
        "on_conflict": options.on_conflict if options.on_conflict != "error" else None,
    }
    settings: dict[str, Any] = {
        "made_by": options.made_by,
        "seed": options.seed,
        "clips_per_shard": per_shard,
        **{option: value for option, value in chosen.items() if value is not None},
        "made_from": [split.fingerprint for split in parents],
    }
    lists = sorted({digest for split in parents for digest in _annotation_lists(split.settings)})
    if len(lists) == 1:
        settings["annotations_sha256"] = lists[0]
    elif lists:
        settings["annotation_lists"] = lists
    if sources[0].manifest.is_foreign:
        settings["foreign"] = _rules(name, parents[0])
    return settings


def _rules(name: str, split: Split) -> dict[str, Any]:
    """Return how a new root's samples are read: keys are unique there, and the card is ours."""
    return {**foreign_rules(name, split), "keys": "member", "card": True}


def _annotation_lists(settings: dict[str, Any]) -> list[str]:
    """Return the sha256 of every list that a split goes back to."""
    several = settings.get("annotation_lists") or []
    if not isinstance(several, list):
        raise DatasetError(
            f"a split has the setting annotation_lists {several!r}, which is no list"
        )
    found = [settings.get("annotations_sha256"), *several]
    return [digest for digest in found if isinstance(digest, str)]


def _tools(sources: Sequence[SourceRoot], name: str) -> dict[str, str]:
    """Return the tools that made the clips; several versions side by side."""
    found: dict[str, set[str]] = {}
    for source in sources:
        if name in source.manifest.splits:
            for tool, version in source.manifest.splits[name].tools.items():
                found.setdefault(tool, set()).add(version)
    return {tool: "; ".join(sorted(versions)) for tool, versions in sorted(found.items())}


def _fingerprint(sources: Sequence[SourceRoot], names: Sequence[str], clips: Sequence[Clip]) -> str:
    """Return the fingerprint that the split will have; known before a byte is copied."""
    frames: dict[tuple[int, str], list[int]] = {}
    labels = {name: index for index, name in enumerate(names)}
    for clip in clips:
        at = (clip.root, clip.split)
        if at not in frames:
            frames[at] = sources[clip.root].indices[clip.split]["num_frames"].to_pylist()
    table = pa.table(
        {
            "key": [clip.key for clip in clips],
            "num_frames": [frames[clip.root, clip.split][clip.row] for clip in clips],
            "label": [labels[clip.label] if clip.label is not None else -1 for clip in clips],
            "content_hash": pa.array([clip.content_hash for clip in clips], pa.binary(16)),
        }
    )
    return split_fingerprint(table)
