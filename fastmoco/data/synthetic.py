"""Synthetic stained tissue: two classes told apart by shape and arrangement, not by colour.

Every patch starts as a tissue field: positive near and inside nuclei, negative in empty gaps, zero between.
The field is then replaced by the ranks of its pixels, and stain is a function of the rank and of textures
that do not know the class. The colour histogram of a patch therefore has the same distribution in both
classes, and what is left to learn is how nuclei are shaped and where they lie.

Three things keep other simple cues small. Elongated nuclei are given a larger area, so that both classes
have about as much outline to a nuclear area. Magnification, density, staining, light, blur and noise vary
far more than the classes differ in any of them. One patient of each class shares each staining batch.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator, Philox, SeedSequence
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import fftfreq, ifft2
from scipy.ndimage import gaussian_filter
from scipy.special import expit

from fastmoco.errors import UserError

GENERATOR_VERSION = 1  # raised with every change that alters a pixel, so that old folders are drawn afresh

_MARKER = "tissue.json"
_HEMATOXYLIN = np.array([0.65, 0.70, 0.29])  # optical density of red, green, blue (Ruifrok and Johnston 2001)
_EOSIN = np.array([0.07, 0.99, 0.11])
_NUCLEAR_BAND, _GAP_BAND = 2.0, 4.0  # pixels outside an outline over which the field still falls
_SPINDLE_SIZE = 1.35  # radius of the circle of equal area, against that of a round nucleus

Array = NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class _Look:
    """What is drawn for a patch before its class is looked at."""

    radius: float  # pixels, of a round nucleus
    nuclear: float  # fraction of the pixels
    gap: float  # fraction of the pixels
    spacing: float  # tissue area to a nucleus, in nuclear areas
    direction: float  # radians, of fibres and streams
    blur: float  # standard deviation, pixels
    bend: Array  # (side, side) change of direction, radians
    warp: tuple[Array, Array]  # (side, side) displacements in y and x, pixels
    clouds: Array  # (side, side) uneven background
    ripple: Array  # (side, side) decides the order of pixels in plain stroma
    chromatin: Array  # (side, side) texture of nuclei


@dataclass(frozen=True, slots=True)
class _Ellipses:
    centre: Array  # (n, 2) y, x in pixels
    radius: Array  # (n,) of the circle of equal area, pixels
    aspect: Array  # (n,) major axis over minor
    angle: Array  # (n,) of the major axis, radians


def draw_tissue(
    folder: Path, *, images: int = 2000, side: int = 96, seed: int = 0, patients: int = 100
) -> Path:
    """Write a labelled set of tissue patches, unless ``folder`` holds that very set; return ``folder``.

    ``folder/images`` receives RGB patches of side x side pixels, half of every patient's as JPEG, half as
    PNG. ``folder/labels.csv`` has the columns file (relative to ``folder/images``), patient, split (train or
    test, 30 % of the patients) and label: 0 for round nuclei in rings (glandular), 1 for elongated nuclei in
    streams (spindled). A patient is of one class; the classes are balanced in both splits. A patch is a
    function of (seed, its index, patients, side) only.

    ``folder/tissue.json`` says which set the folder holds; an interrupted or incomplete one is drawn afresh.
    Raises UserError where the numbers make no set, or where ``folder`` holds files of another origin.
    """
    _check(images=images, side=side, seed=seed, patients=patients)
    marker = folder / _MARKER
    recipe = dict(generator=GENERATOR_VERSION, images=images, side=side, seed=seed, patients=patients)
    names = [f"tissue_{i:06d}.{('jpg', 'png')[i // patients % 2]}" for i in range(images)]
    if _holds(folder, recipe, names):
        return folder
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not marker.exists())):
        raise UserError(f"{folder} holds what draw_tissue did not write; name a new or an empty folder")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({"complete": False}))
    for stale in (folder / "images").glob("tissue_*"):
        stale.unlink()
    rows = ["file,patient,split,label"]
    for index, name in enumerate(names):
        patient = index % patients
        patch = draw_patch(seed, index, patient=patient, side=side)
        # Each format takes the option it knows and ignores the other.
        Image.fromarray(patch).save(folder / "images" / name, quality=90, compress_level=3)
        rows.append(f"{name},patient_{patient:04d},{_split(patient)},{patient % 2}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    marker.write_text(json.dumps({"complete": True, **recipe}))
    return folder


def draw_patch(seed: int, index: int, *, patient: int, side: int) -> NDArray[np.uint8]:
    """Draw patch ``index`` of a patient, (side, side, 3) uint8 RGB; odd patients are of class 1, spindled."""
    rng = _generator(seed, 2, index)
    look = _draw_look(rng, side)
    nuclei, gaps = (_glandular, _spindled)[patient % 2](rng, side, look)
    # From here on only the order of the pixels in rank depends on the class.
    rank = _rank(side, look, nuclei, gaps)
    hematoxylin, eosin = _stain(rng, side, look, rank)
    stains, light = _staining(seed, patient)
    image = np.exp(-np.stack([hematoxylin, eosin], axis=-1) @ stains)
    image *= _illumination(rng, side)[..., None] * light
    image += rng.uniform(0.01, 0.07) * rng.standard_normal(image.shape, dtype=np.float32)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _draw_look(rng: Generator, side: int) -> _Look:
    radius = 4.0 * float(np.exp(rng.uniform(-0.3, 0.3)))
    nuclear = rng.uniform(0.18, 0.34)
    bend, clouds = _noise_pair(rng, side, 24)
    warp_y, warp_x = _noise_pair(rng, side, 4 * radius)
    ripple, chromatin = _noise_pair(rng, side, 6)
    return _Look(
        radius=radius,
        nuclear=nuclear,
        gap=rng.uniform(0.02, 0.07),
        spacing=1.12 / nuclear,  # a little sparse: ranks then widen outlines and never cut into nuclei
        direction=rng.uniform(0, np.pi),
        blur=rng.uniform(0.4, 1.6),
        bend=0.35 * bend,
        warp=(0.33 * radius * warp_y, 0.33 * radius * warp_x),
        clouds=clouds,
        ripple=ripple,
        chromatin=chromatin,
    )


def _glandular(rng: Generator, side: int, look: _Look) -> tuple[_Ellipses, _Ellipses]:
    ring = look.radius * rng.uniform(2.5, 3.8)
    count = round(2 * np.pi * ring / (2.3 * look.radius))
    cell = look.spacing * count * np.pi * look.radius**2  # area of tissue to a gland
    centre = _lattice(rng, side, cell, aspect=1 / 0.866, direction=look.direction, jitter=0.07)
    n = len(centre)
    around = (np.arange(count) / count + rng.random((n, 1))) * 2 * np.pi + 0.12 * rng.normal(size=(n, count))
    distance = ring * (1 + 0.12 * rng.normal(size=(n, 1)) + 0.07 * rng.normal(size=(n, count)))
    offset = np.stack([np.sin(around), np.cos(around)], axis=-1) * distance[..., None]
    radius, aspect = look.radius * np.exp(0.1 * rng.normal(size=n * count)), rng.uniform(1.0, 1.35, n * count)
    nuclei = _Ellipses((centre[:, None] + offset).reshape(-1, 2), radius, aspect, around.ravel())
    gap_radius, gap_aspect = _gap_radius(rng, look, cell, n), rng.uniform(1.0, 1.5, n)
    return nuclei, _Ellipses(centre, gap_radius, gap_aspect, rng.uniform(0, np.pi, n))


def _spindled(rng: Generator, side: int, look: _Look) -> tuple[_Ellipses, _Ellipses]:
    radius = _SPINDLE_SIZE * look.radius
    aspect = rng.uniform(2.2, 3.2)
    cell = look.spacing * np.pi * radius**2  # area of tissue to a nucleus
    centre = _lattice(rng, side, cell, aspect=0.8 * aspect, direction=look.direction, jitter=0.28)
    n = len(centre)
    radii, aspects = radius * np.exp(0.1 * rng.normal(size=n)), aspect * np.exp(0.15 * rng.normal(size=n))
    nuclei = _Ellipses(centre, radii, aspects, _flow(look, centre) + 0.2 * rng.normal(size=n))
    cell *= rng.uniform(5, 9)  # of tissue to a gap, about as for glands
    centre = _lattice(rng, side, cell, aspect=0.8 * aspect, direction=look.direction, jitter=0.25)
    n = len(centre)
    gap_radius = _gap_radius(rng, look, cell, n)
    return nuclei, _Ellipses(centre, gap_radius, rng.uniform(3, 5, n), _flow(look, centre))


def _gap_radius(rng: Generator, look: _Look, cell: float, n: int) -> Array:
    return np.sqrt(1.2 * look.gap * cell / np.pi) * np.exp(0.15 * rng.normal(size=n))


def _flow(look: _Look, points: Array) -> Array:
    y, x = np.clip(points.astype(int), 0, look.bend.shape[0] - 1).T
    return look.direction + look.bend[y, x]


def _lattice(rng: Generator, side: int, cell: float, aspect: float, direction: float, jitter: float) -> Array:
    """Jittered brickwork on the patch and a rim: (n, 2) y, x, one point to ``cell`` square pixels."""
    along, across = np.sqrt(cell * aspect), np.sqrt(cell / aspect)
    rows, columns = (int(0.75 * side / step) + 3 for step in (across, along))
    i, j = np.mgrid[-rows : rows + 1, -columns : columns + 1]
    x = (j + 0.5 * (i % 2) + rng.random() + jitter * rng.normal(size=i.shape)) * along
    y = (i + rng.random() + jitter * rng.normal(size=i.shape)) * across
    cos, sin = np.cos(direction), np.sin(direction)
    points = np.stack([(x * sin + y * cos).ravel(), (x * cos - y * sin).ravel()], axis=1)
    return points[(np.abs(points) < side / 2 + along).all(axis=1)] + side / 2


def _rank(side: int, look: _Look, nuclei: _Ellipses, gaps: _Ellipses) -> Array:
    """Rank of every pixel in the tissue field, 0 (emptiest) to 1 (most nuclear)."""
    nuclear = _signed_distance(side, nuclei, look.warp, _NUCLEAR_BAND) + _NUCLEAR_BAND
    gap = _signed_distance(side, gaps, look.warp, _GAP_BAND) + _GAP_BAND
    field = gaussian_filter(np.where(nuclear > 0, nuclear, -gap) + 0.15 * look.ripple, look.blur)
    rank = np.empty(side * side, np.float32)
    rank[np.argsort(field, axis=None)] = np.linspace(0, 1, side * side, dtype=np.float32)
    return rank.reshape(side, side)


def _signed_distance(side: int, shapes: _Ellipses, warp: tuple[Array, Array], band: float) -> Array:
    """About the distance in pixels to the nearest outline, positive inside, never below -band."""
    stretch = np.sqrt(shapes.aspect)
    axes = np.stack([shapes.radius * stretch, shapes.radius / stretch]).astype(np.float32)
    reach = int(np.ceil(axes.max(initial=1.0) * 1.15 + band)) + 2
    near = ((shapes.centre > -reach) & (shapes.centre < side + reach)).all(axis=1)
    centre, angle = shapes.centre[near], shapes.angle[near]
    major, minor = axes[:, near, None, None]
    corner = np.floor(centre).astype(int) - reach
    window = np.arange(2 * reach + 1)
    y, x = (corner[:, k, None] + window for k in (0, 1))
    inside = (np.clip(y, 0, side - 1)[:, :, None], np.clip(x, 0, side - 1)[:, None, :])
    dy = (y - centre[:, :1]).astype(np.float32)[:, :, None] + warp[0][inside]
    dx = (x - centre[:, 1:]).astype(np.float32)[:, None, :] + warp[1][inside]
    cos, sin = (f(angle).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
    level = np.sqrt(((dx * cos + dy * sin) / major) ** 2 + ((dy * cos - dx * sin) / minor) ** 2)
    rim = 2 * reach + 2
    canvas = np.full((side + 2 * rim, side + 2 * rim), -band, np.float32)
    for (top, left), values in zip(corner + rim, (1 - level) * minor, strict=True):
        view = canvas[top : top + window.size, left : left + window.size]
        np.maximum(view, values, out=view)
    return canvas[rim:-rim, rim:-rim]


def _stain(rng: Generator, side: int, look: _Look, rank: Array) -> tuple[Array, Array]:
    """Amounts of hematoxylin and eosin, (side, side) each, from ranks and textures."""
    edge = 0.011 + 0.023 * look.blur  # in rank; wider where the optics blur more
    nuclear = expit((rank - (1 - look.nuclear)) / edge)
    filled = expit((rank - look.gap) / (0.3 * edge))
    width, stretch = rng.uniform(3, 7), rng.uniform(1.5, 5)
    fibres, _ = _noise_pair(rng, side, width, stretch=stretch, direction=look.direction)
    contrast = rng.uniform(0.1, 0.6)
    more_hematoxylin, more_eosin = (float(np.exp(0.15 * rng.normal())) for _ in range(2))
    nuclei = nuclear * (1.25 + 0.16 * look.chromatin)
    hematoxylin = more_hematoxylin * (0.12 + 0.06 * contrast * look.clouds + nuclei)
    eosin = 0.55 * more_eosin * (1 + contrast * (0.8 * fibres + 0.4 * look.clouds)) * (1 - 0.45 * nuclear)
    empty = 0.07 + 0.93 * filled
    return np.maximum(hematoxylin * empty, 0), np.maximum(eosin * empty, 0)


def _staining(seed: int, patient: int) -> tuple[Array, Array]:
    """Of a patient: optical densities of the two stains, (2, 3), and the light of an empty slide, (3,).

    Patients 2k and 2k + 1, one of each class, come from one staining batch, from which each departs a little.
    """
    batch = _generator(seed, 0, patient // 2).normal(size=12)
    own = _generator(seed, 1, patient).normal(size=12)
    z = 0.9 * batch + 0.35 * own
    colours = np.stack([_HEMATOXYLIN, _EOSIN]) + 0.07 * z[:6].reshape(2, 3)
    stains = np.maximum(colours, 0.02) * np.exp(0.25 * z[6:8, None])
    light = np.clip(0.93 + 0.05 * z[8] + 0.02 * z[9:], 0.6, 1)
    return stains.astype(np.float32), light.astype(np.float32)


def _illumination(rng: Generator, side: int) -> Array:
    axis = np.linspace(-0.7, 0.7, side, dtype=np.float32)
    towards = rng.uniform(0, 2 * np.pi)
    slope, exposure = 0.25 * rng.random(), float(np.exp(0.025 * rng.normal()))
    return exposure * (1 + slope * (float(np.sin(towards)) * axis[:, None] + float(np.cos(towards)) * axis))


def _noise_pair(
    rng: Generator, side: int, width: float, *, stretch: float = 1.0, direction: float = 0.0
) -> tuple[Array, Array]:
    """Two independent fields of variance one, of features some ``width`` pixels wide, longer if stretched."""
    frequency = fftfreq(side).astype(np.float32)
    fy, fx = width * frequency[:, None], width * frequency
    cos, sin = float(np.cos(direction)), float(np.sin(direction))
    gain = np.exp(-((stretch * (fx * cos + fy * sin)) ** 2) - (fy * cos - fx * sin) ** 2)
    # Real and imaginary part of transformed complex white noise are independent: two fields at one price.
    white = rng.standard_normal((side, side, 2), dtype=np.float32).view(np.complex64)[..., 0]
    shaped = ifft2(white * gain) * (side * side / np.linalg.norm(gain))
    return shaped.real, shaped.imag


def _generator(*key: int) -> Generator:
    return Generator(Philox(SeedSequence(key)))


def _split(patient: int) -> str:
    pair = patient // 2  # both patients of a staining batch go to the same side
    return "test" if (pair + 1) * 3 // 10 > pair * 3 // 10 else "train"


def _holds(folder: Path, recipe: dict[str, int], names: list[str]) -> bool:
    try:
        found = json.loads((folder / _MARKER).read_text())
        present = set(os.listdir(folder / "images"))
    except (OSError, ValueError):
        return False
    same = found == {"complete": True, **recipe}
    return same and present.issuperset(names) and (folder / "labels.csv").exists()


def _check(*, images: int, side: int, seed: int, patients: int) -> None:
    if patients < 8 or patients % 2:
        raise UserError(f"patients={patients}: give an even number of 8 or more, to fill both splits")
    if images < patients:
        raise UserError(f"images={images} for {patients} patients: give each patient one or more")
    if side < 32 or seed < 0:
        raise UserError(f"side={side}, seed={seed}: give a side of 32 pixels or more and a seed of 0 or more")
