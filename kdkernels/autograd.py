"""The autograd functions that all backends share. Both are once differentiable: second derivatives raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdkernels import distributed
from kdkernels.ops import Ops
from kdkernels.validation import Call


def fused_loss(call: Call, ops: Ops, *, recompute: bool, parts: bool) -> tuple[Tensor, Tensor | None]:
    """``(loss, parts)`` of a checked call by a backend's ops, differentiable in the student's logits if asked for.

    Without a gradient nothing of the logits' size is allocated. ``parts`` has its parts in the last dimension; None
    unless asked for.
    """
    if not (call.student.requires_grad and torch.is_grad_enabled()):
        moments = None if _finds_moments(call, ops) else _class_moments(call, ops)
        loss, values, *_ = ops.forward(call, moments, gradient=False, save=False, parts=parts)
        return loss, values
    result = DistillationFunction.apply(call.student, call, ops, recompute, parts)
    return result if parts else (result, None)


class DistillationFunction(torch.autograd.Function):
    """Loss forward; backward scales the gradient that forward wrote, or recomputes it from what forward saved.

    Where logits are standardised by class, a sample's gradient needs sums over all samples. Where these are shared with
    other processes or depend on an upstream gradient of each sample, it recomputes.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, call: Call, ops: Ops, recompute: bool, parts: bool) -> Any:
        if torch.compiler.is_compiling():
            call = call._replace(student=student)  # tracing knows a function's tensors by its arguments only
        by_class = call.objective.standardize == "class"
        one_factor = call.reduction != "none"
        recompute_asked, recompute = recompute, recompute or _rounds_too_early(student.dtype, call.reduction)
        recompute = recompute or (by_class and not (one_factor and _finds_moments(call, ops)))
        moments = _class_moments(call, ops) if recompute else None
        # With moments, forward's gradient are the sums over samples. One upstream factor can be applied to them later.
        now = not recompute or (moments is not None and one_factor and not recompute_asked)
        loss, values, gradient, saved, members = ops.forward(call, moments, gradient=now, save=recompute, parts=parts)
        if parts:
            ctx.mark_non_differentiable(values)
        ctx.set_materialize_grads(False)
        ctx.ops = ops
        ctx.recompute = recompute
        if recompute:
            ctx.save_for_backward(student, call.teacher, call.target, saved, members, moments, gradient)
            ctx.call = call._replace(student=None, teacher=None, target=None, sample_weight=None, denominator=None)
        else:
            ctx.save_for_backward(gradient)
            ctx.class_dim = call.class_dim
        return (loss, values) if parts else loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return None, None, None, None, None
        # Grad mode is on only where a graph of the backward is asked for; the guard's own cost is not small.
        gradient = _guarded_gradient if torch.is_grad_enabled() else _gradient
        return gradient(ctx, grad_loss), None, None, None, None


def _gradient(ctx: Any, grad_loss: Tensor) -> Tensor:
    ops = ctx.ops
    if ctx.recompute:
        student, teacher, target, saved, members, moments, sums = ctx.saved_tensors
        call = ctx.call._replace(student=student, teacher=teacher, target=target)
        if moments is not None:
            sums = ops.class_sums(call, grad_loss, saved, members, moments) if sums is None else sums * grad_loss
            sums = distributed.summed(sums, call.process_group)
        return ops.backward(call, grad_loss, saved, members, moments, sums)
    (gradient,) = ctx.saved_tensors
    if torch.compiler.is_compiling() or _graph_is_kept():
        # The buffer must survive for the next backward over this graph.
        factor = grad_loss.unsqueeze(ctx.class_dim) if grad_loss.dim() else grad_loss
        return (gradient * factor).to(gradient.dtype)
    # The graph is freed after this backward, so the buffer is ours to scale: no second N x C tensor.
    if not (grad_loss.dim() == 0 and grad_loss.is_cpu and grad_loss.item() == 1):  # asks no device
        ops.scale_(gradient, grad_loss, ctx.class_dim)
    return gradient


_guarded_gradient = once_differentiable(_gradient)


def _finds_moments(call: Call, ops: Ops) -> bool:
    """Whether forward finds the moments of classes itself, where it is not given any."""
    return ops.finds_moments and call.process_group is None


def _class_moments(call: Call, ops: Ops) -> Tensor | None:
    """The moments of the classes where they standardise the logits, over the batches of all processes."""
    if call.objective.standardize != "class":
        return None
    return distributed.merged_moments(ops.class_moments(call), call.process_group)


def _rounds_too_early(dtype: torch.dtype, reduction: str) -> bool:
    """Whether a gradient must not be rounded to ``dtype`` before the upstream gradient is known.

    A float16 gradient would underflow under a loss scaler (a mean over many samples is tiny until it is scaled). A
    bfloat16 one, multiplied later by a factor of each sample, would be rounded twice. Scaling the written gradient
    moves as many bytes as recomputing it.
    """
    return dtype == torch.float16 or (dtype == torch.bfloat16 and reduction == "none")


#: Whether the running backward was asked to keep its graph; True, the safe answer, where torch cannot tell.
_graph_is_kept: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


class OnceDifferentiable(torch.autograd.Function):
    """Identity that gives the reference backend the derivative rules of the others."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> Tensor:
        return grad_loss.clone()
