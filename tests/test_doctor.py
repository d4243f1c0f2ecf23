"""`fastmoco doctor` says what is here, and works with what is not."""

import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from fastmoco import doctor
from fastmoco.ops import dispatch
from fastmoco.precision import default_precision


def values() -> dict[str, str]:
    rows = doctor.report()
    assert len({(row.section, row.name) for row in rows}) == len(rows)
    return {row.name: row.value for row in rows}


def test_reports_what_will_run() -> None:
    found = values()
    assert found["torch"] == torch.__version__.partition("+")[0]
    assert found["training precision on cpu"] in ("bf16", "fp32")
    assert found["ema on cpu"].startswith("reference" if dispatch.native is None else "native")
    assert {"infonce on cpu", "pooled_mse on cpu", "crosscorr on cpu"} <= found.keys()


@pytest.mark.parametrize(
    ("cuda", "targets", "expected"),
    [("13.0", "sm_90 compute_90", "13.0, for sm_90 compute_90"), ("", "no nvcc on PATH", "none: no nvcc on PATH; ")],
)
def test_says_what_gpus_the_extension_is_for(
    monkeypatch: pytest.MonkeyPatch, cuda: str, targets: str, expected: str
) -> None:
    info = {"compiler": "g++", "openmp": True, "instruction_set": "fma", "cuda": cuda, "cuda_targets": targets}
    monkeypatch.setattr(dispatch, "native", SimpleNamespace(build_info=lambda: info))
    assert values()["CUDA"].startswith(expected)


def test_without_extras_it_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    found = values()
    assert found["deepspeed"] == "not installed: pip install 'fastmoco[deepspeed]'"
    assert found["nvidia-dali-cuda130"] == "not installed: pip install 'fastmoco[dali-cuda13]'"
    assert found["torch"] == "not installed"


def test_one_build_of_dali_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "nvidia-dali-cuda120":
            raise metadata.PackageNotFoundError(name)
        return "2.3"

    monkeypatch.setattr(metadata, "version", version)
    found = values()
    absent = "not installed (nvidia-dali-cuda130 is enough): pip install 'fastmoco[dali-cuda12]'"
    assert (found["nvidia-dali-cuda130"], found["nvidia-dali-cuda120"]) == ("2.3", absent)


def test_without_the_extension_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = "the C++ extension was not built: no compiler"
    monkeypatch.setattr(dispatch, "native", None)
    monkeypatch.setattr(dispatch, "NATIVE_MISSING", missing)
    monkeypatch.setitem(dispatch._registry["ema"], "native", dispatch.Implementation(lambda: None, ("cpu",), missing))
    found = values()
    assert found["fastmoco._C"] == missing
    assert found["ema on cpu"].startswith(f"reference; not native: {missing}; ")
    refusal = dispatch.TRITON_MISSING or "it runs on cuda tensors, not on cpu"
    assert found["ema on cpu"].endswith(f"not triton: {refusal}")


def test_prints_every_row_and_returns_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    assert all(row.name in printed for row in doctor.report())
    # rich would swallow [dali-cuda12] as a style.
    here = {dist.metadata["Name"] for dist in metadata.distributions()}
    lacking = [extra for name, extra in doctor.PACKAGES if extra and name not in here]
    assert all(f"fastmoco[{extra}]" in printed.replace("\n", "") for extra in lacking)


def test_unknown_option_exits_with_2() -> None:
    with pytest.raises(SystemExit) as stop:
        doctor.main(["--fix"])
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx512_f": True}, "fp32")],
)
def test_precision_follows_the_processor(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert default_precision("cpu") == expected


def test_precision_on_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for supported, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, s=supported: s)
        assert default_precision("cuda") == expected
    assert default_precision("meta") == "fp32"


def test_an_extension_of_older_sources_goes_unused() -> None:
    """Rather than to fail in the middle of a step at what it lacks."""
    program = (
        "import sys, types; sys.modules['fastmoco._C'] = types.ModuleType('fastmoco._C');"
        "from fastmoco.ops import dispatch, ema; import torch;"
        "print(dispatch.native, dispatch.NATIVE_MISSING, dispatch.pick('ema', torch.zeros(1)).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "None the C++ extension was built from older sources: install fastmoco again reference\n"
