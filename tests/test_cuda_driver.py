"""The CUDA backend's launches through the driver, where there is none: a stand-in writes down what is asked of it.

Host code without torch and kernels (csrc/cuda/driver.cpp), compiled by itself, finds it as it would the driver.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from ctypes.util import find_library
from pathlib import Path

import pytest
from ptxsim import nvcc

HERE = Path(__file__).parent / "cuda_driver"
SOURCES = HERE.parent.parent / "csrc"
IMAGES = ("f32", "f64", "f16", "bf16", "common")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What launches, and beside it the stand-in for the driver, in the folder ``driver``."""
    compiler = os.environ.get("CXX", "c++")
    if not nvcc.available() or shutil.which(compiler) is None:
        pytest.skip("needs the CUDA toolkit's headers and a C++ compiler")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver").mkdir()
    for image in IMAGES:
        (folder / f"{image}.fatbin").write_text(image)
    include = [f"-I{nvcc.toolkit() / 'include'}", f"-I{SOURCES}"]
    stand_in = ["-x", "c", "-shared", "-fPIC", str(HERE / "libcuda.c"), "-o", str(folder / "driver" / "libcuda.so.1")]
    macros = [f'-DKDK_IMAGES="{folder}"', '-DKDK_CUDA_TARGETS="80 90"']
    launches = [str(HERE / "launches.cpp"), str(SOURCES / "cuda/driver.cpp"), "-ldl", "-o", str(folder / "launches")]
    for arguments in (stand_in, ["-std=c++20", *macros, *launches]):
        subprocess.run([compiler, "-Wall", "-Wextra", "-Werror", *include, *arguments], check=True)
    return folder / "launches"


def output(program: Path, **environment: str) -> list[str]:
    driver = {"LD_LIBRARY_PATH": str(program.parent / "driver")}
    return subprocess.run(
        [program], env=driver | environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()


def test_what_is_asked_of_the_driver(program: Path) -> None:
    """The device's primary context, each image once, each kernel once, with all of the device's shared memory; each
    launch with its stream, parameters and, if it is one, cluster. Nothing is launched of no blocks."""
    assert output(program) == [
        "primary context of device 1",
        "device 90 232448 233472 132",
        "load bf16",
        "find kdk_forward_rows_bf16 in bf16",
        "up to 232448 bytes for kdk_forward_rows_bf16 on device 1",
        "launch kdk_forward_rows_bf16 grid 64 1 1 block 224 1 1 shared 51200 stream 42 parameter 7 cluster 8 1 1",
        "launch kdk_forward_rows_bf16 grid 16 1 1 block 128 1 1 shared 4096 stream 42 parameter 7",
        "load f16",
        "find kdk_backward_pixels_f16 in f16",
        "up to 232448 bytes for kdk_backward_pixels_f16 on device 1",
        "launch kdk_backward_pixels_f16 grid 16 1 1 block 128 1 1 shared 4096 stream 0 parameter 7",
        "load common",
        "find kdk_row_sum in common",
        "launch kdk_row_sum grid 1 1 1 block 32 1 1 shared 0 stream 42 parameter 7",
    ]


@pytest.mark.parametrize(
    ("function", "what"),
    [
        ("cuDevicePrimaryCtxRetain", "primary CUDA context"),
        ("cuDeviceGetAttribute", "CUDA device attribute"),
        ("cuLibraryLoadData", "loading CUDA kernels"),
        ("cuLibraryGetKernel", "kdk_forward_rows_bf16"),
        ("cuKernelSetAttribute", "kdk_forward_rows_bf16"),
        ("cuLaunchKernelEx", "kdk_forward_rows_bf16"),
    ],
)
def test_errors_name_what_failed(program: Path, function: str, what: str) -> None:
    assert output(program, FAILS=function)[-1] == f"error: {what}: too many resources requested for launch"


@pytest.mark.skipif(find_library("cuda") is not None, reason="there is a driver")
def test_no_driver(program: Path) -> None:
    (line,) = output(program, LD_LIBRARY_PATH="")
    assert re.match(r"error: no CUDA driver: libcuda\.so\.1", line)


def test_driver_without_a_function(program: Path) -> None:
    """An older driver, which has not all that launching takes."""
    library = program.parent / "old" / "libcuda.so.1"
    library.parent.mkdir()
    empty = ["-x", "c", "-shared", os.devnull, "-o", str(library)]
    subprocess.run([os.environ.get("CXX", "c++"), *empty], check=True)
    (line,) = output(program, LD_LIBRARY_PATH=str(library.parent))
    assert line == "error: the CUDA driver is too old: it has no cuGetErrorString"
