"""The examples of README.md and docs/: found, and run as a reader would.

A fenced block without a language, or with `sh`, that holds a line beginning with `kprep`, `make`,
`pip`, `python` or `torchrun` is an example, and so is every `python` block; `text` marks what is
none. A block with a bracket as in `[--split NAME]`, or with a
placeholder such as ROOT, is a synopsis: its command and options must exist. The examples of a page run in order in one working directory. The
page can say, in comments that its readers do not see,

    <!-- examples
    given = ["videos", "dataset"]   what the directory holds at first, see `World` in test_docs.py
    [replace]
    "--epochs 45" = "--epochs 1"    so that it takes seconds; longest first, applied to each block
    -->

and in front of a block `<!-- not run: a reason -->`: its commands are then only parsed, with
click's own parser, so that their options exist. Lines of `kprep` in a `text` block are parsed too.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

PROGRAMS = ("kprep", "make", "pip", "python", "torchrun", "srun", "sbatch")
_FENCE = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+?) -->\n+)?"
    r"^(?P<indent> *)```(?P<language>\S*)[^\n]*\n(?P<body>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
_PLACEHOLDER = re.compile(r"\[(--|options|OPTIONS|NAME)|\s(A B|[A-Z]{3,})(\s|$)")
_SETTINGS = re.compile(r"<!-- examples\n(.*?)-->", re.DOTALL)


@dataclass(frozen=True)
class Example:
    """One block: where it stands, what it is, and why it is not run, if it is not."""

    page: str
    line: int
    language: str
    text: str
    reason: str | None

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_synopsis(self) -> bool:
        """Whether it shows what can be typed, and is nothing to be typed."""
        return self.language == "sh" and bool(_PLACEHOLDER.search(self.text))

    def commands(self) -> list[list[str]]:
        """The command lines of a block: continued lines joined, comments dropped."""
        joined = re.sub(r"\\\n\s*", " ", self.text)
        words = (shlex.split(line, comments=True) for line in joined.splitlines())
        return [line for line in words if line]


@dataclass(frozen=True)
class Page:
    """The examples of one page, and what they need."""

    path: Path
    examples: list[Example]
    given: list[str] = field(default_factory=list)
    replace: dict[str, str] = field(default_factory=dict)


def read_page(path: Path, name: str) -> Page:
    """Find the examples of a page."""
    text = path.read_text()
    found = _SETTINGS.search(text)
    settings: dict[str, Any] = tomllib.loads(found[1]) if found else {}
    unknown = set(settings) - {"given", "replace"}
    if unknown:
        raise ValueError(f"{name}: unknown settings {unknown}")
    examples = []
    for block in _FENCE.finditer(text):
        language, body = block["language"], block["body"]
        if block["indent"]:
            body = re.sub(rf"^{block['indent']}", "", body, flags=re.MULTILINE)
        starts = any(line.split(" ")[0] in PROGRAMS for line in body.splitlines())
        shown = language == "text" and all(row.startswith("kprep ") for row in body.splitlines())
        if language in ("python", "toml") or (language in ("", "sh") and starts) or shown:
            line = text[: block.start()].count("\n") + 1
            kind = language if language in ("python", "toml") else "sh"
            reason = block["reason"] or ("it is only shown" if shown else None)
            examples.append(Example(name, line, kind, body, reason))
    return Page(path, examples, settings.get("given", []), settings.get("replace", {}))


def replaced(text: str, page: Page) -> str:
    """Apply a page's replacements, the longest first."""
    for old in sorted(page.replace, key=len, reverse=True):
        text = text.replace(old, page.replace[old])
    return text
