"""Do our operations agree with the peers' own? One table: the largest difference in value and in gradient, and how far
both are from the peer's formula in float64.
"""

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

COLUMNS = ["ours", "peer", "sizes", "noise", "value", "gradient", "ours_off", "peer_off", "limit", "holds"]
# As a share of the largest number: sums of hundreds to thousands in float32, in another order.
LIMIT = 1e-5
# Between the two views, whose vectors are of normal numbers. Where views are alike, as those of a trained encoder are,
# contrastive losses have small gradients, the differences of large sums: the peers' own rounding is then above the
# limit, and ours is held to float64 alone.
APART, ALIKE = 1.0, 0.2


@dataclass(kw_only=True)
class ParityArgs:
    """Compare the operations with lightly's, the paper's and torch's, on the same float32 inputs."""

    out: Path | None = None
    """Markdown file to write; a JSON file of the same name is put beside it."""


DIFFERENCES = ("value", "gradient", "ours_off", "peer_off")


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest, each tensor's as a share of the largest number expected in it; infinite where a number of either is
    not finite."""
    if not all(bool(tensor.isfinite().all()) for tensor in (*found, *expected)):
        return math.inf
    return max(float((a - b).abs().max()) / (float(b.abs().max()) or 1.0) for a, b in zip(found, expected, strict=True))


def tensors(check: Check, noise: float) -> list[Tensor]:
    """The inputs, each of which wants a gradient; the second is the first and `noise`."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(*shape, generator=generator) for shape in check.shapes]
    # Related, as two views of an image are.
    made[1] = made[0] + noise * made[1]
    made = [F.normalize(tensor, dim=1) for tensor in made] if check.unit else made
    return [tensor.requires_grad_() for tensor in made]


def with_gradients(loss: Loss, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The loss, and its gradients to those of `inputs` that it has."""
    value = loss(*inputs)
    gradients = torch.autograd.grad(value, inputs, allow_unused=True)
    return value.detach(), [g if g is not None else torch.zeros(()) for g in gradients]


def row(check: Check, noise: float = APART) -> dict[str, Any]:
    """A line of the table; without differences where the peer is not here."""
    sizes = " and ".join(" x ".join(map(str, shape)) for shape in dict.fromkeys(check.shapes))
    line: dict[str, Any] = {
        "ours": check.ours,
        "peer": check.peer,
        "sizes": sizes,
        "noise": noise,
        "limit": LIMIT,
        "device": "cpu",
    }
    try:
        theirs = check.theirs()
    except Missing as missing:
        return line | {"peer": f"{check.peer}: {missing}", **dict.fromkeys(DIFFERENCES), "holds": None}
    inputs = tensors(check, noise)
    own, other = (with_gradients(loss, inputs) for loss in (check.own, theirs))
    line |= {"value": difference([own[0]], [other[0]]), "gradient": difference(own[1], other[1])}
    line |= {"ours_off": None, "peer_off": None}
    if check.exact:
        exact = with_gradients(theirs, [tensor.detach().double().requires_grad_() for tensor in inputs])
        for name, (value, gradients) in (("ours_off", own), ("peer_off", other)):
            line[name] = max(difference([value], [exact[0]]), difference(gradients, exact[1]))
    held = ("ours_off",) if noise == ALIKE else ("value", "gradient", "ours_off")
    return line | {"holds": all(line[name] is None or line[name] <= LIMIT for name in held)}


def moving_average() -> dict[str, Any]:
    """The line of the momentum update, which has no gradient."""
    model = nn.Sequential(nn.Linear(257, 129), nn.LayerNorm(129))
    average = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    found, sources = ([p.detach() for p in module.parameters()] for module in (average, model))
    expected, exact = (
        [0.996 * target.to(kind) + (1 - 0.996) * source.to(kind) for target, source in zip(found, sources, strict=True)]
        for kind in (torch.float32, torch.float64)
    )
    ema_update_(found, sources, 0.996)
    value, ours_off, peer_off = (difference(a, b) for a, b in ((found, expected), (found, exact), (expected, exact)))
    line: dict[str, Any] = {
        "ours": "ops.ema_update_",
        "peer": "a loop in torch",
        "sizes": "257 x 129",
        "noise": None,
        "limit": LIMIT,
    }
    line |= {"value": value, "gradient": None, "ours_off": ours_off, "peer_off": peer_off, "device": "cpu"}
    return line | {"holds": max(value, ours_off) <= LIMIT}


def said(line: dict[str, Any]) -> str:
    """Both differences of a line, or why there are none."""
    if line["holds"] is None:
        return f"left out, {line['peer']}"
    parts = [f"value {line['value']:.1e}"]
    parts.append("no gradient" if line["gradient"] is None else f"gradient {line['gradient']:.1e}")
    if line["ours_off"] is not None:
        parts.append(f"from float64 ours {line['ours_off']:.1e}, theirs {line['peer_off']:.1e}")
    return f"{', '.join(parts)}{'' if line['holds'] else '  DIFFERS'}"


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Whether all that was compared holds, or what does not, and how many had no peer."""
    compared = [line for line in rows if line["holds"] is not None]
    wrong = list(dict.fromkeys(line["ours"] for line in compared if not line["holds"]))
    number = sum(not line["holds"] for line in compared)
    left_out = f"; {len(rows) - len(compared)} left out" if len(compared) < len(rows) else ""
    if wrong:
        return f"{number} of {len(compared)} comparisons DO NOT hold, limit {LIMIT:g}: {', '.join(wrong)}{left_out}"
    return f"all {len(compared)} comparisons hold, limit {LIMIT:g}{left_out}"


def main(args: ParityArgs) -> int:
    """Compare, print and write the table; 1 where a difference is above its limit."""
    rows = [row(check, noise) for check in CHECKS for noise in (APART, ALIKE) if check.exact or noise == APART]
    rows.append(moving_average())
    for line in rows:
        print(f"{line['ours']}{', views alike' if line['noise'] == ALIKE else ''}: {said(line)}")
    print(verdict(rows))
    if args.out is not None:
        save(
            rows,
            args.out,
            title="Our operations beside the peers' own: largest differences",
            command="python -m bench.parity",
            columns=COLUMNS,
            note="float32; differences as shares of the largest number expected. noise: of the second view, which "
            f"else is the first; of {ALIKE:g}, ours alone is held to the limit, from float64. ours_off, peer_off: the "
            "larger of value's and gradients' difference from the peer's formula in float64. A dash: no gradient, no "
            "float64, or no peer here.",
        )
        print(f"written: {args.out} and {args.out.with_suffix('.json')}")
    return int(any(line["holds"] is False for line in rows))


if __name__ == "__main__":
    start(main, ParityArgs, "parity")
