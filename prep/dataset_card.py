"""The dataset card, README.md: what was made from what, how, with which failures, on which terms.

Its bytes follow from the manifest and the ledgers alone: no clock, host or path. Whatever comes
from annotation lists and sources is escaped, so that a class name cannot become markup.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prep.card_snippets import loading_snippets
from prep.errors import DatasetError, StorageError
from prep.foreign_card import foreign_card
from prep.format.layout import FORMAT_VERSION, ledger_path, yaml_name
from prep.ledger import read_ledger
from prep.markdown_text import inline, table
from prep.outcome import EXPLANATIONS, Reason
from prep.source_terms import source_text, terms
from prep.text.plain import setting_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pyarrow as pa

    from prep.format import Manifest
    from prep.storage import Storage

_NAMES_SHOWN = 12


@dataclass(frozen=True)
class RowTally:
    """What a split's ledger adds to the manifest.

    `failures` counts failed rows by reason and `sources` clips by source, the most frequent first.
    `readable` is False where the ledger is missing or damaged; nothing else is known then.
    """

    failures: dict[str, int] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    num_short: int = 0
    readable: bool = True


def tally_rows(ledger: pa.Table) -> RowTally:
    """Count the rows of a ledger."""
    import pyarrow.compute as pc

    made = ledger.filter(pc.equal(ledger["status"], "ok"))
    failed = ledger.filter(pc.equal(ledger["status"], "failed"))
    seconds = made["seconds"].drop_null().to_numpy()
    return RowTally(
        failures=_counts(failed["reason"]),
        sources=_counts(made["source"].drop_null()),
        seconds=math.fsum(seconds),  # exact, so the same on every machine
        num_short=pc.sum(made["short"].cast("int64")).as_py() or 0,
    )


def card_of_root(
    storage: Storage, manifest: Manifest, written: Mapping[str, bytes] | None = None
) -> bytes:
    """Return the card of a root: of its manifest, and of its ledgers as they stand.

    `written` holds files by path that are about to be written and go before those of the root. A
    ledger that cannot be read is said to be so in the card: another split is still published.
    """
    return dataset_card(
        manifest, {name: _tally(storage, name, written or {}) for name in manifest.splits}
    )


def dataset_card(manifest: Manifest, tallies: Mapping[str, RowTally]) -> bytes:
    """Return README.md: YAML front matter with the globs that Hugging Face needs, then Markdown.

    `tallies` has an entry for every split.
    """
    if manifest.is_foreign:
        return foreign_card(manifest)
    parts = [
        _front_matter(manifest),
        "# Video clips for training, made with kprep",
        _contents(manifest, tallies),
        "## Where the clips come from",
        _origin(manifest, tallies),
        "## How they were made",
        _making(manifest),
        "## What is missing, and why",
        _failures(manifest, tallies),
        "## Terms",
        terms({source for tally in tallies.values() for source in tally.sources}),
        "## Format",
        (
            f"Format version {FORMAT_VERSION}. `docs/format.md` in the source of kprep specifies "
            "it, completely enough to write a reader from, and says under *Changes* how it may "
            "change: fields can be added within a version, none is removed or given another "
            "meaning, and a reader refuses a version that it does not know."
        ),
        "## Loading",
        loading_snippets(sorted(manifest.splits), manifest.profile.fps),
    ]
    return ("\n\n".join(parts) + "\n").encode("utf-8")


def _tally(storage: Storage, split: str, written: Mapping[str, bytes]) -> RowTally:
    path = ledger_path(split)
    try:
        data = written[path] if path in written else storage.read(path)
        return tally_rows(read_ledger(data, storage.where(path)))
    except (DatasetError, StorageError):
        return RowTally(readable=False)


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    counted = column.value_counts()
    pairs = [(str(entry["values"].as_py()), entry["counts"].as_py()) for entry in counted]
    return dict(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))


def _front_matter(manifest: Manifest) -> str:
    """Nothing but split names comes from the data here, and these are words (layout.py)."""
    globs = [
        f'  - split: {yaml_name(name)}\n    path: "{name}/*.tar"'
        for name in sorted(manifest.splits)
    ]
    return "\n".join(
        [
            "---",
            "configs:",
            "- config_name: default",
            "  data_files:",
            *globs,
            "license: other",
            "task_categories: [video-classification]",
            "tags: [video, webdataset, kprep]",
            "---",
        ]
    )


def _contents(manifest: Manifest, tallies: Mapping[str, RowTally]) -> str:
    profile, names = manifest.profile, manifest.class_names
    shown = ", ".join(inline(name) for name in names[:_NAMES_SHOWN])
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    classes = f" Classes: {shown}{more}; all of them in `classes.txt`." if names else ""
    rows: list[list[str | int]] = []
    for name, split in sorted(manifest.splits.items()):
        size = sum(manifest.files[shard.path].bytes for shard in split.shards)
        hours = f"{tallies[name].seconds / 3600:.2f}" if tallies[name].readable else "?"
        rows.append([name, split.num_clips, hours, len(split.shards), size])
    head = ["split", "clips", "hours", "shards", "bytes"]
    return (
        f"Clips of {len(names)} classes at {float(profile.fps):g} frames a second, short side "
        f"{profile.short_side_px} pixels, without sound.{classes}\n\n"
    ) + table(head, rows)


def _origin(manifest: Manifest, tallies: Mapping[str, RowTally]) -> str:
    rows: list[list[str | int]] = []
    for name, split in sorted(manifest.splits.items()):
        for source, count in tallies[name].sources.items():
            rows.append([name, source_text(source), count])
        if not tallies[name].readable:
            rows.append([name, "unknown: its ledger cannot be read", split.num_clips])
    listed = []
    for name, split in sorted(manifest.splits.items()):
        digest = str(split.settings.get("annotations_sha256"))
        if re.fullmatch(r"[0-9a-f]{64}", digest):
            listed.append(f"- {name}: the annotation list with sha256 `{digest}`")
        made = {key: split.settings.get(key) for key in ("made_by", "made_from")}
        said = ", ".join(
            f"{key.replace('_', ' ')} {inline(setting_text(value))}"
            for key, value in made.items()
            if value
        )
        if said:
            listed.append(f"- {name}: {said}")
    text = table(["split", "source", "clips"], rows)
    return text + ("\n\n" + "\n".join(listed) if listed else "")


def _making(manifest: Manifest) -> str:
    profile = manifest.profile
    lines = [
        (
            f"- Profile `{profile.name}`: {float(profile.fps):g} frames a second, constant; short "
            f"side {profile.short_side_px} pixels, square pixels; H.264 ({profile.codec}), crf "
            f"{profile.crf}, preset {profile.preset}, tune {profile.tune}; a keyframe every "
            f"{profile.keyframe_interval_frames} frames, closed; BT.601, limited range, 4:2:0."
        )
    ]
    for name, split in sorted(manifest.splits.items()):
        tools = ", ".join(
            inline(text if text.startswith(tool) else f"{tool.replace('_', ' ')} {text}")
            for tool, text in split.tools.items()
        )
        chosen = {key: split.settings.get(key) for key in ("seed", "clips_per_shard", "limit")}
        settings = ", ".join(
            f"{key.replace('_', ' ')} {inline(str(value))}"
            for key, value in chosen.items()
            if value is not None
        )
        lines.append(f"- {name}: {'; '.join(text for text in (tools, settings) if text)}")
        lines.append(f"  (fingerprint `{split.fingerprint}`)")
    return "\n".join(lines)


def _failures(manifest: Manifest, tallies: Mapping[str, RowTally]) -> str:
    statuses = ("ok", "failed", "duplicate", "pending")
    splits = sorted(manifest.splits.items())
    rows: list[list[str | int]] = [
        [name, split.num_rows, *(split.outcomes.get(status, 0) for status in statuses)]
        for name, split in splits
    ]
    parts = [table(["split", "annotation rows", *statuses], rows)]
    reasons = sorted({reason for tally in tallies.values() for reason in tally.failures})
    if reasons:
        counts: list[list[str | int]] = [
            [
                inline(reason),
                _explanation(reason),
                *(tallies[name].failures.get(reason, 0) for name, _ in splits),
            ]
            for reason in reasons
        ]
        parts.append(table(["reason", "meaning", *(name for name, _ in splits)], counts))
    short = sum(tally.num_short for tally in tallies.values())
    if short:
        parts.append(
            f"{short} clips are shorter than annotated: their source ended earlier, or began later."
        )
    parts.append("`ledger/<split>.parquet` says for every annotation row what became of it.")
    return "\n\n".join(parts)


def _explanation(reason: str) -> str:
    return EXPLANATIONS[Reason(reason)] if reason in set(Reason) else ""
