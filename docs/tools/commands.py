"""Write docs/commands.md: every command and option, from the command line itself.

python docs/tools/commands.py
"""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import click

from prep.cli import COMMANDS, kprep

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = Path(__file__).parent.parent / "commands.md"
_INTRODUCTION = """\
# Command line

<!-- Written by docs/tools/commands.py (make docs-pages); do not edit. -->

Every command with every option, as `--help` has them. [The guide](guide.md) says what they are
for, with examples that the tests run; the examples here are checked against the options only.

`kprep --debug COMMAND …` shows tracebacks and what the workers say; `kprep --version` the version.
"""


def page() -> str:
    """Return docs/commands.md."""
    context = click.Context(kprep, info_name="kprep")
    parts = [_INTRODUCTION]
    for name in COMMANDS:
        command = kprep.get_command(context, name)
        assert command is not None
        parts.extend(_sections(command, click.Context(command, context, name), "##"))
    return "\n".join(parts)


def _sections(command: click.Command, context: click.Context, heading: str) -> Iterator[str]:
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"{heading} {context.command_path}\n"
    yield f"```text\n{context.command_path} {usage}\n```\n"
    yield _prose(command.help or "")
    options = [param.get_help_record(context) for param in command.get_params(context)]
    rows = [
        record
        for record in options
        if record is not None and record[1] and "--help" not in record[0]
    ]
    if rows:
        yield "| option | meaning |\n|---|---|"
        yield from (
            f"| `{_cell(names)}` | {_cell(text).replace('<', '&lt;').replace('[', chr(92) + '[')} |"
            for names, text in rows
        )
        yield ""
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from _sections(inner, click.Context(inner, context, name), "###")


def _prose(text: str) -> str:
    """Return a command's docstring as Markdown; what click must not wrap becomes a code block."""
    parts = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        lines = paragraph.splitlines()
        if not lines or lines[0].strip() != "\b":
            parts.append(paragraph.replace("<", "&lt;"))
            continue
        block = textwrap.dedent("\n".join(lines[1:])).rstrip()
        first, _, rest = block.partition("\n")
        if first.endswith(":") and rest:  # "Examples:"
            parts.append(first)
            block = textwrap.dedent(rest)
        parts.append(f"```text\n{block}\n```")
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
