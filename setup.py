"""Builds the native extension where a C++ compiler is found, with CUDA kernels where nvcc is, whether or not there is a
GPU; the package works without either, through plain PyTorch. Compilers run in the build step (build_ext) only.

Environment; an empty variable is one that is not set, and switches are 1/0, true/false, yes/no or on/off:
    KDKERNELS_BUILD_CPU=0   do not build the extension
    KDKERNELS_BUILD_CUDA=0  build it without CUDA kernels
    KDKERNELS_CUDA_ARCHS    compute capabilities to compile them for, "80;90;100" by default; their PTX is added
    KDKERNELS_NVCC          the CUDA compiler, by default the nvcc of CUDA_HOME or of the PATH
    KDKERNELS_REQUIRE_NATIVE=1  fail where a compiler is missing or fails, or warns of CUDA code; otherwise go without
    MAX_JOBS                compiler processes at a time
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.errors import SetupError
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
IMAGES = ROOT / "build" / "cuda"
STABLE_ABI = "0x020a000000000000"  # LibTorch 2.10: the built extension loads in it and in every later one
DEFAULT_ARCHS = "80;90;100"
SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def version() -> str:
    text = (ROOT / "kdkernels" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'__version__ = "([^"]+)"', text)[1]


def setting(name: str) -> str | None:
    """A variable of the environment, or None if it is unset or empty."""
    return os.environ.get(name, "").strip() or None


def switch(name: str, default: bool) -> bool:
    value = setting(name)
    if value is None:
        return default
    if value.lower() not in SWITCH:
        raise SetupError(f"the environment variable {name} must be one of {', '.join(SWITCH)}, got {value!r}")
    return SWITCH[value.lower()]


def strict() -> bool:
    """Whether a build that is not as it should be fails, where a user's would go without."""
    return switch("KDKERNELS_REQUIRE_NATIVE", False)


def jobs() -> int:
    value = setting("MAX_JOBS") or str(os.cpu_count() or 1)
    if not value.isdecimal() or int(value) < 1:
        raise SetupError(f"the environment variable MAX_JOBS must be a number of processes >= 1, got {value!r}")
    return int(value)


def cuda_targets() -> list[int]:
    """Compute capabilities to compile for, ascending."""
    value = setting("KDKERNELS_CUDA_ARCHS") or DEFAULT_ARCHS
    targets = [part.strip() for part in value.split(";")]
    if not all(re.fullmatch(r"\d{2,3}", target) and int(target) >= 80 for target in targets):
        expected = f"compute capabilities from 80 on such as {DEFAULT_ARCHS!r}"
        raise SetupError(f"the environment variable KDKERNELS_CUDA_ARCHS must be {expected}, got {value!r}")
    return sorted(set(map(int, targets)))


def missing() -> str | None:
    """Why the extension cannot be built, or None."""
    if not switch("KDKERNELS_BUILD_CPU", True):
        return f"KDKERNELS_BUILD_CPU={setting('KDKERNELS_BUILD_CPU')}"
    compiler = (setting("CXX") or "c++").split()[0]
    return None if shutil.which(compiler) else f"no C++ compiler ({compiler!r} is not on the PATH)"


def cuda_compiler() -> str:
    """nvcc; RuntimeError that says where it was looked for."""
    home = setting("CUDA_HOME") or setting("CUDA_PATH")
    name = setting("KDKERNELS_NVCC") or (f"{home}/bin/nvcc" if home else "nvcc")
    nvcc = shutil.which(name)
    if nvcc is None:
        raise RuntimeError(f"no CUDA compiler ({name!r} is not an executable, nor on the PATH)")
    return nvcc


def cuda_headers(nvcc: str) -> Path:
    """Where cuda.h is; nvcc may be a script that calls another. RuntimeError if it is no nvcc."""
    command = [nvcc, "--dryrun", "-x", "cu", os.devnull]
    text = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    here = re.search(r"_HERE_=(\S+)", text)
    if here is None:
        raise RuntimeError(f"{nvcc!r} is no CUDA compiler ({' '.join(command)!r} does not say where its headers are)")
    return Path(here[1]).parent / "include"


def image_of(source: Path) -> Path:
    return IMAGES / f"{source.stem.removeprefix('kernels_')}.fatbin"


def compile_image(command: list[str], source: Path) -> None:
    """The image of one file of kernels: either a whole one is there afterwards or RuntimeError is raised."""
    unfinished = image_of(source).with_suffix(".unfinished")
    command = [*command, str(source), "-o", str(unfinished)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not unfinished.exists():
        problem = f"exit status {done.returncode}" if done.returncode else "no image was written"
        raise RuntimeError(f"{' '.join(command)}: {problem}\n{done.stdout}{done.stderr}")
    unfinished.replace(image_of(source))


def compile_cuda(nvcc: str, targets: list[int]) -> None:
    """One image of all targets from each file of kernels, into ``IMAGES``, where it is not there already."""
    flags = ["-fatbin", "-std=c++17", "-O3", "--compress-mode=size", "-Xptxas=-warn-spills"]
    if strict():
        flags += ["-Xptxas=-Werror", "-Werror=all-warnings"]
    for target in targets:
        # PTX of the newest serves newer devices; of the others, the simulator of the tests.
        flags += [f"-gencode=arch=compute_{target},code=[compute_{target},sm_{target}]"]
    headers = [*(ROOT / "csrc/common").glob("*.h"), *(ROOT / "csrc/cuda").glob("*.*h")]
    changed = max(path.stat().st_mtime for path in (*headers, ROOT / "setup.py"))
    IMAGES.mkdir(parents=True, exist_ok=True)
    chosen = IMAGES / "flags.txt"
    command = [nvcc, *flags]
    if not chosen.exists() or chosen.read_text() != " ".join(command):
        chosen.unlink(missing_ok=True)  # what an interrupted build leaves is compiled again

    def is_old(source: Path) -> bool:
        image = image_of(source)
        newest = max(changed, source.stat().st_mtime)
        return not chosen.exists() or not image.exists() or image.stat().st_mtime <= newest

    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    if not sources:
        raise RuntimeError(f"no CUDA kernels in {ROOT / 'csrc/cuda'}")
    old = [source for source in sources if is_old(source)]
    report(f"{len(old)} of {len(sources)} files of CUDA kernels to compile for {targets} with {nvcc}")
    with ThreadPoolExecutor(jobs()) as pool:
        list(pool.map(lambda source: compile_image(command, source), old))
    chosen.write_text(" ".join(command))


def report(text: str) -> None:
    print(f"kdkernels: {text}", file=sys.stderr, flush=True)


def extension() -> CppExtension:
    """The extension with its CPU kernels; the build step adds those for CUDA."""
    return CppExtension(
        "kdkernels._C",
        ["csrc/torch/cpu_ops.cpp", *relative("csrc/cpu/*.cpp")],
        depends=relative("csrc/**/*.h"),
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


def relative(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def add_cuda(native: CppExtension) -> str:
    """Compiles the CUDA kernels and adds them to the extension; a description of what was added, or why not."""
    if not switch("KDKERNELS_BUILD_CUDA", True):
        return f"no CUDA kernels, KDKERNELS_BUILD_CUDA={setting('KDKERNELS_BUILD_CUDA')}"
    targets = cuda_targets()
    try:
        nvcc = cuda_compiler()
        headers = cuda_headers(nvcc)
        compile_cuda(nvcc, targets)
    except (RuntimeError, OSError) as error:
        if strict():
            hint = "KDKERNELS_BUILD_CUDA=0 builds without CUDA kernels"
            raise SetupError(f"KDKERNELS_REQUIRE_NATIVE is set, and {error}; {hint}") from error
        return f"no CUDA kernels, {error}"
    native.sources += ["csrc/torch/cuda_ops.cpp", *relative("csrc/cuda/*.cpp")]
    native.depends += map(str, IMAGES.glob("*.fatbin"))
    native.include_dirs.append(str(headers))
    native.define_macros += [
        ("KDK_IMAGES", f'"{IMAGES}"'),
        ("KDK_CUDA_TARGETS", f'"{" ".join(map(str, targets))}"'),
    ]
    return f"CUDA kernels for {targets}"


class Build(BuildExtension):
    """Reports what is built, and installs the package without the extension where the compiler fails."""

    def build_extensions(self) -> None:
        if reason is not None:  # without REQUIRE_NATIVE there is no extension, and this step is not taken
            raise SetupError(f"KDKERNELS_REQUIRE_NATIVE is set, and the native extension cannot be built: {reason}")
        (native,) = self.extensions
        self.force = True  # ninja knows what is old, by the commands, too; setuptools would look at times only
        report(f"native extension: CPU kernels (baseline, AVX2, AVX-512), {add_cuda(native)}")
        newest = max((image.stat().st_mtime for image in IMAGES.glob("*.fatbin")), default=0.0)
        for made in Path(self.build_temp).glob("**/driver.o"):  # has the images in it, which ninja does not know
            if made.stat().st_mtime < newest:
                made.unlink()
        try:
            super().build_extensions()
        except Exception as error:
            if strict():
                raise
            report(f"the native extension was NOT built ({error}); plain PyTorch will serve every call")
            self.extensions = []


def glibc_minor(library: Path) -> int | None:
    """y of the oldest glibc 2.y that has every symbol this library asks for; None if it asks for none."""
    return max(map(int, re.findall(rb"\0GLIBC_2\.(\d+)", library.read_bytes())), default=None)


class Wheel(bdist_wheel):
    """One wheel for all Pythons (the limited ABI), named by the oldest glibc that can load its extension."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        for library in Path(self.bdist_dir).glob("kdkernels/_C*.so"):  # one, or none where a compiler failed
            minor = glibc_minor(library)
            if minor is not None and platform.startswith("linux_"):
                platform = f"manylinux_2_{minor}_{platform.removeprefix('linux_')}"
        return python, abi, platform


# ninja may be beside Python only, in an environment that is not activated.
os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
for name in ("CC", "CXX"):  # compilers that setuptools and torch take from the environment, empty or not
    if setting(name) is None:
        os.environ.pop(name, None)
reason = missing()
with_extension = reason is None or strict()
# Python without its global lock has no limited ABI; a wheel without the extension is for every platform.
limited = with_extension and not sysconfig.get_config_var("Py_GIL_DISABLED")
if not with_extension:
    report(f"native extension: none, {reason}")
setup(
    version=version(),
    packages=["kdkernels", "kdkernels.compat", "kdkernels.triton_kernels"],
    package_dir={"kdkernels.triton_kernels": "triton_kernels"},
    package_data={"kdkernels": ["py.typed"]},
    ext_modules=[extension()] if with_extension else [],
    cmdclass={"build_ext": Build.with_options(use_ninja=True), "bdist_wheel": Wheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if limited else {},
)
