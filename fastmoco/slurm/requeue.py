"""`fastmoco slurm requeue`: whether a job whose step ended goes back into the queue, and the record of it."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict, dataclass
from pathlib import Path

from fastmoco.arguments import read_arguments
from fastmoco.atomic import write_text
from fastmoco.distributed.slurm import integer
from fastmoco.errors import UserError
from fastmoco.slurm.arguments import run_folder, split
from fastmoco.train.metrics import read_rows

RECORD = "requeue.json"
NOT_REQUEUED = 1
MISTAKE = 2
# The statuses of a run that was asked to stop by SLURM, and saved.
_ASKED = (128 + signal.SIGUSR1, 128 + signal.SIGTERM)


@dataclass(frozen=True)
class End:
    """How a job ended: srun's exit status, and the last step that the run had reached by its metrics."""

    job: str
    restart: int
    status: int
    step: int


@dataclass(kw_only=True)
class RequeueArgs:
    """Decide whether a job that ended goes back into the queue, and note its end in RUN/requeue.json, where RUN is what
    the options of the pretraining, after --, name with --out. Exits with 0 if so and 1 if not."""

    status: int
    """Exit status of the job step."""
    max_requeues: int = 10
    """How often a job may be put back."""


def requeue_command(args: list[str]) -> int:
    """Decide, note and say it. Returns the exit status, 0 for requeuing; raises UserError for a mistake."""
    own, options = split(args)
    asked = read_arguments(RequeueArgs, prog="fastmoco slurm requeue", args=own)
    run = Path(run_folder(options))
    end = End(
        job=os.environ.get("SLURM_JOB_ID", ""),
        restart=integer(os.environ, "SLURM_RESTART_COUNT", 0),
        status=asked.status,
        step=reached(run),
    )
    before = read_record(run)
    reason = refusal(end, before, max_requeues=asked.max_requeues)
    _keep(run, [*before, end])
    said = f"the step ended with status {end.status} {_meaning(end.status)}, at step {end.step} of the training"
    if reason:
        print(f"{said}; not requeued: {reason}")
        return NOT_REQUEUED
    print(f"{said}; requeued for the {_ordinal(end.restart + 1)} time of at most {asked.max_requeues}")
    return 0


def refusal(end: End, before: list[End], *, max_requeues: int) -> str:
    """Why a job that ended so is not requeued, or "" where it is; `before` are the ends that the run folder knows.

    A run that SLURM asked to stop is requeued; one that met with an accident too, but not with the same at the same
    step twice in one job.
    """
    if end.status == 0:
        return "it has finished"
    if end.status == MISTAKE:
        return "its message names a mistake that would be met again"
    if end.status == 128 + signal.SIGINT:
        return "it was interrupted by hand"
    same = [known for known in before if (known.job, known.status, known.step) == (end.job, end.status, end.step)]
    if end.status not in _ASKED and same:
        return (
            f"it ended so at the same step before, in restart {same[-1].restart}; submit it again once that is mended"
        )
    if end.restart >= max_requeues:
        return f"it was requeued {end.restart} times, of at most {max_requeues} (--max-requeues)"
    return ""


def reached(run: Path) -> int:
    """The last step that the metrics in `run` know of, which are written before a checkpoint is; 0 where none do."""
    rows = read_rows(run / "metrics.jsonl")
    return int(rows[-1]["step"]) if rows else 0


def read_record(run: Path) -> list[End]:
    """The ends that RUN/requeue.json knows, oldest first. Raises UserError where it cannot be read."""
    path = run / RECORD
    if not path.exists():
        return []
    try:
        return [End(**end) for end in json.loads(path.read_text(encoding="utf-8"))["ends"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a record of requeued jobs ({error}): remove it") from error


def _keep(run: Path, ends: list[End]) -> None:
    # Also before the run has made its folder: what fails at the start would else never be known to have failed before.
    try:
        run.mkdir(parents=True, exist_ok=True)
        write_text(run / RECORD, json.dumps({"ends": [asdict(end) for end in ends]}, indent=2) + "\n")
    except OSError as error:
        # --max-requeues still bounds how often the job is put back.
        print(f"warning: {run / RECORD} could not be written ({error.strerror or error})")


def _meaning(status: int) -> str:
    try:
        return f"({signal.Signals(status - 128).name})"
    except ValueError:
        return "(an error)" if status else "(finished)"


def _ordinal(number: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")
