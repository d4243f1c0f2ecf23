"""The command line: `fastmoco COMMAND ...`. Each command imports what it needs only when it runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

import fastmoco
from fastmoco.arguments import read_arguments
from fastmoco.commands import Command, run
from fastmoco.errors import UserError

if TYPE_CHECKING:
    from fastmoco.train.config import LossConfig

INTERRUPTED = 130


def pretrain(args: list[str]) -> int:
    """Pretrain an encoder on a folder of images, with a recipe."""
    if not args or args[0] in ("-h", "--help"):
        print("usage: fastmoco pretrain RECIPE --data FOLDER --out FOLDER [OPTIONS]\n")
        print("`fastmoco pretrain RECIPE --help` lists every option with its default in that recipe. Recipes:")
        return list_recipes([])

    from fastmoco.train.options import read_options

    config = read_options(args)

    from fastmoco.distributed.launch import find_launch
    from fastmoco.distributed.roll import AGAIN
    from fastmoco.train.pretrain import Stopped
    from fastmoco.train.pretrain import pretrain as train
    from fastmoco.train.stop import end_undisturbed

    launch = find_launch()
    try:
        folder = train(config)
    except Stopped as stopped:
        if launch.rank == 0:
            print(f"{stopped}; {AGAIN}", file=sys.stderr)
        return 128 + stopped.signal
    finally:
        if launch.size > 1:
            end_undisturbed()
    if launch.rank == 0:
        print(f"done: {folder / 'encoder.safetensors'}")
    return 0


def list_recipes(args: list[str]) -> int:
    """List the recipes with the constants that tell them apart."""
    from rich.console import Console
    from rich.table import Table

    from fastmoco.train.recipes import RECIPES

    if args:
        raise UserError(f"fastmoco recipes takes no arguments, not {' '.join(args)}")
    table = Table(box=None, pad_edge=False)
    headings = "recipe,objective,px,batch,epochs,lr,schedule,queue,temperature,EMA,head,stage loss"
    words = ("recipe", "objective", "stage loss")
    for heading in headings.split(","):
        table.add_column(heading, no_wrap=True, justify="left" if heading in words else "right")
    for name, recipe in RECIPES.items():
        config = recipe(Path(), Path())
        loss, optim = config.loss, config.optim
        kind = {"none": "none", "mse": f"{loss.stage_weight:g} x MSE", "barlow": f"{loss.stage_weight:g} x Barlow"}
        table.add_row(
            name, _objective(loss), str(config.views.size), str(optim.batch_size), str(optim.epochs), f"{optim.lr:g}",
            optim.schedule, *_of_momentum(loss), config.model.head, kind[loss.stage_loss],
        )  # fmt: skip
    # Wide enough for every column also where the output is a file or a pipe.
    Console(width=150).print(table)
    return 0


def _objective(loss: LossConfig) -> str:
    """The objective, with what is particular to it."""
    more = {"symmetric": loss.symmetric, f"margin {loss.margin:g}": loss.margin, "mixed": loss.mix_weight}
    return ", ".join([loss.objective, *(name for name, there in more.items() if there)])


def _of_momentum(loss: LossConfig) -> tuple[str, str, str]:
    """Queue, temperature and momentum, a dash where the objective has none."""
    contrasts, queued = loss.objective != "barlow-twins", loss.keys_per_pair > 0
    return (
        str(loss.queue_size) if queued else "-",
        f"{loss.temperature:g}" if contrasts else "-",
        f"{loss.ema:g}" if queued else "-",
    )


def evaluate(args: list[str]) -> int:
    """Score a pretrained encoder with kNN and linear probes on every stage."""
    from fastmoco.evaluate.run import EvaluateArgs, evaluate_command

    return evaluate_command(read_arguments(EvaluateArgs, prog="fastmoco evaluate", args=args))


def finetune(args: list[str]) -> int:
    """Train a classifier on a pretrained encoder, with all labels or a few."""
    from fastmoco.evaluate.finetune_command import FinetuneArgs, finetune_command

    return finetune_command(read_arguments(FinetuneArgs, prog="fastmoco finetune", args=args))


def embed(args: list[str]) -> int:
    """Write the features of every image to a file."""
    from fastmoco.evaluate.embed import EmbedArgs, embed_command

    return embed_command(read_arguments(EmbedArgs, prog="fastmoco embed", args=args))


def compare(args: list[str]) -> int:
    """Say how alike two encoders are, or the stages of one, by CKA."""
    from fastmoco.evaluate.compare_command import CompareArgs, compare_command

    return compare_command(read_arguments(CompareArgs, prog="fastmoco compare", args=args))


def export(args: list[str]) -> int:
    """Write a run's query encoder to a file in torchvision's key layout."""
    from fastmoco.models.weights import EXPORTED, load_encoder, run_folder, save_encoder

    options = read_arguments(ExportArgs, prog="fastmoco export", args=args)
    encoder = load_encoder(options.run)
    if options.out is not None and options.out.is_dir():
        raise UserError(f"--out {options.out} is a folder: name a file")
    out = options.out or run_folder(options.run) / EXPORTED
    save_encoder(out, encoder, encoder.config)
    print(f"{out}: {encoder.arch}, loads into torchvision.models.{encoder.arch} with fc = Identity()")
    return 0


@dataclass(kw_only=True)
class ExportArgs:
    """Write a run's query encoder to a file in torchvision's key layout."""

    run: tyro.conf.Positional[Path]
    """Run folder or checkpoint."""
    out: Path | None = None
    """File to write: .safetensors, or .pth, .pt or .bin, a state dict that torch.load reads; encoder.safetensors in the
    run folder if not given."""


def doctor(args: list[str]) -> int:
    """Say what is installed, built and usable here, and which implementation each operation will use."""
    from fastmoco.doctor import main as report

    return report(args)


def plan(args: list[str]) -> int:
    """Work out what a run on many GPUs will send, hold and take."""
    from fastmoco.plan.command import plan_command

    return plan_command(args)


def data(args: list[str]) -> int:
    """Look at images before training on them: scan, stats, preview, pack."""
    from fastmoco.data_commands import COMMANDS as OF_DATA

    return run("fastmoco data", OF_DATA, args)


def slurm(args: list[str]) -> int:
    """Write scripts for SLURM: render; and what those call."""
    from fastmoco.slurm.commands import COMMANDS as OF_SLURM

    return run("fastmoco slurm", OF_SLURM, args)


def study(args: list[str]) -> int:
    """Compare methods over data, label budgets and seeds, and write a report."""
    from fastmoco.study.command import read_options, study_command

    return study_command(read_options(args))


def demo(args: list[str]) -> int:
    """Draw tissue patches, pretrain on them, and show what was gained."""
    from fastmoco.demo import DemoArgs, run_demo
    from fastmoco.train.pretrain import Stopped

    try:
        return run_demo(read_arguments(DemoArgs, prog="fastmoco demo", args=args))
    except Stopped as stopped:
        print(f"{stopped}; the same command goes on from there", file=sys.stderr)
        return 128 + stopped.signal


COMMANDS: dict[str, Command] = {
    "pretrain": pretrain,
    "recipes": list_recipes,
    "evaluate": evaluate,
    "finetune": finetune,
    "embed": embed,
    "compare": compare,
    "export": export,
    "data": data,
    "plan": plan,
    "doctor": doctor,
    "slurm": slurm,
    "study": study,
    "demo": demo,
}


def dispatch(args: Sequence[str]) -> int:
    """Run the command that `args` name; returns the exit status, raises UserError for a mistake."""
    if args and args[0] in ("-V", "--version"):
        print(f"fastmoco {fastmoco.__version__}")
        return 0
    return run("fastmoco", COMMANDS, args)


def main() -> int:
    """The entry point: user errors become one line on standard error and status 2, Ctrl-C status 130."""
    try:
        return dispatch(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
