"""Tables of overrides: fields of a recipe and of fine-tuning, by their names."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from fastmoco.errors import UserError
from fastmoco.evaluate.finetune import FinetuneConfig
from fastmoco.study.typed import convert, read_values, require_known
from fastmoco.train.config import Config
from fastmoco.train.recipes import METHODS, find

_GROUPS = ("data", "run", "views", "model", "loss", "optim")
# What the study says itself, elsewhere.
_TAKEN = {
    "data",
    "loader",
    "labels",
    "label",
    "split",
    "file_column",
    "patient_column",
    "split_column",
    "out",
    "resume",
    "seed",
    "device",
    "size",
    "arch",
    "method",
    "engine",
    "zero",
    "knn_every",
}
_TAKEN_OF_FINETUNING = {"mode", "arch", "size"}
# What is trained: all weights of a pretrained encoder, a linear layer on it, all weights from random ones.
TRAINED = ("full", "linear", "scratch")


def recipe_name(domain: str, method: str, *, small: bool) -> str:
    """The recipe of a domain and method."""
    return f"{domain}-{method}" + ("-small" if small else "")


def apply(config: Config, table: Mapping[str, Any], where: str) -> Config:
    """`config` with the fields that `table` names replaced.

    Raises UserError for a key that no recipe has or that the study sets itself, and for a value that does not fit.
    """
    free = _groups_of(config, table, where)
    if table.get("precision") == "auto":
        raise UserError(
            f"{where}: precision: auto is another on another device, and a study is the same on all: name fp32 or bf16"
        )
    changes: dict[str, dict[str, Any]] = {}
    for name, value in table.items():
        hint = get_type_hints(type(getattr(config, free[name])))[name]
        changes.setdefault(free[name], {})[name] = convert(value, hint, f"{where}: {name}")
    try:
        parts = {group: dataclasses.replace(getattr(config, group), **some) for group, some in changes.items()}
        return dataclasses.replace(config, **parts)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _groups_of(config: Config, table: Mapping[str, Any], where: str) -> dict[str, str]:
    """The group of each field that may be set. Raises UserError for a key of `table` that is none of them."""
    fields: dict[str, str] = {}
    for group in _GROUPS:
        fields |= {field.name: group for field in dataclasses.fields(getattr(config, group))}
    free = {name: group for name, group in fields.items() if name not in _TAKEN}
    _refuse_taken(table, _TAKEN, where)
    require_known(table, free, where)
    return free


def of_one(table: Mapping[str, Any], name: str, every: Collection[str], where: str) -> dict[str, Any]:
    """The keys of `table` that hold for `name`, of `every`: those in it, and over them those of its table [.NAME]."""
    return {key: value for key, value in table.items() if key not in every} | _table_of(table, name, where)


def _table_of(table: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    own = table.get(name, {})
    if not isinstance(own, dict):
        raise UserError(f"{where}: {name} must be a table, not {own!r}")
    return own


def check_pretrain(recipe: str, method: str, table: Mapping[str, Any], where: str) -> None:
    """Raise UserError where `table` cannot override `recipe`."""
    config = find(recipe)(Path(), Path())
    # Before the two tables are one, so that a mistake is told with the table that it is in.
    _groups_of(config, _table_of(table, method, where), f"{where}: {method}")
    if apply(config, of_one(table, method, METHODS, where), where).loss.objective == "supcon":
        raise UserError(
            f"{where}: objective: supcon learns from all labels, so that a study's few would no longer be few; choose "
            "another"
        )


def check_finetune(table: Mapping[str, Any], where: str) -> None:
    """Raise UserError where `table` does not fit FinetuneConfig."""
    free: dict[str, Any] = {f.name: f for f in dataclasses.fields(FinetuneConfig) if f.name not in _TAKEN_OF_FINETUNING}
    tables: dict[str, Any] = {trained: _table_of(table, trained, where) for trained in TRAINED}
    inner = ((own, free, f"{where}: {trained}") for trained, own in tables.items())
    for own, known, place in ((table, free | tables, where), *inner):
        _refuse_taken(own, _TAKEN_OF_FINETUNING, place)
        require_known(own, known, place)
        values = read_values(FinetuneConfig, {name: own[name] for name in own if name in free}, place)
        try:
            FinetuneConfig(**values)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error


def _refuse_taken(table: Mapping[str, Any], taken: Collection[str], where: str) -> None:
    for name in table:
        if name in taken:
            raise UserError(f"{where}: {name} is not set here: the study sets it, from its other tables")


def finetune_config(tables: Sequence[Mapping[str, Any]], trained: str, **own: Any) -> FinetuneConfig:
    """The settings that the `tables`, the later over the earlier, and what the study says itself make of `trained`."""
    merged: dict[str, Any] = {}
    for table in tables:
        merged |= read_values(FinetuneConfig, of_one(table, trained, TRAINED, "[finetune]"), "[finetune]")
    return FinetuneConfig(**(own | merged))
