"""Fixtures of the whole suite."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from typing import Any

import caches
import numpy as np
import pytest
import torch
from covering import covering, quickest
from helpers import (
    BACKENDS,
    CPU_PATHS,
    GPU_BACKENDS,
    INTERPRETED,
    NATIVE_BACKENDS,
    NATIVE_PATHS,
    PATHS,
    Path,
    name_of,
    require,
    served,
)
from ptxsim.verified import FOLDER as SIMULATOR
from ptxsim.verified import is_verified


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of tests/test_fuzz.py."""
    group = parser.getgroup("fuzz", "random cases (pytest -m fuzz)")
    group.addoption("--fuzz-cases", type=int, default=300, help="number of random cases; 300 by default")
    group.addoption("--fuzz-seed", type=int, default=0, help="another seed, other cases; 0 by default")


def pytest_configure(config: pytest.Config) -> None:
    """A worker computes in one thread: there is one for each core already."""
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what does not run by default, and under Triton's interpreter all but its own tests."""
    left_out = [name for name in ("large", "cuda") if name not in config.getoption("markexpr")]
    if not GPU_BACKENDS:
        left_out.append("gpu")
    if is_verified() and not _asks_for_the_simulator(config):
        left_out.append("simulator")
    for item in items:
        if SIMULATOR in item.path.parents:
            item.add_marker("simulator")
    chosen = [item for item in items if not any(map(item.get_closest_marker, left_out))]
    of_gpus = ["triton"] if INTERPRETED else GPU_BACKENDS
    chosen = [item for item in chosen if not item.get_closest_marker("of_gpus") or backend_of(item) in of_gpus]
    chosen = [item for item in chosen if not (backend_of(item) == "cpu" and is_double(item))]
    if INTERPRETED:
        chosen = [item for item in chosen if backend_of(item) == "triton"]
    for item in chosen:
        item.add_marker("full")
    named = any("::" in argument for argument in config.args)
    if not (named or "full" in config.getoption("markexpr")):
        default = covering(chosen)
        chosen = [item for item in chosen if item in default]
    for item in quickest(chosen):
        item.add_marker("quick")
    config.hook.pytest_deselected(items=list(set(items) - set(chosen)))
    items[:] = chosen


def _asks_for_the_simulator(config: pytest.Config) -> bool:
    """Whether the simulator's own tests are asked for, by a mark or by their path."""
    marks = config.getoption("markexpr")
    return "simulator" in marks or "full" in marks or any(SIMULATOR.name in argument for argument in config.args)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """What tests had compiled is freed between files, and in one that has much of it."""
    if nextitem is None or nextitem.path != item.path or caches.resident_bytes() > 1.5e9:
        caches.free()


def backend_of(item: pytest.Item) -> str | None:
    """The backend that is among a test's parameters, by itself or in a path."""
    parameters = getattr(item, "callspec", None)
    names = [getattr(value, "backend", value) for value in parameters.params.values()] if parameters else []
    return next((name for name in names if isinstance(name, str) and name in BACKENDS), None)


def is_double(item: pytest.Item) -> bool:
    """Whether a test asks for float64 logits, which the CPU kernels leave to the reference."""
    parameters = getattr(item, "callspec", None)
    values = list(parameters.params.values()) if parameters else []
    return any(torch.float64 in (value if isinstance(value, tuple) else (value,)) for value in values)


@pytest.fixture(autouse=True, scope="session")
def interpreter() -> None:
    """Triton's interpreter cuts float32 off to bfloat16; GPUs round, and so does it here.

    And it prepares Triton's language anew for each call of a device function, which takes as long as the kernels do:
    once will do, as nothing else runs here. Of several threads one has to wait for another: it has one current program.
    """
    if not INTERPRETED:
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    bfloat16 = importlib.import_module("triton.language").bfloat16
    cast = interpreter.InterpreterBuilder.cast_impl

    def rounded(self: Any, source: Any, to: Any) -> Any:
        if to.scalar != bfloat16 or not np.issubdtype(source.data.dtype, np.floating):
            return cast(self, source, to)
        values = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16).view(torch.uint16)
        return interpreter.TensorHandle(values.numpy().reshape(source.data.shape), to.scalar)

    interpreter.InterpreterBuilder.cast_impl = rounded
    for name in ("create_fp_trunc", "create_fp_ext"):
        setattr(interpreter.InterpreterBuilder, name, rounded)
    execute, lock = interpreter.GridExecutor.__call__, threading.Lock()

    def alone(*args: Any, **kwargs: Any) -> None:
        with lock:
            execute(*args, **kwargs)

    interpreter.GridExecutor.__call__ = alone
    patch, unchanged = interpreter._patch_lang, interpreter._LangPatchScope()
    seen: dict[int, Any] = {}  # the globals of each module that has been prepared

    def patch_once(function: Any) -> Any:
        if id(function.__globals__) not in seen:
            patch(function)
            seen[id(function.__globals__)] = function.__globals__
        return unchanged

    interpreter._patch_lang = patch_once


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fresh memory holds NaN (the largest number for integers), in C++ too, so that an unwritten output shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def gpu_memory() -> Iterator[None]:
    """What torch keeps of a GPU's memory after a test that took much is given back: other processes test there, too."""
    yield
    if GPU_BACKENDS and torch.cuda.memory_reserved() > 1 << 30:
        torch.cuda.empty_cache()


@pytest.fixture(params=PATHS, ids=name_of)
def path(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Every backend and mode."""
    with served(request.param.backend):
        yield request.param


@pytest.fixture(params=[path for path in PATHS if path.backend != "cpu"], ids=name_of)
def double_path(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Every backend that computes in float64 where the logits are float64, in every mode."""
    with served(request.param.backend):
        yield request.param


@pytest.fixture(params=NATIVE_PATHS, ids=name_of)
def native_path(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Every backend with kernels, in every mode: for promises that plain PyTorch does not make."""
    with served(request.param.backend):
        yield request.param


@pytest.fixture(params=CPU_PATHS, ids=name_of)
def cpu_path(request: pytest.FixtureRequest) -> Path:
    """The CPU kernels in every mode: for what only they do, as sharing work between threads."""
    require(request.param.backend)
    return request.param


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend, in its default mode."""
    with served(request.param):
        yield request.param


@pytest.fixture(params=NATIVE_BACKENDS)
def native_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend with kernels, for tests that say the mode."""
    with served(request.param):
        yield request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """The test may change torch's thread count."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
