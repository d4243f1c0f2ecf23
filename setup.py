"""Builds the C++ extension fastmoco._C. Everything else about the package stands in pyproject.toml.

The extension is optional: where it does not compile the installation still succeeds and says what is missing
(pip shows what a build says only with `-v`; `fastmoco doctor` says it afterwards). So is its CUDA part, which is
compiled where nvcc is found. The environment variable FASTMOCO_CUDA decides otherwise: with 1 the build fails unless
the CUDA part is in it, with 0 that part is left out.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from glob import glob
from itertools import takewhile
from pathlib import Path

import pybind11
from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import Extension, setup
from setuptools.errors import BaseError, CCompilerError, CompileError

LEFT_OUT = """
fastmoco: {name} was NOT built: {error}
fastmoco: the installation goes on without it; every operation runs its PyTorch implementation instead.
fastmoco: to have it, install a C++17 compiler and the Python headers (Debian: apt install g++ python3-dev)
fastmoco: and install fastmoco again. `fastmoco doctor` shows what runs.
"""

FAILURES = (BaseError, CCompilerError, CompileError)

# A100, H100 and B200; PTX of the newest runs on what comes after.
ARCHITECTURES = (80, 90, 100)
CUDA_ABSENT = "csrc/cuda_absent.cpp"


class CudaError(Exception):
    """Why there is no CUDA part; the message is one line."""


class OptionalBuildExt(build_ext):
    """Compiles what has changed, on all cores, with OpenMP and CUDA where they are found; without the extension where
    it does not compile."""

    def run(self) -> None:
        """Builds; a copy beside the sources is made afterwards, where it is asked for: `inplace` is off until then."""
        self.beside_sources = bool(self.inplace or self.editable_mode)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Builds `ext`, or says why it is left out and what runs instead."""
        asked = os.environ.get("FASTMOCO_CUDA", "")
        if asked not in ("", "0", "1"):
            sys.exit(f"fastmoco: FASTMOCO_CUDA must be 1, 0 or unset, not {asked!r}")
        try:
            if self._compiles_openmp():
                ext.extra_compile_args.append("-fopenmp")
                ext.extra_link_args.append("-fopenmp")
            self._compile(ext, asked)
            # Linked anew each time: which objects belong depends on FASTMOCO_CUDA too.
            self.force = True
            super().build_extension(ext)
        except FAILURES as error:
            # What an earlier build left would otherwise be installed in place of what did not compile now.
            built = Path(self.get_ext_fullpath(ext.name))
            built.unlink(missing_ok=True)
            if self.beside_sources:
                Path("fastmoco", built.name).unlink(missing_ok=True)
            if asked == "1":
                sys.exit(f"fastmoco: FASTMOCO_CUDA=1, but {ext.name} was not built: {error}")
            print(LEFT_OUT.format(name=ext.name, error=error), file=sys.stderr)

    def _compile(self, ext: Extension, asked: str) -> None:
        """Turns the sources of `ext` into objects; only those older than their source, a header or this file, or made
        by another compiler or with other options, of which each object has a note beside it."""
        Path(self.build_temp, "csrc").mkdir(parents=True, exist_ok=True)
        newest_header = max(Path(path).stat().st_mtime for path in [*ext.depends, __file__])
        cpp = Cpp(self, ext)

        def compiled(source: str, compiler: Cpp | Cuda) -> str:
            made, note = Path(self.build_temp, source + ".o"), Path(self.build_temp, source + ".txt")
            noted = note.read_text() if note.exists() and made.exists() else ""
            newest = max(newest_header, Path(source).stat().st_mtime)
            if noted != compiler.identity or made.stat().st_mtime <= newest:
                note.unlink(missing_ok=True)
                compiler.compile(source, str(made))
                note.write_text(compiler.identity)
            return str(made)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [pool.submit(compiled, source, cpp) for source in ext.sources]
            try:
                if asked == "0":
                    raise CudaError("it was left out, with FASTMOCO_CUDA=0")
                toolkit = Cuda()
                cuda = [pool.submit(compiled, source, toolkit) for source in sorted(glob("csrc/*.cu"))]
                ext.extra_objects = [job.result() for job in cuda]
                ext.extra_link_args += toolkit.link_args
                print(f"fastmoco: {ext.name} with CUDA {toolkit.version} for {toolkit.targets}")
            except CudaError as reason:
                if asked == "1":
                    raise CompileError(f"there is no CUDA part: {reason}") from reason
                print(f"fastmoco: {ext.name} WITHOUT CUDA: {reason}", file=sys.stderr)
                # Always compiled: the reason is part of it.
                made = str(Path(self.build_temp, CUDA_ABSENT + ".o"))
                cpp.compile(CUDA_ABSENT, made, ("FASTMOCO_CUDA_ABSENT", quoted(str(reason))))
                ext.extra_objects = [made]
            ext.extra_objects += [job.result() for job in objects]
        ext.sources = []

    def _compiles_openmp(self) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "openmp.cpp")
            source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_preargs=["-fopenmp"])
                self.compiler.link_executable(objects, "openmp", folder, extra_postargs=["-fopenmp"])
            except FAILURES:
                return False
            return True


class Cpp:
    """The C++ compiler that setuptools has found, with the options of `ext`."""

    def __init__(self, build: build_ext, ext: Extension) -> None:
        self.compiler, self.folder = build.compiler, build.build_temp
        self.options = {"include_dirs": ext.include_dirs, "extra_postargs": ext.extra_compile_args}

    @cached_property
    def identity(self) -> str:
        """What an object depends on besides its source: the command, and the versions of what it names.

        pybind11 by its version alone: pip keeps it in another folder at each build.
        """
        command = getattr(self.compiler, "compiler_so_cxx", None) or self.compiler.compiler_so
        # With a launcher: "ccache g++".
        asked = [*takewhile(lambda word: not word.startswith("-"), command), "--version"]
        try:
            version = subprocess.run(asked, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
        except OSError as error:
            version = str(error)
        options = [*command, *self.compiler.include_dirs, *self.options["extra_postargs"]]
        return f"{options}\npybind11 {pybind11.__version__}\n{version}"

    def compile(self, source: str, made: str, *macros: tuple[str, str]) -> None:
        """Compiles `source` to the object file `made`."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            # The compiler names its object by the source's path and writes it step by step.
            (written,) = self.compiler.compile([source], output_dir=folder, macros=list(macros), **self.options)
            os.replace(written, made)


class Cuda:
    """The toolkit of the nvcc on PATH or under CUDA_HOME; CudaError where there is none that serves."""

    def __init__(self) -> None:
        homes = [Path(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
        found = shutil.which("nvcc") or next((str(path / "nvcc") for path in homes if (path / "nvcc").is_file()), None)
        if found is None:
            raise CudaError("no nvcc on PATH or under CUDA_HOME")
        self.nvcc = found
        # The toolkit's own word for where it is: what stands on PATH may be a link or a script.
        said = self._run("-dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull)
        top = re.search(r"^#\$ TOP=(.*)$", said, re.MULTILINE)
        self.banner = self._run("--version")
        release = re.search(r"release (\d+\.\d+)", self.banner)
        if top is None or release is None:
            raise CudaError(f"{found} does not say where its toolkit is, or its version")
        self.version = release[1]
        self.top = top[1]
        names = ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")
        folders = [Path(self.top, name) for name in names]
        self.library = next((path for path in folders if (path / "libcudart_static.a").is_file()), None)
        if self.library is None:
            raise CudaError(f"no libcudart_static.a in the toolkit of {found}")
        known = re.findall(r"compute_(\d+)", self._run("--list-gpu-arch"))
        self.architectures = [number for number in ARCHITECTURES if str(number) in known]
        if not self.architectures:
            raise CudaError(f"nvcc {self.version} compiles for none of {ARCHITECTURES}")

    @property
    def targets(self) -> str:
        """Whose code is made: "sm_80 sm_90 compute_90", the last being PTX."""
        return " ".join([*(f"sm_{number}" for number in self.architectures), f"compute_{self.architectures[-1]}"])

    @property
    def link_args(self) -> list[str]:
        """The CUDA runtime, linked in whole so that the extension imports where there is no CUDA."""
        return [f"-L{self.library}", "-lcudart_static", "-lrt", "-lpthread", "-ldl"]

    @property
    def options(self) -> list[str]:
        """What is asked of nvcc for every source."""
        generate = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in self.architectures]
        newest = self.architectures[-1]
        generate.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
        # No contraction, as for the CPU: both give the same bits.
        options = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden,-O3"]
        return [*generate, *options, f"-DFASTMOCO_CUDA_TARGETS={quoted(self.targets)}"]

    @property
    def identity(self) -> str:
        """What an object depends on besides its source: the command, the toolkit and its version."""
        return f"{self.nvcc} {self.options}\n{self.top}\n{self.banner}"

    def compile(self, source: str, made: str) -> None:
        """Compiles `source` to the object file `made`."""
        print(" ".join([self.nvcc, "-c", source, "-o", made, *self.options]))
        partial = f"{made}.part.o"
        self._run("-c", source, "-o", partial, *self.options)
        os.replace(partial, made)

    def _run(self, *arguments: str) -> str:
        try:
            done = subprocess.run([self.nvcc, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        except OSError as error:
            raise CudaError(f"{self.nvcc} does not run: {error}") from error
        if done.returncode != 0:
            print(done.stdout, file=sys.stderr)
            what = next((word for word in arguments if word.endswith(".cu")), " ".join(arguments))
            first = next((line for line in done.stdout.splitlines() if "error" in line), "no message")
            raise CudaError(f"nvcc failed on {what}: {first}")
        return done.stdout


def quoted(text: str) -> str:
    """`text` as a C string literal for the command line, which no shell reads."""
    return '"' + text.replace("\\", "/").replace('"', "'") + '"'


setup(
    ext_modules=[
        Pybind11Extension(
            "fastmoco._C",
            sorted(set(glob("csrc/*.cpp")) - {CUDA_ABSENT}),
            depends=sorted(glob("csrc/*.h") + glob("csrc/*.cuh")),
            language="c++",
            cxx_std=17,
            # No contraction: whether a product and a sum become one instruction depends on the compiler and
            # on where a loop is cut, so the last bit of a result would depend on the number of threads.
            extra_compile_args=["-O3", "-ffp-contract=off"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": OptionalBuildExt},
)
