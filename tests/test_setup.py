"""setup.py with stand-in compilers, in a copy of the source tree: what runs when, what is built, what is refused."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest
import setuptools
from helpers import require
from setuptools.errors import SetupError

from kdkernels import ops

ROOT = Path(__file__).parent.parent
if not (ROOT / "setup.py").exists():
    pytest.skip("there is no setup.py beside the tests", allow_module_level=True)

# A compiler that writes its arguments to a file and names of symbol versions, as a library has them, to what follows
# -o; nvcc's dry run names its folder.
COMPILER = """#!/bin/sh
echo "$@" >> {log}
[ "$1" = --dryrun ] && {{ echo "#$ _HERE_=/toolkit/bin" >&2; exit 0; }}
while [ $# -gt 0 ]; do
  [ "$1" = -o ] && printf 'made\\0GLIBC_2.9\\0GLIBC_2.2.5\\0GLIBC_2.28\\0GLIBCXX_3.4.32\\0' > "$2"
  shift
done
exit {status}
"""


class Tree:
    """A copy of what setup.py needs, and the stand-in compilers' calls."""

    def __init__(self, root: Path) -> None:
        self.root = root / "tree"
        self.tools = root / "tools"
        self.tools.mkdir()
        for folder in ("csrc", "kdkernels", "triton_kernels"):
            ignored = shutil.ignore_patterns("__pycache__", "_C*")
            shutil.copytree(ROOT / folder, self.root / folder, ignore=ignored)
        for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, self.root)
        for kernels in list((self.root / "csrc/cuda").glob("*.cu"))[2:]:
            kernels.unlink()
        self.cxx = self.compiler("standin-c++")
        self.nvcc = self.compiler("nvcc")

    def compiler(self, name: str, status: int = 0) -> Path:
        path = self.tools / name
        path.write_text(COMPILER.format(log=f"{path}.log", status=status))
        path.chmod(0o755)
        return path

    def calls(self, compiler: Path) -> list[str]:
        """What a stand-in was called with since the last question."""
        log = Path(f"{compiler}.log")
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("KDKERNELS_", "CUDA_"))}
        chosen = {"CXX": str(self.cxx), "KDKERNELS_NVCC": str(self.nvcc), "MAX_JOBS": "2"} | environment
        return subprocess.run(
            [sys.executable, "setup.py", *command],
            cwd=self.root,
            env=inherited | chosen,
            capture_output=True,
            text=True,
            check=False,
        )

    def build(self, **environment: str) -> subprocess.CompletedProcess[str]:
        done = self.run("build_ext", "--inplace", **environment)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def built(self) -> bool:
        return any((self.root / "kdkernels").glob("_C*"))

    def images(self) -> list[str]:
        return sorted(path.name for path in (self.root / "build/cuda").glob("*") if path.name != "flags.txt")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_reading_compiles_nothing(tree: Tree) -> None:
    """The version is all that is printed; neither it nor the metadata calls a compiler or leaves a build."""
    done = tree.run("--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [version()]
    done = tree.run("egg_info", "sdist")
    assert done.returncode == 0, done.stderr
    assert tree.calls(tree.nvcc) == []
    assert tree.calls(tree.cxx) == []
    assert not (tree.root / "build").exists()


def version() -> str:
    text = (ROOT / "kdkernels/__init__.py").read_text()
    return text.split('__version__ = "')[1].split('"')[0]


def test_the_release_is_described() -> None:
    """The changelog begins with this version, and the citation names it with the same date."""
    released = re.search(r"^## \[(.+)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released is not None
    assert released[1] == version()
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {released[1]}\n" in citation
    assert f"\ndate-released: {released[2]}\n" in citation


def test_the_build_step_compiles(tree: Tree) -> None:
    """Images for the targets asked for, once; then what was touched, and the object that has the images in it."""
    done = tree.build(KDKERNELS_CUDA_ARCHS="90;80;90")
    assert done.returncode == 0, done.stderr
    assert tree.built()
    assert "2 of 2 files of CUDA kernels to compile for [80, 90]" in done.stderr
    assert "CPU kernels (baseline, AVX2, AVX-512), CUDA kernels for [80, 90]" in done.stderr
    images = [call for call in tree.calls(tree.nvcc) if "-fatbin" in call]
    assert len(images) == 2
    assert all(call.count("-gencode") == 2 and "code=[compute_90,sm_90]" in call for call in images)
    kernels = sorted((tree.root / "csrc/cuda").glob("*.cu"))
    assert tree.images() == sorted(f"{path.stem.removeprefix('kernels_')}.fatbin" for path in kernels)
    compiled = tree.calls(tree.cxx)
    driver = next(call for call in compiled if "driver.cpp" in call)
    assert "-I/toolkit/include" in driver
    assert f"{tree.root}/build/cuda" in driver
    assert "80 90" in driver

    done = tree.build(KDKERNELS_CUDA_ARCHS="80;90")
    assert done.returncode == 0, done.stderr
    assert "0 of 2 files of CUDA kernels to compile" in done.stderr
    assert not any("-fatbin" in call for call in tree.calls(tree.nvcc))
    assert not any(" -c " in f" {call} " for call in tree.calls(tree.cxx))

    done = tree.build(KDKERNELS_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert not any("driver.o" in call for call in tree.calls(tree.cxx))
    assert tree.build(KDKERNELS_CUDA_ARCHS="80;90").returncode == 0
    assert "driver.o" in tree.calls(tree.cxx)[-1]

    os.utime(kernels[0])
    done = tree.build(KDKERNELS_CUDA_ARCHS="80;90")
    assert done.returncode == 0, done.stderr
    assert [kernels[0].name in call for call in tree.calls(tree.nvcc) if "-fatbin" in call] == [True]
    recompiled = [call for call in tree.calls(tree.cxx) if ".cpp" in call]
    assert len(recompiled) == 1
    assert "driver.cpp" in recompiled[0]


def test_other_flags_compile_anew(tree: Tree) -> None:
    """An interrupted build with other flags leaves images that no later build takes for its own."""
    assert tree.build(KDKERNELS_CUDA_ARCHS="80").returncode == 0
    failing = tree.compiler("nvcc", status=1)
    assert "no CUDA kernels" in tree.build(KDKERNELS_CUDA_ARCHS="90").stderr
    tree.calls(failing)
    tree.compiler("nvcc")
    done = tree.build(KDKERNELS_CUDA_ARCHS="80")
    assert "2 of 2 files of CUDA kernels to compile for [80]" in done.stderr
    assert len([call for call in tree.calls(tree.nvcc) if "-fatbin" in call]) == 2


def test_sources_are_distributed_whole(tree: Tree) -> None:
    """What a build with CUDA kernels reads is in the source distribution, on machines without nvcc, too."""
    done = tree.run("sdist", KDKERNELS_NVCC="/nowhere/nvcc")
    assert done.returncode == 0, done.stderr
    (archive,) = (tree.root / "dist").glob("*.tar.gz")
    shutil.unpack_archive(archive, tree.root / "unpacked")
    (unpacked,) = (tree.root / "unpacked").iterdir()
    wanted = {path.relative_to(tree.root) for path in (tree.root / "csrc").glob("**/*.*")}
    assert wanted <= {path.relative_to(unpacked) for path in unpacked.glob("**/*")}


def wheel_of(tree: Tree, **environment: str) -> tuple[str, list[str], str]:
    """A wheel's tag, the names of its files and its description of itself."""
    done = tree.run("bdist_wheel", **environment)
    assert done.returncode == 0, done.stderr
    (path,) = (tree.root / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        (about,) = (name for name in names if name.endswith(".dist-info/WHEEL"))
        text = wheel.read(about).decode()
    name, number, tag = path.stem.split("-", 2)
    assert (name, number) == ("kdkernels", version())
    return tag, names, text


@pytest.mark.skipif(sys.platform != "linux", reason="manylinux is Linux")
def test_one_wheel_for_all_pythons(tree: Tree) -> None:
    """The limited ABI, and manylinux of the newest glibc that the extension asks for; the package alone is in it."""
    tag, names, about = wheel_of(tree)
    machine = sysconfig.get_platform().removeprefix("linux-")
    assert tag == f"cp310-abi3-manylinux_2_28_{machine}"
    assert f"Tag: {tag}\n" in about
    assert "Root-Is-Purelib: false" in about
    package = {name for name in names if not name.startswith(f"kdkernels-{version()}.dist-info/")}
    python = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kdkernels").glob("**/*.py")}
    python |= {f"kdkernels/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "triton_kernels").glob("*.py")}
    assert package == python | {"kdkernels/py.typed", "kdkernels/_C.abi3.so"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_a_wheel_without_the_extension(tree: Tree) -> None:
    """It is plain Python, and its tag says so."""
    tag, names, about = wheel_of(tree, KDKERNELS_BUILD_CPU="0")
    assert tag == "py3-none-any"
    assert "Root-Is-Purelib: true" in about
    assert not any(name.startswith("kdkernels/_C") for name in names)


@pytest.mark.parametrize(
    ("symbols", "minor"),
    [
        (b"\0GLIBC_2.17\0GLIBC_2.9\0", 17),
        (b"\0GLIBC_2.2.5\0GLIBCXX_3.4.32\0GLIBC_PRIVATE\0", 2),
        (b"\0made by musl\0", None),
    ],
)
def test_the_glibc_of_a_library(functions: dict[str, Any], symbols: bytes, minor: int | None, tmp_path: Path) -> None:
    (tmp_path / "library.so").write_bytes(symbols)
    assert functions["glibc_minor"](tmp_path / "library.so") == minor


def test_the_extension_needs_torch_alone() -> None:
    """So that one wheel serves every Python and torch, with CUDA or without: no CUDA and no Python library."""
    require("cpu")
    readelf = shutil.which("readelf")
    if sys.platform != "linux" or readelf is None:
        pytest.skip("readelf, of the C++ compiler's tools, is not on the PATH")
    (extension,) = Path(ops.__file__).parent.glob("_C*")
    assert extension.name == "_C.abi3.so"
    text = subprocess.run([readelf, "-dW", extension], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(\w+)", text))
    assert {"libtorch_cpu", "libc"} <= needed
    assert needed <= {"libtorch", "libtorch_cpu", "libc10", "libstdc", "libgcc_s", "libm", "libc", "libdl", "ld"}


@pytest.mark.parametrize(
    ("nvcc", "message"),
    [
        ("/bin/true", "'/bin/true' is no CUDA compiler"),
        ("/nowhere/nvcc", "no CUDA compiler ('/nowhere/nvcc' is not an executable"),
        ("failing", "exit status 1"),
        ("lazy", "no image was written"),
    ],
)
def test_no_cuda_compiler_where_native_kernels_are_required(tree: Tree, nvcc: str, message: str) -> None:
    tree.compiler("failing", status=1)
    lazy = tree.compiler("lazy")
    lazy.write_text(lazy.read_text().replace('> "$2"', "> /dev/null"))
    done = tree.build(KDKERNELS_NVCC=str(tree.tools / nvcc), KDKERNELS_REQUIRE_NATIVE="1")  # an absolute path stays
    assert done.returncode != 0
    assert message in done.stderr
    assert "KDKERNELS_BUILD_CUDA=0 builds without CUDA kernels" in done.stderr
    assert not tree.built()


def test_without_a_cuda_compiler(tree: Tree) -> None:
    """The extension is built without CUDA kernels, and says why."""
    done = tree.build(KDKERNELS_NVCC="/bin/true")
    assert done.returncode == 0, done.stderr
    assert "no CUDA kernels, '/bin/true' is no CUDA compiler" in done.stderr
    assert not any("driver.cpp" in call for call in tree.calls(tree.cxx))
    assert tree.built()


def test_native_kernels_are_required_but_for_cuda(tree: Tree) -> None:
    done = tree.build(KDKERNELS_NVCC="/nowhere/nvcc", KDKERNELS_REQUIRE_NATIVE="1", KDKERNELS_BUILD_CUDA="No")
    assert done.returncode == 0, done.stderr
    assert "no CUDA kernels, KDKERNELS_BUILD_CUDA=No" in done.stderr
    assert tree.built()


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "/nowhere/c++"}, "no C++ compiler ('/nowhere/c++' is not on the PATH)"),
        ({"KDKERNELS_BUILD_CPU": "off"}, "KDKERNELS_BUILD_CPU=off"),
    ],
    ids=["no compiler", "switched off"],
)
def test_without_the_extension(tree: Tree, environment: dict[str, str], reason: str) -> None:
    done = tree.build(**environment)
    assert done.returncode == 0, done.stderr
    assert f"native extension: none, {reason}" in done.stderr
    done = tree.build(**environment, KDKERNELS_REQUIRE_NATIVE="yes")
    assert done.returncode != 0
    assert f"the native extension cannot be built: {reason}" in done.stderr
    assert not tree.built()
    assert tree.calls(tree.nvcc) == []


def test_a_compiler_that_fails(tree: Tree) -> None:
    failing = str(tree.compiler("failing-c++", status=1))
    done = tree.build(CXX=failing, KDKERNELS_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert "the native extension was NOT built" in done.stderr
    assert tree.run("build_ext", CXX=failing, KDKERNELS_BUILD_CUDA="0", KDKERNELS_REQUIRE_NATIVE="1").returncode != 0


def test_empty_variables_are_not_set(tree: Tree) -> None:
    """The compilers are the PATH's, and the targets and switches the default ones."""
    cxx = tree.compiler("c++")
    names = ("CC", "NVCC", "CUDA_ARCHS", "BUILD_CPU", "BUILD_CUDA", "REQUIRE_NATIVE")
    empty = {name if name == "CC" else f"KDKERNELS_{name}": "" for name in names}
    path = f"{tree.tools}{os.pathsep}{os.environ['PATH']}"
    done = tree.build(**empty, CXX=" ", CUDA_HOME="", MAX_JOBS="", PATH=path)
    assert done.returncode == 0, done.stderr
    assert "CUDA kernels for [80, 90, 100]" in done.stderr
    assert any("driver.cpp" in call for call in tree.calls(cxx))
    assert len([call for call in tree.calls(tree.nvcc) if "-fatbin" in call]) == 2


@pytest.mark.parametrize(("name", "value"), [("KDKERNELS_CUDA_ARCHS", "abc"), ("KDKERNELS_BUILD_CPU", "nope")])
def test_a_build_with_nonsense_in_the_environment(tree: Tree, name: str, value: str) -> None:
    done = tree.run("build_ext", "--inplace", **{name: value})
    assert done.returncode != 0
    assert f"the environment variable {name} must be " in done.stderr
    assert f"got {value!r}" in done.stderr
    assert not tree.built()
    assert tree.images() == []


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py defines, without its setup()."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setenv("PATH", os.environ["PATH"])  # setup.py adds to it
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        *[(value, True) for value in ("1", "true", "Yes", "ON", " 1 ")],
        *[(value, False) for value in ("0", "false", "No", "OFF")],
        *[(value, None) for value in ("", " ")],
    ],
)
def test_switches(functions: dict[str, Any], value: str, wanted: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDKERNELS_BUILD_CUDA", value)
    for default in (True, False):
        assert functions["switch"]("KDKERNELS_BUILD_CUDA", default) is (default if wanted is None else wanted)


@pytest.mark.parametrize(("value", "wanted"), [("", [80, 90, 100]), ("90", [90]), ("100; 80;90;80", [80, 90, 100])])
def test_targets(functions: dict[str, Any], value: str, wanted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDKERNELS_CUDA_ARCHS", value)
    assert functions["cuda_targets"]() == wanted


@pytest.mark.parametrize(
    ("function", "name", "values"),
    [
        ("strict", "KDKERNELS_REQUIRE_NATIVE", ("always", "2", "y")),
        ("missing", "KDKERNELS_BUILD_CPU", ("nope", "-1")),
        ("cuda_targets", "KDKERNELS_CUDA_ARCHS", ("abc", "8.0;9.0", "90a", "75", "80;;90", "80,90", ";")),
        ("jobs", "MAX_JOBS", ("0", "-1", "many", "1.5")),
    ],
)
def test_nonsense_in_the_environment(
    functions: dict[str, Any], function: str, name: str, values: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in values:
        monkeypatch.setenv(name, value)
        with pytest.raises(SetupError, match=f"the environment variable {name} must be .*, got {value!r}"):
            functions[function]()
