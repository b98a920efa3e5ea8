"""Few classes, in any layout: the CPU kernels take 64 samples at a time, transposed where they lie in rows.

Sample counts are those about such a tile, class counts those about the 16 bytes of a row that are transposed at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import (
    DTYPES,
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    Outcome,
    Path,
    assert_gradient,
    assert_values,
    check,
    expected,
    instruction_sets,
    loss_tolerance,
    make_inputs,
    measured,
    name_of,
    needed_target,
)
from losses import LOSSES, SOME_LOSSES, STANDARDIZED, Case, each
from torch import Tensor

import kdkernels
from kdkernels.objective import Objective, gdkd

CASES = SOME_LOSSES | {name: STANDARDIZED[name] for name in ("pr_dkd", "pr_gdkd", "ls_gdkd", "ls_reverse")}
FEW_CASES = {name: CASES[name] for name in ("dkd", "gdkd_ce", "everything", "pr_dkd", "ls_gdkd")}
#: (images, height, width): 2, 63, 64, 65 and 200 samples; in lines that are no multiple of a tile, but for the third.
SIZES = [(2, 1, 1), (1, 7, 9), (1, 8, 8), (5, 1, 13), (2, 10, 10)]
#: The fewest; no multiple of a vector and one; pixels' usual count; around 64, from where on rows are not transposed.
CLASSES = [2, 3, 4, 5, 8, 19, 63, 64, 65]


def _wider(logits: Tensor) -> Tensor:
    """Rows of a wider matrix, whose other classes would ruin everything."""
    images, classes, height, width = logits.shape
    memory = torch.full((images, height, width, classes + 3), math.nan, dtype=logits.dtype).permute(0, 3, 1, 2)
    return memory[:, 2 : classes + 2].copy_(logits)


def _crop(logits: Tensor) -> Tensor:
    """A crop of larger images: samples that merge to no single dimension."""
    images, classes, height, width = logits.shape
    memory = torch.full((images, height + 2, width + 3, classes), math.nan, dtype=logits.dtype).permute(0, 3, 1, 2)
    return memory[:, :, 1 : height + 1, 1 : width + 1].copy_(logits)


def _apart(logits: Tensor) -> Tensor:
    """Neither classes nor samples side by side."""
    images, classes, height, width = logits.shape
    memory = torch.full((images, height, width, 2 * classes), math.nan, dtype=logits.dtype).permute(0, 3, 1, 2)
    return memory[:, ::2].copy_(logits)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda logits: logits.contiguous(memory_format=torch.channels_last),
    "planes": lambda logits: logits.contiguous(),
    "wider": _wider,
    "crop": _crop,
    "apart": _apart,
}
#: Student and teacher: each layout on each side, and together.
PAIRS = [
    ("rows", "rows"),
    ("rows", "planes"),
    ("planes", "rows"),
    ("planes", "crop"),
    ("wider", "crop"),
    ("crop", "wider"),
    ("apart", "rows"),
    ("rows", "apart"),
    ("crop", "crop"),
]


@pytest.fixture
def reset_instruction_set() -> Iterator[None]:
    yield
    kdkernels.set_cpu_instruction_set("auto")


def lay_out(student: Tensor, teacher: Tensor, layouts: tuple[str, str]) -> tuple[Tensor, Tensor]:
    return LAYOUTS[layouts[0]](student), LAYOUTS[layouts[1]](teacher)


def masked_options(target: Tensor) -> dict[str, Tensor]:
    """Ignored samples, the first among them, and weights."""
    count = target.numel()
    target = target.where((torch.arange(count) % 7 != 0).view(target.shape), torch.tensor(-100))
    return {"target": target, "sample_weight": (torch.arange(count) % 5 / 4).double().view(target.shape)}


def assert_samples(got: Outcome, want: Outcome, objective: Objective) -> None:
    """What a probability's rounding is multiplied by counts, too: 8 units of it in a single sample."""
    weights = sum(term.scale * (sum(term.mass) + sum(map(sum, term.groups))) for term in objective.terms)
    unit = 2**-24 if got.loss.dtype == torch.float32 else 2**-53
    rounding = 8 * unit * (weights + objective.ce_weight)
    error = (got.loss.double() - want.loss).abs()
    assert (error <= LOSS_TOLERANCE[got.loss.dtype] * want.loss.abs().clamp(min=1.0) + rounding).all(), error.max()
    assert_gradient(got.gradient, want.gradient, GRADIENT_TOLERANCE[got.gradient.dtype])


def check_samples(case: Case, student: Tensor, teacher: Tensor, path: Path, **options: Any) -> None:
    """Each sample's loss, held to the bound of single samples, and the gradient."""
    options |= {"reduction": "none"}
    want = expected(case.objective, student, teacher, **options)
    assert_samples(measured(case.call, student, teacher, **path.options, **options), want, case.objective)


@pytest.mark.parametrize("layouts", PAIRS, ids=name_of)
@each(CASES)
def test_layouts(case: Case, layouts: tuple[str, str], cpu_path: Path) -> None:
    student, teacher, target = make_inputs((2, 19, 6, 11))
    check_samples(case, *lay_out(student, teacher, layouts), cpu_path, **masked_options(target))


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("sizes", SIZES, ids=name_of)
@each({name: CASES[name] for name in ("kd", "dkd", "gdkd_ce", "pr_dkd")})
def test_sizes(case: Case, sizes: tuple[int, int, int], classes: int, cpu_path: Path) -> None:
    """Whole tiles, cut ones, several; whole pieces of rows and what is left of them."""
    classes = max(classes, case.smallest)
    student, teacher, target = make_inputs((sizes[0], classes, *sizes[1:]))
    options = needed_target(case, target)
    for layouts in (("rows", "rows"), ("wider", "crop"), ("planes", "rows")):
        check_samples(case, *lay_out(student, teacher, layouts), cpu_path, **options)


@pytest.mark.usefixtures("reset_instruction_set")
@pytest.mark.parametrize("dtypes", [*((d, d) for d in DTYPES), (torch.bfloat16, torch.float32)], ids=name_of)
@pytest.mark.parametrize("name", instruction_sets())
@each(FEW_CASES)
def test_instruction_sets_and_dtypes(
    case: Case, name: str, dtypes: tuple[torch.dtype, torch.dtype], cpu_path: Path
) -> None:
    kdkernels.set_cpu_instruction_set(name)
    for classes, layouts in ((11, "rows"), (10, "wider"), (64, "rows")):
        student, teacher, target = make_inputs((2, classes, 5, 9), *dtypes)
        options = needed_target(case, target)
        check(case, *lay_out(student, teacher, (layouts, "rows")), cpu_path, **options)
        check(case, *lay_out(student, teacher, ("planes", layouts)), cpu_path, **options)


@pytest.mark.usefixtures("reset_instruction_set")
@pytest.mark.parametrize("name", instruction_sets())
@each(CASES)
def test_rows_give_what_planes_give(case: Case, name: str) -> None:
    """Bit by bit: it is the same arithmetic. Class moments alone are added up in another order."""
    kdkernels.set_cpu_instruction_set(name)
    student, teacher, target = make_inputs((1, 21, 9, 13))
    options = needed_target(case, target) | {"reduction": "none", "backend": "cpu"}
    want = measured(case.call, *lay_out(student, teacher, ("planes", "planes")), **options)
    for layouts in PAIRS:
        got = measured(case.call, *lay_out(student, teacher, layouts), **options)
        if case.objective.standardize == "class":
            weight = expected(case.objective, student, teacher, **needed_target(case, target), reduction="none").weight
            assert_values(got.loss, want.loss, 2 * loss_tolerance(got.loss, weight))
        else:
            assert torch.equal(got.loss, want.loss), layouts
            assert torch.equal(got.gradient, want.gradient), layouts


@pytest.mark.parametrize("layouts", PAIRS, ids=name_of)
@each(CASES)
def test_samples_that_do_not_count(case: Case, layouts: tuple[str, str], cpu_path: Path) -> None:
    """Single ones, the first, and whole tiles: no gradient, whatever they hold, and nothing else changes."""
    student, teacher, target = make_inputs((2, 10, 9, 15))
    options = masked_options(target)
    options["target"][1, 1:] = -100
    missing = ((options["target"] == -100) | (options["sample_weight"] == 0))[:, None].expand(student.shape)
    clean = measured(case.call, *lay_out(student, teacher, layouts), **cpu_path.options, **options)
    dirty = student.masked_fill(missing, math.nan), teacher.masked_fill(missing, math.inf)
    got = measured(case.call, *lay_out(*dirty, layouts), **cpu_path.options, **options)
    assert torch.equal(got.loss, clean.loss)
    assert torch.equal(got.gradient, clean.gradient)
    assert got.gradient[missing].count_nonzero() == 0
    nothing = measured(case.call, *lay_out(*dirty, layouts), **cpu_path.options, target=torch.full_like(target, -100))
    assert nothing.loss == 0
    assert nothing.gradient.count_nonzero() == 0


@pytest.mark.parametrize("layouts", PAIRS, ids=name_of)
def test_classes_beyond_those_compared(layouts: tuple[str, str], cpu_path: Path) -> None:
    """Few of many classes, too."""
    for classes, compared in ((21, 19), (70, 10)):
        student, teacher, target = make_inputs((2, classes, 5, 14))
        student, teacher = lay_out(student, teacher[:, : compared + 1], layouts)
        options = {"target": target % compared, "num_classes": compared}
        got = check(LOSSES["dkd"], student, teacher, cpu_path, **options)
        assert got.gradient[:, compared:].count_nonzero() == 0


@each(CASES)
def test_short_lines(case: Case, cpu_path: Path) -> None:
    """Two of three views: no two samples of different images merge. And expanded ones, whose gradient does."""
    student, teacher, target = make_inputs((50, 3, 12), class_dim=-1)
    options = needed_target(case, target[:, :2]) | {"class_dim": -1}
    check_samples(case, student[:, :2], teacher[:, 1:], cpu_path, **options)
    options = needed_target(case, target) | {"class_dim": -1}
    check(case, student, teacher[:, :1].expand(-1, 3, -1), cpu_path, **options)
    check(case, student[:1].expand(50, -1, -1), teacher, cpu_path, **options)


@each(CASES)
def test_without_gradient(case: Case, cpu_path: Path) -> None:
    student, teacher, target = make_inputs((130, 10))
    options = needed_target(case, target) | cpu_path.options
    want = expected(case.objective, student, teacher, **needed_target(case, target))
    with torch.no_grad():
        got = case.call(student, teacher, **options)
    assert_values(got, want.loss, loss_tolerance(got, want.weight))


def test_one_class(cpu_path: Path) -> None:
    """There is nothing to learn from one class."""
    student, teacher, _ = make_inputs((70, 1))
    for standardize in (None, "class"):
        got = measured(kdkernels.kd_loss, student, teacher, standardize=standardize, **cpu_path.options)
        assert got.loss == 0
        assert got.gradient.count_nonzero() == 0


# Many leading classes ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("reset_instruction_set")
@pytest.mark.parametrize("strategy", ["best", "worst"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("layout", ["rows", "planes"])
@pytest.mark.parametrize(
    ("classes", "k"),
    [(60, 32), (60, 33), (60, 59), (300, 100), (1030, 40), (5000, 64), (5000, 65), (9000, 700), (9000, 8999)],
    ids=name_of,
)
def test_many_leading_classes(classes: int, k: int, layout: str, dtype: torch.dtype, strategy: str) -> None:
    """Of logits with many ties, of which the lowest classes lead; many are masked."""
    student, teacher, _ = make_inputs((1, classes, 1, 5), dtype)
    teacher = (2 * teacher).round() / 2
    teacher[:, ::9] = student[:, ::9] = -1e4
    case = LOSSES["gdkd"]
    objective = gdkd(k=k, strategy=strategy)
    want = expected(objective, student, teacher, reduction="none")
    for name in instruction_sets():
        kdkernels.set_cpu_instruction_set(name)
        pair = lay_out(student, teacher, (layout, layout))
        got = measured(case.call, *pair, k=k, strategy=strategy, reduction="none", backend="cpu")
        assert_samples(got, want, objective)
