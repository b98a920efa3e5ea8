"""Host code: unpacks the ops' arguments, chooses kernels and launches them. Nothing here waits for the device."""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kdkernels.triton_kernels import heuristics
from kdkernels.triton_kernels.fused import fused_kernel
from kdkernels.triton_kernels.heuristics import Tile
from kdkernels.triton_kernels.layout import Layout, find_layout
from kdkernels.triton_kernels.objective import BY_CLASS, Problem, unpack
from kdkernels.triton_kernels.samples import scale_kernel, sum_rows_kernel, weight_sum_kernel
from kdkernels.triton_kernels.standardize import ROWS, affines_kernel
from kdkernels.triton_kernels.sweep import gradient_kernel
from kdkernels.validation import REDUCTIONS


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
    student: Tensor, teacher: Tensor, class_dim: int, num_classes: int, gradient: Tensor | None = None
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


def _sample_blocks(layout: Layout, tile: Tile) -> int:
    """Blocks of samples: none of them crosses the end of the innermost dimension."""
    return math.prod(layout.sizes[1:]) * triton.cdiv(layout.sizes[0], tile.block_n)


def _sum_rows(table: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums of the columns of ``table``, ``(rows, columns)`` float64."""
    rows, columns = table.shape
    out = torch.empty(columns, dtype=dtype, device=table.device)
    block = heuristics.sum_block(rows)
    sum_rows_kernel[(columns,)](table, out, rows, columns, BLOCK=block, num_warps=heuristics.sum_warps(block))
    return out


def _weight_sum(target: Tensor | None, weight: Tensor | None, samples: int, ignore_index: int, device) -> Tensor:
    """The sum of the weights of the samples that count: one float64 number on the device."""
    block = heuristics.WEIGHT_BLOCK
    programs = triton.cdiv(samples, block)
    sums = torch.empty(programs, 1, dtype=torch.float64, device=device)
    weight_sum_kernel[(programs,)](target, weight, sums, samples, ignore_index, BLOCK=block, num_warps=4)
    return sums if programs == 1 else _sum_rows(sums, torch.float64)


def _affines(matrices: Matrices, moments: Tensor, sums: Tensor | None, objective: list[float]) -> Tensor:
    """The table of what standardises each class, ``(ROWS, classes)``."""
    classes = matrices.layout.classes
    table = matrices.new(ROWS.value, classes)
    block = heuristics.CLASS_BLOCK
    grid = (triton.cdiv(classes, block),)
    affines_kernel[grid](moments, sums, table, classes, *objective[2:4], BLOCK=block, num_warps=4)
    return table


def forward(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    sample_weight: Tensor | None,
    denominator: Tensor | None,
    moments: Tensor | None,
    objective: list[float],
    scale: float,
    reduction: int,
    class_dim: int,
    num_classes: int,
    ignore_index: int,
    gradient: bool,
    save: bool,
    parts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :meth:`kdkernels.ops.Ops.forward`."""
    by_class = moments is not None
    grad = torch.empty_like(student) if gradient and not by_class else None
    m = _matrices(student, teacher, class_dim, num_classes, grad)
    layout = m.layout
    problem = unpack(tuple(objective), parts, m.dtype == torch.float64)
    _check_moments(problem, moments)
    if gradient and by_class and not save:
        raise ValueError("save must go with gradient where there are moments")
    each = REDUCTIONS[reduction] == "none"
    part_count, saved_count, member_count = problem.columns
    samples = layout.samples
    shape = [size for dim, size in enumerate(student.shape) if each and dim != class_dim]
    saved = m.new(samples, saved_count) if save else m.new(0)
    members = m.new(samples, member_count, dtype=torch.int64) if save else m.new(0, dtype=torch.int64)
    if samples == 0:
        loss, values = m.new(*shape).zero_(), m.new(*shape, part_count).zero_() if parts else m.new(0)
        sums = m.new(2, num_classes, dtype=torch.float64).zero_() if gradient and by_class else student.new_empty(0)
        return loss, values, sums if grad is None else grad, saved, members
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
        affines = _affines(m, moments, None, objective) if moments is not None else None
        tile = heuristics.fused_tile(layout, problem)
        assert tile is not None
        blocks = _sample_blocks(layout, tile)
        rows = m.new(*shape) if each else m.new(blocks, 1, dtype=torch.float64)
        part_rows = None
        if parts:
            part_rows = m.new(*shape, part_count) if each else m.new(blocks, part_count, dtype=torch.float64)
        fused_kernel[(blocks,)](
            student,
            teacher,
            grad,
            target,
            weight,
            divisor,
            affines,
            rows,
            part_rows,
            saved if save else None,
            members if save else None,
            *layout.run_time,
            problem.ks,
            ignore_index,
            scale,
            problem.numbers,
            problem.low,
            TERMS=problem.terms,
            CE=problem.ce,
            STANDARDIZE=problem.standardize,
            COLUMNS=problem.columns,
            EACH=each,
            AXIS=layout.axis,
            WIDE=layout.wide,
            BLOCK_N=tile.block_n,
            BLOCK_C=tile.block_c,
            num_warps=tile.num_warps,
        )
        loss = rows if each else _sum_rows(rows, m.dtype).reshape(())
        values = m.new(0)
        if part_rows is not None:
            values = part_rows if each else _sum_rows(part_rows, m.dtype)
    if grad is None:
        grad = student.new_empty(0)
        if gradient:
            grad = class_sums(
                torch.ones((), dtype=m.dtype, device=student.device),
                student,
                teacher,
                target,
                saved,
                members,
                moments,
                objective,
                class_dim,
                num_classes,
            )
    return loss, values, grad, saved, members


def backward(
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    saved: Tensor,
    members: Tensor,
    moments: Tensor | None,
    sums: Tensor | None,
    objective: list[float],
    class_dim: int,
    num_classes: int,
) -> Tensor:
    """See :meth:`kdkernels.ops.Ops.backward`."""
    gradient = torch.empty_like(student)
    m = _matrices(student, teacher, class_dim, num_classes, gradient)
    layout = m.layout
    problem = unpack(tuple(objective), False, m.dtype == torch.float64)
    _check_moments(problem, moments)
    if (moments is None) != (sums is None):
        raise ValueError("sums must be given with moments")
    if layout.samples == 0:
        return gradient
    with _on_device(student):
        target = _flat(target, torch.int64)
        affines = _affines(m, moments, sums, objective) if moments is not None else None
        tile = heuristics.sweep_tile(layout, problem)
        grid = (_sample_blocks(layout, tile) * triton.cdiv(layout.gradient_classes, tile.block_c),)
        gradient_kernel[grid](
            grad_loss.contiguous(),
            student,
            teacher,
            gradient,
            target,
            affines,
            saved,
            members,
            *layout.run_time,
            problem.numbers,
            problem.low,
            TERMS=problem.terms,
            CE=problem.ce,
            STANDARDIZE=problem.standardize,
            COLUMNS=problem.columns,
            EACH=grad_loss.dim() > 0,
            AXIS=layout.axis,
            WIDE=layout.wide,
            BLOCK_N=tile.block_n,
            BLOCK_C=tile.block_c,
            num_warps=tile.num_warps,
        )
    return gradient


def _check_moments(problem: Problem, moments: Tensor | None) -> None:
    if (problem.standardize == BY_CLASS.value) != (moments is not None):
        raise ValueError("moments must be given where, and only where, logits are standardised by class")


def scale_(gradient: Tensor, factor: Tensor, class_dim: int) -> None:
    """See :meth:`kdkernels.ops.Ops.scale_`."""
    if gradient.numel() == 0:
        return
    layout = _matrices(gradient, gradient, class_dim, gradient.shape[class_dim]).layout
    with _on_device(gradient):
        tile = heuristics.scale_tile(layout)
        grid = (_sample_blocks(layout, tile) * triton.cdiv(layout.classes, tile.block_c),)
        scale_kernel[grid](
            gradient,
            factor.contiguous(),
            layout.sizes,
            layout.student,
            layout.classes,
            EACH=factor.dim() > 0,
            AXIS=layout.axis,
            WIDE=layout.wide,
            BLOCK_N=tile.block_n,
            BLOCK_C=tile.block_c,
            num_warps=tile.num_warps,
        )
