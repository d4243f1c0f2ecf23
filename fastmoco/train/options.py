"""The options of `fastmoco pretrain` as a configuration."""

from __future__ import annotations

import tyro

from fastmoco.arguments import read_arguments
from fastmoco.errors import UserError
from fastmoco.train import recipes
from fastmoco.train.config import Config


def read_options(args: list[str]) -> Config:
    """The configuration that `args`, RECIPE and options, make. Raises UserError, or exits with 2, for a mistake."""
    if not args or args[0].startswith("-"):
        raise UserError("name a recipe first: fastmoco pretrain RECIPE --data FOLDER --out FOLDER")
    name = args[0]
    return read_arguments(
        Config,
        prog=f"fastmoco pretrain {name}",
        description=f"Pretrain with the recipe {name}. Every field can be overridden.",
        default=recipes.find(name)(tyro.MISSING, tyro.MISSING),
        args=args[1:],
        config=(tyro.conf.OmitArgPrefixes,),
    )
