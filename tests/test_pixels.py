"""Logits of pixels, (N, C, H, W): classes apart in memory, samples side by side. The kernels walk them plane by plane.

Shapes are chosen by how those kernels cut their work: tiles of 64 pixels of a line (16 where classes are many), chunks
of classes that are gone through again where they do not fit in cache at once.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers import (
    DTYPES,
    GRADIENT_TOLERANCE,
    Path,
    allocations,
    arithmetic_dtype,
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
from kdkernels import objective

ALL_LOSSES = LOSSES | STANDARDIZED


def pixels(logits: Tensor, *sizes: int) -> Tensor:
    """``(samples, C)`` as ``(N, C, H, W)`` with the classes apart."""
    return logits.view(*sizes, -1).permute(0, 3, 1, 2).contiguous()


def check_pixels(
    case: Case, sizes: tuple[int, int, int], classes: int, path: Path, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """Per pixel, weighted and with ignored pixels, against the reference of (samples, C) logits."""
    count = math.prod(sizes)
    student, teacher, target = make_inputs((count, classes), *dtypes)
    target[torch.arange(count) % 7 == 3] = -100
    weight = (torch.arange(count) % 5 / 4).double()
    options = {"target": target, "sample_weight": weight, "reduction": "none"}
    want = expected(case.objective, student, teacher, torch.arange(count) % 3 / 2 + 0.5, **options)
    upstream = torch.arange(count) % 3 / 2 + 0.5
    shaped = {"target": target.view(sizes), "sample_weight": weight.view(sizes), "reduction": "none"}
    got = measured(
        case.call,
        pixels(student, *sizes),
        pixels(teacher, *sizes),
        upstream.view(sizes).to(arithmetic_dtype(student, teacher)),
        return_parts=True,
        **shaped,
        **path.options,
    )
    assert got.loss.shape == sizes
    assert tuple(got.parts) == case.parts
    tolerance = loss_tolerance(got.loss, want.weight)
    assert_values(got.loss.flatten(), want.loss, tolerance)
    for name, part in got.parts.items():
        assert_values(part.flatten(), want.parts[name], tolerance, f"part {name!r}")
    assert got.gradient.dtype == student.dtype
    gradient = got.gradient.permute(0, 2, 3, 1).reshape(count, classes)
    assert_gradient(gradient, want.gradient, GRADIENT_TOLERANCE[student.dtype])


@each(ALL_LOSSES)
def test_all_losses(case: Case, native_path: Path) -> None:
    """Whole tiles and what is left of a line."""
    check_pixels(case, (2, 9, 23), 30, native_path, (torch.float32, torch.float32))


@pytest.mark.parametrize(
    "dtypes", [(dtype, dtype) for dtype in DTYPES] + [(torch.bfloat16, torch.float32)], ids=name_of
)
@each(SOME_LOSSES | {"pr_dkd": STANDARDIZED["pr_dkd"], "ls_gdkd": STANDARDIZED["ls_gdkd"]})
def test_dtypes(case: Case, dtypes: tuple[torch.dtype, torch.dtype], native_path: Path) -> None:
    check_pixels(case, (1, 5, 17), 19, native_path, dtypes)


@pytest.mark.parametrize("name", instruction_sets())
@each(SOME_LOSSES | {"pr_dkd": STANDARDIZED["pr_dkd"], "ls_gdkd": STANDARDIZED["ls_gdkd"]})
def test_instruction_sets(case: Case, name: str) -> None:
    try:
        kdkernels.set_cpu_instruction_set(name)
        check_pixels(case, (1, 5, 17), 21, Path("cpu", "fused"), (torch.float32, torch.float32))
    finally:
        kdkernels.set_cpu_instruction_set("auto")


@pytest.mark.parametrize("classes", [300, 1030])  # tiles of 16 pixels; also in two chunks of classes
@each(SOME_LOSSES | {name: STANDARDIZED[name] for name in ("pr_dkd", "pr_gdkd", "ls_gdkd", "ls_reverse")})
def test_many_classes(case: Case, classes: int, native_path: Path) -> None:
    check_pixels(case, (1, 3, 13), classes, native_path, (torch.float32, torch.float32))


@each({name: LOSSES[name] for name in ("gdkd", "gdkd_worst", "gdkd3", "gdkd_k20", "best_and_worst")})
def test_ties(case: Case, native_path: Path) -> None:
    """Few different values: the lowest classes lead, pixel by pixel."""
    student, teacher, _ = make_inputs((90, 40))
    teacher = (teacher / 2).round()
    want = expected(case.objective, student, teacher)
    got = measured(case.call, pixels(student, 1, 9, 10), pixels(teacher, 1, 9, 10), **native_path.options)
    assert_values(got.loss, want.loss, 2e-6)
    assert_gradient(got.gradient.permute(0, 2, 3, 1).reshape(90, 40), want.gradient, 2e-6)


@pytest.mark.parametrize("how", ["ignored", "unweighted"])
#: Whole tiles and lines of pixels in one chunk of classes; parts of a tile in two chunks.
@pytest.mark.parametrize("shape", [(2, 19, 12, 40), (1, 1030, 4, 9)], ids=name_of)
@each(SOME_LOSSES | {"pr_dkd": STANDARDIZED["pr_dkd"], "ls_gdkd": STANDARDIZED["ls_gdkd"]})
def test_pixels_that_do_not_count(case: Case, shape: tuple[int, ...], how: str, native_path: Path) -> None:
    """Single ones, whole tiles and whole images: exactly no gradient, whatever they hold, and nothing else changes."""
    student, teacher, target = make_inputs(shape)
    counts = make_inputs((*target.shape, 1), class_dim=-1, scale=1.0, seed=1).student.squeeze(-1) < 0.5
    counts[0, : shape[2] // 2] = False
    if shape[0] > 1:
        counts[1, 3:] = False
    if how == "ignored":
        options = {"target": target.where(counts, torch.tensor(255)), "ignore_index": 255}
    else:
        options = {"sample_weight": counts.double()} | needed_target(case, target)
    clean = measured(case.call, student, teacher, **options, **native_path.options)
    missing = ~counts[:, None].expand(shape)
    dirty = [logits.masked_fill(missing, value) for logits, value in ((student, math.nan), (teacher, math.inf))]
    got = measured(case.call, *dirty, **options, **native_path.options)
    assert torch.equal(got.loss, clean.loss)
    assert torch.equal(got.gradient, clean.gradient)
    assert got.gradient[missing].count_nonzero() == 0
    nothing = measured(
        case.call, *dirty, **needed_target(case, target), sample_weight=torch.zeros(target.shape), **native_path.options
    )
    assert nothing.loss == 0
    assert nothing.gradient.count_nonzero() == 0


@each(SOME_LOSSES)
def test_a_nan_stays_in_its_pixel(case: Case, native_path: Path) -> None:
    student, teacher, target = make_inputs((1, 19, 6, 30))
    options = needed_target(case, target) | {"reduction": "none"}
    clean = measured(case.call, student, teacher, **options, **native_path.options)
    for side in range(2):
        logits = [student.clone(), teacher.clone()]
        logits[side][0, 4, 2, 7] = math.nan
        got = measured(case.call, *logits, **options, **native_path.options)
        assert got.loss[0, 2, 7].isnan()
        others = torch.ones(6, 30, dtype=torch.bool)
        others[2, 7] = False
        assert torch.equal(got.loss[0, others], clean.loss[0, others])
        assert torch.equal(got.gradient[0][:, others], clean.gradient[0][:, others])


@each(SOME_LOSSES | {"ls_gdkd": STANDARDIZED["ls_gdkd"]})
def test_masked_and_sure_classes(case: Case, native_path: Path) -> None:
    """-inf on both sides changes nothing else; a sure class leaves everything finite."""
    student, teacher, target = make_inputs((70, 19))
    student[:, 18] = teacher[:, 18] = -math.inf
    target %= 18
    student[::3, 4] += 1e4
    teacher[::5, 7] += 1e4
    options = needed_target(case, target)
    shaped = {name: value.view(1, 7, 10) for name, value in options.items()}
    want = expected(case.objective, student, teacher, reduction="none", **options)
    laid = pixels(student, 1, 7, 10), pixels(teacher, 1, 7, 10)
    got = measured(case.call, *laid, reduction="none", **shaped, **native_path.options)
    assert torch.equal(got.loss.isinf(), want.loss.view(1, 7, 10).isinf())
    assert got.gradient.isfinite().all()
    assert got.gradient[:, 18].count_nonzero() == 0
    finite = want.loss.isfinite()
    assert_values(got.loss.flatten()[finite], want.loss[finite], loss_tolerance(got.loss, want.weight))


@pytest.mark.parametrize("num_classes", [19, 21])
def test_classes_beyond_those_compared(num_classes: int, native_path: Path) -> None:
    student, teacher, target = make_inputs((2, 25, 5, 14))
    target %= num_classes
    options = {"target": target, "num_classes": num_classes}
    got = check(LOSSES["dkd"], student, teacher[:, :22], native_path, **options)
    assert got.gradient[:, num_classes:].count_nonzero() == 0


@each({name: ALL_LOSSES[name] for name in ("gdkd", "everything", "pr_dkd", "ls_gdkd")})
def test_gradient_in_another_layout(case: Case, native_path: Path) -> None:
    """The gradient of logits that are expanded over the classes has its classes side by side."""
    student, teacher, target = make_inputs((2, 19, 6, 7))
    check(case, student[:, :1].expand(-1, 19, -1, -1), teacher, native_path, **needed_target(case, target))


@each(SOME_LOSSES | {"pr_dkd": STANDARDIZED["pr_dkd"]})
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "batchmean"])
def test_the_same_on_any_number_of_threads(case: Case, reduction: str, cpu_path: Path, threads: None) -> None:
    student, teacher, target = make_inputs((2, 19, 40, 70))
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        options = needed_target(case, target) | {"reduction": reduction}
        results.append(measured(case.call, student, teacher, **options, **cpu_path.options))
    for result in results[1:]:
        assert torch.equal(result.loss, results[0].loss)
        assert torch.equal(result.gradient, results[0].gradient)


def test_memory(native_path: Path) -> None:
    """One matrix, the gradient; of the losses nothing is kept, unless a pixel's numbers are for recomputing."""
    student, teacher, target = make_inputs((2, 150, 40, 50))
    student.requires_grad_()
    sizes = allocations(lambda: kdkernels.dkd_loss(student, teacher, target, **native_path.options).backward())
    large = [size for size in sizes if size > 4 * 50 * target.numel()]
    granule = 512  # of a GPU's allocator
    assert [-(-size // granule) for size in large] == [-(-4 * student.numel() // granule)]


# Many elements -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_offsets_beyond_32_bits(dtype: torch.dtype, native_path: Path) -> None:
    """Images that are more than 2^31 elements apart: of the storage in between no page is ever touched."""
    apart, classes = (1 << 31) + 40, 300
    there, size = torch.get_default_device(), dtype.itemsize * (apart + classes * 64)
    storage = torch.empty(0, dtype=dtype).set_(torch.UntypedStorage(size, device=there))
    student, teacher, target = make_inputs((2, classes, 64), dtype)
    far = storage.as_strided(student.shape, (apart, 64, 1))
    far.copy_(student)
    want = expected(objective.dkd(), student, teacher, target=target)
    got = measured(kdkernels.dkd_loss, far, teacher, target=target, **native_path.options)
    assert_values(got.loss, want.loss, 2e-6)
    assert_gradient(got.gradient, want.gradient, GRADIENT_TOLERANCE[dtype])


def test_more_elements_than_32_bits_count() -> None:
    """As many images as make 2^31 elements, all the same: the mean is that of one."""
    student, teacher, _ = make_inputs((1, 1000, 2048))
    count = (1 << 31) // student.numel() + 1
    with torch.no_grad():
        want = kdkernels.kd_loss(student, teacher, backend="cpu")
        got = kdkernels.kd_loss(student.expand(count, -1, -1), teacher.expand(count, -1, -1), backend="cpu")
    assert_values(got, want.double(), 2e-6)


@pytest.mark.large
@pytest.mark.parametrize("layout", ["rows", "pixels"])
def test_a_matrix_of_more_than_2_to_the_31_elements(layout: str, native_path: Path) -> None:
    """A float16 student of 4.3 GB and its gradient."""
    classes = 32768
    block, _, target = make_inputs((64, classes), torch.float16)
    copies = (1 << 31) // block.numel() + 1
    teacher = make_inputs((64, classes), torch.float16, seed=1).student
    if layout == "rows":
        student = block.repeat(copies, 1)
        teacher_all, target_all = teacher.repeat(copies, 1), target.repeat(copies)
    else:  # (C, N) in memory
        student = block.t().contiguous().repeat(1, copies).t()
        teacher_all, target_all = teacher.t().contiguous().repeat(1, copies).t(), target.repeat(copies)
    assert student.numel() > 1 << 31
    options = {"target": target, "reduction": "sum"}
    want = expected(objective.dkd(), block, teacher, **options)
    student.requires_grad_()
    loss = kdkernels.dkd_loss(student, teacher_all, target_all, reduction="sum", **native_path.options)
    loss.backward()
    assert_values(loss.detach() / copies, want.loss, 2e-6)
    for rows in (slice(0, 64), slice(-64, None)):
        assert_gradient(student.grad[rows], want.gradient, GRADIENT_TOLERANCE[torch.float16])
