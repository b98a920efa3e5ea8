"""Checks of a call's tensors, done before anything is computed. Errors name the argument and what was expected."""

from __future__ import annotations

import math
import sys
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels._describe import describe
from kdkernels.distributed import ProcessGroup, is_process_group
from kdkernels.objective import Objective, check_choice, check_integer, check_number

LOGIT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
REDUCTIONS = ("none", "sum", "mean", "batchmean")
MODES = ("fused", "recompute")


class Call(NamedTuple):
    """A checked call: tensors as the backends take them, and the plain values that go with them.

    ``target`` (int64) and ``sample_weight`` have the sample dimensions' shape; ``class_dim`` is not negative.
    A target that only marks ignored samples is -1 there, ``ignore_index``, and 0 elsewhere.
    A mean over the caller's own denominator is a sum: divided by ``denominator`` if that is a tensor, multiplied by
    ``scale`` if it is a number.
    """

    student: Tensor
    teacher: Tensor
    target: Tensor | None
    sample_weight: Tensor | None
    denominator: Tensor | None
    objective: Objective
    scale: float
    reduction: str
    class_dim: int
    num_classes: int
    ignore_index: int
    process_group: ProcessGroup | None = None


def check_call(
    student: Tensor,
    teacher: Tensor,
    objective: Objective,
    target: Tensor | None,
    sample_weight: Tensor | None,
    denominator: float | Tensor | None,
    reduction: str,
    class_dim: int | None,
    num_classes: int | None,
    ignore_index: int,
    process_group: ProcessGroup | None = None,
) -> Call:
    """The call with every argument checked against the others; TypeError or ValueError otherwise."""
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be a kdkernels.Objective, got {describe(objective)}")
    check_choice("reduction", reduction, REDUCTIONS)
    ignore_index = check_integer("ignore_index", ignore_index)
    if process_group is not None:
        _check_process_group(process_group, objective)
    _check_dense("student_logits", student)
    _check_dense("teacher_logits", teacher)
    if class_dim is None:
        class_dim = 1
        if target is None and student.dim() == 3:
            _warn_of_class_dim()
    class_dim, num_classes = _check_shapes(student, teacher, class_dim, num_classes)
    if num_classes < objective.smallest_class_count:
        k = objective.smallest_class_count - 1
        raise ValueError(f"k must be smaller than the number of classes {num_classes}, got {k}")
    if teacher.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "teacher_logits must not require grad, got requires_grad=True: no gradient flows to the teacher. "
            "Pass teacher_logits.detach() or run the teacher under torch.no_grad()"
        )
    samples = _samples(student.shape, class_dim)
    if target is not None:
        target = _check_target(target, samples, student.device)
        if not objective.needs_target:
            # Labels need not be classes here. As 0 and -1 the kernels take them for what they mark.
            target, ignore_index = (target == ignore_index).long().neg(), -1
    elif objective.needs_target:
        what = "ce_weight" if objective.ce_weight else "the loss's target partition"
        raise TypeError(f"target is required by {what}, got None; expected integers of shape {samples}")
    if sample_weight is not None:
        sample_weight = _check_sample_weight(sample_weight, samples, student.device)
    scale = 1.0
    if denominator is not None:
        denominator, scale = _check_denominator(denominator, reduction, student.device)
        reduction = "sum"
    return Call(
        student,
        teacher,
        target,
        sample_weight,
        denominator,
        objective,
        scale,
        reduction,
        class_dim,
        num_classes,
        ignore_index,
        process_group,
    )


def _check_process_group(process_group: object, objective: Objective) -> None:
    if not is_process_group(process_group):
        raise TypeError(
            "process_group must be None or a torch.distributed.ProcessGroup this process is in, "
            f"got {describe(process_group)}"
        )
    if objective.standardize != "class":
        raise ValueError(
            "process_group shares the statistics of standardize='class', got it with "
            f"standardize={objective.standardize!r}"
        )


def _check_dense(name: str, logits: Tensor) -> None:
    if type(logits) is not Tensor:
        if not isinstance(logits, Tensor):
            raise TypeError(f"{name} must be a floating point tensor, got {describe(logits)}")
        _refuse_dtensor(name, logits)
    if logits.dtype not in LOGIT_DTYPES:
        expected = "float32, float64, float16 or bfloat16"
        raise TypeError(f"{name} must be a {expected} tensor, got {describe(logits)}")
    if logits.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {logits.layout}")


def _refuse_dtensor(name: str, tensor: Tensor) -> None:
    if hasattr(tensor, "full_tensor"):
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor. Pass {name}.to_local() if its processes share the samples "
            f"(the loss is then that of this process's samples) and {name}.full_tensor() if they share the classes"
        )


_warned: set[str] = set()


def _warn_of_class_dim() -> None:
    """Warns once that the class dimension of logits of tokens may be meant to be another one."""
    if "class_dim" in _warned:
        return
    _warned.add("class_dim")
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("kdkernels", "torch")):
        frame, level = frame.f_back, level + 1
    warnings.warn(
        "the logits have 3 dimensions, and neither class_dim nor a target is given: dimension 1 is taken for the "
        "classes. Pass class_dim=-1 for logits of shape (batch, tokens, classes), class_dim=1 to confirm",
        UserWarning,
        stacklevel=level,
    )


# torch.compile then calls it while it traces, in place of breaking the graph.
_warn_of_class_dim._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check_shapes(student: Tensor, teacher: Tensor, class_dim: int, num_classes: int | None) -> tuple[int, int]:
    if student.device != teacher.device:
        raise ValueError(f"teacher_logits must be on student_logits' device {student.device}, got {teacher.device}")
    class_dim = check_integer("class_dim", class_dim)
    shape, teacher_shape = student.shape, teacher.shape
    dims = len(shape)
    if not -dims <= class_dim < dims:
        raise ValueError(f"class_dim must be a dimension of logits of shape {tuple(shape)}, got {class_dim}")
    class_dim %= dims
    if num_classes is None and shape == teacher_shape and shape[class_dim] > 0:
        return class_dim, shape[class_dim]
    if len(teacher_shape) != dims or _samples(shape, class_dim) != _samples(teacher_shape, class_dim):
        raise ValueError(
            f"teacher_logits must have student_logits' shape {tuple(shape)}"
            f"{' outside class_dim' if num_classes is not None else ''}, got {tuple(teacher_shape)}"
        )
    counts = shape[class_dim], teacher_shape[class_dim]
    if num_classes is None:
        if counts[0] != counts[1]:
            raise ValueError(
                f"teacher_logits must have student_logits' {counts[0]} classes in dimension {class_dim}, got "
                f"{counts[1]}; num_classes=n compares the first n classes of each"
            )
        raise ValueError(f"student_logits must have at least one class, got shape {tuple(shape)}")
    num_classes = check_integer("num_classes", num_classes)
    if not 1 <= num_classes <= min(counts):
        raise ValueError(
            f"num_classes must be between 1 and the {min(counts)} classes of the logits, got {num_classes}"
        )
    return class_dim, num_classes


def _samples(shape: torch.Size, class_dim: int) -> tuple[int, ...]:
    sizes = tuple(shape)  # slices of a torch.Size are several times slower
    return sizes[:class_dim] + sizes[class_dim + 1 :]


def _check_target(target: Tensor, samples: tuple[int, ...], device: torch.device) -> Tensor:
    if type(target) is not Tensor:
        _refuse_dtensor("target", target)
    right_type = isinstance(target, Tensor) and target.dtype in _INDEX_DTYPES
    if not right_type or target.shape != samples or target.device != device:
        expected = f"an integer tensor of the sample dimensions' shape {samples} on {device}"
        error = ValueError if right_type else TypeError
        raise error(f"target must be {expected}, got {describe(target)}")
    return target if target.dtype == torch.int64 else target.long()


def _check_sample_weight(weight: Tensor, samples: tuple[int, ...], device: torch.device) -> Tensor:
    count = math.prod(samples)
    expected = f"a tensor of {count} values >= 0 in the sample dimensions' shape {samples} on {device}"
    _refuse_dtensor("sample_weight", weight)
    if not isinstance(weight, Tensor) or weight.is_complex():
        raise TypeError(f"sample_weight must be {expected}, got {describe(weight)}")
    if weight.shape not in (samples, (count,)) or weight.device != device:
        raise ValueError(f"sample_weight must be {expected}, got {describe(weight)}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("sample_weight must not require grad, got requires_grad=True: pass sample_weight.detach()")
    return weight.reshape(samples)


def _check_denominator(
    denominator: float | Tensor, reduction: str, device: torch.device
) -> tuple[Tensor | None, float]:
    if reduction != "mean":
        raise ValueError(f"denominator replaces the count of reduction='mean', got it with reduction={reduction!r}")
    if isinstance(denominator, Tensor) and denominator.is_cpu and denominator.dim() == 0 and device.type != "cpu":
        denominator = denominator.detach().item()
    if not isinstance(denominator, Tensor):
        number = check_number("denominator", denominator, at_least=0.0)
        if torch.compiler.is_compiling():
            # A tensor is an operand of the graph, where a number that changes would be a constant.
            denominator = torch.ones((), dtype=torch.float64, device=device) * number
        elif number >= sys.float_info.min:
            return None, 1.0 / number
        else:
            denominator = torch.zeros((), dtype=torch.float64, device=device)  # 0 as a tensor: 0 for a sum of anything
    _refuse_dtensor("denominator", denominator)
    if denominator.dim() != 0 or denominator.is_complex() or denominator.device != device:
        expected = f"a number >= 0 or a 0-d real tensor on {device}"
        raise ValueError(f"denominator must be {expected}, got {describe(denominator)}")
    return denominator.detach(), 1.0


def check_sample_values(call: Call) -> None:
    """IndexError for a target out of range, ValueError for a weight below 0 (for backends that do not check)."""
    if call.sample_weight is not None:
        bad = ~(call.sample_weight >= 0)
        if bad.any():
            sample = int(bad.flatten().nonzero()[0])
            value = call.sample_weight.flatten()[sample].item()
            raise ValueError(f"sample_weight must be >= 0, got {value} for sample {sample}")
    if call.target is not None:
        target = call.target
        bad = ((target < 0) | (target >= call.num_classes)) & (target != call.ignore_index)
        if bad.any():
            sample = int(bad.flatten().nonzero()[0])
            value = target.flatten()[sample].item()
            raise IndexError(
                f"target must be in [0, {call.num_classes}) or ignore_index {call.ignore_index}, "
                f"got {value} for sample {sample}"
            )
