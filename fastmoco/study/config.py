"""What a study is asked, as read from its TOML file."""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fastmoco.errors import UserError
from fastmoco.study.overrides import check_finetune, check_pretrain, recipe_name
from fastmoco.study.typed import convert, read_table, require_known
from fastmoco.train.config import Arch
from fastmoco.train.recipes import METHODS

SCRATCH = "scratch"
StudyMethod = Literal["scratch", "moco", "mse", "barlow"]
Mode = Literal["full", "linear"]
# Names become parts of file names.
_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]*"
_VARIABLE = r"\$(?:(?P<plain>[A-Za-z_]\w*)|\{(?P<braced>[A-Za-z_]\w*)(?::-(?P<otherwise>[^}]*))?\})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Table [study]: what is compared, where it is kept, what computes it."""

    out: Path
    """Folder of the study: cells, runs, report. Relative to the folder of the file."""
    methods: tuple[StudyMethod, ...] = ("scratch", "moco", "mse", "barlow")
    """What encoders start from: nothing, or a pretraining."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the pretraining, one run each, and of what follows it."""
    budgets: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Shares of the training images whose labels may be used."""
    arch: Arch = "resnet18"
    """Torchvision ResNet."""
    device: str = "auto"
    """cpu, cuda, cuda:0 ...; auto takes a GPU where there is one."""
    jobs: int = 1
    """Cells computed at a time, each by a process of its own."""
    threads: int = 1
    """Threads of each process; results depend on it to rounding."""
    note: str = ""
    """What readers of the report have to know of the settings: where they come from, what they were chosen on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    """Table [probes]: linear probes on frozen features."""

    draws: int = 7
    """Draws of the labelled images a seed, at budgets below 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finetuning:
    """Table [finetune]: which networks are fine-tuned; its other keys are those of `FinetuneConfig`."""

    draws: int = 2
    """Draws of the labelled images a seed, at budgets below 1."""
    modes: tuple[Mode, ...] = ("full", "linear")
    """All weights, or a linear layer alone."""
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaks:
    """Table [leaks]."""

    allow: tuple[str, ...] = ()
    """Names of data whose splits may leak."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Table [report]."""

    draws: int = 2000
    """Redraws of patients, seeds and labels for each interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """One of the tables [[data]]: labelled images and how they are trained on."""

    name: str
    """What they are called in the report and in file names."""
    images: Path
    """Folder of images or of tar shards, or .npz file. $NAME and ${NAME:-otherwise} are variables of the environment;
    relative to the folder of the file."""
    labels: Path | None = None
    """CSV file with a row an image, as of `fastmoco evaluate`."""
    label: str
    """Column of the target: binary or of several classes."""
    multilabel: tuple[str, ...] = ()
    """Columns of 0 and 1 that are a second target, fine-tuned with all labels."""
    file_column: str = "file"
    patient_column: str = "patient"
    split_column: str = "split"
    size: int
    """Side of the views and of the network's input, pixels."""
    recipe: Literal["histology", "chest-xray", "fundus"]
    """Domain whose recipes pretrain it."""
    small: bool = True
    """Take the variant of the recipe for thousands of images."""
    pretrain: dict[str, Any] = field(default_factory=dict)
    """Fields of the recipe that are overridden; in a table of a method's name, for that method alone."""
    finetune: dict[str, Any] = field(default_factory=dict)
    """Fields of `FinetuneConfig` that are overridden."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """The whole file. `pretrain` is overridden by what the data say, as `finetuning.options` is."""

    file: Path
    grid: Grid
    data: tuple[Data, ...]
    probes: Probes
    finetuning: Finetuning
    leaks: Leaks
    report: Report
    pretrain: dict[str, Any]

    @property
    def out(self) -> Path:
        """The folder of the study."""
        return self.grid.out

    @property
    def pretrained(self) -> tuple[str, ...]:
        """The methods that pretrain."""
        return tuple(method for method in self.grid.methods if method in METHODS)

    def named(self, name: str) -> Data:
        """The data called `name`."""
        return next(data for data in self.data if data.name == name)


_TABLES = dict.fromkeys(("study", "data", "pretrain", "finetune", "probes", "leaks", "report"))


def read_study(file: Path) -> Study:
    """The study that the TOML `file` describes.

    Raises UserError, naming file, table and key, for a file that cannot be read, a key that is unknown or missing, and
    a value of the wrong type or out of range.
    """
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not TOML: {error}") from error
    require_known(tables, _TABLES, f"{file}")
    for needed in ("study", "data"):
        if needed not in tables:
            raise UserError(f"{file}: the table {'[[data]]' if needed == 'data' else '[study]'} is missing")
    listed = tables["data"]
    if not isinstance(listed, list) or not all(isinstance(table, dict) for table in listed):
        raise UserError(f"{file}: data are tables of their own: write [[data]], with two brackets")
    grid = read_table(Grid, tables["study"], f"{file} [study]")
    study = Study(
        file=file,
        grid=replace(grid, out=_path(file, str(grid.out), f"{file} [study]: out")),
        data=tuple(_read_data(file, table, number) for number, table in enumerate(listed, start=1)),
        probes=read_table(Probes, tables.get("probes", {}), f"{file} [probes]"),
        finetuning=_read_finetuning(tables.get("finetune", {}), f"{file} [finetune]"),
        leaks=read_table(Leaks, tables.get("leaks", {}), f"{file} [leaks]"),
        report=read_table(Report, tables.get("report", {}), f"{file} [report]"),
        pretrain=convert(tables.get("pretrain", {}), dict[str, Any], f"{file} [pretrain]"),
    )
    _check(study)
    return study


def _read_data(file: Path, table: dict[str, Any], number: int) -> Data:
    where = f"{file} [[data]] {table.get('name', number)}"
    data = read_table(Data, table, where)
    images = _path(file, str(data.images), f"{where}: images")
    labels = None if data.labels is None else _path(file, str(data.labels), f"{where}: labels")
    return replace(data, images=images, labels=labels)


def _read_finetuning(table: dict[str, Any], where: str) -> Finetuning:
    own = {name: value for name, value in table.items() if name in ("draws", "modes")}
    options = {name: value for name, value in table.items() if name not in own}
    return replace(read_table(Finetuning, own, where), options=options)


def _path(file: Path, text: str, where: str) -> Path:
    """`text` with the environment's variables in it, from the folder of `file` on."""

    def value(match: re.Match[str]) -> str:
        name, otherwise = match["plain"] or match["braced"], match["otherwise"]
        # As in a shell, what is empty counts as missing.
        found = os.environ.get(name) or otherwise
        if found is None:
            raise UserError(f"{where} is {text!r}, and there is no variable {name} in the environment: set it")
        return found

    return file.parent / re.sub(_VARIABLE, value, text)


def variables(file: Path) -> list[str]:
    """Names of the environment's variables that the paths of the data in `file`, which `read_study` read, refer to."""
    tables = tomllib.loads(file.read_text(encoding="utf-8"))["data"]
    texts = [table[key] for table in tables for key in ("images", "labels") if key in table]
    found = [match["plain"] or match["braced"] for text in texts for match in re.finditer(_VARIABLE, text)]
    return sorted(set(found))


def _check(study: Study) -> None:
    grid, file = study.grid, study.file
    names = [data.name for data in study.data]
    for what, values in (
        ("[study]: methods", grid.methods),
        ("[study]: seeds", grid.seeds),
        ("[study]: budgets", grid.budgets),
        ("[[data]]: name", names),
        ("[finetune]: modes", study.finetuning.modes),
    ):
        if not values:
            raise UserError(f"{file} {what}: name at least one")
        if len(set(values)) < len(values):
            raise UserError(f"{file} {what}: {' '.join(map(str, values))} holds one twice")
    for what, value, least in (
        ("[study]: jobs", grid.jobs, 1),
        ("[study]: threads", grid.threads, 1),
        ("[study]: seeds", min(grid.seeds), 0),
        ("[probes]: draws", study.probes.draws, 1),
        ("[finetune]: draws", study.finetuning.draws, 1),
        ("[report]: draws", study.report.draws, 100),
    ):
        if value < least:
            raise UserError(f"{file} {what}: must be at least {least}, not {value}")
    for budget in grid.budgets:
        if not 0 < budget <= 1:
            raise UserError(f"{file} [study]: budgets: {budget} is not a share of the labels, above 0 and at most 1")
    if 1.0 not in grid.budgets:
        raise UserError(f"{file} [study]: budgets must hold 1.0, all labels, which the others are compared with")
    for name in study.leaks.allow:
        if name not in names:
            raise UserError(f"{file} [leaks]: allow: there are no data called {name!r}; there are {', '.join(names)}")
    check_finetune(study.finetuning.options, f"{file} [finetune]")
    for data in study.data:
        where = f"{file} [[data]] {data.name}"
        if not re.fullmatch(_NAME, data.name):
            raise UserError(f"{where}: name: use letters, digits, - and _: it becomes part of file names")
        if len(data.multilabel) == 1:
            raise UserError(f"{where}: multilabel: one column alone is a label; name two or more")
        check_finetune(data.finetune, f"{where}: finetune")
        for method in study.pretrained:
            for table, said in ((study.pretrain, f"{file} [pretrain]"), (data.pretrain, f"{where}: pretrain")):
                check_pretrain(recipe_name(data.recipe, method, small=data.small), method, table, said)
