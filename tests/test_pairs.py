"""Pairs of two images of one patient: which they are, what alone decides it, and what happens to bad files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_loader import DAMAGES, KINDS, SHAPES, VIEWS, assert_same, need_dali, spoil
from test_pretrain import final_tensors, loss_columns, resumed
from test_run_images import changed, stopped_at

from fastmoco.data.draws import draw
from fastmoco.data.loader import Batch, LoaderKind, make_loader
from fastmoco.data.manifest import Manifest
from fastmoco.data.order import Order
from fastmoco.data.pairs import Pairs, find_pairs
from fastmoco.data.quarantine import Quarantine
from fastmoco.errors import UserError
from fastmoco.ops.views import make_views
from fastmoco.train.pretrain import pretrain
from runs import draw_images, small_config

pytestmark = pytest.mark.usefixtures("undrawn")

# Five images of d, four of a, two of b, one of c, and three of nobody knows whom.
PATIENTS = np.array(["a", "b", "a", "", "c", "d", "a", "d", "b", "", "d", "a", "d", "", "d"])
SEED = 2


def others(index: int) -> list[int]:
    """By definition: the other images of the patient of image `index`."""
    named = PATIENTS[index] != ""
    return [i for i in range(len(PATIENTS)) if named and i != index and PATIENTS[i] == PATIENTS[index]]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate(SHAPES):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    files = [f"{i}.png" for i in range(len(SHAPES))]
    stats = [(tmp_path / name).stat() for name in files]
    stamps = np.array([(stat.st_size, stat.st_mtime_ns) for stat in stats], dtype=np.int64)
    return Manifest(
        root=tmp_path, files=files, sizes=np.array(SHAPES, dtype=np.int32), stamps=stamps, patients=PATIENTS
    )


@pytest.fixture
def pairs(manifest: Manifest) -> Pairs:
    found = find_pairs("patient", manifest)
    assert found is not None
    return found


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> LoaderKind:
    if request.param == "dali":
        need_dali()
    return request.param  # type: ignore[no-any-return]


def partners(pairs: Pairs, epoch: int, turn: int = 0, seed: int = SEED) -> np.ndarray:
    everything = np.arange(len(pairs))
    return pairs.partners(seed, epoch, everything, np.full(len(pairs), turn))


def test_a_partner_is_another_image_of_the_patient_and_a_patients_only_image_its_own(pairs: Pairs) -> None:
    assert len(pairs) == 15 and pairs.paired == 11
    for epoch in range(50):
        found = partners(pairs, epoch, turn=epoch % 3)
        assert found.dtype == np.int64
        for index, partner in enumerate(found.tolist()):
            assert partner in (others(index) or [index])


def test_every_other_image_is_as_likely(pairs: Pairs) -> None:
    epochs = 3000
    found = np.stack([partners(pairs, epoch) for epoch in range(epochs)])
    for index in range(len(pairs)):
        for other in others(index):
            share = 1 / len(others(index))
            # Four standard deviations of a binomial count.
            most = 4 * np.sqrt(epochs * share * (1 - share))
            assert abs((found[:, index] == other).sum() - epochs * share) <= most
    # Two images of one patient do not draw together.
    assert 0.1 < (found[:, 5] == found[:, 7]).mean() < 0.3


def test_partners_depend_on_seed_epoch_image_and_turn_alone(pairs: Pairs) -> None:
    found = partners(pairs, 3)
    some = np.array([14, 0, 7])
    np.testing.assert_array_equal(pairs.partners(SEED, 3, some, np.zeros(3, dtype=np.int64)), found[some])
    for other in (partners(pairs, 4), partners(pairs, 3, turn=9), partners(pairs, 3, seed=SEED + 1)):
        assert (other != found).any()
    assert [pairs.partner(SEED, 3, i, 0, ()) for i in range(15)] == found.tolist()


def test_a_bad_partner_gives_way_to_another_image_of_the_patient(pairs: Pairs) -> None:
    for epoch in range(40):
        drawn = partners(pairs, epoch)
        for index in range(15):
            for bad in ({5, 12}, {0, 2, 8}, {int(drawn[index])} - {index}):
                found = pairs.partner(SEED, epoch, index, 0, bad)
                good = [other for other in others(index) if other not in bad]
                assert found in (good or [index])
                # Whatever is good stays as it was.
                assert found == drawn[index] or int(drawn[index]) in bad


def test_queries_come_as_without_pairs_whatever_the_shards(pairs: Pairs) -> None:
    plain = Order(15, 4, SEED, drop_last=False)
    whole = Order(15, 4, SEED, drop_last=False, pairs=pairs)
    for t in range(8):
        slots = whole.batch(t)
        for ours, without in zip(slots[1:4], plain.batch(t)[1:4], strict=True):
            np.testing.assert_array_equal(ours, without)
        np.testing.assert_array_equal(plain.batch(t).keys, plain.batch(t).indices)
        np.testing.assert_array_equal(slots.keys, pairs.partners(SEED, t // 4, slots.indices, slots.turns))
        for shards in (2, 4):
            parts = [Order(15, 4, SEED, False, shard, shards, pairs) for shard in range(shards)]
            np.testing.assert_array_equal(np.concatenate([part.batch(t).keys for part in parts]), slots.keys)
    # What fills the last batch up has other partners than in its own place, once in a while.
    repeats = [(whole.batch(4 * e).keys[0], whole.batch(4 * e + 3).keys[3]) for e in range(30)]
    assert any(own != again for own, again in repeats)


def test_data_without_pairs_are_refused(manifest: Manifest, pairs: Pairs) -> None:
    assert find_pairs("image", replace(manifest, patients=None)) is None
    with pytest.raises(UserError, match=r"--pairs patient: .*which patient.*--labels.*--patient-column.*--pairs image"):
        find_pairs("patient", replace(manifest, patients=None))
    for alone in (np.full(15, ""), np.arange(15).astype(str)):
        with pytest.raises(UserError, match=r"no patient has two of the 15 images.*--patient-column.*--pairs image"):
            find_pairs("patient", replace(manifest, patients=alone))
    with pytest.raises(UserError, match="pairs of 15 images are given with an order of 14"):
        Order(14, 4, SEED, pairs=pairs)


def load(
    kind: LoaderKind,
    manifest: Manifest,
    pairs: Pairs | None,
    *,
    start: int = 0,
    stop: int = 8,
    workers: int = 1,
    shard: int = 0,
    shards: int = 1,
    quarantine: Quarantine | None = None,
) -> list[Batch]:
    order = Order(15, 4, SEED, drop_last=False, shard=shard, shards=shards, pairs=pairs)
    with make_loader(
        kind, manifest, VIEWS, order, start=start, stop=stop, workers=workers, quarantine=quarantine
    ) as batches:
        return list(batches)


def key_view(
    kind: LoaderKind, manifest: Manifest, image: np.ndarray, epoch: int, index: int, turn: int
) -> torch.Tensor:
    """By definition: the second view (3, size, size) of query `index`, cut from `image`."""
    drawn = draw(
        VIEWS, seed=SEED, epoch=epoch, indices=np.array([index]), view=1, sizes=np.array([image.shape[:2]]), turns=turn
    )
    implementation = "reference" if kind == "torchvision" else None
    made = make_views([image], drawn, size=VIEWS.size, blur_kernel=VIEWS.blur_kernel, implementation=implementation)
    return made[0].permute(2, 0, 1)


def test_keys_are_cut_from_partners_and_queries_as_ever(kind: LoaderKind, manifest: Manifest, pairs: Pairs) -> None:
    order = Order(15, 4, SEED, drop_last=False, pairs=pairs)
    for t, (batch, plain) in enumerate(zip(load(kind, manifest, pairs), load(kind, manifest, None), strict=True)):
        slots = order.batch(t)
        np.testing.assert_array_equal(batch.indices, plain.indices)
        assert torch.equal(batch.q, plain.q)
        for row, (index, key, turn) in enumerate(zip(slots.indices, slots.keys, slots.turns, strict=True)):
            view = key_view(kind, manifest, manifest.decode(int(key)), t // 4, int(index), int(turn))
            assert torch.equal(batch.k[row], view)
            assert torch.equal(batch.k[row], plain.k[row]) == (key == index)


def test_resume_shards_threads_and_decoders_make_no_difference(
    kind: LoaderKind, manifest: Manifest, pairs: Pairs
) -> None:
    whole = load(kind, manifest, pairs)
    for start in (1, 5):
        assert_same(load(kind, manifest, pairs, start=start), whole[start:])
    for workers in (0, 3):
        assert_same(load(kind, manifest, pairs, workers=workers), whole)
    if kind == "dali":
        assert_same(load("pillow", manifest, pairs), whole)
    for shards in (2, 4):
        parts = [load(kind, manifest, pairs, shard=shard, shards=shards) for shard in range(shards)]
        together = [
            Batch(
                torch.cat([b.q for b in row]), torch.cat([b.k for b in row]), np.concatenate([b.indices for b in row])
            )
            for row in zip(*parts, strict=True)
        ]
        assert_same(together, whole)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_partner_spoilt_during_the_run_is_replaced_and_named(
    kind: LoaderKind, manifest: Manifest, pairs: Pairs, damage: str
) -> None:
    """Image 8 is one of the two of b, 12 one of the five of d: both stop being anyone's partner, as queries too."""
    images = [manifest.decode(i) for i in range(15)]
    untouched = load(kind, manifest, pairs)
    bad = {8, 12}
    for index in bad:
        spoil(manifest.path(index), damage)
    quarantine = Quarantine(2)
    batches = load(kind, manifest, pairs, quarantine=quarantine)
    assert {entry.index for entry in quarantine.entries} == bad
    assert {entry.file for entry in quarantine.entries} == {"8.png", "12.png"}
    order = Order(15, 4, SEED, drop_last=False, pairs=pairs)
    replaced = 0
    for t, (batch, before) in enumerate(zip(batches, untouched, strict=True)):
        slots, epoch = order.batch(t), t // 4
        for row, (index, key, turn, place) in enumerate(
            zip(*(part.tolist() for part in (slots.indices, slots.keys, slots.turns, slots.places)), strict=True)
        ):
            if index in bad:
                index, turn = order.substitute(epoch, place, bad), place + 1
            else:
                assert torch.equal(batch.q[row], before.q[row])
                assert torch.equal(batch.k[row], before.k[row]) == (key not in bad)
                replaced += key in bad
            assert batch.indices[row] == index
            key = pairs.partner(SEED, epoch, index, turn, bad)
            assert torch.equal(batch.k[row], key_view(kind, manifest, images[key], epoch, index, turn))
    assert replaced >= 3
    # What is known to be bad is not read again, and a later start goes on likewise.
    for index in bad:
        manifest.path(index).unlink(missing_ok=True)
    assert_same(load(kind, manifest, pairs, start=3, quarantine=quarantine), batches[3:])
    assert len(quarantine) == 2


def test_a_run_of_pairs_resumes_bit_for_bit_and_refuses_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images, table = draw_images(tmp_path / "data"), tmp_path / "data" / "labels.csv"
    whole, config, plain = (
        small_config(images, tmp_path / name, labels=table, pairs=pairs, steps=4, checkpoint_every=1000)
        for name, pairs in (("whole", "patient"), ("run", "patient"), ("plain", "image"))
    )
    pretrain(whole)
    assert "pairs from two images of a patient: 24 of the images have another" in capsys.readouterr().out
    stopped_at(2, config, monkeypatch)
    with pytest.raises(UserError, match=r"--pairs was patient, is image"):
        pretrain(resumed(changed(config, pairs="image")))
    # The list is lost, and made again from a table of other patients.
    listed = (config.run.out / "manifest.csv").read_bytes()
    (config.run.out / "manifest.csv").unlink()
    table.write_text(table.read_text().replace(",p1,", ",p2,"))
    with pytest.raises(UserError, match=r"not those that the run in .*pairs of other patients"):
        pretrain(resumed(config))
    (config.run.out / "manifest.csv").write_bytes(listed)
    pretrain(resumed(config))
    expected, actual = final_tensors(whole.run.out), final_tensors(config.run.out)
    assert all((value == actual[name]).all() for name, value in expected.items())
    pretrain(plain)
    ours, again, theirs = ([row["loss"] for row in loss_columns(c.run.out)] for c in (whole, config, plain))
    assert ours == again and ours[0] != theirs[0]


def test_a_run_without_two_images_of_any_patient_leaves_nothing_behind(tmp_path: Path) -> None:
    config = small_config(draw_images(tmp_path / "data"), tmp_path / "run", pairs="patient")
    with pytest.raises(UserError, match="--pairs patient: the data do not say which patient"):
        pretrain(config)
    assert not config.run.out.exists()
