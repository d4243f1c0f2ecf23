"""What the studies share: several encoders scored side by side, as one committed table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fastmoco.atomic import write_text
from fastmoco.data.manifest import load_manifest
from fastmoco.evaluate.report import print_result, to_json, to_markdown
from fastmoco.evaluate.run import evaluate
from fastmoco.models.encoder import Encoder


def score_side_by_side(
    encoders: Mapping[str, Encoder], images: Path, labels: Path, label: str, *, title: str, command: str, out: Path
) -> None:
    """Score `encoders` at 64 px beside the baselines, print the table, and write it to `out` (.md) and as .json."""
    manifest = load_manifest(images, labels, label=(label,))
    result = evaluate(encoders, manifest, label=label, size=64, resize=1.0)
    print_result(result)
    table = to_markdown([result]).split("\n", 3)[3]
    write_text(out, f"# {title}\n\nWritten by `{command}`; ResNet-18 at 64 px.\n\n{table}")
    write_text(out.with_suffix(".json"), to_json([result]))
