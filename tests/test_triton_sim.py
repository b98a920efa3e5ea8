"""The Triton backend's compiled kernels where their own tiles and costs matter, run as in test_simulator.py."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import Path, assert_same, assert_values, expected, loss_tolerance, make_inputs, name_of, needed_target
from kdkernels.triton_kernels.launch import scale_
from losses import LOSSES, STANDARDIZED, Case
from ptxsim import device_bytes
from torch import Tensor
from triton_targets import ARCHITECTURES, check, device, needs_simulator, run

import kdkernels
from kdkernels import objective
from kdkernels.objective import TARGET, Objective, Partition, Term

pytestmark = pytest.mark.triton

ALL = LOSSES | STANDARDIZED
FUSED, RECOMPUTE = Path("triton", "fused"), Path("triton", "recompute")
LAST = ARCHITECTURES[-1]

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def of_objective(value: Objective, parts: tuple[str, ...]) -> Case:
    """A loss that is in no table."""
    return Case("objective", value, partial(kdkernels.distillation_loss, objective=value), parts)


# What is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "classes", "dtypes"),
    [
        ("gdkd", 16384, (BF16, BF16)),
        ("gdkd_worst", 9000, (F16, F16)),  # tiles beyond the last class
        ("dkd", 16382, (F16, BF16)),  # no more than a pair at a time
        ("dkd", 9000, (BF16, torch.float32)),
        ("gdkd_k20", 8191, (F16, F16)),  # a class at a time
    ],
    ids=name_of,
)
def test_pairs_in_a_register(name: str, classes: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Long rows of 16 bits a logit are kept in half the registers."""
    inputs = make_inputs((1, classes), *dtypes)
    check(ALL[name], inputs.student, inputs.teacher, FUSED, LAST, **needed_target(ALL[name], inputs.target))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("everything", (2, 33000)),
        ("gdkd_k20", (2, 33000)),
        ("ls_gdkd", (2, 33000)),
        ("pr_gdkd", (6, 20000)),  # of two samples by class only signs are left, and the top k is a draw
    ],
    ids=name_of,
)
def test_split_rows(name: str, shape: tuple[int, int]) -> None:
    """Statistics of the parts of a row, their merge and the sweep; both terms' selections, and a long one."""
    inputs = make_inputs(shape)
    check(ALL[name], inputs.student, inputs.teacher, FUSED, LAST, **needed_target(ALL[name], inputs.target))


#: Two rankings of standardised logits, and a cross entropy.
TWO_RANKS = Objective(
    tuple(Term(3.0, Partition("topk", k), (1.0, 0.0), ((1.0, 0.0), (0.5, 1.0))) for k in (4, 3)),
    "sample",
    ce_weight=7.0,
)


@pytest.mark.parametrize(
    ("name", "shape", "dtypes"),
    [
        ("best_and_worst", (1, 17000), (BF16, BF16)),
        ("two_ranks", (2, 4097), (F32, F32)),  # two terms take too many registers for what one has room for
        ("best_and_worst", (2, 4097), (F64, F64)),
        ("two_ranks", (1, 17, 2, 3), (F64, F32)),
        ("best_and_worst", (1, 150, 4, 4), (F32, F32)),
    ],
    ids=name_of,
)
def test_two_selections_in_split_samples(
    name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """Each term sets candidates of its own aside."""
    two = of_objective(TWO_RANKS, ("ce", *ALL["best_and_worst"].parts))
    inputs = make_inputs(shape, *dtypes)
    sim = check({**ALL, "two_ranks": two}[name], inputs.student, inputs.teacher, FUSED, LAST, target=inputs.target)
    assert sim is None or "split_kernel" in sim.stats


# What does not count, and what is extreme --------------------------------------------------------------------------

LOWEST = torch.finfo(torch.float32).min
LAYOUTS = {"rows": (21, 90), "split rows": (5, 17001), "pixels": (2, 21, 5, 7)}


def reverse_in_the_rest(standardize: str | None = None, top: tuple[float, float] = (0.0, 0.0)) -> Case:
    """The worst classes lead, and have no reverse weight."""
    term = Term(2.0, Partition("topk", 4, largest=False), (1.0, 0.0), (top, (0.5, 2.0)))
    return of_objective(Objective((term,), standardize), ("mass", "top", "rest"))


THREE_GROUPS = of_objective(
    Objective((Term(2.0, Partition("top1_topk", 4, False), (1.0, 0.0), ((0.0, 0.0), (0.5, 0.0), (0.0, 1.0))),)),
    ("mass", "top1", "top", "rest"),
)


@pytest.mark.parametrize(
    ("case", "shape", "dtype", "path"),
    [
        (reverse_in_the_rest(), (21, 90), F32, FUSED),
        (reverse_in_the_rest(), (21, 90), F32, RECOMPUTE),
        (reverse_in_the_rest(), (3, 40), F64, FUSED),
        (reverse_in_the_rest(top=(1.0, 0.0)), (1, 8192), F32, FUSED),  # exponentials are computed twice
        (reverse_in_the_rest(top=(1.0, 0.0)), (1, 17001), F32, FUSED),  # split
        (reverse_in_the_rest(top=(1.0, 0.0)), (2, 21, 5, 7), F32, FUSED),
        (reverse_in_the_rest("class"), (9, 40), F32, FUSED),
        (reverse_in_the_rest("sample"), (9, 40), F32, FUSED),
        (THREE_GROUPS, (21, 90), F32, FUSED),
    ],
)
def test_masked_in_the_teacher_beside_a_reverse_divergence(
    case: Case, shape: tuple[int, ...], dtype: torch.dtype, path: Path
) -> None:
    """What the teacher masks is in a group without a reverse weight: nothing there is infinite."""
    student, teacher, _ = make_inputs(shape, dtype, scale=2.0)
    teacher[:, 3:6] = -torch.inf
    check(case, student, teacher, path, LAST)


@pytest.mark.parametrize(
    ("partition", "shape"), [(TARGET, (12, 2)), (Partition("topk", 1), (12, 2)), (TARGET, (2, 2, 5, 3))], ids=str
)
def test_a_masked_group_of_one_class_has_no_reverse_divergence(partition: Partition, shape: tuple[int, ...]) -> None:
    """Of two classes the teacher masks either one: each is a group of its own."""
    student, teacher, target = make_inputs(shape)
    teacher[: len(teacher) // 2, 0] = -torch.inf
    case = of_objective(Objective((Term(4.0, partition, (1.0, 0.0), ((0.0, 2.0), (0.0, 3.0))),)), ())
    only_mass = Objective((Term(4.0, partition, (1.0, 0.0), ((0.0, 0.0), (0.0, 0.0))),))
    want = expected(only_mass, student, teacher, target=target)
    for path in (FUSED, RECOMPUTE):
        got, _ = run(case, student, teacher, path, LAST, target=target)
        assert_same(got, want, student, teacher, of_gpu=True)


@pytest.mark.parametrize(
    ("name", "layout", "path"),
    [
        *((name, "rows", path) for name in ("kd_ce", "pr_dkd", "ls_dkd") for path in (FUSED, RECOMPUTE)),
        ("kd_ce", "split rows", RECOMPUTE),
        ("kd_ce", "pixels", FUSED),
        ("ls_dkd", "pixels", RECOMPUTE),
    ],
    ids=name_of,
)
def test_upstream_gradients_of_what_does_not_count(name: str, layout: str, path: Path) -> None:
    """Infinite or NaN for ignored samples: their gradient is 0, and nobody else's changes."""
    student, teacher, target = make_inputs(LAYOUTS[layout])
    options = {"reduction": "none", "num_classes": student.shape[1] - 10}
    target %= student.shape[1] - 10
    target.flatten()[::3] = -100
    ignored = target == -100
    factor, upstream = torch.full(target.shape, 1.5), torch.full(target.shape, 1.5)
    upstream[ignored] = torch.tensor([torch.inf, -torch.inf, torch.nan]).repeat(target.numel())[: ignored.sum()]
    got, _ = run(ALL[name], student, teacher, path, LAST, upstream, target=target, **options)
    want, _ = run(ALL[name], student, teacher, path, LAST, factor, target=target, **options)
    assert torch.equal(got.gradient, want.gradient)
    assert got.gradient.isfinite().all()
    assert not got.gradient.movedim(1, -1)[ignored].any()


@pytest.mark.parametrize("path", [FUSED, RECOMPUTE], ids=name_of)
@pytest.mark.parametrize("name", ["kd_ce", "pr_dkd"])
def test_an_infinite_upstream_gradient(name: str, path: Path) -> None:
    """As of a loss scaler: ignored samples and the padding of a vocabulary keep a gradient of 0."""
    student, teacher, target = make_inputs((9, 40))
    target = target % 30
    target[4] = -100
    got, _ = run(ALL[name], student, teacher, path, LAST, torch.tensor(torch.inf), target=target, num_classes=30)
    assert not got.gradient[4].any()
    assert not got.gradient[:, 30:].any()
    assert not got.gradient[0, :30].isfinite().all()


@pytest.mark.parametrize(
    ("name", "layout", "path"),
    [
        ("kd_ce", "rows", FUSED),
        ("kd_ce", "rows", RECOMPUTE),
        ("gdkd3", "rows", FUSED),
        ("dkd_imagenet", "split rows", FUSED),
        ("gdkd_both_ce", "pixels", FUSED),
    ],
    ids=name_of,
)
def test_huge_logits(name: str, layout: str, path: Path) -> None:
    """Constants of 1e10, which must cancel before anything is rounded, and logits that are that far apart."""
    student, teacher, target = make_inputs(LAYOUTS[layout])
    student[0], teacher[0] = 1e10, -3e9
    student[-1] *= 1e9
    check(ALL[name], student, teacher, path, LAST, reduction="sum", **needed_target(ALL[name], target))


@pytest.mark.parametrize(
    ("name", "layout"),
    [("kd_ce", "rows"), ("dkd_imagenet", "split rows"), ("gdkd_reverse", "pixels")],
    ids=name_of,
)
def test_masked_by_finite_numbers(name: str, layout: str) -> None:
    """Some classes, or all but the target: as if they were at -1e6, where the reference loses no digits yet."""
    student, teacher, target = make_inputs(LAYOUTS[layout])
    target = target.clamp(min=9)
    options = needed_target(ALL[name], target)

    def masked(logits: Tensor, value: float) -> Tensor:
        result = logits.index_fill(1, torch.arange(3, 6), value)
        result[0] = torch.full_like(logits[0], value).scatter_(0, target[:1], logits[0])
        return result

    want = expected(ALL[name].objective, masked(student, -1e6), masked(teacher, -1e6), **options)
    for value in (-1e10, LOWEST):
        s, t = masked(student, value), masked(teacher, value)
        got, _ = run(ALL[name], s, t, FUSED, LAST, **options)
        assert_same(got, want, s, t, of_gpu=True)


TIES = pytest.mark.xfail(
    strict=True, reason="ranks are those of logits standardised in float32, which tie beside masks"
)


@pytest.mark.parametrize(
    ("name", "layout"),
    [("lskd", "rows"), pytest.param("ls_gdkd", "split rows", marks=TIES), ("lskd", "pixels")],
    ids=name_of,
)
def test_finite_masks_standardised_by_sample(name: str, layout: str) -> None:
    """The masks are logits like the others, but their squares overflow."""
    case = ALL[name]
    student, teacher, _ = make_inputs(LAYOUTS[layout])
    student[:, 3:8], teacher[:, 6:9] = -1e30, -1e30
    check(case, student, teacher, FUSED, LAST)
    # The gradient is of the smallest numbers that there are.
    student[:, 3:8], teacher[:, 6:9] = LOWEST, LOWEST
    want = expected(case.objective, student, teacher)
    got, _ = run(case, student, teacher, FUSED, LAST)
    assert_values(got.loss, want.loss, loss_tolerance(got.loss, want.weight, of_gpu=True))
    assert (got.gradient - want.gradient).norm() <= 1e-3 * want.gradient.norm()


@pytest.mark.parametrize("kind", ["class", "sample"])
@pytest.mark.parametrize(
    ("shape", "path"),
    [((21, 90), FUSED), ((21, 90), RECOMPUTE), ((3, 5000), FUSED), ((2, 9, 20, 20), FUSED)],
    ids=name_of,
)
def test_tiny_logits_standardised(kind: str, shape: tuple[int, ...], path: Path) -> None:
    """Without eps a standardised logit is the same at any scale; the squares of these underflow."""
    student, teacher, target = make_inputs(shape, scale=2.0)
    call = partial(kdkernels.dkd_loss, standardize=kind, eps=0.0, temperature=2.0)
    value = objective.adjust(objective.dkd(temperature=2.0), kind, eps=0.0)
    case = Case("tiny", value, call, ALL["dkd"].parts, needs_target=True)
    for scale in (1e-20, 1e-25):
        check(case, student * scale, teacher * scale, path, LAST, target=target)


def test_finite_masks_standardised_by_class() -> None:
    """A class that is masked in every sample, or in some; of so many samples that one thread adds several up."""
    student, teacher, _ = make_inputs((1, 9, 40, 50))
    for logits in (student, teacher):
        logits[:, 2:4] = LOWEST
        logits[:, 5, :20] = -1e30
    check(ALL["pr_kd"], student, teacher, FUSED, LAST)


@pytest.mark.parametrize("k", [5, 40])
def test_leading_classes_in_one_place(k: int) -> None:
    """Of rows in several tiles the best classes may all be in one place of theirs, equal, or as many as there are."""
    student, teacher, _ = make_inputs((4, 2048))
    teacher[0, 7::64] += 20.0  # a tile is a multiple of 64 wide
    teacher[1, 7::64] = 20.0
    teacher[2, 3:] = -torch.inf
    student[2, 3:] = -torch.inf
    teacher[3] = 1.0
    loss = partial(kdkernels.gdkd_loss, k=k)
    check(Case("gdkd", objective.gdkd(k), loss, ALL["gdkd"].parts), student, teacher, FUSED, LAST)


# What it costs -----------------------------------------------------------------------------------------------------

#: Bytes moved for loss and gradient over two reads and one write of the matrix, and one read of the targets where the
#: loss has some. Beyond what fits on chip the logits are read twice: 5/3.
ON_CHIP, SPLIT = 1.02, 1.70


def cost(name: str, shape: tuple[int, ...], dtype: torch.dtype, arch: int = LAST) -> tuple[float, float, float, list]:
    """``(bytes / floor, coalescing, thread-instructions an element, launches)`` of a training step."""
    case = ALL[name]
    inputs = make_inputs(shape, dtype)
    _, sim = run(case, inputs.student, inputs.teacher, FUSED, arch, **needed_target(case, inputs.target))
    assert sim is not None
    all_stats = [launch.stats for launch in sim.log]
    elements = inputs.student.numel()
    floor = 3 * inputs.student.nbytes + (inputs.target.nbytes if case.needs_target else 0)
    moved = device_bytes(all_stats, inputs.student.nbytes)
    # Coalescing is that of the matrices: numbers of a sample are a few bytes wherever they are.
    sweeps = [stats for stats in all_stats if any(b.size >= inputs.student.nbytes for b in stats.buffers.values())]
    lines = [access for stats in sweeps for access in stats.sectors_of_line.values()]
    wide = [access for access in lines if access.bytes >= 64 * access.instrs]
    coalescing = sum(access.bytes for access in wide) / sum(32 * access.sectors for access in wide)
    instructions = sum(stats.thread_instrs for stats in all_stats) / elements
    return moved / floor, coalescing, instructions, sim.log


@needs_simulator
@pytest.mark.parametrize(
    ("name", "classes", "dtype", "arch"),
    [
        *((name, c, BF16, 90) for name in ("dkd", "gdkd", "bdd") for c in (100, 1000, 4096, 16384)),
        *(("dkd", c, torch.float32, 90) for c in (100, 1000, 4096, 16384)),
        ("gdkd", 16384, torch.float32, 90),
        *(("dkd", c, BF16, 80) for c in (100, 4096)),
    ],
    ids=name_of,
)
def test_cost_of_rows_on_chip(name: str, classes: int, dtype: torch.dtype, arch: int) -> None:
    samples = {100: 64, 16384: 4}.get(classes, 16)
    moved, coalescing, _, launches = cost(name, (samples, classes), dtype, arch)
    assert moved <= ON_CHIP
    if classes * dtype.itemsize % 32 == 0:  # rows of whole sectors
        assert coalescing >= 0.95
    assert [launch.name for launch in launches if launch.name.startswith(("fused", "split"))] == ["fused_kernel"]


@needs_simulator
@pytest.mark.parametrize("classes", [32000, 128256])
@pytest.mark.parametrize("name", ["dkd", "gdkd", "bdd"])
def test_cost_of_split_rows(name: str, classes: int) -> None:
    moved, coalescing, _, _ = cost(name, (2, classes), BF16)
    assert moved <= SPLIT
    assert coalescing >= 0.95


@needs_simulator
@pytest.mark.parametrize(("name", "dtype"), [("dkd", torch.float32), ("dkd", BF16), ("gdkd", BF16)], ids=name_of)
def test_cost_of_pixels(name: str, dtype: torch.dtype) -> None:
    moved, coalescing, _, _ = cost(name, (2, 19, 32, 32), dtype)
    assert moved <= ON_CHIP
    assert coalescing >= 0.95


@needs_simulator
@pytest.mark.parametrize(
    ("name", "shape", "most"),
    [
        ("kd", (64, 4096), 36),
        ("dkd", (64, 4096), 45),
        ("dkd", (4, 16384), 37),  # the longest rows that are looked at once
        ("gdkd", (16, 4096), 136),  # masks of two groups and a selection; and exponentials twice
        ("dkd", (64, 100), 95),  # with what there is to do once a row
        ("gdkd", (64, 100), 210),
        ("dkd", (2, 19, 32, 32), 150),
    ],
    ids=name_of,
)
def test_instructions(name: str, shape: tuple[int, ...], most: float) -> None:
    """Few enough, in long rows, for an H100 to be bound by its memory."""
    assert cost(name, shape, BF16)[2] <= most


@needs_simulator
@pytest.mark.parametrize(
    ("name", "options", "forward", "backward"),
    [
        ("kd", {}, ["fused_kernel", "sum_rows_kernel"], []),
        # Which samples count, and so what the mean divides by, is known on the device only.
        ("dkd", {}, ["weight_sum_kernel", "fused_kernel", "sum_rows_kernel"], []),
        ("dkd", {"reduction": "sum"}, ["fused_kernel", "sum_rows_kernel"], []),
        ("gdkd", {"reduction": "none"}, ["fused_kernel"], ["scale_kernel"]),
    ],
)
def test_launches(name: str, options: dict[str, str], forward: list[str], backward: list[str]) -> None:
    """One launch touches the matrices; the others add up a number a program."""
    inputs = make_inputs((64, 100))
    case = ALL[name]
    options = options | needed_target(case, inputs.target)
    upstream = torch.ones(64) if "reduction" in options and options["reduction"] == "none" else None
    _, sim = run(case, inputs.student, inputs.teacher, FUSED, LAST, upstream, **options)
    assert [launch.name for launch in sim.log] == forward + backward


@needs_simulator
def test_unit_factor_touches_no_memory() -> None:
    """What backward launches with an upstream gradient of 1, on a GPU, where the host does not know that it is 1."""
    gradient = torch.randn(64, 1000)
    with device(LAST) as sim:
        scale_(gradient, torch.ones(()), 1)
        kept = gradient.clone()
        scale_(gradient, torch.full((), 3.0), 1)
    one, other = (launch.stats for launch in sim.log)
    assert one.buffers["gradient"].loaded == one.buffers["gradient"].stored == 0
    assert other.buffers["gradient"].loaded == other.buffers["gradient"].stored == gradient.nbytes
    assert torch.equal(gradient, 3 * kept)
