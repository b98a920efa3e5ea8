"""What forward keeps of a sample so that its gradient can be computed later.

Numbers in the arithmetic's type: the sample's weight, the softmax's origin and inverse sum; where samples are
standardised, the student's high, factor, offset, slope and level and the teacher's high, factor and offset; for each
group of each term both origins and the three coefficients. Integers, for each term by rank: what tells the leading
classes.
"""

import triton
import triton.language as tl
from kdkernels.triton_kernels.objective import (
    MEMBERS,
    SAVED_GROUP,
    by_rank,
    groups_of,
)
from kdkernels.triton_kernels.select import key_of, value_of


@triton.jit
def store_columns(table, values, samples, there, COLUMNS: tl.constexpr, first: tl.constexpr):
    """Writes some numbers of each sample side by side."""
    for i in tl.static_range(len(values)):
        tl.store(table + samples * COLUMNS + first + i, values[i].to(table.dtype.element_ty), mask=there)


@triton.jit
def load_columns(table, samples, there, COLUMNS: tl.constexpr, first: tl.constexpr, count: tl.constexpr):
    """Reads them again."""
    values = ()
    for i in tl.static_range(count):
        values = values + (tl.load(table + samples * COLUMNS + first + i, mask=there, other=0),)
    return values


@triton.jit
def save_term(saved, samples, there, stats, coefficients, COLUMNS: tl.constexpr, first: tl.constexpr):
    """The columns of a term from ``first`` on."""
    for g in tl.static_range(len(stats)):
        values = (stats[g][0], stats[g][1]) + coefficients[g]
        store_columns(saved, values, samples, there, COLUMNS, first + SAVED_GROUP * g)


@triton.jit
def load_term(saved, samples, there, COLUMNS: tl.constexpr, first: tl.constexpr, KIND: tl.constexpr):
    """``(origins, coefficients)`` of a term's groups."""
    origins = ()
    coefficients = ()
    for g in tl.static_range(groups_of(KIND)):
        values = load_columns(saved, samples, there, COLUMNS, first + SAVED_GROUP * g, SAVED_GROUP)
        origins = origins + ((values[0], values[1]),)
        coefficients = coefficients + ((values[2], values[3], values[4]),)
    return origins, coefficients


@triton.jit
def save_members(members, found, samples, there, COLUMNS: tl.constexpr, first: tl.constexpr):
    """The columns of what tells a term's leading classes."""
    if len(found) > 0:
        store_columns(members, (key_of(found[0]), found[1], found[2]), samples, there, COLUMNS, first)


@triton.jit
def load_members(members, samples, there, COLUMNS: tl.constexpr, first: tl.constexpr, KIND: tl.constexpr, dtype):
    """Reads it again."""
    if by_rank(KIND):
        key, last, best = load_columns(members, samples, there, COLUMNS, first, MEMBERS)
        return value_of(key.to(tl.int64 if dtype == tl.float64 else tl.int32)), last.to(tl.int32), best.to(tl.int32)
    else:
        return ()
