"""The AVX-512 kernels on CPUs that lack AVX-512: its instructions are emulated, lane by lane (tests/avx512).

The package that is tested so is a copy with an extension of its own, in another process.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import instruction_sets
from torch.utils.cpp_extension import include_paths, library_paths

TESTS = Path(__file__).parent
ROOT = TESTS.parent
HERE = TESTS / "avx512"
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden"]
ARITHMETIC = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]  # as in setup.py
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-unused-parameter"]
SOURCES = {
    HERE / "kernels.cpp": [],
    ROOT / "csrc/cpu/isa.cpp": ["-D__builtin_cpu_supports(feature)=true"],
    ROOT / "csrc/torch/cpu_ops.cpp": ["-DTORCH_TARGET_VERSION=0x020a000000000000"],
}
#: Test files, and which of their tests.
SELECTED = {
    ("test_losses.py", "test_cpu_bounds.py"): "avx512",
    ("test_pixels.py", "test_standardize.py"): "cpu",
}


def build(package: Path) -> None:
    """A copy of the package with the AVX-512 kernels as those of every instruction set."""
    compiler = os.environ.get("CXX", "c++")
    include = [f"-I{path}" for path in (ROOT / "csrc/cpu", HERE)] + [f"-isystem{path}" for path in include_paths()]
    shutil.copytree(ROOT / "kdkernels", package, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    objects = []
    for source, macros in SOURCES.items():
        objects.append(str(package.parent / f"{source.stem}.o"))
        command = [compiler, *FLAGS, *ARITHMETIC, *WARNINGS, *macros, *include, "-c", str(source), "-o", objects[-1]]
        subprocess.run(command, check=True)
    libraries = [f"-L{path}" for path in library_paths()] + ["-lc10", "-ltorch", "-ltorch_cpu"]
    subprocess.run([compiler, "-shared", *objects, *libraries, "-o", str(package / "_C.abi3.so")], check=True)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 only")
def test_avx512_without_avx512(tmp_path: Path) -> None:
    if "avx512" in instruction_sets():
        pytest.skip("this CPU runs them itself, in all other tests")
    if "avx2" not in instruction_sets() or shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("needs AVX2 and a C++ compiler")
    build(tmp_path / "kdkernels")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "KDKERNELS"))}
    environment = inherited | {"PYTHONPATH": str(tmp_path), "KDKERNELS_REQUIRE_NATIVE": "1"}
    asked = "import kdkernels; print(kdkernels.__file__, kdkernels.cpu_instruction_set())"

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{done.stdout[-10000:]}\n{done.stderr[-10000:]}"
        return done.stdout.strip()

    assert run("-c", asked) == f"{tmp_path / 'kdkernels' / '__init__.py'} avx512"
    for files, selection in SELECTED.items():
        run("-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", selection)
