"""Choosing a command by its name: `fastmoco COMMAND`, and `fastmoco data COMMAND`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence

from fastmoco.errors import UserError

Command = Callable[[list[str]], int]
"""Takes the arguments after its name, returns the exit status; its docstring is its line in the list of commands."""


def usage(program: str, commands: Mapping[str, Command]) -> str:
    """The text of `program` --help."""
    lines = [f"  {name:<10}{(command.__doc__ or '').strip()}" for name, command in commands.items()]
    return f"usage: {program} COMMAND [OPTIONS]\n\n" + "\n".join(lines) + f"\n\n`{program} COMMAND --help` says more."


def run(program: str, commands: Mapping[str, Command], args: Sequence[str]) -> int:
    """Run the one of `commands` that `args` name; returns the exit status, raises UserError for a mistake."""
    if not args or args[0] in ("-h", "--help"):
        print(usage(program, commands))
        return 0 if args else 2
    name, *rest = args
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(commands)}"
        raise UserError(f"{program}: no command {name!r}: {hint}")
    return commands[name](rest)
