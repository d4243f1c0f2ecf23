"""Fine-tuning: which weights are tested, on which images, and what it leaves as it was."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastmoco.data.manifest import Manifest, load_manifest
from fastmoco.data.views import ViewConfig
from fastmoco.errors import UserError
from fastmoco.evaluate import finetune as module
from fastmoco.evaluate.classifier import Classifier
from fastmoco.evaluate.features import evaluation_image, extract
from fastmoco.evaluate.finetune import FinetuneConfig, Finetuned, finetune
from fastmoco.evaluate.images import Images, load_images
from fastmoco.evaluate.targets import Target, make_target
from fastmoco.models.encoder import Encoder
from runs import NARROW, draw_images

SIZE = 24
VIEWS = ViewConfig(size=SIZE, resize=1.0, crop_scale=(0.4, 1.0), flip_p=0.5)
QUICK = FinetuneConfig(batch_size=6, epochs=2, least_steps=1, validate_every=1, views=VIEWS)
# Odd numbers, that no batch divides.
TRAIN, VALIDATION, TEST = np.arange(11), np.arange(11, 18), np.array([23, 18, 19, 20, 22])


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("drawn")
    return load_manifest(draw_images(folder), folder / "labels.csv", label=("kind",), progress=False)


@pytest.fixture(scope="module")
def images(manifest: Manifest) -> Images:
    return load_images(manifest, SIZE, progress=False)


@pytest.fixture(scope="module")
def target(manifest: Manifest) -> Target:
    return make_target(manifest, "kind")


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(NARROW, head="mlp", dim=8, seed=1)


def _run(
    encoder: Encoder | None, images: Images, target: Target, config: FinetuneConfig, *, seed: int = 0
) -> Finetuned:
    return finetune(encoder, images, target, TRAIN, VALIDATION, TEST, config, seed=seed)


def _by_hand(found: Finetuned, images: Images, indices: np.ndarray) -> np.ndarray:
    """Softmax of what the returned modules make of images, one at a time."""
    assert not found.encoder.training and not found.classifier.training
    with torch.no_grad():
        x = images.pixels[torch.from_numpy(indices)].permute(0, 3, 1, 2).float() / 255
        stage4 = torch.cat([found.encoder(one[None]).stages[3].mean(dim=(2, 3)) for one in x])
        made: np.ndarray = found.classifier(stage4).double().softmax(dim=1).numpy()
        return made


def _equal(a: nn.Module, b: nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


def test_the_best_look_is_tested_and_not_the_last(
    encoder: Encoder, images: Images, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted = iter([0.4, 0.9, 0.9, 0.1])
    seen: list[tuple[float, nn.Module]] = []
    real = module._Looks.look

    def look(self: Any, model: nn.Module, **where: Any) -> tuple[float | None, float]:
        _, loss = real(self, model, **where)
        seen.append((loss, copy.deepcopy(model)))
        # The third is as good as the second by its score, and worse by its loss.
        return next(scripted), loss + (10.0 if len(seen) == 3 else 0.0)

    monkeypatch.setattr(module._Looks, "look", look)
    found = _run(encoder, images, target, replace(QUICK, epochs=4))
    assert [row["epoch"] for row in found.curve] == [1, 2, 3, 4]
    assert (found.validation_score, found.best_epoch, found.best_step) == (0.9, 2, 4)
    assert _equal(found.encoder, seen[1][1].encoder) and _equal(found.classifier, seen[1][1].classifier)
    np.testing.assert_allclose(found.probabilities, _by_hand(found, images, TEST), atol=1e-5)
    last = replace_weights(found, seen[-1][1])
    assert np.abs(found.probabilities - _by_hand(last, images, TEST)).max() > 1e-3


def replace_weights(found: Finetuned, model: nn.Module) -> Finetuned:
    return replace(found, encoder=model.encoder.eval(), classifier=model.classifier.eval())


def test_every_test_image_is_scored_in_its_order(encoder: Encoder, images: Images, target: Target) -> None:
    config = replace(QUICK, epochs=1, mode="linear", lr=0.1)
    for test in (TEST, TEST[:1], np.r_[np.tile(TEST, 13), 21]):
        found = finetune(encoder, images, target, TRAIN, VALIDATION, test, config, seed=0)
        assert found.probabilities.shape == (len(test), 2)
        np.testing.assert_allclose(found.probabilities, _by_hand(found, images, test), atol=1e-5)


def test_no_image_is_left_out_of_an_epoch_and_no_batch_is_of_one(
    encoder: Encoder, images: Images, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    real = module._inputs

    def inputs(chosen: Images, batch: np.ndarray, *args: Any, **others: Any) -> torch.Tensor:
        seen.append(batch.tolist())
        return real(chosen, batch, *args, **others)

    monkeypatch.setattr(module, "_inputs", inputs)
    _run(encoder, images, target, replace(QUICK, batch_size=10, epochs=2, mode="linear"))
    # 11 images in batches of 10 at most: not 10 and 1.
    assert [len(batch) for batch in seen] == [6, 5, 6, 5]
    first, second = seen[0] + seen[1], seen[2] + seen[3]
    assert sorted(first) == sorted(second) == list(range(11)) and first != second


def test_colours_are_left_as_they_are(
    encoder: Encoder, images: Images, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[ViewConfig] = []
    real = Images.views

    def views(self: Images, indices: np.ndarray, views: ViewConfig, **draw: Any) -> torch.Tensor:
        drawn.append(views)
        return real(self, indices, views, **draw)

    monkeypatch.setattr(Images, "views", views)
    _run(encoder, images, target, replace(QUICK, mode="linear", epochs=1))
    assert VIEWS.jitters and VIEWS.blurs and VIEWS.gray_p > 0
    assert [(v.jitters, v.blurs, v.gray_p, v.crop_scale, v.flip_p) for v in drawn] == [
        (False, False, 0, (0.4, 1.0), 0.5)
    ] * 2


def test_linear_mode_leaves_the_encoder_bit_for_bit(encoder: Encoder, images: Images, target: Target) -> None:
    before = copy.deepcopy(encoder)
    found = _run(encoder, images, target, replace(QUICK, mode="linear", lr=0.1))
    assert _equal(found.encoder.backbone, before.backbone)
    fresh = _run(encoder, images, target, replace(QUICK, mode="linear", lr=0.0))
    assert not _equal(found.classifier, fresh.classifier)


def _enlarged(encoder: Encoder) -> Encoder:
    """With features 100 times as large."""
    other = copy.deepcopy(encoder)
    first, last = other.backbone.layer4
    # Of two blocks, of which the second passes on what the first makes: the last BatchNorm of each branch.
    for norm in (first.downsample[1], first.bn2, last.bn2):
        with torch.no_grad():
            norm.weight.mul_(100)
            norm.bias.mul_(100)
    assert not last.bn2.weight.any(), "zero_init_residual"
    return other


def test_a_linear_layer_does_not_see_how_large_features_are(encoder: Encoder, images: Images, target: Target) -> None:
    config = replace(QUICK, mode="linear", lr=0.01)
    found, other = (_run(start, images, target, config) for start in (encoder, _enlarged(encoder)))
    np.testing.assert_allclose(other.probabilities, found.probabilities, atol=1e-4)
    np.testing.assert_allclose(100 * other.classifier.weight.detach(), found.classifier.weight.detach(), atol=1e-3)


def test_test_images_leave_a_linear_layer_as_it_is(encoder: Encoder, images: Images, target: Target) -> None:
    pixels = images.pixels.clone()
    pixels[TEST] = 255 - pixels[TEST]
    config = replace(QUICK, mode="linear", lr=0.1)
    found, other = (_run(encoder, shown, target, config) for shown in (images, Images(pixels=pixels)))
    assert _equal(found.classifier, other.classifier)
    assert np.abs(found.probabilities - other.probabilities).max() > 1e-3


def test_features_are_brought_to_one_size_before_a_linear_layer(encoder: Encoder, images: Images) -> None:
    plain, model = (
        Classifier(start, 2, frozen=True, precision="fp32", seed=0) for start in (encoder, _enlarged(encoder))
    )
    small, large = (one.features(images.select(TRAIN)) for one in (plain, model))
    torch.testing.assert_close(large, 100 * small, rtol=1e-4, atol=1e-3)
    model.standardise(images.select(TRAIN))
    features = (model.features(images.select(TRAIN)) - model.shift) * model.scale
    assert features.mean(0).abs().max() < 1e-4 and float(features.square().mean()) == pytest.approx(1, rel=1e-4)
    linear = model.linear()
    raw = model.features(images.select(TEST))
    torch.testing.assert_close(linear(raw), model.classify(raw), rtol=1e-4, atol=1e-4)


def test_full_mode_trains_every_weight_of_a_copy(encoder: Encoder, images: Images, target: Target) -> None:
    before = copy.deepcopy(encoder)
    found = _run(encoder, images, target, QUICK)
    assert _equal(encoder, before) and all(p.requires_grad for p in encoder.parameters())
    assert isinstance(found.encoder.head, nn.Identity)
    mine, start = found.encoder.backbone.state_dict(), before.backbone.state_dict()
    assert not [name for name in mine if torch.equal(mine[name], start[name])]


def test_the_encoder_may_have_a_rate_of_its_own(encoder: Encoder, images: Images, target: Target) -> None:
    found = _run(encoder, images, target, replace(QUICK, encoder_lr=0.0))
    start, mine = dict(encoder.backbone.named_parameters()), dict(found.encoder.backbone.named_parameters())
    assert all(torch.equal(mine[name], start[name]) for name in mine)
    assert not _equal(found.encoder.backbone.bn1, encoder.backbone.bn1), "BatchNorm's statistics learn all the same"


def test_scratch_starts_from_the_seeds_weights(images: Images, target: Target) -> None:
    still = replace(QUICK, mode="scratch", arch="resnet18", lr=0.0, epochs=1, batch_size=11, views=None)
    a, b, c = (_run(None, images, target, still, seed=seed) for seed in (0, 0, 1))
    own = Encoder("resnet18", seed=0).backbone
    assert torch.equal(a.encoder.backbone.conv1.weight, own.conv1.weight)
    assert _equal(a.encoder, b.encoder) and not torch.equal(a.classifier.weight, c.classifier.weight)
    assert not torch.equal(a.encoder.backbone.conv1.weight, c.encoder.backbone.conv1.weight)


def test_a_seed_fixes_all_of_it(encoder: Encoder, images: Images, target: Target) -> None:
    torch.manual_seed(5)
    a = _run(encoder, images, target, QUICK)
    state = torch.random.get_rng_state()
    torch.manual_seed(6)
    b = _run(encoder, images, target, QUICK)
    c = _run(encoder, images, target, QUICK, seed=1)
    assert a.curve == b.curve and np.array_equal(a.probabilities, b.probabilities)
    assert _equal(a.encoder, b.encoder) and _equal(a.classifier, b.classifier)
    assert not np.array_equal(a.probabilities, c.probabilities)
    torch.manual_seed(5)
    assert torch.equal(state, torch.random.get_rng_state()), "the global random state is the caller's"


def test_it_learns_what_can_be_learnt(images: Images) -> None:
    """Two columns of colour, told apart by sigmoids, from scratch; the third is the same in all, and left out."""
    rng = np.random.default_rng(0)
    values = np.c_[rng.integers(0, 2, (48, 2)), np.zeros(48, dtype=np.int64)]
    noise = rng.integers(90, 120, (48, SIZE, SIZE, 3))
    noise[..., :2] += 100 * values[:, None, None, :2]
    coloured = Images(pixels=torch.from_numpy(noise.astype(np.uint8)))
    target = Target(name="colours", kind="multilabel", class_names=["red", "green", "none"], values=values)
    config = replace(QUICK, mode="scratch", batch_size=16, epochs=12, validate_every=24)
    part = np.arange(24), np.arange(24, 36), np.arange(36, 48)
    found = finetune(None, coloured, target, *part, config, seed=0)
    assert found.validation_score > 0.9
    truth, said = values[36:], found.probabilities
    assert said.shape == (12, 3) and said[:, 2].max() < 0.5
    for column in (0, 1):
        yes, no = said[truth[:, column] == 1, column], said[truth[:, column] == 0, column]
        assert (yes[:, None] > no[None]).mean() > 0.9
    # Sigmoids: a softmax's would sum to 1.
    assert np.abs(said.sum(axis=1) - 1).min() > 0.1


def test_bfloat16_is_the_same_to_its_rounding(encoder: Encoder, images: Images, target: Target) -> None:
    still = replace(QUICK, mode="linear", lr=0.0, epochs=1, views=None)
    wide, narrow = _run(encoder, images, target, still), _run(encoder, images, target, replace(still, precision="bf16"))
    assert 0 < np.abs(wide.probabilities - narrow.probabilities).max() < 0.02


def test_steps_epochs_and_patience_end_it(encoder: Encoder, images: Images, target: Target) -> None:
    linear = replace(QUICK, mode="linear", views=None, batch_size=5)

    def steps(**changes: Any) -> list[int]:
        return [row["step"] for row in _run(encoder, images, target, replace(linear, **changes)).curve]

    # 11 images are 3 batches of 5 at most.
    assert steps(epochs=2) == [3, 6]
    assert steps(epochs=1, least_steps=8) == [3, 6, 8]
    assert steps(epochs=9, most_steps=4) == [3, 4]
    assert steps(epochs=4, validate_every=4) == [6, 12]
    # Nothing is ever better than the first look if nothing is learnt.
    assert steps(epochs=9, lr=0.0, patience=2) == [3, 6, 9]


def test_what_cannot_be_trained_is_refused(encoder: Encoder, images: Images, target: Target) -> None:
    with pytest.raises(UserError, match="--mode full needs pretrained"):
        _run(None, images, target, QUICK)
    with pytest.raises(UserError, match="--mode scratch takes no pretrained"):
        _run(encoder, images, target, replace(QUICK, mode="scratch"))
    with pytest.raises(UserError, match="at least 2 training images"):
        finetune(encoder, images, target, TRAIN[:1], VALIDATION, TEST, QUICK, seed=0)
    with pytest.raises(UserError, match="no validation AUC"):
        finetune(encoder, images, target, TRAIN, np.array([0, 1]), TEST, replace(QUICK, epochs=1), seed=0)
    with pytest.raises(UserError, match="diverged"):
        _run(encoder, images, target, replace(QUICK, lr=1e30, epochs=2))
    for changes in ({"batch_size": 1}, {"epochs": 0}, {"lr": -1.0}, {"patience": 0}, {"encoder_lr": float("nan")}):
        with pytest.raises(UserError, match=f"--{next(iter(changes)).replace('_', '-')} must"):
            FinetuneConfig(**changes)  # type: ignore[arg-type]


def test_images_in_memory_are_the_evaluations(manifest: Manifest, images: Images, encoder: Encoder) -> None:
    bigger = load_images(manifest, SIZE, resize=1.25, workers=1, progress=False)
    for i in (0, 5, 23):
        for held, resize in ((images, 1.0), (bigger, 1.25)):
            wanted = evaluation_image(manifest.decode(i), size=SIZE, resize=resize) * 255
            assert (held.pixels[i].permute(2, 0, 1) - wanted).abs().max() <= 0.5 + 1e-4
    found, wanted = images.features(encoder, batch_size=7), extract(encoder, manifest, size=SIZE, progress=False)
    assert found.keys() == wanted.keys()
    for name in found:
        assert np.abs(found[name] - wanted[name]).max() <= 0.02 * np.abs(wanted[name]).max()
    with pytest.raises(UserError, match=r"--size 24: 24 images take .* GiB"):
        load_images(manifest, SIZE, most_bytes=24 * SIZE * SIZE * 3 - 1)


def test_views_are_cut_from_the_images(images: Images) -> None:
    indices = np.array([4, 0, 9])
    mirror = replace(VIEWS, crop_scale=None, flip_p=1.0, jitter_p=0, gray_p=0, blur_p=0)
    flipped = images.views(indices, mirror, seed=0, epoch=1)
    wanted = images.pixels[torch.from_numpy(indices)].flip(2).permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(flipped.float(), wanted, atol=1e-3, rtol=0)
    assert flipped.is_contiguous(memory_format=torch.channels_last)
    crops = [images.views(indices, VIEWS, seed=0, epoch=epoch) for epoch in (1, 1, 2)]
    assert torch.equal(crops[0], crops[1]) and not torch.equal(crops[0], crops[2])
    # What an image becomes does not depend on the batch it comes in.
    assert torch.equal(images.views(indices[1:], VIEWS, seed=0, epoch=1), crops[0][1:])
