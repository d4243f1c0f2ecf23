"""`fastmoco slurm render`: scripts that sbatch and bash can read, whatever the options; mistakes are named."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from fastmoco import cli
from fastmoco.slurm.render import seconds_of
from studies import draw_study

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "slurm"
RUN = ["mocov2", "--data", "/images", "--out", "/run"]
STUDY = ["study", "--recipes", "mocov2", "fundus-mse-small"]


def render(capsys: pytest.CaptureFixture[str], kind: str, *own: str, options: Sequence[str] = RUN) -> str:
    capsys.readouterr()
    assert cli.dispatch(["slurm", "render", kind, *own, "--", *options]) == 0
    return capsys.readouterr().out


def directives(script: str) -> set[str]:
    return {line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")}


def variable(script: str, name: str) -> list[str]:
    """The words of the array or variable `name`, as bash reads them."""
    (line,) = [line for line in script.splitlines() if line.startswith(f"{name}=")]
    said = subprocess.run(
        ["bash", "-c", f'{line}; printf "%s\\0" "${{{name}[@]}}"'], capture_output=True, text=True, check=True
    )
    return said.stdout.split("\0")[:-1]


def test_a_pretraining_on_two_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    script = render(
        capsys, "pretrain", "--nodes", "2", "--gpus", "4", "--time", "1-12", "--partition", "a100", "--account", "x",
        "--cpus", "6", "--sbatch", "qos=high", "--sbatch", "exclusive", "--notice", "600", "--max-requeues", "3",
    )  # fmt: skip
    assert {
        "nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "time=1-12", "partition=a100", "account=x",
        "cpus-per-task=6", "qos=high", "exclusive", "signal=B:USR1@600", "requeue", "open-mode=append",
    } <= directives(script)  # fmt: skip
    # sbatch reads no directive after the first command.
    assert script.rindex("#SBATCH") < script.index("set -euo pipefail")
    assert variable(script, "options") == RUN
    assert variable(script, "max_requeues") == ["3"]
    assert "source" not in [line.split(" ")[0] for line in script.splitlines()]


def test_without_gpus_none_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    asked = directives(render(capsys, "pretrain", "--nodes", "2", "--gpus", "0"))
    assert "ntasks-per-node=1" in asked
    assert not [line for line in asked if line.startswith(("gpus", "partition"))]


def test_options_reach_bash_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    odd = ["mocov2", "--data", "/a folder/it's $HOME `id`", "--out", "/run;\\1 \"x\"", "--crop-scale", "0.2", "1"]
    assert variable(render(capsys, "pretrain", options=[*odd, "--resume"]), "options") == odd
    assert variable(render(capsys, "pretrain", "--command", "python 'my file'"), "fastmoco") == ["python", "my file"]


@pytest.mark.parametrize(
    ("image", "program"),
    [("/images/f.sif", "apptainer exec --nv"), ("nvcr.io#nvidia/pytorch:26.01-py3", "--container-image=nvcr.io#")],
)
def test_containers(image: str, program: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = render(capsys, "pretrain", "--container", image, "--mounts", "/data:/data")
    assert variable(script, "fastmoco") == ["fastmoco"]
    setup = script[script.index("fastmoco=(") : script.index("# --- Environment")]
    said = subprocess.run(
        ["bash", "-c", f'{setup}\necho "${{pyxis[*]}} ${{within[*]}}"'], capture_output=True, text=True, check=True
    )
    assert program in said.stdout and "/data:/data" in said.stdout and image in said.stdout


def test_a_study_has_a_task_for_each_recipe_and_seed(capsys: pytest.CaptureFixture[str]) -> None:
    shared = ["--data", "/images", "--out", "/study", "--arch", "resnet18"]
    script = render(capsys, *STUDY, "--seeds", "3", "5", "7", "--at-once", "2", options=shared)
    assert "array=0-5%2" in directives(script)
    assert variable(script, "recipes") == ["mocov2", "fundus-mse-small"]
    assert variable(script, "seeds") == ["3", "5", "7"]
    assert variable(script, "study") == ["/study"]
    assert variable(script, "options") == ["--data", "/images", "--arch", "resnet18"]
    # What each task of the array would train, with `train` replaced by a word that says it.
    lines = script.splitlines()
    start = lines.index("options=(--data /images --arch resnet18)")
    end = next(i for i, line in enumerate(lines) if line.startswith("task="))
    compared = [line for line in lines if line.startswith(("recipes=", "seeds=", "study="))]
    alone = "\n".join([*compared, lines[start], *lines[end:]])
    trained = []
    for task in range(6):
        done = subprocess.run(
            ["bash", "-euc", f'train() {{ echo "$@"; }}\n{alone}'], capture_output=True, text=True, check=True,
            env=os.environ | {"SLURM_ARRAY_TASK_ID": str(task)},
        )  # fmt: skip
        trained.append(done.stdout.split())
    assert trained == [
        [recipe, *shared[:2], *shared[4:], "--seed", seed, "--out", f"/study/{recipe}/seed-{seed}"]
        for recipe in ("mocov2", "fundus-mse-small")
        for seed in ("3", "5", "7")
    ]
    past = subprocess.run(
        ["bash", "-euc", f"train() {{ :; }}\n{alone}"], capture_output=True, text=True,
        env=os.environ | {"SLURM_ARRAY_TASK_ID": "6"},
    )  # fmt: skip
    assert past.returncode == 2 and "correct --array" in past.stderr


def test_the_tasks_of_a_grid_share_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = draw_study(tmp_path)
    asked = ["--tasks", "6", "--gpus", "1", "--time", "2:00:00"]
    script = render(capsys, "grid", *asked, options=[str(file), "--jobs", "3"])
    assert {"array=0-5", "ntasks-per-node=1", "gpus-per-node=1", "nodes=1", "time=2:00:00"} <= directives(script)
    # No cell is to run in the last five minutes, and no task reports on what is half done.
    assert variable(script, "options") == [str(file), "--jobs", "3", "--max-minutes", "115", "--report", "none"]
    asked = [str(file), "--max-minutes", "7", "--report", "after"]
    assert variable(render(capsys, "grid", options=asked), "options") == asked


def test_a_measurement_keeps_the_batch_of_a_process(capsys: pytest.CaptureFixture[str]) -> None:
    measured = [*RUN, "--batch-size", "512", "--steps", "100"]
    script = render(capsys, "bench", "--nodes", "2", "--gpus", "4", options=measured)
    assert variable(script, "batch") == ["64"]
    assert variable(script, "options") == ["mocov2", "--data", "/images", "--steps", "100"]
    assert "signal=B:USR1@300" not in directives(script)


@pytest.mark.parametrize(
    ("own", "options", "message"),
    [
        (["pretrian"], RUN, "no script 'pretrian'"),
        (["grid"], ["/no/study.toml"], "/no/study.toml: cannot be read"),
        (["grid", "--nodes", "2"], ["/no/study.toml"], "--nodes 2: each task of a grid has one node"),
        (["grid", "--gpus", "2"], ["/no/study.toml"], "--gpus 2: each task of a grid uses one GPU"),
        (["grid", "--tasks", "0"], ["/no/study.toml"], "--tasks must be at least 1"),
        (["pretrain", "--nodes", "0"], RUN, "--nodes must be at least 1"),
        (["pretrain", "--gpus", "-1"], RUN, "--gpus must be at least 0"),
        (["pretrain", "--time", "soon"], RUN, "--time 'soon' is not a time limit"),
        (["pretrain", "--time", "0:00:00"], RUN, "is no time"),
        (["pretrain", "--time", "5"], RUN, "--notice 300 is no less than --time 5"),
        (["pretrain", "--notice", "70000"], RUN, "at most 65535"),
        (["pretrain", "--partition", "a b"], RUN, "--partition 'a b' is not a name"),
        (["pretrain", "--sbatch", "two words"], RUN, "--sbatch 'two words' is not an option"),
        (["pretrain", "--mounts", "/a:/a"], RUN, "name one with --container"),
        (["pretrain", "--out", "/nowhere/x.sbatch"], RUN, "/nowhere/x.sbatch: cannot be written"),
        (["pretrain"], [], "name a recipe first"),
        (["pretrain"], ["mocov3", *RUN[1:]], "no recipe 'mocov3'"),
        (["pretrain", "--nodes", "3", "--gpus", "8"], RUN, "--batch-size 256 is shared by 24 processes .* take 240"),
        (["study", "--recipes", "mocov3"], RUN[1:], "no recipe 'mocov3'"),
        (STUDY, RUN[1:3], "no run folder"),
        ([*STUDY, "mocov2"], RUN[1:], "names one twice"),
        (["bench"], RUN, "a measurement needs --steps"),
    ],
)
def test_mistakes(
    own: list[str],
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("sys.argv", ["fastmoco", "slurm", "render", *own, "--", *options])
    try:
        status = cli.main()
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr()
    assert status == 2 and re.search(message, said.err + said.out) and "Traceback" not in said.err


def test_a_wrong_option_of_the_pretraining_is_found_now(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        render(capsys, "pretrain", options=[*RUN, "--tempreature", "1"])
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("1:30", 90), ("1:02:03", 3723), ("2-1", 176400), ("1-0:30", 88200), ("0-0:0:10", 10)],
)
def test_times(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds


@pytest.mark.parametrize("path", sorted(SCRIPTS.iterdir()), ids=lambda path: path.name)
def test_bash_reads_the_templates(path: Path) -> None:
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_shellcheck_has_nothing_to_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which("shellcheck") is None:
        if os.environ.get("CI"):
            pytest.fail("no shellcheck")
        pytest.skip("no shellcheck (Debian: shellcheck)")
    written = []
    for kind, own, options in (
        ("pretrain", [], RUN),
        ("bench", [], [*RUN, "--steps", "100"]),
        ("study", STUDY[1:], RUN[1:]),
        ("grid", [], [str(draw_study(tmp_path))]),
    ):
        script = tmp_path / f"{kind}.sbatch"
        script.write_text(render(capsys, kind, *own, options=options))
        written.append(script)
    paths = [*sorted(SCRIPTS.iterdir()), *written]
    done = subprocess.run(["shellcheck", "-x", "--source-path=SCRIPTDIR", *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
