"""The native ops as torch sees them: schemas, fake kernels, poisoned outputs, torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import (
    OUTPUTS,
    Path,
    assert_gradient,
    assert_same,
    check,
    expected,
    make_inputs,
    measured,
    name_of,
    needed_target,
    require,
)
from losses import LOSSES, SOME_LOSSES, Case, each
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import kdkernels
from kdkernels import objective
from kdkernels.validation import REDUCTIONS


@pytest.fixture(autouse=True)
def native() -> None:
    require("cpu")


# Schemas and fake kernels -------------------------------------------------------------------------------------------


def forward_arguments(
    case: Case,
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    sample_weight: Tensor | None = None,
    denominator: Tensor | None = None,
    scale: float = 1.0,
    reduction: str = "mean",
    class_dim: int = 1,
    num_classes: int | None = None,
    gradient: bool = True,
    save: bool = True,
    parts: bool = True,
) -> tuple[Any, ...]:
    """Arguments of ``torch.ops.kdkernels.forward``."""
    classes = num_classes or student.shape[class_dim]
    tensors = (student, teacher, target, sample_weight, denominator)
    flags = (gradient, save, parts)
    return (
        *tensors,
        None,
        *case.objective.encode(),
        scale,
        REDUCTIONS.index(reduction),
        class_dim,
        classes,
        -100,
        *flags,
    )


def backward_arguments(arguments: tuple[Any, ...], grad_loss: Tensor) -> tuple[Any, ...]:
    """Arguments of ``torch.ops.kdkernels.backward`` after a forward that saved."""
    student, teacher, target, _, _, _, *objective, _, _, class_dim, classes, _, _, _, _ = arguments
    with torch.no_grad():
        *_, saved, members = torch.ops.kdkernels.forward(*arguments)
    return grad_loss, student, teacher, target, saved, members, None, None, *objective, class_dim, classes


FLAGS = OUTPUTS | {
    "sum": {"reduction": "sum", "scale": 0.25},
    "denominator": {"reduction": "sum", "denominator": torch.tensor(3.0)},
    "weighted": {"sample_weight": torch.tensor([1.0, 0.5, 0.0])},
    "padded": {"num_classes": 20},
}
GRAD = pytest.mark.parametrize("requires_grad", [True, False], ids=["grad", "no_grad"])


# The check differentiates through the op, which only ever runs inside an autograd function.
UNDIFFERENTIATED = pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered:UserWarning")


def opcheck(op: object, arguments: tuple[Any, ...], requires_grad: bool) -> None:
    """All of torch's checks of an op; that of the autograd registration needs an input that requires grad."""
    skipped = () if requires_grad else ("test_autograd_registration",)
    if requires_grad and torch.__version__.startswith("2.10."):
        skipped = ("test_schema",)  # it copies tensors that have no storage there
    every = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, arguments, test_utils=[name for name in every if name not in skipped])


@UNDIFFERENTIATED
@GRAD
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS.keys())
def test_forward_op(flags: dict[str, Any], requires_grad: bool) -> None:
    student, teacher, target = make_inputs((3, 23))
    arguments = forward_arguments(LOSSES["dkd"], student.requires_grad_(requires_grad), teacher, target % 20, **flags)
    opcheck(torch.ops.kdkernels.forward.default, arguments, requires_grad)


@UNDIFFERENTIATED
@GRAD
@each(SOME_LOSSES)
def test_forward_op_of_each_loss(case: Case, requires_grad: bool) -> None:
    student, teacher, target = make_inputs((2, 23, 2, 3), torch.bfloat16, torch.float32)
    student = student.contiguous(memory_format=torch.channels_last).requires_grad_(requires_grad)
    target = target if case.needs_target else None
    opcheck(torch.ops.kdkernels.forward.default, forward_arguments(case, student, teacher, target), requires_grad)


@UNDIFFERENTIATED
@GRAD
@pytest.mark.parametrize("reduction", ["mean", "none"])
@each(SOME_LOSSES)
def test_backward_op(case: Case, reduction: str, requires_grad: bool) -> None:
    student, teacher, target = make_inputs((3, 23))
    arguments = forward_arguments(case, student.requires_grad_(requires_grad), teacher, target, reduction=reduction)
    grad_loss = torch.tensor(0.5) if reduction == "mean" else torch.tensor([0.5]).expand(3)
    opcheck(torch.ops.kdkernels.backward.default, backward_arguments(arguments, grad_loss), requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("factor", [torch.tensor(2.0), torch.tensor(1.0), torch.tensor([0.5, 1.0, 2.0])], ids=str)
def test_scale_op(factor: Tensor, dtype: torch.dtype) -> None:
    gradient = make_inputs((3, 23), dtype).student
    opcheck(torch.ops.kdkernels.scale_.default, (gradient.clone(), factor, 1), False)
    want = (gradient.double() * (factor[:, None] if factor.dim() else factor)).to(dtype)
    torch.ops.kdkernels.scale_(gradient, factor, 1)
    assert torch.equal(gradient, want)


@pytest.mark.parametrize("class_dim", [0, 1, 2])
def test_scale_op_along_any_dimension(class_dim: int) -> None:
    gradient = make_inputs((4, 5, 6)).student
    samples = [size for dim, size in enumerate(gradient.shape) if dim != class_dim]
    factor = torch.arange(1.0, 1.0 + torch.Size(samples).numel()).reshape(samples)
    want = gradient * factor.unsqueeze(class_dim)
    torch.ops.kdkernels.scale_(gradient, factor, class_dim)
    assert torch.equal(gradient, want)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0),
    "expanded": lambda x: x[:1].expand(2, -1, -1, -1),
    "cropped": lambda x: x[..., 1:],
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS.keys())
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_kernels_tell_the_truth(layout: str, flags: dict[str, Any]) -> None:
    """Shapes, dtypes and strides of what the kernels return, which compiled code relies on."""
    student, teacher, target = make_inputs((2, 23, 3, 4), torch.bfloat16, torch.float64)
    student, teacher = LAYOUTS[layout](student), LAYOUTS[layout](teacher)
    target = target[: student.shape[0], ..., : student.shape[3]] % 20
    flags = dict(flags)
    if "sample_weight" in flags:
        flags["sample_weight"] = torch.ones(target.shape)
    arguments = forward_arguments(LOSSES["gdkd"], student, teacher, target, **flags)
    real = torch.ops.kdkernels.forward(*arguments)
    with FakeTensorMode() as mode:
        convert = mode.from_tensor
        fake = torch.ops.kdkernels.forward(*(convert(a) if isinstance(a, Tensor) else a for a in arguments))
    for got, want in zip(fake, real, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


# Poison -------------------------------------------------------------------------------------------------------------


@each(SOME_LOSSES)
def test_the_poison_reaches_the_kernels_outputs(case: Case) -> None:
    """The suite's NaN filling covers memory that the ops allocate in C++: a fill for each output that is not empty."""
    student, teacher, target = make_inputs((3, 23))
    arguments = forward_arguments(case, student, teacher, target)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        outputs = torch.ops.kdkernels.forward(*arguments)
    events = profile.events()
    assert events is not None
    filled = sum(event.name == "aten::fill_" for event in events)
    assert filled >= sum(output.numel() > 0 for output in outputs)


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS.keys())
@each(SOME_LOSSES)
def test_no_output_keeps_the_poison(case: Case, flags: dict[str, Any]) -> None:
    """Also in what forward saves for backward, and for samples that do not count."""
    student, teacher, target = make_inputs((3, 23))
    target %= 20
    target[1] = -100
    outputs = torch.ops.kdkernels.forward(*forward_arguments(case, student, teacher, target, **flags))
    for output in (output for output in outputs if output is not None):
        assert not output.isnan().any()
        if not output.is_floating_point():
            assert not output.eq(torch.iinfo(output.dtype).max).any()


# torch.compile ------------------------------------------------------------------------------------------------------


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED = pytest.mark.usefixtures("dynamo")


def ops_in(counter: CompileCounterWithBackend) -> set[str]:
    """Names of our ops in the captured graphs, those of autograd functions' bodies included."""
    modules = [module for graph in counter.graphs for module in graph.modules()]
    nodes = [node for module in modules if isinstance(module, torch.fx.GraphModule) for node in module.graph.nodes]
    return {str(node.target) for node in nodes if "kdkernels" in str(node.target)}


def compiled(call: Callable[..., Any], **options: Any) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    """``call`` compiled whole, and what counts its compilations."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(call, backend=counter, fullgraph=True, **options), counter


def assert_settled(compilations: list[int]) -> None:
    """No call after the first compiled anything. (The first may compile twice: dynamo tries a loss's numbers as dynamic
    floats, finds that the op wants constants and starts over.)"""
    assert 1 <= compilations[0] <= 3
    assert set(compilations) == {compilations[0]}


COMPILED_LOSSES = [
    *((case, Path("cpu", "fused")) for case in LOSSES.values()),
    *((case, Path("cpu", "recompute")) for case in SOME_LOSSES.values()),
    *((LOSSES[name], Path("reference", "fused")) for name in ("kd_ce", "dkd", "gdkd3")),
]


@COMPILED
@pytest.mark.parametrize(
    ("case", "path"), COMPILED_LOSSES, ids=[f"{case.name}-{path}" for case, path in COMPILED_LOSSES]
)
def test_compile_every_loss(case: Case, path: Path) -> None:
    """One graph, forward and backward, with our op in it; not compiled again for new values."""
    call, counter = compiled(case.call)
    for seed in (0, 1):
        student, teacher, target = make_inputs((5, 23), seed=seed)
        options = needed_target(case, target)
        got = measured(call, student, teacher, **path.options, **options)
        assert_same(got, expected(case.objective, student, teacher, **options), student, teacher)
    assert counter.frame_count == 1
    assert bool(ops_in(counter)) == (path.backend == "cpu")


@COMPILED
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=name_of)
def test_compile_every_dtype(dtype: torch.dtype, native_path: Path) -> None:
    call, counter = compiled(kdkernels.dkd_loss)
    student, teacher, target = make_inputs((5, 23), dtype)
    got = measured(call, student, teacher, target=target, **native_path.options)
    assert_same(got, expected(objective.dkd(), student, teacher, target=target), student, teacher)
    assert counter.frame_count == 1


@COMPILED
@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "none", "return_parts": True},
        {"reduction": "batchmean", "sample_weight": torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5])},
        {"denominator": torch.tensor(3.0)},
        {"denominator": 3.0},
        {"num_classes": 20},
        {"ce_weight": 0.5},
    ],
    ids="-".join,
)
def test_compile_options(options: dict[str, Any], native_path: Path) -> None:
    call, counter = compiled(kdkernels.dkd_loss)
    student, teacher, target = make_inputs((5, 23))
    target %= 20
    options = {name: given.to(target.device) if isinstance(given, Tensor) else given for name, given in options.items()}
    got = measured(call, student, teacher, target=target, **options, **native_path.options)
    value = objective.adjust(objective.dkd(), ce_weight=options.get("ce_weight"))
    options = {name: given for name, given in options.items() if name not in ("ce_weight", "return_parts")}
    assert_same(got, expected(value, student, teacher, target=target, **options), student, teacher)
    assert counter.frame_count == 1


@COMPILED
@pytest.mark.parametrize("name", ["dkd", "gdkd"])
def test_compile_pixels(name: str, native_path: Path) -> None:
    case = LOSSES[name]
    call, counter = compiled(case.call)
    student, teacher, target = make_inputs((2, 23, 3, 4))
    student = student.contiguous(memory_format=torch.channels_last)
    options = needed_target(case, target) | {"reduction": "none"}
    got = measured(call, student, teacher, **native_path.options, **options)
    assert_same(got, expected(case.objective, student, teacher, **options), student, teacher)
    assert counter.frame_count == 1


@COMPILED
@pytest.mark.parametrize("dynamic", [True, None])
def test_compile_changing_batches(dynamic: bool | None, native_path: Path) -> None:
    """Last batches are shorter: one more compilation where dynamo has to learn it, and none after that."""
    call, counter = compiled(kdkernels.dkd_loss, dynamic=dynamic)
    compilations = []
    for batch in (8, 5, 13, 2, 7):
        student, teacher, target = make_inputs((batch, 23))
        got = measured(call, student, teacher, target=target, **native_path.options)
        assert_same(got, expected(objective.dkd(), student, teacher, target=target), student, teacher)
        compilations.append(counter.frame_count)
    assert_settled(compilations[0 if dynamic else 1 :])


@COMPILED
def test_compile_changing_numbers(native_path: Path) -> None:
    """A temperature or weight on a schedule is compiled anew, not refused."""
    call, _ = compiled(kdkernels.dkd_loss)
    student, teacher, target = make_inputs((5, 23))
    for temperature, beta in ((4.0, 8.0), (3.0, 8.0), (2.5, 6.5), (2.0, 5)):
        numbers = {"temperature": temperature, "beta": beta}
        got = measured(call, student, teacher, target=target, **numbers, **native_path.options)
        want = expected(objective.dkd(**numbers), student, teacher, target=target)
        assert_same(got, want, student, teacher)


@COMPILED
def test_compile_changing_sequences(native_path: Path) -> None:
    """Batch and length both vary, as token losses do."""
    call, counter = compiled(kdkernels.gdkd_loss, dynamic=True)
    compilations = []
    for batch, length in ((2, 7), (3, 5), (4, 11)):
        student, teacher, target = make_inputs((batch, length, 23), class_dim=2)
        target[:, -1] = -100
        options = {"target": target, "class_dim": -1}
        got = measured(call, student, teacher, **options, **native_path.options)
        assert_same(got, expected(objective.gdkd(), student, teacher, **options), student, teacher)
        compilations.append(counter.frame_count)
    assert_settled(compilations)


@COMPILED
@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_modules(dynamic: bool | None, native_path: Path) -> None:
    """A training step's forward: network and loss in one graph."""
    torch.manual_seed(0)
    network = torch.nn.Linear(9, 23)
    loss = kdkernels.DKDLoss(ce_weight=0.5, **native_path.options)
    features = make_inputs((5, 9)).student
    _, teacher, target = make_inputs((5, 23))

    def gradient(step: Callable[..., Tensor]) -> Tensor:
        step(network, features, target).backward()
        assert network.weight.grad is not None
        grad, network.weight.grad = network.weight.grad, None
        return grad

    def step(net: torch.nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return loss(net(x), teacher, y)

    call, counter = compiled(step, dynamic=dynamic)
    assert_gradient(gradient(call), gradient(step), 2e-6)
    compilations = [counter.frame_count]
    gradient(call)
    assert_settled([*compilations, counter.frame_count])
    assert ops_in(counter)


@COMPILED
def test_compile_without_a_gradient(native_path: Path) -> None:
    call, counter = compiled(kdkernels.kd_loss)
    student, teacher, _ = make_inputs((5, 23))
    with torch.no_grad():
        got = call(student.requires_grad_(), teacher, **native_path.options)
    assert not got.requires_grad
    assert torch.equal(got, kdkernels.kd_loss(student, teacher, **native_path.options).detach())
    assert counter.frame_count == 1


@COMPILED
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_compiled_second_backward(factor: float, native_path: Path) -> None:
    call, _ = compiled(kdkernels.kd_loss)
    student, teacher, _ = make_inputs((5, 23))
    leaf = student.clone().requires_grad_()
    loss = factor * call(leaf, teacher, **native_path.options)
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert_gradient(first, factor * expected(objective.kd(), student, teacher).gradient, 2e-6)


@COMPILED
@pytest.mark.parametrize("name", ["dkd", "gdkd3"])
def test_compile_with_inductor(name: str, native_path: Path) -> None:
    """The default compiler, which trusts the fake kernels' strides and reuses buffers."""
    case = LOSSES[name]
    call = torch.compile(case.call, fullgraph=True)
    student, teacher, target = make_inputs((5, 23))
    check_case = Case(case.name, case.objective, call, case.parts, case.needs_target)
    for reduction in ("mean", "none"):
        check(check_case, student, teacher, native_path, reduction=reduction, **needed_target(case, target))
