"""How a loss takes part in autograd, on every backend with kernels: differentiable once.

All ways lead to the op ``forward`` and share what is kept for backward and what backward computes:

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
from kdkernels.ops import OPS, Arguments, Ops, Outputs, translated
from kdkernels.validation import REDUCTIONS, Call

_ONCE = (
    "kdkernels losses are differentiable once: a second derivative (create_graph=True, hessian, hvp, forward-mode over "
    "reverse-mode) is not supported. backend='reference' differentiates twice"
)

_STUDENT_ONLY = "kdkernels losses have a forward-mode derivative in student_logits only: detach the rest"


def fused_loss(call: Call, ops: Ops, *, recompute: bool, parts: bool) -> tuple[Tensor, Tensor | None]:
    """``(loss, parts)`` of a checked call by a backend's ops, differentiable in the student's logits if asked for.

    Without a gradient nothing of the logits' size is allocated. ``parts`` has its parts in the last dimension; None
    unless asked for.
    """
    student = call.student
    forward_mode = forward_ad._current_level >= 0
    if not (forward_mode or (student.requires_grad and torch.is_grad_enabled())):
        outputs = _run(ops.forward, _arguments(call, ops, parts, gradient=False, save=False))
        return outputs[0], outputs[1]
    if forward_mode:
        call = _in_forward_mode(call)
    # Under a transform the gradient is an op of its own, whose derivative raises.
    save = recompute or _transformed() or _must_recompute(call, ops)
    # By class the gradient needs sums over all samples, which forward adds up if one upstream factor applies to all.
    sums_now = call.objective.standardize == "class" and call.reduction != "none" and not recompute and save
    arguments = _arguments(call, ops, parts, gradient=sums_now or not save, save=save)
    try:
        if torch.compiler.is_compiling():
            outputs = ops.forward(*arguments)
        elif _transformed():
            outputs = TransformableLossFunction.apply(ops, *arguments)
        else:
            result = LossFunction.apply(call.student, ops, arguments)
            return result if parts else (result, None)
    except RuntimeError as error:
        raise translated(error) from None
    return outputs[0], outputs[1]


def _in_forward_mode(call: Call) -> Call:
    """A call whose tangent is right: in float32, as it is a sum over gradients, and of the student's alone."""
    if not _transformed():
        others = (call.teacher, call.sample_weight, call.denominator)
        if any(other is not None and forward_ad.unpack_dual(other).tangent is not None for other in others):
            raise RuntimeError(_STUDENT_ONLY)
    half = call.student.dtype in (torch.float16, torch.bfloat16)
    return call._replace(student=call.student.float()) if half else call


def _arguments(call: Call, ops: Ops, parts: bool, *, gradient: bool, save: bool) -> Arguments:
    """The op's arguments; where logits are standardised by class, the moments are found here unless forward can."""
    moments = None
    if call.objective.standardize == "class" and (save or not _finds_moments(call, ops)):
        samples = (call.student.detach(), call.teacher, call.target, call.sample_weight)
        moments = _run(ops.class_moments, (*samples, call.class_dim, call.num_classes, call.ignore_index))
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
        gradient,
        save,
        parts,
        distributed.name_of(call.process_group),
    )


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


#: Whether a transform of torch.func is running.
_transformed: Callable[[], bool] = torch._C._are_functorch_transforms_active

#: The hooks that pack saved tensors, or None.
_saved_tensors_hooks: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks

#: Whether the running backward was asked to keep its graph; True, the safe answer, where torch cannot tell.
_graph_is_kept: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _below_autograd(op: Any, arguments: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def _run(op: Any, arguments: tuple[Any, ...]) -> Any:
    """The result of an op that autograd does not record, with the kernels' errors as what they are."""
    try:
        if _transformed() or torch.compiler.is_compiling():
            return op(*arguments)
        return _below_autograd(op, arguments)
    except RuntimeError as error:
        raise translated(error) from None


class LossFunction(torch.autograd.Function):
    """``(student, ops, arguments) -> loss`` or, where parts are wanted, ``(loss, parts)``."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, ops: Ops, arguments: Arguments) -> Any:
        outputs = _below_autograd(ops.forward, arguments)
        keep(ctx, ops, arguments, outputs)
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
    """``(ops, *Arguments) -> Outputs``, the same in the form that the transforms of ``torch.func`` need."""

    generate_vmap_rule = True

    @staticmethod
    def forward(ops: Ops, *arguments: Any) -> tuple[Tensor | None, ...]:
        return _run(ops.forward, arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        keep(ctx, inputs[0], Arguments(*inputs[1:]), output)
        _mark_constants(ctx, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # Transforms always ask for the graph of the backward; the gradient's ops raise where it is differentiated.
        gradient = None if grads[0] is None else _gradient(ctx, grads[0])
        return None, gradient, *_NO_OTHERS

    @staticmethod
    def jvp(ctx: Any, _ops: None, tangent: Tensor | None, *others: Any) -> tuple[Tensor | None, ...]:
        return _tangent_of_loss(ctx, tangent, others), *_NO_TANGENTS


#: Of the outputs but the loss, and of the arguments but the student.
_NO_TANGENTS = (None,) * (len(Outputs._fields) - 1)
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


def keep(ctx: Any, ops: Ops, call: Arguments, outputs: tuple[Tensor | None, ...]) -> None:
    """Keeps what backward needs: the gradient or, where it is recomputed, what the op ``backward`` takes."""
    loss, _, gradient, saved, members = outputs
    ctx.set_materialize_grads(False)
    ctx.ops, ctx.class_dim, ctx.recomputes = ops, call.class_dim, call.save
    if forward_ad._current_level >= 0:
        ctx.by_class, ctx.parts, ctx.ones = call.moments is not None, call.parts, torch.ones_like(loss)
    if not call.save:
        # What packs saved tensors may keep them: then the gradient is not ours to change.
        ctx.ours = _saved_tensors_hooks(True) is None
        _save(ctx, gradient)
        return
    ctx.process_group = call.process_group
    ctx.shape = call.structure, call.numbers, call.class_dim, call.num_classes
    sums = None if call.moments is None else gradient
    tensors = call.student, call.teacher, call.target, saved, members, call.moments, sums
    # Autograd does not take tensors made in inference mode; these stay beside the others.
    ctx.inference = {i: tensor for i, tensor in enumerate(tensors) if tensor is not None and tensor.is_inference()}
    _save(ctx, *(None if i in ctx.inference else tensor for i, tensor in enumerate(tensors)))


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    ctx.save_for_backward(*tensors)
    if forward_ad._current_level >= 0:
        ctx.save_for_forward(*tensors)


def gradient_of(ctx: Any, grad_loss: Tensor | None) -> Tensor | None:
    """The gradient in the student's logits for an upstream gradient of the loss; RuntimeError if it is differentiated.

    Grad mode is on in a backward whose graph is asked for.
    """
    if (torch.is_grad_enabled() or forward_ad._current_level >= 0) and not torch.compiler.is_compiling():
        raise RuntimeError(_ONCE)
    return None if grad_loss is None else _gradient(ctx, grad_loss)


def _gradient(ctx: Any, grad_loss: Tensor) -> Tensor:
    return _recomputed(ctx, grad_loss) if ctx.recomputes else _scaled(ctx, grad_loss)


def _scaled(ctx: Any, grad_loss: Tensor) -> Tensor:
    (gradient,) = ctx.saved_tensors
    if not (_is_plain(grad_loss) and type(gradient) is Tensor):
        factor = grad_loss.unsqueeze(ctx.class_dim) if grad_loss.dim() else grad_loss
        # As in the kernels an ignored sample's gradient stays 0, whatever comes from above.
        return torch.where(gradient == 0, gradient, (gradient * factor).to(gradient.dtype))
    kept = _graph_is_kept()
    if not kept and grad_loss.dim() == 0 and grad_loss.is_cpu and grad_loss.item() == 1:  # asks no device
        return gradient
    if kept or not ctx.ours:
        gradient = gradient.clone()  # the saved one is for the next backward over this graph
    _run(ctx.ops.scale_, (gradient, grad_loss, ctx.class_dim))
    return gradient


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers that may be looked at: nothing traces or batches it."""
    return (
        type(tensor) is Tensor
        and not torch.compiler.is_compiling()
        and not _transformed()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._functorch.is_legacy_batchedtensor(tensor)
    )


def _recomputed(ctx: Any, grad_loss: Tensor) -> Tensor:
    tensors = [ctx.inference.get(i, tensor) for i, tensor in enumerate(ctx.saved_tensors)]
    student, teacher, target, saved, members, moments, sums = tensors
    if moments is not None:
        if sums is None:
            sums = _once(ctx.ops.class_sums, grad_loss, student, teacher, target, saved, members, moments, *ctx.shape)
        else:
            sums = sums * grad_loss
        sums = distributed.summed(sums, ctx.process_group)
    return _once(ctx.ops.backward, grad_loss, student, teacher, target, saved, members, moments, sums, *ctx.shape)


def _once(op: Any, *arguments: Any) -> Tensor:
    """The result of an op of backward; where its graph is kept, as transforms have it, its derivative raises."""
    watched = _transformed() or (torch.is_grad_enabled() and forward_ad._current_level < 0)
    return OnceFunction.apply(op, *arguments) if watched else _run(op, arguments)


class OnceFunction(torch.autograd.Function):
    """``(op, *arguments) -> its result``, whose derivative raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op: Any, *arguments: Any) -> Tensor:
        return _run(op, arguments)

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


def _register(ops: Ops) -> None:
    """Gives the ops of a namespace the derivative of eager losses, and batching rules."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        call = Arguments(*inputs)
        if call.gradient or call.save:
            keep(ctx, ops, call, output)
            _mark_constants(ctx, output)
        else:
            ctx.mark_non_differentiable(*(tensor for tensor in output if tensor is not None))

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradient_of(ctx, grads[0]), *_NO_OTHERS

    torch.library.register_autograd(f"{ops.namespace}::forward", backward, setup_context=setup_context)
    for op in (ops.forward, ops.class_moments, ops.class_sums, ops.backward):
        torch.library.register_vmap(op, _each_in_turn(op))


for _ops in OPS.values():
    _register(_ops)
