"""``python -m kdkernels``: what was built, which backend serves which tensors, whether its results are right."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels import __version__, dispatch, functional, ops
from kdkernels._describe import short

#: Backends with kernels; the reference is what they are compared with.
KERNELS = ("cpu", "cuda", "triton")
#: Losses to compare, each in one dtype of logits: a whole partition, a target with cross entropy, standardised top-k.
CASES = {
    "KD": (functional.kd_loss, torch.float32),
    "DKD": (partial(functional.dkd_loss, ce_weight=1.0), torch.bfloat16),
    "PR-GDKD": (partial(functional.gdkd_loss, k=3, standardize="class"), torch.float32),
}
#: Largest relative error of a right result: far above what rounding does, far below what a wrong kernel does.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}

# Exists wherever an NVIDIA driver is loaded.
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_REBUILD = "`KDKERNELS_REQUIRE_NATIVE=1 {}pip install --no-build-isolation --no-deps --force-reinstall .`"


class Check(NamedTuple):
    """How one loss by one backend compares with the reference."""

    case: str
    #: Relative errors, the loss's against at least 1; NaN where the call raised.
    loss_error: float
    gradient_error: float
    #: What is wrong, or None.
    problem: str | None


def main() -> int:
    """Prints the report, the checks and the advice; 1 if a backend that serves here gives a wrong result, else 0."""
    print(report())
    right = True
    for device in _devices():
        for backend in _serving(device):
            checks = [check(backend, device, case) for case in CASES]
            print(f"check        {backend} on {device}: {_summary(checks)}", flush=True)
            right = right and all(done.problem is None for done in checks)
    for sentence in advice():
        print(f"to do        {sentence}")
    return 0 if right else 1


def report() -> str:
    """What was built and what would serve a CPU and a CUDA tensor, in a few lines for a person."""
    lines = [f"kdkernels    {__version__}", f"torch        {torch.__version__}"]
    if ops.unavailable is None:
        sets = ", ".join(ops.INSTRUCTION_SETS[i] for i in torch.ops.kdkernels.cpu_instruction_sets.default())
        lines.append(f"extension    built; CPU kernels for {sets}; in use: {ops.cpu_instruction_set()}")
    else:
        lines.append(f"extension    missing: {ops.unavailable}")
    targets = ", ".join(f"sm_{target}" for target in ops.cuda_targets())
    lines.append(f"CUDA         {ops.cuda_unavailable or f'kernels for {targets} and, from PTX, newer GPUs'}")
    lines.append(f"triton       {ops.triton_unavailable or 'installed'}")
    lines.append("float64      logits are served by the reference backend")
    lines.append(f"environment  {dispatch.ENVIRONMENT}={dispatch.default_backend}, {dispatch.DEBUG}={dispatch.debug:d}")
    for device_type in ("cpu", "cuda"):
        for backend in dispatch.preference(device_type):
            reason = dispatch.why_not(backend, device_type)
            if reason is None:
                lines.append(f"{device_type:4} tensors -> {backend}")
                break
            lines.append(f"{device_type:4} tensors    not {backend}: {reason}")
    return "\n".join(lines)


def check(backend: str, device: str, case: str) -> Check:
    """One loss of ``CASES`` and its gradient by ``backend``, against the reference in float64 on the CPU."""
    loss_function, dtype = CASES[case]
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, 8, 100, generator=generator, device="cpu")).to(dtype)
    target = torch.randint(100, (8,), generator=generator, device="cpu")

    def step(name: str, student: Tensor, teacher: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        student = student.detach().requires_grad_()
        loss = loss_function(student, teacher, target=target, backend=name)
        loss.backward()
        return loss.detach().double().cpu(), student.grad.double().cpu()

    expected, expected_gradient = step("reference", student.double(), teacher.double(), target)
    try:
        loss, gradient = step(backend, *(tensor.to(device) for tensor in (student, teacher, target)))
    except Exception as error:  # whatever a compiler or a driver raises is the finding
        return Check(case, torch.nan, torch.nan, f"{case} raised {type(error).__name__}: {_first_line(error)}")
    loss_error = ((loss - expected).abs() / expected.abs().clamp(min=1.0)).item()
    gradient_error = ((gradient - expected_gradient).norm() / expected_gradient.norm()).item()
    if loss_error <= TOLERANCE[dtype] and gradient_error <= TOLERANCE[dtype]:  # NaN is neither
        return Check(case, loss_error, gradient_error, None)
    problem = f"{case} is {loss:.6g} where the reference is {expected:.6g}, its gradient off by {gradient_error:.1e}"
    return Check(case, loss_error, gradient_error, problem)


def advice() -> list[str]:
    """What to do about what is missing here, a sentence each; none where all is well."""
    gpu = torch.cuda.is_available()
    sentences = []
    if ops.unavailable is not None and "not built" in ops.unavailable:
        sentences.append(
            "install a C++20 compiler, then, in kdkernels' source folder, "
            f"{_REBUILD.format('KDKERNELS_BUILD_CUDA=0 ')}: it says what fails. "
            "Until then plain PyTorch serves CPU tensors, slower and with more memory"
        )
    elif ops.unavailable is not None:
        sentences.append(f"install kdkernels again: it needs torch 2.10 or later, and this is {torch.__version__}")
    elif gpu and torch.version.cuda and ops.cuda_unavailable is not None:
        sentences.append(
            "for the CUDA kernels, install nvcc (the CUDA toolkit), then, in kdkernels' source folder, "
            f"{_REBUILD.format('')}"
        )
    if gpu and ops.triton_unavailable is not None and dispatch.why_not("cuda", "cuda") is not None:
        sentences.append("`pip install triton`: its kernels serve GPUs that the CUDA kernels do not")
    if not gpu and _NVIDIA_DRIVER.exists():
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        sentences.append(
            f"there is an NVIDIA driver, but torch {torch.__version__}, built for {build}, sees no GPU: "
            "install torch for the driver's CUDA version, and look at CUDA_VISIBLE_DEVICES"
        )
    if dispatch.default_backend != "auto":
        sentences.append(f"unset {dispatch.ENVIRONMENT}, unless it is meant: the fastest backend is chosen without it")
    return sentences


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _serving(device: str) -> list[str]:
    """The backends with kernels that take this device's tensors, asked for by name."""
    return [backend for backend in KERNELS if dispatch.why_not(backend, device) is None]


def _summary(checks: list[Check]) -> str:
    problems = [done.problem for done in checks if done.problem is not None]
    if problems:
        return f"WRONG: {'; '.join(problems)}"
    errors = (f"{done.case} {done.loss_error:.0e} and {done.gradient_error:.0e}" for done in checks)
    return f"right; errors of loss and gradient: {', '.join(errors)}"


def _first_line(error: Exception) -> str:
    return short(str(error).partition("\n")[0]).strip("'\"")
