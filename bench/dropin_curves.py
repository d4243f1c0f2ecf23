"""Does lightly's MoCo loop learn the same with our operations, loading and arithmetic? Loss curves of several seeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.command import start
from bench.dropin import ALL, LIGHTLY, VARIANTS, Change, Loop, LoopArgs, command
from bench.plot import save_curves
from bench.timing import environment, save
from fastmoco.errors import UserError

# As it is, with its imports changed, with our arithmetic on its views, and with all three lines changed.
COMPARED = {
    LIGHTLY: VARIANTS[LIGHTLY],
    "our operations": VARIANTS["our operations"],
    "our operations and arithmetic": Change(operations=True, arithmetic=True),
    ALL: VARIANTS[ALL],
}
# Standard deviations of lightly's own seeds within which means count as the same.
DEVIATIONS = 2.0
COLUMNS = ["implementation", "precision", "seeds", "steps", "loss_at_end", "deviation", "difference", "limit", "within"]
COLUMNS += ["by_seed"]


@dataclass(kw_only=True)
class CurvesArgs(LoopArgs):
    """Train with lightly's parts and with ours from several seeds, and compare the losses."""

    seeds: int = 3
    """Trainings of each, with seeds 0, 1, ...; at least 2."""
    steps: int = 60
    """Steps of each; at least 3."""
    out: Path | None = None
    """Markdown file to write; a JSON file and a plot of the same name are put beside it."""


def verdict(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """Whether curves (seeds, steps) end as others do: their mean losses over the last third of the steps.

    `difference`: of the two means over the seeds. `limit`: DEVIATIONS times the standard deviation of `theirs` over the
    seeds (n - 1 in the divisor), so that a spread of ours does not widen it. `within`: whether the difference is finite
    and no larger. `differences`: of the same seed, seed by seed; `by_seed` says them. `loss_at_end` and `deviation` are
    those of `ours` alone.
    """
    own, other = (curves[:, -(curves.shape[1] // 3) :].mean(1) for curves in (ours, theirs))
    difference, limit = float(own.mean() - other.mean()), DEVIATIONS * float(other.std(ddof=1))
    differences = (own - other).tolist()
    return {
        "loss_at_end": float(own.mean()),
        "deviation": float(own.std(ddof=1)),
        "difference": difference,
        "limit": limit,
        "within": bool(abs(difference) <= limit),
        "differences": differences,
        "by_seed": ", ".join(f"{value:+.4f}" for value in differences),
    }


def curve(args: CurvesArgs, name: str, seed: int) -> list[float]:
    """The losses of one training."""
    loop = Loop(args, COMPARED[name], seed=seed, normalize=False)
    loop.steps(args.steps)
    return loop.losses


def main(args: CurvesArgs) -> int:
    """Train, print and write the table and the plot; status 1 where ours ends elsewhere than lightly's."""
    if args.seeds < 2 or args.steps < 3:
        raise UserError("--seeds must be at least 2, which have a spread, and --steps at least 3, which have a third")
    trained: dict[str, list[list[float]]] = {name: [] for name in COMPARED}
    for seed in range(args.seeds):
        for name, losses in trained.items():
            losses.append(curve(args, name, seed))
            print(f"seed {seed}, {name}: loss {losses[-1][0]:.3f}, after {args.steps} steps {losses[-1][-1]:.3f}")
    curves = {name: np.array(losses) for name, losses in trained.items()}
    rows: list[dict[str, Any]] = []
    for name, losses in trained.items():
        row: dict[str, Any] = {"op": "dropin curves", "implementation": name, "precision": str(COMPARED[name].variant)}
        row |= {"arch": args.arch, "size": args.size, "batch": args.batch_size}
        row |= {"workers": COMPARED[name].workers(args.workers), "seeds": args.seeds, "steps": args.steps}
        row |= verdict(curves[name], curves[LIGHTLY]) | {"losses": losses}
        rows.append(row | environment())
    same = all(row["within"] for row in rows)
    said = f"The losses {'agree' if same else 'DO NOT AGREE'} within the spread of lightly's seeds."
    for row in rows[1:]:
        found = f"differs by {row['difference']:+.4f} from lightly's, limit {row['limit']:.4f}"
        print(f"{row['implementation']}: mean loss of the last third {row['loss_at_end']:.4f} {found}")
        print(f"  by seed: {row['by_seed']}")
    print(said)
    if args.out is not None:
        write(rows, args, args.out, said)
        plot = args.out.with_suffix(".png")
        print(save_curves(curves, plot, title="Loss: mean over seeds, standard deviation shaded"))
    return 0 if same else 1


def write(rows: list[dict[str, Any]], args: CurvesArgs, out: Path, said: str) -> None:
    """Write the table to `out`, and say so."""
    save(
        rows,
        out,
        title=f"Loss curves of lightly's MoCo loop, {args.arch}, {args.size} px, batches of {args.batch_size}",
        command=command("dropin_curves", args),
        columns=COLUMNS,
        note=f"{said}\n\nloss_at_end: mean loss of the last third of the steps, averaged over the seeds; deviation: "
        f"of the seeds' own. limit: {DEVIATIONS:g} times lightly's standard deviation over the seeds. by_seed: the "
        "differences from lightly of the same seed. A seed decides weights, negatives, order and views. lightly's "
        "transforms leave out ImageNet's normalisation here, so that all views lie in [0, 1]. Their blur is Pillow's, "
        "over the whole of the Gaussian; ours, and torchvision's, is cut to a tenth of the view's side, so that a "
        "blurred view is somewhat sharper and pairs are somewhat easier.",
    )
    print(f"written: {out} and {out.with_suffix('.json')}")


if __name__ == "__main__":
    start(main, CurvesArgs, "dropin_curves")
