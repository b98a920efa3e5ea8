"""CUDA C++: compiles a file to PTX with nvcc and launches its kernels."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .module import Module, Size
from .stats import Stats

NVCC = os.environ.get("NVCC", "nvcc")


def available() -> bool:
    """Whether there is an nvcc (named by the environment variable NVCC, or on the path)."""
    return shutil.which(NVCC) is not None


def compile_to_ptx(
    source: str | Path, arch: str = "sm_90", flags: Sequence[str] = (), include: Sequence[str | Path] = ()
) -> str:
    """The PTX text of a .cu file; RuntimeError with the compiler's words if it does not compile.

    Kept in the temporary folder by the file's own content and the flags: without ``include``, since the content of what
    the file includes there is not looked at.
    """
    text = Path(source).read_bytes()
    command = [NVCC, "-ptx", f"-arch={arch}", "-O3", "-std=c++17", *flags, *(f"-I{folder}" for folder in include)]
    key = hashlib.sha256(repr((command, text)).encode()).hexdigest()[:24]
    folder = Path(tempfile.gettempdir()) / f"ptxsim-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    out = folder / f"{key}.ptx"
    if include or not out.exists():
        # Two test processes may compile the same file: each its own, the last one wins.
        own = folder / f"{key}.{os.getpid()}"
        done = subprocess.run([*command, str(source), "-o", str(own)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        own.replace(out)
    return out.read_text()


def toolkit() -> Path:
    """The folder of the CUDA toolkit behind nvcc, which may be a wrapper script."""
    command = [NVCC, "--dryrun", "-x", "cu", os.devnull]
    out = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    return Path(re.search(r"_HERE_=(\S+)", out)[1]).parent


def demangle(names: Sequence[str]) -> dict[str, str]:
    """Mangled -> readable names."""
    if not names:
        return {}
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.splitlines(), strict=True))


class CudaModule(Module):
    """The kernels of a .cu file: ``CudaModule("k.cu").run("softmax<float>", 64, 128, args)``"""

    def __init__(
        self, source: str | Path, arch: str = "sm_90", flags: Sequence[str] = (), include: Sequence[str | Path] = ()
    ) -> None:
        super().__init__(compile_to_ptx(source, arch, flags, include))
        self.names = demangle(self.kernels)

    def find(self, pattern: str) -> str:
        """The mangled name of the one kernel whose name is ``pattern``, or else contains it; KeyError otherwise."""

        def same(mangled: str, readable: str) -> bool:
            return pattern in (mangled, readable, readable.split("(", maxsplit=1)[0].removeprefix("void "))

        for fits in (same, lambda mangled, readable: pattern in readable):
            hits = [mangled for mangled, readable in self.names.items() if fits(mangled, readable)]
            if len(hits) == 1:
                return hits[0]
            if hits:
                break
        raise KeyError(f"{pattern!r} names {len(hits)} kernels of {list(self.names.values())}")

    def run(self, pattern: str, grid: Size, block: Size, args: Sequence[Any], **options: Any) -> Stats:
        """:meth:`Module.launch` of the kernel that ``pattern`` finds."""
        return self.launch(self.find(pattern), grid, block, args, **options)
