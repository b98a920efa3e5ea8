"""The native ops as torch sees them: schemas, fake kernels, poisoned outputs, errors, torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import (
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
from losses import LOSSES, SOME_LOSSES, STANDARDIZED, Case, each
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import kdkernels
from kdkernels import objective, ops
from kdkernels.backends import Arguments
from kdkernels.validation import REDUCTIONS

OPS = torch.ops.kdkernels
CASES = SOME_LOSSES | {name: STANDARDIZED[name] for name in ("pr_dkd", "pr_gdkd", "ls_gdkd")}


@pytest.fixture(autouse=True)
def native() -> None:
    require("cpu")


# Schemas and fake kernels -------------------------------------------------------------------------------------------


def arguments_of(
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
    parts: bool = True,
) -> Arguments:
    """What the ops that give a loss have in common; moments where the loss standardises by class."""
    samples = (student.detach(), teacher, target, sample_weight)
    shape = (class_dim, num_classes or student.shape[class_dim], -100)
    moments = OPS.class_moments(*samples, *shape) if case.objective.standardize == "class" else None
    tensors = (student, teacher, target, sample_weight, denominator, moments)
    return Arguments(*tensors, *case.objective.encode(), scale, REDUCTIONS.index(reduction), *shape, parts, None)


def fused_inputs(arguments: Arguments, gradient: bool = True) -> tuple[Any, ...]:
    """Inputs of the op ``fused``."""
    return (*arguments[:-2], gradient, *arguments[-2:])


def calls(arguments: Arguments, grad_loss: Tensor | None = None) -> dict[str, tuple[Any, ...]]:
    """Inputs of every op, each with what the ops before it gave."""
    student, *samples, denominator, moments = arguments[:6]
    encoded, (scale, reduction), shape = arguments[6:8], arguments[8:10], arguments[10:13]
    inputs: dict[str, tuple[Any, ...]] = {"fused": fused_inputs(arguments), "evaluate": tuple(arguments)}
    with torch.no_grad():
        inputs["class_moments"] = (student, *samples, *shape)
        inputs["select"] = (student, *samples, moments, *encoded, *shape)
        selected = OPS.select(*inputs["select"])
        inputs["reduce"] = (student, *samples, selected, moments, *encoded, *shape)
        stats = OPS.reduce(*inputs["reduce"])
        weights = (*samples[1:], denominator, *encoded, scale, reduction, student.shape)
        inputs["finalize"] = (stats, *weights, *shape, arguments.parts)
        *_, coefficients = OPS.finalize(*inputs["finalize"])
        grad_loss = torch.tensor(0.5) if grad_loss is None else grad_loss
        logits = (student, *samples[:2])
        kept = (grad_loss, *logits, selected, coefficients, moments)
        sums = None
        if moments is not None:
            inputs["class_sums"] = (*kept, *encoded, *shape[:2])
            sums = OPS.class_sums(*inputs["class_sums"])
        inputs["apply"] = (*kept, sums, *encoded, *shape[:2])
        gradient = OPS.apply(*inputs["apply"])
        if moments is not None:
            one = torch.tensor(1.0)
            of_norm = (gradient, student, *samples[1:], moments, sums, one, *encoded, *shape)
            inputs["class_norm_backward"] = of_norm
            inputs["class_norm_backward_"] = (gradient.clone(), *of_norm[1:])
    return inputs


FLAGS: dict[str, dict[str, Any]] = {
    "all": {},
    "loss": {"gradient": False, "parts": False},
    "gradient": {"parts": False},
    "rows": {"reduction": "none"},
    "sum": {"reduction": "sum", "scale": 0.25},
    "denominator": {"reduction": "sum", "denominator": torch.tensor(3.0)},
    "weighted": {"sample_weight": torch.tensor([1.0, 0.5, 0.0])},
    "padded": {"num_classes": 20},
}
each_flags = pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS.keys())
GRAD = pytest.mark.parametrize("requires_grad", [True, False], ids=["grad", "no_grad"])


# The check differentiates through ops that only ever run inside an autograd function.
UNDIFFERENTIATED = pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered:UserWarning")


def opcheck(name: str, inputs: tuple[Any, ...], requires_grad: bool) -> None:
    """All of torch's checks of an op; that of the autograd registration needs an input that requires grad."""
    skipped = () if requires_grad else ("test_autograd_registration",)
    if requires_grad and torch.__version__.startswith("2.10."):
        skipped = ("test_schema",)  # it copies tensors that have no storage there
    every = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    op = getattr(OPS, name).default
    torch.library.opcheck(op, inputs, test_utils=[check for check in every if check not in skipped])


@UNDIFFERENTIATED
@GRAD
@each_flags
def test_fused_op(flags: dict[str, Any], requires_grad: bool) -> None:
    student, teacher, target = make_inputs((3, 23))
    gradient = flags.get("gradient", True)
    options = {name: value for name, value in flags.items() if name != "gradient"}
    arguments = arguments_of(LOSSES["dkd"], student.requires_grad_(requires_grad), teacher, target % 20, **options)
    opcheck("fused", fused_inputs(arguments, gradient), requires_grad)
    opcheck("evaluate", arguments, requires_grad)


@UNDIFFERENTIATED
@GRAD
@pytest.mark.parametrize("reduction", ["mean", "none"])
@each(CASES)
def test_every_op_of_each_loss(case: Case, reduction: str, requires_grad: bool) -> None:
    student, teacher, target = make_inputs((2, 23, 2, 3), torch.bfloat16, torch.float32)
    student = student.contiguous(memory_format=torch.channels_last).requires_grad_(requires_grad)
    target = target if case.needs_target else None
    grad_loss = torch.tensor(0.5) if reduction == "mean" else torch.tensor(0.5).expand(2, 2, 3)
    without = {"finalize", "class_norm_backward_"}  # no logits to differentiate in
    if case.objective.standardize == "class" and reduction == "none":
        without.add("fused")  # sums over samples, of which each has its own upstream gradient: that is evaluate's
    for name, inputs in calls(arguments_of(case, student, teacher, target, reduction=reduction), grad_loss).items():
        constant = tuple(given.detach() if isinstance(given, Tensor) else given for given in inputs)
        opcheck(name, constant if name in without else inputs, requires_grad and name not in without)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@each(CASES)
def test_the_steps_are_the_whole(case: Case, reduction: str) -> None:
    """``select``, ``reduce`` and ``finalize`` give what ``evaluate`` gives, and with ``apply`` what ``fused`` does."""
    student, teacher, target = make_inputs((6, 23))
    target[1] = -100
    weight = torch.tensor([1.0, 2.0, 0.5, 0.0, 1.0, 1.0])
    arguments = arguments_of(case, student, teacher, target, sample_weight=weight, reduction=reduction)
    inputs = calls(arguments, torch.ones(() if reduction == "mean" else 6))
    loss, parts, selected, coefficients = OPS.evaluate(*arguments)
    steps = (*OPS.finalize(*inputs["finalize"])[:2], *inputs["apply"][4:6])
    for got, want in zip(steps, (loss, parts, selected, coefficients), strict=True):
        assert torch.equal(got, want)
    fused_loss, fused_parts, gradient, sums = OPS.fused(*fused_inputs(arguments))
    torch.testing.assert_close(loss, fused_loss)
    torch.testing.assert_close(parts, fused_parts)
    assert (sums is None) == (arguments.moments is None)
    if sums is not None:
        torch.testing.assert_close(OPS.class_sums(*inputs["class_sums"]), sums, rtol=1e-5, atol=1e-5)
        _, *of_norm = inputs["class_norm_backward"]
        gradient = OPS.class_norm_backward(gradient, *of_norm)
    assert_gradient(OPS.apply(*inputs["apply"]), gradient, 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("factor", [torch.tensor(2.0), torch.tensor(1.0), torch.tensor([0.5, 1.0, 2.0])], ids=str)
def test_scale_op(factor: Tensor, dtype: torch.dtype) -> None:
    gradient = make_inputs((3, 23), dtype).student
    opcheck("scale_", (gradient.clone(), factor, 1), False)
    want = (gradient.double() * (factor[:, None] if factor.dim() else factor)).to(dtype)
    OPS.scale_(gradient, factor, 1)
    assert torch.equal(gradient, want)


@pytest.mark.parametrize("class_dim", [0, 1, 2])
def test_scale_op_along_any_dimension(class_dim: int) -> None:
    gradient = make_inputs((4, 5, 6)).student
    samples = [size for dim, size in enumerate(gradient.shape) if dim != class_dim]
    factor = torch.arange(1.0, 1.0 + torch.Size(samples).numel()).reshape(samples)
    want = gradient * factor.unsqueeze(class_dim)
    OPS.scale_(gradient, factor, class_dim)
    assert torch.equal(gradient, want)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0),
    "expanded": lambda x: x[:1].expand(2, -1, -1, -1),
    "cropped": lambda x: x[..., 1:],
    "empty": lambda x: x[:0],
}


@each_flags
@pytest.mark.parametrize("name", ["gdkd", "pr_gdkd"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_kernels_tell_the_truth(layout: str, name: str, flags: dict[str, Any]) -> None:
    """Shapes, dtypes and strides of what the kernels return, which compiled code relies on."""
    student, teacher, target = make_inputs((2, 23, 3, 4), torch.bfloat16, torch.float32)
    student, teacher = LAYOUTS[layout](student), LAYOUTS[layout](teacher)
    target = target[: student.shape[0], ..., : student.shape[3]] % 20
    options = {name: value for name, value in flags.items() if name != "gradient"}
    if "sample_weight" in options:
        options["sample_weight"] = torch.ones(target.shape)
    arguments = arguments_of((LOSSES | STANDARDIZED)[name], student, teacher, target, **options)
    inputs = calls(arguments) | {"fused": fused_inputs(arguments, flags.get("gradient", True))}
    for op, given in inputs.items():
        real = getattr(OPS, op)(*given)
        with FakeTensorMode() as mode:
            convert = mode.from_tensor
            fake = getattr(OPS, op)(*(convert(a) if isinstance(a, Tensor) else a for a in given))
        real, fake = (out if isinstance(out, tuple) else (out,) for out in (real, fake))
        for got, want in zip(fake, real, strict=True):
            assert (got is None) == (want is None), op
            if want is not None:
                assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride()), op


# Poison -------------------------------------------------------------------------------------------------------------


@each(CASES)
def test_the_poison_reaches_the_kernels_outputs(case: Case) -> None:
    """The suite's NaN filling covers memory that the ops allocate in C++: a fill for each output that is not empty."""
    student, teacher, target = make_inputs((3, 23))
    for name, inputs in calls(arguments_of(case, student, teacher, target)).items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            outputs = getattr(OPS, name)(*inputs)
        events = profile.events()
        assert events is not None
        filled = sum(event.name == "aten::fill_" for event in events)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        assert filled >= sum(output is not None and output.numel() > 0 for output in outputs), name


@each_flags
@each(CASES)
def test_no_output_keeps_the_poison(case: Case, flags: dict[str, Any]) -> None:
    """Also in what one step gives another, and for samples that do not count."""
    student, teacher, target = make_inputs((3, 23))
    target %= 20
    target[1] = -100
    options = {name: value for name, value in flags.items() if name != "gradient"}
    for name, inputs in calls(arguments_of(case, student, teacher, target, **options)).items():
        outputs = getattr(OPS, name)(*inputs)
        for output in outputs if isinstance(outputs, tuple) else (outputs,):
            if output is None:
                continue
            assert not output.isnan().any(), name
            if not output.is_floating_point():
                assert not output.eq(torch.iinfo(output.dtype).max).any(), name


# Errors -------------------------------------------------------------------------------------------------------------


def refused(name: str, inputs: tuple[Any, ...], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ops.run(getattr(OPS, name).default, inputs)


def test_what_backward_reads_is_checked_again() -> None:
    """Classes that were changed behind autograd's back: nothing outside the logits is read."""
    student, teacher, target = make_inputs((3, 23))
    inputs = calls(arguments_of(LOSSES["gdkd_ce"], student, teacher, target))["apply"]
    for at, name in ((3, "target"), (4, "selected")):
        for outside in (-1, 23, 10**12):
            changed = inputs[at].clone()
            changed.view(-1)[1] = outside
            message = f"{name} must be in \\[0, 23\\).*got {outside} for sample"
            refused("apply", (*inputs[:at], changed, *inputs[at + 1 :]), IndexError, message)


@pytest.mark.parametrize(
    ("name", "at", "wrong", "message"),
    [
        (
            "fused",
            2,
            torch.tensor([0, 23, 1]),
            r"target must be in \[0, 23\) or ignore_index -100, got 23 for sample 1",
        ),
        ("fused", 2, torch.tensor([0, 1]), "target must have 3 numbers, got 2"),
        ("evaluate", 3, torch.tensor([1.0, -1.0, 1.0]), "sample_weight must be >= 0, got -1 for sample 1"),
        ("fused", 1, torch.zeros(3, 22), "at least 23 classes, got 22"),
        ("fused", 1, torch.zeros(2, 23), "the same sample dimensions"),
        ("fused", 0, torch.zeros(3, 23, dtype=torch.float64), "got float64, which the reference backend serves"),
        ("fused", 5, torch.zeros(2, 3, 23), "moments must be given where, and only where"),
        ("fused", 6, [0, 0, 0], "structure must be what Objective.encode"),
        ("fused", 7, torch.zeros(3), "numbers must be the float64 CPU tensor that Objective.encode"),
        ("reduce", 4, torch.zeros(3, 4, dtype=torch.int64), "selected must be contiguous.* with 3 x 5 numbers, got 12"),
        ("finalize", 0, torch.zeros(3, 4), "stats must be contiguous"),
        ("apply", 5, torch.zeros(3, 4), "coefficients must be contiguous"),
        ("apply", 0, torch.ones(2), "grad_loss must have 3 numbers, got 2"),
    ],
)
def test_what_the_ops_refuse(name: str, at: int, wrong: Any, message: str) -> None:
    student, teacher, target = make_inputs((3, 23))
    inputs = calls(arguments_of(LOSSES["gdkd_ce"], student, teacher, target))[name]
    error = IndexError if "or ignore_index" in message else ValueError
    refused(name, (*inputs[:at], wrong, *inputs[at + 1 :]), error, message)


@pytest.mark.parametrize(("at", "wrong"), [(4, torch.zeros(2, 3, 22)), (5, torch.zeros(2, 22)), (6, torch.ones(3))])
def test_what_the_chain_rule_of_classes_refuses(at: int, wrong: Tensor) -> None:
    student, teacher, target = make_inputs((3, 23))
    inputs = calls(arguments_of(STANDARDIZED["pr_dkd"], student, teacher, target))["class_norm_backward_"]
    refused("class_norm_backward_", (*inputs[:at], wrong, *inputs[at + 1 :]), ValueError, "must have .* numbers, got")


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
