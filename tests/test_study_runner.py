"""Going through a grid: what is computed once, what fails, what is killed, and two that share the work."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastmoco.errors import UserError
from fastmoco.study import worker
from fastmoco.study.cells import make_cells
from fastmoco.study.command import StudyArgs, study_command
from fastmoco.study.config import read_study
from fastmoco.study.pool import Pool
from fastmoco.study.store import Damaged, Store
from fastmoco.study.work import compute
from fastmoco.study.work.context import prepare
from studies import NoProcesses, be_quick, draw_study, serve_threads

TESTS = Path(__file__).parent
# One pretraining, what follows it and what needs none.
FEW = {"study": 'methods = ["scratch", "moco"]'}
CELLS = 4 + 3 + 1 + 2 * 3


def ways(file: Path, **cells: str) -> Path:
    """The folder by which `serve_quickly` is told what to do with cells, their names with _ for the dots."""
    folder = file.parent / "out" / "ways"
    folder.mkdir(parents=True, exist_ok=True)
    for name, way in cells.items():
        (folder / name.replace("_", ".")).write_text(way)
    return folder


def computed(file: Path) -> list[str]:
    log = file.parent / "out" / "ways" / "log"
    return log.read_text().split() if log.exists() else []


def run(file: Path, **options: object) -> int:
    return study_command(StudyArgs(config=file, report="none", **options), pool=NoProcesses)  # type: ignore[arg-type]


def prints(file: Path) -> dict[str, dict[str, object]]:
    study = read_study(file)
    return {data.name: prepare(study, data).print for data in study.data}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # What `be_quick` changes is put back.
    monkeypatch.setattr(compute, "WORK", dict(compute.WORK))
    monkeypatch.setattr(worker._Worker, "trial", None)
    made = draw_study(tmp_path, **FEW)
    ways(made)
    be_quick(read_study(made))
    return made


def test_finished_cells_are_never_computed_again(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(file) == 0
    assert len(computed(file)) == len(set(computed(file))) == CELLS
    said = capsys.readouterr().out
    # The estimate comes first.
    first = f"{CELLS} of {CELLS} cells are to be computed on cpu by 1 at a time: about"
    assert said.index(first) < said.index("done in")
    assert run(file) == 0
    assert len(computed(file)) == CELLS
    # Unless one is named.
    assert run(file, only=("*.probes.moco.*",), again=True) == 0
    assert computed(file)[CELLS:] == ["drawn.probes.moco.s0"]


def test_a_changed_setting_computes_what_it_touches(file: Path) -> None:
    assert run(file) == 0
    file.write_text(file.read_text().replace("least_steps = 3", "least_steps = 4"))
    assert run(file) == 0
    assert sorted(computed(file)[CELLS:]) == sorted(cell for cell in set(computed(file)) if ".finetune." in cell)


def test_a_damaged_file_is_noticed_and_computed_again(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(file) == 0
    store = Store(file.parent / "out")
    path = store.path("drawn.baselines")
    path.write_text(path.read_text().replace("drawn.baselines", "drawn.baselinez", 1))
    torn = store.path("drawn.data")
    torn.write_text(torn.read_text()[:40])
    flipped = store.path("drawn.similarity.random-moco.s0")
    flipped.write_text(flipped.read_text().replace('"seconds":', '"seconds":1'))
    for damaged in ("drawn.baselines", "drawn.data", "drawn.similarity.random-moco.s0"):
        with pytest.raises(Damaged):
            store.read(damaged)
    assert run(file) == 0
    assert sorted(computed(file)[CELLS:]) == ["drawn.baselines", "drawn.data", "drawn.similarity.random-moco.s0"]
    assert capsys.readouterr().out.count("damaged, to be computed again") == 3


def test_a_failed_cell_is_reported_and_the_rest_go_on(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ways(file, drawn_baselines="fail", drawn_probes_random_s0="fail")
    assert run(file) == 1
    store = Store(file.parent / "out")
    cells = make_cells(read_study(file), prints(file))
    assert "it was to fail" in (store.failure(cells["drawn.baselines"]) or "")
    assert len(list(store.cells.glob("*.json"))) == CELLS - 2
    said = capsys.readouterr().out
    assert "2 cells failed:" in said and "RuntimeError: it was to fail" in said
    # Mended, they are computed, and nothing else; their failures are forgotten.
    (ways(file) / "drawn.baselines").unlink()
    (ways(file) / "drawn.probes.random.s0").unlink()
    assert run(file) == 0
    assert sorted(computed(file)[CELLS:]) == ["drawn.baselines", "drawn.probes.random.s0"]
    assert list(store.failures.iterdir()) == []


def test_a_reason_is_of_the_last_failure_and_of_the_settings_it_had(file: Path) -> None:
    class Dies(NoProcesses):
        """One whose processes end over every cell."""

        def start(self, job: worker.Job) -> None:
            self._outcomes.append(worker.Outcome(cell=job.cell.id, state="failed", reason="its process ended"))

    ways(file, drawn_probes_random_s0="fail")
    assert run(file, only=("drawn.probes.random.s0",)) == 1
    store, cells = Store(file.parent / "out"), make_cells(read_study(file), prints(file))
    probes = cells["drawn.probes.random.s0"]
    assert "it was to fail" in (store.failure(probes) or "")
    args = StudyArgs(config=file, report="none", only=("drawn.probes.random.s0",))
    assert study_command(args, pool=Dies) == 1
    assert store.failure(probes) == "its process ended"
    file.write_text(file.read_text().replace("draws = 2", "draws = 3"))
    other = make_cells(read_study(file), prints(file))["drawn.probes.random.s0"]
    assert other.hash != probes.hash and store.failure(other) is None


def test_two_studies_do_not_share_a_folder_at_once(file: Path) -> None:
    store = Store(file.parent / "out")
    store.make()
    with store.shared("some"):
        with pytest.raises(UserError, match="is being computed with other settings or of other images"):
            run(file)
        assert computed(file) == [] and list(store.data.iterdir()) == []
        # As many as like of one.
        with Store(store.out).shared("some"):
            pass
        with pytest.raises(UserError, match="other settings"), Store(store.out).shared("others"):
            pass
    assert run(file, only=("drawn.data",)) == 3


def test_a_pretraining_again_begins_from_nothing(file: Path) -> None:
    assert run(file, only=("*.pretrain.*",)) == 3
    (folder,) = (file.parent / "out" / "runs").iterdir()
    (folder / "half").touch()
    assert run(file, only=("*.pretrain.*",), again=True) == 3
    assert len(computed(file)) == 2 and not (folder / "half").exists() and (folder / "query.safetensors").exists()


def test_what_needs_a_failed_cell_is_left(file: Path) -> None:
    ways(file, drawn_pretrain_moco_s0="fail")
    assert run(file) == 1
    assert not [cell for cell in computed(file) if "moco" in cell and "pretrain" not in cell]
    assert "drawn.finetune.scratch.full.s0.b1.d0" in computed(file)


def test_a_pretraining_whose_encoder_is_gone_is_computed_again_where_it_is_needed(file: Path) -> None:
    assert run(file) == 0
    shutil.rmtree(file.parent / "out" / "runs")
    assert run(file) == 0
    assert len(computed(file)) == CELLS
    Store(file.parent / "out").path("drawn.baselines").unlink()
    assert run(file) == 0
    assert computed(file)[CELLS:] == ["drawn.baselines"]
    Store(file.parent / "out").path("drawn.probes.moco.s0").unlink()
    assert run(file) == 0
    assert computed(file)[CELLS + 1 :] == ["drawn.pretrain.moco.s0", "drawn.probes.moco.s0"]


def test_only_brings_what_it_needs_and_says_what_there_is(file: Path) -> None:
    assert run(file, only=("drawn.probes.moco.*",)) == 3
    assert computed(file) == ["drawn.pretrain.moco.s0", "drawn.probes.moco.s0"]
    with pytest.raises(UserError, match=r"--only nothing\*: matches none of the 14 cells"):
        run(file, only=("nothing*",))
    with pytest.raises(UserError, match="--again computes finished cells again"):
        StudyArgs(config=file, again=True)


def test_no_cell_is_begun_when_time_is_up(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(file, max_minutes=0.0) == 3
    assert computed(file) == []
    assert f"{CELLS} of {CELLS} cells are still to be computed" in capsys.readouterr().out


def test_no_cell_is_begun_that_would_not_be_done_in_time(file: Path) -> None:
    class Slow(NoProcesses):
        """One on which an image takes a second, by the trial."""

        def trial(self, size: int) -> float:
            return 1.0

    args = StudyArgs(config=file, report="none", max_minutes=0.05)
    assert study_command(args, pool=Slow) == 3
    # What pretrains goes on where it was; all others would have been for nothing.
    assert computed(file) == ["drawn.pretrain.moco.s0"]


def test_list_says_what_is_finished(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(file, only=("drawn.data",))
    capsys.readouterr()
    assert run(file, list=True) == 0
    lines = capsys.readouterr().out.splitlines()
    states = dict(line.split("\t") for line in lines if "\t" in line)
    assert len(states) == CELLS and states["drawn.data"] == "finished" and states["drawn.baselines"] == "to do"


def test_splits_that_leak_stop_the_study_unless_it_is_allowed_by_name(file: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    lines = labels.read_text().splitlines()
    # One patient on both sides, and one picture under two names.
    first = next(i for i, line in enumerate(lines) if ",test," in line)
    patient = lines[first].split(",")[1]
    lines[first] = lines[first].replace(",test,", ",train,")
    (tmp_path / "images" / "000.png").write_bytes((tmp_path / "images" / "005.png").read_bytes())
    labels.write_text("\n".join(lines) + "\n")
    said = r"(?s)drawn: the splits leak.*patient .*same pixels: 000\.png.*allow = \[\"drawn"
    with pytest.raises(UserError, match=said) as e:
        run(file)
    assert f"patient {patient}: 1 in test, 1 in train" in str(e.value)
    assert computed(file) == []
    draw_study(tmp_path, **FEW, more='[leaks]\nallow = ["drawn"]')
    assert run(file, only=("drawn.data",)) == 3
    assert computed(file) == ["drawn.data"]


@pytest.mark.system
def test_a_process_has_the_threads_of_the_study_whatever_the_runner_has(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    file.write_text(file.read_text().replace("seeds = [0]", "seeds = [0]\nthreads = 2"))
    with Pool(read_study(file), 1, "cpu", serve=serve_threads) as pool:
        assert pool.trial(32) == 2
    assert os.environ["OMP_NUM_THREADS"] == "8"


def started(file: Path) -> subprocess.Popen[str]:
    """The study in processes of its own."""
    code = (
        "import functools, sys; from pathlib import Path; from studies import serve_quickly\n"
        "from fastmoco.study.command import StudyArgs, study_command; from fastmoco.study.pool import Pool\n"
        "if __name__ == '__main__':\n"
        "    pool = functools.partial(Pool, serve=serve_quickly)\n"
        "    sys.exit(study_command(StudyArgs(config=Path(sys.argv[1]), report='none'), pool=pool))\n"
    )
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    return subprocess.Popen(
        [sys.executable, "-c", code, str(file)], env=os.environ | {"PYTHONPATH": path}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def wait_for(condition: Callable[[], bool], seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


@pytest.mark.system
def test_two_at_once_share_the_work_and_a_process_that_dies_takes_one_cell_along(file: Path) -> None:
    ways(file, drawn_pretrain_moco_s0="sleep 0.3", drawn_data="sleep 0.3", drawn_probes_random_s0="die")
    both = [started(file), started(file)]
    said = [process.communicate(timeout=300)[0] for process in both]
    # The failure that one met is not met again by the other, unless the other began after it.
    assert {process.returncode for process in both} <= {1}, said
    store = Store(file.parent / "out")
    dead = make_cells(read_study(file), prints(file))["drawn.probes.random.s0"]
    assert "its process ended with status 7" in (store.failure(dead) or "")
    others = [cell for cell in computed(file) if cell != "drawn.probes.random.s0"]
    assert len(others) == len(set(others)) == CELLS - 1


@pytest.mark.system
def test_killed_in_the_middle_it_goes_on_where_it_was(file: Path) -> None:
    ways(file, **{"drawn_similarity_random-moco_s0": "sleep 600"})
    process = started(file)
    wait_for(lambda: "drawn.similarity.random-moco.s0" in computed(file))
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    finished = {path.stem for path in (file.parent / "out" / "cells").glob("*.json")}
    before = len(computed(file))
    assert finished and "drawn.similarity.random-moco.s0" not in finished
    (ways(file) / "drawn.similarity.random-moco.s0").unlink()
    # What it was computing was killed with it: else its lock would be held still, and this would wait for it.
    assert run(file) == 0
    assert not finished & set(computed(file)[before:])
    assert "drawn.similarity.random-moco.s0" in computed(file)[before:]
