"""Which clips of which roots make a new root, and in which shard each stands: no I/O here.

The plan is a function of the roots' rows and the options alone, so that the same input gives the
same bytes whatever the number of workers or interruptions.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from prep.annotation_labels import difference, kinetics_class_list, told_apart, without_case
from prep.errors import UsageError
from prep.shuffle import place
from prep.text.plain import few

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence
    from fractions import Fraction

OnConflict = Literal["error", "first", "last"]
ClassList = Literal["all", "chosen", "present"]


@dataclass(frozen=True, slots=True)
class Clip:
    """A clip of a root: where its row stands in the root's index of `split`, and what tells it."""

    root: int
    split: str
    row: int
    key: str
    label: str | None
    content_hash: bytes
    entry_bytes: int
    fps: Fraction

    @property
    def identity(self) -> tuple[str, str | None, bytes]:
        """What two clips of one key must agree in to be one clip."""
        return self.split, self.label, self.content_hash


@dataclass(frozen=True)
class Selection:
    """What a new root takes of the clips there are; None: everything."""

    splits: frozenset[str] | None = None
    classes: frozenset[str] | None = None
    per_class: int | None = None
    count: int | None = None
    min_fps: Fraction | None = None

    @property
    def draws(self) -> bool:
        """Whether clips are drawn by more than class, so that rows without one have no place."""
        return any(value is not None for value in (self.per_class, self.count, self.min_fps))


@dataclass
class Chosen:
    """The clips of a new root by split, and what was settled on the way.

    `winners` says for every key in which split and root its clip is, taken or not.
    """

    clips: dict[str, list[Clip]]
    winners: dict[str, tuple[str, int]] = field(default_factory=dict)
    num_equal: int = 0
    num_conflicts: int = 0
    notes: list[str] = field(default_factory=list)


def merge_classes(lists: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return the union of class lists in label order.

    A list that holds all classes of the others keeps its order; else they are sorted as
    `kprep shard` sorts them.
    """
    union = {name for names in lists for name in names}
    for names in lists:
        if set(names) == union:
            return tuple(names)
    return tuple(kinetics_class_list(union))


def kept_classes(
    merged: Sequence[str], selection: Selection, which: ClassList, present: Collection[str]
) -> tuple[str, ...]:
    """Return the class list of the new root, in the order of `merged`."""
    if which == "present":
        return tuple(name for name in merged if name in present)
    if which == "chosen" and selection.classes is not None:
        return tuple(name for name in merged if name in selection.classes)
    return tuple(merged)


def choose(
    clips: Iterable[Clip], selection: Selection, seed: int, on_conflict: OnConflict
) -> Chosen:
    """Take the clips that are asked for, one for each key.

    Equal clips of one key are one. Different ones raise UsageError, unless `on_conflict` says that
    the first or last root's is taken.
    """
    chosen = Chosen({})
    within = (clip for clip in clips if selection.splits is None or clip.split in selection.splits)
    for clip in _one_a_key(within, on_conflict, chosen):
        chosen.winners[clip.key] = (clip.split, clip.root)
        if selection.classes is None or clip.label in selection.classes:
            chosen.clips.setdefault(clip.split, []).append(clip)
    for name in sorted(chosen.clips):
        ordered = sorted(chosen.clips[name], key=lambda clip: (place(clip.key, seed), clip.key))
        fast = _fast_enough(ordered, name, selection.min_fps, chosen.notes)
        chosen.clips[name] = _drawn(fast, name, selection, chosen.notes)
    return chosen


def deal(clips: Sequence[Clip], clips_per_shard: int) -> list[list[Clip]]:
    """Cut shuffled clips into shards, by count alone."""
    return [list(clips[at : at + clips_per_shard]) for at in range(0, len(clips), clips_per_shard)]


def check_classes(wanted: Collection[str], known: Collection[str]) -> None:
    """Raise UsageError for a class that no root has."""
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        raise UsageError(
            f"class {unknown[0]!r} is none of the {len(known)} classes of the source; see "
            "classes.txt, and note that spelling counts"
        )


def case_notes(names: Iterable[str]) -> list[str]:
    """Return a note about classes that differ by case or writing of accents only: they stay two."""
    spelled: dict[str, list[str]] = {}
    for name in names:
        spelled.setdefault(without_case(name), []).append(name)
    several = [found for found in spelled.values() if found[1:]]
    if not several:
        return []
    twice = [" and ".join(told_apart(found)) for found in several]
    return [
        f"classes that differ only by {difference(several)} stay apart: {few(twice, between='; ')}"
    ]


def _one_a_key(clips: Iterable[Clip], on_conflict: OnConflict, chosen: Chosen) -> Iterator[Clip]:
    """Yield one clip for each key, counting what became of the others."""
    found: dict[str, Clip] = {}
    conflicts: dict[str, str] = {}
    for clip in clips:  # the roots in turn
        first = found.setdefault(clip.key, clip)
        if first is clip:
            continue
        if first.identity == clip.identity:
            chosen.num_equal += 1
            continue
        conflicts.setdefault(clip.key, _difference(first, clip))
        chosen.num_conflicts += 1
        if on_conflict == "last":
            found[clip.key] = clip
    if conflicts and on_conflict == "error":
        named = few([f"{key} ({what})" for key, what in conflicts.items()], between="; ")
        raise UsageError(
            f"{len(conflicts)} clips stand in several roots with different content: {named}; "
            "say with --on-conflict first or last whose is taken"
        )
    yield from found.values()


def _difference(one: Clip, other: Clip) -> str:
    if one.split != other.split:
        return f"split {one.split} and {other.split}"
    if one.label != other.label:
        return f"label {one.label!r} and {other.label!r}"
    return "other video bytes"


def _fast_enough(
    clips: list[Clip], split: str, min_fps: Fraction | None, notes: list[str]
) -> list[Clip]:
    """Leave clips of fewer frames a second out, and note how many."""
    fast = clips if min_fps is None else [clip for clip in clips if clip.fps >= min_fps]
    if len(fast) < len(clips):
        notes.append(f"split {split}: {len(clips) - len(fast)} clips below --min-fps are left out")
    return fast


def _drawn(clips: list[Clip], split: str, selection: Selection, notes: list[str]) -> list[Clip]:
    """Return the first clips of the shuffle, so many of each class and so many in all."""
    taken = clips
    if selection.per_class is not None:
        seen: Counter[str | None] = Counter()
        taken = []
        for clip in clips:
            seen[clip.label] += 1
            if seen[clip.label] <= selection.per_class:
                taken.append(clip)
        rare = [f"{label!r} ({count})" for label, count in sorted(seen.items(), key=str)
               if count < selection.per_class]  # fmt: skip
        if rare:
            notes.append(
                f"split {split}: {len(rare)} classes have fewer than {selection.per_class} clips: "
                f"{few(rare)}"
            )
    if selection.count is not None and len(taken) < selection.count:
        notes.append(f"split {split} has only {len(taken)} clips to take {selection.count} from")
    return taken if selection.count is None else taken[: selection.count]
