"""What an installation contains. The tests that build one, marked `system`, need the package index."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
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
    assert set(dispatch.native.build_info()) == {
        "compiler", "openmp", "instruction_set", "cuda", "cuda_targets",
    }  # fmt: skip


def cuobjdump() -> str:
    """CUDA's or Triton's own; the test is skipped where there is neither."""
    beside_nvcc = Path(os.path.realpath(shutil.which("nvcc") or "nvcc")).with_name("cuobjdump")
    spec = importlib.util.find_spec("triton")
    triton = Path(spec.origin or "").parent / "backends" / "nvidia" / "bin" / "cuobjdump" if spec else None
    for found in (shutil.which("cuobjdump"), beside_nvcc, triton):
        if found and Path(found).is_file():
            return str(found)
    pytest.skip("no cuobjdump")


@pytest.fixture
def cuda_targets() -> list[str]:
    """What the extension's CUDA part is compiled for; the test is skipped where there is none."""
    if dispatch.native is None:
        pytest.skip(dispatch.NATIVE_MISSING)
    info = dispatch.native.build_info()
    if not info["cuda"]:
        pytest.skip(f"built without CUDA: {info['cuda_targets']}")
    if tuple(map(int, info["cuda"].split("."))) >= (12, 8):
        assert info["cuda_targets"] == "sm_80 sm_90 sm_100 compute_100"
    return str(info["cuda_targets"]).split()


def test_extension_holds_code_for_the_gpus_it_names(cuda_targets: list[str]) -> None:
    *machine, newest = cuda_targets
    assert dispatch.native is not None and dispatch.native.__file__
    for kind, expected in (("elf", set(machine)), ("ptx", {newest.replace("compute", "sm")})):
        said = run(cuobjdump(), f"--list-{kind}", dispatch.native.__file__, cwd=ROOT)
        assert set(re.findall(r"\bsm_\d+", said)) == expected


def test_no_kernel_spills(cuda_targets: list[str]) -> None:
    assert dispatch.native is not None and dispatch.native.__file__
    said = run(cuobjdump(), "--dump-resource-usage", dispatch.native.__file__, cwd=ROOT)
    used = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said)
    # Each of ema and sgd_ema in float32 and float64 and the eight steps of views, for each kind of GPU.
    assert len(used) >= (4 + 8) * (len(cuda_targets) - 1)
    for name, registers, stack, local in used:
        # With 40 registers a thread six blocks of 256 run on a multiprocessor at once, more than memory needs. What
        # is done once for a row of pixels may take more.
        assert int(registers) <= (64 if "Weigh" in name else 40) and stack == local == "0", name


NO_COMPILER = {"CC": "/nowhere/gcc", "CXX": "/nowhere/g++"}


def cloned(folder: Path) -> Path:
    """A copy of the sources as a clone has them."""
    copy = folder / "fastmoco"
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.so", "*.egg-info", "build", "dist", "runs")
    shutil.copytree(ROOT, copy, ignore=left_out)
    return copy


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return cloned(tmp_path)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A clone that a wheel was built in, which takes two minutes, and the wheel."""
    folder = tmp_path_factory.mktemp("built")
    clone = cloned(folder)
    wheel, _ = build_wheel(clone, folder / "wheel")
    return clone, wheel


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
def test_wheel_of_the_tree_and_of_the_sdist(built: tuple[Path, Path], tree: Path, tmp_path: Path) -> None:
    _, wheel = built
    names = unpack(wheel, tmp_path / "site")
    assert installed(names) == sources()
    assert {name.split("/")[0] for name in names} == {"fastmoco", f"fastmoco-{VERSION}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    scripts = {f"fastmoco/slurm/templates/{path.name}" for path in (ROOT / "slurm").iterdir()}
    assert scripts and {name for name in names if "/templates/" in name} == scripts
    assert [name for name in names if name.endswith((".so", ".h", ".cpp", ".cu", ".cuh"))] == [
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
    csrc = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    assert csrc >= {"csrc/ema.h", "csrc/ema.cpp", "csrc/ema.cu", "csrc/multi_tensor.cuh"}
    assert csrc | {"kernels/__init__.py", "constraints.txt", "Makefile"} <= inside
    # Its CUDA sources are those that the first wheel was built from; compiling them again tells nothing more.
    again, _ = build_wheel(sdist, tmp_path / "of_sdist", env={"FASTMOCO_CUDA": "0"})
    assert sorted(unpack(again, tmp_path / "site_of_sdist")) == sorted(names)


class TestBuild:
    """setup.py build_ext in a copy of the sources; compilers stood in for by scripts that write what they are told."""

    def build(self, tree: Path, folder: Path, nvcc: str | None, **env: str) -> subprocess.CompletedProcess[str]:
        """`nvcc` is what its stand-in answers to a compilation, a shell command; None leaves it out."""
        tools = folder / "bin"
        tools.mkdir(parents=True, exist_ok=True)
        toolkit = folder / "toolkit"
        (toolkit / "lib64").mkdir(parents=True, exist_ok=True)
        (toolkit / "lib64" / "libcudart_static.a").write_bytes(b"!<arch>\n")
        # An object for the compiler, the file's name for the linker; the extension is not loaded.
        write = 'while [ $# -gt 1 ]; do [ "$1" = -o ] && out=$2; shift; done; echo made > "$out"'
        for name in ("gcc", "g++"):
            (tools / name).write_text(f'#!/bin/sh\n[ "$*" = --version ] && echo "$GCC" && exit\n{write}\n')
        if nvcc is not None:
            answers = (
                f'case "$*" in *-dryrun*) echo "#$ TOP={toolkit}";; *--version*) echo "release 13.0, V13.0.$NVCC";;\n'
                f'*--list-gpu-arch*) echo "compute_80 compute_90 compute_100 compute_121";;\n*) {nvcc};; esac'
            )
            (tools / "nvcc").write_text(f'#!/bin/sh\nset -- "$@"\n{answers}\n'.replace("WRITE", write))
        for tool in tools.iterdir():
            tool.chmod(0o755)
        env = {"PATH": f"{tools}:/usr/bin:/bin", "CC": str(tools / "gcc"), "CXX": str(tools / "g++"), **env}
        without = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH")}
        return subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            cwd=tree, env=without | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def test_with_nvcc_it_says_for_which_gpus(self, tree: Path, tmp_path: Path) -> None:
        done = self.build(tree, tmp_path, "WRITE")
        assert done.returncode == 0, done.stdout
        assert "with CUDA 13.0 for sm_80 sm_90 sm_100 compute_100" in done.stdout
        assert "-lcudart_static" in done.stdout and "ema.cu.o" in done.stdout
        assert "csrc/cuda_absent.cpp" not in done.stdout

    @pytest.mark.parametrize(
        ("nvcc", "asked", "reason"),
        [
            (None, "", "no nvcc on PATH"),
            ("WRITE", "0", "left out, with FASTMOCO_CUDA=0"),
            ("echo 'error: no'; exit 2", "", "nvcc failed on csrc/ema.cu: error: no"),
        ],
    )
    def test_without_cuda_it_says_why(
        self, tree: Path, tmp_path: Path, nvcc: str | None, asked: str, reason: str
    ) -> None:
        for extra in (tree / "csrc").glob("*.cu"):
            if extra.name != "ema.cu":
                extra.unlink()
        done = self.build(tree, tmp_path, nvcc, FASTMOCO_CUDA=asked)
        assert done.returncode == 0, done.stdout
        assert "WITHOUT CUDA: " in done.stdout and reason in done.stdout
        assert list((tree / "fastmoco").glob("_C.*.so"))
        assert "-lcudart_static" not in done.stdout and "csrc/cuda_absent.cpp.o" in done.stdout

    @pytest.mark.parametrize("nvcc", [None, "echo 'error: no'; exit 2"])
    def test_asked_for_cuda_it_fails_without(self, tree: Path, tmp_path: Path, nvcc: str | None) -> None:
        # What an earlier build left must not pass for what was asked for.
        assert self.build(tree, tmp_path, None).returncode == 0 and list((tree / "fastmoco").glob("_C.*.so"))
        done = self.build(tree, tmp_path, nvcc, FASTMOCO_CUDA="1")
        assert done.returncode != 0 and "FASTMOCO_CUDA=1, but fastmoco._C was not built: there is no" in done.stdout
        assert not list((tree / "fastmoco").glob("_C.*.so"))

    def test_another_word_is_refused(self, tree: Path, tmp_path: Path) -> None:
        done = self.build(tree, tmp_path, None, FASTMOCO_CUDA="yes")
        assert done.returncode != 0 and "FASTMOCO_CUDA must be 1, 0 or unset, not 'yes'" in done.stdout

    def test_only_what_changed_is_compiled_again(self, tree: Path, tmp_path: Path) -> None:
        def compiled(said: str) -> set[str]:
            return set(re.findall(r"-c (csrc/\S+)", said))

        first = compiled(self.build(tree, tmp_path, "WRITE").stdout)
        assert {"csrc/ema.cpp", "csrc/ema.cu", "csrc/bindings.cpp"} <= first
        assert compiled(self.build(tree, tmp_path, "WRITE").stdout) == set()
        later = time.time() + 5
        os.utime(tree / "csrc" / "ema.cu", (later, later))
        assert compiled(self.build(tree, tmp_path, "WRITE").stdout) == {"csrc/ema.cu"}
        os.utime(tree / "csrc" / "ema.h", (later, later))
        assert compiled(self.build(tree, tmp_path, "WRITE").stdout) == first
        # Another toolkit, compiler or option, the files being what they were.
        os.utime(tree / "csrc" / "ema.cu", (later - 60, later - 60))
        os.utime(tree / "csrc" / "ema.h", (later - 60, later - 60))
        for made in (tree / "build").rglob("*.o"):
            os.utime(made, (later, later))
        cuda = {name for name in first if name.endswith(".cu")}
        versions = {"NVCC": "2"}
        assert compiled(self.build(tree, tmp_path, "WRITE", **versions).stdout) == cuda
        versions["GCC"] = "14.2"
        assert compiled(self.build(tree, tmp_path, "WRITE", **versions).stdout) == first - cuda
        versions |= {name: f"{tmp_path}/bin/{tool} -DNEW" for name, tool in (("CC", "gcc"), ("CXX", "g++"))}
        assert compiled(self.build(tree, tmp_path, "WRITE", **versions).stdout) == first - cuda
        assert compiled(self.build(tree, tmp_path, "WRITE", **versions).stdout) == set()


@pytest.mark.system
def test_editable_install_maps_kernels(tree: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "--system-site-packages", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    # `make install` compiles in this way; here it would take two minutes more.
    run(python, "-m", "pip", "install", "-q", "--no-deps", "-e", tree, cwd=tmp_path, env=NO_COMPILER)
    code = "import fastmoco.kernels as k, fastmoco as f; print(k.__file__, f.__file__)"
    # Not from tmp_path: the clone's own folder there, named fastmoco too, would pass for a namespace package.
    said = run(python, "-c", code, cwd=tmp_path / "env")
    assert said.split() == [str(tree / "kernels" / "__init__.py"), str(tree / "fastmoco" / "__init__.py")]


@pytest.mark.system
def test_without_a_compiler_it_installs_and_says_what_is_missing(built: tuple[Path, Path], tmp_path: Path) -> None:
    before, stale = built
    tree = shutil.copytree(before, tmp_path / "fastmoco")
    # What that build left in the tree must not be shipped with sources changed since.
    assert list(tree.glob("build/temp*/csrc/*.o"))
    (tree / "csrc" / "ema.cpp").touch()
    wheel, said = build_wheel(tree, tmp_path / "out", env=NO_COMPILER)
    assert stale.name == wheel.name
    assert "fastmoco._C was NOT built" in said and "install a C++17 compiler" in said
    # Where CUDA was asked for, an installation without it must not pass for one with it.
    pip = (sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", tmp_path / "asked", tree)
    asked = subprocess.run(
        [str(word) for word in pip],
        env=os.environ | NO_COMPILER | {"FASTMOCO_CUDA": "1"},
        capture_output=True,
        text=True,
    )
    assert asked.returncode != 0 and "FASTMOCO_CUDA=1, but" in asked.stdout + asked.stderr
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
