"""The k best classes of each sample, without sorting: the value they reach and, among equals, the last index taken.

Classes are ranked by :func:`ranked`. Values and classes of whole rows have one entry a tile.
"""

import triton
import triton.language as tl
from kdkernels.triton_kernels.stats import maxima

#: Up to here the best values are found one after the other; beyond, bisection takes fewer passes over the tiles.
FEW = tl.constexpr(16)


@triton.jit
def ranked(logits, there, LARGEST: tl.constexpr):
    """What classes are ranked by: the larger, the better. What is not there comes last."""
    if LARGEST:
        return logits
    else:
        return tl.where(there, -logits, float("-inf"))


@triton.jit
def key_of(values):
    """Integers in the order of the values; -0 is 0."""
    DOUBLE: tl.constexpr = values.dtype == tl.float64
    bits = (values + 0.0).to(tl.int64 if DOUBLE else tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ (0x7FFFFFFFFFFFFFFF if DOUBLE else 0x7FFFFFFF), bits)


@triton.jit
def value_of(key):
    """The opposite of :func:`key_of`."""
    DOUBLE: tl.constexpr = key.dtype == tl.int64
    bits = tl.where(key < 0, key ^ (0x7FFFFFFFFFFFFFFF if DOUBLE else 0x7FFFFFFF), key)
    return bits.to(tl.float64 if DOUBLE else tl.float32, bitcast=True)


@triton.jit
def middle_of(low, high):
    """Their mean, rounded up, without overflow."""
    return (low | high) - ((low ^ high) >> 1)


@triton.jit
def count_reaching(values, bound):
    """How many classes of each row reach its bound."""
    number = (values[0] >= bound[:, None]).to(tl.int32)
    for c in tl.static_range(1, len(values)):
        number += (values[c] >= bound[:, None]).to(tl.int32)
    return tl.sum(number, 1)


@triton.jit
def next_below(values, bound):
    """``(the largest value of each row below its bound, how many are not below it)``."""
    below = tl.full(values[0].shape, float("-inf"), values[0].dtype)
    others = tl.zeros(values[0].shape, tl.int32)
    for c in tl.static_range(len(values)):
        is_below = values[c] < bound[:, None]
        below = tl.maximum(below, tl.where(is_below, values[c], float("-inf")))
        others += (is_below == 0).to(tl.int32)
    return tl.max(below, 1), tl.sum(others, 1)


@triton.jit
def bisect(values, k, best):
    """``(a value that k of each row reach, how many do)``, the k-th largest if more than k reach it."""
    low = key_of(tl.full(best.shape, float("-inf"), best.dtype))
    high = key_of(best)
    reached = tl.full(best.shape, values[0].shape[1] * len(values), tl.int32)
    searching = low < high
    while tl.max(searching.to(tl.int32), 0) > 0:
        middle = middle_of(low, high)
        reach = count_reaching(values, value_of(middle))
        low = tl.where(searching & (reach >= k), middle, low)
        reached = tl.where(searching & (reach >= k), reach, reached)
        high = tl.where(searching & (reach < k), middle - 1, high)
        searching = (reached != k) & (low < high)
    return value_of(low), reached


@triton.jit
def first_equals(values, classes, bound, k):
    """The index up to which k of each row reach the bound, which more than k reach: the first ones that equal it."""
    above = tl.zeros(values[0].shape, tl.int32)
    first = tl.full(values[0].shape, 0x7FFFFFFF, tl.int32)
    last = tl.zeros(values[0].shape, tl.int32)
    for c in tl.static_range(len(values)):
        equal = values[c] == bound[:, None]
        above += (values[c] > bound[:, None]).to(tl.int32)
        first = tl.minimum(first, tl.where(equal, classes[c][None, :], 0x7FFFFFFF))
        last = tl.maximum(last, tl.where(equal, classes[c][None, :], 0))
    first, last = tl.min(first, 1), tl.max(last, 1)
    missing = k - tl.sum(above, 1)
    while tl.max((first < last).to(tl.int32), 0) > 0:
        middle = first + (last - first) // 2
        equals = tl.zeros(values[0].shape, tl.int32)
        for c in tl.static_range(len(values)):
            equals += ((values[c] == bound[:, None]) & (classes[c][None, :] <= middle[:, None])).to(tl.int32)
        enough = tl.sum(equals, 1) >= missing
        searching = first < last
        last = tl.where(searching & enough, middle, last)
        first = tl.where(searching & (enough == 0), middle + 1, first)
    return last


@triton.jit
def select(values, classes, k):
    """``(bound, last)``: the k best of each row are those of a larger value and its equals up to index ``last``."""
    best = maxima(values)
    bound = best
    if k <= FEW:
        reached = tl.zeros(best.shape, tl.int32)
        candidate = best
        while tl.min(reached, 0) < k:
            bound = tl.where(reached < k, candidate, bound)
            candidate, reached = next_below(values, bound)
    else:
        bound, reached = bisect(values, k, best)
    last = tl.full(best.shape, 0x7FFFFFFF, tl.int32)
    if tl.max(reached, 0) > k:
        last = tl.where(reached > k, first_equals(values, classes, bound, k), last)
    return bound, last


@triton.jit
def leads(values, classes, bound, last):
    """Whether each class is among the best, from what :func:`select` found."""
    above = value_of(key_of(bound) + 1)
    return values >= tl.where(classes[None, :] <= last[:, None], bound[:, None], above[:, None])


@triton.jit
def first_best(values, classes):
    """The index of each row's best class."""
    best = maxima(values)
    index = tl.where(values[0] == best[:, None], classes[0][None, :], 0x7FFFFFFF)
    for c in tl.static_range(1, len(values)):
        index = tl.minimum(index, tl.where(values[c] == best[:, None], classes[c][None, :], 0x7FFFFFFF))
    return tl.min(index, 1)
