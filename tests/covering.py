"""Which cases of a test run by default: together every value of every parameter, not every combination.

A test function with several parameters is a product of cases, most of which say the same. By default so many run that
each value of each parameter occurs, combined at random, and differently in each function; pairs of features are crossed
on purpose by test_crossings.py. ``pytest -m full`` runs the whole products, and a test asked for by name runs whole.
"""

from __future__ import annotations

import random
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

import pytest


def covering(items: Sequence[pytest.Item]) -> set[pytest.Item]:
    """Of each test function as few cases as have all values of its parameters; the same ones every time."""
    functions: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        functions[item.nodeid.partition("[")[0]].append(item)
    chosen: set[pytest.Item] = set()
    for name, cases in functions.items():
        chosen |= _cover(cases, random.Random(zlib.crc32(name.encode())))
    return chosen


def _cover(cases: list[pytest.Item], order: random.Random) -> set[pytest.Item]:
    """Greedily the case with most values that are new; all of a test that is marked whole."""
    if not hasattr(cases[0], "callspec") or cases[0].get_closest_marker("whole"):
        return set(cases)
    values = {case: {(name, id(value)) for name, value in case.callspec.params.items()} for case in cases}
    left = set().union(*values.values())
    cases = sorted(cases, key=lambda case: order.random())
    chosen: set[pytest.Item] = set()
    while left:
        best = max(cases, key=lambda case: len(values[case] & left))
        chosen.add(best)
        left -= values[best]
    return chosen


#: Files whose tests run in seconds and together touch every loss, backend and seam.
QUICK = (
    "losses",
    "semantics",
    "autograd",
    "transforms",
    "standardize",
    "pixels",
    "ops",
    "modules",
    "dispatch",
    "compat",
)
QUICK += ("distributed", "fuzz", "cuda_plan", "triton_launch", "simulator")


#: Of what is slow, simulators and processes, so many.
FEW_OF = {"simulator": 9, "distributed": 3}


def quickest(items: Sequence[pytest.Item]) -> Iterator[pytest.Item]:
    """One case of each test function of the quick files, of test_losses.py one of each loss."""
    seen: dict[str, set[str]] = defaultdict(set)
    for item in items:
        file = item.path.stem.removeprefix("test_")
        what = item.nodeid.partition("[")[0]
        if file == "losses" and hasattr(item, "callspec"):
            what = str(item.callspec.params.get("case", what))
        if file in QUICK and what not in seen[file] and len(seen[file]) < FEW_OF.get(file, len(items)):
            seen[file].add(what)
            yield item
