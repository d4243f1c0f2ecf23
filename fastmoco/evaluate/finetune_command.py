"""`fastmoco finetune`: classifiers trained on some of the labels, scored on the test images."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.status import Status
from rich.table import Table

from fastmoco.data.labelled import describe_unlabelled, only_labelled
from fastmoco.data.manifest import Manifest
from fastmoco.data.patients import patient_groups
from fastmoco.data.views import ViewConfig
from fastmoco.device import find_device
from fastmoco.errors import UserError
from fastmoco.evaluate.budgets import Budget, draw_budget
from fastmoco.evaluate.finetune import FinetuneConfig, Finetuned, finetune
from fastmoco.evaluate.images import load_images
from fastmoco.evaluate.intervals import INTERVAL_OF_RUNS, replicates
from fastmoco.evaluate.leaks import pretrained_on, refuse_leaks, seen_before
from fastmoco.evaluate.options import LabelledImages
from fastmoco.evaluate.scores import score
from fastmoco.evaluate.splits import Splits
from fastmoco.evaluate.targets import Target, make_target, target_splits
from fastmoco.models.encoder import Encoder
from fastmoco.models.weights import load_encoder, run_folder
from fastmoco.results import try_out, write_results
from fastmoco.tracking import Lines

_COLUMNS = {
    "auc": "AUC", "average_precision": "av. prec.", "accuracy": "acc.", "f1": "F1", "calibration_error": "cal. error",
}  # fmt: skip
_TABLE_WIDTH = 100


@dataclass(kw_only=True, slots=True)
class FinetuneArgs(LabelledImages):
    """Train a classifier on a pretrained encoder, or from scratch, with all labels or a share; score it on the test."""

    run: tyro.conf.Positional[Path | None] = None
    """Run folder (its newest checkpoint), checkpoint, exported encoder, or torchvision ResNet state dict. --mode
    scratch takes architecture, size and augmentation from it, if it is given."""
    label: tuple[str, ...] = ()
    """Label column to predict; with several, all of them at once, each yes or no."""
    budget: float = 1.0
    """Share of the training images whose labels are used, drawn class by class; at least 5 a class."""
    draws: int = 1
    """Classifiers trained, each on labels drawn anew."""
    training: tyro.conf.OmitArgPrefixes[FinetuneConfig] = field(default_factory=FinetuneConfig)
    """How it is trained."""
    crop_scale: tuple[float, float] | None = None
    """Least and greatest part of a training image that a random crop shows; that of the run if not given, else none."""
    rotation: float | None = None
    """Greatest random rotation in degrees; that of the run if not given, else none."""
    flip_p: float | None = None
    """Probability of a horizontal flip; that of the run if not given, else none."""
    allow_leaks: bool = False
    """Accept patients and images that are in two of training, validation and test; the scores will be too good."""
    workers: int = 0
    """Threads that decode; 0: one a core."""
    seed: int = 0
    """Seed of drawn splits; draw i of the labels, its first weights and its augmentation have seed + i."""
    out: Path | None = None
    """JSON file to write; in folder "finetune" of the run, named after label, mode and budget, if not given. An earlier
    one there is numbered."""


def finetune_command(args: FinetuneArgs) -> int:
    """Train, print a table and write the file. Returns the exit status, 0; raises UserError."""
    device = find_device(args.device)
    if args.out is not None:
        try_out(args.out)
    encoder = None if args.run is None else load_encoder(args.run)
    mode = args.training.mode
    if encoder is None and mode != "scratch":
        raise UserError(f"--mode {mode}: name the run whose encoder is to be trained, or use --mode scratch")
    size = args.input_size(encoder, args.run)
    config = replace(args.training, views=_views(args, encoder, size))
    if encoder is not None:
        config = replace(config, arch=encoder.arch)
    everything = args.labelled()
    if not args.label and len(everything.labels) > 1:
        raise UserError(f"--label: say which of {', '.join(everything.labels)} is to be predicted")
    labels = args.label or list(everything.labels)
    manifest = only_labelled(everything, labels)
    target = make_target(manifest, labels)
    out = _file(args, target)
    splits = target_splits(manifest, target, seed=args.seed, allow_leaks=args.allow_leaks)
    budgets = [
        draw_budget(target.values, splits.train, args.budget, seed=args.seed + draw, class_names=target.class_names)
        for draw in range(args.draws)
    ]
    leaks = refuse_leaks(manifest, splits, allowed=args.allow_leaks)
    unknown = len(everything) - len(manifest)
    notes = [describe_unlabelled(unknown, labels)] if unknown else []
    fewest = min(len(budget.indices) for budget in budgets)
    if (steps := config.steps(fewest)) > config.epochs * config.batches(fewest):
        notes.append(f"{steps} steps, more than --epochs {config.epochs} has: --least-steps {config.least_steps}.")
    if args.run is not None and mode != "scratch":
        notes += seen_before(pretrained_on(run_folder(args.run)), manifest, splits)
    try_out(out)
    resize = (encoder.resize if encoder is not None else None) or 1.0
    images = load_images(manifest, size, resize=resize, workers=args.workers)
    # As wide as the table is, also in a pipe or a terminal of 80 columns.
    console = Console(width=max(Console().width, _TABLE_WIDTH))
    done = []
    for draw, budget in enumerate(budgets):
        said = f"draw {draw + 1} of {args.draws}"
        with console.status(said) as status:
            show = _Progress(console, status, said, config.steps(len(budget.indices)))
            done.append(
                finetune(
                    None if mode == "scratch" else encoder,
                    images,
                    target,
                    budget.indices,
                    splits.validation,
                    splits.test,
                    config,
                    seed=args.seed + draw,
                    device=device,
                    on_look=show.look,
                )
            )
    record = {"run": None if args.run is None else str(args.run), "size": size, "training": _plain(config)}
    record |= _record(manifest, target, splits, budgets, done, args.seed) | {"leaks": leaks, "notes": notes}
    _print(record, console)
    if earlier := write_results({out: json.dumps(record, indent=1, allow_nan=False) + "\n"}):
        console.print(f"the result before is now {earlier[0]}", soft_wrap=True, markup=False)
    console.print(f"written: {out}", soft_wrap=True, markup=False)
    return 0


class _Progress:
    """Says after looks at the validation images how far the `steps` are: in the `status` line of a terminal, and to
    what is none in lines some seconds apart."""

    def __init__(self, console: Console, status: Status, said: str, steps: int) -> None:
        self._status, self._said, self._steps = status, said, steps
        self._lines = Lines(console, steps)

    def look(self, row: dict[str, Any]) -> None:
        """Take a row of the curve."""
        step, auc = row["step"], row["validation_auc"]
        score = "-" if auc is None else f"{auc:.3f}"
        text = f"{self._said}: step {step}/{self._steps}, validation AUC {score}, ETA {self._lines.left(step)}"
        self._status.update(text)
        self._lines.say(text)


def _views(args: FinetuneArgs, encoder: Encoder | None, size: int) -> ViewConfig:
    """The augmentation of the run's configuration, and of the options over it."""
    said = {} if encoder is None else encoder.config.get("views", {})
    asked = {name: getattr(args, name) for name in ("crop_scale", "rotation", "flip_p")}
    chosen = {name: said.get(name) if value is None else value for name, value in asked.items()}
    return ViewConfig(
        size=size,
        resize=1.0,
        crop_scale=None if chosen["crop_scale"] is None else (chosen["crop_scale"][0], chosen["crop_scale"][1]),
        rotation=chosen["rotation"] or 0.0,
        flip_p=chosen["flip_p"] or 0.0,
        jitter_p=0.0,
        gray_p=0.0,
        blur_p=0.0,
    )


def _file(args: FinetuneArgs, target: Target) -> Path:
    if args.out is not None:
        return args.out
    if args.run is None:
        raise UserError("--out: name the file to write, as there is no run folder")
    name = target.name.replace("/", "_")[:80]
    return run_folder(args.run) / "finetune" / f"{name}-{args.training.mode}-{args.budget:g}.json"


def _plain(config: FinetuneConfig) -> dict[str, Any]:
    settings = asdict(config)
    used = ("crop_scale", "rotation", "flip_p")
    return settings | {"views": {name: settings["views"][name] for name in used}}


def _record(
    manifest: Manifest, target: Target, splits: Splits, budgets: list[Budget], done: list[Finetuned], seed: int
) -> dict[str, Any]:
    """All that was found, as JSON has it."""
    truth, groups = target.values[splits.test], patient_groups(manifest.patients, len(manifest))[splits.test]
    draws = []
    for draw, (budget, one) in enumerate(zip(budgets, done, strict=True)):
        scores = score(one.probabilities, truth, class_names=target.class_names, groups=groups, seed=seed)
        draws.append(
            {
                "seed": seed + draw,
                "images": len(budget.indices),
                "validation_auc": one.validation_score,
                "best_epoch": one.best_epoch,
                "best_step": one.best_step,
                "test": asdict(scores),
                "curve": one.curve,
                "probabilities": np.round(one.probabilities, 6).tolist(),
            }
        )
    together = replicates(np.stack([one.probabilities for one in done])[None], truth, groups, "auc", seed=seed)
    return {
        "label": target.name,
        "kind": target.kind,
        "class_names": target.class_names,
        "images": {part: len(getattr(splits, part)) for part in ("train", "validation", "test")},
        "origin": splits.origin,
        "budget": {"asked": budgets[0].asked, "used": [b.used for b in budgets], "note": budgets[0].note},
        "auc": {"mean": together.value, "low": together.low, "high": together.high, "interval": INTERVAL_OF_RUNS},
        "draws": draws,
        "test": [
            {"file": manifest.files[i], "value": target.values[i].tolist()} for i in splits.test.tolist()
        ],
    }  # fmt: skip


def _print(record: dict[str, Any], console: Console) -> None:
    mode = record["training"]["mode"]
    table = Table(title=f"Test scores for {record['label']}, {mode}", title_justify="left", box=box.SIMPLE)
    for name in ("draw", "labels", "best step", "val. AUC", *_COLUMNS.values()):
        table.add_column(name, justify="right", no_wrap=True)
    notes: list[str] = []
    for number, draw in enumerate(record["draws"], start=1):
        test = draw["test"]
        cells = [str(number), f"{draw['images']:,}", str(draw["best_step"]), f"{draw['validation_auc']:.3f}"]
        table.add_row(*cells, *("-" if test[name] is None else f"{test[name]:.3f}" for name in _COLUMNS))
        notes += test["notes"]
    console.print(table)
    images, auc, budget = record["images"], record["auc"], record["budget"]
    parts = ", ".join(f"{name} {count:,}" for name, count in images.items())
    lines = [f"Images: {parts}; {record['origin']}."]
    if auc["low"] is not None:
        lines.append(f"Mean AUC {auc['mean']:.3f} [{auc['low']:.3f}, {auc['high']:.3f}]: {auc['interval']}.")
    lines += record["notes"]
    lines += [f"Labels: {budget['note']}."] if budget["note"] else []
    lines += [f"{note[0].upper()}{note[1:]}." for note in dict.fromkeys(notes)]
    lines += [f"{len(record['leaks'])} leaks between the splits were allowed."] if record["leaks"] else []
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
