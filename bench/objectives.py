"""Does every objective learn, without collapse, what random weights lack? Each with several seeds, beside as many
random ones.

Pretrains on the training images of a set with the small recipe of its domain, and scores linear probes on the test
images. What has been computed is kept, and is computed again only where its settings change.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import tyro

from bench.timing import save
from fastmoco.data.manifest import load_manifest
from fastmoco.errors import UserError
from fastmoco.evaluate.features import extract
from fastmoco.evaluate.measures import rankme
from fastmoco.evaluate.run import evaluate
from fastmoco.models.encoder import Encoder
from fastmoco.models.weights import load_encoder
from fastmoco.study.overrides import apply
from fastmoco.train.config import Arch, Config
from fastmoco.train.pretrain import pretrain
from fastmoco.train.recipes import find
from fastmoco.train.stored import to_json

RANDOM = "random weights"
_TWINS = {"objective": "barlow-twins", "head": "projector", "dim": 1024, "barlow_off_diagonal": 0.005}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "MoCo": {},
    "symmetric MoCo": {"symmetric": True},
    "SimCLR": {"objective": "simclr"},
    "SimCLR, additive margin": {"objective": "simclr", "margin": 0.1},
    "supervised contrastive": {"objective": "supcon"},
    "Barlow Twins": _TWINS,
    "Barlow Twins, mixed samples": _TWINS | {"mix_weight": 5.0},
    "SimCLR + MSE at stages": {"objective": "simclr", "method": "mse", "stage_weight": 1.0},
    "Barlow Twins + Barlow at stages": _TWINS | {"method": "barlow", "stage_weight": 5e-4},
}
COLUMNS = ["objective", "stage4", "deviation", "gain", "needed", "holds", "spread", "rankme", "seeds"]
NOTE = (
    "stage4: AUC on the test images of logistic regression on stage 4 with all training labels, mean of the seeds; "
    "deviation: the larger of the standard deviations of its seeds and of the random weights'; gain: above the mean of "
    "random weights; needed: twice the deviation. spread: standard deviation of the embeddings at the end (1 even, 0 "
    "collapse; of Barlow Twins' projections too). rankme: effective rank of stage 4's features of the test images."
)


@dataclass(kw_only=True)
class ObjectivesArgs:
    """Pretrain by each objective with several seeds and probe stage 4, beside random weights."""

    data: Path
    """Folder of images."""
    labels: Path
    """CSV file with the columns file, patient, split and the label."""
    label: str
    """Label column."""
    recipe: str = "histology-moco-small"
    """Recipe that the objectives' own settings go over."""
    arch: Arch = "resnet18"
    """Encoder."""
    size: int = 64
    """Side of the views, in pixels."""
    epochs: int = 20
    """Epochs of each."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights and draws."""
    only: tuple[str, ...] = ()
    """Objectives whose name matches one of these patterns; all if not given."""
    runs: Path = Path("build/objectives")
    """Folder of the runs."""
    out: Path = Path("docs/results/objectives.md")
    """Markdown file to write; the JSON file beside it has a row for each objective and seed, those of before
    included."""


def configure(args: ObjectivesArgs, name: str, seed: int) -> Config:
    """The run of objective `name`."""
    out = args.runs / f"{name.lower().replace(' ', '-').replace(',', '')}-{seed}"
    config = find(args.recipe)(args.data, out)
    config = replace(
        config,
        data=replace(config.data, labels=args.labels, label=(args.label,), split="train", workers=1),
        run=replace(config.run, seed=seed, resume=True, precision="bf16", knn_every=0, checkpoint_every=10**6),
        views=replace(config.views, size=args.size),
        model=replace(config.model, arch=args.arch),
    )
    return apply(config, {"epochs": args.epochs, "warmup_epochs": args.epochs / 8} | OBJECTIVES[name], name)


def settings(args: ObjectivesArgs, name: str, seed: int) -> dict[str, Any]:
    """What a row depends on."""
    said = {"label": args.label, "arch": args.arch, "size": args.size, "seed": seed}
    if name == RANDOM:
        return said
    plain = to_json(configure(args, name, seed))
    return said | {group: plain[group] for group in ("views", "model", "loss", "optim")}


def compute(args: ObjectivesArgs, name: str, seed: int) -> dict[str, Any]:
    """A row: what objective `name` learned with `seed`."""
    found: dict[str, Any] = {"op": "objectives", "objective": name, "seed": seed, "device": "cpu"}
    if name == RANDOM:
        encoder = Encoder(args.arch, seed=seed)
    else:
        run = pretrain(configure(args, name, seed))
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        found |= {name: last[name] for name in ("loss", "embedding_std", "top1")}
        encoder = load_encoder(run / "encoder.safetensors")
    manifest = load_manifest(args.data, args.labels, label=(args.label,), progress=False)
    result = evaluate(
        {"it": encoder}, manifest, label=args.label, size=args.size, baselines=False, precision="bf16", progress=False
    )
    for row in result.rows:
        if row.method == "probe" and row.test is not None:
            found[row.features] = row.test.auc
    test = manifest.only_split("test")
    features = extract(encoder, test, size=args.size, batch_size=64, precision="bf16", progress=False)
    return found | {"rankme": rankme(features["stage4"]), "settings": settings(args, name, seed)}


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each objective: its mean over the seeds, against random weights."""
    by_name = {name: [row for row in rows if row["objective"] == name] for name in (RANDOM, *OBJECTIVES)}
    chance = [row["stage4"] for row in by_name[RANDOM]]
    lines = []
    for name, own in by_name.items():
        if not own:
            continue
        scores = [row["stage4"] for row in own]
        line: dict[str, Any] = {"objective": name, "stage4": mean(scores), "seeds": len(scores), "device": "cpu"}
        line |= {"rankme": mean(row["rankme"] for row in own)}
        if len(scores) > 1 and len(chance) > 1:
            line["deviation"] = max(stdev(scores), stdev(chance))
        if name != RANDOM:
            line["spread"] = mean(row["embedding_std"] for row in own)
            if "deviation" in line:
                gain, needed = mean(scores) - mean(chance), 2 * line["deviation"]
                line |= {"gain": gain, "needed": needed, "holds": gain > needed}
        lines.append(line)
    return lines


def main(args: ObjectivesArgs) -> int:
    """Compute what is left, write the table; 1 where an objective does not hold."""
    names = [RANDOM, *(name for name in OBJECTIVES if not args.only or any(fnmatchcase(name, p) for p in args.only))]
    file = args.out.with_name(f"{args.out.stem}_rows.json")
    kept: list[dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else []
    for seed in args.seeds:
        for name in names:
            known = [row for row in kept if (row["objective"], row["seed"]) == (name, seed)]
            if known and known[0]["settings"] == json.loads(json.dumps(settings(args, name, seed))):
                continue
            row = compute(args, name, seed)
            # Another process may have added its own meanwhile.
            kept = json.loads(file.read_text()) if file.is_file() else []
            kept = [other for other in kept if (other["objective"], other["seed"]) != (name, seed)] + [row]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(kept, indent=1) + "\n")
            print(f"{name}, seed {seed}: stage 4 {row['stage4']:.3f}", flush=True)
    lines = summary(kept)
    save(
        lines,
        args.out,
        title=f"Every objective beside random weights: {args.label}, {args.arch}, {args.size} px, {args.epochs} epochs",
        command=f"python -m bench.objectives --data IMAGES --labels labels.csv --label {args.label}",
        columns=COLUMNS,
        note=NOTE,
    )
    return int(any(line.get("holds") is False for line in lines))


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        sys.exit(main(tyro.cli(ObjectivesArgs, prog="python -m bench.objectives")))
    except UserError as error:
        sys.exit(f"error: {error}")
