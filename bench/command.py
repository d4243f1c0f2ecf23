"""Running a benchmark as a command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

from fastmoco.arguments import read_arguments
from fastmoco.errors import UserError

T = TypeVar("T")


def start(main: Callable[[T], int], kind: type[T], module: str) -> NoReturn:
    """Exit with what `main` returns for the dataclass `kind` that the command line of `python -m bench.<module>` says.

    What is wrong with it, or a package that is not there, is told in one line.
    """
    try:
        sys.exit(main(read_arguments(kind, prog=f"python -m bench.{module}", args=sys.argv[1:])))
    except (UserError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
