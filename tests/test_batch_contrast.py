"""NT-Xent, its margin and the supervised contrastive loss against their definitions, and the mixed samples' term."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmoco.ops import definitions
from fastmoco.ops.batch_contrast import ntxent, supcon
from fastmoco.ops.mixed_crosscorr import mix, mixed_crosscorr

LABELS = torch.tensor([4, 0, 4, 2, -1, 0, 4, -1, 7])


def views(n: int, d: int, dtype: torch.dtype = torch.float64, count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n * d)
    first = torch.randn(n, d, generator=generator, dtype=torch.float64)
    made = [3 * first + torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [z.to(dtype).requires_grad_() for z in made]


def compare(found: Tensor, expected: Tensor, inputs: list[Tensor], tolerance: float) -> None:
    """Values, and the gradients to all of `inputs`."""
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)
    own = torch.autograd.grad(2.5 * found, inputs)
    other = torch.autograd.grad(2.5 * expected, inputs)
    for a, b in zip(own, other, strict=True):
        assert float(b.abs().max()) > 0
        assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())


@pytest.mark.parametrize("margin", [0.0, 0.3])
@pytest.mark.parametrize(("n", "d"), [(2, 3), (9, 5), (33, 17)])
@pytest.mark.parametrize("implementation", ["reference", None])
def test_ntxent_is_its_definition(n: int, d: int, margin: float, implementation: str | None) -> None:
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        z1, z2 = views(n, d, dtype)
        if dtype == torch.float64 and implementation is None:
            continue
        found = ntxent(z1, z2, temperature=0.2, margin=margin, implementation=implementation)
        expected, rank = definitions.supcon(z1, z2, torch.arange(n), temperature=0.2, margin=margin)
        compare(found.loss, expected, [z1, z2], tolerance)
        assert torch.equal(found.rank, rank)


def test_ntxent_of_some_rows_against_everyone() -> None:
    z1, z2 = views(9, 5)
    rows = slice(0, 4), slice(4, 9)
    parts = [ntxent(z1[r], z2[r], temperature=0.5, everyone=(z1, z2), first=r.start).loss for r in rows]
    whole = ntxent(z1, z2, temperature=0.5).loss
    compare((4 * parts[0] + 5 * parts[1]) / 9, whole, [z1, z2], 1e-12)


@pytest.mark.parametrize("targets", [LABELS, LABELS * 0, LABELS * 0 - 1, torch.arange(9) + 5])
def test_supcon_is_its_definition(targets: Tensor) -> None:
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        z1, z2 = views(9, 6, dtype)
        found = supcon(z1, z2, targets, temperature=0.1)
        expected, rank = definitions.supcon(z1, z2, targets, temperature=0.1)
        compare(found.loss, expected, [z1, z2], tolerance)
        assert torch.equal(found.rank, rank)


def test_one_image_has_no_negatives_and_no_loss() -> None:
    z1, z2 = views(1, 4)
    found = ntxent(z1, z2, temperature=0.3)
    assert found.loss.item() == 0 and not torch.autograd.grad(found.loss, z1)[0].any()


def test_supcon_where_no_image_has_class_mates_is_ntxent() -> None:
    z1, z2 = views(7, 4)
    alone = torch.tensor([3, -1, 5, -1, 0, 9, 8])
    compare(supcon(z1, z2, alone, temperature=0.3).loss, ntxent(z1, z2, temperature=0.3).loss, [z1, z2], 1e-12)


@pytest.mark.parametrize(("n", "d"), [(5, 24), (24, 5)])
def test_mixed_crosscorr_is_its_definition_in_both_forms(n: int, d: int) -> None:
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 3e-4)):
        inputs = views(n, d, dtype, count=3)
        for share in (0.3, torch.tensor(0.3, dtype=dtype)):
            found = mixed_crosscorr(*inputs, order, share)
            compare(found, definitions.mixed_crosscorr(*inputs, order, 0.3), inputs, tolerance)


def test_a_projection_that_mixes_alike_costs_nothing() -> None:
    """Standardised already, and as uncorrelated as the mixture's own deviation stays one."""
    z = definitions.standardize(torch.randn(8, 4, dtype=torch.float64))
    z = z / z.std(dim=0, unbiased=False)
    order = torch.arange(8)
    assert mixed_crosscorr(mix(z, z, order, 0.25), z, z, order, 0.25).item() < 1e-9
    assert mixed_crosscorr(mix(z, z, order.flip(0), 0.25), z, z, order, 0.25).item() > 1e-3


def test_mix_takes_the_second_views_in_the_order_given() -> None:
    a, b = torch.rand(3, 1, 2, 2), torch.rand(3, 1, 2, 2)
    mixed = mix(a, b, torch.tensor([2, 0, 1]), torch.tensor(0.25))
    torch.testing.assert_close(mixed[1], 0.25 * a[1] + 0.75 * b[0])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda z, t: ntxent(z, z[:3], temperature=0.1), "alike"),
        (lambda z, t: ntxent(z, z, temperature=0.0), "temperature must be above 0"),
        (lambda z, t: supcon(z, z, t[:2], temperature=0.1), "targets must be"),
        (lambda z, t: supcon(z, z, t.float(), temperature=0.1), "int64"),
        (lambda z, t: mixed_crosscorr(z, z, z, t[:2], 0.5), "order"),
        (lambda z, t: mixed_crosscorr(z[:1], z[:1], z[:1], t[:1], 0.5), "at least 2"),
    ],
)
def test_what_does_not_fit_is_said(call: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(torch.randn(4, 3), torch.arange(4))  # type: ignore[operator]
