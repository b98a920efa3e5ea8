"""What autograd and torch.func offer beside one backward: right, or refused in words, never a constant in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from helpers import Path, assert_gradient, make_inputs, measured
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import aot_function
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import kdkernels

#: One loss for each way in which a gradient comes about: written forward, recomputed, by class in one sum or each.
WAYS: dict[str, dict[str, Any]] = {
    "mean": {},
    "none": {"reduction": "none"},
    "class": {"standardize": "class"},
    "class_none": {"standardize": "class", "reduction": "none"},
    "sample": {"standardize": "sample", "ce_weight": 0.5},
}
each_way = pytest.mark.parametrize("way", WAYS)
STUDENT, TEACHER, TARGET = make_inputs((5, 9))
VECTOR = make_inputs((5, 9), seed=1).student


def loss_by(path: Path, way: str) -> Callable[[Tensor], Tensor]:
    options = WAYS[way] | path.options
    return lambda student: kdkernels.dkd_loss(student, TEACHER, TARGET, **options)


def literal(way: str) -> Callable[[Tensor], Tensor]:
    """The same by the reference backend, in float64, which autograd and torch.func differentiate by themselves."""
    teacher = TEACHER.double()
    return lambda student: kdkernels.dkd_loss(student, teacher, TARGET, backend="reference", **WAYS[way])


# Second derivatives -------------------------------------------------------------------------------------------------


def gradient_penalty(loss: Callable[[Tensor], Tensor]) -> None:
    leaf = STUDENT.clone().requires_grad_()
    value = loss(leaf).sum()
    (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
    (value + gradient.square().sum()).backward()


def maml_step(loss: Callable[[Tensor], Tensor]) -> None:
    weight = torch.ones(5, 1, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(STUDENT * weight).sum(), weight, create_graph=True)
    torch.autograd.grad((STUDENT * (weight - gradient)).square().sum(), weight)


def dual_backward(loss: Callable[[Tensor], Tensor]) -> None:
    with forward_ad.dual_level():
        leaf = STUDENT.clone().requires_grad_()
        torch.autograd.grad(loss(forward_ad.make_dual(leaf, VECTOR)).sum(), leaf)


SECOND: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "gradient_penalty": gradient_penalty,
    "maml_step": maml_step,
    "hvp": lambda loss: torch.autograd.functional.hvp(lambda z: loss(z).sum(), STUDENT, VECTOR),
    "hessian": lambda loss: torch.autograd.functional.hessian(lambda z: loss(z).sum(), STUDENT),
    "func_hessian": lambda loss: torch.func.hessian(lambda z: loss(z).sum())(STUDENT),
    "grad_of_grad": lambda loss: torch.func.grad(lambda z: torch.func.grad(lambda x: loss(x).sum())(z).square().sum())(
        STUDENT
    ),
    "jvp_of_jvp": lambda loss: torch.func.jvp(
        lambda z: torch.func.jvp(loss, (z,), (VECTOR,))[1], (STUDENT,), (VECTOR,)
    ),
    "grad_of_jvp": lambda loss: torch.func.grad(lambda z: torch.func.jvp(loss, (z,), (VECTOR,))[1].sum())(STUDENT),
    "dual_backward": dual_backward,
}


@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("way", ["mean", "class"])
def test_second_derivatives_raise(second: str, way: str, native_path: Path) -> None:
    with pytest.raises(RuntimeError, match="differentiable once"):
        SECOND[second](loss_by(native_path, way))


@pytest.mark.parametrize("way", ["mean", "class", "sample"])
def test_the_reference_differentiates_twice(way: str) -> None:
    """Against finite differences of its gradient."""
    leaf = STUDENT.double().requires_grad_()
    assert torch.autograd.gradgradcheck(literal(way), (leaf,))


def test_a_kept_graph_is_no_second_derivative(path: Path) -> None:
    leaf = STUDENT.clone().requires_grad_()
    loss = loss_by(path, "mean")(leaf)
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


# Forward mode -------------------------------------------------------------------------------------------------------


def dual_tangent(loss: Callable[[Tensor], Tensor], student: Tensor, vector: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss(forward_ad.make_dual(student, vector))).tangent


FORWARD: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]] = {
    "jvp": lambda loss, student, vector: torch.func.jvp(loss, (student,), (vector,))[1],
    "dual": dual_tangent,
    "dual_that_requires_grad": lambda loss, student, vector: dual_tangent(
        loss, student.clone().requires_grad_(), vector
    ).detach(),
    "linearize": lambda loss, student, vector: torch.func.linearize(loss, student)[1](vector),
}


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # of linearize's own
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("forward", FORWARD)
@pytest.mark.parametrize("way", ["mean", "none", "class", "sample"])
def test_forward_mode(way: str, forward: str, dtype: torch.dtype, native_path: Path) -> None:
    student, vector = STUDENT.to(dtype), VECTOR.to(dtype)
    got = FORWARD[forward](loss_by(native_path, way), student, vector)
    want = torch.func.jvp(literal(way), (student.double(),), (vector.double(),))[1]
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_forward_mode_that_is_refused(native_path: Path) -> None:
    with pytest.raises(RuntimeError, match="standardize='class' with reduction='none'"):
        torch.func.jvp(loss_by(native_path, "class_none"), (STUDENT,), (VECTOR,))
    with pytest.raises(RuntimeError, match="in student_logits only"):
        torch.func.jvp(lambda z: kdkernels.kd_loss(STUDENT, z, **native_path.options), (TEACHER,), (VECTOR,))
    with pytest.raises(RuntimeError, match="in student_logits only"):
        dual_tangent(lambda z: kdkernels.kd_loss(STUDENT, z, **native_path.options), TEACHER, VECTOR)


# torch.func and batched gradients -----------------------------------------------------------------------------------


@each_way
def test_func_grad_and_vjp(way: str, path: Path) -> None:
    def total(loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda student: loss(student).sum()

    want = torch.func.grad(total(literal(way)))(STUDENT.double())
    assert_gradient(torch.func.grad(total(loss_by(path, way)))(STUDENT), want, 2e-6)
    value, vjp = torch.func.vjp(total(loss_by(path, way)), STUDENT)
    assert_gradient(vjp(torch.full_like(value, 3.0))[0], 3 * want, 2e-6)


@pytest.mark.parametrize("way", ["none", "class_none"])
def test_jacobians(way: str, path: Path) -> None:
    """The rows of the Jacobian are a batched backward, by torch.func and by is_grads_batched."""
    want = torch.func.jacrev(literal(way))(STUDENT.double())
    assert_gradient(torch.func.jacrev(loss_by(path, way))(STUDENT), want, 2e-6)
    leaf = STUDENT.clone().requires_grad_()
    (got,) = torch.autograd.grad(loss_by(path, way)(leaf), leaf, torch.eye(5), is_grads_batched=True)
    assert_gradient(got, want, 2e-6)


@each_way
def test_vmap(way: str, path: Path) -> None:
    """Over students, teachers and targets at once, with and without a gradient."""
    options = WAYS[way] | path.options
    batches = [torch.stack([x, x.roll(1, 0), x.roll(2, 0)], 1) for x in (STUDENT, TEACHER, TARGET)]

    def loss(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return kdkernels.dkd_loss(student, teacher, target, **options).sum()

    got = torch.func.vmap(loss, 1)(*batches)
    gradients = torch.func.vmap(torch.func.grad(loss), 1)(*batches)
    for i, inputs in enumerate(zip(*(batch.unbind(1) for batch in batches), strict=True)):
        torch.testing.assert_close(got[i], loss(*inputs))
        assert_gradient(gradients[i], torch.func.grad(loss)(*inputs), 1e-6)


# Traced -------------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 9)
        self.options = options

    def forward(self, x: Tensor, teacher: Tensor) -> Tensor:
        return kdkernels.kd_loss(self.layer(x), teacher, **self.options)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_step_has_the_gradient(strict: bool, native_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Model(native_path.options), torch.randn(5, 7)
    exported = torch.export.export(model, (x, TEACHER), strict=strict).module()
    for step in (model, exported):
        step(x, TEACHER).backward()
    want, got = (dict(step.named_parameters())["layer.weight"].grad for step in (model, exported))
    assert_gradient(got, want, 1e-6)


def test_a_step_of_fake_tensors(path: Path) -> None:
    with FakeTensorMode() as mode:
        student, teacher = mode.from_tensor(STUDENT).requires_grad_(), mode.from_tensor(TEACHER)
        kdkernels.kd_loss(student, teacher, **path.options).backward()
    assert student.grad.shape == STUDENT.shape
    # What the mode made is not left behind for real tensors.
    assert kdkernels.kd_loss(STUDENT, TEACHER, **path.options).item() > 0


def test_aot_function(path: Path) -> None:
    traced = aot_function(
        lambda z, t: kdkernels.kd_loss(z, t, **path.options), lambda graph, _: make_boxed_func(graph.forward)
    )
    want = measured(kdkernels.kd_loss, STUDENT, TEACHER, **path.options)
    leaf = STUDENT.clone().requires_grad_()
    traced(leaf, TEACHER).backward()
    assert_gradient(leaf.grad, want.gradient, 1e-6)


def changing(value: float) -> dict[str, Callable[..., Tensor]]:
    """Losses in which one Python number changes from step to step."""
    return {
        "temperature": lambda z, t, **path: kdkernels.kd_loss(z, t, value, **path),
        "weight": lambda z, t, **path: kdkernels.gdkd_loss(z, t, 3, w1=value, **path),
        "ce_weight": lambda z, t, **path: kdkernels.kd_loss(z, t, target=TARGET, ce_weight=value, **path),
        "denominator": lambda z, t, **path: kdkernels.kd_loss(z, t, denominator=value, **path),
    }


@pytest.mark.parametrize("name", changing(1.0))
def test_numbers_that_change_do_not_recompile(name: str, native_path: Path) -> None:
    """Two graphs: one for the first number, one for any other."""
    torch.compiler.reset()
    counter, options = CompileCounterWithBackend("aot_eager"), native_path.options

    def step(z: Tensor, value: float) -> Tensor:
        return changing(value)[name](z, TEACHER, **options)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for value in (1.0, 1.5, 2.0, 3.5, 4.0):
        leaf = STUDENT.clone().requires_grad_()
        got, want = compiled(leaf, value), step(leaf, value)
        torch.testing.assert_close(got, want)
        gradients = [torch.autograd.grad(loss, leaf)[0] for loss in (got, want)]
        assert_gradient(*gradients, 1e-6)
    assert counter.frame_count <= 2


@pytest.mark.xfail(
    torch.__version__.startswith("2.10."),
    strict=False,
    reason="torch 2.10 compiles no second derivative, and says nothing",
)
def test_a_compiled_second_derivative_raises(native_path: Path) -> None:
    compiled = torch.compile(loss_by(native_path, "mean"), fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError):
        gradient_penalty(compiled)


# Tensors of inference mode, hooks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_tensors_made_in_inference_mode(way: str, dtype: torch.dtype, path: Path) -> None:
    """A teacher, target and weight computed under inference_mode serve every way to a gradient."""
    options = WAYS[way] | path.options
    with torch.inference_mode():
        teacher, target, weight = TEACHER.to(dtype, copy=True), TARGET.clone(), torch.ones(5)
    student = STUDENT.to(dtype)
    got = measured(kdkernels.dkd_loss, student, teacher, target=target, sample_weight=weight, **options)
    want = measured(kdkernels.dkd_loss, student, teacher.clone(), target=TARGET, sample_weight=torch.ones(5), **options)
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.gradient, want.gradient)


@pytest.mark.parametrize("change", ["student", "teacher", "target"])
def test_what_backward_reads_must_not_change(change: str, native_backend: str) -> None:
    tensors = {"student": STUDENT.clone().requires_grad_(), "teacher": TEACHER.clone(), "target": TARGET.clone()}
    loss = kdkernels.dkd_loss(*tensors.values(), mode="recompute", backend=native_backend)
    with torch.no_grad():
        tensors[change].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_way
def test_what_hooks_keep_is_left_alone(way: str, path: Path) -> None:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        kept.append(tensor)
        return len(kept) - 1

    leaf = STUDENT.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda index: kept[index]):
        loss = (loss_by(path, way)(leaf) * 3).sum()
    before = [tensor.clone() for tensor in kept]
    loss.backward()
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(kept, before, strict=True))
