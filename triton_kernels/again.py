"""Steps 1 and 3 of rows of which nothing but the logits fits on chip: masks and exponentials are computed twice.

Compilers would keep what was computed before, in registers that are not there, and work on all tiles at once. So each
pass reads the logits through ``nothing``, a number that is 0 and that the compiler does not know, and takes tile after
tile, each in a branch of its own, which also passes over tiles beyond the last class.

Such objectives have one term. Functions take all of ``TERMS``, a constant, as a member of it is none to Triton 3.6.
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
def hold(tiles):
    """Tiles to keep: in float32 or, of 16 bits a logit, two in the registers of one, neighbours in the list."""
    held = ()
    if tiles[0].dtype.primitive_bitwidth == 16:
        for c in tl.static_range(0, len(tiles), 2):
            low, high = tiles[c].to(tl.uint16, bitcast=True), tiles[c + 1].to(tl.uint16, bitcast=True)
            held = held + (low.to(tl.uint32) | (high.to(tl.uint32) << 16),)
    else:
        for c in tl.static_range(len(tiles)):
            held = held + (tiles[c].to(tl.float32),)
    return held


@triton.jit
def logits_of(held, nothing, c: tl.constexpr, matrix):
    """Tile ``c`` of those held of a matrix, in float32."""
    if held[0].dtype == tl.uint32:
        half = (held[c // 2] >> (nothing.to(tl.uint32) + 16 * (c % 2))).to(tl.uint16)
        return half.to(matrix.dtype.element_ty, bitcast=True).to(tl.float32)
    else:
        return held[c]


@triton.jit
def look(held, matrices, row, nothing, c: tl.constexpr, TERMS: tl.constexpr):
    """``(student, teacher, single, top)`` of tile ``c``; ``row``: ``(class_count, targets, found)``."""
    class_count, targets, found = row
    s, t = logits_of(held[0], nothing, c, matrices[0]), logits_of(held[1], nothing, c, matrices[1])
    begin = c * t.shape[1] + nothing.to(tl.int32)
    if by_rank(TERMS[0][0]):
        found = (found[0] + nothing, found[1] - begin, found[2] - begin)
    classes = tl.arange(0, t.shape[1])
    single, top = masks_of(t, classes, class_count - begin, targets - begin, found, TERMS[0][0], TERMS[0][1])
    return s, t, single, top


@triton.jit
def with_maxima(largest, tile, TERMS: tl.constexpr):
    """Maxima over the tiles so far and this one, from :func:`look`."""
    s, t, single, top = tile
    return larger(largest, logits_of_groups(s, t, single, top, TERMS[0][0]))


@triton.jit
def with_sums(sums, tile, of_top, of_rest, k, TERMS: tl.constexpr):
    """The sums likewise."""
    s, t, single, top = tile
    exps = exponentials(s, t, single, top, of_top, of_rest, k, TERMS[0][0])
    return add_folded(sums, summands(exps, top, TERMS[0][0], TERMS[0][2], TERMS[0][3]))


@triton.jit
def statistics_again(held, matrices, row, k, nothing, TILES: tl.constexpr, TERMS: tl.constexpr):
    """``(statistics of top, statistics of rest)`` of whole rows in held tiles."""
    TILE: tl.constexpr = held[0][0].shape[1]
    largest = with_maxima((), look(held, matrices, row, nothing, 0, TERMS), TERMS)
    for c in tl.static_range(1, TILES):
        if c * TILE < row[0]:
            largest = with_maxima(largest, look(held, matrices, row, nothing, c, TERMS), TERMS)
    of_top, of_rest = origins_from(largest)
    nothing = 2 * nothing
    sums = with_sums((), look(held, matrices, row, nothing, 0, TERMS), of_top, of_rest, k, TERMS)
    for c in tl.static_range(1, TILES):
        if c * TILE < row[0]:
            sums = with_sums(sums, look(held, matrices, row, nothing, c, TERMS), of_top, of_rest, k, TERMS)
    return statistics_from(of_top, of_rest, sums, TILES, TERMS[0][2], TERMS[0][3])


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
    TERMS: tl.constexpr,
    WITH_SINGLE: tl.constexpr,
):
    """``(gradient in the logits that the term sees, student's logits)`` of tile ``c``."""
    nothing = 3 * nothing
    s, t, single, top = look(held, matrices, row, nothing, c, TERMS)
    of_top, of_rest = stats[max(len(stats) - 2, 0)], stats[len(stats) - 1]
    of_top, of_rest = (of_top[0] + nothing, of_top[1] + nothing), (of_rest[0] + nothing, of_rest[1] + nothing)
    exps = exponentials(s, t, single, top, of_top, of_rest, k, TERMS[0][0])
    return gradient_of(exps, single, top, stats, coefficients, TERMS[0][0], TERMS[0][4], WITH_SINGLE), s
