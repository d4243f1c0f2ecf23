"""The arguments of a command as the dataclass that says what they are."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import Any, TypeVar

import tyro

from fastmoco.errors import UserError

T = TypeVar("T")


def read_arguments(kind: type[T], *, prog: str, args: list[str], **options: Any) -> T:
    """What `args` make of the dataclass `kind`; `options` are tyro.cli's.

    Raises UserError where that is what `kind` or a part of it says of the values. Exits, having shown help or which
    argument is unknown, missing or not of its type.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found: T = tyro.cli(kind, prog=prog, args=args, **options)
    except SystemExit as stop:
        # tyro takes a UserError for a ValueError of a type's own, and shows it in a box that names no option.
        mistake = _cause(stop)
        if mistake is not None:
            raise mistake from None
        if stop.code:
            # Once more, for what it prints to look as it does on the terminal that is there.
            tyro.cli(kind, prog=prog, args=args, **options)
        raise
    sys.stderr.write(said.getvalue())
    return found


def _cause(stop: SystemExit) -> UserError | None:
    """The UserError while which was handled the process was to exit, if any."""
    error: BaseException | None = stop
    while error is not None and not isinstance(error, UserError):
        error = error.__context__
    return error
