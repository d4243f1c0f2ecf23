"""How much does the demo's result depend on the seed of its pretraining?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.command import start
from fastmoco.atomic import write_text
from fastmoco.data.manifest import load_manifest
from fastmoco.data.synthetic import draw_tissue
from fastmoco.demo import DATA_SEED, DemoArgs, data_folder, demo_config
from fastmoco.evaluate.report import print_result, to_json, to_markdown
from fastmoco.evaluate.run import evaluate
from fastmoco.models.encoder import Encoder
from fastmoco.models.weights import load_encoder
from fastmoco.train.pretrain import pretrain


@dataclass(kw_only=True)
class DemoSeedsArgs:
    """Run the demo's pretraining with several seeds and score each beside a random initialisation of that seed."""

    runs: Path = Path("runs/demo")
    """Folder of the demo; runs that are complete are not repeated."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the pretraining."""
    out: Path = Path("docs/results/demo.md")
    """Markdown file to write; a JSON file of the same name is put beside it."""


def main(args: DemoSeedsArgs) -> int:
    """Run what is still to be run, print the table and write it."""
    encoders: dict[str, Encoder] = {}
    for seed in args.seeds:
        demo = DemoArgs(out=args.runs, seed=seed)
        draw_tissue(data_folder(demo), images=demo.images, seed=DATA_SEED)
        encoders[f"random, seed {seed}"] = Encoder("resnet18", seed=seed)
        encoders[f"pretrained, seed {seed}"] = load_encoder(pretrain(demo_config(demo)))
    score_side_by_side(encoders, data_folder(demo), args.out)
    return 0


def score_side_by_side(encoders: Mapping[str, Encoder], patches: Path, out: Path) -> None:
    """Score `encoders` beside the baselines, print the table, and write it to `out` (.md) and as .json."""
    manifest = load_manifest(patches / "images", patches / "labels.csv", label=("label",))
    result = evaluate(encoders, manifest, label="label", size=64, resize=1.0)
    print_result(result)
    table = to_markdown([result]).split("\n", 3)[3]
    title = "# The demo with three training seeds\n\nWritten by `python -m bench.demo`; ResNet-18 at 64 px."
    write_text(out, f"{title}\n\n{table}")
    write_text(out.with_suffix(".json"), to_json([result]))


if __name__ == "__main__":
    start(main, DemoSeedsArgs, "demo")
