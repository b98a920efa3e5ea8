"""Fixtures of the whole suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers import BACKENDS, NATIVE_PATHS, PATHS, Path, name_of, require


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests marked ``large`` unless ``-m`` asks for them."""
    if "large" in config.getoption("markexpr"):
        return
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("large")])
    items[:] = [item for item in items if not item.get_closest_marker("large")]


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fresh memory holds NaN (the largest number for integers), in C++ too, so that an unwritten output shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(params=PATHS, ids=name_of)
def path(request: pytest.FixtureRequest) -> Path:
    """Every backend and mode."""
    require(request.param.backend)
    return request.param


@pytest.fixture(params=NATIVE_PATHS, ids=name_of)
def native_path(request: pytest.FixtureRequest) -> Path:
    """Every backend with kernels, in every mode: for promises that plain PyTorch does not make."""
    require(request.param.backend)
    return request.param


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend, in its default mode."""
    require(request.param)
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """The test may change torch's thread count."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
