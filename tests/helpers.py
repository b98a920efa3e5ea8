"""Inputs, the float64 expectation, and the one comparison that all tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import literal
import pytest
import torch
from losses import LOSSES, Case
from torch import Tensor

from kdkernels import _environment, dispatch, ops, reference
from kdkernels.objective import Objective
from kdkernels.validation import Call, check_call

#: Set by ``TRITON_INTERPRET=1 pytest``: the Triton backend's kernels run as Python, on CPU tensors, and nothing else is
#: tested. Triton decides when a kernel is defined, so that one process cannot test interpreted and compiled kernels.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    os.environ[dispatch.TRITON_CPU] = "1"
#: Backends of CUDA tensors, where there is a GPU to run them on.
GPU_BACKENDS = ["cuda", "triton"] if torch.cuda.is_available() and not INTERPRETED else []
BACKENDS = ["triton"] if INTERPRETED else ["reference", "cpu", *GPU_BACKENDS]
#: Backends whose two modes are different code.
NATIVE_BACKENDS = [backend for backend in BACKENDS if backend != "reference"]


class Path(NamedTuple):
    """One way a call can be served; ``**path.options`` asks for it."""

    backend: str
    mode: str

    @property
    def options(self) -> dict[str, str]:
        return self._asdict()

    def __str__(self) -> str:
        return f"{self.backend}-{self.mode}" if self.backend in NATIVE_BACKENDS else self.backend


CPU_PATHS = [Path("cpu", mode) for mode in ("fused", "recompute")]
NATIVE_PATHS = [Path(backend, mode) for backend in NATIVE_BACKENDS for mode in ("fused", "recompute")]
#: The reference has autograd for its only mode.
PATHS = [*(Path("reference", "fused") for backend in BACKENDS if backend == "reference"), *NATIVE_PATHS]

# The accuracy table of the documentation. A loss is judged by the precision it is computed in (float32 for half
# precision logits), a gradient by the precision it is returned in.
LOSS_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
GRADIENT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
DTYPES = list(GRADIENT_TOLERANCE)


def must_have_native() -> bool:
    """Whether a missing native backend is a failure: under CI a skip would hide a broken build."""
    continuous_integration = os.environ.get("CI", "").lower() not in ("", "0", "false")
    return continuous_integration or _environment.switch("KDKERNELS_REQUIRE_NATIVE")


def require(backend: str) -> None:
    """Skips the test, or fails it where native backends are mandatory, if this machine lacks ``backend``."""
    reason = dispatch.why_not(backend, device_of(backend).type)
    if reason is None:
        return
    if must_have_native():
        pytest.fail(f"backend {backend!r} is required here, but {reason}")
    pytest.skip(f"backend {backend!r}: {reason}")


def device_of(backend: str) -> torch.device:
    """Where the tests of a backend have their tensors: in their bodies it is the default device."""
    return torch.device("cuda" if backend in GPU_BACKENDS else "cpu")


def served(backend: str) -> torch.device:
    """Fails or skips the test if this machine lacks the backend; entered, new tensors are on its device."""
    require(backend)
    return device_of(backend)


def instruction_sets() -> list[str]:
    """The instruction sets the CPU kernels can use on this machine; all of them if there are no kernels to ask."""
    if ops.unavailable is not None:
        return list(ops.INSTRUCTION_SETS)
    return [ops.INSTRUCTION_SETS[index] for index in torch.ops.kdkernels.cpu_instruction_sets.default()]


def name_of(value: object) -> str:
    """A readable test id for dtypes, shapes and paths."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple) and not isinstance(value, Path):
        return "x".join(map(str, value))
    return str(value)


#: What a forward op can be asked for, with the name of who asks.
OUTPUTS: dict[str, dict[str, Any]] = {
    "all": {},
    "loss": {"gradient": False, "save": False, "parts": False},
    "fused": {"save": False, "parts": False},
    "recompute": {"gradient": False, "parts": False},
    "rows": {"reduction": "none"},
}

#: Standard deviation of the logits of row i, cyclically: what networks give, early and late in training.
ROW_SCALES = (3.0, 0.5, 1.0, 6.0)


class Inputs(NamedTuple):
    student: Tensor
    teacher: Tensor
    target: Tensor


def make_inputs(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
    *,
    scale: float | None = None,
    class_dim: int = 1,
    seed: int = 0,
) -> Inputs:
    """Random logits of ``shape`` and targets; ``scale`` is their standard deviation, by default that of ROW_SCALES."""
    generator = torch.Generator().manual_seed(seed)
    samples = [size for dim, size in enumerate(shape) if dim != class_dim % len(shape)]
    count = torch.Size(samples).numel()
    there = torch.get_default_device()
    with torch.device("cpu"):  # the same numbers everywhere
        scales = torch.full((count,), scale) if scale else torch.tensor(ROW_SCALES).repeat(count // 4 + 1)[:count]
        student, teacher = (
            (torch.randn(count, shape[class_dim], generator=generator, dtype=torch.float64) * scales[:, None])
            .reshape(*samples, shape[class_dim])
            .movedim(-1, class_dim)
            .contiguous()
            for _ in range(2)
        )
        target = torch.randint(shape[class_dim], samples, generator=generator)
    return Inputs(student.to(there, dtype), teacher.to(there, teacher_dtype or dtype), target.to(there))


class Outcome(NamedTuple):
    loss: Tensor
    gradient: Tensor
    parts: dict[str, Tensor]
    #: What roundings of a probability are multiplied by in a loss, at most; only that of what is expected is looked at.
    weight: float = 0.0


def upstream_like(loss: Tensor) -> Tensor | None:
    """What to send into ``loss.backward``: 1 for a scalar; for one loss a sample, values exact in every dtype."""
    if loss.dim() == 0:
        return None
    return (torch.arange(loss.numel()) % 13 / 8 + 0.5).to(loss.dtype).reshape(loss.shape)


def expected(
    objective: Objective,
    student: Tensor,
    teacher: Tensor,
    upstream: Tensor | None = None,
    *,
    target: Tensor | None = None,
    sample_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    reduction: str = "mean",
    class_dim: int = 1,
    num_classes: int | None = None,
    ignore_index: int = -100,
) -> Outcome:
    """The float64 oracle on the same inputs, with the gradient by autograd."""
    student = student.detach().double().requires_grad_()
    call = check_call(
        student,
        teacher.detach().double(),
        objective,
        target,
        sample_weight,
        denominator,
        reduction,
        class_dim,
        num_classes,
        ignore_index,
    )
    loss, parts = reference.distillation_loss(call)
    upstream = upstream_like(loss) if upstream is None else upstream.double()
    (gradient,) = torch.autograd.grad(loss, student, upstream)
    return Outcome(loss.detach(), gradient, parts, rounding_weight(call))


def rounding_weight(call: Call) -> float:
    """What roundings of a probability are multiplied by: the objective's weights, of the terms with T^2, and the
    sample's in a sum. Parts have the terms' T^2 alone."""
    objective, count = call.objective, torch.tensor(1.0)
    of_terms = [term.scale * (sum(term.mass) + sum(map(sum, term.groups))) for term in objective.terms]
    scales = [term.scale for term in objective.terms]
    weights = torch.ones(call.student.select(call.class_dim, 0).shape)
    if call.sample_weight is not None:
        weights = call.sample_weight.float()
    if call.target is not None:
        weights = weights.where(call.target != call.ignore_index, 0.0)
    if weights.numel() and call.reduction == "none":
        count = weights.max()
    elif call.reduction in ("sum", "batchmean"):
        divisor = call.student.shape[0] if call.reduction == "batchmean" else call.denominator
        count = weights.sum() * call.scale / (1 if divisor is None else max(float(divisor), 1e-30))
    return max(objective.ce_weight + objective.weight * sum(of_terms), *scales) * max(count.item(), 0.0)


def measured(
    call: Callable[..., Any],
    student: Tensor,
    teacher: Tensor,
    upstream: Tensor | None = None,
    *,
    return_parts: bool = False,
    **options: Any,
) -> Outcome:
    """Loss and gradient as a user gets them from the public function ``call``."""
    student = student.detach().requires_grad_()
    result = call(student, teacher, return_parts=return_parts, **options)
    loss, parts = result if return_parts else (result, {})
    loss.backward(upstream_like(loss) if upstream is None else upstream)
    assert student.grad is not None
    return Outcome(loss.detach(), student.grad, parts)


def assert_values(got: Tensor, want: Tensor, tolerance: float, what: str = "loss") -> None:
    """|error| <= tolerance * max(1, |want|) for each value; the same infinities and NaNs at the same places."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    got, want = got.double(), want.double()
    assert torch.equal(got.isnan(), want.isnan()), f"{what}: {got}, expected {want}"
    same = (got == want) | want.isnan()
    error = torch.where(same, 0.0, (got - want).abs())
    bound = tolerance * want.abs().clamp(min=1.0).nan_to_num(posinf=1.0)
    worst = (error / bound).max().item() if error.numel() else 0.0
    assert worst <= 1, f"{what}: error is {worst:.3g} times the allowed one; {got}, expected {want}"


def assert_gradient(got: Tensor, want: Tensor, tolerance: float) -> None:
    """norm(error) <= tolerance * norm(want); a zero gradient must be exactly zero, and nothing may be NaN or inf."""
    assert got.shape == want.shape, f"gradient: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert want.isfinite().all(), "the expectation itself is not finite: compare the finite entries only"
    assert got.isfinite().all(), f"gradient: not finite in {(~got.isfinite()).nonzero()[:5].tolist()}"
    error, norm = (got.double() - want.double()).norm().item(), want.double().norm().item()
    assert error <= tolerance * norm, f"gradient: error {error:.3g} of {norm:.3g} is more than {tolerance:g}"


#: Roundings of a probability that a loss may be off by: each half a unit in the last place of a number near 1.
ROUNDINGS = {torch.float32: 8 * 2.0**-24, torch.float64: 0.0}


def loss_tolerance(loss: Tensor, weight: float = 0.0, of_gpu: bool | None = None) -> float:
    """What a loss near 1 may be off by; ``weight``: that of its roundings.

    ``of_gpu``: whether a GPU's kernels computed it; by default, whether it is there. A GPU's own exponentials are less
    exact than a simulator's, which shows in a few samples.
    """
    of_gpu = loss.is_cuda if of_gpu is None else of_gpu
    single, few = (4, 2 if loss.is_cuda else 1) if of_gpu else (1, 1)
    factor = (single if loss.dim() else few) if loss.dtype == torch.float32 else 1
    return factor * LOSS_TOLERANCE[loss.dtype] + ROUNDINGS[loss.dtype] * weight


def arithmetic_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """What the loss is computed and returned in."""
    return torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32


def assert_same(got: Outcome, want: Outcome, student: Tensor, teacher: Tensor, of_gpu: bool | None = None) -> None:
    """``got`` meets the accuracy table for these dtypes against the float64 ``want``; ``of_gpu`` as of
    :func:`loss_tolerance`."""
    dtype = arithmetic_dtype(student, teacher)
    assert got.loss.dtype == dtype
    tolerance = loss_tolerance(got.loss, want.weight, of_gpu)
    assert_values(got.loss, want.loss, tolerance)
    assert got.gradient.dtype == student.dtype
    assert_gradient(got.gradient, want.gradient, GRADIENT_TOLERANCE[student.dtype])
    for name, part in got.parts.items():
        assert part.dtype == dtype
        assert not part.requires_grad
        assert_values(part, want.parts[name], tolerance, f"part {name!r}")


def check(
    case: Case,
    student: Tensor,
    teacher: Tensor,
    path: Path,
    upstream: Tensor | None = None,
    *,
    return_parts: bool = False,
    **options: Any,
) -> Outcome:
    """Runs a loss as a user would and holds it to the accuracy table; returns what it gave."""
    want = expected(case.objective, student, teacher, upstream, **options)
    got = measured(case.call, student, teacher, upstream, return_parts=return_parts, **path.options, **options)
    assert_same(got, want, student, teacher)
    if return_parts:
        assert tuple(got.parts) == case.parts
    return got


def check_size(case: Case, student: Tensor, teacher: Tensor, path: Path, target: Tensor) -> None:
    """For logits whose loss or gradient is a small difference of large numbers: rounding is held against those.

    The numbers are the divergences' unit, one nat times its weight, and the gradient's terms before they cancel. No
    float32 arithmetic can do better there; everywhere else :func:`check` asks for more.
    """
    options: dict[str, Any] = needed_target(case, target) | {"reduction": "sum"}
    want = expected(case.objective, student, teacher, **options)
    got = measured(case.call, student, teacher, **path.options, **options)
    weights = (term.scale * (sum(term.mass) + sum(map(sum, term.groups))) for term in case.objective.terms)
    error = (got.loss.double() - want.loss).abs().item()
    assert error <= LOSS_TOLERANCE[got.loss.dtype] * max(1.0, want.loss.item(), sum(weights) * len(student))
    _, size = literal.gradient_formula(case.objective, student.double(), teacher.double(), target)
    error = (got.gradient.double() - want.gradient).norm().item()
    assert error <= GRADIENT_TOLERANCE[student.dtype] * size.norm().item()


@cache
def standard(
    name: str, shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype], device: torch.device
) -> tuple[Inputs, Outcome]:
    """The inputs and the expectation of a loss for a shape on a device; the same for all backends there, modes and
    instruction sets."""
    inputs, case = make_inputs(shape, *dtypes), LOSSES[name]
    return inputs, expected(case.objective, inputs.student, inputs.teacher, **needed_target(case, inputs.target))


def check_standard(
    case: Case, shape: tuple[int, int], path: Path, dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32,) * 2
) -> None:
    """:func:`check` on random inputs of a shape."""
    (student, teacher, target), want = standard(case.name, shape, dtypes, torch.get_default_device())
    got = measured(case.call, student, teacher, **path.options, **needed_target(case, target))
    assert_same(got, want, student, teacher)


def needed_target(case: Case, target: Tensor) -> dict[str, Tensor]:
    """``target=`` for the losses that cannot do without."""
    return {"target": target} if case.needs_target else {}


def allocations(run: Callable[[], object]) -> list[int]:
    """Bytes of every tensor that ``run`` allocates, in Python or C++, freed or not."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = profile.events()
    assert events is not None
    of_device = f"self_{torch.get_default_device().type}_memory_usage".replace("cuda", "device")
    return [size for size in (getattr(event, of_device) for event in events) if size > 0]
