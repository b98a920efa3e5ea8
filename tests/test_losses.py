"""Value and gradient of every loss against the float64 reference, to the accuracy the documentation states."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import pytest
import torch
from helpers import (
    BACKENDS,
    DTYPES,
    GPU_BACKENDS,
    PATHS,
    Path,
    assert_gradient,
    assert_values,
    check,
    check_size,
    check_standard,
    expected,
    instruction_sets,
    make_inputs,
    measured,
    name_of,
    needed_target,
    require,
)
from losses import LOSSES, SOME_LOSSES, Case, each

import kdkernels
from kdkernels import dispatch
from kdkernels.objective import TARGET, WHOLE, Objective, Partition, Term, adjust

SHAPES = [
    (0, 10),  # no sample
    (1, 2),  # the smallest two groups: one class each
    (3, 7),  # less than one vector
    (4, 8),  # exactly an AVX2 vector of float32
    (5, 17),  # one more than an AVX-512 vector
    (4, 31),  # one less than two AVX-512 vectors
    (4, 100),  # CIFAR-100; no multiple of a vector
    (300, 10),  # many short rows, shared out to threads
    (2, 1000),  # ImageNet
    (2, 2048),  # exactly a tile
    (3, 2049),  # a tile and one class
    (2, 16384),  # exactly a large tile
    (2, 16385),  # a large tile and one class
    (1, 40000),  # one row, split over threads
]
#: Student and teacher.
MIXED_DTYPES = [
    (torch.float32, torch.bfloat16),  # a half precision teacher, float32 student
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float16, torch.bfloat16),
    (torch.float32, torch.float64),  # float64 arithmetic, float32 gradient
    (torch.float64, torch.float16),
]
REDUCTIONS = ["mean", "batchmean", "sum", "none"]


def name_of_pair(dtypes: tuple[torch.dtype, torch.dtype]) -> str:
    return "-".join(map(name_of, dtypes))


def fitting(cases: dict[str, Case], shapes: list[tuple[int, int]]) -> pytest.MarkDecorator:
    """Each loss with each shape that has classes enough for its partition."""
    pairs = [(case, shape) for case, shape in product(cases.values(), shapes) if shape[1] >= case.smallest]
    return pytest.mark.parametrize(
        ("case", "shape"), pairs, ids=[f"{case.name}-{name_of(shape)}" for case, shape in pairs]
    )


@each(LOSSES)
def test_the_table_of_losses_is_right_about_targets(case: Case) -> None:
    assert case.needs_target == case.objective.needs_target


@fitting(LOSSES, SHAPES)
def test_shapes(case: Case, shape: tuple[int, int], path: Path) -> None:
    check_standard(case, shape, path)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@each(LOSSES)
def test_dtypes(case: Case, dtype: torch.dtype, path: Path) -> None:
    check_standard(case, (5, 33), path, (dtype, dtype))


@pytest.mark.parametrize("dtypes", MIXED_DTYPES, ids=name_of_pair)
@fitting(SOME_LOSSES, [(5, 33), (1, 3000)])  # several short rows with a tail after the last vector; one long row
def test_mixed_dtypes(case: Case, shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype], path: Path) -> None:
    check_standard(case, shape, path, dtypes)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@each(LOSSES)
def test_reductions_weights_and_parts(case: Case, reduction: str, path: Path) -> None:
    student, teacher, target = make_inputs((7, 33))
    weight = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 3.0, 0.25])
    target[4] = -100
    check(case, student, teacher, path, target=target, sample_weight=weight, reduction=reduction, return_parts=True)


#: Terms that share temperatures and partitions, and terms that do not.
_MANY = (
    Term(1.0, WHOLE),
    Term(4.0, Partition("topk", 3), (1.0, 0.5), ((1.0, 0.0), (0.0, 2.0))),
    Term(2.0, WHOLE, groups=((0.0, 0.7),)),
    Term(4.0, TARGET, (0.5, 0.0), ((0.0, 0.0), (2.0, 0.5))),
    Term(1.0, WHOLE, groups=((0.3, 0.2),), square_temperature=False),
    Term(6.0, Partition("top1_topk", 4, largest=False), (1.0, 0.0), ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0))),
    Term(4.0, Partition("topk", 3), (0.25, 0.0), ((0.0, 1.0), (1.0, 0.0))),
    Term(3.0, WHOLE),
)
MULTI_LEVEL = Objective(tuple(Term(temperature, WHOLE) for temperature in (2.0, 3.0, 4.0, 5.0, 6.0)))


@pytest.mark.parametrize("standardize", [None, "class", "sample"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("count", [3, 5, 8])
def test_many_terms(count: int, reduction: str, standardize: str | None, cpu_path: Path) -> None:
    """Up to eight, each with its parts."""
    value = adjust(Objective(_MANY[:count], ce_weight=0.5), standardize)
    call = partial(kdkernels.distillation_loss, objective=value)
    names = ("ce", *(name for term in value.part_names() for name in term if name))
    assert {name.rsplit("_", 1)[-1] for name in names[1:]} == {str(i) for i in range(1, count + 1)}
    case = Case("many", value, call, names, needs_target=True)
    for shape in ((6, 40), (2, 21, 3, 1)):
        student, teacher, target = make_inputs(shape)
        options = {"target": target, "reduction": reduction, "return_parts": True}
        check(case, student, teacher, cpu_path, **options)


def test_multi_level_temperatures(cpu_path: Path) -> None:
    """The sum of the losses at five temperatures."""
    student, teacher, _ = make_inputs((6, 100))
    got = measured(partial(kdkernels.distillation_loss, objective=MULTI_LEVEL), student, teacher, **cpu_path.options)
    each_level = [
        measured(kdkernels.kd_loss, student, teacher, temperature=term.temperature, **cpu_path.options)
        for term in MULTI_LEVEL.terms
    ]
    assert_values(got.loss, torch.stack([level.loss.double() for level in each_level]).sum(), 2e-6)
    assert_gradient(got.gradient, torch.stack([level.gradient.double() for level in each_level]).sum(0), 2e-6)


@pytest.mark.parametrize(
    ("scale", "gap"),
    [
        (3.0, 0.1),  # late in training: the student is near its teacher
        (0.0, 1e-3),  # both nearly uniform
        (0.0, 0.1),
        (0.0, 20.0),  # both sure, of different classes
        (0.0, 100.0),  # saturated
    ],
    ids=["near", "flat", "soft", "sure", "saturated"],
)
@each(LOSSES)
def test_hard_logits(case: Case, scale: float, gap: float, path: Path) -> None:
    common = make_inputs((4, 100), torch.float64, scale=scale, seed=1).student if scale else 0.0
    student, teacher, target = make_inputs((4, 100), torch.float64, scale=gap)
    check_size(case, (common + student).float(), (common + teacher).float(), path, target)


@each(LOSSES)
def test_a_student_that_is_its_teacher_has_no_loss(case: Case, path: Path) -> None:
    """All divergences vanish; with a cross entropy, only that remains."""
    student, _, target = make_inputs((4, 100), scale=3.0)
    options = needed_target(case, target)
    weights = (term.scale * (1 + sum(term.mass) + sum(map(sum, term.groups))) for term in case.objective.terms)
    bound = 2**-24 * sum(weights)  # of the documented accuracy: roundings of probabilities, times the weights
    got = measured(case.call, student, student.clone(), return_parts=True, **path.options, **options)
    for name, part in got.parts.items():
        if name != "ce":
            assert part.abs() < bound, name
    only_entropy = Objective((Term(1.0, WHOLE, groups=((0.0, 0.0),)),), ce_weight=1.0)
    entropy = expected(only_entropy, student, student, target=target)
    assert_values(got.loss, case.objective.ce_weight * entropy.loss, 2e-6 + bound)
    assert (got.gradient - case.objective.ce_weight * entropy.gradient).norm() < 2e-6 + bound


@pytest.mark.parametrize("instruction_set", instruction_sets())
@each(LOSSES)
def test_instruction_sets_and_a_low_start(case: Case, instruction_set: str, cpu_path: Path) -> None:
    """Exponents counted from what a row begins with lose digits or overflow, and that has to show."""
    kdkernels.set_cpu_instruction_set(instruction_set)
    student, teacher, target = make_inputs((3, 50), scale=2.0)
    for logits in (student, teacher):
        logits[:, :20] -= torch.tensor([[60.0], [200.0], [1e4]])
    check_size(case, student, teacher, cpu_path, target)


ISA_SHAPES = [(5, 33), (3, 1000), (1, 40000)]  # short rows with a tail, longer rows, a row split over threads
ISA_DTYPES = [(dtype, dtype) for dtype in DTYPES if dtype != torch.float32] + [(torch.bfloat16, torch.float16)]


@pytest.fixture(params=[Path("cpu", "fused"), Path("cpu", "recompute")], ids=name_of)
def cpu_path(request: pytest.FixtureRequest) -> Iterator[Path]:
    require("cpu")
    yield request.param
    kdkernels.set_cpu_instruction_set("auto")


@pytest.mark.parametrize("instruction_set", instruction_sets())
@fitting(LOSSES, ISA_SHAPES)
def test_instruction_sets(case: Case, shape: tuple[int, int], instruction_set: str, cpu_path: Path) -> None:
    kdkernels.set_cpu_instruction_set(instruction_set)
    assert kdkernels.cpu_instruction_set() == instruction_set
    check_standard(case, shape, cpu_path)


@pytest.mark.parametrize("dtypes", ISA_DTYPES, ids=name_of_pair)
@pytest.mark.parametrize("instruction_set", instruction_sets())
@fitting(SOME_LOSSES, [(5, 33), (2, 3000)])
def test_instruction_sets_and_dtypes(
    case: Case, shape: tuple[int, int], instruction_set: str, dtypes: tuple[torch.dtype, torch.dtype], cpu_path: Path
) -> None:
    kdkernels.set_cpu_instruction_set(instruction_set)
    check_standard(case, shape, cpu_path, dtypes)


def test_every_backend_is_covered() -> None:
    """A new backend must join the list of the tests; those of GPUs have tests of their own where there is none."""
    elsewhere = {"auto", "cuda", "triton"} - set(GPU_BACKENDS)
    assert {path.backend for path in PATHS} == set(BACKENDS) == set(dispatch.BACKENDS) - elsewhere
