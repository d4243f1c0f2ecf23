"""Commands that pass options on: `fastmoco slurm COMMAND OWN -- RECIPE OPTIONS`."""

from __future__ import annotations

from fastmoco.errors import UserError


def split(args: list[str]) -> tuple[list[str], list[str]]:
    """What stands before the first "--", and what stands after it: the options of `fastmoco pretrain`."""
    if "--" not in args:
        return args, []
    at = args.index("--")
    return args[:at], args[at + 1 :]


def value_of(option: str, args: list[str]) -> str | None:
    """What `args` give `option`, as `--option value` or `--option=value`; the last where there are several."""
    found = None
    for place, word in enumerate(args):
        if word == option and place + 1 < len(args):
            found = args[place + 1]
        elif word.startswith(f"{option}="):
            found = word.partition("=")[2]
    return found


def without(option: str, args: list[str]) -> list[str]:
    """`args` less `option` and its value."""
    kept: list[str] = []
    words = iter(args)
    for word in words:
        if word == option:
            next(words, None)
        elif not word.startswith(f"{option}="):
            kept.append(word)
    return kept


def run_folder(args: list[str]) -> str:
    """What `args` give --out. Raises UserError where they do not."""
    out = value_of("--out", args)
    if not out:
        raise UserError("no run folder: give the options of `fastmoco pretrain` after --, --out FOLDER among them")
    return out
