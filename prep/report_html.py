"""The report as one HTML page that asks the network for nothing.

Its script and style are allowed by their hashes and pictures as data: URIs only, so that not even
a label that becomes markup by a mistake could run or load anything.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from prep.format.layout import FORMAT_VERSION
from prep.html_plots import COLOURS, legend, plot
from prep.report_tables import (
    class_balance,
    failures_table,
    picture_sizes,
    profile_list,
    provenance_table,
    splits_table,
)
from prep.text.html import script_json, text
from prep.text.quantities import size_text

if TYPE_CHECKING:
    from typing import Any

    from prep.format import Manifest
    from prep.report import Report
    from prep.sampled_clips import SampledClip

_PARTS = Path(__file__).parent / "report_page"


def report_page(report: Report, seed: int) -> bytes:
    """Return the page; the same report gives the same bytes."""
    info = report.info
    names = [split.name for split in info.splits]
    colours = {name: f"s{number % COLOURS}" for number, name in enumerate(names)}
    style = (_PARTS / "report.css").read_text(encoding="utf-8")
    script = (_PARTS / "report.js").read_text(encoding="utf-8")
    title = _title(info.root)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(style, script)}">',
        '<meta name="referrer" content="no-referrer">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',
        f"<title>{text(title)}: kprep report</title>",
        f"<style>{style}</style>",
        "</head>",
        "<body>",
        _header(report, title),
        "<main>",
        _findings(report),
        _clips(report, seed),
        _numbers(report, colours),
        class_balance(info, colours),
        failures_table(info, colours),
        _origin(report),
        "</main>",
        _footer(report),
        f'<script type="application/json" id="data">{script_json(_data(report))}</script>',
        f"<script>{script}</script>",
        "</body>",
        "</html>",
        "",
    ]
    return "\n".join(parts).encode("utf-8")


def _policy(style: str, script: str) -> str:
    def allowed(code: str) -> str:
        digest = hashlib.sha256(code.encode("utf-8")).digest()
        return f"'sha256-{base64.b64encode(digest).decode()}'"

    return (
        f"default-src 'none'; img-src data:; style-src {allowed(style)}; "
        f"script-src {allowed(script)}; base-uri 'none'; form-action 'none'"
    )


def _title(root: str) -> str:
    """Return the name of a root: the address of a bucket, or only the folder's own name."""
    return root if "://" in root else root.rstrip("/").rpartition("/")[2] or root


def _header(report: Report, title: str) -> str:
    info, profile = report.info, report.info.manifest.profile
    clips = sum(split.num_clips for split in info.splits)
    lost = sum(
        split.outcomes.get(status, 0) for split in info.splits for status in ("failed", "pending")
    )  # a duplicate's clip is that of the row before
    tiles = {
        "clips": f"{clips:,}",
        "hours": f"{sum(split.hours for split in info.splits):,.2f}",
        "size": size_text(sum(split.bytes for split in info.splits)),
        "classes": f"{len(info.manifest.class_names):,}",
        "splits": f"{len(info.splits)}",
        "rows without a clip": f"{lost:,}",
    }
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles.items())
    links = (
        ("warnings", "Warnings"), ("clips", "Clips"), ("numbers", "Distributions"),
        ("classes", "Classes"), ("rows", "What is missing"), ("origin", "How it was made"),
    )  # fmt: skip
    jumps = "".join(f'<a href="#{target}">{name}</a>' for target, name in links)
    made = (
        f"Video clips at {float(profile.fps):g} frames a second, short side "
        f"{profile.short_side_px} pixels"
    )
    if info.manifest.is_foreign:
        made = "Video clips in tars of somebody else, each with its own codec, rate and size"
    return (
        f"<header><h1>{text(title)}</h1>"
        f'<p class="soft">{made}. Profile {text(profile.name)}, format version '
        f"{FORMAT_VERSION}.</p>"
        f'<nav aria-label="On this page">{jumps}</nav><dl class="tiles">{cells}</dl></header>'
    )


def _findings(report: Report) -> str:
    items = []
    for finding in report.findings:
        names = ", ".join(text(example) for example in finding.examples)
        shown = f'<br><span class="key">{names}</span>' if names else ""
        said = f"<strong>{text(finding.title)}.</strong> {text(finding.advice)}{shown}"
        items.append(f"<li>{said}</li>")
    bad = [clip for clip in report.clips if clip.sprite is None]
    if bad:
        keys = ", ".join(f"{text(clip.row['key'])} {text(clip.problem)}" for clip in bad[:5])
        items.append(
            f"<li><strong>{len(bad)} of the {len(report.clips)} sampled clips cannot be shown."
            "</strong> Run <code>kprep verify --deep</code> to see what else is damaged."
            f'<br><span class="key">{keys}</span></li>'
        )
    body = (
        f'<ul class="findings">{"".join(items)}</ul>'
        if items
        else '<p class="panel"><span class="fine">Nothing to warn of:</span> no video in two '
        "splits, no clip twice, no empty or tiny class.</p>"
    )
    return f'<section id="warnings"><h2>Warnings</h2>{body}</section>'


def _clips(report: Report, seed: int) -> str:
    total = sum(split.num_clips for split in report.info.splits)
    return (
        '<section id="clips"><h2>Clips</h2>'
        f'<p class="soft small">{len(report.clips):,} of {total:,} clips, drawn evenly from all '
        f"classes and splits (seed {seed}). Point at a clip to see it move, or press it.</p>"
        "<noscript><p>The clips need JavaScript; all numbers are below.</p></noscript>"
        '<div class="filters" id="controls" role="search" aria-label="Filter the clips" hidden>'
        '<label>Class<select id="of-class"></select></label>'
        '<label>Split<select id="of-split"></select></label>'
        '<label>Text<input id="text" type="search" placeholder="key, label, video, source" '
        'autocomplete="off" spellcheck="false"></label>'
        '<button class="plain" type="button" id="clear">Clear</button>'
        '<output id="counted" for="of-class of-split text"></output></div>'
        '<ul class="grid" id="grid"></ul>'
        '<p class="nothing" id="nothing" hidden>No sampled clip is like that.</p>'
        '<p class="more"><button class="plain" type="button" id="more" hidden></button></p>'
        "</section>"
    )


def _numbers(report: Report, colours: dict[str, str]) -> str:
    panels = []
    if report.seconds is not None:
        drawn = plot(report.seconds, colours, "Duration of a clip", "s")
        panels.append(f'<div class="panel"><h3>Duration of a clip</h3>{drawn}</div>')
    if report.bytes is not None:
        drawn = plot(report.bytes, colours, "Bytes of a clip", "kB")
        panels.append(f'<div class="panel"><h3>Bytes of a clip</h3>{drawn}</div>')
    panels.append(picture_sizes(report.sizes, colours))
    return (
        '<section id="numbers"><h2>Distributions</h2>'
        f"{legend(list(colours), colours)}"
        f'<div class="panels">{"".join(panels)}</div></section>'
    )


def _origin(report: Report) -> str:
    info = report.info
    terms = "".join(f"<li>{text(line)}</li>" for line in info.terms())
    return (
        '<section id="origin"><h2>How it was made</h2><div class="panels">'
        f'<div class="panel"><h3>Encoding profile</h3>{profile_list(info.manifest.profile)}</div>'
        f'<div class="panel"><h3>Splits</h3>{splits_table(info)}</div></div>'
        f"<h2>From what</h2>{provenance_table(info)}"
        f'<h2>Terms of the sources</h2><div class="panel"><ul class="terms">{terms}</ul></div>'
        "</section>"
    )


def _footer(report: Report) -> str:
    return (
        f"<footer>Made by kprep from the manifest, the indices and {len(report.clips)} clips. "
        "Nothing on this page is fetched from elsewhere.</footer>"
    )


def _data(report: Report) -> dict[str, Any]:
    """Return what the script needs: the sampled clips and the values of the filters."""
    manifest = report.info.manifest
    counts: dict[int, int] = {}
    splits: dict[str, int] = {}
    for clip in report.clips:
        label = int(clip.row["label"])
        counts[label] = counts.get(label, 0) + 1
        splits[clip.split] = splits.get(clip.split, 0) + 1
    classes = [(str(label), f"{_label(manifest, label) or 'no class'} ({count})")
               for label, count in sorted(counts.items())]  # fmt: skip
    return {
        "classes": [("", f"All classes ({len(counts)})"), *classes],
        "splits": [("", f"All splits ({len(splits)})"),
                   *((name, f"{name} ({count})") for name, count in sorted(splits.items()))],
        "clips": [_clip(clip, manifest) for clip in report.clips],
    }  # fmt: skip


def _label(manifest: Manifest, label: int) -> str:
    return manifest.class_names[label] if 0 <= label < len(manifest.class_names) else ""


def _clip(clip: SampledClip, manifest: Manifest) -> dict[str, Any]:
    row, label = clip.row, _label(manifest, clip.row["label"])
    seconds = row["num_frames"] * row["fps_den"] / row["fps_num"]
    size = f"{row['width']} x {row['height']}"
    facts: dict[str, Any] = {
        "key": row["key"],
        "label": label,
        "labelIndex": row["label"],
        "split": clip.split,
        "facts": f"{seconds:.1f} s · {size_text(row['video_bytes'])}",
        "more": (
            f"video {row['video_id']}, from {row['start_seconds']:g} to {row['end_seconds']:g} s, "
            f"source {row['source']}\n{size}, {row['num_frames']} frames, in {row['shard']}"
            + (", shorter than annotated" if row["short"] else "")
        ),
        "words": "\n".join([row["key"], label, row["video_id"], row["source"]]).lower(),
        "problem": clip.problem,
    }
    if clip.sprite is not None:
        encoded = base64.b64encode(clip.sprite.data).decode("ascii")
        facts |= {
            "sprite": f"data:{clip.sprite.kind};base64,{encoded}",
            "frames": clip.sprite.num_frames,
            "size": [clip.sprite.width, clip.sprite.height],
        }
    return facts
