"""The k best classes of each sample, without sorting: the value they reach and, among equals, the last index taken.

Classes are ranked by :func:`ranked`. Values of whole rows have one entry a tile, one tile after the other; ``classes``
are those of the first one, so that those of the others take no registers.
"""

import triton
import triton.language as tl
from kdkernels.triton_kernels.stats import maxima, place_maxima

#: Up to here the best values are found one after the other; beyond, bisection takes fewer passes over the tiles.
FEW = tl.constexpr(32)


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


@triton.constexpr_function
def least_key(dtype):
    """Less than any number's key."""
    return -(2 ** (dtype.primitive_bitwidth - 1))


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
    """How many classes of each row reach its bound, counted in float32: compilers make bits of integers."""
    number = tl.where(values[0] >= bound[:, None], 1.0, 0.0)
    for c in tl.static_range(1, len(values)):
        number += tl.where(values[c] >= bound[:, None], 1.0, 0.0)
    return tl.sum(number, 1).to(tl.int32)


@triton.jit
def next_below(values, bound):
    """``(the largest value of each row below its bound, how many are not below it)``."""
    below = tl.full(values[0].shape, float("-inf"), values[0].dtype)
    others = tl.zeros(values[0].shape, tl.float32)
    for c in tl.static_range(len(values)):
        is_below = values[c] < bound[:, None]
        below = tl.maximum(below, tl.where(is_below, values[c], float("-inf")))
        others += tl.where(is_below, 0.0, 1.0)
    return tl.max(below, 1), tl.sum(others, 1).to(tl.int32)


@triton.jit
def next_above(values, bound):
    """``(the least value of each row above its bound, how many are above it)``."""
    above = tl.full(values[0].shape, float("inf"), values[0].dtype)
    others = tl.zeros(values[0].shape, tl.float32)
    for c in tl.static_range(len(values)):
        is_above = values[c] > bound[:, None]
        above = tl.minimum(above, tl.where(is_above, values[c], float("inf")))
        others += tl.where(is_above, 1.0, 0.0)
    return tl.min(above, 1), tl.sum(others, 1).to(tl.int32)


@triton.jit
def next_equal(values, classes, bound, last):
    """The index of each row's first class after ``last`` that equals the bound."""
    TILES: tl.constexpr = len(values)
    PLACES: tl.constexpr = values[0].shape[1]
    tile = tl.full(values[0].shape, TILES, tl.int32)
    for c in tl.static_range(TILES):
        equal = (values[c] == bound[:, None]) & (classes[None, :] > (last - c * PLACES)[:, None])
        tile = tl.where(equal & (tile == TILES), c, tile)
    return tl.min(tl.where(tile < TILES, classes[None, :] + tile * PLACES, 0x7FFFFFFF), 1)


@triton.jit
def descend(values, k, best):
    """``(the k-th largest value of each row, how many reach it)``, from the best value down."""
    bound = best
    candidate = best
    reached = tl.zeros(best.shape, tl.int32)
    while tl.min(reached, 0) < k:
        bound = tl.where(reached < k, candidate, bound)
        candidate, reached = next_below(values, bound)
    return bound, reached


@triton.jit
def ascend(values, k, bound):
    """The same from values up that at least k reach."""
    candidate, above = next_above(values, bound)
    while tl.max(above, 0) >= k:
        bound = tl.where(above >= k, candidate, bound)
        candidate, above = next_above(values, bound)
    return bound, count_reaching(values, bound)


@triton.jit
def bisect(values, k, least, best):
    """``(a value from the least on that k of each row reach, how many do)``, the k-th largest if more than k do."""
    low, high = key_of(least), key_of(best)
    reached = count_reaching(values, least)
    searching = (reached != k) & (low < high)
    while tl.max(searching.to(tl.int32), 0) > 0:
        middle = middle_of(low, high)
        reach = count_reaching(values, value_of(middle))
        low = tl.where(searching & (reach >= k), middle, low)
        reached = tl.where(searching & (reach >= k), reach, reached)
        high = tl.where(searching & (reach < k), middle - 1, high)
        searching = (reached != k) & (low < high)
    return value_of(low), reached


@triton.jit
def last_equal(values, classes, bound, k):
    """The index up to which k of each row reach the bound, which more than k reach: the first ones that equal it."""
    _, above = next_above(values, bound)
    missing = k - above
    last = tl.full(bound.shape, -1, tl.int32)
    if k <= FEW:
        while tl.max(missing, 0) > 0:
            last = tl.where(missing > 0, next_equal(values, classes, bound, last), last)
            missing -= 1
    else:
        first = tl.zeros(bound.shape, tl.int32)
        last += len(values) * values[0].shape[1]
        while tl.max((first < last).to(tl.int32), 0) > 0:
            middle = first + (last - first) // 2
            equals = tl.zeros(values[0].shape, tl.float32)
            for c in tl.static_range(len(values)):
                inside = classes[None, :] <= (middle - c * values[0].shape[1])[:, None]
                equals += tl.where((values[c] == bound[:, None]) & inside, 1.0, 0.0)
            enough = tl.sum(equals, 1).to(tl.int32) >= missing
            searching = first < last
            last = tl.where(searching & enough, middle, last)
            first = tl.where(searching & (enough == 0), middle + 1, first)
    return last


@triton.jit
def select(values, classes, k):
    """``(bound, last)``: the k best of each row are those of a larger value and its equals up to index ``last``.

    The k-th largest of the maxima over tiles, one a place in a tile, is reached by k classes, and seldom by more: so
    much less is left to search than whole rows.
    """
    PLACES: tl.constexpr = values[0].shape[1]
    best = maxima(values)
    least = tl.full(best.shape, float("-inf"), best.dtype)
    if k <= FEW:
        if len(values) > 1 and PLACES >= FEW:
            least, _ = descend((place_maxima(values),), k, best)
            bound, reached = ascend(values, k, least)
        else:
            bound, reached = descend(values, k, best)
    else:
        if len(values) > 1:
            least, _ = bisect((place_maxima(values),), k, least, best)
        bound, reached = bisect(values, k, least, best)
    last = tl.full(best.shape, 0x7FFFFFFF, tl.int32)
    if tl.max(reached, 0) > k:
        last = tl.where(reached > k, last_equal(values, classes, bound, k), last)
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
    return next_equal(values, classes, best, tl.full(best.shape, -1, tl.int32))
