"""Which backend serves a call, and why not the others."""

from __future__ import annotations

import logging

import torch

from kdkernels import _environment, ops
from kdkernels.objective import Objective, check_choice
from kdkernels.validation import Call

logger = logging.getLogger("kdkernels")

#: Names that ``backend=`` and the environment variable KDKERNELS_BACKEND take.
BACKENDS = ("auto", "cpu", "cuda", "triton", "reference")
ENVIRONMENT = "KDKERNELS_BACKEND"
#: Set to 1, an explicit ``backend="triton"`` takes CPU tensors, for Triton's interpreter and for tests.
TRITON_CPU = "KDKERNELS_TRITON_CPU"
#: Set to 1, targets and weights are checked on a GPU too, which waits for it.
DEBUG = "KDKERNELS_DEBUG"

# Read at import, not at every call: to find that a variable is not set takes longer than all other checks of a call.
default_backend = _environment.choice(ENVIRONMENT, BACKENDS, "auto")
debug = _environment.switch(DEBUG)
_environment.switch(TRITON_CPU)  # Tests set it later, so that it is read at each call; a wrong value is an error now.

_logged: set[str] = set()

#: Backends of a device, fastest first; those of any other are the reference alone.
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
#: Dimensions of logits that the kernels' layouts hold.
_MAX_DIMS = 9
#: Terms of an objective that the GPU kernels serve.
_MAX_GPU_TERMS = 2


def why_not(
    backend: str, device_type: str, dims: int = 2, objective: Objective | None = None, double: bool = False
) -> str | None:
    """Why ``backend`` cannot serve an objective or logits of ``dims`` dimensions on ``device_type``; None if it can.

    ``double``: whether the logits of either side are float64.
    """
    if backend == "cpu":
        return _why_not_cpu(device_type, dims, double)
    if backend == "cuda":
        return _why_not_cuda(device_type, dims, objective)
    return _why_not_triton(device_type, objective) if backend == "triton" else None


def _why_not_terms(objective: Objective | None) -> str | None:
    if objective is None or len(objective.terms) <= _MAX_GPU_TERMS:
        return None
    return f"it serves objectives of up to {_MAX_GPU_TERMS} terms, and this one has {len(objective.terms)}"


def _why_not_cpu(device_type: str, dims: int, double: bool) -> str | None:
    if device_type != "cpu":
        return f"it serves CPU tensors, and the logits are on {device_type}"
    if ops.unavailable is not None:
        return ops.unavailable
    if dims > _MAX_DIMS:
        return f"it serves logits of up to {_MAX_DIMS} dimensions, and these have {dims}"
    return "it computes in float32, and the reference backend serves float64 logits" if double else None


def _why_not_triton(device_type: str, objective: Objective | None) -> str | None:
    if device_type == "cpu" and not _environment.switch(TRITON_CPU):
        return f"it serves CUDA tensors, and the logits are on cpu (for tests, {TRITON_CPU}=1 lets it take them)"
    if device_type not in ("cpu", "cuda"):
        return f"it serves CUDA tensors, and the logits are on {device_type}"
    return ops.triton_unavailable or _why_not_terms(objective)


def _why_not_cuda(device_type: str, dims: int, objective: Objective | None) -> str | None:
    if ops.cuda_unavailable is not None:
        return ops.cuda_unavailable
    if dims > _MAX_DIMS:
        return f"it serves logits of up to {_MAX_DIMS} dimensions, and these have {dims}"
    if device_type != "cuda" and not (device_type == "cpu" and ops.cuda_simulated()):
        return f"it serves CUDA tensors, and the logits are on {device_type}"
    reason = _why_not_terms(objective) or (ops.why_not_this_gpu() if device_type == "cuda" else None)
    leads = 0 if objective is None else sum(term.partition.k for term in objective.terms)
    if reason is not None or leads == 0:
        return reason
    most = ops.cuda_most_leads()
    return f"it ranks up to {most} leading classes on this GPU, and these are {leads}" if leads > most else None


def preference(device_type: str) -> tuple[str, ...]:
    """Backends for a device, fastest first."""
    return _PREFERENCE.get(device_type, ("reference",))


def checks_samples(backend: str, call: Call) -> bool:
    """Whether to check targets and weights before the call: the backend does not, it costs little and can be done."""
    if backend == "cpu" or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return debug or (backend == "reference" and call.student.is_cpu)


def choose(call: Call, requested: str = "auto") -> str:
    """The backend that serves ``call``.

    ``"auto"`` means the environment's choice, then the reference for float64 on either side, else the first of
    :func:`preference` that can; it logs once why it passed over a faster one. A backend asked for by name serves the
    call or raises RuntimeError with the reason.
    """
    check_choice("backend", requested, BACKENDS)
    if requested == "auto" and default_backend != "auto":
        requested = default_backend
        check_choice(f"the environment variable {ENVIRONMENT}", requested, BACKENDS)
    student = call.student
    double = torch.float64 in (student.dtype, call.teacher.dtype)
    if requested == "auto" and double:
        return "reference"
    device_type = student.device.type
    for backend in preference(device_type) if requested == "auto" else (requested,):
        reason = why_not(backend, device_type, student.dim(), call.objective, double)
        if reason is None:
            return backend
        if requested != "auto":
            raise RuntimeError(f"backend {requested!r} cannot serve this call: {reason}")
        _log_once(f"backend {backend!r} is passed over: {reason}")
    raise AssertionError("the reference backend serves every call")


def _log_once(message: str) -> None:
    if not torch.compiler.is_compiling() and message not in _logged:
        _logged.add(message)
        logger.warning(message)
