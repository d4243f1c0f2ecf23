"""PairLoader: lightly's layout, other views each epoch, the same again, and shares for processes."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmoco.adapters.loader import PairLoader
from fastmoco.data.manifest import load_manifest
from fastmoco.data.manifest_file import write_manifest
from fastmoco.data.views import ViewConfig
from fastmoco.distributed.world import World
from fastmoco.errors import UserError
from runs import draw_images
from worlds import in_world

VIEWS = ViewConfig(size=24, crop_scale=(0.5, 1.0), flip_p=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pairs")
    draw_images(root, 18)
    return root


def epochs(loader: PairLoader, count: int) -> list[list[tuple[Tensor, Tensor, list[str]]]]:
    return [[(torch.stack(views), targets, names) for views, targets, names in loader] for _ in range(count)]


def test_batches_are_in_lightlys_layout(folder: Path) -> None:
    loader = PairLoader(folder, views=VIEWS, batch_size=5, loader="pillow")
    assert len(loader) == 3
    for (x0, x1), targets, names in loader:
        assert x0.shape == x1.shape == (5, 3, 24, 24) and x0.dtype == torch.float32
        assert x0.is_contiguous(memory_format=torch.channels_last) and 0 <= x0.min() <= x0.max() <= 1
        assert not torch.equal(x0, x1) and targets.dtype == torch.int64 and targets.shape == (5,)
        assert len(set(names)) == 5 and all((folder / name).is_file() for name in names)


def test_epochs_differ_and_come_again(folder: Path) -> None:
    first, second = epochs(loader := PairLoader(folder, views=VIEWS, batch_size=6, loader="pillow"), 2)
    assert {name for *_, names in first for name in names} == {name for *_, names in second for name in names}
    assert [names for *_, names in first] != [names for *_, names in second]
    loader.set_epoch(1)
    for one, other in zip(epochs(loader, 1)[0], second, strict=True):
        assert torch.equal(one[0], other[0]) and one[2] == other[2]


def test_targets_are_the_labels_of_the_files(folder: Path, tmp_path: Path) -> None:
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))[:7]
    kinds = [index % 3 for index in range(7)]
    with (tmp_path / "l.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("file", "kind"), *zip(files, kinds, strict=True)])
    loader = PairLoader(
        folder, labels=tmp_path / "l.csv", label="kind", recipe="histology-moco-small", size=16, batch_size=2,
        drop_last=False, loader="pillow", dtype=torch.float16,
    )  # fmt: skip
    seen: dict[str, int] = {}
    for (x0, _), targets, names in loader:
        assert x0.shape == (2, 3, 16, 16) and x0.dtype == torch.float16
        seen |= dict(zip(names, targets.tolist(), strict=True))
    assert seen == dict(zip(files, kinds, strict=True))


def test_an_image_without_a_class_has_target_minus_one(folder: Path, tmp_path: Path) -> None:
    """As SupConLoss takes it, and the others are numbered as without it."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))[:6]
    listed = tmp_path / "l.csv"
    with listed.open("w", newline="") as stream:
        csv.writer(stream).writerows([("file", "kind"), *zip(files, ["b", "", "a", "b", "", "c"], strict=True)])
    options = {"views": VIEWS, "batch_size": 3, "loader": "pillow"}
    write_manifest(tmp_path / "m.csv", load_manifest(folder, listed, all_labels=True, progress=False))
    for path, label in ((listed, "kind"), (tmp_path / "m.csv", "kind"), (tmp_path / "m.csv", None)):
        with pytest.warns(UserWarning, match=r"2 images without a class in kind: target -1"):
            loader = PairLoader(folder, labels=path, label=label, **options)  # type: ignore[arg-type]
        (epoch,) = epochs(loader, 1)
        seen: dict[str, int] = {}
        for _, targets, names in epoch:
            seen |= dict(zip(names, targets.tolist(), strict=True))
        assert seen == dict(zip(files, [1, -1, 0, 1, -1, 2], strict=True))


def test_files_left_out_are_told(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "data" / "bad.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"left out 1 file, the first bad\.png: "):
        loader = PairLoader(tmp_path / "data", views=VIEWS, batch_size=6, loader="pillow")
    assert len(loader) == 3


def test_pairs_may_be_of_two_images_of_a_patient(folder: Path, tmp_path: Path) -> None:
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))[:6]
    with (tmp_path / "l.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("file", "study"), *((name, str(i // 2)) for i, name in enumerate(files[:5]))])
    options = {"labels": tmp_path / "l.csv", "views": VIEWS, "batch_size": 5, "loader": "pillow"}
    (alone,) = epochs(PairLoader(folder, **options), 1)
    (paired,) = epochs(PairLoader(folder, patient_column="study", pairs="patient", **options), 1)
    ((views, _, names),) = paired
    assert names == alone[0][2]
    for row, name in enumerate(names):
        assert torch.equal(views[0][row], alone[0][0][0][row])
        # The last has no other image.
        assert torch.equal(views[1][row], alone[0][0][1][row]) == (name == files[4])
    with pytest.raises(UserError, match="--pairs patient: the data do not say which patient"):
        PairLoader(folder, pairs="patient", **options)


def test_a_split_alone_may_be_taken(folder: Path, tmp_path: Path) -> None:
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))[:7]
    with (tmp_path / "l.csv").open("w", newline="") as stream:
        rows = [(name, "val" if index % 3 == 1 else "fit", "fit") for index, name in enumerate(files)]
        csv.writer(stream).writerows([("file", "split", "fold"), *rows])
    options = {"labels": tmp_path / "l.csv", "views": VIEWS, "batch_size": 1, "loader": "pillow"}

    def given_out(**split: str) -> set[str]:
        (batches,) = epochs(PairLoader(folder, **options, **split), 1)
        return {name for *_, names in batches for name in names}

    assert given_out(split="val") == {files[1], files[4]}
    assert given_out(split="fit", split_column="fold") == given_out() == set(files)
    with pytest.raises(UserError, match="--split train: no image is in it; the splits are fit, val"):
        given_out(split="train")


def _share(world: World, folder: Path, made: PairLoader) -> list[tuple[Tensor, Tensor, list[str]]]:
    found = epochs(PairLoader(folder, views=VIEWS, batch_size=6, loader="pillow"), 1)[0]
    # Lightning's processes meet later than a loader that is given to `fit` was made.
    assert [names for *_, names in epochs(made, 1)[0]] == [names for *_, names in found]
    return found


def test_processes_share_an_epoch_out(folder: Path) -> None:
    loader = PairLoader(folder, views=VIEWS, batch_size=6, loader="pillow")
    (alone,) = epochs(loader, 1)
    loader.set_epoch(0)
    shares = in_world(2, _share, folder, loader)
    for step, (views, _, names) in enumerate(alone):
        parts = [share[step] for share in shares]
        assert names == [name for *_, part in parts for name in part]
        np.testing.assert_array_equal(views.numpy(), torch.cat([part for part, *_ in parts], dim=1).numpy())


def test_an_epoch_goes_on_where_it_was_left(folder: Path) -> None:
    whole, other = (PairLoader(folder, views=VIEWS, batch_size=6, loader="pillow") for _ in range(2))
    first, second = epochs(whole, 2)
    state = whole.state_dict()
    assert (state["epoch"], state["batch"]) == (2, 0)
    with pytest.raises(UserError, match="saved with seed 7, not 0"):
        whole.load_state_dict(state | {"seed": 7})
    other.set_epoch(1)
    for number, (_, _, names) in enumerate(other, start=1):
        assert names == second[number - 1][2]
        if number == 2:
            break
    state = other.state_dict()
    assert state.items() >= {"epoch": 1, "batch": 2}.items()
    whole.load_state_dict(state)
    # As Lightning does, of the epoch that goes on.
    whole.set_epoch(1)
    ((views, _, names),) = epochs(whole, 1)[0]
    assert names == second[2][2] and torch.equal(views, second[2][0])
    # Another epoch begins at its beginning.
    whole.load_state_dict(state)
    whole.set_epoch(0)
    assert [names for *_, names in epochs(whole, 1)[0]] == [names for *_, names in first]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"batch_size": 64}, "18 images do not fill one batch of 64: lower batch_size, .* or pass drop_last=False"),
        ({"device": "nonsense"}, "device nonsense cannot be used here"),
        ({"max_bad": -1}, "max_bad must be 0 or more, not -1"),
    ],
)
def test_mistakes_are_told_by_the_names_of_the_arguments(folder: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{said}") as told:
        PairLoader(folder, views=VIEWS, loader="pillow", **({"batch_size": 6} | options))
    assert "--" not in str(told.value)
    PairLoader(folder, views=VIEWS, loader="pillow", batch_size=64, drop_last=False)


def _uneven(world: World, folder: Path) -> str:
    with pytest.raises(UserError) as told:
        PairLoader(folder, views=VIEWS, batch_size=7, loader="pillow")
    return str(told.value)


def test_a_batch_that_cannot_be_shared_out_is_told(folder: Path) -> None:
    said = "batch_size 7 cannot be shared out evenly to 2 processes: give a multiple of 2"
    assert in_world(2, _uneven, folder) == [said, said]


def test_too_many_images_that_go_bad_are_told_by_the_argument(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "data")
    loader = PairLoader(tmp_path / "data", views=VIEWS, batch_size=6, loader="pillow", max_bad=0)
    next(path for path in (tmp_path / "data").rglob("*.png")).write_bytes(b"no image")
    with pytest.raises(UserError, match=r"more than max_bad 0:(?s:.)*with a higher max_bad") as told:
        epochs(loader, 1)
    assert "--" not in str(told.value)
