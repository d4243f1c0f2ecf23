"""The transcription itself against first principles: closed forms, hand arithmetic, finite differences."""

from __future__ import annotations

import ast
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import paper as transcription
from bench.paper import (
    Paper,
    Record,
    StageLoss,
    State,
    barlow,
    cross_correlation,
    encode,
    info_nce,
    parameters_of,
    stage_mse,
)
from parity import assert_states_close, gradient_cosine, relative_error

ARCH, DIM, WIDTH, K, BATCH = "resnet18", 6, 9, 7, 3
EXACT = 1e-12  # the same float64 arithmetic in another order


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def views(step: int) -> tuple[Tensor, Tensor]:
    x = randn(2, BATCH, 3, 32, 32, seed=1000 + step).sigmoid()
    return x[0], x[1]


@cache
def encoder_state(mlp: bool) -> State:
    return transcription.initial_encoder_state(ARCH, DIM, mlp=mlp, seed=0, dtype=torch.float64)


@cache
def projector_states() -> list[State]:
    return transcription.initial_projector_states(ARCH, WIDTH, seed=1, dtype=torch.float64)


def make(stage_loss: StageLoss = "none", *, mlp: bool = False, **options: Any) -> Paper:
    return Paper(
        encoder_state=encoder_state(mlp),
        projector_states=projector_states() if stage_loss == "barlow" else [],
        queue=3 * randn(K, DIM, seed=99),
        arch=ARCH,
        mlp=mlp,
        stage_loss=stage_loss,
        **options,
    )


Trained = tuple[Paper, list[Record]]
STRONG: dict[str, Any] = {"m": 0.7, "lr": 0.3, "weight_decay": 0.1}  # so that every term shows in three steps


@pytest.fixture(scope="module")
def trained() -> Trained:
    """Three steps of Barlow; the Paper is left as after the last."""
    paper = make("barlow", **STRONG)
    return paper, [paper.step(*views(t)) for t in range(3)]


def test_imports_nothing_of_the_package() -> None:
    tree = ast.parse(Path(transcription.__file__).read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    roots = {name.split(".")[0] for name in names}
    assert roots == {"__future__", "collections", "copy", "dataclasses", "typing", "torch", "torchvision"}


def test_ema_closed_form_with_a_fixed_query() -> None:
    paper = make(m=0.8)
    start = {name: p + 1.0 for name, p in parameters_of(paper.key).items()}
    paper.key.load_state_dict(start, strict=False)
    buffers = {name: b.clone() for name, b in paper.key.named_buffers()}
    for buffer in paper.query.buffers():  # apart from the key's, so that averaging buffers would show
        buffer += 5
    target = parameters_of(paper.query)
    for _ in range(4):
        paper.update_key()
    # theta_4 = m^4 theta_0 + (1 - m^4) theta_q
    expected = {name: 0.8**4 * start[name] + (1 - 0.8**4) * target[name] for name in start}
    assert_states_close(parameters_of(paper.key), expected, EXACT, "key")
    assert all(torch.equal(b, buffers[name]) for name, b in paper.key.named_buffers())


def test_key_forward_averages_with_the_query_of_the_step_before(trained: Trained) -> None:
    key = query = parameters_of(make().query)
    for record in trained[1]:
        key = {name: 0.7 * key[name] + 0.3 * query[name] for name in key}
        assert_states_close(record.key_parameters, key, EXACT, "key")
        query = record.query_parameters
    assert relative_error(key["fc.weight"], encoder_state(False)["fc.weight"]) > 1e-3


def test_key_buffers_come_from_its_own_forward() -> None:
    paper = make()
    x_q, x_k = views(0)
    paper.step(x_q, x_k)
    # The query and key were equal, so that the first average left the key's weights where they were.
    stem = F.conv2d(x_k, encoder_state(False)["conv1.weight"], stride=2, padding=3).transpose(0, 1).flatten(1)
    assert relative_error(paper.key.bn1.running_mean, 0.1 * stem.mean(1)) < EXACT
    assert relative_error(paper.key.bn1.running_var, 0.9 + 0.1 * stem.var(1)) < EXACT


def test_gradient_never_enters_the_key_encoder(trained: Trained) -> None:
    paper = trained[0]
    assert all(not p.requires_grad and p.grad is None for p in paper.key.parameters())
    assert not paper.queue.requires_grad
    expected = {id(p) for module in (paper.query, *paper.projectors) for p in module.parameters()}
    assert {id(p) for p in paper.momentum_buffers} == expected


def test_info_nce_is_log_sum_exp_minus_positive() -> None:
    q, k = F.normalize(randn(5, DIM, seed=1), dim=1), F.normalize(randn(5, DIM, seed=2), dim=1)
    queue, tau = F.normalize(randn(K, DIM, seed=3), dim=1), 0.07
    expected = 0.0
    for i in range(5):
        scores = [sum(q[i, d].item() * v[d].item() for d in range(DIM)) / tau for v in (k[i], *queue)]
        expected += (math.log(sum(math.exp(s) for s in scores)) - scores[0]) / 5
    assert info_nce(q, k, queue, tau).item() == pytest.approx(expected, rel=EXACT)


def test_step_contrasts_with_the_queue_before_it_enqueues_its_keys() -> None:
    paper = make(tau=0.2)
    before = paper.queue.clone()
    x_q, x_k = views(0)
    q, k = (
        encode(paper.query, x_q)[0],
        encode(paper.key, x_k)[0],
    )  # equal weights: the average changes nothing
    record = paper.step(x_q, x_k)
    assert relative_error(record.losses["infonce"], info_nce(q, k, before, 0.2)) < EXACT
    assert relative_error(info_nce(q, k, record.queue, 0.2), record.losses["infonce"]) > 1e-3
    assert record.pointer == BATCH
    assert relative_error(record.queue, torch.cat([k, before[BATCH:]])) < EXACT


def test_queue_is_normalised_and_a_ring_of_seven_takes_batches_of_three() -> None:
    paper = make()
    assert relative_error(paper.queue.norm(dim=1), torch.ones(K, dtype=torch.float64)) < EXACT
    keys = [randn(BATCH, DIM, seed=t) for t in range(4)]
    for batch, pointer in zip(keys, (3, 6, 2, 5), strict=True):
        paper.enqueue(batch)
        assert paper.pointer == pointer
    # The third batch lies in rows 6, 0, 1 and the fourth in 2, 3, 4; row 5 is still the second's.
    expected = [keys[2][1], keys[2][2], keys[3][0], keys[3][1], keys[3][2], keys[1][2], keys[2][0]]
    assert torch.equal(paper.queue, torch.stack(expected))


@pytest.mark.parametrize("mlp", [False, True])
def test_encoder_is_torchvisions_with_a_normalised_head(mlp: bool) -> None:
    query = make(mlp=mlp).query
    head = {name: tuple(p.shape) for name, p in query.fc.named_parameters()}
    one, two = {"weight": (DIM, 512), "bias": (DIM,)}, {"0.weight": (512, 512), "0.bias": (512,)}
    assert head == (two | {f"2.{name}": shape for name, shape in one.items()} if mlp else one)
    x = views(0)[0]
    embedding, stages = encode(query, x)
    assert relative_error(embedding, F.normalize(query(x), dim=1)) < EXACT
    assert [tuple(s.shape[1:]) for s in stages] == [(64, 8, 8), (128, 4, 4), (256, 2, 2), (512, 1, 1)]
    last = [p for name, p in query.named_parameters() if name.endswith("bn2.weight")]
    assert len(last) == 8 and not any(p.any() for p in last)  # zero-init residual


def test_pooling_to_a_finer_grid_repeats_and_to_a_coarser_averages() -> None:
    a, b = randn(2, 3, 8, 8, seed=1), randn(2, 3, 8, 8, seed=2)
    repeated = (a - b).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert relative_error(stage_mse(a, b, 16), repeated.square().mean()) < EXACT

    b, difference = randn(2, 3, 5, 5, seed=1), randn(2, 3, 5, 5, seed=2)  # 5 -> 2: the windows overlap
    windows = [difference[:, :, i : i + 3, j : j + 3].mean(dim=(2, 3)) for i in (0, 2) for j in (0, 2)]
    assert relative_error(stage_mse(b + difference, b, 2), torch.stack(windows).square().mean()) < EXACT


@pytest.mark.parametrize("grids", [(16, 16, 4, 4), (1, 1, 1, 1)])
def test_mse_losses_enter_the_sum_weighted(grids: tuple[int, int, int, int]) -> None:
    paper = make("mse", grids=grids)
    x_q, x_k = views(0)
    a, b = encode(paper.query, x_q)[1], encode(paper.key, x_k)[1]
    losses = paper.step(x_q, x_k).losses
    assert list(losses) == ["infonce", "stage1", "stage2", "stage3", "stage4", "total"]
    for s in range(4):
        assert relative_error(losses[f"stage{s + 1}"], 0.25 * stage_mse(a[s], b[s], grids[s])) < EXACT
    assert relative_error(losses["total"], sum(list(losses.values())[:-1], torch.tensor(0.0))) < EXACT


def test_barlow_is_the_frobenius_distance_to_the_identity() -> None:
    z1, z2 = randn(6, WIDTH, seed=1), randn(6, WIDTH, seed=2)
    c = cross_correlation(z1, z2)
    s1, s2 = ((z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() for z in (z1, z2))
    assert relative_error(c, torch.einsum("ni,nj->ij", s1, s2) / 6) < EXACT
    distance = torch.linalg.matrix_norm(c - torch.eye(WIDTH, dtype=torch.float64)) ** 2
    assert relative_error(barlow(c, 1 / 32, 1.0), distance / 32) < EXACT
    on = sum((c[i, i].item() - 1) ** 2 for i in range(WIDTH))
    off = sum(c[i, j].item() ** 2 for i in range(WIDTH) for j in range(WIDTH) if i != j)
    assert barlow(c, 0.5, 0.005).item() == pytest.approx(0.5 * (on + 0.005 * off), rel=EXACT)


def project(state: State, x: Tensor) -> Tensor:
    """The projector in formulas: (N, d) -> (N, width)."""
    for linear, norm in ((0, 1), (3, 4)):
        x = x @ state[f"{linear}.weight"].T
        x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
        x = (x * state[f"{norm}.weight"] + state[f"{norm}.bias"]).clamp(min=0)
    return x @ state["6.weight"].T


def test_barlow_of_the_step_and_its_projector_gradient_go_through_both_views() -> None:
    paper = make("barlow")
    x_q, x_k = views(0)
    pairs = zip(encode(paper.query, x_q)[1], encode(paper.key, x_k)[1], strict=True)
    pooled = [(a.detach().mean((2, 3)), b.mean((2, 3))) for a, b in pairs]
    record = paper.step(x_q, x_k)

    def loss(s: int, shift_q: float = 0.0, shift_k: float = 0.0) -> float:
        z = []
        for x, shift in zip(pooled[s], (shift_q, shift_k), strict=True):
            state = dict(projector_states()[s])
            state["3.weight"] = state["3.weight"].clone()
            state["3.weight"][4, 5] += shift
            z.append(project(state, x))
        return 5e-5 * barlow(cross_correlation(*z), 1 / 32, 1.0).item()

    h, names = 1e-5, {"0.weight", "1.weight", "1.bias", "3.weight", "4.weight", "4.bias", "6.weight"}
    for s in range(4):
        assert record.projector_gradients[s].keys() == names
        assert record.losses[f"stage{s + 1}"].item() == pytest.approx(loss(s), rel=EXACT)
        analytic = record.projector_gradients[s]["3.weight"][4, 5].item()
        through_q = (loss(s, shift_q=h) - loss(s, shift_q=-h)) / (2 * h)
        through_k = (loss(s, shift_k=h) - loss(s, shift_k=-h)) / (2 * h)
        assert analytic == pytest.approx(through_q + through_k, rel=1e-4)
        assert abs(through_k) > 0.01 * abs(analytic) > 0  # one view alone would have failed


def test_query_gradient_is_the_numerical_one() -> None:
    direction = {name: randn(*p.shape, seed=p.numel()) for name, p in make(mlp=True).query.named_parameters()}

    def step(h: float) -> Record:
        paper = make("mse", mlp=True, m=1.0)
        with torch.no_grad():
            for name, p in paper.query.named_parameters():
                # Away from zero-init, which puts many ReLUs at exactly 0, where there is no derivative.
                p += h * direction[name] + (0.5 if name.endswith("bn2.weight") else 0.0)
        return paper.step(*views(0))

    numerical = (step(1e-7).losses["total"] - step(-1e-7).losses["total"]).item() / 2e-7
    analytic = sum((g * direction[name]).sum().item() for name, g in step(0.0).gradients.items())
    assert analytic == pytest.approx(numerical, rel=1e-4)


def test_sgd_is_torchs_over_query_and_projectors(trained: Trained) -> None:
    torchs = make("barlow")
    modules = (torchs.query, *torchs.projectors)
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.3, momentum=0.9, weight_decay=0.1)
    for record in trained[1]:
        gradients = [g for state in (record.gradients, *record.projector_gradients) for g in state.values()]
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g
        optimizer.step()
        after = (record.query_parameters, *record.projector_parameters)
        for state, module in zip(after, modules, strict=True):
            assert_states_close(state, parameters_of(module), EXACT, "weights")


def test_queue_of_a_record_is_a_copy_that_later_steps_leave_alone(trained: Trained) -> None:
    first, second, third = trained[1]
    assert [first.pointer, second.pointer, third.pointer] == [3, 6, 2]
    assert torch.equal(first.queue[3:], make().queue[3:])
    assert torch.equal(second.queue[:3], first.queue[:3]) and torch.equal(third.queue[2:6], second.queue[2:6])


def test_parity_measures_fail_on_faults() -> None:
    expected = {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(2)}
    assert relative_error(torch.tensor([1.0, 2.2]), expected["a"]) == pytest.approx(0.1, rel=1e-6)
    assert relative_error(torch.tensor([0.0, 0.5]), expected["b"]) == 0.5
    for bad in (math.nan, math.inf):
        assert relative_error(torch.tensor([1.0, bad]), expected["a"]) == math.inf
    assert gradient_cosine({"a": -expected["a"], "b": expected["b"]}, expected) == pytest.approx(-1.0)
    with pytest.raises(ValueError, match="shape"):
        relative_error(torch.zeros(2, 1), expected["b"])
    with pytest.raises(AssertionError, match=r"differ: \['b'\]"):
        assert_states_close({"a": expected["a"]}, expected, 1.0, "x")
    with pytest.raises(AssertionError, match="b is off by 1"):
        assert_states_close({"a": expected["a"], "b": torch.ones(2)}, expected, 0.5, "x")
