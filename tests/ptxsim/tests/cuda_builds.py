"""The CUDA kernels of these tests, compiled once a process."""

from functools import cache
from pathlib import Path

import pytest
from ptxsim import nvcc

KERNELS = Path(__file__).with_name("kernels.cu")
#: Architecture and flags: without and with clusters, precise and fast arithmetic.
BUILDS = {"sm_80": (), "sm_90": (), "sm_100-fast": ("--use_fast_math",)}

needs_nvcc = pytest.mark.skipif(not nvcc.available(), reason="nvcc is not on the path")


@cache
def build_of(name: str) -> nvcc.CudaModule:
    return nvcc.CudaModule(KERNELS, arch=name.split("-", maxsplit=1)[0], flags=BUILDS[name])
