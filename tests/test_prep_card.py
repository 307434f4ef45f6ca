"""The dataset card: what it says follows from the dataset, is safe to show, and its programs run."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from markdown_it import MarkdownIt

from prep.dataset_card import RowTally, card_of_root, dataset_card, tally_rows
from prep.format import FileEntry, Manifest, Shard, Split, read_manifest
from prep.ledger import SCHEMA
from prep.markdown_text import inline
from prep.profile import PROFILES
from prep.storage import Storage

HOSTILE = (
    "<script>alert(1)</script>",
    "a | b\n| x | y |",
    "![x](http://evil.example/a.png)",
    "# heading\n---\nconfigs: []",
    "`code` **bold** _it_ [link](javascript:alert(1))",
    "www.evil.example https://evil.example a@evil.example",
    "&lt;b&gt;",
    "\u202egnp.exe\x00\x1b[31m",
    "back\\slash \\| pipe",
)


def manifest(names=("left", "up"), tools=None, splits=("train", "val")) -> Manifest:
    made = {
        name: Split(
            fingerprint="0" * 64,
            num_clips=3,
            num_rows=6,
            outcomes={"ok": 3, "failed": 2, "duplicate": 1, "pending": 0},
            shards=(Shard(f"{name}/{name}-000000.tar", 3),),
            settings={"annotations_sha256": "ab" * 32, "seed": 7, "clips_per_shard": 1000},
            tools=tools or {"kprep": "0.1.0", "ffmpeg": "ffmpeg version 9"},
        )
        for name in splits
    }
    files = {f"{name}/{name}-000000.tar": FileEntry(4096, "1" * 64) for name in splits}
    return Manifest(PROFILES["small"], tuple(names), made, files)


def card(of: Manifest, **tally) -> str:
    return dataset_card(of, {name: RowTally(**tally) for name in of.splits}).decode()


def front_matter(text: str) -> dict:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def rendered(text: str) -> list:
    """Return the flat tokens of the card's body, as GitHub's Markdown has it."""
    body = text.split("---\n", 2)[2]
    found = []
    for token in MarkdownIt("commonmark", {"html": True}).enable("table").parse(body):
        found += [token, *(token.children or ())]
    return found


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_strangers_is_shown_and_is_no_markup(text):
    for wrapped in (inline(text), f"| {inline(text)} | 1 |"):
        head = "| a | b |\n| --- | --- |\n" if wrapped.startswith("|") else "so: "
        tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(head + wrapped)
        flat = [child for token in tokens for child in [token, *(token.children or ())]]
        kinds = {token.type for token in flat}
        assert not kinds & {"html_inline", "html_block", "link_open", "image", "code_inline",
                            "strong_open", "em_open", "heading_open", "hr"}, kinds  # fmt: skip
        assert len([token for token in flat if token.type == "tr_open"]) in (0, 2)
        shown = "".join(token.content for token in flat if token.type in ("text", "text_special"))
        wanted = re.sub(r"[\x00-\x20\u202e]+", " ", text).strip()
        assert wanted in shown
    autolinks = r"(?<!\\)(www\.|https?:|@)"  # GitHub makes links of these where nothing is escaped
    assert not re.search(autolinks, inline(text))


def test_hostile_names_reasons_sources_and_tools_leave_the_card_whole():
    names = tuple(f"{text} {number}" for number, text in enumerate(HOSTILE))
    plain = card(manifest(), failures={"missing": 2}, sources={"folder": 3})
    text = card(
        manifest(names, tools=dict.fromkeys(HOSTILE, HOSTILE[1])),
        failures=dict.fromkeys(HOSTILE, 2),
        sources=dict.fromkeys(HOSTILE, 3),
    )
    assert front_matter(text) == front_matter(plain)
    kinds = {token.type for token in rendered(text)}
    assert kinds <= {token.type for token in rendered(plain)}
    headings = [token for token in rendered(text) if token.type == "heading_open"]
    assert len(headings) == len([token for token in rendered(plain) if token.type == "heading_open"])  # fmt: skip


@pytest.mark.parametrize(
    ("stored", "read"),
    [("30", "15"), ("15", "15"), ("10", "10"), ("15/2", '"15/2"'), ("30000/1001", "15")],
)
def test_the_card_reads_no_more_frames_than_are_stored(stored, read):
    profile = replace(PROFILES["small"], name="mine", fps=Fraction(stored))
    assert f"frames=16, fps={read}, batch_size=8" in card(replace(manifest(), profile=profile))


def test_the_front_matter_lists_the_tars_and_nothing_else():
    values = front_matter(card(manifest()))
    files = values["configs"][0]["data_files"]
    assert files == [
        {"split": "train", "path": "train/*.tar"},
        {"split": "val", "path": "val/*.tar"},
    ]
    assert set(values) == {"configs", "license", "task_categories", "tags"}


def test_failures_stand_by_reason_and_split():
    tallies = {
        "train": RowTally(failures={"too short": 1, "missing": 1}, sources={"cvdf": 3}),
        "val": RowTally(failures={"missing": 2}, sources={"youtube": 3}, num_short=2),
    }
    text = dataset_card(manifest(), tallies).decode()
    assert "| missing | no source has a file for this row | 1 | 2 |" in text
    assert "| too short | less than --min-seconds | 1 | 0 |" in text
    assert "| train | 6 | 3 | 2 | 1 | 0 |" in text
    assert "2 clips are shorter than annotated" in text


@pytest.mark.parametrize(
    ("sources", "says", "does_not_say"),
    [
        (("cvdf",), "CC BY 4.0), by Google", "unknown to kprep"),
        (("youtube",), "YouTube's terms of service", "unknown to kprep"),
        (("folder", "folder-2"), "folder, folder-2: unknown to kprep. Ask", "terms of service"),
        (("cvdf", "folder"), "folder: unknown to kprep", "nothing"),
        ((), "its sources: unknown to kprep", "terms of service"),
    ],
)
def test_the_terms_follow_from_the_sources(sources, says, does_not_say):
    text = card(manifest(), sources=dict.fromkeys(sources, 1))
    assert says in text
    assert does_not_say not in text


def test_the_tally_of_a_ledger():
    rows = [
        {"status": "ok", "source": "folder", "seconds": 1.5, "short": True},
        {"status": "ok", "source": "cvdf", "seconds": 0.5, "short": False},
        {"status": "ok", "source": "folder", "seconds": 2.0, "short": False},
        {"status": "failed", "reason": "missing"},
        {"status": "failed", "reason": "truncated", "seconds": 9.0},
        {"status": "failed", "reason": "truncated"},
        {"status": "pending"},
        {"status": "duplicate"},
    ]
    table = pa.Table.from_pylist([{"row": n, "detail": "", **row} for n, row in enumerate(rows)],
                                 schema=SCHEMA)  # fmt: skip
    tally = tally_rows(table)
    assert tally == RowTally({"truncated": 2, "missing": 1}, {"folder": 2, "cvdf": 1}, 4.0, 1)
    assert [*tally.failures] == ["truncated", "missing"]
    assert tally_rows(table.slice(0, 0)) == RowTally()


def test_a_published_card_follows_from_the_root_alone(motion_dataset, tmp_path):
    """The same manifest and ledgers give the same bytes, wherever they stand and whenever."""
    storage = Storage(str(motion_dataset))
    text = (motion_dataset / "README.md").read_text()
    assert card_of_root(storage, read_manifest(storage)) == text.encode()
    copy = tmp_path / "elsewhere"
    (copy / "ledger").mkdir(parents=True)
    for name in ("manifest.json", "ledger/train.parquet", "ledger/val.parquet"):
        (copy / name).write_bytes((motion_dataset / name).read_bytes())
    there = Storage(str(copy))
    assert card_of_root(there, read_manifest(there)) == text.encode()
    assert str(motion_dataset) not in text
    assert "| train | 163 | 160 | 3 | 0 | 0 |" in text  # conftest.motion_videos
    assert "| empty file | the file has no bytes | 1 | 0 |" in text
    (copy / "ledger/val.parquet").write_bytes(b"x")
    damaged = card_of_root(there, read_manifest(there)).decode()
    assert "| val | unknown: its ledger cannot be read | 40 |" in damaged


READERS = ("kprep", "webdataset", "wids", "Megatron-Energon", "Hugging Face datasets")


@pytest.mark.slow
def test_every_program_of_the_card_runs(motion_dataset, tmp_path):
    root = Path(shutil.copytree(motion_dataset, tmp_path / "root"))
    text = (root / "README.md").read_text()
    programs = re.findall(r"With ([^\n]+):\n\n```python\n(.*?)```", text, re.DOTALL)
    assert tuple(name for name, _ in programs) == READERS
    for name, code in programs:
        done = subprocess.run(
            [sys.executable, "-c", f"ROOT = {str(root)!r}\n{code}"],
            capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path,
            env={**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert done.returncode == 0, f"{name}: {done.stderr[-2000:]}"
        key = r"(down|left|right|up)-\d{4}-[0-9a-f]{10}"
        assert re.search(key, done.stdout), f"{name}: {done.stdout}"


def test_the_card_of_an_unlabelled_dataset_names_no_class():
    assert "Classes:" not in card(manifest(names=()))
    many = card(manifest(names=tuple(f"class {number}" for number in range(400))))
    assert "class 11 and 388 more; all of them in `classes.txt`" in many


def test_the_card_of_a_copy_says_what_it_was_made_from():
    of = manifest()
    for name, split in of.splits.items():
        settings = {
            "made_by": "kprep subset",
            "made_from": ["ab" * 32],
            "annotations_sha256": "`<b>",
        }
        of.splits[name] = replace(split, settings=settings)
    text = card(of)
    assert f"- val: made by kprep subset, made from {'ab' * 32}" in text
    assert "<b>" not in text
    assert "annotation list" not in text  # that digest is none
