"""Builds the C++ extension fastmoco._C. Everything else about the package stands in pyproject.toml.

The extension is optional: where it does not compile the installation still succeeds and says what is missing
(pip shows what a build says only with `-v`; `fastmoco doctor` says it afterwards).
"""

import sys
import tempfile
from glob import glob
from pathlib import Path

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


class OptionalBuildExt(build_ext):
    """Compiles with OpenMP where the compiler has it; without the extension where it does not compile."""

    def build_extension(self, ext: Extension) -> None:
        """Compiles `ext`, or says why it is left out and what runs instead."""
        try:
            if self._compiles_openmp():
                ext.extra_compile_args.append("-fopenmp")
                ext.extra_link_args.append("-fopenmp")
            super().build_extension(ext)
        except FAILURES as error:
            # What an earlier build left would otherwise be installed in place of what did not compile now.
            built = Path(self.get_ext_fullpath(ext.name))
            built.unlink(missing_ok=True)
            if self.editable_mode:
                Path("fastmoco", built.name).unlink(missing_ok=True)
            print(LEFT_OUT.format(name=ext.name, error=error), file=sys.stderr)

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


setup(
    ext_modules=[
        Pybind11Extension(
            "fastmoco._C",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            cxx_std=17,
            # No contraction: whether a product and a sum become one instruction depends on the compiler and
            # on where a loop is cut, so the last bit of a result would depend on the number of threads.
            extra_compile_args=["-O3", "-ffp-contract=off"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": OptionalBuildExt},
)
