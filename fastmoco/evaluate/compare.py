"""How alike the stages of two encoders, or of one, see the same images: the numbers, their tables and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastmoco.atomic import replacing
from fastmoco.evaluate.cka import Alignments, Estimator, Kernel, Reuse, cka_matrix, feature_reuse, kernel_words
from fastmoco.evaluate.features import describe_input
from fastmoco.evaluate.numbers import finite
from fastmoco.models.encoder import Encoder

Features = Mapping[str, np.ndarray]
# So much of a name fits beside a picture.
_NAME_WIDTH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """An encoder that is compared: `name` tells it from the other, `run` is as it was given, `file` what was read."""

    name: str
    run: Path
    file: Path
    encoder: Encoder
    size: int
    resize: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """By kernel: CKA of every stage of the first encoder with every one of the last, and, of two encoders, the feature
    reuse by stage. `images` counts what was looked at; `sigma` and `estimator` are those of `compare`."""

    cka: dict[Kernel, Alignments]
    reuse: dict[Kernel, dict[str, Reuse]]
    images: int
    sigma: float
    estimator: Estimator

    def words(self, kernel: Kernel) -> str:
        """How CKA by `kernel` was computed."""
        return f"{kernel_words(kernel, self.sigma)}, {self.estimator}"


def compare(
    first: Features,
    second: Features | None = None,
    *,
    kernels: tuple[Kernel, ...] = ("linear",),
    sigma: float = 1.0,
    estimator: Estimator = "unbiased",
    draws: int = 50,
    seed: int = 0,
) -> Comparison:
    """`cka_matrix` and `feature_reuse` by kernel, of (n, d) features by stage of the same n images.

    Without `second`, `first` is compared with itself, and nothing is said of reuse. The draws of `feature_reuse`, of
    1,000 images at the most, are unbiased where `estimator` is "minibatch". Raises ValueError as both do.
    """
    found, reuse = {}, {}
    for kernel in kernels:
        last = first if second is None else second
        found[kernel] = cka_matrix(first, last, kernel=kernel, sigma=sigma, estimator=estimator, seed=seed)
        if second is not None:
            whole: Literal["biased", "unbiased"] = "biased" if estimator == "biased" else "unbiased"
            reuse[kernel] = feature_reuse(
                first, second, kernel=kernel, sigma=sigma, estimator=whole, draws=draws, seed=seed
            )
    images = len(next(iter(first.values())))
    return Comparison(cka=found, reuse=reuse, images=images, sigma=sigma, estimator=estimator)


def as_json(found: Comparison, sides: Sequence[Side]) -> dict[str, Any]:
    """What was compared and found, as JSON has it: None for what is undefined."""
    return {
        "encoders": [
            {
                "run": str(side.run),
                "file": str(side.file),
                "arch": side.encoder.arch,
                "size": side.size,
                "resize": side.resize,
            }
            for side in sides
        ],
        "images": found.images,
        "estimator": found.estimator,
        "sigma": found.sigma,
        "cka": {
            kernel: {
                "rows": list(one.rows),
                "columns": list(one.columns),
                "values": [[finite(value) for value in row] for row in one.values.tolist()],
            }
            for kernel, one in found.cka.items()
        },
        "reuse": {
            kernel: {stage: value.as_json() for stage, value in stages.items()}
            for kernel, stages in found.reuse.items()
        },
    }


def print_comparison(found: Comparison, sides: Sequence[Side], console: Console) -> None:
    """A table for each kernel, with the feature reuse as its last column, and what its reader must know."""

    def say(text: str) -> None:
        # Text, as brackets would otherwise be read as markup.
        console.print(Text(text), soft_wrap=True)

    names = [side.name for side in sides]
    what = f"of the stages of {names[0]}" if len(names) == 1 else f"of {names[0]} (down) with {names[1]} (across)"
    for kernel, one in found.cka.items():
        say(f"CKA {what}: {found.words(kernel)}, {found.images:,} images")
        reuse = found.reuse.get(kernel, {})
        table = Table(box=box.SIMPLE)
        for name in ("", *one.columns, *(["feature reuse"] if reuse else [])):
            table.add_column(name, justify="right" if name else "left", no_wrap=True)
        for stage, values in zip(one.rows, one.values.tolist(), strict=True):
            cells = [_number(value) for value in values]
            if reuse:
                kept = reuse[stage]
                cells.append(_number(kept.mean) + (f" ({kept.std:.3f})" if finite(kept.std) is not None else ""))
            table.add_row(stage, *cells)
        console.print(table)
    for side in sides:
        say(f"{side.name}: {side.file}, {side.encoder.arch}, sees {describe_input(side.size, side.resize)}.")
    if len({(side.size, side.resize) for side in sides}) > 1:
        say("The two see different pixels of an image; --size and --resize show both the same.")
    if found.reuse:
        # All are over the same draws.
        any_of = next(iter(next(iter(found.reuse.values())).values()))
        say(
            f"Feature reuse: CKA of the same stage of both, mean (standard deviation) over {any_of.draws} draws of "
            f"{any_of.size:,} of the images."
        )
    if any(not np.isfinite(one.values).all() for one in found.cka.values()):
        say("-: undefined, as the features are the same for all images (or, for rbf, most), or not finite.")


def draw_comparison(found: Comparison, sides: Sequence[Side], file: Path) -> list[Path]:
    """A heat map for each kernel as a PNG beside `file`, named after both; none without matplotlib.

    Those of an earlier comparison that are not drawn again are removed: they are not of what `file` holds. Raises
    OSError where one cannot be written or removed.
    """
    drawn = _draw(found, sides, file)
    for path in (_picture(file, kernel) for kernel in get_args(Kernel)):
        if path not in drawn:
            path.unlink(missing_ok=True)
    return drawn


def _picture(file: Path, kernel: Kernel) -> Path:
    return file.with_name(f"{file.stem}-{kernel}.png")


def _draw(found: Comparison, sides: Sequence[Side], file: Path) -> list[Path]:
    """The pictures that could be drawn."""
    try:
        from fastmoco.evaluate.heat_map import cka_heat_map
        from fastmoco.evaluate.pictures import png
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        return []
    names = [_shortened(side.name) for side in sides]
    written = []
    for kernel, one in found.cka.items():
        title = f"CKA of {found.images:,} images\n{found.words(kernel)}"
        figure = cka_heat_map(one, title=title, rows=names[0], columns=names[-1])
        path = _picture(file, kernel)
        with replacing(path) as temporary:
            temporary.write_bytes(png(figure))
        written.append(path)
    return written


def _number(value: float) -> str:
    return "-" if finite(value) is None else f"{value:.3f}"


def _shortened(name: str) -> str:
    half = _NAME_WIDTH // 2
    return name if len(name) <= _NAME_WIDTH else f"{name[: half - 1]}…{name[-half:]}"
