"""What autograd asks of a backend with kernels: ops that give a loss, and the gradients that go with them.

A *way* to a gradient is one op and what becomes of its outputs: it is written with the loss and scaled later, or it is
computed in backward from little that was kept of every sample. Each backend says which way serves a call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels import distributed, ops
from kdkernels.ops import run
from kdkernels.validation import Call


class Arguments(NamedTuple):
    """What the ops that give a loss are told; those of a backend have flags beside it."""

    student: Tensor
    teacher: Tensor
    target: Tensor | None
    sample_weight: Tensor | None
    denominator: Tensor | None
    #: What ``class_moments`` gave, where logits are standardised by class.
    moments: Tensor | None
    structure: Sequence[int]
    numbers: Tensor
    scale: float
    reduction: int
    class_dim: int
    num_classes: int
    ignore_index: int
    parts: bool
    #: Name of the group that shares the statistics of standardize="class"; the op's derivative needs it.
    process_group: str | None = None


#: An op's own flags are before this field.
_FLAGS = Arguments._fields.index("parts")
#: From this field on the arguments are no tensors of samples or classes: settings, which backward keeps.
SETTINGS = Arguments._fields.index("structure")
Settings = tuple[Any, ...]
Tensors = Sequence[Any]  # of Tensor | None


class Way(ABC):
    """An op that gives a loss and, second, its parts (None unless wanted), and the gradient in the student's logits."""

    #: The op; its first input is the student's logits.
    op: Any
    #: Whether backward computes the gradient from the logits.
    recomputes: bool
    #: Whether the op finds the moments of classes by itself, unless they are shared with other processes.
    finds_moments = False

    @abstractmethod
    def inputs(self, arguments: Arguments) -> tuple[Any, ...]:
        """The op's inputs."""

    @abstractmethod
    def kept(self, arguments: Arguments, outputs: Tensors) -> Tensors:
        """Of what went into the op and what it returned, what the gradient is made of."""

    @abstractmethod
    def gradient(self, settings: Settings, kept: Tensors, grad_loss: Tensor, again: bool, ours: bool) -> Tensor:
        """The gradient for that of the loss, a scalar or one a sample.

        ``again``: what was kept is for other backwards, too. ``ours``: it is nobody else's.
        """


class Backend(ABC):
    """The ops of a backend; all leave their arguments alone but those whose name ends with ``_``."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.ops = getattr(torch.ops, namespace)
        #: Count, mean and sum of squared deviations of each class over the valid samples: ``(2, 3, num_classes)``
        #: float64, the student's, then the teacher's. Logits of -inf (masked classes) are not counted.
        self.class_moments = self.ops.class_moments.default
        #: What gives a loss without a gradient.
        self.loss: Way
        #: The ops that give a loss, and all that are computed for each entry of a batch in turn under torch.func.vmap.
        self.differentiable: tuple[Any, ...]
        self.batched: tuple[Any, ...]

    @abstractmethod
    def way(self, call: Call, *, recompute: bool, transformed: bool) -> Way:
        """The way to the gradient of a call.

        ``recompute``: as the caller asks; ``transformed``: a transform of torch.func is running, for which the gradient
        must come from an op of its own.
        """

    @abstractmethod
    def way_of(self, op: Any, inputs: tuple[Any, ...]) -> tuple[Way, Arguments] | None:
        """The way that an op with these inputs belongs to, and their arguments; None for a loss without a gradient."""


def _rounds_too_early(call: Call) -> bool:
    """Whether the gradient must not be rounded to its dtype before the upstream gradient is known.

    A float16 gradient would underflow under a loss scaler (a mean over many samples is tiny until it is scaled). A
    bfloat16 one, multiplied later by a factor of each sample, would be rounded twice. Scaling the written gradient
    moves as many bytes as recomputing it.
    """
    dtype = call.student.dtype
    return dtype == torch.float16 or (dtype == torch.bfloat16 and call.reduction == "none")


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers that may be looked at: nothing traces or batches it."""
    return (
        type(tensor) is Tensor
        and not torch.compiler.is_compiling()
        and not ops.transformed()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._functorch.is_legacy_batchedtensor(tensor)
    )


def _product(gradient: Tensor, factor: Tensor, class_dim: int) -> Tensor:
    """As in the kernels an ignored sample's gradient stays 0, whatever comes from above."""
    factor = factor.unsqueeze(class_dim) if factor.dim() else factor
    return torch.where(gradient == 0, gradient, (gradient * factor).to(gradient.dtype))


def _scaled(scale_: Any, gradient: Tensor, factor: Tensor, class_dim: int, again: bool, ours: bool) -> Tensor:
    if not (_is_plain(factor) and type(gradient) is Tensor):
        return _product(gradient, factor, class_dim)
    if not again and factor.dim() == 0 and factor.is_cpu and factor.item() == 1:  # asks no device
        return gradient
    if again or not ours:
        gradient = gradient.clone()
    run(scale_, (gradient, factor, class_dim))
    return gradient


# The CPU: fused, or select, reduce and finalize, and later apply ---------------------------------------------------


class _NormBackward:
    """The op ``class_norm_backward`` or, where that may be, the one that writes where it reads."""

    def __init__(self, namespace: Any) -> None:
        self._copy = namespace.class_norm_backward.default
        self._in_place = namespace.class_norm_backward_.default

    def __call__(self, inputs: tuple[Any, ...], *, in_place: bool) -> Tensor:
        gradient, _, _, _, _, _, factor, *_ = inputs
        if not (in_place and _is_plain(gradient) and _is_plain(factor)):
            return run(self._copy, inputs)
        run(self._in_place, inputs)
        return gradient


class _Fused(Way):
    """Loss and gradient at once, for constant moments where processes share those of the classes."""

    recomputes, finds_moments = False, True

    def __init__(self, namespace: Any, *, gradient: bool) -> None:
        self.op = namespace.fused.default
        self._flag = gradient
        self._scale = namespace.scale_.default
        self._norm_backward = _NormBackward(namespace)

    def inputs(self, arguments: Arguments) -> tuple[Any, ...]:
        return (*arguments[:_FLAGS], self._flag, *arguments[_FLAGS:])

    def kept(self, arguments: Arguments, outputs: Tensors) -> Tensors:
        _, _, gradient, sums = outputs
        if sums is None:
            return (gradient,)
        student, _, target, sample_weight, _, moments = arguments[:SETTINGS]
        return gradient, student, target, sample_weight, moments, sums

    def gradient(self, settings: Settings, kept: Tensors, grad_loss: Tensor, again: bool, ours: bool) -> Tensor:
        gradient = _scaled(self._scale, kept[0], grad_loss, settings[4], again, ours)
        if len(kept) == 1:
            return gradient
        structure, numbers, _, _, class_dim, num_classes, ignore_index, _, group = settings
        _, *of_samples, sums = kept
        sums = distributed.summed(sums * grad_loss, group)  # each process has its own upstream gradient
        of_logits = structure, numbers, class_dim, num_classes, ignore_index
        inputs = (gradient, *of_samples, sums, sums.new_ones(()), *of_logits)
        return self._norm_backward(inputs, in_place=ours and not again)


class _Evaluated(Way):
    """Loss and coefficients of the gradient, which backward applies to the logits."""

    recomputes = True

    def __init__(self, namespace: Any) -> None:
        self.op = namespace.evaluate.default
        self._apply, self._class_sums = namespace.apply.default, namespace.class_sums.default

    def inputs(self, arguments: Arguments) -> tuple[Any, ...]:
        return arguments

    def kept(self, arguments: Arguments, outputs: Tensors) -> Tensors:
        student, teacher, target, _, _, moments = arguments[:SETTINGS]
        _, _, selected, coefficients = outputs
        return student, teacher, target, selected, coefficients, moments

    def gradient(self, settings: Settings, kept: Tensors, grad_loss: Tensor, again: bool, ours: bool) -> Tensor:
        structure, numbers, _, _, class_dim, num_classes, _, _, group = settings
        of_logits, sums = (structure, numbers, class_dim, num_classes), None
        if kept[-1] is not None:  # moments of classes
            sums = distributed.summed(run(self._class_sums, (grad_loss, *kept, *of_logits)), group)
        return run(self._apply, (grad_loss, *kept, sums, *of_logits))


class CpuBackend(Backend):
    """``fused`` where the gradient can be written with the loss, else ``evaluate`` and ``apply``."""

    def __init__(self) -> None:
        super().__init__("kdkernels")
        self.loss = _Fused(self.ops, gradient=False)
        self._fused, self._evaluated = _Fused(self.ops, gradient=True), _Evaluated(self.ops)
        self.differentiable = self._fused.op, self._evaluated.op
        names = "select", "reduce", "finalize", "apply", "class_sums", "class_norm_backward"
        of_steps = (getattr(self.ops, name).default for name in names)
        self.batched = *self.differentiable, self.class_moments, *of_steps

    def way(self, call: Call, *, recompute: bool, transformed: bool) -> Way:
        if call.objective.standardize == "class":
            # What flows through the moments depends on the upstream gradient of each sample, and all but cancels the
            # rest where samples are few: too late for what was rounded to 16 bits.
            recompute = recompute or call.reduction == "none" or call.student.dtype != torch.float32
        return self._evaluated if recompute or transformed or _rounds_too_early(call) else self._fused

    def way_of(self, op: Any, inputs: tuple[Any, ...]) -> tuple[Way, Arguments] | None:
        if op is self._evaluated.op:
            return self._evaluated, Arguments(*inputs)
        if not inputs[_FLAGS]:
            return None
        return self._fused, Arguments(*inputs[:_FLAGS], *inputs[_FLAGS + 1 :])


# GPUs: forward, which may save what backward reads ------------------------------------------------------------------


class _Forward(Way):
    """The op ``forward``, which writes the gradient or saves numbers of each sample for the op ``backward``.

    Both: it saves, and adds up what the gradient through class statistics needs for an upstream gradient of 1.
    """

    def __init__(self, namespace: Any, *, gradient: bool, save: bool) -> None:
        self.op = namespace.forward.default
        self.recomputes = save
        self._flags = gradient, save
        #: Sums over the samples of the gradient in each class's standardised logits and of its product with them,
        #: ``(2, num_classes)`` float64, from an upstream gradient and what was saved.
        self._class_sums = namespace.class_sums.default
        #: The gradient in the student's logits, from the same and, with moments, these sums.
        self._backward = namespace.backward.default
        self._scale = namespace.scale_.default

    def inputs(self, arguments: Arguments) -> tuple[Any, ...]:
        return (*arguments[:_FLAGS], *self._flags, *arguments[_FLAGS:])

    def kept(self, arguments: Arguments, outputs: Tensors) -> Tensors:
        _, _, gradient, saved, members = outputs
        if not self.recomputes:
            return (gradient,)
        student, teacher, target, _, _, moments = arguments[:SETTINGS]
        return student, teacher, target, saved, members, moments, None if moments is None else gradient

    def gradient(self, settings: Settings, kept: Tensors, grad_loss: Tensor, again: bool, ours: bool) -> Tensor:
        structure, numbers, _, _, class_dim, num_classes, _, _, group = settings
        if not self.recomputes:
            return _scaled(self._scale, *kept, grad_loss, class_dim, again, ours)
        *samples, moments, sums = kept
        of_logits = structure, numbers, class_dim, num_classes
        if moments is not None:
            if sums is None:
                sums = run(self._class_sums, (grad_loss, *samples, moments, *of_logits))
            else:
                sums = sums * grad_loss
            sums = distributed.summed(sums, group)
        return run(self._backward, (grad_loss, *samples, moments, sums, *of_logits))


class GpuBackend(Backend):
    """``forward`` and ``backward``, by CUDA or Triton kernels."""

    def __init__(self, namespace: str) -> None:
        super().__init__(namespace)
        self.loss = _Forward(self.ops, gradient=False, save=False)
        self._written = _Forward(self.ops, gradient=True, save=False)
        self._saved = _Forward(self.ops, gradient=False, save=True)
        self._saved_with_sums = _Forward(self.ops, gradient=True, save=True)
        self.differentiable = (self.loss.op,)
        self.batched = self.loss.op, self.class_moments, self.ops.class_sums.default, self.ops.backward.default

    def way(self, call: Call, *, recompute: bool, transformed: bool) -> Way:
        # By class a sample's gradient needs sums over all samples, which forward adds up if one factor applies to all.
        by_class = call.objective.standardize == "class"
        if by_class and call.reduction != "none" and not recompute:
            return self._saved_with_sums
        return self._saved if recompute or transformed or by_class or _rounds_too_early(call) else self._written

    def way_of(self, op: Any, inputs: tuple[Any, ...]) -> tuple[Way, Arguments] | None:
        gradient, save = inputs[_FLAGS : _FLAGS + 2]
        if not (gradient or save):
            return None
        arguments = Arguments(*inputs[:_FLAGS], *inputs[_FLAGS + 2 :])
        return (self._written if not save else self._saved), arguments


#: The backends that have kernels here.
BACKENDS: dict[str, Backend] = {}
if ops.unavailable is None:
    BACKENDS["cpu"] = CpuBackend()
if ops.cuda_unavailable is None:
    BACKENDS["cuda"] = GpuBackend("kdkernels_cuda")
if ops.triton_unavailable is None:
    BACKENDS["triton"] = GpuBackend("kdkernels_triton")
