"""How a loss takes part in autograd, on every backend with kernels: differentiable once.

All ways lead to one op each (:class:`kdkernels.backends.Way`) and share what is kept for backward and what backward
computes:

- eager code goes through :class:`LossFunction`, the transforms of ``torch.func`` through
  :class:`TransformableLossFunction`, whose form costs more in every call;
- ``torch.compile`` and ``torch.export`` see the op itself, which has the same derivative.

A second derivative raises, and so does whatever would need one; none is a constant in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kdkernels import distributed
from kdkernels.backends import BACKENDS, SETTINGS, Arguments, Backend, Tensors, Way
from kdkernels.ops import run, transformed, translated
from kdkernels.validation import REDUCTIONS, Call

_ONCE = (
    "kdkernels losses are differentiable once: a second derivative (create_graph=True, hessian, hvp, forward-mode over "
    "reverse-mode) is not supported. backend='reference' differentiates twice"
)

_STUDENT_ONLY = "kdkernels losses have a forward-mode derivative in student_logits only: detach the rest"


def loss_of(call: Call, backend: Backend, *, recompute: bool, parts: bool) -> tuple[Tensor, Tensor | None]:
    """``(loss, parts)`` of a checked call by a backend's ops, differentiable in the student's logits if asked for.

    Without a gradient nothing of the logits' size is allocated. ``parts`` has its parts in the last dimension; None
    unless asked for.
    """
    student = call.student
    forward_mode = forward_ad._current_level >= 0
    if not (forward_mode or (student.requires_grad and torch.is_grad_enabled())):
        outputs = run(backend.loss.op, backend.loss.inputs(_arguments(call, backend, backend.loss, parts)))
        return outputs[0], outputs[1]
    if forward_mode:
        call = _in_forward_mode(call)
    way = backend.way(call, recompute=recompute, transformed=transformed())
    arguments = _arguments(call, backend, way, parts)
    try:
        if torch.compiler.is_compiling():
            outputs = way.op(*way.inputs(arguments))
        elif transformed():
            outputs = TransformableLossFunction.apply(way, *arguments)
        else:
            result = LossFunction.apply(call.student, way, arguments)
            return result if parts else (result, None)
    except RuntimeError as error:
        raise translated(error) from None
    return outputs[0], outputs[1]


def _in_forward_mode(call: Call) -> Call:
    """A call whose tangent is right: in float32, as it is a sum over gradients, and of the student's alone."""
    if not transformed():
        others = (call.teacher, call.sample_weight, call.denominator)
        if any(other is not None and forward_ad.unpack_dual(other).tangent is not None for other in others):
            raise RuntimeError(_STUDENT_ONLY)
    half = call.student.dtype in (torch.float16, torch.bfloat16)
    return call._replace(student=call.student.float()) if half else call


def _arguments(call: Call, backend: Backend, way: Way, parts: bool) -> Arguments:
    """The op's arguments; where logits are standardised by class, the moments are found here unless the op does."""
    moments = None
    if call.objective.standardize == "class" and not (way.finds_moments and call.process_group is None):
        samples = (call.student.detach(), call.teacher, call.target, call.sample_weight)
        moments = run(backend.class_moments, (*samples, call.class_dim, call.num_classes, call.ignore_index))
        moments = distributed.merged_moments(moments, call.process_group)
    structure, numbers = call.objective.encode()
    return Arguments(
        call.student,
        call.teacher,
        call.target,
        call.sample_weight,
        call.denominator,
        moments,
        structure,
        numbers,
        call.scale,
        REDUCTIONS.index(call.reduction),
        call.class_dim,
        call.num_classes,
        call.ignore_index,
        parts,
        distributed.name_of(call.process_group),
    )


#: The hooks that pack saved tensors, or None.
_saved_tensors_hooks: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks

#: Whether the running backward was asked to keep its graph; True, the safe answer, where torch cannot tell.
_graph_is_kept: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


class LossFunction(torch.autograd.Function):
    """``(student, way, arguments) -> loss`` or, where parts are wanted, ``(loss, parts)``."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, way: Way, arguments: Arguments) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = way.op(*way.inputs(arguments))
        # What packs saved tensors may keep them: then a gradient is not ours to change.
        keep(ctx, way, arguments, outputs, ours=_saved_tensors_hooks(True) is None)
        if not arguments.parts:
            return outputs[0]
        ctx.mark_non_differentiable(outputs[1])
        return outputs[:2]

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, None, None]:
        return gradient_of(ctx, grad_loss), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, *_: Any) -> Any:
        slope = _tangent_of_loss(ctx, tangent)
        return (slope, None) if ctx.parts else slope


class TransformableLossFunction(torch.autograd.Function):
    """``(way, *Arguments) -> the op's outputs``, the same in the form that the transforms of ``torch.func`` need."""

    generate_vmap_rule = True

    @staticmethod
    def forward(way: Way, *arguments: Any) -> tuple[Tensor | None, ...]:
        return run(way.op, way.inputs(Arguments(*arguments)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        ctx.constants = (None,) * (len(output) - 1)
        keep(ctx, inputs[0], Arguments(*inputs[1:]), output)
        _mark_constants(ctx, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # Transforms always ask for the graph of the backward; the gradient's ops raise where it is differentiated.
        gradient = None if grads[0] is None else _gradient(ctx, grads[0])
        return None, gradient, *_NO_OTHERS

    @staticmethod
    def jvp(ctx: Any, _way: None, tangent: Tensor | None, *others: Any) -> tuple[Tensor | None, ...]:
        return _tangent_of_loss(ctx, tangent, others), *ctx.constants


#: Of the arguments but the student.
_NO_OTHERS = (None,) * (len(Arguments._fields) - 1)


def _mark_constants(ctx: Any, outputs: tuple[Tensor | None, ...]) -> None:
    """Of the outputs only the loss is differentiable."""
    ctx.mark_non_differentiable(*(tensor for tensor in outputs[1:] if tensor is not None))


def _tangent_of_loss(ctx: Any, tangent: Tensor | None, others: tuple[Any, ...] = ()) -> Tensor:
    """<gradient, tangent of the student>: the derivative of the loss in that direction."""
    if tangent is None or any(isinstance(other, Tensor) for other in others):
        raise RuntimeError(_STUDENT_ONLY)
    ones = ctx.ones
    if ones.dim() and ctx.by_class:
        raise RuntimeError(
            "kdkernels has no forward-mode derivative of standardize='class' with reduction='none', where each "
            "loss depends on all samples; backend='reference' has one"
        )
    product = _gradient(ctx, ones).to(ones.dtype) * tangent
    return product.sum(ctx.class_dim) if ones.dim() else product.sum()


def keep(ctx: Any, way: Way, arguments: Arguments, outputs: Tensors, *, ours: bool = False) -> None:
    """Keeps what backward needs; ``ours``: nobody else sees the outputs but the loss."""
    ctx.set_materialize_grads(False)
    kept, inference = way.kept(arguments, outputs), None
    if len(kept) > 1:
        # Autograd does not take tensors made in inference mode; these stay beside the others.
        inference = {i: tensor for i, tensor in enumerate(kept) if tensor is not None and tensor.is_inference()}
        kept = [None if i in inference else tensor for i, tensor in enumerate(kept)]
    ctx.save_for_backward(*kept)
    ctx.state = way, arguments[SETTINGS:], ours, inference
    if forward_ad._current_level >= 0:
        ctx.save_for_forward(*kept)
        ctx.by_class, ctx.parts, ctx.class_dim = arguments.moments is not None, arguments.parts, arguments.class_dim
        ctx.ones = torch.ones_like(outputs[0])


def gradient_of(ctx: Any, grad_loss: Tensor | None) -> Tensor | None:
    """The gradient in the student's logits for an upstream gradient of the loss; RuntimeError if it is differentiated.

    Grad mode is on in a backward whose graph is asked for.
    """
    if (torch.is_grad_enabled() or forward_ad._current_level >= 0) and not torch.compiler.is_compiling():
        raise RuntimeError(_ONCE)
    return None if grad_loss is None else _gradient(ctx, grad_loss)


def _gradient(ctx: Any, grad_loss: Tensor) -> Tensor:
    (way, settings, ours, inference), kept = ctx.state, ctx.saved_tensors
    if inference:
        kept = [inference.get(i, tensor) for i, tensor in enumerate(kept)]
    if way.recomputes and _watched():
        return OnceFunction.apply(way, len(kept), grad_loss, *kept, *settings)
    return way.gradient(settings, kept, grad_loss, _graph_is_kept(), ours)


def _watched() -> bool:
    """Whether the graph of a backward is kept, as transforms have it."""
    return transformed() or (torch.is_grad_enabled() and forward_ad._current_level < 0)


class OnceFunction(torch.autograd.Function):
    """``(way, how many were kept, grad_loss, *kept, *settings) -> the gradient``, whose derivative raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(way: Way, count: int, grad_loss: Tensor, *rest: Any) -> Tensor:
        return way.gradient(rest[count:], rest[:count], grad_loss, True, False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(_ONCE)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(_ONCE)


def _each_in_turn(op: Any) -> Callable[..., Any]:
    """A batching rule for torch.func.vmap: the op for each entry, one after the other."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        results = [
            op(*(a.select(dim, i) if isinstance(dim, int) else a for a, dim in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        columns = list(zip(*results, strict=True))
        stacked = tuple(None if column[0] is None else torch.stack(column) for column in columns)
        return stacked, tuple(None if column is None else 0 for column in stacked)

    return rule


def _register(backend: Backend, op: Any) -> None:
    """Gives an op the derivative of eager losses."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        found = backend.way_of(op, inputs)
        ctx.others = (None,) * (len(inputs) - 1)
        if found is None:
            ctx.mark_non_differentiable(*(tensor for tensor in output if tensor is not None))
        else:
            keep(ctx, *found, output)
            _mark_constants(ctx, output)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradient_of(ctx, grads[0]), *ctx.others

    torch.library.register_autograd(op, backward, setup_context=setup_context)


for _backend in BACKENDS.values():
    for _op in _backend.differentiable:
        _register(_backend, _op)
    for _op in _backend.batched:
        torch.library.register_vmap(_op, _each_in_turn(_op))
