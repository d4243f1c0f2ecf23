"""What an installation contains. The tests that build one, marked `system`, need the package index."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fastmoco
from fastmoco.ops import dispatch

ROOT = Path(__file__).resolve().parents[1]
VERSION = fastmoco.__version__
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def sources() -> set[str]:
    """Every Python file of the package, by its path when installed."""
    own = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastmoco").rglob("*.py")}
    mapped = (ROOT / "kernels").rglob("*.py")
    return own | {f"fastmoco/{path.relative_to(ROOT).as_posix()}" for path in mapped}


def installed(names: list[str]) -> set[str]:
    return {name for name in names if name.startswith("fastmoco/") and name.endswith(".py")}


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Runs `command` and returns all it printed; fails the test with that when the command fails."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=os.environ | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_every_package_is_listed() -> None:
    packages = {str(Path(name).parent).replace("/", ".") for name in sources()}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages
    assert {f"{package.replace('.', '/')}/__init__.py" for package in packages} <= sources()


def test_kernels_import_only_under_their_installed_name() -> None:
    done = subprocess.run([sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "import this package as fastmoco.kernels" in done.stderr


def test_every_requirement_is_pinned_within_its_bounds() -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert "://" not in text
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert len(pins) == len(lines)
    project = PROJECT["project"]
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    build = PROJECT["build-system"]["requires"]
    for requirement in map(Requirement, [*project["dependencies"], *extras, *build]):
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} has no pin"
        assert version in requirement.specifier, f"{requirement} excludes its own pin {version}"


def test_installed_version_is_the_one_in_the_sources() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", VERSION)
    try:
        version = metadata.version("fastmoco")
    except metadata.PackageNotFoundError:
        pytest.skip("fastmoco is not installed here (make install)")
    assert version == VERSION


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: the extension is not built")
def test_extension_is_built_where_there_is_a_compiler() -> None:
    if not any(dist.metadata["Name"] == "fastmoco" for dist in metadata.distributions()):
        pytest.skip("fastmoco is not installed here (make install)")
    assert dispatch.native is not None, dispatch.NATIVE_MISSING
    assert set(dispatch.native.build_info()) == {"compiler", "openmp", "instruction_set"}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources as a clone has them."""
    copy = tmp_path / "fastmoco"
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.so", "*.egg-info", "build", "dist", "runs")
    shutil.copytree(ROOT, copy, ignore=left_out)
    return copy


def build_wheel(source: Path, out: Path, env: dict[str, str] | None = None) -> tuple[Path, str]:
    pip = (sys.executable, "-m", "pip", "wheel", "-v", "--no-deps")
    said = run(*pip, "-w", out, source, cwd=out.parent, env=env)
    (wheel,) = out.glob("*.whl")
    return wheel, said


def unpack(wheel: Path, folder: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
        return archive.namelist()


def run_with(site: Path, code: str) -> str:
    """Runs `code` with the unpacked wheel in `site` and what it depends on.

    Without site hooks (-S): that of an editable installation would supply the modules the wheel lacks.
    """
    path = os.pathsep.join([str(site), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    return run(sys.executable, "-S", "-c", code, cwd=site.parent, env={"PYTHONPATH": path})


@pytest.mark.system
def test_wheel_of_the_tree_and_of_the_sdist(tree: Path, tmp_path: Path) -> None:
    wheel, _ = build_wheel(tree, tmp_path / "of_tree")
    names = unpack(wheel, tmp_path / "site")
    assert installed(names) == sources()
    assert {name.split("/")[0] for name in names} == {"fastmoco", f"fastmoco-{VERSION}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert [name for name in names if name.endswith((".so", ".h", ".cpp"))] == [
        name for name in names if re.fullmatch(r"fastmoco/_C\..*\.so", name)
    ]
    imports = "import fastmoco.kernels; from fastmoco.ops import dispatch; print(dispatch.native)"
    said = run_with(tmp_path / "site", imports)
    if shutil.which("g++"):
        assert str(tmp_path / "site") in said

    backend = "from setuptools.build_meta import build_sdist; print(build_sdist('sdist'))"
    run(sys.executable, "-m", "venv", tmp_path / "tools", cwd=tmp_path)
    python = tmp_path / "tools" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", *PROJECT["build-system"]["requires"], cwd=tree)
    run(python, "-c", backend, cwd=tree)
    (sdist,) = (tree / "sdist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"csrc/ema.h", "csrc/platform.h", "kernels/__init__.py", "constraints.txt", "Makefile"} <= inside
    again, _ = build_wheel(sdist, tmp_path / "of_sdist")
    assert sorted(unpack(again, tmp_path / "site_of_sdist")) == sorted(names)


@pytest.mark.system
def test_editable_install_maps_kernels(tree: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "--system-site-packages", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--no-deps", "-e", tree, cwd=tmp_path)
    code = "import fastmoco.kernels as k, fastmoco as f; print(k.__file__, f.__file__)"
    # Not from tmp_path: the clone's own folder there, named fastmoco too, would pass for a namespace package.
    said = run(python, "-c", code, cwd=tmp_path / "env")
    assert said.split() == [str(tree / "kernels" / "__init__.py"), str(tree / "fastmoco" / "__init__.py")]


@pytest.mark.system
def test_without_a_compiler_it_installs_and_says_what_is_missing(tree: Path, tmp_path: Path) -> None:
    stale, _ = build_wheel(tree, tmp_path / "before")
    # What that build left in the tree must not be shipped with sources changed since.
    (tree / "csrc" / "ema.cpp").touch()
    nowhere = {"CC": "/nowhere/gcc", "CXX": "/nowhere/g++"}
    wheel, said = build_wheel(tree, tmp_path / "out", env=nowhere)
    assert stale.name == wheel.name
    assert "fastmoco._C was NOT built" in said and "install a C++17 compiler" in said
    names = unpack(wheel, tmp_path / "site")
    assert installed(names) == sources()
    assert not any(name.endswith(".so") for name in names)

    update = (
        "import torch; from fastmoco import doctor; from fastmoco.ops.ema import ema_update_\n"
        "k = torch.zeros(3); ema_update_([k], [torch.ones(3)], 0.5); print(k.tolist()); doctor.main()\n"
    )
    said = run_with(tmp_path / "site", update)
    assert said.startswith("[0.5, 0.5, 0.5]")
    assert "was not built" in said and re.search(r"ema on cpu +reference", said)
