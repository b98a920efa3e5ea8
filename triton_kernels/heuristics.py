"""Which kernel serves a call, and with what block sizes. There is no autotuning: a call's shape decides."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from kdkernels.triton_kernels.layout import SAMPLES, Layout
from kdkernels.triton_kernels.objective import BY_CLASS, BY_SAMPLE, TARGET, TOP1_TOPK, TOPK, WHOLE, Problem


class Tile(NamedTuple):
    """The block of samples and classes that a program holds, and how many warps hold it."""

    block_n: int
    block_c: int
    num_warps: int
    #: How many tiles of classes a program holds (the fused kernel), or of samples (the moments of classes).
    tiles: int = 1
    #: Whether it keeps their logits only, and computes the exponentials again for the gradient (likewise).
    again: bool = False


def power_of_two(number: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << max(number - 1, 0).bit_length()


def cdiv(number: int, by: int) -> int:
    """The quotient, rounded up; ``triton.cdiv`` takes many times as long."""
    return -(-number // by)


# A program's elements are in registers, of which a thread has 255 if no more than 8 warps share them.
_FIXED_REGISTERS = 60
_PER_THREAD = 32
_PER_TILE = 8
_MOST_WARPS = 8
#: What an element needs of an objective whose every element fits at twice the number a thread; in float64 none does
#: with less.
_LEAST_NUMBERS = 2.5
_LEAST_CLASSES = 16
#: Rows that share a warp: tiles of classes that a thread has one after the other, if so many threads share a row.
_SHORT_TILES, _SHORT_LANES = (4, 2, 1), 8
#: Of more registers, ptxas spills some for sm_80 so that three such programs share a multiprocessor.
_SHORT_REGISTERS = 200
#: Threads of a warp, and samples next to one another that a program takes: each thread has one.
_LANES = 32


def live_numbers(problem: Problem) -> float:
    """About how many registers an element needs from its statistics to its gradient, as the compiler reports it."""
    numbers = 0.0
    for term in problem.terms:
        numbers += 3 if term.reverse else 2
        three_groups = 5.5 if term.reverse else 5.0
        numbers += {WHOLE.value: 0.0, TARGET.value: 0.5, TOPK.value: 4.2, TOP1_TOPK.value: three_groups}[term.kind]
    numbers += 1 if problem.ce else 0
    numbers += {0: 0, BY_CLASS.value: 4, BY_SAMPLE.value: 11}[problem.standardize]
    return 2.5 * max(numbers, _LEAST_NUMBERS) if problem.low else numbers


def live_logits(problem: Problem, layout: Layout) -> float:
    """The same where only logits are kept and the exponentials computed again; only one term's masks come cheap."""
    (term, *others) = problem.terms
    if others or problem.standardize or problem.low:
        return math.inf
    if term.kind == TOP1_TOPK.value and (layout.narrow or term.reverse):
        return 4
    return 4 if term.kind == TOPK.value and problem.ce and not layout.narrow else 3


def fits(live: float, per_thread: int, num_warps: int, most: int = 255) -> bool:
    """Whether threads have registers enough for so many elements of one sample and so many numbers of each."""
    return num_warps <= _MOST_WARPS and _FIXED_REGISTERS + per_thread * live <= most


@functools.lru_cache(maxsize=1024)
def fused_tile(layout: Layout, problem: Problem) -> Tile | None:
    """The tile of the fused kernel; None where a sample's classes do not fit on chip.

    What is known of a sample takes registers, too, and time: rows share a warp only where each thread still has one
    (short ones, in whose program every warp has some rows of its own). 32 elements a thread share what every thread
    does once a row; fewer where the objective needs many registers and no second look at the logits, tile by tile,
    makes up for them. The longest rows have 64: those of 16 bits a logit, loaded in pairs, even in one look.

    So rows of up to 16384 classes are on chip in float32, bfloat16 and float16 where the objective has a single term of
    logits that are not standardised. Up to 8192 classes are where there are three groups of 16 bits a logit or with
    reverse divergences, or leading classes and the cross entropy in float32; 2048 to 8192, by the registers they need,
    where objectives have two terms or standardised logits; 1024 to 4096 in float64.
    """
    block_c = max(power_of_two(layout.gradient_classes), _LEAST_CLASSES)
    live = live_numbers(problem)
    if layout.axis == SAMPLES.value:  # each class has an address there, a simpler one if a single warp has them all
        live += 3.4 if block_c <= _PER_THREAD and not problem.low else 4
    if layout.axis != SAMPLES.value:
        for tiles in _SHORT_TILES:
            tile_c = block_c // tiles
            lanes = tile_c // layout.wide
            if not (tiles == 1 or lanes >= _SHORT_LANES) or lanes > _LANES:
                continue
            if fits(live, tiles * layout.wide, 4, _SHORT_REGISTERS):
                return Tile(4 * _LANES // lanes, tile_c, 4, tiles)
    block_n = _LANES if layout.axis == SAMPLES.value else 1
    for per_thread in (_PER_THREAD, _PER_THREAD // 2, _PER_THREAD // 4, _PER_THREAD // 8, 2 * _PER_THREAD):
        num_warps = max(block_n * block_c // (_LANES * per_thread), 1)
        paired = layout.narrow and layout.wide == 8 and live <= _LEAST_NUMBERS
        if (per_thread <= _PER_THREAD or paired) and fits(live, per_thread, num_warps):
            tiles = per_thread // _PER_TILE if layout.axis != SAMPLES.value and per_thread > _PER_TILE else 1
            return Tile(block_n, block_c // tiles, num_warps, tiles)
        tile_c = num_warps * _LANES * max(layout.wide, 4)
        twice = per_thread >= _PER_THREAD and layout.axis != SAMPLES.value and tile_c <= block_c
        if twice and fits(live_logits(problem, layout), per_thread, num_warps):
            return Tile(1, tile_c, num_warps, block_c // tile_c, again=True)
    return None


#: Classes of a tile of a sweep, unless it is of one sample alone.
_SPREAD_CLASSES = (16, 64, 256, 1024)
#: Samples that a program of the weights' sum adds up, and classes of one that prepares their standardisation.
WEIGHT_BLOCK = 4096
CLASS_BLOCK = 256
#: Classes whose moments a thread has, values it takes at a time, and programs that are enough for a GPU.
_MOMENTS, _VALUES, _PROGRAMS = 4, 64, 2048
#: Blocks of samples that are added up in float32.
LONGEST_STRETCH = 64
#: Candidates for the top k that one program merges, of one or several samples.
_MERGE_SIZES = (8, 64, 512, 4096)
#: Classes of a part at least, and candidates of each at most: they are taken one after the other.
_LEAST_PART, _MOST_ASIDE = 512, 64


def sum_block(rows: int) -> int:
    """Rows that the one program of a column reads at a time."""
    return min(max(power_of_two(rows), 128), 4096)


def sum_warps(block: int) -> int:
    return max(block // 512, 1)


def split_tile(layout: Layout, problem: Problem) -> Tile:
    """The part of some samples whose statistics a program takes.

    Where classes are next to one another, a part is one sample's and of as few warps as the merge allows, best of one:
    there no thread waits for another warp's, and many parts fit on a multiprocessor. A thread has fewer classes where
    they take more registers, and fewest of two terms in float64.
    """
    most = _PER_THREAD // 2 if layout.axis == SAMPLES.value else _PER_THREAD
    per_thread = most if fits(live_numbers(problem), most, 4) else _PER_THREAD // 2
    if not fits(live_numbers(problem), per_thread, 4):
        per_thread = _PER_THREAD // 4
    if problem.low and len(problem.terms) > 1:
        per_thread = _PER_THREAD // 8
    if layout.axis == SAMPLES.value:
        return _spread(layout, 8 * _LANES * per_thread, per_thread)
    num_warps = 1
    while num_warps < 8:
        block_c = _LANES * per_thread * num_warps
        if block_c >= _LEAST_PART and cdiv(layout.classes, block_c) * max(*problem.ks, 1) <= _MERGE_SIZES[-2]:
            break
        num_warps *= 2
    return Tile(1, _LANES * per_thread * num_warps, num_warps)


def sets_aside(split: int, problem: Problem) -> bool:
    """Whether the parts' own best classes are few enough to be candidates in one merge. More would spill in float64."""
    k = max(problem.ks)
    return 0 < k <= _MOST_ASIDE and split * k <= _MERGE_SIZES[-2 if problem.low else -1]


def merge_tile(split: int, k: int) -> Tile:
    """Samples, and candidates of each (or parts), that a program merges: few sizes, as that code is long."""
    block_c = next((size for size in _MERGE_SIZES if size >= split * k), power_of_two(split * k))
    return Tile(max(_LANES // block_c, 1), block_c, min(max(block_c // 128, 1), 8))


def sweep_tile(layout: Layout, problem: Problem) -> Tile:
    """The tile of an elementwise sweep: a few thousand elements, in the shape of memory."""
    per_thread = _PER_THREAD // (4 if problem.low else 2)
    return _spread(layout, 4 * _LANES * per_thread, per_thread)


def scale_tile(layout: Layout) -> Tile:
    """The tile of the sweep that scales a gradient."""
    return _spread(layout, 4 * _LANES * 16, 16)


def moments_tile(layout: Layout, double: bool) -> Tile:
    """The tile of the moments of classes: few classes a thread, and many samples, one after the other."""
    block_n = min(max(power_of_two(layout.inner), _LANES), 4 * _LANES)
    block_c, num_warps = _MOMENTS, block_n // _LANES
    if layout.axis != SAMPLES.value:
        block_c, num_warps = min(max(power_of_two(layout.classes), _LEAST_CLASSES), _MOMENTS * _LANES), 4
        block_n = _MOMENTS * _LANES * num_warps // block_c
    most = _VALUES // _MOMENTS // (2 if double else 1)
    return Tile(block_n, block_c, num_warps, min(max(power_of_two(layout.inner) // block_n, 1), most))


def sums_tile(layout: Layout, problem: Problem) -> Tile:
    """The tile of the sums of classes: a thread has several of one sample, and few where they take many registers."""
    per_thread = _PER_TILE if fits(2 * live_numbers(problem), _PER_TILE, 4) else _PER_TILE // 2
    most = _LANES * (1 if layout.axis == SAMPLES.value else per_thread)
    block_c = min(max(power_of_two(layout.classes), _LEAST_CLASSES), most)
    block_n = _LANES if layout.axis == SAMPLES.value else 4 * most // block_c
    return Tile(block_n, block_c, block_n * block_c // (_LANES * per_thread))


def stretch(blocks: int, tiles: int) -> int:
    """Blocks of samples that one program takes: programs enough for a GPU, and stretches that one can merge."""
    return cdiv(blocks, min(max(_PROGRAMS // tiles, 1), _MERGE_SIZES[-2], max(blocks // 2, 1)))


def stretches_tile(stretches: int) -> tuple[int, int]:
    """Stretches and classes whose results a program merges at a time."""
    block_r = next((size for size in _MERGE_SIZES[:-1] if size >= stretches), _MERGE_SIZES[-2])
    return block_r, 2048 // block_r


def _spread(layout: Layout, elements: int, per_thread: int) -> Tile:
    """So many elements in the shape of memory, in one of few shapes."""
    block_c = next((size for size in _SPREAD_CLASSES if size >= layout.gradient_classes), elements)
    if layout.axis == SAMPLES.value:
        block_c = min(block_c, elements // _LANES)
    block_c = min(block_c, elements)
    return Tile(elements // block_c, block_c, elements // (_LANES * per_thread))
