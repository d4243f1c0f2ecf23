"""The command line as a user meets it: one clear message for each mistake, and status not 0."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file

from fastmoco import cli
from fastmoco.train import options
from fastmoco.train.config import Config
from fastmoco.train.pretrain import Stopped
from fastmoco.train.recipes import RECIPES
from runs import draw_images

QUICK = [
    "--arch", "resnet18", "--size", "32", "--batch-size", "4", "--queue-size", "16", "--dim", "8", "--steps", "2",
    "--loader", "torchvision", "--workers", "0", "--precision", "fp32", "--projector-width", "16",
]  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("data"))


def fastmoco(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    """The exit status of `fastmoco args`, in this process."""
    monkeypatch.setattr("sys.argv", ["fastmoco", *map(str, args)])
    try:
        return cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)


def test_from_images_to_an_evaluated_exported_encoder(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, labels = tmp_path / "run", images.parent / "labels.csv"
    data = ["--data", images, "--labels", labels, "--label", "kind"]
    args = ["pretrain", "histology-mse-small", *data, "--split", "train", "--out", run, *QUICK]
    assert fastmoco(monkeypatch, *args) == 0
    assert fastmoco(monkeypatch, "evaluate", run, *data, "--workers", "0") == 0
    shown = capsys.readouterr().out
    for word in ("colour statistics", "random", "stage1", "stage4", "final"):
        assert word in shown
    assert (run / "evaluation" / "evaluation.md").is_file()
    assert fastmoco(monkeypatch, "export", run, "--out", tmp_path / "e.safetensors") == 0
    model = torchvision.models.resnet18()
    model.fc = torch.nn.Identity()
    model.load_state_dict(load_file(tmp_path / "e.safetensors"), strict=True)


def test_help_documents_every_field(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert fastmoco(monkeypatch, "pretrain", "fundus-mse-small", "--help") == 0
    shown = capsys.readouterr().out
    for option in ("--temperature", "--queue-size", "--grids", "--crop-scale", "--lr", "--checkpoint-every", "--init"):
        assert option in shown
    for other in options.ELSEWHERE.values():
        assert not other.startswith("--") or f" {other.split()[0]} " in shown, "a hint names no option"
    assert "Temperature of a contrastive objective" in shown
    assert "0.2" in shown
    assert fastmoco(monkeypatch, "--help") == 0
    assert "pretrain" in capsys.readouterr().out


def test_recipes_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert fastmoco(monkeypatch, "recipes") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in RECIPES)


def pretrain_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: str, *args: object
) -> str:
    """The one message of a pretraining that must fail."""
    assert fastmoco(monkeypatch, "pretrain", recipe, *args) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    return captured.err or captured.out


def test_mistakes(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    labels = images.parent / "labels.csv"

    def error(recipe: str, *args: object) -> str:
        return pretrain_error(monkeypatch, capsys, recipe, *args)

    out = ["--out", tmp_path / "run"]
    assert "no images in it" in error("mocov2-small", "--data", empty, *out)
    assert "no such folder" in error("mocov2-small", "--data", tmp_path / "gone", *out)
    message = error("mocov2-small", "--data", images, "--labels", labels, "--label", "grade", *out)
    assert "no column 'grade'; its columns are file, patient, split, kind" in message
    assert "did you mean" in error("histologie-mse", "--data", images, *out)
    assert "--tempreature" in error("mocov2-small", "--data", images, *out, "--tempreature", "1")
    assert "--queue-size 3 is smaller" in error("mocov2-small", "--data", images, *out, *QUICK, "--queue-size", "3")
    assert "--data" in error("mocov2-small", *out)
    assert "name a recipe first" in error("--data", images, *out)
    assert "--learning_rate: here that is --lr" in error("mocov2", "--learning_rate=0.1")
    assert "--moco-k: here that is --queue-size" in error("mocov2", "--moco-k", 4096)
    assert "that is --objective simclr" in error("mocov2", "--method", "simclr")
    (tmp_path / "file").write_text("")
    assert "is a file" in error("mocov2-small", "--data", images, "--out", tmp_path / "file", *QUICK)
    assert "lower --batch-size" in error("mocov2-small", "--data", images, *out)
    assert "--device" in error("mocov2-small", "--data", images, *out, *QUICK, "--device", "nonsense")
    # Mistakes in the arguments leave nothing behind that would stand in the way of the corrected command.
    assert fastmoco(monkeypatch, "pretrain", "mocov2-small", "--data", images, *out, *QUICK) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--temperature", "-1"], "--temperature must be above 0, not -1.0"),
        (["--margin", "3"], "--margin must be from 0 to 2, not 3.0"),
        (["--workers", "-1"], "--workers must be 0 or more, not -1"),
        (["--batch-size", "1"], "--batch-size 1 has no other images: give --objective simclr at least 2"),
    ],
)
def test_values_out_of_range_are_told_in_one_line(
    options: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fastmoco(monkeypatch, "pretrain", "simclr", "--data", "X", "--out", "Y", *options) == 2
    assert capsys.readouterr() == ("", f"error: {said}\n")


def test_arguments_of_another_type_are_shown_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fastmoco(monkeypatch, "pretrain", "simclr", "--data", "X", "--out", "Y", "--margin", "much") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("much") == 1 and "--margin" in err


def test_damaged_and_foreign_checkpoints(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    args = ["--data", images, "--out", run, *QUICK]
    assert fastmoco(monkeypatch, "pretrain", "mocov2-small", *args) == 0
    capsys.readouterr()
    assert "pass --resume" in pretrain_error(monkeypatch, capsys, "mocov2-small", *args)
    message = pretrain_error(monkeypatch, capsys, "mocov2-small", *args, "--resume", "--arch", "resnet34")
    assert "--arch was resnet18, is resnet34" in message
    (path,) = (run / "checkpoints").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    message = pretrain_error(monkeypatch, capsys, "mocov2-small", *args, "--resume")
    assert path.name in message
    assert "truncated" in message
    assert fastmoco(monkeypatch, "export", run, "--out", tmp_path / "e.safetensors") == 2
    assert not (tmp_path / "e.safetensors").exists()


@pytest.mark.parametrize("args", [["pretrian"], ["recipes", "extra"], ["export", "nowhere"], []])
def test_commands_that_do_not_exist_or_fit(
    args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fastmoco(monkeypatch, *args) == 2
    captured = capsys.readouterr()
    assert captured.out + captured.err


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert fastmoco(monkeypatch, "--version") == 0
    assert "fastmoco 0.1.0" in capsys.readouterr().out


def test_a_demo_that_is_stopped_says_how_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(args: object) -> int:
        raise Stopped("stopped at step 3", 2)

    monkeypatch.setattr("fastmoco.demo.run_demo", stop)
    assert fastmoco(monkeypatch, "demo") == 130
    assert capsys.readouterr().err == "stopped at step 3; the same command goes on from there\n"


@pytest.mark.parametrize(("rank", "said"), [(0, "stopped at step 3; go on with --resume\n"), (1, "")])
def test_only_the_first_process_says_where_the_run_stopped(
    rank: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(config: Config) -> Path:
        raise Stopped("stopped at step 3", 15)

    for name, value in {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "n0", "MASTER_PORT": 1234}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("fastmoco.train.pretrain.pretrain", stop)
    monkeypatch.setattr("fastmoco.train.stop.end_undisturbed", lambda: None)
    args = ["pretrain", "mocov2", "--data", tmp_path, "--out", tmp_path / "run"]
    assert fastmoco(monkeypatch, *args) == 128 + 15
    assert capsys.readouterr().err == said
