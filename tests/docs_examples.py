"""The examples of README.md and docs/: found, and run as a reader would.

A fenced block without a language, or with `sh`, that holds a line beginning with `kprep`, `make`,
`pip`, `python` or `torchrun` is an example, and so is every `python` block; `text` marks what is
none (a synopsis, a file tree). The examples of a page run in order in one working directory. The
page can say, in comments that its readers do not see,

    <!-- examples
    given = ["videos", "dataset"]   what the directory holds at first, see `World` in test_docs.py
    [replace]
    "--epochs 45" = "--epochs 1"    so that it takes seconds; longest first, applied to each block
    -->

and in front of a block `<!-- not run: a reason -->`: its commands are then only parsed, with
click's own parser, so that their options exist.
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
        if language in ("python", "toml") or (language in ("", "sh") and starts):
            line = text[: block.start()].count("\n") + 1
            examples.append(Example(name, line, language or "sh", body, block["reason"]))
    return Page(path, examples, settings.get("given", []), settings.get("replace", {}))


def replaced(text: str, page: Page) -> str:
    """Apply a page's replacements, the longest first."""
    for old in sorted(page.replace, key=len, reverse=True):
        text = text.replace(old, page.replace[old])
    return text
