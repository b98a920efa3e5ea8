"""The ops of the backends with kernels: loading, calling, and their fake kernels for torch.compile.

``torch.ops.kdkernels.*`` (CPU) are declared and documented in ``csrc/torch/cpu_ops.cpp``, those of
``torch.ops.kdkernels_cuda`` in ``csrc/torch/cuda_ops.cpp``; ``torch.ops.kdkernels_triton.*`` have the schemas of the
latter, are declared here and served by ``kdkernels.triton_kernels.launch``, which is imported with the first call.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdkernels import _environment
from kdkernels.validation import REDUCTIONS

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


def translated(error: RuntimeError) -> Exception:
    """The stable ABI knows one exception type; the kernels name the right one in the message."""
    match = _ERROR.search(str(error))
    return _ERROR_TYPES[match[1]](match[2]) if match else error


#: Whether a transform of torch.func is running.
transformed: Callable[[], bool] = torch._C._are_functorch_transforms_active


def run(op: Any, inputs: tuple[Any, ...]) -> Any:
    """The result of an op that autograd does not record, with the kernels' errors as what they are."""
    try:
        if transformed() or torch.compiler.is_compiling():
            return op(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)
    except RuntimeError as error:
        raise translated(error) from None


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
    """Uses the instruction set that the environment names, or says that this CPU goes without it."""
    wanted = _environment.choice("KDKERNELS_CPU_ISA", ("auto", *INSTRUCTION_SETS), "auto")
    if unavailable is not None or wanted == "auto":
        return
    try:
        set_cpu_instruction_set(wanted)
    except ValueError as error:
        logging.getLogger("kdkernels").warning(
            f"the environment variable KDKERNELS_CPU_ISA cannot be followed: {error}; {cpu_instruction_set()!r} is used"
        )


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
    "Tensor? moments, int[] structure, Tensor numbers, float scale, int reduction, int class_dim, SymInt num_classes, "
    "int ignore_index, bool gradient, bool save, bool parts, str? process_group=None) -> "
    "(Tensor loss, Tensor? parts, Tensor? gradient, Tensor? saved, Tensor? members)",
    "class_sums(Tensor grad_loss, Tensor student, Tensor teacher, Tensor? target, Tensor saved, Tensor members, "
    "Tensor moments, int[] structure, Tensor numbers, int class_dim, SymInt num_classes) -> Tensor",
    "backward(Tensor grad_loss, Tensor student, Tensor teacher, Tensor? target, Tensor saved, Tensor members, "
    "Tensor? moments, Tensor? sums, int[] structure, Tensor numbers, int class_dim, SymInt num_classes) -> Tensor",
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


def _samples(student: Tensor, class_dim: int) -> tuple[int, ...]:
    return (*student.shape[:class_dim], *student.shape[class_dim + 1 :])


def _count(student: Tensor, class_dim: int) -> int:
    return student.numel() // student.shape[class_dim] if student.dim() else 1


def _fake_loss(like: Tensor, samples: tuple[int, ...], reduction: int, parts: int | None, dtype: torch.dtype) -> Any:
    """Loss and parts."""
    shape = samples if REDUCTIONS[reduction] == "none" else ()
    return like.new_empty(shape, dtype=dtype), (None if parts is None else like.new_empty((*shape, parts), dtype=dtype))


def _register_fakes(namespace: str) -> None:
    """Fake kernels of the ops that all backends have."""

    @torch.library.register_fake(f"{namespace}::class_moments")
    def _(student, teacher, target, sample_weight, class_dim, num_classes, ignore_index):
        return student.new_empty((2, 3, num_classes), dtype=torch.float64)

    @torch.library.register_fake(f"{namespace}::scale_")
    def _(gradient, factor, class_dim):
        return None


def _register_cpu_fakes() -> None:
    sizes, f32 = torch.ops.kdkernels.sizes.default, torch.float32

    @torch.library.register_fake("kdkernels::fused")
    def _(student, _t, _y, _w, _d, moments, structure, *rest):
        _, _, reduction, class_dim, num_classes, _, gradient, parts, *_ = rest
        loss = _fake_loss(student, _samples(student, class_dim), reduction, sizes(structure)[0] if parts else None, f32)
        sums = student.new_empty((2, num_classes), dtype=torch.float64) if gradient and moments is not None else None
        return *loss, torch.empty_like(student) if gradient else None, sums

    @torch.library.register_fake("kdkernels::evaluate")
    def _(student, _t, _y, _w, _d, _m, structure, *rest):
        _, _, reduction, class_dim, _, _, parts, *_ = rest
        part_count, ranks, _, coefficients = sizes(structure)
        loss = _fake_loss(student, _samples(student, class_dim), reduction, part_count if parts else None, f32)
        count = _count(student, class_dim)
        selected = student.new_empty((count, ranks), dtype=torch.int64)
        return *loss, selected, student.new_empty((count, coefficients), dtype=f32)

    @torch.library.register_fake("kdkernels::select")
    def _(student, _t, _y, _w, _m, structure, _n, class_dim, *_):
        return student.new_empty((_count(student, class_dim), sizes(structure)[1]), dtype=torch.int64)

    @torch.library.register_fake("kdkernels::reduce")
    def _(student, _t, _y, _w, _s, _m, structure, _n, class_dim, *_):
        return student.new_empty((_count(student, class_dim), sizes(structure)[2]), dtype=f32)

    @torch.library.register_fake("kdkernels::finalize")
    def _(stats, _y, _w, _d, structure, _n, _scale, reduction, shape, class_dim, _c, _i, parts):
        part_count, _, _, coefficients = sizes(structure)
        samples = (*shape[:class_dim], *shape[class_dim + 1 :])
        loss = _fake_loss(stats, samples, reduction, part_count if parts else None, f32)
        return *loss, stats.new_empty((stats.shape[0], coefficients), dtype=f32)

    @torch.library.register_fake("kdkernels::apply")
    def _(_g, student, *_):
        return torch.empty_like(student)

    @torch.library.register_fake("kdkernels::class_sums")
    def _(_g, student, *rest):
        return student.new_empty((2, rest[-1]), dtype=torch.float64)

    @torch.library.register_fake("kdkernels::class_norm_backward")
    def _(gradient, *_):
        return torch.empty_like(gradient)

    @torch.library.register_fake("kdkernels::class_norm_backward_")
    def _(*_):
        return None


def _register_gpu_fakes(namespace: str, sizes_of: Callable[[Sequence[int]], Sequence[int]]) -> None:
    """``sizes_of`` a structure: numbers a sample of loss parts, saved numbers and members."""

    @torch.library.register_fake(f"{namespace}::forward")
    def _(student, teacher, _y, _w, _d, moments, structure, *rest):
        _, _, reduction, class_dim, num_classes, _, gradient, save, parts, *_ = rest
        double = torch.float64 in (student.dtype, teacher.dtype)
        dtype = torch.float64 if double else torch.float32
        sizes, count = sizes_of(structure), _count(student, class_dim)
        loss = _fake_loss(student, _samples(student, class_dim), reduction, sizes[0] if parts else None, dtype)
        empty = student.new_empty
        by_class = moments is not None
        written = empty((2, num_classes), dtype=torch.float64) if by_class else torch.empty_like(student)
        return (
            *loss,
            written if gradient else None,
            empty((count, sizes[1]), dtype=dtype) if save else None,
            empty((count, sizes[2]), dtype=torch.int64) if save else None,
        )

    @torch.library.register_fake(f"{namespace}::class_sums")
    def _(grad_loss, student, teacher, target, saved, members, moments, structure, numbers, class_dim, num_classes):
        return student.new_empty((2, num_classes), dtype=torch.float64)

    @torch.library.register_fake(f"{namespace}::backward")
    def _(grad_loss, student, *_):
        return torch.empty_like(student)


if unavailable is None:
    _register_fakes("kdkernels")
    _register_cpu_fakes()
if cuda_unavailable is None:
    _register_fakes("kdkernels_cuda")
    _register_gpu_fakes("kdkernels_cuda", torch.ops.kdkernels_cuda.sizes.default)
if triton_unavailable is None:
    _library = _register_triton()
    _register_fakes("kdkernels_triton")
    _register_gpu_fakes(
        "kdkernels_triton",
        lambda structure: importlib.import_module("kdkernels.triton_kernels.objective").sizes(tuple(structure)),
    )
