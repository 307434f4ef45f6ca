"""`kprep info`: what a dataset holds, for a terminal and for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prep.errors import UsageError
from prep.format.layout import FORMAT_VERSION, MANIFEST_PATH
from prep.info import DatasetInfo, SplitInfo, dataset_info, write_ledger_csv
from prep.outside import check_outside
from prep.root_state import unfinished
from prep.source_terms import source_meaning
from prep.storage import Storage
from prep.text.plain import few, setting_text
from prep.text.quantities import size_text
from prep.text.terminal import MARGIN, folded, pair
from prep.write_errors import write_errors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prep.format import Manifest

_ENDS = 3  # classes shown at each end of the balance
_JSON_VERSION = 1

Begun = dict[str, tuple[dict[str, int], dict[str, int]]]


@click.command("info")
@click.argument("root")
@click.option(
    "--json", "as_json", is_flag=True, help="Print JSON instead, as docs/guide.md has it."
)
@click.option(
    "--csv",
    "csv_name",
    type=click.Path(dir_okay=False, allow_dash=True),
    help="Write the ledger of all splits here: what became of every annotation row. With - it is "
    "all that is printed.",
)
def info_command(root: str, as_json: bool, csv_name: str | None) -> None:
    """Show what the dataset at ROOT holds.

    Splits, classes and their balance, clips, hours, bytes, encoding profile, failures by reason,
    what it was made from and with, and the terms of its sources. A split in the making is shown
    too. Reads the manifest, the indices and the ledgers, no clip.

    \b
    Example:
      kprep info dataset/
      kprep info s3://bucket/k400 --json
    """
    storage = Storage(root)
    printed = csv_name == "-"  # a file of that name is ./-
    csv_path = None if csv_name is None else Path(csv_name)
    if printed and as_json:
        raise UsageError("--json and --csv - would both be printed; name a file for the CSV")
    if csv_path is not None and not printed:
        check_outside(csv_path, storage)
    begun = unfinished(storage.local_root) if storage.local_root is not None else {}
    published = not begun or storage.exists(MANIFEST_PATH)
    if csv_path is not None and not published:
        raise UsageError(
            f"--csv: {root} has no published split yet, so there is no ledger to write; leave it"
        )
    if printed:
        with click.open_file("-", "w", encoding="utf-8") as standard_output:
            write_ledger_csv(storage, standard_output)
            standard_output.flush()
        return
    info = dataset_info(storage) if published else None
    if as_json:
        click.echo(json.dumps(info_json(storage.root, info, begun), indent=1))
    else:
        click.echo("\n".join(info_lines(storage.root, info, begun)))
    if csv_path is not None:
        with write_errors(csv_path):
            write_ledger_csv(storage, csv_path)


def info_json(root: str, info: DatasetInfo | None, begun: Begun) -> dict[str, Any]:
    """Return the values of `--json`; fields may be added to them, and none changes its meaning."""
    values: dict[str, Any] = {
        "info_version": _JSON_VERSION,
        "root": root,
        "format_version": FORMAT_VERSION,
        "profile": info and info.manifest.profile.to_json(),
        "class_names": list(info.manifest.class_names) if info else [],
        "splits": {},
        "unfinished": {
            name: {"outcomes": outcomes, "failures": failures}
            for name, (outcomes, failures) in begun.items()
        },
        "terms": info.terms() if info else [],
    }
    for split in info.splits if info else ():
        entry = info.manifest.splits[split.name] if info else None
        values["splits"][split.name] = {
            "clips": split.num_clips,
            "rows": split.num_rows,
            "hours": split.hours,
            "bytes": split.bytes,
            "shards": split.num_shards,
            "short_clips": split.num_short,
            "outcomes": split.outcomes,
            "failures": split.failures,
            "sources": split.sources,
            "clips_by_class": list(split.clips_by_class),
            "clips_without_class": split.num_unlabelled,
            "settings": entry and entry.settings,
            "tools": entry and entry.tools,
            "fingerprint": entry and entry.fingerprint,
        }
    return values


def info_lines(root: str, info: DatasetInfo | None, begun: Begun) -> list[str]:
    """Return the lines for a terminal of 80 columns; what is longer goes on below."""
    lines = folded(root, "", "")
    if info is not None:
        lines += _dataset_lines(info)
    for name, (counts, failures) in begun.items():
        said = ", ".join(f"{count:,} {status}" for status, count in counts.items() if count)
        lines += ["", f"split {name}, not published yet"]
        lines += pair("rows", f"{sum(counts.values()):,}: {said}")
        lines += _reasons(failures)
    if info is not None:
        lines.append("")
        for number, line in enumerate(info.terms()):
            lines += pair("" if number else "terms", line)
    return lines


def _dataset_lines(info: DatasetInfo) -> list[str]:
    profile, names = info.manifest.profile, info.manifest.class_names
    made = (
        f"{float(profile.fps):g} fps, short side {profile.short_side_px} px, "
        f"keyframe every {profile.keyframe_interval_frames} frames, crf {profile.crf}, "
        f"{profile.preset}, {profile.tune}"
    )
    if info.manifest.is_foreign:
        made = "tars of somebody else; each clip has its own codec, rate and size"
    lines = pair("profile", f"{profile.name}: {made}")
    shown = few(names, 4)
    lines += pair("classes", f"{len(names):,}{': ' + shown if names else ''}")
    clips = sum(split.num_clips for split in info.splits)
    hours = sum(split.hours for split in info.splits)
    size = size_text(sum(split.bytes for split in info.splits))
    lines += pair("in all", f"{clips:,} clips, {hours:,.2f} hours, {size}")
    for split in info.splits:
        lines += ["", f"split {split.name}", *_split_lines(split, info.manifest)]
    return lines


def _split_lines(split: SplitInfo, manifest: Manifest) -> list[str]:
    entry = manifest.splits[split.name]
    shards = f"{split.num_shards:,} shard{'s' if split.num_shards != 1 else ''}"
    lines = pair(
        "clips",
        f"{split.num_clips:,} clips, {split.hours:,.2f} hours, {size_text(split.bytes)} "
        f"in {shards}",
    )
    outcomes = ", ".join(f"{count:,} {status}" for status, count in split.outcomes.items() if count)
    lines += pair("rows", f"{split.num_rows:,}: {outcomes}")
    lines += _reasons(split.failures)
    if split.num_short:
        lines += pair("short", f"{split.num_short:,} clips are shorter than annotated")
    lines += _balance(split, manifest.class_names)
    for source, count in split.sources.items():
        lines += pair("source", f"{source}{source_meaning(source)}, {count:,} clips")
    lines += pair("tools", ", ".join(_tool(name, text) for name, text in entry.tools.items()))
    chosen = {name: value for name, value in entry.settings.items() if value not in (None, [], "")}
    settings = "; ".join(
        f"{name.replace('_', ' ')} {setting_text(value)}" for name, value in chosen.items()
    )
    return lines + pair("settings", settings)


def _tool(name: str, text: str) -> str:
    return text if text.startswith(name) else f"{name.replace('_', ' ')} {text}"


def _reasons(failures: dict[str, int]) -> list[str]:
    lines = []
    for reason, count in failures.items():
        lines += folded(reason, f"{'':{MARGIN}}{count:>9,}  ", f"{'':{MARGIN + 11}}")
    return lines


def _balance(split: SplitInfo, names: Sequence[str]) -> list[str]:
    """Return the spread of clips over classes, and the classes at its ends where they differ."""
    if not names:
        return []
    counts = sorted(split.clips_by_class)
    middle = (counts[(len(counts) - 1) // 2] + counts[len(counts) // 2]) / 2
    text = f"{counts[0]:,} to {counts[-1]:,} clips a class, median {middle:,g}"
    empty = counts.count(0)
    if empty:
        text += f"; {empty:,} of {len(names):,} classes have none"
    lines = pair("balance", text)
    if counts[0] != counts[-1]:
        order = sorted(range(len(names)), key=lambda label: (-split.clips_by_class[label], label))
        ends = {"most": order[:_ENDS], "fewest": order[: -_ENDS - 1 : -1]}
        for what, labels in ends.items():
            said = ", ".join(
                f"{names[label]} ({split.clips_by_class[label]:,})" for label in labels
            )
            lines += pair("", f"{what}: {said}")
    if split.num_unlabelled:
        lines += pair("", f"{split.num_unlabelled:,} clips have no class")
    return lines
