"""The CUDA ops as torch sees them: schemas, fake kernels, torch.compile.

What the kernels compute is tested elsewhere: where nothing else is said launches are noted here, nothing runs, and
outputs are 0.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda_simulator import recorded
from cuda_targets import LAST, device, missing
from helpers import OUTPUTS, Path, assert_same, expected, make_inputs, measured, must_have_native, needed_target
from losses import LOSSES, STANDARDIZED, Case
from simulated import DEVICE, moved
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from kdkernels.validation import REDUCTIONS

ALL = LOSSES | STANDARDIZED
OPS = torch.ops.kdkernels_cuda


@pytest.fixture(autouse=True)
def backend_is_there() -> None:
    reason = missing()
    if reason is not None:
        (pytest.fail if must_have_native() else pytest.skip)(reason)


@pytest.fixture
def launches() -> Iterator[None]:
    """A GPU, or the CPU's memory and launches that are noted."""
    if DEVICE.type != "cpu":
        yield
        return
    with recorded(LAST):
        yield


def forward_arguments(
    case: Case, student: Tensor, teacher: Tensor, target: Tensor | None, reduction: str = "mean", **flags: bool
) -> tuple[Any, ...]:
    """Arguments of the op, moments included where the loss standardises by class."""
    flags = {"gradient": True, "save": True, "parts": True} | flags
    number = REDUCTIONS.index(reduction)
    with torch.no_grad():
        moments = OPS.class_moments(student, teacher, target, None, 1, student.shape[1], -100)
    moments = moments if case.objective.standardize == "class" else None
    numbers = (*case.objective.encode(), 1.0, number, 1, student.shape[1], -100)
    return (student, teacher, target, None, None, moments, *numbers, *flags.values())


def opcheck(op: object, arguments: tuple[Any, ...], requires_grad: bool = False) -> None:
    """All of torch's checks of an op; that of the autograd registration needs an input that requires grad."""
    skipped = () if requires_grad else ("test_autograd_registration",)
    if requires_grad and torch.__version__.startswith("2.10."):
        skipped = ("test_schema",)  # it copies tensors that have no storage there
    every = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, arguments, test_utils=[name for name in every if name not in skipped])


# The check differentiates through the op, which only ever runs inside an autograd function.
UNDIFFERENTIATED = pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered:UserWarning")


@UNDIFFERENTIATED
@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("requires_grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("flags", OUTPUTS.values(), ids=OUTPUTS.keys())
@pytest.mark.parametrize("name", ["dkd", "gdkd3", "pr_gdkd", "ls_dkd"])
def test_forward_op(name: str, flags: dict[str, Any], requires_grad: bool) -> None:
    student, teacher, target = (moved(tensor, DEVICE) for tensor in make_inputs((3, 23)))
    if flags.get("gradient", True) and ALL[name].objective.standardize == "class":
        flags = flags | {"save": True}
    arguments = forward_arguments(ALL[name], student.requires_grad_(requires_grad), teacher, target, **flags)
    opcheck(OPS.forward.default, arguments, requires_grad)


@UNDIFFERENTIATED
@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("requires_grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["dkd", "gdkd3", "pr_gdkd", "ls_dkd"])
def test_backward_ops(name: str, reduction: str, requires_grad: bool) -> None:
    """Those that a gradient takes after forward, with one factor and with one a sample, expanded."""
    student, teacher, target = (moved(tensor, DEVICE) for tensor in make_inputs((3, 23)))
    arguments = forward_arguments(ALL[name], student, teacher, target, reduction)
    _, _, sums, saved, members = OPS.forward(*arguments)
    moments, *objective = arguments[5:8]
    factor = torch.tensor(0.5) if reduction == "mean" else torch.tensor([0.5]).expand(3)
    logits = factor.to(DEVICE), student.requires_grad_(requires_grad), teacher, target, saved, members
    shape = *objective, 1, 23
    if moments is not None:
        opcheck(OPS.class_sums.default, (*logits, moments, *shape), requires_grad)
    opcheck(OPS.backward.default, (*logits, moments, None if moments is None else sums, *shape), requires_grad)


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_class_moments_op(dtype: torch.dtype) -> None:
    student, teacher, target = (moved(tensor, DEVICE) for tensor in make_inputs((2, 23, 2, 3), dtype))
    opcheck(OPS.class_moments.default, (student, teacher, target, None, 1, 20, -100))


@pytest.mark.parametrize("factor", [torch.tensor(2.0), torch.tensor([0.5, 1.0, 2.0])], ids=str)
def test_scale_op(factor: Tensor) -> None:
    """It runs: what it changes in place has to be seen."""
    gradient = moved(make_inputs((3, 23)).student, DEVICE)
    with device(LAST):
        opcheck(OPS.scale_.default, (gradient, moved(factor, DEVICE), 1))


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def ops_in(counter: CompileCounterWithBackend) -> set[str]:
    """Names of our ops in the captured graphs, those of autograd functions' bodies included."""
    modules = [module for graph in counter.graphs for module in graph.modules()]
    nodes = [node for module in modules if isinstance(module, torch.fx.GraphModule) for node in module.graph.nodes]
    return {str(node.target) for node in nodes if "kdkernels" in str(node.target)}


def test_importing_does_not_import_the_compiler() -> None:
    """It takes a second, and who does not compile can do without."""
    program = "import sys, kdkernels; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("mode", ["fused", "recompute"])
@pytest.mark.parametrize("name", ["dkd", "pr_gdkd"])
def test_compile(name: str, mode: str) -> None:
    """One graph, forward and backward, with our ops alone in it; compiled once more for another batch, then never."""
    case, counter = ALL[name], CompileCounterWithBackend("aot_eager")
    call = torch.compile(case.call, backend=counter, fullgraph=True)
    compilations = []
    for batch in (5, 4, 6):
        student, teacher, target = make_inputs((batch, 23), seed=batch)
        options = needed_target(case, target)
        there = {name: moved(value, DEVICE) for name, value in options.items()}
        with device(LAST):
            inputs = moved(student, DEVICE), moved(teacher, DEVICE)
            got = measured(call, *inputs, **Path("cuda", mode).options, **there)
        got = got._replace(loss=got.loss.cpu(), gradient=got.gradient.cpu())
        assert_same(got, expected(case.objective, student, teacher, **options), student, teacher)
        compilations.append(counter.frame_count)
    assert compilations[0] == 1
    assert compilations[1:] == [2, 2]
    assert ops_in(counter)
    assert all("kdkernels_cuda" in name for name in ops_in(counter))
