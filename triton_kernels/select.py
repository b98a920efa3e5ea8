"""The k best classes of each sample, without sorting: the key of the k-th and, among equals, the last index taken."""

import triton
import triton.language as tl

#: Keys below that of -inf, for classes that are not there.
NO_KEY = tl.constexpr(-(1 << 31))
NO_KEY_DOUBLE = tl.constexpr(-(1 << 63))
CHUNK = tl.constexpr(8)


@triton.jit
def keys_of(logits, there, LARGEST: tl.constexpr):
    """Integers in the order of the logits (of their opposites for the smallest): NaN first, then inf; -0 is 0."""
    DOUBLE: tl.constexpr = logits.dtype == tl.float64
    INTEGER: tl.constexpr = tl.int64 if DOUBLE else tl.int32
    HIGHEST: tl.constexpr = 0x7FFFFFFFFFFFFFFF if DOUBLE else 0x7FFFFFFF
    value = (logits if LARGEST else -logits) + 0.0
    bits = value.to(INTEGER, bitcast=True)
    keys = tl.where(bits < 0, bits ^ HIGHEST, bits)
    keys = tl.where(logits != logits, HIGHEST, keys)
    return tl.where(there, keys, NO_KEY_DOUBLE if DOUBLE else NO_KEY)


@triton.jit
def count_reaching(keys, bound):
    """How many keys of each row are not below ``bound``."""
    count = (keys[0] >= bound[:, None]).to(tl.int32)
    for c in tl.static_range(1, len(keys)):
        count += (keys[c] >= bound[:, None]).to(tl.int32)
    return tl.sum(count, 1)


@triton.jit
def threshold(keys, k, low, high):
    """The k-th largest key of each row, or another number that exactly k keys reach: ``(it, how many reach it)``.

    It lies between ``low`` and ``high``. At least k keys must reach ``low``, else the result is ``low``.
    """
    count = count_reaching(keys, low)
    searching = (count != k) & (low < high)
    while tl.max(searching.to(tl.int32), 0) > 0:
        middle = (low | high) - ((low ^ high) >> 1)  # the mean, rounded up, without overflow
        reach = count_reaching(keys, middle)
        enough = reach >= k
        low = tl.where(searching & enough, middle, low)
        count = tl.where(searching & enough, reach, count)
        high = tl.where(searching & (reach < k), middle - 1, high)
        searching = (count != k) & (low < high)
    return low, count


@triton.jit
def largest_of(keys):
    """The largest keys of each row at each place of its tiles."""
    largest = keys[0]
    for c in tl.static_range(1, len(keys)):
        largest = tl.maximum(largest, keys[c])
    return largest


@triton.jit
def select(keys, classes, k):
    """``(key, last)``: the k best of each row are those of a larger key, and those of this key up to index ``last``.

    ``keys`` and ``classes`` have one entry a tile.
    """
    ROWS: tl.constexpr = keys[0].shape[0]
    SIZE: tl.constexpr = keys[0].shape[1]
    HIGHEST: tl.constexpr = 0x7FFFFFFF
    low = tl.full([ROWS], -0x7FFFFFFF if keys[0].dtype == tl.int32 else -0x7FFFFFFFFFFFFFFF, keys[0].dtype)
    # The k-th largest of the maxima of some chunks is reached by k keys, and rarely by many more.
    largest = largest_of(keys)
    if SIZE > CHUNK:
        largest = tl.max(tl.reshape(largest, [ROWS, SIZE // CHUNK, CHUNK]), 2)
    high = tl.max(largest, 1)
    low, _ = threshold((largest,), k, low, high)
    key, count = threshold(keys, k, low, high)
    last = tl.full([ROWS], HIGHEST, tl.int32)
    if tl.max(count, 0) > k:
        # Of equal keys the first ones: the largest of their negated indices.
        above = tl.where(key == high, 0, count_reaching(keys, tl.where(key == high, key, key + 1)))
        negated = ()
        for c in tl.static_range(len(keys)):
            negated = negated + (tl.where(keys[c] == key[:, None], -classes[c][None, :], -HIGHEST),)
        least, _ = threshold(
            negated, k - above, tl.full([ROWS], -HIGHEST + 1, tl.int32), tl.max(largest_of(negated), 1)
        )
        last = tl.where(count > k, -least, last)
    return key, last


@triton.jit
def leads(keys, classes, key, last):
    """Whether each class is among the best, from what :func:`select` found."""
    return (keys > key[:, None]) | ((keys == key[:, None]) & (classes[None, :] <= last[:, None]))


@triton.jit
def first_best(keys, classes):
    """The index of each row's best class."""
    best = tl.max(largest_of(keys), 1)
    index = tl.where(keys[0] == best[:, None], classes[0][None, :], 0x7FFFFFFF)
    for c in tl.static_range(1, len(keys)):
        index = tl.minimum(index, tl.where(keys[c] == best[:, None], classes[c][None, :], 0x7FFFFFFF))
    return tl.min(index, 1)
