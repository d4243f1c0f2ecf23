"""What does a view cost, operation by operation, and how far is it from torchvision's?

Ours in C++ or CUDA against torchvision's transforms on float32 tensors, one view at a time and on one thread: errors
first, no speed where they are too large, then times in turns. Beside ours the errors of DALI's native operators.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from bench import views_dali as dali
from bench.command import start
from bench.photographs import draw_photographs
from bench.timing import cell, environment, interleaved, quantiles, save
from fastmoco.data.draws import draw
from fastmoco.data.views import ViewConfig
from fastmoco.ops import dispatch
from fastmoco.ops.views import NEUTRAL, VIEW, make_views
from fastmoco.train.recipes import RECIPES

# In 255ths: a value may round to the next of float16.
TOLERANCE = 0.13
COLUMNS = ["operation", "ours_ms", "torchvision_ms", "ratio", "ours_max", "ours_mean", "dali_max", "dali_mean"]


@dataclass(kw_only=True)
class ViewsArgs:
    """Measure the error and the time of each operation, and the time of each recipe."""

    quick: bool = False
    """Small views and few rounds: a check that all of it runs, not a measurement."""
    size: int = 224
    """Side of a view whose operations are measured, pixels; recipes have their own."""
    drawn: int = 16
    """Views of each recipe, which are timed together."""
    rounds: int = 9
    """Times that each is timed."""
    device: str = "cpu"
    """Device that the images are on."""
    out: Path | None = None
    """Markdown file to write; the rows are put beside it as JSON."""


@dataclass(frozen=True)
class Work:
    """Views to make: of `pictures` (H, W, 3) uint8 each, as `records` say; `native` is DALI's operator for it."""

    name: str
    pictures: Sequence[np.ndarray]
    records: np.ndarray
    size: int
    blur_kernel: int
    native: dali.Graph | None = None


def operations(pictures: Sequence[np.ndarray], size: int) -> list[Work]:
    """Each operation alone, at values in the middle of their ranges: resizes of the whole pictures, the others of
    parts of them of a view's size."""
    height, width = pictures[0].shape[:2]
    parts = [np.ascontiguousarray(picture[:size, :size]) for picture in pictures]
    blur_kernel = ViewConfig(size=size, crop_scale=(0.2, 1.0)).blur_kernel

    def of(images: Sequence[np.ndarray], name: str, native: dali.Graph | None = None, **fields: Any) -> Work:
        records = np.zeros(len(images), dtype=VIEW)
        records["image"], records["order"], records["factor"] = np.arange(len(images)), np.arange(4), NEUTRAL
        records["window"] = (0, 0, size, size)
        for field, value in fields.items():
            records[field] = value
        return Work(name, images, records, size, blur_kernel, native)

    def window(share: float) -> tuple[int, int, int, int]:
        return (height // 20, width // 10, round(share * height), round(share * width))

    resized = round(8 / 7 * size)
    return [
        of(parts, "none: to float16 alone"),
        of(pictures, f"{round(0.8 * height)} to {size} px", dali.resized_window, window=window(0.8)),
        of(pictures, f"{round(0.25 * height)} to {size} px", dali.resized_window, window=window(0.25)),
        of(pictures, "two resizes", resized=(resized, resized), window=(5, 9, resized - 40, resized - 9)),
        of(parts, "brightness", dali.brightness, factor=(1.3, 1, 1, 0)),
        of(parts, "contrast", dali.contrast, factor=(1, 1.3, 1, 0)),
        of(parts, "saturation", dali.saturation, factor=(1, 1, 1.3, 0)),
        of(parts, "hue", dali.hue, factor=(1, 1, 1, 0.1)),
        of(parts, "all four", dali.colour_twist, factor=(1.3, 1.3, 1.3, 0.1)),
        of(parts, "gray", dali.gray, gray=1),
        of(parts, "blur, sigma 0.5", dali.gaussian_blur, sigma=0.5),
        of(parts, "blur, sigma 2", dali.gaussian_blur, sigma=2.0),
        of(parts, "rotation by 20 degrees", dali.rotate, angle=20.0),
        of(parts, "flip", dali.flip, flip=1),
    ]


def recipes(pictures: Sequence[np.ndarray], views: int) -> list[Work]:
    """Some views of each recipe's kind, as drawn for training; recipes with the same views are one. Those of small sets
    are left out: the same operations, weaker."""
    kinds: dict[ViewConfig, str] = {}
    for name, recipe in RECIPES.items():
        if not name.endswith("-small"):
            kinds.setdefault(recipe(Path(), Path()).views, name.rsplit("-", 1)[0])
    works = []
    sizes = np.array([picture.shape[:2] for picture in pictures])
    for config, name in kinds.items():
        indices = np.arange(views)
        records = draw(config, seed=0, epoch=0, indices=indices, view=0, sizes=sizes[indices % len(pictures)])
        records["image"] %= len(pictures)
        title = f"{name}: {sizes[0, 0]} to {config.size} px"
        works.append(Work(title, pictures, records, config.size, config.blur_kernel))
    return works


def apart(made: np.ndarray | None, wanted: np.ndarray) -> tuple[float | None, float | None]:
    """Largest and mean difference in 255ths; None and None of nothing."""
    if made is None:
        return None, None
    error = 255 * np.abs(made.astype(np.float64) - wanted)
    return float(error.max()), float(error.mean())


def measure(work: Work, args: ViewsArgs) -> dict[str, Any]:
    """The row of one operation or recipe; no times where ours is too far from torchvision's."""
    images = [torch.from_numpy(picture).to(args.device) for picture in work.pictures]
    options: dict[str, Any] = {"size": work.size, "blur_kernel": work.blur_kernel}
    wanted = make_views(work.pictures, work.records, implementation="reference", **options).float().numpy()
    ours = make_views(images, work.records, implementation="native", **options).cpu().float().numpy()
    row: dict[str, Any] = {"op": "views", "operation": work.name, "size": work.size, "views": len(work.records)}
    row |= dict(zip(("ours_max", "ours_mean"), apart(ours, wanted), strict=True))
    theirs = None
    if work.native:
        theirs = dali.native(work.pictures, work.records[0], work.native, work.size)
    row |= dict(zip(("dali_max", "dali_mean"), apart(theirs, wanted), strict=True))
    row |= {"ours_ms": None, "torchvision_ms": None, "ratio": None}
    if not row["ours_max"] <= TOLERANCE:
        return row
    seconds = interleaved(
        {
            "ours": lambda: make_views(images, work.records, implementation="native", **options),
            "torchvision": lambda: make_views(images, work.records, implementation="reference", **options),
        },
        rounds=args.rounds,
        device=args.device,
        warmup=1,
    )
    for name, values in seconds.items():
        spread = quantiles([value / len(work.records) for value in values])
        row |= {f"{name}_ms": spread["p50_ms"], f"{name}_p20_ms": spread["p20_ms"], f"{name}_p80_ms": spread["p80_ms"]}
    return row | {"rounds": args.rounds, "ratio": row["torchvision_ms"] / row["ours_ms"]}


def decoders(files: Sequence[Path], pictures: Sequence[np.ndarray]) -> dict[str, Any]:
    """The row of how far DALI's decoder is from Pillow's on the same JPEGs: what views are cut from."""
    row: dict[str, Any] = {"op": "views", "operation": "JPEG decoded, against Pillow", "views": len(files)}
    theirs = dali.decoded(files)
    stacked = None if theirs is None else np.stack(theirs) / 255
    return row | dict(zip(("dali_max", "dali_mean"), apart(stacked, np.stack(pictures) / 255), strict=True))


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """The table, on the console."""
    table = Table(title="a view: milliseconds, and errors against torchvision in 255ths")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "operation" else "right")
    for row in rows:
        table.add_row(*(cell(row.get(name)) for name in COLUMNS))
    console.print(table)


def main(args: ViewsArgs) -> int:
    """Run the benchmark; status 1 where ours is too far from torchvision's. Without our C++ nothing is measured."""
    console = Console(width=140, highlight=False)
    if dispatch.native is None:
        console.print(f"views: left out, {dispatch.NATIVE_MISSING}")
        return 0
    if args.quick:
        args = replace(args, size=48, drawn=2, rounds=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            side, count = (96, 2) if args.quick else (512, 8)
            draw_photographs(Path(folder), count, side)
            files = sorted(Path(folder).iterdir())
            pictures = [np.array(Image.open(path)) for path in files]
            decoded = decoders(files, pictures)
        works = [*operations(pictures, args.size), *recipes(pictures, args.drawn)]
        rows = [*(measure(work, args) for work in works), decoded]
    finally:
        torch.set_num_threads(threads)
    rows = [row | environment(args.device) | {"threads": 1} for row in rows]
    show(rows, console)
    if args.out is not None:
        save(
            rows,
            args.out,
            title="A view: milliseconds on one thread, and errors against torchvision in 255ths",
            command=f"python -m bench.views --size {args.size} --drawn {args.drawn} --rounds {args.rounds} "
            f"--device {args.device}",
            columns=COLUMNS,
        )
    wrong = [row["operation"] for row in rows if "ratio" in row and row["ratio"] is None]
    for name in wrong:
        console.print(f"PARITY FAILS {name}: more than {TOLERANCE} 255ths from torchvision, so no speed is shown")
    return 1 if wrong else 0


if __name__ == "__main__":
    start(main, ViewsArgs, "views")
