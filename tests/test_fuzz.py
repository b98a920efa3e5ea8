"""Random calls, extremes among them, held to the float64 reference.

``pytest -m fuzz --fuzz-cases 5000 --fuzz-seed 7`` runs more of them than the whole suite does. A failure names the case
by seed and index, and by the Crossing itself.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from crossings import LAYOUTS, PARTITIONS, Crossing, check_crossing, legal
from test_crossings import FEATURES

pytestmark = [pytest.mark.fuzz, pytest.mark.whole]
#: The documented range of temperatures.
TEMPERATURES = (1e-6, 1e6)


def crossing_of(seed: int, index: int) -> Crossing:
    """The case of a number: always the same."""
    numbers = random.Random(f"{seed}-{index}")
    while True:
        features = _features(numbers)
        if legal(features):
            return Crossing(**features, seed=index)


def _features(numbers: random.Random) -> dict[str, Any]:
    """A value of each feature: one of the covering array's or, for numbers, one of a wider range.

    A feature is plain half the time, so that most calls are accepted by :func:`legal` and none hides what another does.
    """
    features = {
        name: numbers.choice(values) if numbers.random() < 0.5 else values[0] for name, values in FEATURES.items()
    }
    features["partition"], features["layout"] = numbers.choice(tuple(PARTITIONS)), numbers.choice(LAYOUTS)
    features["standardize"] = numbers.choice(FEATURES["standardize"])
    features["samples"] = numbers.choice((1, 2, numbers.randint(3, 40), numbers.randint(8, 70), 300))
    features["classes"] = numbers.choice((numbers.randint(1, 5), round(2 ** numbers.uniform(0, 11.5))))
    if features["samples"] == 300:
        features["classes"] = min(features["classes"], 200)
    features["temperature"] = numbers.choice((*FEATURES["temperature"], _log_uniform(numbers, *TEMPERATURES)))
    features["ratio"] = numbers.choice((1.0, numbers.uniform(0.3, 3.0)))
    if features["standardize"]:
        # Standardised logits are rounded, and a temperature divides the rounding, too.
        features["temperature"] = max(features["temperature"], 0.02)
    least, most = (limit / features["temperature"] for limit in TEMPERATURES)
    features["ratio"] = min(max(features["ratio"], least * (1 + 1e-12)), most * (1 - 1e-12))
    features["spread"] = numbers.choice((3.0, _log_uniform(numbers, 1e-3, 1e4)))
    features["gap"] = numbers.choice((None, None, _log_uniform(numbers, 1e-4, 1.0)))
    features["offset"] = numbers.choice((0.0, 0.0, numbers.uniform(-1e4, 1e4)))
    return features


def _log_uniform(numbers: random.Random, least: float, most: float) -> float:
    return float(f"{least * (most / least) ** numbers.random():.3g}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("index", range(metafunc.config.getoption("fuzz_cases")))


def test_random_call(index: int, native_backend: str, request: pytest.FixtureRequest) -> None:
    seed = request.config.getoption("fuzz_seed")
    try:
        check_crossing(crossing_of(seed, index), native_backend)
    except Exception as error:
        raise AssertionError(f"--fuzz-seed {seed}, index {index}: {error}") from error
