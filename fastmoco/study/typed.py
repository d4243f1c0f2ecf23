"""TOML values as the fields of dataclasses, with errors that name file, table and key."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fastmoco.errors import UserError

T = TypeVar("T")


def read_table(kind: type[T], table: Mapping[str, Any], where: str) -> T:
    """A `kind`, a dataclass, whose fields are the keys of `table`; `where` names file and table in errors.

    Raises UserError for a key that `kind` lacks, a missing one without a default, or a value of another type.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    require_known(table, fields, where)
    missing = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING and name not in table
    ]
    if missing:
        raise UserError(f"{where}: {missing[0]} is missing")
    return kind(**read_values(kind, table, where))


def read_values(kind: type, table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of `table`, each in the type that the field of dataclass `kind` of its name has."""
    hints = get_type_hints(kind)
    return {name: convert(value, hints[name], f"{where}: {name}") for name, value in table.items()}


def require_known(table: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    """Raise UserError, with the nearest name, for a key of `table` that is not in `known`."""
    for name in table:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}"
            raise UserError(f"{where}: there is no key {name!r}; {hint}")


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value`, as tomllib gives it, in the type `hint`; an array becomes a tuple. Raises UserError for another type."""
    origin = get_origin(hint)
    if origin is Literal:
        if value not in get_args(hint):
            raise UserError(f"{where}: must be one of {', '.join(map(str, get_args(hint)))}, not {value!r}")
        return value
    if origin in (Union, types.UnionType):
        return _one_of(value, get_args(hint), where)
    if origin is tuple:
        return _array(value, get_args(hint), where)
    if hint is float and type(value) is int:
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return read_table(hint, value, where)
    if origin is dict and isinstance(value, dict):
        return value
    # A bool is an int to Python, not to people.
    if isinstance(hint, type) and type(value) is hint:
        return value
    name = {"str": "a text", "int": "a whole number", "float": "a number", "bool": "true or false", "Path": "a path"}
    raise UserError(f"{where}: must be {name.get(getattr(hint, '__name__', ''), 'a table')}, not {value!r}")


def _one_of(value: Any, choices: tuple[Any, ...], where: str) -> Any:
    error: UserError | None = None
    for choice in choices:
        if choice is type(None):
            continue
        try:
            return convert(value, choice, where)
        except UserError as failed:
            error = error or failed
    assert error is not None
    raise error


def _array(value: Any, items: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise UserError(f"{where}: must be an array in [ ], not {value!r}")
    if len(items) == 2 and items[1] is Ellipsis:
        return tuple(convert(item, items[0], where) for item in value)
    if len(value) != len(items):
        raise UserError(f"{where}: needs {len(items)} values, not {len(value)}")
    return tuple(convert(item, kind, where) for item, kind in zip(value, items, strict=True))
