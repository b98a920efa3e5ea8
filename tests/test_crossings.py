"""Every pair of features in one call at least: a covering array of what calls differ in.

A fault that needs two features at once escapes tests of one feature each. The array is built greedily and is the same
every time; features that meet in a kernel's inner code are crossed in triples as well.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import combinations, product
from typing import Any

import pytest
from crossings import BF16, F16, F32, F64, LAYOUTS, PARTITIONS, Crossing, check_crossing, check_reference, legal
from helpers import INTERPRETED

FEATURES: dict[str, tuple[Any, ...]] = {
    "partition": tuple(PARTITIONS),
    "standardize": (None, "class", "sample"),
    # No divergence; groups of one class; a rest of one; around 64, up to which rows are transposed; tails; long rows.
    "classes": (1, 2, 3, 10, 64, 65, 100, 1000),
    # No deviation; fewer than lanes; a tile of pixels and one.
    "samples": (1, 3, 65),
    "layout": LAYOUTS,
    "dtypes": ((F32, F32), (F16, F16), (BF16, BF16), (F32, BF16), (F16, F32), (F64, F64), (F32, F64)),
    "reduction": ("mean", "batchmean", "sum", "none", "number", "tensor"),
    "mask": ("none", "ignore_index", "sample_weight", "both", "all"),
    "masked": ("none", "both", "teacher", "lowest"),
    "temperature": (0.5, 1.0, 2.0, 3.0, 4.0, 50.0),
    "ratio": (1.0, 2.0, 0.3),
    "upstream": ("ones", "random", "strided", "expanded", "inf"),
    "direction": ("forward", "reverse", "both", "mixed"),
    "k": ("least", "some", "most"),
    "mode": ("fused", "recompute", "no_grad"),
    "ce_weight": (0.0, 0.45),
    "offset": (0.0, 1e4),
    "padded": (False, True),
    "square_temperature": (True, False),
    "gap": (None, 1e-3),
    "eps": (None, 0.0),
}
#: Crossed in triples.
CORE = ("partition", "standardize", "layout", "direction", "k", "masked", "mode")

Chosen = tuple[tuple[str, Any], ...]


def combinations_to_cover() -> set[Chosen]:
    """All legal pairs of values of two features, and triples of the core's."""
    names = [*combinations(FEATURES, 2), *combinations([name for name in FEATURES if name in CORE], 3)]
    chosen = (tuple(zip(keys, values, strict=True)) for keys in names for values in product(*map(FEATURES.get, keys)))
    return {pairs for pairs in chosen if legal(dict(pairs))}


def covered_by(row: dict[str, Any]) -> Iterable[Chosen]:
    """The combinations of :func:`combinations_to_cover` among a row's values."""
    yield from combinations(row.items(), 2)
    yield from combinations(((name, value) for name, value in row.items() if name in CORE), 3)


def _completed(start: Chosen, left: set[Chosen], random_numbers: random.Random) -> dict[str, Any] | None:
    """A row with these values and, one feature after another, the values that cover most; None at a dead end."""
    row = dict(start)
    for name in random_numbers.sample([name for name in FEATURES if name not in row], len(FEATURES) - len(row)):
        best = []
        for value in random_numbers.sample(FEATURES[name], len(FEATURES[name])):
            if legal(row | {name: value}):
                before = ((item, (name, value)) for item in row.items() if ORDER[item[0]] < ORDER[name])
                behind = (((name, value), item) for item in row.items() if ORDER[item[0]] > ORDER[name])
                best.append((sum(pair in left for pair in (*before, *behind)), len(best), value))
        if not best:
            return None
        row[name] = max(best, key=lambda entry: entry[:2])[2]
    return {name: row[name] for name in FEATURES}


ORDER = {name: index for index, name in enumerate(FEATURES)}


def covering_array() -> list[Crossing]:
    """Crossings that contain every combination that is legal at all; always the same ones."""
    random_numbers = random.Random(0)
    left, array = combinations_to_cover(), []
    waiting = sorted(left, key=repr)
    random_numbers.shuffle(waiting)
    for start in waiting:
        if start not in left:
            continue
        rows = [row for row in (_completed(start, left, random_numbers) for _ in range(3)) if row]
        assert rows, f"no row has {start}: it is not legal after all"
        row = max(rows, key=lambda row: sum(chosen in left for chosen in covered_by(row)))
        left.difference_update(covered_by(row))
        array.append(Crossing(**row, seed=len(array)))
    return array


ARRAY = covering_array()


@pytest.mark.whole
@pytest.mark.parametrize("index", range(len(ARRAY)))
def test_crossing(index: int, native_backend: str) -> None:
    check_crossing(ARRAY[index], native_backend)


@pytest.mark.skipif(INTERPRETED, reason="of the reference only")
@pytest.mark.parametrize("index", range(len(ARRAY)))
def test_the_reference_itself(index: int) -> None:
    """What all backends are held to is right: the oracle's formulas, sums and chain rules give the same."""
    check_reference(ARRAY[index])
