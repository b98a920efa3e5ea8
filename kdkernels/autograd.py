"""The autograd functions that all backends share. All are once differentiable: second derivatives raise."""

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
    student = call.student
    if not (student.requires_grad and torch.is_grad_enabled()):
        moments = None if _finds_moments(call, ops) else _class_moments(call, ops)
        loss, values, *_ = ops.forward(call, moments, gradient=False, save=False, parts=parts)
        return loss, values
    if recompute or _must_recompute(call, ops):
        result = RecomputedGradient.apply(student, call, ops, parts, recompute)
    else:
        result = KeptGradient.apply(student, call, ops, parts)
    return result if parts else (result, None)


class KeptGradient(torch.autograd.Function):
    """Loss and gradient forward; backward scales the gradient."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, call: Call, ops: Ops, parts: bool) -> Any:
        loss, values, gradient, _, _ = ops.forward(_traced(call, student), None, gradient=True, save=False, parts=parts)
        ctx.save_for_backward(gradient)
        ctx.ops, ctx.class_dim = ops, call.class_dim
        return _outputs(ctx, loss, values)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return None, None, None, None
        # Grad mode is on only where a graph of the backward is asked for; the guard's own cost is not small.
        gradient = _scaled_guarded if torch.is_grad_enabled() else _scaled
        return gradient(ctx, grad_loss), None, None, None


class RecomputedGradient(torch.autograd.Function):
    """Loss forward; backward computes the gradient from what forward saved.

    Where logits are standardised by class, that needs sums over all samples. Forward adds them up already if one
    upstream factor can be applied to them later, unless recomputing was ``asked`` for.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, call: Call, ops: Ops, parts: bool, asked: bool) -> Any:
        call = _traced(call, student)
        moments = _class_moments(call, ops)
        now = moments is not None and call.reduction != "none" and not asked
        loss, values, sums, saved, members = ops.forward(call, moments, gradient=now, save=True, parts=parts)
        ctx.save_for_backward(student, call.teacher, call.target, saved, members, moments, sums)
        ctx.ops = ops
        ctx.call = call._replace(student=None, teacher=None, target=None, sample_weight=None, denominator=None)
        return _outputs(ctx, loss, values)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return None, None, None, None, None
        gradient = _recomputed_guarded if torch.is_grad_enabled() else _recomputed
        return gradient(ctx, grad_loss), None, None, None, None


def _traced(call: Call, student: Tensor) -> Call:
    """The call with the student that a function was given: tracing knows its tensors by its arguments only."""
    return call._replace(student=student) if torch.compiler.is_compiling() else call


def _outputs(ctx: Any, loss: Tensor, values: Tensor | None) -> Any:
    ctx.set_materialize_grads(False)
    if values is None:
        return loss
    ctx.mark_non_differentiable(values)
    return loss, values


def _scaled(ctx: Any, grad_loss: Tensor) -> Tensor:
    (gradient,) = ctx.saved_tensors
    if torch.compiler.is_compiling() or _graph_is_kept():
        # The buffer must survive for the next backward over this graph.
        factor = grad_loss.unsqueeze(ctx.class_dim) if grad_loss.dim() else grad_loss
        return (gradient * factor).to(gradient.dtype)
    # The graph is freed after this backward, so the buffer is ours to scale: no second N x C tensor.
    if not (grad_loss.dim() == 0 and grad_loss.is_cpu and grad_loss.item() == 1):  # asks no device
        ctx.ops.scale_(gradient, grad_loss, ctx.class_dim)
    return gradient


def _recomputed(ctx: Any, grad_loss: Tensor) -> Tensor:
    ops = ctx.ops
    student, teacher, target, saved, members, moments, sums = ctx.saved_tensors
    call = ctx.call._replace(student=student, teacher=teacher, target=target)
    if moments is not None:
        sums = ops.class_sums(call, grad_loss, saved, members, moments) if sums is None else sums * grad_loss
        sums = distributed.summed(sums, call.process_group)
    return ops.backward(call, grad_loss, saved, members, moments, sums)


_scaled_guarded = once_differentiable(_scaled)
_recomputed_guarded = once_differentiable(_recomputed)


def _must_recompute(call: Call, ops: Ops) -> bool:
    """Whether the gradient cannot be written, or not be rounded to its dtype, before the upstream gradient is known.

    Where logits are standardised by class, a sample's gradient needs sums over all samples; these may be shared with
    other processes or depend on an upstream gradient of each sample. A float16 gradient would underflow under a loss
    scaler (a mean over many samples is tiny until it is scaled). A bfloat16 one, multiplied later by a factor of each
    sample, would be rounded twice. Scaling the written gradient moves as many bytes as recomputing it.
    """
    dtype, each = call.student.dtype, call.reduction == "none"
    if dtype == torch.float16 or (each and dtype == torch.bfloat16):
        return True
    return call.objective.standardize == "class" and (each or not _finds_moments(call, ops))


def _finds_moments(call: Call, ops: Ops) -> bool:
    """Whether forward finds the moments of classes itself, where it is not given any."""
    return ops.finds_moments and call.process_group is None


def _class_moments(call: Call, ops: Ops) -> Tensor | None:
    """The moments of the classes where they standardise the logits, over the batches of all processes."""
    if call.objective.standardize != "class":
        return None
    return distributed.merged_moments(ops.class_moments(call), call.process_group)


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
