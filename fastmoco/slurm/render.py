"""`fastmoco slurm render`: fill a script for sbatch from options."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from fastmoco.arguments import read_arguments
from fastmoco.atomic import write_text
from fastmoco.errors import UserError
from fastmoco.slurm.arguments import run_folder, split, value_of, without
from fastmoco.slurm.script import Script
from fastmoco.train.config import Config
from fastmoco.train.options import read_options

KINDS = {
    "pretrain": "one pretraining",
    "bench": "the speed of one process, one node, two, four ... nodes",
    "study": "one pretraining for each of several recipes and seeds",
    "grid": "a study of methods, data and label budgets, by several tasks that share its cells",
}
_USAGE = """usage: fastmoco slurm render {kinds} --nodes N --gpus N --time H:MM:SS [OPTIONS] -- RECIPE PRETRAIN-OPTIONS

{lines}

What follows -- are options of `fastmoco pretrain`, tested now rather than when the job starts; a study has its recipes
from --recipes, and a grid's are those of `fastmoco study`, its file first. `fastmoco slurm render pretrain --help`
lists the options before it."""


@dataclass(kw_only=True)
class JobArgs:
    """What the job asks of SLURM."""

    nodes: int = 1
    """Nodes."""
    gpus: int = 1
    """GPUs a node, one process each; 0 for one process a node on processors."""
    cpus: int = 8
    """Processors of each process: it decodes images with them."""
    time: str = "24:00:00"
    """Time limit, as SLURM takes it: minutes, H:MM:SS, D-H or D-HH:MM:SS."""
    partition: str | None = None
    """Partition; the cluster's default if not given."""
    account: str | None = None
    """Account to charge."""
    name: str | None = None
    """Name of the job; its output goes to NAME-NUMBER.out."""
    sbatch: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Any other option of sbatch, as qos=high or exclusive; may be given several times."""
    notice: int = 300
    """Seconds before the time limit at which the run is told to save and go back into the queue."""
    max_requeues: int = 10
    """How often the job may be put back into the queue."""
    container: str | None = None
    """Image that holds fastmoco: a file .sif for apptainer, anything else for srun --container-image (pyxis)."""
    mounts: str | None = None
    """Folders that the container sees, FROM:TO,...; the folder that the job is submitted from if not given."""
    command: str | None = None
    """How fastmoco is called in the job; this installation's own if not given, in a container `fastmoco`."""
    out: Path | None = None
    """File to write; standard output if not given."""

    def __post_init__(self) -> None:
        for option, least in (("nodes", 1), ("gpus", 0), ("cpus", 1), ("notice", 1), ("max_requeues", 0)):
            if getattr(self, option) < least:
                said = option.replace("_", "-")
                raise UserError(f"--{said} must be at least {least}, not {getattr(self, option)}")
        if self.notice > 65535:
            raise UserError(f"--notice {self.notice}: SLURM takes at most 65535 seconds")
        if self.notice >= seconds_of(self.time):
            raise UserError(f"--notice {self.notice} is no less than --time {self.time}: the run would stop at once")
        for option in ("partition", "account", "name"):
            value = getattr(self, option)
            if value is not None and not re.fullmatch(r"[\w.,+@:-]+", value):
                raise UserError(f"--{option} {value!r} is not a name that SLURM takes")
        for extra in self.sbatch:
            if not re.fullmatch(r"[a-z][a-z-]*(=\S+)?", extra.removeprefix("--")):
                raise UserError(f"--sbatch {extra!r} is not an option of sbatch: write qos=high, or exclusive")
        if self.mounts is not None and self.container is None:
            raise UserError("--mounts says what a container sees: name one with --container")

    @property
    def per_node(self) -> int:
        """Processes on a node."""
        return max(self.gpus, 1)


@dataclass(kw_only=True)
class StudyArgs(JobArgs):
    """What the jobs ask of SLURM, and what they compare: one run for each recipe and seed."""

    recipes: tuple[str, ...]
    """Recipes to compare."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of each."""
    at_once: int = 4
    """Jobs that may run at the same time."""


@dataclass(kw_only=True)
class GridArgs(JobArgs):
    """What the tasks ask of SLURM: each is one process of `fastmoco study` on one node."""

    tasks: int = 4
    """Tasks that share the work."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nodes != 1:
            raise UserError(f"--nodes {self.nodes}: each task of a grid has one node; ask for more with --tasks")
        if self.gpus > 1:
            raise UserError(f"--gpus {self.gpus}: each task of a grid uses one GPU; ask for more with --tasks")
        if self.tasks < 1:
            raise UserError(f"--tasks must be at least 1, not {self.tasks}")


def render_command(args: list[str]) -> int:
    """Fill the script and print or write it. Returns the exit status, 0; raises UserError for a mistake."""
    if not args or args[0] in ("-h", "--help"):
        lines = "\n".join(f"  {kind:<10}{what}" for kind, what in KINDS.items())
        print(_USAGE.format(kinds="{" + ",".join(KINDS) + "}", lines=lines))
        return 0 if args else 2
    kind, *rest = args
    if kind not in KINDS:
        raise UserError(f"fastmoco slurm render: no script {kind!r}: there are {', '.join(KINDS)}")
    own, options = split(rest)
    shapes: dict[str, type[JobArgs]] = {"study": StudyArgs, "grid": GridArgs}
    config = (tyro.conf.OmitArgPrefixes,)
    job = read_arguments(shapes.get(kind, JobArgs), prog=f"fastmoco slurm render {kind}", args=own, config=config)
    script = Script(kind)
    _fill(script, job)
    if isinstance(job, StudyArgs):
        _fill_study(script, job, options)
    elif isinstance(job, GridArgs):
        _fill_grid(script, job, options)
    elif kind == "bench":
        _fill_bench(script, job, options)
    else:
        _tested(job, options)
        script.variable("options", _without_resume(options))
    if job.out is None:
        print(script.text, end="")
        return 0
    try:
        write_text(job.out, script.text)
    except OSError as error:
        raise UserError(f"--out {job.out}: cannot be written: {error.strerror or error}") from error
    print(f"{job.out}: submit it with sbatch {shlex.quote(str(job.out))}")
    return 0


def _fill(script: Script, job: JobArgs) -> None:
    if job.name is not None:
        script.directive("job-name", job.name)
    script.directive("partition", job.partition)
    script.directive("nodes", str(job.nodes))
    script.directive("ntasks-per-node", str(job.per_node))
    script.directive("gpus-per-node", str(job.gpus) if job.gpus else None)
    script.directive("cpus-per-task", str(job.cpus))
    script.directive("time", job.time)
    if "#SBATCH --signal" in script.text:
        script.directive("signal", f"B:USR1@{job.notice}")
    if job.account is not None:
        script.directive("account", job.account)
    for extra in job.sbatch:
        name, _, value = extra.removeprefix("--").partition("=")
        script.directive(name, value)
    script.variable("fastmoco", shlex.split(job.command) if job.command else _own_command(job))
    script.variable("max_requeues", job.max_requeues)
    if job.container is not None:
        script.variable("container", job.container)
    if job.mounts is not None:
        script.variable("container_mounts", job.mounts)


def _fill_study(script: Script, job: StudyArgs, options: list[str]) -> None:
    study, options = run_folder(options), without("--out", options)
    for recipe in job.recipes:
        for seed in job.seeds:
            _tested(job, [recipe, *options, "--out", study, "--seed", str(seed)])
    if len(set(job.recipes)) < len(job.recipes) or len(set(job.seeds)) < len(job.seeds):
        raise UserError("--recipes or --seeds names one twice: both runs would have one folder")
    script.directive("array", f"0-{len(job.recipes) * len(job.seeds) - 1}%{job.at_once}")
    script.variable("recipes", job.recipes)
    script.variable("seeds", [str(seed) for seed in job.seeds])
    script.variable("study", study)
    script.variable("options", _without_resume(options))


def _fill_grid(script: Script, job: GridArgs, options: list[str]) -> None:
    # Late: it brings all of training and evaluation along.
    from fastmoco.study.command import read_options as read_study_options
    from fastmoco.study.config import read_study

    read_study(read_study_options(options).config)
    if value_of("--max-minutes", options) is None:
        options = [*options, "--max-minutes", str((seconds_of(job.time) - job.notice) // 60)]
    if value_of("--report", options) is None:
        # As many tasks would write as many reports, all but the last of what is half done.
        options = [*options, "--report", "none"]
    script.directive("array", f"0-{job.tasks - 1}")
    # One task starts the processes of its node.
    script.directive("ntasks-per-node", "1")
    script.variable("options", options)


def _fill_bench(script: Script, job: JobArgs, options: list[str]) -> None:
    bench = run_folder(options)
    config = _tested(job, options)
    batch = config.optim.batch_size // (job.nodes * job.per_node)
    if config.optim.steps is None or config.optim.steps <= 2 * config.run.log_every:
        raise UserError("a measurement needs --steps, more than twice --log-every (20 if not given)")
    for option in ("--out", "--batch-size"):
        options = without(option, options)
    script.variable("bench", bench)
    script.variable("options", _without_resume(options))
    script.variable("batch", batch)


def _tested(job: JobArgs, options: list[str]) -> Config:
    """The configuration that `options` make in this job. Raises UserError where there is none."""
    config = read_options(options)
    processes, batch = job.nodes * job.per_node, config.optim.batch_size
    if batch % processes:
        raise UserError(
            f"--batch-size {batch} is shared by {processes} processes ({job.nodes} nodes x {job.per_node}) "
            f"and does not divide evenly: take {max(batch // processes, 1) * processes}"
        )
    return config


def _without_resume(options: list[str]) -> list[str]:
    # The script gives it itself.
    return [word for word in options if word != "--resume"]


def _own_command(job: JobArgs) -> list[str]:
    if job.container is not None:
        return ["fastmoco"]
    beside = Path(sys.executable).with_name("fastmoco")
    return [str(beside)] if beside.exists() else [sys.executable, "-m", "fastmoco.cli"]


def seconds_of(time: str) -> int:
    """The seconds of a time limit as SLURM writes it. Raises UserError where it is none, or none at all."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if match is None:
        raise UserError(f"--time {time!r} is not a time limit: write minutes, H:MM:SS, D-H or D-HH:MM:SS")
    days, *rest = match.groups()
    numbers = [int(number) for number in rest if number is not None]
    if days is not None:
        hours, minutes, seconds = numbers + [0] * (3 - len(numbers))
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        # Two numbers are minutes and seconds, one is minutes.
        hours, minutes, seconds = 0, *[*numbers, 0][:2]
    total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise UserError(f"--time {time} is no time")
    return total
