"""The C++ compiles where the compiler knows fewer instruction sets than this one."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BEST_FIRST = ["amx", "avx512bf16", "avx512", "avx2", "baseline"]
MAIN = """
#include <cstdio>
#include "infonce.h"
int main() { for (const auto& name : fastmoco::infonce_sets()) std::puts(name.c_str()); }
"""


@pytest.mark.system
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize(
    ("option", "absent"),
    [("FASTMOCO_NO_AMX", BEST_FIRST[:1]), ("FASTMOCO_NO_AVX512BF16", BEST_FIRST[:2])],
)
def test_infonce_does_without_what_the_compiler_does_not_know(tmp_path: Path, option: str, absent: list[str]) -> None:
    """The rest links, and neither a name nor a function of what is absent is left; tiles need the pairs."""
    (tmp_path / "main.cpp").write_text(MAIN)
    program = tmp_path / "main"
    sources = [tmp_path / "main.cpp", *sorted((ROOT / "csrc").glob("infonce*.cpp"))]
    options = ["-std=c++17", "-O0", "-Wall", "-Werror", f"-D{option}", f"-I{ROOT / 'csrc'}"]
    compiled = subprocess.run(["g++", *options, *map(str, sources), "-o", str(program)], capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    binary = program.read_bytes()
    assert not any(f"sweep_{name}".encode() in binary for name in absent)
    names = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.split()
    assert names[-1] == "baseline" and not set(names) & set(absent) and set(names) <= set(BEST_FIRST)


OTHERS = """
#include <cstdio>
#include "batch_norm_tiles.h"
#include "convolve.h"
int main() {
  for (const auto dtype : {fastmoco::MapDtype::kBFloat16, fastmoco::MapDtype::kFloat32})
    for (const auto& name : fastmoco::convolve_sets(dtype)) std::puts(name.c_str());
  return fastmoco::norm_tiles<std::uint16_t>(32).apply == nullptr;
}
"""


@pytest.mark.system
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_maps_do_without_pairs_that_the_compiler_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "main.cpp").write_text(OTHERS)
    program = tmp_path / "main"
    parts = ("batch_norm*.cpp", "convolve*.cpp", "winograd*.cpp", "max_pool.cpp", "unfold.cpp")
    sources = [tmp_path / "main.cpp", *(path for part in parts for path in sorted((ROOT / "csrc").glob(part)))]
    options = ["-std=c++17", "-O0", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi", "-Werror"]
    options += ["-DFASTMOCO_NO_AVX512BF16", f"-I{ROOT / 'csrc'}"]
    compiled = subprocess.run(["g++", *options, *map(str, sources), "-o", str(program)], capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    assert b"tiles_avx512bf16" not in program.read_bytes()
    names = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.split()
    assert set(names) <= {"avx512", "avx2"}
