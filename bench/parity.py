"""Do our operations agree with the peers' own? One table: the largest difference in value and in gradient."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.command import start
from bench.harness import Missing
from bench.parity_checks import CHECKS, Check, Loss
from bench.timing import save
from fastmoco.ops.ema import ema_update_

COLUMNS = ["ours", "peer", "sizes", "value", "gradient", "limit", "holds"]
# As a share of the largest number: sums of hundreds to thousands in float32, in another order.
LIMIT = 1e-5


@dataclass(kw_only=True)
class ParityArgs:
    """Compare the operations with lightly's, the paper's and torch's, on the same float32 inputs."""

    out: Path | None = None
    """Markdown file to write; a JSON file of the same name is put beside it."""


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest, each tensor's as a share of the largest number expected in it; infinite where a number of either is
    not finite."""
    if not all(bool(tensor.isfinite().all()) for tensor in (*found, *expected)):
        return math.inf
    return max(float((a - b).abs().max()) / (float(b.abs().max()) or 1.0) for a, b in zip(found, expected, strict=True))


def tensors(check: Check) -> list[Tensor]:
    """The inputs, each of which wants a gradient."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(*shape, generator=generator) for shape in check.shapes]
    # Related, as two views of an image are.
    made[1] = made[0] + made[1]
    made = [F.normalize(tensor, dim=1) for tensor in made] if check.unit else made
    return [tensor.requires_grad_() for tensor in made]


def with_gradients(loss: Loss, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The loss, and its gradients to those of `inputs` that it has."""
    value = loss(*inputs)
    gradients = torch.autograd.grad(value, inputs, allow_unused=True)
    return value.detach(), [g if g is not None else torch.zeros(()) for g in gradients]


def row(check: Check) -> dict[str, Any]:
    """A line of the table; without differences where the peer is not here."""
    sizes = " and ".join(" x ".join(map(str, shape)) for shape in dict.fromkeys(check.shapes))
    line = {"ours": check.ours, "peer": check.peer, "sizes": sizes, "limit": LIMIT, "device": "cpu"}
    try:
        theirs = check.theirs()
    except Missing as missing:
        return line | {"peer": f"{check.peer}: {missing}", "value": None, "gradient": None, "holds": None}
    inputs = tensors(check)
    (own, own_gradients), (other, other_gradients) = (with_gradients(loss, inputs) for loss in (check.own, theirs))
    value, gradient = difference([own], [other]), difference(own_gradients, other_gradients)
    return line | {"value": value, "gradient": gradient, "holds": max(value, gradient) <= LIMIT}


def moving_average() -> dict[str, Any]:
    """The line of the momentum update, which has no gradient."""
    model = nn.Sequential(nn.Linear(257, 129), nn.LayerNorm(129))
    average = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    found, sources = ([p.detach() for p in module.parameters()] for module in (average, model))
    expected = [0.996 * target + (1 - 0.996) * source for target, source in zip(found, sources, strict=True)]
    ema_update_(found, sources, 0.996)
    value = difference(found, expected)
    line = {"ours": "ops.ema_update_", "peer": "a loop in torch", "sizes": "257 x 129", "limit": LIMIT, "device": "cpu"}
    return line | {"value": value, "gradient": None, "holds": value <= LIMIT}


def said(line: dict[str, Any]) -> str:
    """Both differences of a line, or why there are none."""
    if line["holds"] is None:
        return f"left out, {line['peer']}"
    gradient = "no gradient" if line["gradient"] is None else f"gradient {line['gradient']:.1e}"
    return f"value {line['value']:.1e}, {gradient}{'' if line['holds'] else '  DIFFERS'}"


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Whether all that was compared holds, or what does not, and how many had no peer."""
    compared = [line for line in rows if line["holds"] is not None]
    wrong = [line["ours"] for line in compared if not line["holds"]]
    left_out = f"; {len(rows) - len(compared)} left out" if len(compared) < len(rows) else ""
    if wrong:
        return f"{len(wrong)} of {len(compared)} comparisons DO NOT hold, limit {LIMIT:g}: {', '.join(wrong)}{left_out}"
    return f"all {len(compared)} comparisons hold, limit {LIMIT:g}{left_out}"


def main(args: ParityArgs) -> int:
    """Compare, print and write the table; 1 where a difference is above its limit."""
    rows = [*map(row, CHECKS), moving_average()]
    for line in rows:
        print(f"{line['ours']}: {said(line)}")
    print(verdict(rows))
    if args.out is not None:
        save(
            rows,
            args.out,
            title="Our operations beside the peers' own: largest differences",
            command="python -m bench.parity",
            columns=COLUMNS,
            note="float32; differences as shares of the largest number expected. A dash: no gradient, or no peer here.",
        )
        print(f"written: {args.out} and {args.out.with_suffix('.json')}")
    return int(any(line["holds"] is False for line in rows))


if __name__ == "__main__":
    start(main, ParityArgs, "parity")
