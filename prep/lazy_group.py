"""Groups of commands that are loaded when they are used, so that `--help` answers at once."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import click

from prep.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

NEEDS_TORCH = ("torch", "torchvision")


class LazyGroup(click.Group):
    """Lists commands without importing them.

    `table` maps a name to (module, attribute, one line of help). Modules that need torch are named
    there as strings only: prep never imports stream or train.
    """

    def __init__(self, *args: Any, table: Mapping[str, tuple[str, str, str]], **more: Any) -> None:
        """Take what click.Group takes, and the table."""
        super().__init__(*args, **more)
        self.table = table

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Return the names, in the order of the table."""
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command; UsageError where it needs torch and there is none."""
        if cmd_name not in self.table:
            return None
        module, attribute, _ = self.table[cmd_name]
        try:
            loaded: click.Command = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] in NEEDS_TORCH:
                path = [ctx.info_name or "", cmd_name] if ctx.parent else [cmd_name]
                raise UsageError(torch_missing(" ".join(path))) from error
            raise
        return loaded

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write each command's line of help."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in self.table.items()])


def torch_missing(command: str) -> str:
    """Return the sentence for a command that needs what is not installed."""
    return f"`kprep {command}` needs torch and torchvision; pip install 'kprep[train]'"
