"""What compilers and simulators keep of the tests so far, which a worker would hold to its end: gigabytes."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
from pathlib import Path

_STATM = Path("/proc/self/statm")


def resident_bytes() -> int:
    """Memory of this process; 0 where the system does not say so here."""
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if _STATM.exists() else 0


def free() -> None:
    """Gives it back to the system. What is wanted again is compiled, or read from a disk's cache, again."""
    for name, module in list(sys.modules.items()):
        if name.startswith("kdkernels.triton_kernels"):
            for value in vars(module).values():
                # Kernels as they were compiled for each signature, behind decorators.
                while value is not None:
                    if hasattr(value, "device_caches"):
                        value.device_caches.clear()
                    value = getattr(value, "fn", None)  # noqa: PLW2901
    for name, function in (("cuda_simulator", "module_of"), ("ptxsim.triton_driver", "_module_of")):
        if name in sys.modules:
            getattr(sys.modules[name], function).cache_clear()
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # else freed memory stays with the process, in pieces
