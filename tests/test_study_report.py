"""A tiny study from drawn images to its report. `make test-system`."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from sklearn.metrics import roc_auc_score

from fastmoco.study.cells import make_cells
from fastmoco.study.command import StudyArgs, study_command
from fastmoco.study.config import read_study
from fastmoco.study.pool import Pool
from fastmoco.study.report.blocks import Code, Heading, Listing, Table, Text
from fastmoco.study.report.markdown import to_markdown
from fastmoco.study.report.page import to_html
from fastmoco.study.report.statistics import complete
from fastmoco.study.store import Store
from fastmoco.study.work import finetune
from fastmoco.study.work.context import Context
from fastmoco.study.work.encoders import load_start
from fastmoco.study.work.numbers import pack, unpack
from fastmoco.study.worker import Job, Outcome, _Worker
from studies import draw_study

pytestmark = pytest.mark.system
PICTURES = {
    "labels-full", "labels-stage4", "stages-0.4", "stages-1", "reuse", "ks-1", "pretraining", "finetuning",
    *(
        f"cka-{kernel}-{pair}" for kernel in ("linear", "rbf")
        for pair in ("random-moco", "random-mse", "random-barlow", "moco-mse", "moco-barlow", "mse-barlow")
    ),
}  # fmt: skip
TABLES = (
    "The claim at 40 % of the labels", "Each against what needs no pretraining", "Full fine-tuning: test AUC",
    "Linear probe of stage 4: test AUC", "Linear probe of the stage that is best", "How often each stage was the best",
    "Full fine-tuning: other test scores", "Full fine-tuning: differences", "Linear probe of stage 4: differences",
    "DeLong's test, run by run",
    "2 labels at once, full fine-tuning, all labels: paired differences", "2 labels at once",
    "kNN", "stage 4, mean of seeds", "embedding, mean of seeds", "feature reuse", "KS distance",
    "Pretraining", "Fine-tuning (Adam)", "Labelled images by budget", "Cells by kind and machine",
)  # fmt: skip


class Here(Pool):
    """A pool that computes cells in this process, which has imported everything already."""

    def __enter__(self) -> Here:
        self.worker = _Worker(self._study, self._device)
        self.outcomes: list[Outcome] = []
        return self

    @property
    def free(self) -> int:
        return self._size - len(self.outcomes)

    @property
    def running(self) -> list[str]:
        return [outcome.cell for outcome in self.outcomes]

    def start(self, job: Job) -> None:
        self.outcomes.append(self.worker.compute(job))

    def wait(self, seconds: float) -> list[Outcome]:
        outcomes, self.outcomes = self.outcomes, []
        return outcomes

    def trial(self, size: int) -> float:
        return self.worker.trial(size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that is computed whole."""
    more = "[finetune.scratch]\nmost_steps = 2"
    file = draw_study(tmp_path_factory.mktemp("study"), more=more)
    assert study_command(StudyArgs(config=file), pool=Here) == 0
    return file.parent


class Page(HTMLParser):
    """What is in a page: captions of its tables, ids of its figures, and whatever would be fetched or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: list[str] = []
        self.drawn = 0
        self.captions: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self._caption = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        own = dict(attrs)
        if tag == "figure":
            self.figures.append(own.get("id") or "")
        self.drawn += tag == "svg"
        self._caption = tag == "caption"
        self.links += [own[name] or "" for name in ("href", "src", "xlink:href") if name in own]

    def handle_data(self, text: str) -> None:
        if self._caption:
            self.captions.append(text)
            self._caption = False


def test_the_page_holds_every_table_and_picture_and_needs_nothing_else(folder: Path) -> None:
    text = (folder / "out" / "report" / "report.html").read_text()
    page = Page(text)
    assert {name.removeprefix("picture-drawn-") for name in page.figures} == PICTURES
    assert page.drawn == len(PICTURES)
    for caption in TABLES:
        assert any(caption in found for found in page.captions), caption
    # Nothing is fetched, and nothing runs.
    assert all(link.startswith(("#", "data:")) for link in page.links), page.links
    assert not page.tags & {"script", "iframe", "img", "object", "embed"}
    assert "url(" not in re.sub(r"url\(#[^)]*\)", "", text) and "@import" not in text
    assert 'name="viewport" content="width=device-width' in text and "@media print" in text
    # The folder of the study is nobody's business.
    assert str(folder) not in text


def test_the_answer_comes_first(folder: Path) -> None:
    text = (folder / "out" / "report" / "report.md").read_text()
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == [
        "What was asked, and the answer", "drawn", "Settings", "Label budgets that were used", "Leaks between splits",
        "What ran where, and how long", "Commands", "Failed and missing cells",
    ]  # fmt: skip
    for name in ("MoCo + MSE", "MoCo + Barlow"):
        assert re.search(rf"\*\*{re.escape(name)}: the claim is (met|refuted|undecided): [+-]\d+\.\d ", text)
    assert re.search(r"\*\*The claim as a whole, of every variant: (met|refuted|undecided)\.\*\*", text)
    assert "None: every cell is computed." in text and "drawn: no patient and no picture is in two splits." in text
    assert "its file says nothing of it" in text
    assert "fastmoco study study.toml --only drawn.probes.moco.s0 --again" in text
    for name in re.findall(r"\]\((.*\.png)\)", text):
        assert (folder / "out" / "report" / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_scores_are_those_of_the_stored_probabilities(folder: Path) -> None:
    store = Store(folder / "out")
    data = store.read("drawn.data")
    cell = store.read("drawn.finetune.moco.full.s0.b1.d0")
    probes = store.read("drawn.probes.moco.s0")
    assert data is not None and cell is not None and probes is not None
    truth = data["result"]["targets"]["kind"]["test"]
    by_hand = roc_auc_score(truth, cell["result"]["probabilities"]["log_odds"])
    runs = [
        row["probabilities"]["log_odds"]
        for row in probes["result"]["probes"]
        if row["features"] == "stage4" and row["budget"] == 0.4
    ]
    assert len(runs) == 2 and len(truth) == len(runs[0]) == 16
    text = (folder / "out" / "report" / "report.md").read_text()

    def row_of(caption: str) -> list[str]:
        table = text[text.index(caption) :].split("\n\n")[1]
        return next(line for line in table.splitlines() if line.startswith("| MoCo |")).split(" | ")

    assert row_of("Full fine-tuning: test AUC")[2].startswith(f"{by_hand:.3f} ")
    mean = np.mean([roc_auc_score(truth, run) for run in runs])
    assert row_of("Linear probe of stage 4: test AUC")[1].startswith(f"{mean:.3f} ")


def test_every_cell_says_how_it_came_about(folder: Path) -> None:
    for path in (folder / "out" / "cells").glob("*.json"):
        text = path.read_text()
        record = json.loads(text)
        assert record["seconds"] > 0 and record["device"] == "cpu" and record["versions"]["torch"]
        assert record["command"] == f"fastmoco study study.toml --only {record['id']} --again"
        assert str(folder) not in text


def test_stored_probabilities_keep_their_order_where_they_are_near_0_and_1() -> None:
    rng = np.random.default_rng(0)
    logits = np.concatenate([rng.uniform(14, 21, 40), rng.uniform(-30, 30, 40)])
    truth = logits > np.median(logits)
    two = np.stack([expit(-logits), expit(logits)], axis=1)
    found = unpack(json.loads(json.dumps(pack(two, "binary"))))
    np.testing.assert_allclose(found, two, rtol=1e-4)
    assert roc_auc_score(truth, found[:, 1]) == roc_auc_score(truth, logits) == 1.0
    several = softmax(rng.normal(0, 8, (50, 3)), axis=1)
    np.testing.assert_allclose(unpack(pack(several, "multiclass")), several, rtol=1e-4)
    labels = expit(rng.normal(0, 8, (50, 2)))
    np.testing.assert_allclose(unpack(pack(labels, "multilabel")), labels, rtol=1e-4)
    # What votes that are all for one class give.
    for kind in ("binary", "multiclass", "multilabel"):
        np.testing.assert_allclose(unpack(pack(np.eye(2), kind)), np.eye(2), atol=1e-300)


def test_a_network_from_scratch_begins_as_the_random_one_of_its_seed_and_is_kept_without_its_reuse(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = read_study(folder / "study.toml")
    data, store = study.data[0], Store(folder / "out")
    stored = store.read("drawn.finetune.scratch.full.s0.b1.d0")
    described = store.read("drawn.data")
    assert stored is not None and described is not None
    reuse = stored["result"]["reuse"]
    assert set(reuse) == {"linear", "rbf"} and reuse["linear"] != reuse["rbf"]
    cell = make_cells(study, {"drawn": described["result"]["print"]})[stored["id"]]
    context = Context(study, data, store, "cpu", cell.settings["data"])
    scratch, random = (load_start(context, init, 0, {}).state_dict() for init in ("scratch", "random"))
    assert all(torch.equal(scratch[name], random[name]) for name in random)

    def fail(*sets: object, **options: object) -> None:
        raise MemoryError("of all of it")

    monkeypatch.setattr(finetune, "feature_reuse", fail)
    found = finetune.run(cell, context, {})
    assert "reuse" not in found and found["notes"] == ["no feature reuse: MemoryError: of all of it"]
    assert set(found["probabilities"]) == {"log_odds"}


def test_the_report_is_made_of_the_cells_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cells").symlink_to(folder / "out" / "cells")
    (tmp_path / "study.toml").write_text((folder / "study.toml").read_text())
    assert study_command(StudyArgs(config=tmp_path / "study.toml", report="only")) == 0
    for name in ("report.html", "report.md"):
        assert (tmp_path / "out" / "report" / name).read_text() == (folder / "out" / "report" / name).read_text()


def test_a_report_of_half_a_study_says_what_is_missing(folder: Path, tmp_path: Path) -> None:
    cells = tmp_path / "out" / "cells"
    cells.mkdir(parents=True)
    for path in (folder / "out" / "cells").glob("*.json"):
        if "mse" not in path.name:
            (cells / path.name).write_text(path.read_text())
    (cells / "drawn.baselines.json").write_text("{")
    failed = Store(folder / "out").read("drawn.pretrain.mse.s0")
    assert failed is not None
    (tmp_path / "out" / "failures").mkdir()
    (tmp_path / "out" / "failures" / "drawn.pretrain.mse.s0.txt").write_text(
        f"{failed['hash']}\nTraceback\nRuntimeError: of all memory\n"
    )
    (tmp_path / "study.toml").write_text((folder / "study.toml").read_text())
    assert study_command(StudyArgs(config=tmp_path / "study.toml", report="only")) == 3
    text = (tmp_path / "out" / "report" / "report.md").read_text()
    assert "**MoCo + MSE: not computed yet; cells are missing.**" in text
    assert "drawn.pretrain.mse.s0: RuntimeError: of all memory" in text
    assert re.search(r"Files that are damaged:\n\n- .*drawn\.baselines\.json: not JSON", text)
    assert re.search(r"Not computed yet: 9:\n\n(- drawn.*\n?){9}", text), text[-900:]


def test_it_says_by_which_settings_encoders_were_trained_and_which_are_not_the_recipes(folder: Path) -> None:
    text = (folder / "out" / "report" / "report.md").read_text()
    assert "drawn, histology-barlow-small:" in text and "projector\\_width 16 (recipe: 2048)" in text
    assert "queue\\_size 16 (recipe: 1024)" in text and "drawn: crop\\_scale 0.4 1, flip\\_p 0.5" in text
    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in text.splitlines() if line.startswith("| drawn, ")}
    assert rows["| drawn, MoCo"][1:3] == ["2", "8"]
    least_and_most = {name: rows[f"| drawn, {name}"][5:7] for name in ("all weights", "from scratch")}
    assert least_and_most == {"all weights": ["3", "10000"], "from scratch": ["3", "2"]}
    # And they were trained so.
    for init, steps in (("moco", 3), ("scratch", 2)):
        cell = Store(folder / "out").read(f"drawn.finetune.{init}.full.s0.b1.d0")
        assert cell is not None and cell["result"]["curve"][-1]["step"] == steps
    sums = {path.stem: json.loads(path.read_text())["result"] for path in (folder / "out" / "cells").glob("*pretrain*")}
    for cell, result in sums.items():
        assert f"{cell}: {result['sha256']}" in text


def test_the_file_may_say_where_its_settings_come_from(folder: Path, tmp_path: Path) -> None:
    text = (folder / "study.toml").read_text().replace("seeds = [0]", 'seeds = [0]\nnote = "Tried on test images."')
    file = tmp_path / "study.toml"
    file.write_text(text.replace('images = "images"', 'images = "${PICTURES:-images}"'))
    # The cells may lie elsewhere than the file says; the report lies with them.
    out = tmp_path / "elsewhere"
    out.mkdir()
    (out / "cells").symlink_to(folder / "out" / "cells")
    assert study_command(StudyArgs(config=file, report="only", out=out, device="cpu")) == 0
    text = (out / "report" / "report.md").read_text()
    assert "**Of the settings, the study's file says: Tried on test images.**" in text
    assert "its file says nothing of it" not in text
    assert "fastmoco study study.toml --device cpu    # what is missing" in text
    assert "from the environment, where they are set, the folders of images: PICTURES." in text


def test_seeds_that_lack_a_draw_are_left_out() -> None:
    assert complete({(0, 0): 1, (0, 1): 1, (1, 0): 1, (2, 1): 1, (2, 0): 1}) == [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert complete({}) == []


def test_text_is_text_whatever_it_holds() -> None:
    odd = "<b>&| *x* [y](z) </script>"
    blocks = [
        Heading(level=2, text=odd), Text(text=odd, strong=True), Code(text=odd), Listing(items=(odd,), summary=odd),
        Table(caption=odd, header=(odd, "n"), rows=((odd, "1"),)),
    ]  # fmt: skip
    page = to_html(odd, blocks)
    assert "<b>" not in page and "</script>" not in page and page.count("&lt;b&gt;&amp;| *x*") >= 8
    text = to_markdown(odd, blocks)
    assert "\\<b\\>&\\| \\*x\\* \\[y\\](z)" in text
    with pytest.raises(ValueError, match="a row of 1 cells under 2"):
        Table(caption="c", header=("a", "b"), rows=(("1",),))
