"""The options of `fastmoco pretrain` as a configuration."""

from __future__ import annotations

import sys

import tyro

from fastmoco.arguments import read_arguments
from fastmoco.distributed.launch import find_launch
from fastmoco.errors import UserError
from fastmoco.train import recipes
from fastmoco.train.config import Config

_OBJECTIVES = ("simclr", "supcon", "barlow-twins")
# What the commands of MoCo's code, lightly and solo-learn call it.
ELSEWHERE = {
    "--learning-rate": "--lr",
    "--base-lr": "--lr",
    "--momentum": "--sgd-momentum (the key encoder's is --ema)",
    "--wd": "--weight-decay",
    "--moco-dim": "--dim",
    "--moco-k": "--queue-size",
    "--moco-m": "--ema",
    "--moco-t": "--temperature",
    "--base-tau-momentum": "--ema",
    "--mlp": "--head mlp",
    "--aug-plus": "the recipe mocov2, which has these views",
    "--cos": "--schedule cosine",
    "--backbone": "--arch",
    "--max-epochs": "--epochs",
    "--image-size": "--size",
    "--input-size": "--size",
    "--num-workers": "--workers",
    "--gpu": "--device cuda:0",
    "--amp": "--precision bf16 or fp16",
}


def read_options(args: list[str]) -> Config:
    """The configuration that `args`, RECIPE and options, make; options that change nothing in it are told.

    Raises UserError, or exits with 2, for a mistake.
    """
    if not args or args[0].startswith("-"):
        raise UserError("name a recipe first: fastmoco pretrain RECIPE --data FOLDER --out FOLDER")
    name = args[0]
    _refuse_other_names(args[1:])
    config = read_arguments(
        Config,
        prog=f"fastmoco pretrain {name}",
        description=f"Pretrain with the recipe {name}. Every field can be overridden.",
        default=recipes.find(name)(tyro.MISSING, tyro.MISSING),
        args=args[1:],
        config=(tyro.conf.OmitArgPrefixes,),
    )
    _tell_unused(config, args[1:])
    return config


def _tell_unused(config: Config, args: list[str]) -> None:
    """Say on standard error which of the options that `args` give have no effect, and why; rank 0 says it."""
    given = {word.partition("=")[0].replace("_", "-") for word in args}
    options = {f"--{name.replace('_', '-')}": why for name, why in config.loss.unused.items()}
    for option in [option for option in options if option in given and find_launch().rank == 0]:
        print(f"note: {option} has no effect: {options[option]}", file=sys.stderr)


def _refuse_other_names(args: list[str]) -> None:
    """Raise UserError where `args` call an option as other software does."""
    for word, following in zip(args, [*args[1:], ""], strict=True):
        option, _, after = word.partition("=")
        value = after or following
        if other := ELSEWHERE.get(option.replace("_", "-")):
            raise UserError(f"{option}: here that is {other}")
        if option == "--method" and value in _OBJECTIVES:
            raise UserError(f"--method {value}: names the stage loss beside the objective; that is --objective {value}")
