"""The examples of README.md and docs/: found, and what they are run with.

A fenced block without a language, or with `sh` or `python`, is an example, and each is run: the
shell's command by command. `toml` is parsed. `text` is none; where it begins with `kprep` it is
a synopsis, with a placeholder in each: its command and options must exist. The examples of a page
run in order in one working directory. The page can say, in a comment that its readers do not see,

    <!-- examples
    given = ["videos", "dataset as s3://kprep/k400"]   what is there at first, see `World` in docs_world.py
    [replace]
    "--epochs 45" = "--epochs 1"    so that it takes seconds; longest first, applied to each block
    -->

What is replaced may name an address, as in "{s3}". What cannot be run anywhere stands in
`ONLY_PARSED` in test_docs.py, command by command, and nowhere else.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

LANGUAGES = ("", "sh", "python", "toml", "text", "json")
_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\S*)[^\n]*\n(?P<body>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
_PLACEHOLDER = re.compile(r"\[(--|OPTIONS|ROOT)|\s(A B|[A-Z]{3,})(\s|$)|\s[A-Z]{3,}\.")
_SETTINGS = re.compile(r"<!-- examples\n(.*?)-->", re.DOTALL)


@dataclass(frozen=True)
class Example:
    """One block: where it stands and what it is."""

    page: str
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_synopsis(self) -> bool:
        """Whether it shows what can be typed, and is nothing to be typed."""
        return self.language == "text"

    @property
    def is_script(self) -> bool:
        """Whether it is a shell's script, to be taken as a whole."""
        return self.language == "sh" and self.text.startswith("#!")

    def parts(self) -> list[str]:
        """What is taken at a time: a command line, continued lines joined; else the whole block."""
        if self.is_synopsis:
            return re.sub(r"\n +", " ", self.text).splitlines()
        if self.language != "sh" or self.is_script:
            return [self.text]
        joined = re.sub(r"\\\n\s*", " ", self.text)
        commands = (shlex.split(line, comments=True) for line in joined.splitlines())
        return [shlex.join(words) for words in commands if words]


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
        where = text[: block.start()].count("\n") + 1
        if language not in LANGUAGES:
            raise ValueError(f"{name}:{where}: a block must be one of {LANGUAGES}, not {language}")
        if block["indent"]:
            body = re.sub(rf"^{block['indent']}", "", body, flags=re.MULTILINE)
        synopsis = language == "text" and body.startswith("kprep ")
        if synopsis or language not in ("json", "text"):
            examples.append(Example(name, where, language or "sh", body))
    return Page(path, examples, settings.get("given", []), settings.get("replace", {}))


def replaced(text: str, page: Page, addresses: dict[str, str]) -> str:
    """Apply a page's replacements, the longest first, with {name} as the address of that name."""
    for old in sorted(page.replace, key=len, reverse=True):
        new = page.replace[old]
        for name, address in addresses.items():
            new = new.replace(f"{{{name}}}", address)
        text = text.replace(old, new)
    return text


def has_placeholder(line: str) -> bool:
    """Whether a line stands for many commands: `[--split NAME]`, ROOT, `A B`."""
    return bool(_PLACEHOLDER.search(line))
