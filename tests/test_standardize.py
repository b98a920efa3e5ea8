"""Logits standardised by class or by sample, in front of every partition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import literal
import pytest
import torch
from helpers import (
    CPU_PATHS,
    DTYPES,
    Outcome,
    Path,
    allocations,
    assert_gradient,
    assert_same,
    assert_values,
    check,
    check_size,
    expected,
    instruction_sets,
    loss_tolerance,
    make_inputs,
    measured,
    name_of,
    needed_target,
    require,
)
from losses import LOSSES, STANDARDIZED, Case, each
from torch import Tensor

import kdkernels
from kdkernels import objective

INF = float("inf")
KINDS = ["class", "sample"]


def standardized(case: Case, kind: str, **numbers: Any) -> Case:
    """A loss of the table on standardised logits; ``numbers``: correction and eps."""
    return replace(
        case,
        name=f"{case.name}_by_{kind}",
        objective=objective.adjust(case.objective, kind, **numbers),
        call=partial(case.call, standardize=kind, **numbers),
    )


_PARTITIONS = ("kd", "reverse_kd", "bdd_two_temperatures", "dkd", "gdkd", "gdkd_worst", "gdkd3", "everything")
#: Every partition and direction, one and two terms, with and without the cross entropy, under both standardisations.
CASES = {
    case.name: case for name in _PARTITIONS for case in (standardized(LOSSES[name], kind) for kind in KINDS)
} | STANDARDIZED
SOME = {name: CASES[name] for name in ("kd_by_class", "kd_by_sample", "everything_by_class", "everything_by_sample")}
BY_CLASS = {name: case for name, case in CASES.items() if case.objective.standardize == "class"}


def inputs_for(shape: tuple[int, ...], *dtypes: torch.dtype, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of one scale (a sample of small ones has next to no loss once its class is standardised), uncentred."""
    student, teacher, target = make_inputs(shape, *dtypes, scale=2.0, **options)
    return student + 1.0, teacher - 2.0, target


# Values and gradients -----------------------------------------------------------------------------------------------

# Of two samples, a class has the logits -1 and 1: every class ties, and next to no gradient is left. So more of them.
SHAPES = [
    (6, 7),  # less than one vector
    (9, 33),  # one more than two vectors
    (8, 100),  # no multiple of a vector
    (200, 10),  # several blocks of samples
    (70, 333),  # more than one block of samples, an odd count of classes
    (8, 1000),  # whole vectors
    (12, 2049),  # a tile and one class
    (10, 17000),  # more than a chunk
]


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@each(CASES)
def test_shapes(case: Case, shape: tuple[int, int], path: Path) -> None:
    if shape[1] < case.smallest:
        shape = (shape[0], case.smallest)
    student, teacher, target = inputs_for(shape)
    check(case, student, teacher, path, **needed_target(case, target))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@each(CASES)
def test_dtypes(case: Case, dtype: torch.dtype, path: Path) -> None:
    student, teacher, target = inputs_for((9, 33), dtype)
    check(case, student, teacher, path, **needed_target(case, target))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float64)], ids=str)
@each(SOME)
def test_mixed_dtypes(case: Case, dtypes: tuple[torch.dtype, torch.dtype], path: Path) -> None:
    student, teacher, target = inputs_for((6, 2100), *dtypes)
    check(case, student, teacher, path, **needed_target(case, target))


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
@each(CASES)
def test_reductions_weights_and_parts(case: Case, reduction: str, path: Path) -> None:
    """Weights scale losses and not statistics; samples that do not count are in neither."""
    student, teacher, target = inputs_for((9, 33))
    weight = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 3.0, 0.25, 1.0, 1.0])
    target[4] = -100
    student[3], teacher[4] = float("nan"), INF
    check(case, student, teacher, path, target=target, sample_weight=weight, reduction=reduction, return_parts=True)


@pytest.fixture(params=CPU_PATHS, ids=name_of)
def any_instruction_set(request: pytest.FixtureRequest) -> Iterator[Path]:
    require("cpu")
    yield request.param
    kdkernels.set_cpu_instruction_set("auto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("instruction_set", instruction_sets())
@each(CASES)
def test_instruction_sets(case: Case, instruction_set: str, dtype: torch.dtype, any_instruction_set: Path) -> None:
    kdkernels.set_cpu_instruction_set(instruction_set)
    student, teacher, target = inputs_for((40, 45), dtype)
    check(case, student, teacher, any_instruction_set, **needed_target(case, target))


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("eps", [1e-5, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_correction_and_eps(kind: str, eps: float, correction: int, path: Path) -> None:
    case = standardized(LOSSES["dkd"], kind, correction=correction, eps=eps)
    student, teacher, target = inputs_for((6, 33))
    check(case, student, teacher, path, target=target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["kd", "reverse_kd", "dkd", "gdkd3"])
def test_a_mean_far_above_the_deviation(name: str, kind: str, dtype: torch.dtype, path: Path) -> None:
    """Means of about 1e4, deviations of 1: sums of squares would lose every digit of the variance."""
    case = standardized(LOSSES[name], kind)
    student, teacher, target = make_inputs((100, 50), dtype, scale=1.0)
    offsets = 1e4 + 1e3 * torch.arange(50) if kind == "class" else 1e4 + 1e2 * torch.arange(100)[:, None]
    student, teacher = student + offsets, teacher - 2 * offsets
    # In double precision the reference's own mean is off by an ulp of 1e4.
    if dtype == torch.float32:
        check(case, student, teacher, path, **needed_target(case, target))
    else:
        want = expected(case.objective, student, teacher, **needed_target(case, target))
        got = measured(case.call, student, teacher, **path.options, **needed_target(case, target))
        assert_values(got.loss, want.loss, 1e-10)
        assert_gradient(got.gradient, want.gradient, 1e-9)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@each({name: CASES[name] for name in CASES if name.startswith(("reverse", "dkd", "gdkd3", "everything"))})
def test_gradcheck(case: Case, reduction: str, double_path: Path) -> None:
    """The gradient is that of the loss, statistics included."""
    student, teacher, target = inputs_for((4, 6), torch.float64)
    options = {"target": target % 6, "reduction": reduction, **double_path.options}
    torch.autograd.gradcheck(lambda s: case.call(s, teacher, **options), student.requires_grad_())


# The oracle ---------------------------------------------------------------------------------------------------------


def by_class(logits: Tensor) -> Tensor:
    return (logits - logits.mean(0)) / (logits.var(0, correction=0) + 1e-5).sqrt()


def by_sample(logits: Tensor) -> Tensor:
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)


@pytest.mark.parametrize(("kind", "formula"), [("class", by_class), ("sample", by_sample)])
def test_the_reference_is_the_papers_formula(kind: str, formula: Callable[[Tensor], Tensor]) -> None:
    student, teacher, _ = inputs_for((7, 12), torch.float64)
    got = expected(objective.adjust(objective.kd(3.0), kind), student, teacher, reduction="sum")
    student.requires_grad_()
    want = literal.kl(formula(student), formula(teacher), 3.0).sum()
    (gradient,) = torch.autograd.grad(want, student)
    torch.testing.assert_close(got.loss, want.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.gradient, gradient, rtol=1e-10, atol=1e-12)


def test_top_k_looks_at_the_standardised_teacher(path: Path) -> None:
    """A class that is always large does not lead once it is standardised."""
    student, teacher, _ = inputs_for((5, 12))
    teacher[:, 7] += 100.0
    got = measured(partial(kdkernels.gdkd_loss, k=2, standardize="class"), student, teacher, **path.options)
    teacher[:, 7] -= 100.0
    same = measured(partial(kdkernels.gdkd_loss, k=2, standardize="class"), student, teacher, **path.options)
    # Adding 100 has rounded the logits of that class, by 2^-18 of their deviation.
    assert_values(got.loss, same.loss, 1e-4)
    assert_gradient(got.gradient, same.gradient, 1e-4)


# Edges --------------------------------------------------------------------------------------------------------------


@each(BY_CLASS)
def test_one_sample_by_class(case: Case, path: Path) -> None:
    """One sample is its class's mean: all its logits are 0, and move nothing but the cross entropy."""
    student, teacher, target = inputs_for((1, 33))
    got = measured(case.call, student, teacher, return_parts=True, **path.options, **needed_target(case, target))
    for name, part in got.parts.items():
        assert name == "ce" or part.abs() < 1e-5, name
    only_entropy = kdkernels.kd_loss(student.requires_grad_(), student.detach(), target=target, ce_weight=1.0)
    (gradient,) = torch.autograd.grad(only_entropy, student)
    assert (got.gradient - case.objective.ce_weight * gradient).abs().max() < 1e-6


@each(CASES)
def test_no_sample_and_no_valid_sample(case: Case, path: Path) -> None:
    student, teacher, target = inputs_for((3, 33))
    for rows in (slice(0, 0), slice(0, 3)):
        options = {"target": torch.full_like(target, -100)[rows]}
        got = measured(case.call, student[rows], teacher[rows], **path.options, **options)
        assert got.loss == 0
        assert got.gradient.eq(0).all()


@each(CASES)
def test_one_valid_sample(case: Case, path: Path) -> None:
    student, teacher, target = inputs_for((4, 33))
    weight = torch.tensor([0.0, 0.0, 1.0, 0.0])
    got = measured(case.call, student, teacher, target=target, sample_weight=weight, **path.options)
    want = expected(case.objective, student, teacher, target=target, sample_weight=weight)
    assert_values(got.loss, want.loss, loss_tolerance(got.loss, want.weight))
    assert (got.gradient - want.gradient).norm() <= 2e-6 * max(1.0, want.gradient.norm().item())
    assert got.gradient[weight == 0].eq(0).all()


@pytest.mark.parametrize("eps", [None, 0.0])
@each(SOME)
def test_constant_columns_and_rows(case: Case, eps: float | None, path: Path) -> None:
    """Without deviation a logit is standardised to 0, whatever it was, and nothing flows through it."""
    student, teacher, target = inputs_for((5, 33))
    for logits, value in ((student, 0.3), (teacher, -7.7)):
        logits[:, 4] = value
        logits[3] = value
    got = check(case, student, teacher, path, target=target)
    assert got.gradient.isfinite().all()
    if eps is not None:
        case = standardized(LOSSES[case.name.split("_")[0]], case.objective.standardize or "", eps=eps)
        if case.objective.standardize == "sample":
            student[3, 0] = teacher[3, 0] = 1.0  # else the slope of the deviation is infinite
            check_size(case, student, teacher, path, target)  # both sides are the same there once standardised
        else:
            check(case, student, teacher, path, target=target)


@pytest.mark.parametrize("masked", ["classes", "scattered"])
@each(CASES)
def test_masked_classes(case: Case, masked: str, path: Path) -> None:
    """Logits of -inf on both sides count in no statistics and get no gradient."""
    student, teacher, target = inputs_for((6, 40))
    gone = torch.zeros(6, 40, dtype=torch.bool)
    if masked == "classes":
        gone[:, [0, 17, 39]] = True
    else:
        gone = make_inputs((6, 40), scale=1.0, seed=1).student < -0.5
    gone[torch.arange(6), target] = False
    student[gone] = teacher[gone] = -INF
    got = check(case, student, teacher, path, target=target)
    assert got.gradient[gone].eq(0).all()
    if masked == "classes" and "worst" not in case.name:  # the worst classes are the masked ones
        kept = ~gone[0]
        moved = torch.cumsum(kept, 0)[target] - 1
        alone = measured(case.call, student[:, kept], teacher[:, kept], target=moved, **path.options)
        assert_values(got.loss, alone.loss.double(), 2e-6)


def test_a_class_that_begins_masked_far_from_zero(path: Path) -> None:
    """Its deviations are small against its mean, also where the first samples do not tell the mean."""
    case = standardized(LOSSES["kd"], "class")
    student, teacher, _ = make_inputs((60, 20), scale=1.0)
    student, teacher = student + 1e4, teacher - 2e4
    student[:1, 3] = teacher[:1, 3] = -INF
    student[:25, 5] = teacher[:25, 5] = -INF
    check(case, student, teacher, path)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_reaches_what_depends_on_it(kind: str, path: Path) -> None:
    student, teacher, _ = inputs_for((5, 33))
    student[2, 8] = float("nan")
    got = measured(standardized(LOSSES["kd"], kind).call, student, teacher, reduction="none", **path.options)
    hit = torch.tensor([True] * 5 if kind == "class" else [False, False, True, False, False])
    assert torch.equal(got.loss.isnan(), hit)
    assert got.gradient[~hit].isfinite().all()


@each({name: case for name, case in CASES.items() if case.smallest == 1})
def test_one_class(case: Case, path: Path) -> None:
    student, teacher, target = inputs_for((3, 1))
    got = measured(case.call, student, teacher, target=target, **path.options)
    assert got.loss == 0
    assert got.gradient.eq(0).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cropped", "padded"])
@each(SOME)
def test_layouts(case: Case, layout: str, path: Path) -> None:
    """Statistics over (N, H, W), read where the logits are."""
    student, teacher, target = inputs_for((2, 23, 3, 5))
    if layout == "channels_last":
        student = student.contiguous(memory_format=torch.channels_last)
    elif layout == "cropped":
        student, teacher, target = student[..., 1:], teacher[..., 1:], target[..., 1:]
    elif layout == "padded":
        student, target = torch.cat([student, torch.full((2, 4, 3, 5), float("nan"))], 1), target % 20
        got = check(case, student, teacher, path, target=target, num_classes=20)
        assert got.gradient[:, 20:].eq(0).all()
        return
    check(case, student, teacher, path, target=target, reduction="none", return_parts=True)


# Autograd, memory, threads ------------------------------------------------------------------------------------------


@each(SOME)
def test_upstream_and_second_backward(case: Case, path: Path) -> None:
    student, teacher, target = inputs_for((6, 33))
    upstream = torch.tensor(0.37)
    want = expected(case.objective, student, teacher, upstream, target=target)
    leaf = student.clone().requires_grad_()
    loss = case.call(leaf, teacher, target=target, **path.options)
    first = torch.autograd.grad(loss, leaf, upstream, retain_graph=True)[0].clone()
    second = torch.autograd.grad(loss, leaf, upstream)[0]
    assert torch.equal(first, second)
    assert_same(Outcome(loss.detach(), first, {}), want, student, teacher)


def test_a_sample_without_upstream_gradient_still_counts(path: Path) -> None:
    """Its logits are in every other sample's statistics."""
    student, teacher, _ = inputs_for((5, 33))
    upstream = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.0])
    case = standardized(LOSSES["kd"], "class")
    got = check(case, student, teacher, path, upstream, reduction="none")
    assert got.gradient[1].ne(0).all()


@each(SOME)
def test_memory(case: Case, native_path: Path) -> None:
    """One matrix, the gradient; the rest is a few numbers a sample and a class."""
    samples, classes = 500, 400
    student, teacher, target = inputs_for((samples, classes))
    step = partial(measured, case.call, student, teacher, target=target, **native_path.options)
    step()
    matrix = samples * classes * 4
    large = [size for size in allocations(step) if size >= matrix // 8]
    assert [size // 1024 for size in large] == [matrix // 1024]  # a GPU's allocator rounds up


@each(SOME)
def test_threads_do_not_change_a_bit(case: Case, cpu_path: Path, threads: None) -> None:
    student, teacher, target = inputs_for((100, 2100))
    outcomes = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        outcomes.append(measured(case.call, student, teacher, target=target, **cpu_path.options))
    for other in outcomes[1:]:
        assert torch.equal(other.loss, outcomes[0].loss)
        assert torch.equal(other.gradient, outcomes[0].gradient)


def test_nothing_is_kept_without_grad(native_path: Path) -> None:
    student, teacher, _ = inputs_for((500, 400))
    call = partial(kdkernels.kd_loss, student, teacher, standardize="class", **native_path.options)
    assert max(allocations(call)) < 500 * 400


# Ops ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("shape", [(1, 5), (7, 33), (500, 20), (40, 2100)], ids=name_of)
def test_class_moments(shape: tuple[int, int], dtype: torch.dtype) -> None:
    require("cpu")
    student, teacher, target = inputs_for(shape, dtype)
    target[0] = -100 if shape[0] > 1 else 0
    got = torch.ops.kdkernels.class_moments(student, teacher, target, None, 1, shape[1], -100)
    for side, logits in zip(got, (student, teacher), strict=True):
        valid = logits[target != -100].double()
        assert torch.equal(side[0], torch.full((shape[1],), float(len(valid)), dtype=torch.float64))
        # Deviations are added up, a few at a time, in float32.
        torch.testing.assert_close(side[1], valid.mean(0), rtol=4e-7, atol=4e-7)
        torch.testing.assert_close(side[2], valid.var(0, correction=0) * len(valid), rtol=4e-7, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered:UserWarning")
@pytest.mark.parametrize("name", ["everything_by_class", "everything_by_sample", "ls_gdkd"])
def test_ops_pass_torchs_checks(name: str) -> None:
    require("cpu")
    ops = torch.ops.kdkernels
    case = CASES[name]
    student, teacher, target = inputs_for((5, 23))
    moments = None
    if case.objective.standardize == "class":
        arguments = (student, teacher, target, None, 1, 23, -100)
        torch.library.opcheck(ops.class_moments.default, arguments)
        moments = ops.class_moments(*arguments)
    objective = case.objective.encode()
    shape = (1, 23, -100)
    arguments = (student, teacher, target, None, None, moments, *objective, 1.0, 2, *shape)
    torch.library.opcheck(ops.fused.default, (*arguments, True, True))
    torch.library.opcheck(ops.evaluate.default, (*arguments, True))
    _, _, selected, coefficients = ops.evaluate(*arguments, True)
    one, sums = torch.tensor(1.0), None
    kept = (one, student, teacher, target, selected, coefficients, moments)
    if moments is not None:
        arguments = (*kept, *objective, *shape[:2])
        torch.library.opcheck(ops.class_sums.default, arguments)
        sums = ops.class_sums(*arguments)
    arguments = (*kept, sums, *objective, *shape[:2])
    torch.library.opcheck(ops.apply.default, arguments)
    if moments is None:
        return
    gradient = ops.apply(*arguments)
    for op in (ops.class_norm_backward.default, ops.class_norm_backward_.default):
        torch.library.opcheck(op, (gradient, student, target, None, moments, sums, one, *objective, *shape))


@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind: str, native_path: Path) -> None:
    student, teacher, target = inputs_for((6, 33))
    case = standardized(LOSSES["dkd"], kind)
    compiled = torch.compile(partial(case.call, **native_path.options), fullgraph=True, backend="aot_eager")
    want = expected(case.objective, student, teacher, target=target)
    assert_same(measured(compiled, student, teacher, target=target), want, student, teacher)
