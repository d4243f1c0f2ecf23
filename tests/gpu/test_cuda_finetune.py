"""Fine-tuning on a GPU: it sees what the CPU sees, and learns."""

import numpy as np
import pytest
import torch

from cuda_checks import DEVICE
from fastmoco.data.views import ViewConfig
from fastmoco.evaluate.finetune import FinetuneConfig, finetune
from fastmoco.evaluate.images import Images, views_device
from fastmoco.evaluate.targets import Target
from fastmoco.models.encoder import Encoder

pytestmark = pytest.mark.gpu
VIEWS = ViewConfig(size=32, resize=1.0, crop_scale=(0.4, 1.0), rotation=20.0, flip_p=0.5)
COUNT = 160


def coloured() -> tuple[Images, Target]:
    """Grain, red or green: two classes."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2, COUNT)
    pixels = rng.integers(80, 150, (COUNT, 32, 32, 3))
    pixels[np.arange(COUNT), ..., values] += 60
    target = Target(name="colour", kind="binary", class_names=["red", "green"], values=values)
    return Images(pixels=torch.from_numpy(pixels.astype(np.uint8))), target


PARTS = np.arange(70), np.arange(70, 115), np.arange(115, COUNT)


def test_features_and_views_are_the_cpus() -> None:
    images, _ = coloured()
    encoder = Encoder("resnet18", seed=0)
    wanted = images.features(encoder)
    with torch.backends.cudnn.flags(allow_tf32=False):
        found = images.on(DEVICE).features(encoder, device=DEVICE)
    for name in wanted:
        assert np.abs(found[name] - wanted[name]).max() <= 1e-3 * np.abs(wanted[name]).max(), name
    indices = np.array([9, 3, 77])
    cut = images.views(indices, VIEWS, seed=0, epoch=2)
    there = images.on(views_device(DEVICE)).views(indices, VIEWS, seed=0, epoch=2)
    assert there.is_contiguous(memory_format=torch.channels_last)
    assert (there.cpu().float() - cut.float()).abs().max() <= 2.0**-10


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_learns(precision: str) -> None:
    images, target = coloured()
    config = FinetuneConfig(mode="scratch", views=VIEWS, epochs=10, least_steps=40, precision=precision)  # type: ignore[arg-type]
    found = finetune(None, images, target, *PARTS, config, seed=0, device=DEVICE)
    assert found.validation_score > 0.95 and found.curve[-1]["loss"] < 0.3
    assert found.probabilities.shape == (45, 2)
    assert (found.probabilities.argmax(axis=1) == target.values[PARTS[2]]).mean() > 0.9
    assert next(found.encoder.parameters()).device.type == DEVICE.type


def test_a_frozen_encoder_stays_as_it_is() -> None:
    images, target = coloured()
    encoder = Encoder("resnet18", seed=0)
    before = {name: value.clone() for name, value in encoder.backbone.state_dict().items()}
    config = FinetuneConfig(mode="linear", views=None, epochs=3, least_steps=1)
    found = finetune(encoder, images, target, *PARTS, config, seed=0, device=DEVICE)
    after = found.encoder.backbone.state_dict()
    assert all(torch.equal(after[name].cpu(), before[name]) for name in before)
