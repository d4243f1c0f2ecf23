"""What a study's TOML file says, and what is said of mistakes in it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from fastmoco.data.views import ViewConfig
from fastmoco.errors import UserError
from fastmoco.evaluate.finetune import FinetuneConfig
from fastmoco.study.cell import REVISIONS
from fastmoco.study.cells import NOT_SETTINGS, finetune_settings, make_cells, pretrain_config
from fastmoco.study.config import Study, read_study
from fastmoco.study.overrides import _TAKEN, _TAKEN_OF_FINETUNING
from studies import draw_study

PRINTS = {"drawn": {"images": "i", "splits": "s", "label": "l", "multilabel": "m", "patients": "p", "origin": "given",
                    "train": 26, "validation": 6, "test": 16}}  # fmt: skip
# Another value of each field of a recipe that may be overridden, and of fine-tuning.
OTHER = {
    "head": "linear", "dim": 64, "zero_init_residual": False, "init": "torchvision", "norm": "frozen", "norm_groups": 2,
    "temperature": 0.1, "queue_size": 32, "queue_dtype": "bf16", "ema": 0.5, "stages": [4], "stage_weight": 0.5,
    "grids": [2, 2, 2, 2], "barlow_scale": 0.5, "barlow_off_diagonal": 0.5, "barlow_correlation": "global",
    "projector_width": 24, "key_shuffle": "global", "optimizer": "lars", "lars_trust": 0.1, "lr": 0.5,
    "sgd_momentum": 0.1, "weight_decay": 0.1, "update": "torch", "schedule": "constant", "warmup_epochs": 1.0,
    "epochs": 3, "steps": 3, "batch_size": 4, "accumulate": 2, "drop_last": False, "precision": "bf16",
    "channels_last": False, "resize": 1.5, "crop_scale": [0.5, 1.0], "jitter": [0.1, 0.1, 0.1, 0.1], "jitter_p": 0.1,
    "gray_p": 0.1, "blur_p": 0.1, "blur_sigma": [1.0, 2.0], "rotation": 5.0, "flip_p": 0.1, "objective": "simclr",
    "symmetric": True, "margin": 0.1, "mix_weight": 0.5, "pairs": "patient",
}
# Without these, others cannot be said.
WITH = {"mix_weight": {"objective": "barlow-twins"}}  # fmt: skip
OTHER_FINETUNING = {
    "views": {"size": 32, "crop_scale": [0.9, 1.0]}, "lr": 0.5, "encoder_lr": 0.5, "weight_decay": 0.5, "batch_size": 8,
    "epochs": 3, "least_steps": 4, "most_steps": 5, "validate_every": 2, "patience": 3, "precision": "bf16",
}  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]


def read(folder: Path, **lines: str) -> Study:
    return read_study(draw_study(folder, **lines))


def changed(folder: Path, before: str, after: str) -> Path:
    file = draw_study(folder)
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))
    return file


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('out = "out"', 'outt = "out"', r"study\.toml \[study\]: there is no key 'outt'; did you mean out\?"),
        ('out = "out"', "", r"\[study\]: out is missing"),
        ("seeds = [0]", "seeds = 0", r"\[study\]: seeds: must be an array"),
        ("seeds = [0]", "seeds = [0, 0]", r"\[study\]: seeds: 0 0 holds one twice"),
        ("seeds = [0]", "seeds = []", r"\[study\]: seeds: name at least one"),
        ("seeds = [0]", 'seeds = ["a"]', r"\[study\]: seeds: must be a whole number, not 'a'"),
        ("budgets = [0.4, 1.0]", "budgets = [0.4]", "budgets must hold 1.0"),
        ("budgets = [0.4, 1.0]", "budgets = [1, 40]", "40.0 is not a share"),
        ('device = "cpu"', 'device = "cpu"\nmethods = ["mocco"]', "one of scratch, moco, mse, barlow, not 'mocco'"),
        ("[[data]]", "[data]", "data are tables of their own"),
        ('name = "drawn"', 'name = "a/b"', "becomes part of file names"),
        ('label = "kind"', "", r"\[\[data\]\] drawn: label is missing"),
        ('recipe = "histology"', 'recipe = "fungus"', r"recipe: must be one of histology, chest-xray, fundus"),
        ("size = 32", "size = true", r"\[\[data\]\] drawn: size: must be a whole number, not True"),
        ('images = "images"', 'images = "$NOWHERE/images"', "no variable NOWHERE"),
        ("steps = 2", "stepps = 2", r"\[pretrain\]: there is no key 'stepps'; did you mean steps\?"),
        ("steps = 2", "steps = 0", r"\[pretrain\]: --steps must be at least 1"),
        ("steps = 2", "seed = 2", r"\[pretrain\]: seed is not set here"),
        ("steps = 2", 'loader = "dali"', r"\[pretrain\]: loader is not set here"),
        ('precision = "fp32"', 'precision = "auto"', r"\[pretrain\]: precision: auto is another on another device"),
        ("projector_width = 16", "projector_widt = 16", r"\[pretrain\]: barlow: there is no key 'projector_widt'"),
        ("projector_width = 16", "seed = 1", r"\[pretrain\]: barlow: seed is not set here"),
        ("projector_width = 16", "projector_width = 0.5", r"\[pretrain\]: projector_width: must be a whole number"),
        ("least_steps = 3", "least_stepps = 3", r"\[finetune\]: there is no key 'least_stepps'; did you mean"),
        ("least_steps = 3", "least_steps = 0", r"\[finetune\]: --least-steps must be at least 1"),
        ("least_steps = 3", 'mode = "full"', r"\[finetune\]: mode is not set here"),
        ("[report]", "[finetune.full]\nlrr = 3\n[report]", r"\]: full: there is no key 'lrr'; did you mean lr\?"),
        ("[report]", "[finetune.full]\nlr = -1\n[report]", r"\[finetune\]: full: --lr must be 0 or more"),
        ("[report]", "[finetune.linear]\narch = 'x'\n[report]", r"\[finetune\]: linear: arch is not set here"),
        ("[report]", "[finetune.ful]\nlr = 3\n[report]", r"\[finetune\]: there is no key 'ful'; did you mean full\?"),
        ("[report]", "[data.finetune.full]\nlrr = 3\n[report]", r"drawn: finetune: full: there is no key 'lrr'"),
        ("[report]", "[leaks]\nallow = ['other']\n[report]", "there are no data called 'other'; there are drawn"),
        ("[report]", "[reports]", "there is no key 'reports'; did you mean report"),
        ("seeds = [0]", "seeds = [0", "is not TOML"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_file_table_and_key(tmp_path: Path, before: str, after: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        read_study(changed(tmp_path, before, after))
    assert "study.toml" in str(error.value)


def test_a_file_that_is_not_there_is_an_error_for_people(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.toml: cannot be read: No such file"):
        read_study(tmp_path / "none.toml")


def test_paths_may_hold_variables_and_what_to_take_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = changed(tmp_path, 'images = "images"', 'images = "${PICTURES:-images}"')
    assert read_study(file).data[0].images == tmp_path / "images"
    monkeypatch.setenv("PICTURES", "/elsewhere")
    assert read_study(file).data[0].images == Path("/elsewhere")


def test_overrides_hold_for_all_methods_for_one_and_for_the_data(tmp_path: Path) -> None:
    study = read_study(changed(tmp_path, "[pretrain]", "[data.pretrain]\nlr = 0.5\nbatch_size = 4\n\n[pretrain]"))
    data = study.data[0]
    moco, barlow = (pretrain_config(study, data, method, Path("m"), Path("o")) for method in ("moco", "barlow"))
    # The data's say over the study's.
    assert (moco.optim.steps, moco.optim.batch_size, moco.optim.lr) == (2, 4, 0.5)
    assert moco.loss.projector_width == 2048 and barlow.loss.projector_width == 16
    settings = finetune_settings(study, data, "full", "moco")
    assert (settings.mode, settings.least_steps, settings.arch) == ("full", 3, "resnet18")
    # Fine-tuned with the crops and flips of the domain.
    assert settings.views is not None
    assert (settings.views.size, settings.views.crop_scale, settings.views.flip_p) == (32, (0.4, 1.0), 0.5)


def test_views_of_fine_tuning_may_be_said(tmp_path: Path) -> None:
    file = changed(tmp_path, "[report]", "[finetune.views]\nsize = 32\ncrop_scale = [0.9, 1.0]\n\n[report]")
    study = read_study(file)
    views = finetune_settings(study, study.data[0], "full", "moco").views
    assert views is not None and (views.crop_scale, views.flip_p) == ((0.9, 1.0), 0.0)
    with pytest.raises(UserError, match=r"\[finetune\]: views: crop_scale: needs 2 values, not 1"):
        read_study(changed(tmp_path, "[report]", "[finetune.views]\ncrop_scale = [0.9]\n\n[report]"))


def test_fine_tuning_may_differ_by_what_is_trained(tmp_path: Path) -> None:
    own = "[finetune.full]\nencoder_lr = 1e-4\n\n[finetune.linear]\nlr = 0.01\n\n[data.finetune.scratch]\nlr = 0.1\n\n"
    study = read_study(changed(tmp_path, "[report]", own + "[report]"))
    data = study.data[0]
    rates = {
        (mode, start): (config.lr, config.encoder_lr)
        for mode, start in (("full", "moco"), ("linear", "moco"), ("full", "scratch"), ("full", "random"))
        for config in [finetune_settings(study, data, mode, start)]
    }
    assert rates == {
        ("full", "moco"): (1e-3, 1e-4), ("full", "random"): (1e-3, 1e-4),
        ("linear", "moco"): (0.01, None), ("full", "scratch"): (0.1, None),
    }  # fmt: skip
    before, after = make_cells(read(tmp_path), PRINTS), make_cells(study, PRINTS)
    assert {c for c in before if before[c].hash != after[c].hash} == {c for c in before if "finetune" in c}
    with pytest.raises(UserError, match=r"\[finetune\]: linear must be a table, not 3"):
        read_study(changed(tmp_path, "least_steps = 3", "least_steps = 3\nlinear = 3"))
    # What the study says itself is no key to be tried.
    for before, after, last in (
        ("least_steps = 3", "zzz = 3", "precision, full, linear, scratch"),
        ("[report]", "[finetune.full]\nmodes = 3\n[report]", "precision"),
    ):
        with pytest.raises(UserError, match=rf"there is no key '\w+'; the keys are views, lr, .*{last}$") as error:
            read_study(changed(tmp_path, before, after))
        assert not {"mode", "arch"} & set(str(error.value).partition("the keys are ")[2].split(", "))


def test_every_cell_comes_after_what_it_needs(tmp_path: Path) -> None:
    cells = make_cells(read(tmp_path), PRINTS)
    before: set[str] = set()
    for cell in cells.values():
        assert set(cell.needs) <= before
        before.add(cell.id)
    kinds = {kind: sum(cell.kind == kind for cell in cells.values()) for kind in {c.kind for c in cells.values()}}
    # Four starts at two budgets, and once with several labels.
    assert kinds == {"data": 1, "baselines": 1, "pretrain": 3, "probes": 4, "similarity": 10, "finetune": 12}
    assert len({cell.hash for cell in cells.values()}) == len(cells)


def test_a_changed_setting_touches_its_own_cells_and_those_after(tmp_path: Path) -> None:
    before = make_cells(read(tmp_path), PRINTS)

    def touched(cells: dict) -> set[str]:
        return {cell_id for cell_id in before if cells[cell_id].hash != before[cell_id].hash}

    of_barlow = {cell_id for cell_id in before if "barlow" in cell_id}
    file = changed(tmp_path, "projector_width = 16", "projector_width = 24")
    assert touched(make_cells(read_study(file), PRINTS)) == of_barlow
    file = changed(tmp_path, "least_steps = 3", "least_steps = 4")
    assert touched(make_cells(read_study(file), PRINTS)) == {c for c in before if "finetune" in c}
    file = changed(tmp_path, "draws = 2", "draws = 3")
    assert touched(make_cells(read_study(file), PRINTS)) == {c for c in before if "probes" in c or "baselines" in c}
    other = {"drawn": PRINTS["drawn"] | {"multilabel": "n"}}
    of_second = {c for c in before if "multilabel" in c} | {"drawn.data"}
    assert touched(make_cells(read(tmp_path), other)) == of_second
    # By patients intervals are drawn, of what the data's cell says of them.
    for name in ("patients", "origin"):
        assert touched(make_cells(read(tmp_path), {"drawn": PRINTS["drawn"] | {name: "n"}})) == {"drawn.data"}
    assert touched(make_cells(read(tmp_path), {"drawn": PRINTS["drawn"] | {"images": "n"}})) == set(before)
    # Where they make the pairs, encoders depend on them.
    study = read(tmp_path)
    study = dataclasses.replace(study, pretrain=study.pretrain | {"pairs": "patient"})
    before = make_cells(study, PRINTS)
    changes = touched(make_cells(study, {"drawn": PRINTS["drawn"] | {"patients": "n"}}))
    assert {"drawn.data", "drawn.pretrain.mse.s0", "drawn.probes.mse.s0"} <= changes < set(before)
    before = make_cells(read(tmp_path), PRINTS)
    # Where it runs, and how many at a time, is no setting.
    file = changed(tmp_path, 'device = "cpu"', 'device = "cuda"\njobs = 7')
    assert touched(make_cells(read_study(file), PRINTS)) == set()


def test_whatever_can_be_overridden_is_in_a_hash_or_said_to_be_no_setting(tmp_path: Path) -> None:
    study = read(tmp_path)
    # A method's own table would count over what is changed.
    plain = {name: value for name, value in study.pretrain.items() if not isinstance(value, dict)}
    study = dataclasses.replace(study, pretrain=plain)
    before = make_cells(study, PRINTS)

    def touched(other: Study) -> set[str]:
        cells = make_cells(other, PRINTS)
        return {cell_id for cell_id in before if cells[cell_id].hash != before[cell_id].hash}

    config = pretrain_config(study, study.data[0], "moco", Path("m"), Path("o"))
    free = {f.name for part in (config.data, config.run, config.views, config.model, config.loss, config.optim)
            for f in dataclasses.fields(part)} - _TAKEN  # fmt: skip
    assert free - NOT_SETTINGS == set(OTHER)
    of_views = {field.name for field in dataclasses.fields(ViewConfig)}
    for name, value in OTHER.items():
        without, having = (study.pretrain | WITH.get(name, {}) | own for own in ({}, {name: value}))
        beside, cells = (make_cells(dataclasses.replace(study, pretrain=table), PRINTS) for table in (without, having))
        changes = {cell_id for cell_id in beside if cells[cell_id].hash != beside[cell_id].hash}
        # What a method lacks is no setting of its own.
        assert changes >= {"drawn.pretrain.mse.s0" if name == "grids" else "drawn.pretrain.barlow.s0"}, name
        # Alignment is of such views, and fine-tuning has them; a first resize makes every picture another.
        assert ("drawn.probes.random.s0" in changes) == (name in of_views), name
        assert ("drawn.finetune.scratch.full.s0.b1.d0" in changes) == (name in of_views), name
        assert ("drawn.similarity.random.s0" in changes) == (name == "resize"), name
    twins = study.pretrain | {"objective": "barlow-twins"}
    for name in ("barlow_scale", "barlow_off_diagonal", "barlow_correlation"):
        tables = twins, twins | {name: OTHER[name]}
        plain, other = (make_cells(dataclasses.replace(study, pretrain=table), PRINTS) for table in tables)
        assert plain["drawn.pretrain.moco.s0"].hash != other["drawn.pretrain.moco.s0"].hash, name
    for name in sorted(free & NOT_SETTINGS):
        value = getattr(next(p for p in (config.data, config.run) if hasattr(p, name)), name)
        other = tmp_path.as_posix() if name == "stage" else not value if isinstance(value, bool) else value + 1
        assert touched(dataclasses.replace(study, pretrain=study.pretrain | {name: other})) == set(), name
    of_finetuning = {field.name for field in dataclasses.fields(FinetuneConfig)} - _TAKEN_OF_FINETUNING
    assert of_finetuning == set(OTHER_FINETUNING)
    for name, value in OTHER_FINETUNING.items():
        options = study.finetuning.options | {name: value}
        changes = touched(dataclasses.replace(study, finetuning=dataclasses.replace(study.finetuning, options=options)))
        assert changes == {cell_id for cell_id in before if ".finetune" in cell_id}, name
    for changed_study in (
        dataclasses.replace(study, data=(dataclasses.replace(study.data[0], size=48),)),
        dataclasses.replace(study, data=(dataclasses.replace(study.data[0], recipe="fundus"),)),
        dataclasses.replace(study, grid=dataclasses.replace(study.grid, arch="resnet34")),
    ):
        assert {"drawn.probes.random.s0", "drawn.pretrain.moco.s0"} <= touched(changed_study)


def test_a_revision_of_the_program_computes_its_kind_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = make_cells(read(tmp_path), PRINTS)
    monkeypatch.setitem(REVISIONS, "pretrain", REVISIONS["pretrain"] + 1)
    after = make_cells(read(tmp_path), PRINTS)
    touched = {cell_id for cell_id in before if after[cell_id].hash != before[cell_id].hash}
    # And what goes on from it.
    assert touched == {c for c in before if re.search("moco|mse|barlow", c)}


def test_arithmetic_is_the_same_on_every_device(tmp_path: Path) -> None:
    study = read_study(changed(tmp_path, 'precision = "fp32"', ""))
    run = pretrain_config(study, study.data[0], "moco", Path("m"), Path("o")).run
    assert run.precision == "fp32"


def test_the_study_of_the_three_domains_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMOCO_TEST_DATA", "/data")
    study = read_study(ROOT / "bench" / "study.toml")
    assert [(data.name, data.size, data.label) for data in study.data] == [
        ("idc", 64, "idc"), ("idrid", 112, "dr"), ("nih", 64, "abnormal"),
    ]  # fmt: skip
    assert len(study.named("nih").multilabel) == 14
    assert study.grid.budgets == (0.01, 0.1, 1.0) and study.grid.seeds == (0, 1, 2) and study.probes.draws == 7


def test_a_study_does_not_pretrain_by_labels(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"objective: supcon learns from all labels"):
        read_study(changed(tmp_path, "projector_width = 16", 'projector_width = 16\nobjective = "supcon"'))
