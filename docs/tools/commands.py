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

<!-- examples
given = [
    "videos", "k400", "val.csv", "dataset", "tars", "kinetics", "late-videos", "classes.txt as ten.txt",
    "dataset as s3://kprep/k400", "dataset as s3://kprep/words", "tars as s3://kprep/videos",
    "dataset as {web}/k400",
]
[replace]
"s3://bucket/k400" = "s3://kprep/k400"
"s3://bucket/dataset" = "s3://kprep/k400"
"s3://bucket/" = "s3://kprep/"
"https://data.example.org" = "{web}"
"shard videos/ dataset/" = "shard videos/ converted/"
"k400/val kinetics/" = "k400/val cut/"
"--source youtube:" = "--source youtube: --mirror {web}"
"s3://bucket/videos --split 'train=train-*.tar' --split 'val=val-*.tar'" = "s3://kprep/videos --split train=00000.tar --split val=00001.tar"
"push dataset/ s3://bucket/k400" = "push dataset/ s3://kprep/commands"
"pull s3://bucket/k400 dataset/" = "pull s3://kprep/k400 pulled/"
"https://data.example.org/k400 dataset/" = "{web}/k400 fetched/"
"all/ k400/ late-clips/" = "all/ dataset/ kinetics/"
"s3://bucket/k400 extra/ --work /tmp/work" = "s3://kprep/k400 kinetics/ --work work"
"subset k400/" = "subset dataset/"
"k400/val.csv k700_2020/train.csv" = "val.csv val.csv"
"--data k400" = "--data dataset"
"--recipe resnet --nproc 8" = "--recipe tiny --nproc 2 --epochs 1 --output runs/resnet"
"--recipe resnet --set model.name=r3d_18" = "--recipe tiny --epochs 1"
"--recipe resnet" = "--recipe tiny --epochs 1"
"--recipe resnet --resume" = "--recipe tiny --epochs 1 --output runs/resnet --resume"
"bench shard videos/" = "bench shard videos/ --rounds 1 --clips 4"
"--clips 400" = "--clips 4"
"bench stream dataset/" = "bench stream dataset/ --seconds 1 --rounds 1 --batch 4 --workers 1"
"bench stream s3://bucket/dataset" = "bench stream s3://kprep/k400 --seconds 1 --rounds 1 --batch 4 --workers 1"
"bench decode dataset/" = "bench decode dataset/ --clips 4 --rounds 1"
"bench train dataset/ --recipe resnet" = "bench train dataset/ --recipe tiny --steps 2 --rounds 1 --set data.batch_size=4"
"bench train dataset/ --recipe resnet --set model.name=r3d_18" = "bench train dataset/ --recipe tiny --steps 2 --rounds 1 --set data.batch_size=4"
"bench train dataset/ --recipe tiny --steps 5" = "bench train dataset/ --recipe tiny --steps 2 --rounds 1 --set data.batch_size=4"
"--nodes 8 --gpus 8 --workers 10 --batch 24" = "--nodes 1 --gpus 1 --workers 1 --batch 4"
"demo demo/" = "demo demo/ --videos 20"
-->

Every command with every option, as `--help` has them. [The guide](guide.md) says what they are
for, with more examples.

`kprep --debug COMMAND …` shows tracebacks and what the workers say; `kprep --version` the version.
"""  # noqa: E501 - lines of TOML


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
        parts.append(f"```\n{block}\n```")
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
