"""Builds the native extension where a C++ compiler is found, with CUDA kernels where nvcc is, whether or not there is a
GPU; the package works without either, through plain PyTorch.

Environment:
    KDKERNELS_BUILD_CPU=0   do not build the extension
    KDKERNELS_BUILD_CUDA=0  build it without CUDA kernels
    KDKERNELS_CUDA_ARCHS    compute capabilities to compile them for, "80;90;100" by default; their PTX is added
    KDKERNELS_NVCC          the CUDA compiler, by default the nvcc of CUDA_HOME or of the PATH
    KDKERNELS_REQUIRE_NATIVE=1  fail where a compiler fails, or warns of CUDA code; otherwise go without
    MAX_JOBS                compiler processes at a time
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
IMAGES = ROOT / "build" / "cuda"
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


def cuda_compiler() -> tuple[str | None, str]:
    """nvcc, or None and why there is none."""
    if os.environ.get("KDKERNELS_BUILD_CUDA", "1") == "0":
        return None, "KDKERNELS_BUILD_CUDA=0"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    name = os.environ.get("KDKERNELS_NVCC") or (f"{home}/bin/nvcc" if home else "nvcc")
    nvcc = shutil.which(name)
    return nvcc, "" if nvcc else f"no CUDA compiler ({name!r} is not on the PATH)"


def cuda_targets() -> list[int]:
    """Compute capabilities to compile for, ascending."""
    return sorted({int(target) for target in re.findall(r"\d+", os.environ.get("KDKERNELS_CUDA_ARCHS", "80;90;100"))})


def cuda_headers(nvcc: str) -> Path:
    """Where cuda.h is; nvcc may be a script that calls another."""
    command = [nvcc, "--dryrun", "-x", "cu", os.devnull]
    text = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    return Path(re.search(r"_HERE_=(\S+)", text)[1]).parent / "include"


def strict() -> bool:
    """Whether a build that is not as it should be fails, where a user's would go without."""
    return os.environ.get("KDKERNELS_REQUIRE_NATIVE", "0") == "1"


def jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def compile_cuda(nvcc: str, folder: Path) -> None:
    """One image of all targets from each file of kernels, into ``folder``, where it is not there already."""
    targets = cuda_targets()
    flags = ["-fatbin", "-std=c++17", "-O3", "--compress-mode=size", "-Xptxas=-warn-spills"]
    if strict():
        flags += ["-Xptxas=-Werror", "-Werror=all-warnings"]
    for target in targets:
        # PTX of the newest serves newer devices; of the others, the simulator of the tests.
        flags += [f"-gencode=arch=compute_{target},code=[compute_{target},sm_{target}]"]
    headers = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc/cuda").glob("*.*h")]
    changed = max(path.stat().st_mtime for path in (*headers, ROOT / "setup.py"))
    folder.mkdir(parents=True, exist_ok=True)
    chosen = folder / "flags.txt"
    same = chosen.exists() and chosen.read_text() == " ".join([nvcc, *flags])

    def compile_one(source: Path) -> None:
        image = folder / f"{source.stem.removeprefix('kernels_')}.fatbin"
        if same and image.exists() and image.stat().st_mtime > max(changed, source.stat().st_mtime):
            return
        command = [nvcc, *flags, str(source), "-o", str(image)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")

    with ThreadPoolExecutor(jobs()) as pool:
        list(pool.map(compile_one, sorted((ROOT / "csrc/cuda").glob("*.cu"))))
    chosen.write_text(" ".join([nvcc, *flags]))


def extension(nvcc: str | None) -> CppExtension:
    sources = ["csrc/torch_ops.cpp", *relative("csrc/cpu/*.cpp")]
    macros = [("TORCH_TARGET_VERSION", STABLE_ABI)]
    if nvcc is not None:
        sources += ["csrc/torch_cuda_ops.cpp", *relative("csrc/cuda/*.cpp")]
        targets = " ".join(map(str, cuda_targets()))
        macros += [("KDK_IMAGES", f'"{IMAGES}"'), ("KDK_CUDA_TARGETS", f'"{targets}"')]
    return CppExtension(
        "kdkernels._C",
        sources,
        include_dirs=[] if nvcc is None else [str(cuda_headers(nvcc))],
        depends=[*relative("csrc/**/*.h"), *([] if nvcc is None else map(str, IMAGES.glob("*.fatbin")))],
        define_macros=macros,
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


def relative(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


class Build(BuildExtension):
    """Reports what is built, and installs the package without the extension where the compiler fails."""

    def build_extensions(self) -> None:
        newest = max((image.stat().st_mtime for image in IMAGES.glob("*.fatbin")), default=0.0)
        for made in Path(self.build_temp).glob("**/driver.o"):  # has the images in it, which ninja does not know
            if made.stat().st_mtime < newest:
                made.unlink()
        try:
            super().build_extensions()
        except Exception as error:
            if strict():
                raise
            print(f"kdkernels: the native extension was NOT built ({error}); plain PyTorch will serve every call")
            self.extensions = []


reason = missing()
nvcc, no_cuda = cuda_compiler() if reason is None else (None, reason)
if nvcc is not None:
    try:
        compile_cuda(nvcc, IMAGES)
    except Exception as error:
        if strict():
            raise
        nvcc, no_cuda = None, f"the CUDA kernels did not compile ({error})"
cpu = "CPU kernels (baseline, AVX2, AVX-512)"
cuda = f"CUDA kernels for {cuda_targets()}" if nvcc is not None else f"no CUDA kernels, {no_cuda}"
print(f"kdkernels: native extension: {f'{cpu}, {cuda}' if reason is None else f'none, {reason}'}")
setup(
    version=version(),
    packages=["kdkernels", "kdkernels.compat", "kdkernels.triton_kernels"],
    package_dir={"kdkernels.triton_kernels": "triton_kernels"},
    package_data={"kdkernels": ["py.typed"]},
    ext_modules=[extension(nvcc)] if reason is None else [],
    cmdclass={"build_ext": Build.with_options(use_ninja=True)},
)
