"""The operations' benchmarks: parity before speed, whole rows, and floors that follow from the formulas."""

import functools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models import resnet50

from bench import crosscorr, ema, harness, infonce, pooled_mse, roofline, shares
from bench.harness import Benchmark, Outputs, Run, relative_error
from bench.memory import peak_memory
from bench.shapes import resnet50_shapes
from bench.timing import interleaved, quantiles
from fastmoco.losses import InfoNCE
from fastmoco.ops import dispatch

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    infonce: {"BENCH": [infonce.case(5, 96, 16, "float32"), infonce.case(5, 96, 16, "bfloat16")]},
    crosscorr: {"BENCH": [crosscorr.case(2, 6, 24, 0.005), crosscorr.case(1, 24, 6, 1.0)]},
    pooled_mse: {"BENCH": [pooled_mse.case(2, 8, 7, 4), pooled_mse.case(2, 8, 8, 16, "float32")]},
    ema: {"EMA": [ema.case(tensors=6)], "STEP": [ema.case(tensors=6)]},
}
MEASURE = functools.cache(roofline.measure)
FIELDS = {
    *("op", "implementation", "dtype", "pass", "p20_ms", "p50_ms", "p80_ms", "graph_p50_ms", "rounds", "ratio"),
    *("peak_bytes", "resident_bytes", "memory_method", "error", "tolerance", "failure"),
    *("floor_ms", "bound", "share_percent", "gemm_float32_gflops", "gemm_bfloat16_gflops", "copy_gb_s"),
    "exponentials_g_s",
    *("device", "processor", "threads", "load_1min", "python", "torch", "fastmoco", "time"),
}


@pytest.fixture(autouse=True)
def measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's rates, which take a second to measure, are measured once for all tests."""
    monkeypatch.setattr(harness, "measure", MEASURE)


@pytest.fixture(autouse=True)
def not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests let Triton's interpreter stand in for a GPU; a benchmark times no implementation run in it."""
    monkeypatch.setattr(dispatch, "_triton_interprets", lambda: False)


@pytest.fixture(params=SMALL, ids=lambda module: module.__name__)
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Each benchmark with a few small cases, and its providers its own to change."""
    for name, cases in SMALL[request.param].items():
        bench = getattr(request.param, name)
        monkeypatch.setattr(bench, "quick", cases)
        monkeypatch.setattr(bench, "providers", dict(bench.providers))
    return request.param


def benchmarks(module: ModuleType) -> list[Benchmark]:
    return [getattr(module, name) for name in SMALL[module]]


def run(module: ModuleType, out: Path) -> tuple[int, list[dict]]:
    status = module.main(["--quick", "--device", "cpu", "--seconds", "0.01", "--out", str(out)])
    return status, json.loads(out.with_suffix(".json").read_text())


def test_every_row_is_whole(module: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, rows = run(module, tmp_path / "rows.md")
    shown = capsys.readouterr().out
    assert status == 0
    for bench in benchmarks(module):
        for case in bench.quick:
            own = [row for row in rows if row["op"] == bench.op and row.items() >= case.sizes.items()]
            own = [row for row in own if row["dtype"] == case.dtype]
            names = {row["implementation"] for row in own}
            assert len(names) == len(own) and bench.baseline in names
            assert all(f"  {name}: left out" in shown for name in bench.providers if name not in names)
    for row in rows:
        assert row.keys() >= FIELDS
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["rounds"] >= 3
        assert row["floor_ms"] > 0 and row["bound"] in ("memory", "arithmetic") and row["ratio"] > 0
        assert row["share_percent"] == pytest.approx(100 * row["floor_ms"] / row["p50_ms"])
        assert row["peak_bytes"] >= 0 and row["failure"] is None
        assert row["error"] is None or row["error"] <= row["tolerance"]
    assert all(row["ratio"] == 1 for row in rows if row["implementation"].startswith("paper"))
    text = (tmp_path / "rows.md").read_text()
    assert all(row["implementation"] in text for row in rows)
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
    assert shown.index("off by") < shown.index("p50_ms"), "parity comes before speed"


def test_the_sizes_of_the_page_can_be_run_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (case,) = SMALL[pooled_mse]["BENCH"][:1]
    for bench in (infonce.BENCH, crosscorr.BENCH, pooled_mse.BENCH, ema.EMA, ema.STEP):
        assert bench.headline and all(shown in bench.cases for shown in bench.headline)
    monkeypatch.setattr(pooled_mse.BENCH, "headline", [case])
    options = ["--headline", "--device", "cpu", "--seconds", "0.01", "--out", str(tmp_path / "rows.md")]
    assert pooled_mse.main(options) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["N"] for row in rows} == {case.sizes["N"]} and {row["dtype"] for row in rows} == {case.dtype}

    monkeypatch.setattr(shares, "measure", MEASURE)
    assert shares.report([pooled_mse.BENCH], seconds=0.01) == 0
    *_, rates, headings, line = capsys.readouterr().out.splitlines()
    assert rates.startswith("measured on ") and "GFLOP/s bfloat16" in rates and "share %" in headings
    took, floor, share, bound = line.split()[-4:]
    assert float(share) == pytest.approx(100 * float(floor) / float(took), rel=0.02) and bound == "memory"
    wrong = {name: harness.Provider(lambda x: lambda: {}) for name in pooled_mse.BENCH.providers}
    assert shares.report([replace(pooled_mse.BENCH, providers=wrong)], seconds=0.01) == 1


@pytest.mark.system
def test_a_wrong_provider_gets_no_speed(module: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An output off by a fiftieth, outputs missing, an exception: all are refused, and the others still timed."""
    bench = benchmarks(module)[0]
    right = bench.providers[bench.baseline].build

    def off(outputs: Outputs) -> dict[str, object]:
        *rest, (name, value) = outputs.items()
        return dict(rest) | {name: value * 1.02 if isinstance(value, Tensor) else [part * 1.02 for part in value]}

    @bench.provider("off by a fiftieth")
    def _(inputs: object) -> Run:
        run = right(inputs)
        return lambda: off(run())

    @bench.provider("without results")
    def _(inputs: object) -> Run:
        return lambda: {}

    @bench.provider("that fails")
    def _(inputs: object) -> Run:
        raise RuntimeError("no such kernel")

    status, rows = run(module, tmp_path / "rows.md")
    assert status == 1
    wrong = [row for row in rows if row["implementation"] in ("off by a fiftieth", "without results", "that fails")]
    assert len(wrong) == 3 * len(bench.quick)
    for row in wrong:
        assert row["failure"] and row["p50_ms"] is None and row["ratio"] is None and row["peak_bytes"] is None
    assert all(row["p50_ms"] > 0 for row in rows if row not in wrong)
    captured = capsys.readouterr()
    assert "PARITY FAILS" in captured.out and "no such kernel" in captured.err
    assert not [line for line in captured.out.splitlines() if line.startswith("  off by a fiftieth") and "e+" in line]
    assert f"FAILED {bench.op} off by a fiftieth" in captured.err


def test_what_is_not_installed_is_left_out_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("lightly.loss", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(infonce.BENCH, "quick", SMALL[infonce]["BENCH"][:1])
    status, rows = run(infonce, tmp_path / "rows.md")
    shown = capsys.readouterr().out
    assert status == 0 and not any("lightly" in row["implementation"] for row in rows)
    assert "lightly NTXentLoss: left out, lightly is not installed" in shown
    assert "no plot: matplotlib is not installed" in shown and not (tmp_path / "rows.png").exists()


def test_the_form_timed_is_the_one_that_training_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the options of the loss module, given what it is given: unit vectors."""
    asked = []

    def note(query: Tensor, key: Tensor, bank: Tensor, skip: Tensor | None, options: Any) -> Any:
        asked.append((options, query.norm(dim=1), key.norm(dim=1)))
        return reference(query, key, bank, skip, options)

    reference = dispatch.pick("infonce", torch.empty(()), "reference")
    monkeypatch.setattr(dispatch, "pick", lambda *_: note)
    x = infonce.BENCH.prepare(infonce.case(5, 96, 16, "float32"), "cpu")
    infonce.ours(x, "native")()
    query, key = (torch.nn.functional.normalize(side, dim=1) for side in (x.query, x.key))
    InfoNCE(infonce.TEMPERATURE)(query, key, x.bank)
    (ours, *norms), (training, *_) = asked
    assert ours == training
    torch.testing.assert_close(torch.cat(norms), torch.ones(10))


def test_a_device_that_is_absent_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        assert infonce.BENCH.prepare(infonce.case(2, 3, 4, "float32"), "cuda").query.is_cuda
        return
    with pytest.raises(SystemExit) as stop:
        infonce.main(["--device", "cuda"])
    assert stop.value.code == 2 and "sees no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_infinitely_wrong(value: float) -> None:
    assert relative_error({"x": torch.tensor([1.0, value])}, {"x": torch.ones(2)}) == math.inf
    assert relative_error({"x": [torch.tensor(value)]}, {"x": [torch.tensor(0.0)]}) == math.inf


def test_the_error_is_over_all_tensors_of_an_output() -> None:
    expected = {"x": [torch.tensor([3.0]), torch.tensor([4.0])]}
    assert relative_error({"x": [torch.tensor([3.0]), torch.tensor([4.5])]}, expected) == pytest.approx(0.1)
    assert relative_error({"x": [torch.tensor([3.0])]}, expected) == math.inf


def test_memory_counts_what_lives_at_once_inside_and_outside_torch() -> None:
    def torch_run() -> Tensor:
        first = torch.zeros(1 << 20)  # 4 MiB, and another 4 beside it before the sum
        return first.exp().sum()

    memory = peak_memory(torch_run, "cpu")
    assert 8 << 20 <= memory["peak_bytes"] < 9 << 20
    assert memory["resident_bytes"] is None or memory["resident_bytes"] > 7 << 20
    outside = peak_memory(lambda: bytearray(16 << 20).count(1), "cpu")
    assert outside["peak_bytes"] == 0
    assert outside["resident_bytes"] is None or outside["resident_bytes"] > 15 << 20


def test_rounds_take_turns() -> None:
    order: list[str] = []
    seconds = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=1)
    assert order == ["a", "b"] * 4 and {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    assert quantiles([0.001, 0.002, 0.003])["p50_ms"] == pytest.approx(2.0)


def test_every_round_that_is_counted_is_run_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only the runs move: 4 rounds of 2 and 3 seconds fit into 20, the first among them."""
    now, called = [0.0], {"a": 0, "b": 0}

    def takes(name: str, seconds: float) -> Run:
        def run() -> Outputs:
            called[name] += 1
            now[0] += seconds
            return {}

        return run

    monkeypatch.setattr("bench.timing.time.perf_counter", lambda: now[0])
    for seconds, rounds in ((20.0, 4), (1.0, 3), (1e6, 200)):
        called.update(a=0, b=0)
        timings = harness.time_runs({"a": takes("a", 2.0), "b": takes("b", 3.0)}, "cpu", seconds)
        assert called == {"a": rounds, "b": rounds} == {name: row["rounds"] for name, row in timings.items()}
        assert [row["p50_ms"] for row in timings.values()] == [2000.0, 3000.0]


def test_the_shapes_are_resnet50s() -> None:
    assert [tuple(p.shape) for p in resnet50(num_classes=128).parameters()] == resnet50_shapes(128)


def test_the_floor_is_the_slower_of_bytes_and_arithmetic() -> None:
    machine = roofline.Machine(bytes=10.0, flops={"float32": 100.0}, exponentials=50.0, launch=0.0, overlaps=False)
    work = roofline.Work(bytes=20, flops=100, exponentials=100)
    assert machine.floor(work) == (3.0, "arithmetic")
    assert machine.floor(roofline.Work(bytes=40, flops=100, exponentials=100)) == (4.0, "memory")
    assert roofline.replace(machine, overlaps=True).floor(work) == (2.0, "memory")
    # Numbers that are multiplied slowly as they are can be widened.
    for slow in (20.0, 400.0):
        both = roofline.replace(machine, flops={"float32": 100.0, "bfloat16": slow})
        seconds = roofline.Work(bytes=0.0, flops=800.0, dtype="bfloat16")
        assert both.floor(seconds)[0] == 800.0 / max(slow, 100.0)


def test_the_document_has_the_table_that_the_formulas_give(capsys: pytest.CaptureFixture[str]) -> None:
    assert roofline.main(["--predicted"]) == 0
    table = capsys.readouterr().out.strip()
    assert table in (ROOT / "docs/kernels.md").read_text(), "python -m bench.roofline --write docs/kernels.md"


def test_the_methods_own_estimates() -> None:
    """What was reckoned by hand: the queue's bytes, the Gram form's gain, and 12 and 28 bytes a parameter."""
    infonce_work = roofline.infonce(256, 65536, 128, "bfloat16")
    assert infonce_work.flops == pytest.approx(8.6e9, rel=0.01) and infonce_work.bytes == pytest.approx(
        16.8e6, rel=0.05
    )
    assert roofline.H100.floor(infonce_work)[0] == pytest.approx(8.7e-6, rel=0.01)
    assert roofline.infonce_eager(256, 65536, 128, "float32").bytes == pytest.approx(1.0e9, rel=0.02)
    for n, gain in ((32, 48), (256, 6)):
        ours, eager = (form(1, n, 2048, "float32").flops for form in (roofline.crosscorr, roofline.crosscorr_eager))
        assert eager / ours == pytest.approx(gain, rel=0.01)
    numbers = sum(math.prod(shape) for shape in resnet50_shapes(128))
    assert roofline.H100.floor(roofline.ema(numbers, 1))[0] == pytest.approx(85e-6, rel=0.01)
    assert roofline.sgd_ema(numbers, 1).bytes / roofline.sgd_ema_library(numbers, 1).bytes == pytest.approx(28 / 32)
