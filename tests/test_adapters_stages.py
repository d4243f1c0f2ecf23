"""StageLosses on networks of several kinds, beside the losses computed by hand."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmoco.adapters.stages import StageLosses
from fastmoco.errors import UserError
from fastmoco.losses import StageBarlow
from fastmoco.ops import definitions
from stage_steps import in_lightlys_loop, in_lightning

models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")


class Blocks(nn.Module):
    """A network of one kind of output: maps, tokens or maps with the channels last."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem, self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 12)
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        if self.kind == "tokens":
            x = x.flatten(1, 2)
        return self.norm(self.second(self.first(self.stem(x)).relu()))


def pictures(seed: int, size: int = 32) -> Tensor:
    return torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(seed))


def outputs(model: nn.Module, stage: str, x: Tensor) -> Tensor:
    """What comes out of a part, by a hook of one's own."""
    kept: list[Tensor] = []
    handle = model.get_submodule(stage).register_forward_hook(lambda part, inputs, output: kept.append(output))
    model(x)
    handle.remove()
    return kept[0]


def small_convnext() -> nn.Module:
    settings = [models.convnext.CNBlockConfig(*widths) for widths in ((16, 24, 1), (24, 32, 1), (32, None, 1))]
    return models.ConvNeXt(settings)


def small_vit() -> nn.Module:
    return models.VisionTransformer(image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32)


def small_swin() -> nn.Module:
    return models.SwinTransformer([4, 4], 16, [1, 1], [2, 4], [2, 2])


NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "resnet": (models.resnet18, ["layer1", "layer3"]),
    "convnext": (small_convnext, ["features.1", "features.5"]),
    "efficientnet": (models.efficientnet_b0, ["features.2", "features.4"]),
    "vit": (small_vit, ["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_2"]),
    "swin": (small_swin, ["features.1", "features.3"]),
}


@pytest.mark.parametrize("step", [in_lightlys_loop, in_lightning])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_step_of_torchvisions_networks(network: str, step: Callable[..., None]) -> None:
    torch.manual_seed(0)
    make, stages = NETWORKS[network]
    model = make().train()
    # Drawn anew in each call, the parts that are left out would differ between mine and theirs.
    for part in model.modules():
        if hasattr(part, "p"):
            part.p = 0.0

    def capture(model: nn.Module, x: Tensor) -> list[Tensor]:
        found = [*models.feature_extraction.create_feature_extractor(model, stages)(x).values()]
        return [output.permute(0, 3, 1, 2) for output in found] if network == "swin" else found

    step(model, stages, capture, size=32, channels_last=network == "swin")


@pytest.mark.parametrize("kind", ["mse", "barlow"])
def test_maps_with_the_channels_last_are_not_taken_for_others(kind: Any) -> None:
    model, stages = small_swin().train(), NETWORKS["swin"][1]

    def losses(**options: Any) -> Tensor:
        stage_losses = StageLosses(model, stages=stages, kind=kind, projector_width=24, size=32, **options)
        model(pictures(0))
        model(pictures(1))
        found: Tensor = stage_losses()
        return found

    message = r"features.1 gives maps \(\d, 8, 8, 16\) whose channels are the last.*over 16 say: give channels_last"
    with pytest.raises(UserError, match=message):
        losses()
    for known in (True, False):
        assert losses(channels_last=known).isfinite()


@pytest.mark.parametrize("kind", ["tokens", "last"])
def test_barlow_of_two_calls_of_one_network(kind: str) -> None:
    torch.manual_seed(0)
    model = Blocks(kind)
    losses = StageLosses(
        model, stages=["first", "second"], kind="barlow", projector_width=24, size=8, channels_last=kind == "last"
    )
    assert model.training and len(list(losses.parameters())) == 2 * 7
    model(pictures(0, 8))
    model(pictures(1, 8))
    found = losses()
    expected = torch.zeros(())
    for place, stage in enumerate(("first", "second"), start=1):
        means = [outputs(model, stage, pictures(seed, 8)).flatten(1, -2).mean(1) for seed in (0, 1)]
        assert isinstance(losses.loss, StageBarlow)
        z1, z2 = losses.loss.projectors[f"stage{place}"](*means)
        expected = expected + 5e-4 * definitions.crosscorr(z1, z2, off_diagonal=0.005)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    found.backward()
    assert all(parameter.grad is not None for parameter in losses.parameters())


def test_only_training_of_the_network_itself_is_listened_to() -> None:
    model = Blocks("tokens")
    losses = StageLosses(model, stages=["first"])
    copied = copy.deepcopy(model)
    copied(pictures(0))
    model.eval()(pictures(0))
    with pytest.raises(UserError, match="0 of 2 views went through first"):
        losses()
    model.train()(pictures(0))
    with pytest.raises(UserError, match="1 of 2 views went through first"):
        losses()
    model(pictures(1))
    assert losses() > 0
    # What was seen is used up.
    with pytest.raises(UserError, match="0 of 2 views"):
        losses()
    assert not any("model" in name for name in losses.state_dict())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stages": ["frist"]}, "no part 'frist'; it has first"),
        ({"stages": []}, "at least one"),
        ({"stages": ["first", "first"]}, "different names"),
        ({"kind": "cosine"}, "mse or barlow, not 'cosine'"),
    ],
)
def test_mistakes(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        StageLosses(Blocks("tokens"), **({"stages": ["first"]} | options))


def test_an_output_that_is_no_map_is_named() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    losses = StageLosses(model, stages=["1"])
    for seed in (0, 1):
        model(pictures(seed, 2))
    with pytest.raises(UserError, match=r"1 gives \(4, 4\): maps"):
        losses()


def test_more_calls_than_views_are_told_and_the_last_count() -> None:
    model, key_model = Blocks("tokens"), Blocks("tokens")
    losses = StageLosses(model, key_model, stages=["first"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for query, key in ((0, 1), (1, 0)):
            model(pictures(query)), key_model(pictures(key))
            last = losses()
    for view in (0, 1):
        model(pictures(view))
    for view in (1, 0):
        key_model(pictures(view))
    with pytest.warns(UserWarning, match="2 calls of a network since the last sum, of which the last 1 count"):
        assert losses().item() == last.item()
    alone = StageLosses(model, stages=["first"])
    for view in (2, 0, 1):
        model(pictures(view))
    with pytest.warns(UserWarning, match="3 calls of a network since the last sum, of which the last 2 count"):
        found = alone()
    model(pictures(0)), model(pictures(1))
    assert alone().item() == found.item()


def test_a_network_beside_itself_is_one_network() -> None:
    model = Blocks("tokens")
    losses = StageLosses(model, model, stages=["first"])
    model(pictures(0)), model(pictures(1))
    assert losses() > 0


def test_projectors_take_a_network_in_half_precision() -> None:
    model = Blocks("tokens").bfloat16()
    losses = StageLosses(model, stages=["first"], kind="barlow", projector_width=16, size=8)
    for view in (0, 1):
        model(pictures(view).bfloat16())
    loss = losses()
    loss.backward()
    assert loss.dtype == torch.float32 and model.first.weight.grad is not None
    assert all(parameter.grad is not None for parameter in losses.parameters())


def test_a_network_for_other_pictures_says_what_to_give() -> None:
    with pytest.raises(UserError, match=r"empty picture \(1, 3, 224, 224\).* give size= in pixels"):
        StageLosses(small_vit(), stages=["encoder.layers.encoder_layer_0"], kind="barlow", projector_width=16)
    gray = models.resnet18()
    gray.conv1 = nn.Conv2d(1, 64, 7, 2, 3)
    losses = StageLosses(gray, stages=["layer1"], kind="barlow", projector_width=16, size=32)
    for view in (0, 1):
        gray(pictures(view)[:, :1])
    assert losses().isfinite()


def test_torchs_memory_format_is_not_taken_for_channels_that_are_the_last() -> None:
    model = models.resnet18().to(memory_format=torch.channels_last)
    losses = StageLosses(model, stages=["layer2"], channels_last=True)
    for view in (0, 1):
        model(pictures(view))
    with pytest.raises(UserError, match=r"layer2 gives maps \(4, 128, 4, 4\) whose channels are the second"):
        losses()


@pytest.mark.parametrize("weight", [-1.0, [1, 2], float("nan")])
def test_a_weight_is_one_number_from_zero(weight: Any) -> None:
    with pytest.raises(UserError, match="weight is one number, from 0"):
        StageLosses(Blocks("tokens"), stages=["first"], weight=weight)


def test_a_network_that_is_listened_to_can_be_saved_and_is_let_go() -> None:
    model = Blocks("tokens")
    losses = StageLosses(model, stages=["first"])
    loaded = pickle.loads(pickle.dumps(model))
    loaded(pictures(0)), copy.deepcopy(model)(pictures(0))
    with pytest.raises(UserError, match="0 of 2 views"):
        losses()
    assert len(model.first._forward_hooks) == 1
    del losses
    gc.collect()
    assert not model.first._forward_hooks
