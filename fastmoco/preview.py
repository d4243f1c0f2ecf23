"""`fastmoco data preview`: what a recipe makes of one's own images, before a run is begun."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import tyro

from fastmoco.arguments import read_arguments
from fastmoco.data.dali import dali_installed
from fastmoco.data.preview import examples, save_preview
from fastmoco.data.views import ViewConfig
from fastmoco.errors import UserError
from fastmoco.results import try_out, unwritable
from fastmoco.train.config import DataConfig
from fastmoco.train.images import find_images
from fastmoco.train.recipes import find


@dataclass(kw_only=True)
class PreviewArgs:
    """Draw images beside the two views that training will make of them, with the draws in words."""

    data: DataConfig
    views: ViewConfig = field(default_factory=ViewConfig)
    out: Path = Path("preview.png")
    """PNG file to write, by its name."""
    count: int = 8
    """Images to show: the first that training will take in the epoch."""
    seed: int = 0
    """Seed of the run."""
    epoch: int = 0
    """Epoch, counted from 0: in another the same image has other views."""

    def __post_init__(self) -> None:
        if not 1 <= self.count <= 64:
            raise UserError(f"--count must be from 1 to 64, not {self.count}")
        if self.epoch < 0 or self.seed < 0:
            raise UserError(f"--epoch and --seed must be 0 or more, not {self.epoch} and {self.seed}")
        if self.out.suffix.lower() != ".png":
            raise UserError(f"--out {self.out}: the picture is a PNG file; name one that ends in .png")


def preview_command(args: list[str]) -> int:
    """Draw the picture. Returns the exit status, 0; raises UserError for a mistake."""
    if args[:1] in (["-h"], ["--help"]):
        print("usage: fastmoco data preview RECIPE --data FOLDER [--out FILE] [OPTIONS]\n")
        print("`fastmoco data preview RECIPE --help` lists every option; `fastmoco recipes` lists the recipes.")
        return 0
    if not args or args[0].startswith("-"):
        raise UserError("name a recipe first: fastmoco data preview RECIPE --data FOLDER (see fastmoco recipes)")
    name = args[0]
    config = find(name)(tyro.MISSING, Path())
    options = read_arguments(
        PreviewArgs,
        prog=f"fastmoco data preview {name}",
        description=f"Draw what training with the recipe {name} will see. Every field of its views can be overridden.",
        default=PreviewArgs(data=config.data, views=config.views),
        args=args[1:],
        config=(tyro.conf.OmitArgPrefixes,),
    )
    data = options.data
    if data.loader == "auto":
        data = replace(data, loader="dali" if dali_installed() else "pillow")
    try_out(options.out)
    manifest = find_images(replace(config, data=data), None)
    shown = examples(
        manifest,
        options.views,
        seed=options.seed,
        epoch=options.epoch,
        count=options.count,
        kind=data.loader,
        workers=data.workers,
        pairs=data.pairs,
    )
    try:
        save_preview(shown, options.out)
    except OSError as error:
        raise unwritable(options.out, error) from error
    print(f"{options.out}: {len(shown)} images of {len(manifest):,} with their views in epoch {options.epoch}")
    return 0
