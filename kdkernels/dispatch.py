"""Which backend serves a call, and why not the others."""

from __future__ import annotations

import logging
import os

import torch

from kdkernels import ops
from kdkernels.objective import check_choice
from kdkernels.validation import Call

logger = logging.getLogger("kdkernels")

#: Names that ``backend=`` and the environment variable KDKERNELS_BACKEND take.
BACKENDS = ("auto", "cpu", "cuda", "triton", "reference")
ENVIRONMENT = "KDKERNELS_BACKEND"
#: Set to 1, an explicit ``backend="triton"`` takes CPU tensors, for Triton's interpreter and for tests.
TRITON_CPU = "KDKERNELS_TRITON_CPU"
#: Set to 1, targets and weights are checked on a GPU too, which waits for it.
DEBUG = "KDKERNELS_DEBUG"
_logged: set[str] = set()


#: Dimensions of logits that the kernels' layouts hold.
_MAX_DIMS = 9
#: Leading classes that the CUDA kernels have room for.
_MOST_LEADS = 1024


def why_not(backend: str, device_type: str, dims: int = 2) -> str | None:
    """Why ``backend`` cannot serve logits of ``dims`` dimensions on ``device_type``; None if it can."""
    if backend == "reference":
        return None
    if backend == "triton":
        return _why_not_triton(device_type)
    return _why_not_cuda(device_type, dims) if backend == "cuda" else _why_not_cpu(device_type, dims)


def _why_not_cpu(device_type: str, dims: int) -> str | None:
    if device_type != "cpu":
        return f"it serves CPU tensors, and the logits are on {device_type}"
    if ops.unavailable is not None:
        return ops.unavailable
    if dims > _MAX_DIMS:
        return f"it serves logits of up to {_MAX_DIMS} dimensions, and these have {dims}"
    return None


def _why_not_triton(device_type: str) -> str | None:
    if device_type == "cpu" and os.environ.get(TRITON_CPU) != "1":
        return f"it serves CUDA tensors, and the logits are on cpu (for tests, {TRITON_CPU}=1 lets it take them)"
    if device_type not in ("cpu", "cuda"):
        return f"it serves CUDA tensors, and the logits are on {device_type}"
    return ops.triton_unavailable


def _why_not_cuda(device_type: str, dims: int) -> str | None:
    if ops.cuda_unavailable is not None:
        return ops.cuda_unavailable
    if dims > _MAX_DIMS:
        return f"it serves logits of up to {_MAX_DIMS} dimensions, and these have {dims}"
    if ops.cuda_simulated():
        return None if device_type == "cpu" else "its launches go to a simulator, which takes CPU tensors"
    if device_type != "cuda":
        return f"it serves CUDA tensors, and the logits are on {device_type}"
    return ops.why_not_this_gpu()


def _why_not_call(backend: str, call: Call) -> str | None:
    """Why ``backend`` cannot serve this call's objective, or None."""
    if backend != "cuda":
        return None
    leads = sum(term.partition.k for term in call.objective.terms)
    return None if leads <= _MOST_LEADS else f"it ranks up to {_MOST_LEADS} leading classes, and these are {leads}"


def preference(device_type: str) -> tuple[str, ...]:
    """Backends for a device, fastest first."""
    gpu = ("cuda", "triton", "reference")
    return {"cpu": ("cpu", "reference"), "cuda": gpu}.get(device_type, ("reference",))


def checks_samples(backend: str, call: Call) -> bool:
    """Whether to check targets and weights before the call: the backend does not, and it costs little."""
    if backend == "cpu":
        return False
    return (backend == "reference" and call.student.is_cpu) or os.environ.get(DEBUG) == "1"


def choose(call: Call, requested: str = "auto") -> str:
    """The backend that serves ``call``.

    ``"auto"`` means the environment's choice, then the first of :func:`preference` that can; it logs once why it passed
    over a faster one. A backend asked for by name serves the call or raises RuntimeError with the reason.
    """
    check_choice("backend", requested, BACKENDS)
    if requested == "auto":
        requested = os.environ.get(ENVIRONMENT, "auto")
        check_choice(f"the environment variable {ENVIRONMENT}", requested, BACKENDS)
    device_type, dims = call.student.device.type, call.student.dim()
    if requested != "auto":
        reason = why_not(requested, device_type, dims) or _why_not_call(requested, call)
        if reason is not None:
            raise RuntimeError(f"backend {requested!r} cannot serve this call: {reason}")
        return requested
    for backend in preference(device_type):
        reason = why_not(backend, device_type, dims) or _why_not_call(backend, call)
        if reason is None:
            return backend
        _log_once(f"backend {backend!r} is passed over: {reason}")
    raise AssertionError("the reference backend serves every call")


def _log_once(message: str) -> None:
    if not torch.compiler.is_compiling() and message not in _logged:
        _logged.add(message)
        logger.warning(message)


def report() -> str:
    """What was built and what would serve a CPU and a CUDA tensor, in a few lines for a person."""
    lines = [f"torch        {torch.__version__}"]
    if ops.unavailable is None:
        sets = ", ".join(ops.INSTRUCTION_SETS[i] for i in torch.ops.kdkernels.cpu_instruction_sets.default())
        lines.append(f"extension    built; CPU kernels for {sets}; in use: {ops.cpu_instruction_set()}")
    else:
        lines.append(f"extension    missing: {ops.unavailable}")
    targets = ", ".join(f"sm_{target}" for target in ops.cuda_targets())
    lines.append(f"CUDA         {ops.cuda_unavailable or f'kernels for {targets} and, from PTX, newer GPUs'}")
    lines.append(f"triton       {ops.triton_unavailable or 'installed'}")
    lines.append(f"environment  {ENVIRONMENT}={os.environ.get(ENVIRONMENT, '(not set)')}")
    for device_type in ("cpu", "cuda"):
        for backend in preference(device_type):
            reason = why_not(backend, device_type)
            if reason is None:
                lines.append(f"{device_type:4} tensors -> {backend}")
                break
            lines.append(f"{device_type:4} tensors    not {backend}: {reason}")
    return "\n".join(lines)
