"""Does every objective learn, without collapse, what random weights lack? Each with several seeds, beside more random
ones, which cost no training.

Pretrains on the training images of a set with the small recipe of its domain, and scores linear probes on the test
images. What has been computed is kept, and is computed again only where its settings change.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from bench.command import start
from bench.timing import environment, save
from fastmoco.atomic import write_text
from fastmoco.data.manifest import load_manifest
from fastmoco.errors import UserError
from fastmoco.evaluate.features import extract
from fastmoco.evaluate.measures import rankme
from fastmoco.evaluate.run import evaluate
from fastmoco.models.encoder import Encoder
from fastmoco.models.weights import load_encoder
from fastmoco.precision import Precision
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
    "Barlow Twins, mixed samples": _TWINS | {"mix_weight": 1.0},
    "SimCLR + MSE at stages": {"objective": "simclr", "method": "mse", "stage_weight": 1.0},
    "Barlow Twins + Barlow at stages": _TWINS | {"method": "barlow", "stage_weight": 5e-4},
}
SCORES = ("kNN", "probe")
COLUMNS = ["objective", *(f"{name}{end}" for name in SCORES for end in ("", " gain", " needed", " holds"))]
COLUMNS += ["top1", "spread", "rankme", "precision", "seeds"]
NOTE = (
    "AUCs on the test images of kNN and of logistic regression (probe) on stage 4 with all training labels, k and C "
    "chosen on validation patients, means of the seeds. gain: above the mean of random weights; needed: twice the "
    "standard deviation over seeds, the objective's or the random weights', whichever is larger. top1: share of views "
    "at the end of training that are nearest to their other view; spread: standard deviation of their embeddings (1 "
    "even, 0 collapse). rankme: effective rank of stage 4's features of the test images. precision: of the training, "
    "of its seeds in their order; features are bfloat16's throughout."
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
    random_seeds: int = 20
    """Seeds of random weights, from 0 on."""
    only: tuple[str, ...] = ()
    """Objectives whose name matches one of these patterns; all if not given."""
    precision: Precision = "bf16"
    """Arithmetic of the training; fp32 is the faster where the processor has no bfloat16. Rows are kept whatever
    theirs was."""
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
        run=replace(config.run, seed=seed, resume=True, precision=args.precision, knn_every=0, checkpoint_every=10**6),
        views=replace(config.views, size=args.size),
        model=replace(config.model, arch=args.arch),
    )
    own = dict(OBJECTIVES[name])
    config = replace(config, loss=replace(config.loss, method=own.pop("method", "moco")))
    return apply(config, {"epochs": args.epochs, "warmup_epochs": args.epochs / 8} | own, name)


def settings(args: ObjectivesArgs, name: str, seed: int) -> dict[str, Any]:
    """What a row depends on."""
    said = {"label": args.label, "arch": args.arch, "size": args.size, "seed": seed}
    if name == RANDOM:
        return said
    plain = to_json(configure(args, name, seed))
    return said | {group: plain[group] for group in ("views", "model", "loss", "optim")}


def compute(args: ObjectivesArgs, name: str, seed: int) -> dict[str, Any]:
    """A row: what objective `name` learned with `seed`."""
    found: dict[str, Any] = {"op": "objectives", "objective": name, "seed": seed}
    if name == RANDOM:
        encoder = Encoder(args.arch, seed=seed)
    else:
        run = pretrain(configure(args, name, seed))
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        found |= {"precision": args.precision, "loss": last["loss"], "top1": last["top1"]}
        found["spread"] = last["embedding_std"]
        encoder = load_encoder(run / "encoder.safetensors")
    manifest = load_manifest(args.data, args.labels, label=(args.label,), progress=False)
    result = evaluate(
        {"it": encoder}, manifest, label=args.label, size=args.size, baselines=False, precision="bf16", progress=False
    )
    for row in result.rows:
        if row.features == "stage4" and row.test is not None:
            found["kNN" if row.method == "knn" else row.method] = row.test.auc
    test = manifest.only_split("test")
    features = extract(encoder, test, size=args.size, batch_size=64, precision="bf16", progress=False)
    return found | {"rankme": rankme(features["stage4"]), "settings": settings(args, name, seed)} | environment()


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each objective: the means over its seeds, and how far they are above those of random weights."""
    by_name = {name: [row for row in rows if row["objective"] == name] for name in (RANDOM, *OBJECTIVES)}
    chance = by_name[RANDOM]
    lines = []
    for name, own in by_name.items():
        if not own:
            continue
        line: dict[str, Any] = {"objective": name, "seeds": len(own), "device": "cpu"}
        line["rankme"] = mean(row["rankme"] for row in own)
        for score in SCORES:
            line[score] = mean(row[score] for row in own)
            if name == RANDOM or min(len(own), len(chance)) < 2:
                continue
            gain = line[score] - mean(row[score] for row in chance)
            needed = 2 * max(stdev(row[score] for row in some) for some in (own, chance))
            line |= {f"{score} gain": gain, f"{score} needed": needed, f"{score} holds": gain > needed}
        if name != RANDOM:
            precisions = [row.get("precision", "bf16") for row in sorted(own, key=lambda row: row["seed"])]
            line["precision"] = ", ".join(precisions if len(set(precisions)) > 1 else precisions[:1])
            line |= {what: mean(row[what] for row in own) for what in ("top1", "spread")}
        lines.append(line)
    return lines


def main(args: ObjectivesArgs) -> int:
    """Compute what is left, write the table; 1 where an objective is ahead of random weights by neither score."""
    if args.random_seeds < 2:
        raise UserError("--random-seeds must be at least 2: the spread of random weights decides")
    names = [RANDOM, *(name for name in OBJECTIVES if not args.only or any(fnmatchcase(name, p) for p in args.only))]
    seeds = {name: args.seeds for name in OBJECTIVES} | {RANDOM: range(args.random_seeds)}
    wanted = {
        (name, seed): json.loads(json.dumps(settings(args, name, seed))) for name, own in seeds.items() for seed in own
    }
    file = args.out.with_name(f"{args.out.stem}_rows.json")
    every = sorted({*args.seeds, *seeds[RANDOM]})
    for name, seed in [(name, seed) for seed in every for name in names if seed in seeds[name]]:
        if not any(wanted[name, seed] == row["settings"] for row in _kept(file) if row["objective"] == name):
            row = compute(args, name, seed)
            # Another process may have added its own meanwhile.
            others = [row for row in _kept(file) if (row["objective"], row["seed"]) != (name, seed)]
            write_text(file, json.dumps([*others, row], indent=1) + "\n")
            print(f"{name}, seed {seed}: " + ", ".join(f"{score} {row[score]:.3f}" for score in SCORES), flush=True)
    lines = summary([row for row in _kept(file) if wanted.get((row["objective"], row["seed"])) == row["settings"]])
    save(
        lines,
        args.out,
        title=f"Every objective beside random weights: {args.label}, {args.arch}, {args.size} px, {args.epochs} epochs",
        command="python -m bench.objectives --data IMAGES --labels labels.csv "
        f"--label {args.label} --recipe {args.recipe} --arch {args.arch} --size {args.size} --epochs {args.epochs} "
        f"--seeds {' '.join(map(str, args.seeds))} --random-seeds {args.random_seeds} --precision {args.precision}",
        columns=COLUMNS,
        note=NOTE,
    )
    return int(any(not any(line.get(f"{score} holds", True) for score in SCORES) for line in lines))


def _kept(file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else []
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    start(main, ObjectivesArgs, "objectives")
