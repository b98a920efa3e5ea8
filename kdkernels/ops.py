"""The ops of the backends with kernels: loading, calling, and their fake kernels for torch.compile.

``torch.ops.kdkernels.*`` (CPU) and ``torch.ops.kdkernels_cuda.*`` are C++, declared in ``csrc/torch_arguments.h``;
``torch.ops.kdkernels_triton.*`` have the same schemas, are declared here and served by
``kdkernels.triton_kernels.launch``, which is imported with the first call.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdkernels.validation import REDUCTIONS, Call

_PACKAGE = Path(__file__).parent


def _load() -> str | None:
    """Loads the extension; the reason why not, or None."""
    libraries = sorted(_PACKAGE.glob("_C*.so")) + sorted(_PACKAGE.glob("_C*.pyd"))
    if not libraries:
        return "the native extension was not built (no C++ compiler at installation, or KDKERNELS_BUILD_CPU=0)"
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        return f"the native extension {libraries[0].name} could not be loaded: {error}"
    return None


#: Why the native ops are missing, or None where they are there.
unavailable: str | None = _load()


def _why_no_cuda() -> str | None:
    """Why there are no CUDA ops, or None."""
    if unavailable is not None:
        return unavailable
    if hasattr(torch.ops.kdkernels_cuda, "targets"):
        return None
    return "the extension was built without CUDA kernels (no nvcc at installation, or KDKERNELS_BUILD_CUDA=0)"


#: Why the CUDA ops are missing, or None where they are there.
cuda_unavailable: str | None = _why_no_cuda()

#: Why there are no Triton kernels, or None where they can be compiled.
triton_unavailable: str | None = None if importlib.util.find_spec("triton") else "triton is not installed"

_ERROR = re.compile(r"(IndexError|ValueError): ([^\n]*)")
_ERROR_TYPES = {"IndexError": IndexError, "ValueError": ValueError}


def _translated(error: RuntimeError) -> Exception:
    """The stable ABI knows one exception type; the kernels name the right one in the message."""
    match = _ERROR.search(str(error))
    return _ERROR_TYPES[match[1]](match[2]) if match else error


class Ops:
    """The five ops of a backend, called with a checked call.

    ``finds_moments``: whether forward, where logits are standardised by class and no moments are given, finds those of
    the batch itself, and then also writes the student's gradient.
    """

    def __init__(self, namespace: str, *, finds_moments: bool = False) -> None:
        self._ops = getattr(torch.ops, namespace)
        self.finds_moments = finds_moments

    def class_moments(self, call: Call) -> Tensor:
        """Count, mean and sum of squared deviations of each class over the valid samples.

        ``(2, 3, num_classes)`` float64: the student's, then the teacher's. Logits of -inf (masked classes) are not
        counted.
        """
        try:
            return self._ops.class_moments.default(
                call.student,
                call.teacher,
                call.target,
                call.sample_weight,
                call.class_dim,
                call.num_classes,
                call.ignore_index,
            )
        except RuntimeError as error:
            raise _translated(error) from None

    def forward(
        self, call: Call, moments: Tensor | None = None, *, gradient: bool, save: bool, parts: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """``(loss, parts, gradient, saved, members)``; what was not asked for is None.

        ``moments`` are those of :meth:`class_moments` where logits are standardised by class, or None if the op
        :attr:`finds_moments`; else None. ``gradient`` is that of the reduced loss in the student's logits; ``saved``
        and ``members`` are what :meth:`backward` needs to compute it later, as it must where moments are given: then
        ``gradient`` is the :meth:`class_sums` it needs too.
        """
        try:
            return self._ops.forward.default(
                call.student,
                call.teacher,
                call.target,
                call.sample_weight,
                call.denominator,
                moments,
                call.objective.encode(),
                call.scale,
                REDUCTIONS.index(call.reduction),
                call.class_dim,
                call.num_classes,
                call.ignore_index,
                gradient,
                save,
                parts,
            )
        except RuntimeError as error:
            raise _translated(error) from None

    def class_sums(self, call: Call, grad_loss: Tensor, saved: Tensor, members: Tensor, moments: Tensor) -> Tensor:
        """Sums over the samples of the gradient in each class's standardised logits and of its product with them.

        ``(2, num_classes)`` float64; ``grad_loss`` is a scalar or has one value a sample.
        """
        return self._ops.class_sums.default(
            grad_loss,
            call.student,
            call.teacher,
            call.target,
            saved,
            members,
            moments,
            call.objective.encode(),
            call.class_dim,
            call.num_classes,
        )

    def backward(
        self,
        call: Call,
        grad_loss: Tensor,
        saved: Tensor,
        members: Tensor,
        moments: Tensor | None = None,
        sums: Tensor | None = None,
    ) -> Tensor:
        """The gradient in the student's logits from what :meth:`forward` saved.

        ``grad_loss`` is a scalar or has one value a sample; ``sums`` are those of :meth:`class_sums` where there are
        ``moments``.
        """
        return self._ops.backward.default(
            grad_loss,
            call.student,
            call.teacher,
            call.target,
            saved,
            members,
            moments,
            sums,
            call.objective.encode(),
            call.class_dim,
            call.num_classes,
        )

    def scale_(self, gradient: Tensor, factor: Tensor, class_dim: int) -> None:
        """Multiplies a gradient in place by a scalar or by one factor a sample; a scalar 1 touches no memory."""
        self._ops.scale_.default(gradient, factor, class_dim)


#: The ops of each backend that has kernels.
OPS = {
    "cpu": Ops("kdkernels", finds_moments=True),
    "cuda": Ops("kdkernels_cuda"),
    "triton": Ops("kdkernels_triton"),
}


INSTRUCTION_SETS = ("baseline", "avx2", "avx512")


def cpu_instruction_set() -> str:
    """The instruction set the CPU kernels use now."""
    return INSTRUCTION_SETS[torch.ops.kdkernels.cpu_instruction_set.default()]


def set_cpu_instruction_set(name: str) -> None:
    """Makes the CPU kernels use ``"baseline"``, ``"avx2"`` or ``"avx512"``; ``"auto"`` for the best this CPU has.

    The environment variable ``KDKERNELS_CPU_ISA`` sets the same at start. Raises ValueError where the CPU or the build
    lacks it.
    """
    if name != "auto" and name not in INSTRUCTION_SETS:
        raise ValueError(f"instruction set must be 'auto' or one of {INSTRUCTION_SETS}, got {name!r}")
    if unavailable:
        raise RuntimeError(unavailable)
    index = -1 if name == "auto" else INSTRUCTION_SETS.index(name)
    if not torch.ops.kdkernels.set_cpu_instruction_set.default(index):
        raise ValueError(f"instruction set {name!r} is not supported by this CPU or build")


def _heed_environment() -> None:
    """The kernels read KDKERNELS_CPU_ISA themselves, and go without what they cannot use; this says so."""
    wanted = os.environ.get("KDKERNELS_CPU_ISA", "auto")
    if wanted not in ("auto", cpu_instruction_set()):
        supported = [INSTRUCTION_SETS[index] for index in torch.ops.kdkernels.cpu_instruction_sets.default()]
        logging.getLogger("kdkernels").warning(
            f"the environment variable KDKERNELS_CPU_ISA must be one of {supported} on this CPU, got {wanted!r}; "
            f"{cpu_instruction_set()!r} is used"
        )


if unavailable is None:
    _heed_environment()


def _constant_while_traced(function: Any) -> Any:
    """Does what torch.compiler.assume_constant_result() does, which first imports the compiler: another second."""
    function._dynamo_marked_constant = True
    return function


@_constant_while_traced
def cuda_simulated() -> bool:
    """Whether the CUDA kernels run in a simulator, on CPU tensors: in tests."""
    return cuda_unavailable is None and torch.ops.kdkernels_cuda.simulated.default()


def cuda_targets() -> list[int]:
    """Compute capabilities (10 * major + minor) that the CUDA kernels were compiled for."""
    return torch.ops.kdkernels_cuda.targets.default() if cuda_unavailable is None else []


@functools.cache
def _why_not_gpu(index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    capability = 10 * major + minor
    if torch.ops.kdkernels_cuda.serves.default(capability):
        return None
    return f"its kernels were compiled for compute capabilities {cuda_targets()}, and this GPU's is {capability}"


@functools.cache
def _most_leads_of_gpu(index: int) -> int:
    return torch.ops.kdkernels_cuda.most_leads.default(index)


@_constant_while_traced
def cuda_most_leads() -> int:
    """How many leading classes of a sample the CUDA kernels have room for on the current, or the simulated, GPU."""
    if cuda_simulated():
        return torch.ops.kdkernels_cuda.most_leads.default(0)
    return _most_leads_of_gpu(torch.cuda.current_device())


@_constant_while_traced
def why_not_this_gpu() -> str | None:
    """Why the current GPU cannot run the CUDA kernels, or None."""
    if torch.version.cuda is None or not (torch.cuda.is_initialized() or torch.cuda.is_available()):
        return "torch has no CUDA device"
    return _why_not_gpu(torch.cuda.current_device())


_TRITON_SCHEMAS = (
    "class_moments(Tensor student, Tensor teacher, Tensor? target, Tensor? sample_weight, int class_dim, "
    "SymInt num_classes, int ignore_index) -> Tensor",
    "forward(Tensor student, Tensor teacher, Tensor? target, Tensor? sample_weight, Tensor? denominator, "
    "Tensor? moments, float[] objective, float scale, int reduction, int class_dim, SymInt num_classes, "
    "int ignore_index, bool gradient, bool save, bool parts) -> "
    "(Tensor loss, Tensor? parts, Tensor? gradient, Tensor? saved, Tensor? members)",
    "class_sums(Tensor grad_loss, Tensor student, Tensor teacher, Tensor? target, Tensor saved, Tensor members, "
    "Tensor moments, float[] objective, int class_dim, SymInt num_classes) -> Tensor",
    "backward(Tensor grad_loss, Tensor student, Tensor teacher, Tensor? target, Tensor saved, Tensor members, "
    "Tensor? moments, Tensor? sums, float[] objective, int class_dim, SymInt num_classes) -> Tensor",
    "scale_(Tensor(a!) gradient, Tensor factor, int class_dim) -> ()",
)


def _register_triton() -> torch.library.Library:
    """Declares the Triton backend's ops. CPU tensors are for Triton's interpreter and for tests."""
    library = torch.library.Library("kdkernels_triton", "DEF")
    for schema in _TRITON_SCHEMAS:
        name = library.define(schema)
        for key in ("CPU", "CUDA"):
            library.impl(name, _lazily(name), key)
    return library


def _lazily(name: str) -> Callable[..., Any]:
    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module("kdkernels.triton_kernels.launch"), name)(*args)

    return launch


def _register_fakes(namespace: str, sizes_of: Callable[[Sequence[float]], Sequence[int]]) -> None:
    """Fake kernels; ``sizes_of`` an objective: numbers a sample of loss parts, saved numbers and members."""

    def fake_gradient(student, moments, num_classes):
        if moments is None:
            return torch.empty_like(student)
        return student.new_empty((2, num_classes), dtype=torch.float64)

    @torch.library.register_fake(f"{namespace}::class_moments")
    def _(student, teacher, target, sample_weight, class_dim, num_classes, ignore_index):
        return student.new_empty((2, 3, num_classes), dtype=torch.float64)

    @torch.library.register_fake(f"{namespace}::forward")
    def _(
        student,
        teacher,
        target,
        sample_weight,
        denominator,
        moments,
        objective,
        scale,
        reduction,
        class_dim,
        num_classes,
        ignore_index,
        gradient,
        save,
        parts,
    ):
        double = torch.float64 in (student.dtype, teacher.dtype)
        dtype = torch.float64 if double else torch.float32
        samples = student.shape[:class_dim] + student.shape[class_dim + 1 :]
        reduced = samples if REDUCTIONS[reduction] == "none" else ()
        count = student.numel() // student.shape[class_dim] if student.dim() else 1
        sizes = sizes_of(objective)
        empty = student.new_empty
        return (
            empty(reduced, dtype=dtype),
            empty((*reduced, sizes[0]), dtype=dtype) if parts else None,
            fake_gradient(student, moments, num_classes) if gradient else None,
            empty((count, sizes[1]), dtype=dtype) if save else None,
            empty((count, sizes[2]), dtype=torch.int64) if save else None,
        )

    @torch.library.register_fake(f"{namespace}::class_sums")
    def _(grad_loss, student, teacher, target, saved, members, moments, objective, class_dim, num_classes):
        return student.new_empty((2, num_classes), dtype=torch.float64)

    @torch.library.register_fake(f"{namespace}::backward")
    def _(grad_loss, student, teacher, target, saved, members, moments, sums, objective, class_dim, num_classes):
        return torch.empty_like(student)

    @torch.library.register_fake(f"{namespace}::scale_")
    def _(gradient, factor, class_dim):
        return None


if unavailable is None:
    _register_fakes("kdkernels", torch.ops.kdkernels.sizes.default)
if cuda_unavailable is None:
    _register_fakes("kdkernels_cuda", torch.ops.kdkernels_cuda.sizes.default)
if triton_unavailable is None:
    _library = _register_triton()
    _register_fakes(
        "kdkernels_triton",
        lambda objective: importlib.import_module("kdkernels.triton_kernels.objective").sizes(tuple(objective)),
    )
