"""Host code: unpacks the ops' arguments, chooses kernels and launches them. Nothing here waits for the device."""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
import triton.language as tl
from kdkernels.triton_kernels import heuristics
from kdkernels.triton_kernels.classes import (
    add_stretches_kernel,
    class_moments_kernel,
    class_sums_kernel,
    merge_class_moments_kernel,
)
from kdkernels.triton_kernels.fused import fused_kernel
from kdkernels.triton_kernels.heuristics import Tile, cdiv
from kdkernels.triton_kernels.layout import Layout, find_layout, opaque
from kdkernels.triton_kernels.objective import BY_CLASS, BY_SAMPLE, Problem, Term, unpack
from kdkernels.triton_kernels.samples import scale_kernel, sum_rows_kernel, weight_sum_kernel
from kdkernels.triton_kernels.split import merge_kernel, part_columns, select_kernel, split_kernel
from kdkernels.triton_kernels.split_standardize import (
    products_kernel,
    sample_moments_kernel,
    settle_moments_kernel,
    slope_kernel,
)
from kdkernels.triton_kernels.standardize import ROWS, affines_kernel
from kdkernels.triton_kernels.sweep import gradient_kernel
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver

from kdkernels.validation import REDUCTIONS

_TRITON = {torch.float32: tl.float32, torch.float64: tl.float64}


class Matrices(NamedTuple):
    """Logits of a call and where they are, as all kernels take them."""

    student: Tensor
    teacher: Tensor
    gradient: Tensor | None
    layout: Layout
    dtype: torch.dtype  # of the arithmetic

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.student.device)


def _matrices(
    student: Tensor,
    teacher: Tensor,
    class_dim: int,
    num_classes: int,
    gradient: Tensor | None = None,
) -> Matrices:
    dtypes = student.dtype, teacher.dtype
    tensors = (student, teacher, student if gradient is None else gradient)
    layout = find_layout(
        tuple(student.shape),
        tuple(tensor.stride() for tensor in tensors),
        class_dim,
        num_classes,
        tuple(tensor.element_size() for tensor in tensors),
        all(tensor.data_ptr() % 16 == 0 for tensor in tensors),
    )
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    return Matrices(student, teacher, gradient, layout, dtype)


def _on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launches go to the tensor's device, which need not be the current one."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device_of(tensor)
    return contextlib.nullcontext()


def _flat(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """One number a sample, in the samples' order."""
    return None if tensor is None else tensor.to(dtype).contiguous()


class Samples(NamedTuple):
    """What is known of the samples besides their logits, flat and in the kernels' types."""

    target: Tensor | None
    weight: Tensor | None
    divisor: Tensor | None
    ignore_index: int
    scale: float


class Kept(NamedTuple):
    """What forward keeps of the samples for the sweep."""

    saved: Tensor | None
    members: Tensor | None


@functools.cache
def _warp_size(device: object) -> int:
    """That of ``device``, the current one, asked for once: Triton looks up the device's properties each time."""
    return driver.active.get_current_target().warp_size


def _options(num_warps: int) -> dict[str, int | bool]:
    """Launch options, from the number of warps if each has 32 threads: AMD's have 64, and the threads stay as many.

    Multiply-adds are where the kernels say so and nowhere else.

    A compiler that contracts others may do so differently in the threads that add up the same numbers in another order:
    their sums would differ, and the result would depend on which of them comes first.
    """
    lanes = 32 if knobs.runtime.interpret else _warp_size(driver.active.get_current_device())
    return {"num_warps": max(32 * num_warps // lanes, 1), "enable_fp_fusion": False}


def _constants(layout: Layout, tile: Tile) -> dict[str, int | bool]:
    """The constants and the launch options that most kernels take."""
    return {
        "AXIS": layout.axis,
        "WIDE": layout.wide,
        "BLOCK_N": tile.block_n,
        "BLOCK_C": tile.block_c,
        **_options(tile.num_warps),
    }


def _sample_blocks(layout: Layout, tile: Tile, tiles: int = 1) -> int:
    """Blocks of samples, of so many tiles: none of them crosses the end of the innermost dimension."""
    return layout.samples // layout.inner * cdiv(layout.inner, tiles * tile.block_n)


def _sum_rows(table: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums of the columns of ``table``, ``(rows, columns)`` float64."""
    rows, columns = table.shape
    out = torch.empty(columns, dtype=dtype, device=table.device)
    block = heuristics.sum_block(rows)
    sum_rows_kernel[(columns,)](table, out, rows, columns, BLOCK=block, **_options(heuristics.sum_warps(block)))
    return out


def _weight_sum(target: Tensor | None, weight: Tensor | None, samples: int, ignore_index: int, device) -> Tensor:
    """The sum of the weights of the samples that count: one float64 number on the device."""
    block = heuristics.WEIGHT_BLOCK
    programs = cdiv(samples, block)
    sums = torch.empty(programs, 1, dtype=torch.float64, device=device)
    weight_sum_kernel[(programs,)](target, weight, sums, samples, ignore_index, BLOCK=block, **_options(4))
    return sums if programs == 1 else _sum_rows(sums, torch.float64)


def _unpacked(structure: list[int], numbers: Tensor, parts: bool, double: bool) -> Problem:
    # The tensor is on the CPU whatever device the logits are on; numpy reads it without an op of torch's.
    return unpack(tuple(structure), tuple(numbers.numpy().tolist()), parts, double)


def _standardisation(structure: list[int], numbers: Tensor) -> tuple[float, float]:
    """Bessel's correction and eps of an encoded objective."""
    return float(structure[2]), numbers.numpy()[2].item()


def _affines(matrices: Matrices, moments: Tensor, sums: Tensor | None, standardisation: tuple[float, float]) -> Tensor:
    """The table of what standardises each class, ``(ROWS, classes)``, by Bessel's correction and eps."""
    classes = matrices.layout.classes
    table = matrices.new(ROWS.value, classes)
    block = heuristics.CLASS_BLOCK
    grid = (cdiv(classes, block),)
    affines_kernel[grid](moments, sums, table, classes, *standardisation, BLOCK=block, **_options(4))
    return table


def forward(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    sample_weight: Tensor | None,
    denominator: Tensor | None,
    moments: Tensor | None,
    structure: list[int],
    numbers: Tensor,
    scale: float,
    reduction: int,
    class_dim: int,
    num_classes: int,
    ignore_index: int,
    gradient: bool,
    save: bool,
    parts: bool,
    process_group: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The op ``forward``: see :class:`kdkernels.backends.GpuBackend`."""
    by_class = moments is not None
    grad = torch.empty_like(student) if gradient and not by_class else None
    m = _matrices(student, teacher, class_dim, num_classes, grad)
    samples = m.layout.samples
    problem = _unpacked(structure, numbers, parts, m.dtype == torch.float64)
    _check_moments(problem, moments)
    if gradient and by_class and not save:
        raise ValueError("save must go with gradient where there are moments")
    each = REDUCTIONS[reduction] == "none"
    columns = problem.columns.parts
    shape = [size for dim, size in enumerate(student.shape) if each and dim != class_dim]
    tile = heuristics.fused_tile(m.layout, problem)
    keep = save or tile is None
    saved = m.new(samples, problem.columns.saved) if keep else None
    members = m.new(samples, problem.columns.members, dtype=torch.int64) if keep else None
    affines = None
    if samples == 0:
        loss = m.new(*shape).zero_()
        values = m.new(*shape, columns).zero_() if parts else None
    else:
        with _on_device(student):
            target, weight = _flat(target, torch.int64), _flat(sample_weight, m.dtype)
            divisor = denominator
            if divisor is None and REDUCTIONS[reduction] == "mean":
                if target is None and weight is None:
                    scale /= samples
                else:
                    divisor = _weight_sum(target, weight, samples, ignore_index, student.device)
            elif REDUCTIONS[reduction] == "batchmean":
                scale /= student.shape[0]
            affines = None if moments is None else _affines(m, moments, None, _standardisation(structure, numbers))
            marks = Samples(target, weight, divisor, ignore_index, scale)
            kept = Kept(saved, members)
            run = _fused if tile is not None else _split
            rows, part_rows = run(m, problem, marks, affines, kept, shape, each, parts)
            loss = rows if each else _sum_rows(rows, m.dtype).reshape(())
            values = part_rows if each or part_rows is None else _sum_rows(part_rows, m.dtype)
    if gradient and by_class:
        with _on_device(student):
            one = torch.ones((), dtype=m.dtype, device=student.device)
            without_parts = _unpacked(structure, numbers, False, m.dtype == torch.float64)
            grad = _class_sums(m, without_parts, one, target, affines, Kept(saved, members))
    return loss, values, grad, saved if save else None, members if save else None


def _results(
    m: Matrices, problem: Problem, shape: list[int], each: bool, parts: bool, blocks: int
) -> tuple[Tensor, Tensor | None]:
    """Room for the losses and their parts: of each sample, or of each block of samples."""
    columns = problem.columns.parts
    if each:
        return m.new(*shape), m.new(*shape, columns) if parts else None
    double = torch.float64
    return m.new(blocks, 1, dtype=double), m.new(blocks, columns, dtype=double) if parts else None


def _fused(
    m: Matrices,
    problem: Problem,
    marks: Samples,
    affines: Tensor | None,
    kept: Kept,
    shape: list[int],
    each: bool,
    parts: bool,
) -> tuple[Tensor, Tensor | None]:
    """All steps in one launch."""
    tile = heuristics.fused_tile(m.layout, problem)
    assert tile is not None
    blocks = _sample_blocks(m.layout, tile)
    rows, part_rows = _results(m, problem, shape, each, parts, blocks)
    fused_kernel[(blocks,)](
        m.student,
        m.teacher,
        m.gradient,
        marks.target,
        marks.weight,
        marks.divisor,
        affines,
        rows,
        part_rows,
        kept.saved,
        kept.members,
        m.layout.sizes,
        m.layout.student,
        m.layout.teacher,
        m.layout.gradient,
        m.layout.classes,
        m.layout.gradient_classes,
        opaque(*problem.ks),
        marks.ignore_index,
        marks.scale,
        problem.numbers,
        problem.low,
        TERMS=problem.terms,
        CE=problem.ce,
        STANDARDIZE=problem.standardize,
        COLUMNS=problem.columns,
        EACH=each,
        TILES=tile.tiles,
        AGAIN=tile.again,
        **_constants(m.layout, tile),
    )
    return rows, part_rows


def _split(
    m: Matrices,
    problem: Problem,
    marks: Samples,
    affines: Tensor | None,
    kept: Kept,
    shape: list[int],
    each: bool,
    parts: bool,
) -> tuple[Tensor, Tensor | None]:
    """Statistics of parts of the samples, their merge, and a sweep for the gradient."""
    layout, samples = m.layout, m.layout.samples
    tile = heuristics.split_tile(layout, problem)
    split = cdiv(layout.classes, tile.block_c)
    merge_tile = heuristics.merge_tile(split, 1)
    by_sample = problem.standardize == BY_SAMPLE.value
    grid = (_sample_blocks(layout, tile) * split,)
    merge_grid = (cdiv(samples, merge_tile.block_n),)
    where = layout.sizes, layout.student, layout.teacher, layout.classes
    constants = {"STANDARDIZE": problem.standardize, "COLUMNS": problem.columns, **_constants(layout, tile)}
    merging = {"COLUMNS": problem.columns, "BLOCK_N": merge_tile.block_n, **_options(merge_tile.num_warps)}
    if by_sample:
        moments = m.new(samples, split, 6, dtype=torch.float64)
        sample_moments_kernel[grid](
            m.student,
            m.teacher,
            marks.target,
            marks.weight,
            moments,
            *where,
            marks.ignore_index,
            dtype=_TRITON[m.dtype],
            **_constants(layout, tile),
        )
        settle_moments_kernel[merge_grid](
            moments, kept.saved, samples, split, problem.numbers, problem.low, PARTS=merge_tile.block_c, **merging
        )
    if heuristics.sets_aside(split, problem):
        candidate_count = sum(problem.ks)
        candidates = m.new(samples, split, candidate_count, 2)
        candidate_classes = m.new(samples, split, candidate_count, dtype=torch.int32)
    else:
        candidate_count, candidates, candidate_classes = 0, None, None
        for term, k in zip(problem.terms, problem.ks, strict=True):
            if k:
                _select(m, problem, marks, affines, kept, term, k, tile)
    stats = m.new(samples, split, part_columns(problem.terms, candidates is not None), dtype=torch.float64)
    split_kernel[grid](
        m.student,
        m.teacher,
        marks.target,
        marks.weight,
        affines,
        kept.saved,
        kept.members,
        stats,
        candidates,
        candidate_classes,
        *where,
        opaque(*problem.ks),
        candidate_count,
        marks.ignore_index,
        problem.numbers,
        problem.low,
        TERMS=problem.terms,
        CE=problem.ce,
        **constants,
    )
    merge_tile = heuristics.merge_tile(split, max(problem.ks) if candidates is not None else 1)
    blocks = cdiv(samples, merge_tile.block_n)
    rows, part_rows = _results(m, problem, shape, each, parts, blocks)
    merge_kernel[(blocks,)](
        stats,
        candidates,
        candidate_classes,
        marks.target,
        marks.weight,
        marks.divisor,
        rows,
        part_rows,
        kept.saved,
        kept.members,
        samples,
        layout.classes,
        split,
        opaque(*problem.ks),
        candidate_count,
        marks.ignore_index,
        marks.scale,
        problem.numbers,
        problem.low,
        TERMS=problem.terms,
        CE=problem.ce,
        COLUMNS=problem.columns,
        EACH=each,
        BLOCK_N=merge_tile.block_n,
        PARTS=heuristics.merge_tile(split, 1).block_c,
        CANDIDATES=merge_tile.block_c,
        **_options(merge_tile.num_warps),
        # Fused, a product and its sum with a neighbour's round differently in the two lanes: copies of one sum would
        # differ in the last bit, and which of them is kept is left to chance.
    )
    if by_sample:
        products = m.new(samples, split, 2, dtype=torch.float64)
        products_kernel[grid](
            m.student,
            m.teacher,
            marks.target,
            kept.saved,
            kept.members,
            products,
            *where,
            problem.numbers,
            problem.low,
            TERMS=problem.terms,
            **constants,
        )
        slope_kernel[merge_grid](
            products, kept.saved, samples, split, PARTS=heuristics.merge_tile(split, 1).block_c, **merging
        )
    if m.gradient is not None:
        _sweep(m, problem, None, marks.target, affines, kept)
    return rows, part_rows


def _select(
    m: Matrices,
    problem: Problem,
    marks: Samples,
    affines: Tensor | None,
    kept: Kept,
    term: Term,
    k: int,
    tile: Tile,
) -> None:
    """Finds a term's leading classes before the statistics."""
    select_kernel[(_sample_blocks(m.layout, tile),)](
        m.teacher,
        marks.target,
        marks.weight,
        affines,
        kept.saved,
        kept.members,
        m.layout.sizes,
        m.layout.teacher,
        m.layout.classes,
        k,
        marks.ignore_index,
        TERM=term,
        STANDARDIZE=problem.standardize,
        COLUMNS=problem.columns,
        dtype=_TRITON[m.dtype],
        **_constants(m.layout, tile),
    )


def _sweep(
    m: Matrices, problem: Problem, grad_loss: Tensor | None, target: Tensor | None, affines: Tensor | None, kept: Kept
) -> None:
    """The gradient from what was kept."""
    layout = m.layout
    tile = heuristics.sweep_tile(layout, problem)
    grid = (_sample_blocks(layout, tile) * cdiv(layout.gradient_classes, tile.block_c),)
    gradient_kernel[grid](
        grad_loss,
        m.student,
        m.teacher,
        m.gradient,
        target,
        affines,
        kept.saved,
        kept.members,
        layout.sizes,
        layout.student,
        layout.teacher,
        layout.gradient,
        layout.classes,
        layout.gradient_classes,
        problem.numbers,
        problem.low,
        TERMS=problem.terms,
        CE=problem.ce,
        STANDARDIZE=problem.standardize,
        COLUMNS=problem.columns,
        EACH=grad_loss is not None and grad_loss.dim() > 0,
        **_constants(layout, tile),
    )


def backward(
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    saved: Tensor,
    members: Tensor,
    moments: Tensor | None,
    sums: Tensor | None,
    structure: list[int],
    numbers: Tensor,
    class_dim: int,
    num_classes: int,
) -> Tensor:
    """The op ``backward``: see :class:`kdkernels.backends.GpuBackend`."""
    m = _matrices(student, teacher, class_dim, num_classes, torch.empty_like(student))
    assert m.gradient is not None
    problem = _unpacked(structure, numbers, False, m.dtype == torch.float64)
    _check_moments(problem, moments)
    if (moments is None) != (sums is None):
        raise ValueError("sums must be given with moments")
    if m.layout.samples:
        with _on_device(student):
            affines = None if moments is None else _affines(m, moments, sums, _standardisation(structure, numbers))
            _sweep(m, problem, grad_loss.contiguous(), _flat(target, torch.int64), affines, Kept(saved, members))
    return m.gradient


def class_moments(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    sample_weight: Tensor | None,
    class_dim: int,
    num_classes: int,
    ignore_index: int,
) -> Tensor:
    """The op ``class_moments``: see :class:`kdkernels.backends.GpuBackend`."""
    m = _matrices(student, teacher, class_dim, num_classes)
    layout = m.layout
    moments = m.new(2, 3, num_classes, dtype=torch.float64)
    if layout.samples == 0:
        return moments.zero_()
    with _on_device(student):
        tile = heuristics.moments_tile(layout, m.dtype == torch.float64)
        blocks, programs = _sample_blocks(layout, tile, tile.tiles), 2 * cdiv(num_classes, tile.block_c)
        stretch = heuristics.stretch(blocks, programs)
        stretches = cdiv(blocks, stretch)
        partial = moments if stretches == 1 else m.new(stretches, 2, 3, num_classes, dtype=torch.float64)
        class_moments_kernel[(programs * stretches,)](
            student,
            teacher,
            _flat(target, torch.int64),
            _flat(sample_weight, m.dtype),
            partial,
            layout.sizes,
            layout.student,
            layout.teacher,
            num_classes,
            blocks,
            stretch,
            ignore_index,
            TILES=tile.tiles,
            dtype=_TRITON[m.dtype],
            **_constants(layout, tile),
        )
        if stretches > 1:
            block_r, block_c = heuristics.stretches_tile(stretches)
            grid = (2 * cdiv(num_classes, block_c),)
            merge_class_moments_kernel[grid](
                partial, moments, stretches, num_classes, BLOCK_R=block_r, BLOCK_C=block_c, **_options(4)
            )
    return moments


def class_sums(
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    saved: Tensor,
    members: Tensor,
    moments: Tensor,
    structure: list[int],
    numbers: Tensor,
    class_dim: int,
    num_classes: int,
) -> Tensor:
    """The op ``class_sums``: see :class:`kdkernels.backends.GpuBackend`."""
    m = _matrices(student, teacher, class_dim, num_classes)
    problem = _unpacked(structure, numbers, False, m.dtype == torch.float64)
    with _on_device(student):
        affines = _affines(m, moments, None, _standardisation(structure, numbers)) if m.layout.samples else None
        target = _flat(target, torch.int64)
        return _class_sums(m, problem, grad_loss.contiguous(), target, affines, Kept(saved, members))


def _class_sums(
    m: Matrices, problem: Problem, grad_loss: Tensor, target: Tensor | None, affines: Tensor | None, kept: Kept
) -> Tensor:
    """The same of matrices and with the classes' numbers at hand."""
    layout = m.layout
    sums = m.new(2, layout.classes, dtype=torch.float64)
    if layout.samples == 0:
        return sums.zero_()
    tile = heuristics.sums_tile(layout, problem)
    blocks, tiles = _sample_blocks(layout, tile), cdiv(layout.classes, tile.block_c)
    stretch = min(heuristics.stretch(blocks, tiles), heuristics.LONGEST_STRETCH)
    stretches = cdiv(blocks, stretch)
    partial = sums if stretches == 1 else m.new(stretches, 2, layout.classes, dtype=torch.float64)
    class_sums_kernel[(tiles * stretches,)](
        grad_loss,
        m.student,
        m.teacher,
        target,
        affines,
        kept.saved,
        kept.members,
        partial,
        layout.sizes,
        layout.student,
        layout.teacher,
        layout.classes,
        blocks,
        stretch,
        problem.numbers,
        problem.low,
        TERMS=problem.terms,
        STANDARDIZE=problem.standardize,
        COLUMNS=problem.columns,
        EACH=grad_loss.dim() > 0,
        **_constants(layout, tile),
    )
    if stretches > 1:
        block_r, block_c = heuristics.stretches_tile(stretches)
        width = 2 * layout.classes
        grid = (cdiv(width, block_c),)
        add_stretches_kernel[grid](partial, sums, stretches, width, BLOCK_R=block_r, BLOCK_C=block_c, **_options(4))
    return sums


def _check_moments(problem: Problem, moments: Tensor | None) -> None:
    if (problem.standardize == BY_CLASS.value) != (moments is not None):
        raise ValueError("moments must be given where, and only where, logits are standardised by class")


def scale_(gradient: Tensor, factor: Tensor, class_dim: int) -> None:
    """The op ``scale_``: see :class:`kdkernels.backends.GpuBackend`."""
    if gradient.numel() == 0:
        return
    layout = _matrices(gradient, gradient, class_dim, gradient.shape[class_dim]).layout
    with _on_device(gradient):
        tile = heuristics.scale_tile(layout)
        grid = (_sample_blocks(layout, tile) * cdiv(layout.classes, tile.block_c),)
        scale_kernel[grid](
            gradient,
            factor.contiguous(),
            layout.sizes,
            layout.student,
            layout.classes,
            EACH=factor.dim() > 0,
            **_constants(layout, tile),
        )
