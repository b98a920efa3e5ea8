"""Builds the native extension where a C++ compiler is found; the package works without it, through plain PyTorch.

Environment:
    KDKERNELS_BUILD_CPU=0   do not build the extension
    MAX_JOBS                compiler processes at a time (torch.utils.cpp_extension)
"""

import os
import re
import shutil
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
STABLE_ABI = "0x020a000000000000"  # LibTorch 2.10: the built extension loads in it and in every later one


def version() -> str:
    text = (ROOT / "kdkernels" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'__version__ = "([^"]+)"', text)[1]


def missing() -> str | None:
    """Why the extension cannot be built, or None."""
    if os.environ.get("KDKERNELS_BUILD_CPU", "1") == "0":
        return "KDKERNELS_BUILD_CPU=0"
    compiler = os.environ.get("CXX", "c++").split()[0]
    return None if shutil.which(compiler) else f"no C++ compiler ({compiler!r} is not on the PATH)"


def extension() -> CppExtension:
    sources = ["csrc/torch_ops.cpp", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").glob("*.cpp"))]
    return CppExtension(
        "kdkernels._C",
        sources,
        depends=[str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")],
        define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI)],
        extra_compile_args=[
            "-std=c++20",
            "-O3",
            "-g0",
            "-fno-math-errno",
            "-fno-trapping-math",
            "-ffp-contract=fast",
            "-fvisibility=hidden",
            "-Wall",
            "-Wextra",
            "-Wno-psabi",
            "-Wno-unknown-pragmas",
        ],
        py_limited_api=True,
    )


class Build(BuildExtension):
    """Reports what is built, and installs the package without the extension where the compiler fails."""

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except Exception as error:
            if os.environ.get("KDKERNELS_REQUIRE_NATIVE", "0") == "1":
                raise
            print(f"kdkernels: the native extension was NOT built ({error}); plain PyTorch will serve every call")
            self.extensions = []


reason = missing()
print(
    f"kdkernels: native extension: {'CPU kernels (baseline, AVX2, AVX-512)' if reason is None else f'none, {reason}'}"
)
setup(
    version=version(),
    packages=["kdkernels", "kdkernels.compat", "kdkernels.triton_kernels"],
    package_dir={"kdkernels.triton_kernels": "triton_kernels"},
    package_data={"kdkernels": ["py.typed"]},
    ext_modules=[extension()] if reason is None else [],
    cmdclass={"build_ext": Build.with_options(use_ninja=True)},
)
