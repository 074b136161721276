"""Commands of `longreach` that other packages bring, found by what they declare when installed.

A package declares a `typer.Typer` as an entry point of the group `longreach.commands`, named as the
command is. It is imported when its command is called or listed, and by nothing that serves.
"""

from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
from typer.core import TyperGroup

GROUP = "longreach.commands"


class Commands(TyperGroup):
    """A group of commands that has those of the entry points as well."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of all commands, those from elsewhere last."""
        return [*super().list_commands(ctx), *sorted(_declared())]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name; None where there is none."""
        own = super().get_command(ctx, cmd_name)
        entry = _declared().get(cmd_name)
        if own is not None or entry is None:
            return own
        command = typer.main.get_command(entry.load())
        command.name = entry.name
        return command


def _declared() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}
