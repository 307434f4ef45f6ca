"""The layout of the CVDF mirror of Kinetics, as one table of data, and how its addresses are made.

The mirror publishes no checksums and no index but one list of archive addresses for each split.
Where it changes, the table below is all that has to be corrected.
"""

from __future__ import annotations

import re
import urllib.parse
from dataclasses import dataclass

from prep.errors import UsageError

DEFAULT_BASE = "https://s3.amazonaws.com/kinetics"


@dataclass(frozen=True)
class SplitLayout:
    """Where the archives and lists of one split are; paths are relative to the mirror's base.

    `archives` is a path with one `*`, which stands for part of a file name. `members` says what one
    archive holds: `mixed` classes, or the clips of `one class`. The archives of `read_first` stand
    in no list; their clips win over those of the others.
    """

    version: str
    split: str
    archive_list: str
    archives: str
    members: str
    annotations: str
    read_first: tuple[str, ...] = ()


def _row(version: str, split: str, archives: str, members: str, annotations: str) -> SplitLayout:
    """Fill in what follows one rule on the whole mirror."""
    folder = archives.partition("/")[0]
    prefix = f"k{folder}"
    return SplitLayout(
        version,
        split,
        f"{folder}/{split}/{prefix}_{split}_path.txt",
        archives,
        members,
        f"{folder}/annotations/{annotations}",
        _READ_FIRST.get((version, split), ()),
    )


_READ_FIRST = {("k400", "train"): ("400/replacement_for_corrupted_k400.tgz",)}

# fmt: off
LAYOUTS = (
    #    version      split    archives                              members      annotations
    _row("k400",      "train", "400/train/part_*.tar.gz",            "mixed",     "train.csv"),
    _row("k400",      "val",   "400/val/part_*.tar.gz",              "mixed",     "val.csv"),
    _row("k400",      "test",  "400/test/part_*.tar.gz",             "mixed",     "test.csv"),
    # the .txt lists of Kinetics-600 are complete; its train.csv and val.csv are not
    _row("k600",      "train", "600/train/*.tar.gz",                 "one class", "train.txt"),
    _row("k600",      "val",   "600/val/*.tar.gz",                   "one class", "val.txt"),
    _row("k600",      "test",  "600/test/part_*.tar.gz",             "mixed",     "test.csv"),
    _row("k700-2020", "train", "700_2020/train/k700_train_*.tar.gz", "one class", "train.csv"),
    _row("k700-2020", "val",   "700_2020/val/k700_val_*.tar.gz",     "one class", "val.csv"),
    _row("k700-2020", "test",  "700_2020/test/k700_test_*.tar.gz",   "mixed",     "test.csv"),
)
# fmt: on
VERSIONS = tuple(dict.fromkeys(layout.version for layout in LAYOUTS))


@dataclass(frozen=True)
class ArchiveList:
    """What a list of archives names: paths below the base, and the lines that were refused."""

    archives: tuple[str, ...]
    refused: tuple[str, ...]


def split_layout(version: str, split: str) -> SplitLayout:
    """Return the layout of a split; UsageError for what the mirror does not have."""
    if version == "k700":
        raise UsageError(
            "cvdf:k700 must be another version; the mirror does not have Kinetics-700 of 2019, and "
            "Kinetics-700-2020 is another list of clips; use a folder, or cvdf:k700-2020"
        )
    found = [layout for layout in LAYOUTS if layout.version == version]
    if not found:
        choice = ", ".join(f"cvdf:{name}" for name in VERSIONS)
        raise UsageError(f"cvdf:{version} must be one of {choice}")
    for layout in found:
        if layout.split == split:
            return layout
    choice = ", ".join(layout.split for layout in found)
    raise UsageError(f"split {split!r} of cvdf:{version} must be one of {choice}")


def check_base(base: str) -> str:
    """Return the mirror's base address without a final slash; UsageError when it is none."""
    parts = urllib.parse.urlsplit(base)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise UsageError(
            f"mirror base {base!r} must be an address like {DEFAULT_BASE}, without ? and #"
        )
    return base.rstrip("/")


def address(base: str, path: str) -> str:
    """Return the URL of a path of the mirror; spaces, parentheses and the like are quoted."""
    return f"{base}/{urllib.parse.quote(path, safe='/')}"


def parse_archive_list(text: str, layout: SplitLayout) -> ArchiveList:
    """Read a list of archives: absolute addresses, one a line, on whatever host.

    Only the end of each path counts, which must fit the table (`400/train/part_7.tar.gz`); the host
    and the folders above are left to the configured base. Repeats are dropped, order is kept.
    """
    archives: dict[str, None] = {}
    refused = []
    for line in text.splitlines():
        if not line.strip():
            continue
        path = archive_path(line.strip(), layout)
        if path is None:
            refused.append(line.strip())
        else:
            archives[path] = None
    return ArchiveList(tuple(archives), tuple(refused))


def archive_path(url: str, layout: SplitLayout) -> str | None:
    """Return the path below the base that an address means; None where the table has no such."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        return None
    folders, _, pattern = layout.archives.rpartition("/")
    wanted = folders.split("/")
    names = [urllib.parse.unquote(name) for name in parts.path.split("/")]
    name = names[-1]
    if names[-1 - len(wanted) : -1] != wanted or not _fits(name, pattern):
        return None
    return f"{folders}/{name}"


def _fits(name: str, pattern: str) -> bool:
    """Whether a file name is of the table's form and nothing that could lead elsewhere."""
    before, _, after = pattern.partition("*")
    inside = name[len(before) : len(name) - len(after)]
    return (
        name == f"{before}{inside}{after}"
        and bool(inside)
        and not name.startswith(".")
        and name.isprintable()
        and len(name) <= 200
        and not re.search(r"[/\\]", name)
    )
