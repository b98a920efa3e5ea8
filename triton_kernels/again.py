"""Steps 1 and 3 of rows of which nothing but the logits fits on chip: masks and exponentials are computed twice.

Compilers would keep what was computed before, in registers that are not there, and work on all tiles at once. So each
pass reads the logits through ``nothing``, a number that is 0 and that the compiler does not know, and takes tile after
tile, each in a branch of its own, which also passes over tiles beyond the last class.
"""

import triton
import triton.language as tl
from kdkernels.triton_kernels.gradient import gradient_of
from kdkernels.triton_kernels.objective import by_rank
from kdkernels.triton_kernels.partition import masks_of
from kdkernels.triton_kernels.stats import (
    add_folded,
    exponentials,
    larger,
    logits_of_groups,
    origins_from,
    statistics_from,
    summands,
)


@triton.jit
def hold(logits, WIDE: tl.constexpr):
    """A tile to keep: in float32 or, where neighbours of 16 bits each belong to one thread, two in a register."""
    if logits.dtype.primitive_bitwidth == 16 and WIDE > 1:
        N: tl.constexpr = logits.shape[0]
        PAIRS: tl.constexpr = logits.shape[1] // 2
        low, high = tl.split(tl.reshape(logits.to(tl.uint16, bitcast=True), [N, PAIRS, 2]))
        return low.to(tl.uint32) | (high.to(tl.uint32) << 16)
    else:
        return logits.to(tl.float32)


@triton.jit
def logits_of(held, nothing, matrix):
    """The logits of a held tile of a matrix, in float32."""
    if held.dtype == tl.uint32:
        pairs = held | nothing.to(tl.uint32)
        low = pairs.to(tl.uint16).to(matrix.dtype.element_ty, bitcast=True)
        high = (pairs >> 16).to(tl.uint16).to(matrix.dtype.element_ty, bitcast=True)
        return tl.reshape(tl.join(low, high), [held.shape[0], 2 * held.shape[1]]).to(tl.float32)
    else:
        return held


@triton.jit
def look(held, matrices, row, nothing, c: tl.constexpr, KIND: tl.constexpr, LARGEST: tl.constexpr):
    """``(student, teacher, single, top)`` of tile ``c``; ``row``: ``(class_count, targets, found)``."""
    class_count, targets, found = row
    s, t = logits_of(held[0][c], nothing, matrices[0]), logits_of(held[1][c], nothing, matrices[1])
    begin = c * t.shape[1] + nothing.to(tl.int32)
    if by_rank(KIND):
        found = (found[0] + nothing, found[1] - begin, found[2] - begin)
    classes = tl.arange(0, t.shape[1])
    single, top = masks_of(t, classes, class_count - begin, targets - begin, found, KIND, LARGEST)
    return s, t, single, top


@triton.jit
def with_maxima(largest, tile, KIND: tl.constexpr):
    """Maxima over the tiles so far and this one, from :func:`look`."""
    s, t, single, top = tile
    return larger(largest, logits_of_groups(s, t, single, top, KIND))


@triton.jit
def with_sums(sums, tile, of_top, of_rest, k, KIND: tl.constexpr, FORWARD: tl.constexpr, REVERSE: tl.constexpr):
    """The sums likewise."""
    s, t, single, top = tile
    exps = exponentials(s, t, single, top, of_top, of_rest, k, KIND)
    return add_folded(sums, summands(exps, top, KIND, FORWARD, REVERSE))


@triton.jit
def statistics_again(
    held,
    matrices,
    row,
    k,
    nothing,
    KIND: tl.constexpr,
    LARGEST: tl.constexpr,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """``(statistics of top, statistics of rest)`` of whole rows in held tiles."""
    TILES: tl.constexpr = len(held[0])
    TILE: tl.constexpr = held[0][0].shape[1] * (2 if held[0][0].dtype == tl.uint32 else 1)
    largest = with_maxima((), look(held, matrices, row, nothing, 0, KIND, LARGEST), KIND)
    for c in tl.static_range(1, TILES):
        if c * TILE < row[0]:
            largest = with_maxima(largest, look(held, matrices, row, nothing, c, KIND, LARGEST), KIND)
    of_top, of_rest = origins_from(largest, k)
    nothing = 2 * nothing
    tile = look(held, matrices, row, nothing, 0, KIND, LARGEST)
    sums = with_sums((), tile, of_top, of_rest, k, KIND, FORWARD, REVERSE)
    for c in tl.static_range(1, TILES):
        if c * TILE < row[0]:
            of_tile = look(held, matrices, row, nothing, c, KIND, LARGEST)
            sums = with_sums(sums, of_tile, of_top, of_rest, k, KIND, FORWARD, REVERSE)
    return statistics_from(of_top, of_rest, sums, TILES, FORWARD, REVERSE)


@triton.jit
def gradient_again(
    held,
    matrices,
    row,
    stats,
    coefficients,
    k,
    nothing,
    c: tl.constexpr,
    KIND: tl.constexpr,
    LARGEST: tl.constexpr,
    TILT: tl.constexpr,
    WITH_SINGLE: tl.constexpr,
):
    """``(gradient in the logits that the term sees, student's logits)`` of tile ``c``."""
    nothing = 3 * nothing
    s, t, single, top = look(held, matrices, row, nothing, c, KIND, LARGEST)
    of_top, of_rest = stats[max(len(stats) - 2, 0)], stats[len(stats) - 1]
    of_top, of_rest = (of_top[0] + nothing, of_top[1] + nothing), (of_rest[0] + nothing, of_rest[1] + nothing)
    exps = exponentials(s, t, single, top, of_top, of_rest, k, KIND)
    return gradient_of(exps, single, top, stats, coefficients, KIND, TILT, WITH_SINGLE), s
