"""Which group each class of a tile is in: masks of the single class and of the top group, by target or by rank."""

import triton
import triton.language as tl
from kdkernels.triton_kernels.objective import TARGET, TOP1_TOPK, TOPK, WHOLE
from kdkernels.triton_kernels.select import first_best, leads, ranked, select


@triton.jit
def partition(teacher, classes, class_count, target, k, KIND: tl.constexpr, LARGEST: tl.constexpr):
    """``(single, top, found)`` of whole rows; ``found`` tells :func:`masks_of` the leading classes later.

    ``teacher``, ``single`` and ``top`` have one entry a tile; ``classes`` are the first one's, as in :mod:`select`.
    """
    TILE: tl.constexpr = teacher[0].shape[1]
    singles = ()
    tops = ()
    if KIND == WHOLE:
        for c in tl.static_range(len(teacher)):
            tops = tops + (teacher[c] == teacher[c],)
        return tops, tops, ()
    elif KIND == TARGET:
        for c in tl.static_range(len(teacher)):
            singles = singles + (classes[None, :] == (target - c * TILE)[:, None],)
        return singles, singles, ()
    else:
        values = ()
        for c in tl.static_range(len(teacher)):
            values = values + (ranked(teacher[c], (classes < class_count - c * TILE)[None, :], LARGEST),)
        bound, last = select(values, classes, k)
        best = last
        if KIND == TOP1_TOPK:
            best = first_best(values, classes)
        for c in tl.static_range(len(teacher)):
            single, top = masks_of_rank(values[c], classes, bound, last - c * TILE, best - c * TILE, KIND)
            singles = singles + (single,)
            tops = tops + (top,)
        return singles, tops, (bound, last, best)


@triton.jit
def masks_of(teacher, classes, class_count, target, found, KIND: tl.constexpr, LARGEST: tl.constexpr):
    """``(single, top)`` of one tile, from what was found in the whole rows."""
    if KIND == WHOLE:
        everything = teacher == teacher
        return everything, everything
    elif KIND == TARGET:
        single = classes[None, :] == target[:, None]
        return single, single
    else:
        values = ranked(teacher, (classes < class_count)[None, :], LARGEST)
        return masks_of_rank(values, classes, found[0], found[1], found[2], KIND)


@triton.jit
def masks_of_rank(values, classes, bound, last, best, KIND: tl.constexpr):
    """``(single, top)`` by rank."""
    top = leads(values, classes, bound, last)
    if KIND == TOP1_TOPK:
        single = classes[None, :] == best[:, None]
        return single, top & (single == 0)
    else:
        return top, top


@triton.jit
def group_sizes(class_count, k, KIND: tl.constexpr):
    """How many classes each group has."""
    if KIND == WHOLE:
        return (class_count,)
    elif KIND == TARGET:
        return (1, class_count - 1)
    elif KIND == TOPK:
        return (k, class_count - k)
    else:
        return (1, k - 1, class_count - k)
