"""The CUDA backend's compiled kernels where their own tiles and costs matter, run as in test_simulator.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import pytest
import torch
from cuda_targets import ARCHITECTURES, DEVICE, FIRST, LAST, check, device, missing, needs_simulator, run
from helpers import Path, make_inputs, must_have_native, name_of, needed_target
from losses import LOSSES, STANDARDIZED
from ptxsim import device_bytes

from kdkernels import distillation_loss, doctor, objective

ALL = LOSSES | STANDARDIZED
FUSED, RECOMPUTE = Path("cuda", "fused"), Path("cuda", "recompute")
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def backend_is_there() -> None:
    reason = missing()
    if reason is not None:
        (pytest.fail if must_have_native() else pytest.skip)(reason)


#: More of the same, in other types and shapes.
more = pytest.mark.cuda
two_architectures = pytest.mark.skipif(len(ARCHITECTURES) == 1, reason="a GPU is one architecture")


# What is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", doctor.CASES)
def test_the_doctor(case: str) -> None:
    """What ``python -m kdkernels`` finds of right kernels."""
    with device(LAST):
        assert doctor.check("cuda", DEVICE.type, case).problem is None


@more
@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("gdkd", (2, 16384), F32),
        ("everything", (2, 33001), F32),  # both terms' rankings, in misaligned rows
        ("gdkd_k20", (2, 33000), F32),
        ("ls_gdkd", (2, 33000), F32),
        ("pr_gdkd", (6, 20000), F32),
        ("gdkd", (1, 40000), F64),
        ("dkd", (1, 65536), F32),
        ("dkd", (1, 128256), BF16),
    ],
    ids=name_of,
)
def test_clusters(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Rows over the blocks of a cluster, which read each other's shared memory."""
    inputs = make_inputs(shape, dtype)
    sim = check(ALL[name], inputs.student, inputs.teacher, FUSED, LAST, **needed_target(ALL[name], inputs.target))
    assert sim is None or max(launch.cluster for launch in sim.log) > 1


@more
@two_architectures
@pytest.mark.parametrize(
    ("name", "shape", "path", "options"),
    [
        ("dkd", (2, 33000), FUSED, {}),
        ("everything", (2, 33001), FUSED, {"reduction": "none"}),
        ("gdkd_k20", (2, 33000), RECOMPUTE, {}),
        ("ls_gdkd", (2, 33000), FUSED, {}),
        ("pr_gdkd", (6, 33000), FUSED, {}),
        ("dkd", (1, 6000, 2, 4), FUSED, {}),  # pixels
        ("gdkd", (1, 6000, 2, 4), FUSED, {}),
    ],
    ids=name_of,
)
def test_split_samples(name: str, shape: tuple[int, int], path: Path, options: dict[str, str]) -> None:
    """Without clusters: statistics of the pieces of a sample, their merge and the sweep."""
    inputs = make_inputs(shape)
    options = options | needed_target(ALL[name], inputs.target)
    sim = check(ALL[name], inputs.student, inputs.teacher, path, FIRST, **options)
    assert sim is None or any("part_statistics" in launch.name for launch in sim.log)


# What does not count, and what is extreme --------------------------------------------------------------------------

#: Shapes and the architectures that take them so.
LAYOUTS = {
    "rows": ((21, 90), LAST),
    "cluster": ((5, 17001), LAST),
    "split rows": ((3, 33001), FIRST),
    "pixels": ((2, 21, 5, 7), LAST),
}


#: Standardised classes: rows, long ones, rows of whole vectors and others, pixels of few classes and of more.
BY_CLASS = {"rows": (70, 132), "long": (9, 1001), "pixels": (2, 21, 5, 7), "more pixels": (2, 70, 4, 5)}


@pytest.mark.parametrize("layout", BY_CLASS)
@pytest.mark.parametrize("name", ["pr_dkd", "pr_bdd", "pr_gdkd"])
def test_standardised_classes(name: str, layout: str) -> None:
    """Samples that do not count, weights, and masked classes, for loss and gradient alone."""
    student, teacher, target = make_inputs(BY_CLASS[layout])
    for logits in (student, teacher):
        logits[:, 3:6] = logits[:, -1] = -torch.inf
    target = target.clamp(9, logits.shape[1] - 2)
    target.view(-1)[::3] = -100
    student.movedim(1, -1)[target == -100] = torch.nan
    weight = torch.arange(target.numel()).view(target.shape) % 5 / 4 + 0.5
    options = {"target": target, "sample_weight": weight, "return_parts": False}
    check(ALL[name], student, teacher, FUSED, LAST, **options)
    check(ALL[name], student, teacher, FUSED, LAST, reduction="none", **options)


@pytest.mark.parametrize("shape", [(3, 70), (1, 19, 1, 3)], ids=name_of)
@pytest.mark.parametrize("counting", [3, 1, 0])
def test_standardised_classes_of_few_samples(counting: int, shape: tuple[int, ...]) -> None:
    """Half of the classes are constant, and all of them where one sample counts: their deviation is 0."""
    student, teacher, target = make_inputs(shape)
    student[:, ::2] = teacher[:, 1::2] = 3.0
    target.view(-1)[counting:] = -100
    check(ALL["pr_dkd"], student, teacher, FUSED, LAST, return_parts=False, target=target)


@pytest.mark.parametrize("far", [15.0, 3e3])
def test_standardised_logits_far_from_zero(far: float) -> None:
    """Exponents count from 0 no more where a sample's logits are far away from all others', in all classes or in some,
    and in the cross entropy from its target's."""
    student, teacher, target = make_inputs((400, 70), scale=1.0)
    for logits in (student, teacher):
        logits[7] += far
        logits[9, :30] -= far
        logits[11, 40:45] += far
    cold = objective.adjust(objective.pr_dkd(temperature=0.25), ce_weight=1.0)
    case = replace(ALL["pr_dkd"], objective=cold, call=partial(distillation_loss, objective=cold))
    check(case, student, teacher, FUSED, LAST, return_parts=False, target=target)


@pytest.mark.parametrize("name", ["dkd", "gdkd3"])
@pytest.mark.parametrize(("size", "path"), [((7, 90), FUSED), ((7, 6), RECOMPUTE), ((2, 6, 5, 7), FUSED)], ids=name_of)
def test_logits_far_from_zero(name: str, size: tuple[int, ...], path: Path) -> None:
    """Each side by an offset of its own; a group of one class counts from its own exponent, exactly."""
    student, teacher, target = make_inputs(size)
    check(ALL[name], student + 1e4, teacher - 3e4, path, LAST, return_parts=False, target=target)


#: Rows of a group, and of two classes that are a group each; the same of pixels; a cluster's rows.
@pytest.mark.parametrize("size", [(5, 40), (5, 2), (1, 2, 3, 5), (1, 40, 3, 5), (2, 20001)], ids=name_of)
@pytest.mark.parametrize("in_target", [True, False])
def test_a_nan_stays_in_its_sample(size: tuple[int, ...], in_target: bool) -> None:
    student, teacher, target = make_inputs(size)
    bad = torch.zeros_like(target, dtype=torch.bool)
    bad.view(-1)[1] = True
    of_target = torch.zeros_like(student, dtype=torch.bool).scatter_(1, target.unsqueeze(1), True)
    student[bad.unsqueeze(1) & (of_target == in_target)] = torch.nan
    got, _ = run(ALL["dkd"], student, teacher, FUSED, LAST, target=target, reduction="none")
    assert torch.equal(got.loss.isnan(), bad)
    assert torch.equal(got.gradient.isnan().any(1), bad)


@pytest.mark.parametrize("classes", [6, 40])  # hardly more than lead; many more
@pytest.mark.parametrize("name", ["gdkd", "gdkd_k1", "gdkd_worst", "gdkd_both_ce", "gdkd3", "gdkd3_worst_both"])
def test_leading_classes_of_a_thread(name: str, classes: int) -> None:
    """Equals, of which the first lead; masked classes, which lead where too few others are left."""
    student, teacher, target = make_inputs((2, classes, 7, 9))
    teacher = teacher.round()
    student[1, 1:-2], teacher[1, 1:-2] = -torch.inf, -torch.inf
    sim = check(ALL[name], student, teacher, FUSED, LAST, return_parts=False, target=target.clamp(max=0))
    assert sim is None or any("lanes_ranked" in launch.name for launch in sim.log)


@pytest.mark.parametrize("name", ["dkd_two_temperatures", "kd_ce", "pr_dkd"])
@pytest.mark.parametrize("size", [(3, 1), (3, 1, 2, 2)], ids=name_of)
def test_one_class(name: str, size: tuple[int, ...]) -> None:
    student, teacher, target = make_inputs(size)
    got, _ = run(ALL[name], student, teacher, FUSED, LAST, target=target, return_parts=True)
    for value in (got.loss, got.gradient, *got.parts.values()):
        assert value.eq(0).all()


@pytest.mark.parametrize("shape", [(6, 91), (1, 19, 2, 3)], ids=name_of)
def test_targets_out_of_range_of_standardised_classes(shape: tuple[int, ...]) -> None:
    """The same, in the last sample too, behind which there is nothing; but the gradients' sums over the samples are no
    numbers then."""
    student, teacher, target = make_inputs(shape)
    target.view(-1)[2], target.view(-1)[-1] = -1, shape[1]
    got, _ = run(ALL["pr_dkd"], student, teacher, FUSED, LAST, target=target, reduction="none")
    assert got.loss.flatten().isnan().tolist() == [False, False, True, False, False, True]
    assert got.gradient.isnan().all()


def test_no_samples() -> None:
    student, teacher, target = make_inputs((0, 90))
    got, sim = run(LOSSES["dkd"], student, teacher, FUSED, LAST, target=target)
    assert got.loss == 0
    assert got.gradient.shape == (0, 90)
    assert sim is None or not sim.log


@more
def test_same_result_every_time() -> None:
    student, teacher, target = make_inputs((3, 17001))
    (first, _), (second, _) = (run(ALL["everything"], student, teacher, FUSED, LAST, target=target) for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first.gradient, second.gradient)


# What it costs -----------------------------------------------------------------------------------------------------

#: Bytes moved for loss and gradient over two reads and one write of the matrix, and one read of the targets where the
#: loss has some. Without clusters, rows that do not fit on chip are read twice: 5/3.
ON_CHIP, SPLIT, COALESCING = 1.01, 1.70, 0.97


def cost(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, arch: int = LAST, limits: Mapping[str, int] | None = None
) -> tuple[float, float, float]:
    """``(bytes / floor, coalescing, thread-instructions an element)`` of a training step."""
    case = ALL[name]
    inputs = make_inputs(shape, dtype)
    _, sim = run(
        case,
        inputs.student,
        inputs.teacher,
        FUSED,
        arch,
        limits=limits,
        **needed_target(case, inputs.target),
    )
    assert sim is not None
    all_stats = [launch.stats for launch in sim.log]
    floor = 3 * inputs.student.nbytes + (inputs.target.nbytes if case.needs_target else 0)
    moved = device_bytes(all_stats, inputs.student.nbytes)
    # Coalescing is that of the matrices: numbers of a sample are a few bytes wherever they are.
    sweeps = [stats for stats in all_stats if stats.buffers.get("student") and stats.buffers["student"].loaded]
    lines = [access for stats in sweeps for access in stats.sectors_of_line.values()]
    wide = [access for access in lines if access.bytes >= 64 * access.instrs]
    coalescing = sum(access.bytes for access in wide) / sum(32 * access.sectors for access in wide)
    instructions = sum(stats.thread_instrs for stats in all_stats) / inputs.student.numel()
    return moved / floor, coalescing, instructions


@needs_simulator
@pytest.mark.parametrize(
    ("name", "shape", "dtype", "arch"),
    [
        *((name, (16, c), BF16, 90) for name in ("dkd", "gdkd", "bdd") for c in (1024, 4096)),
        ("dkd", (64, 100), BF16, 90),
        ("dkd", (4, 16384), F32, 90),
        ("dkd", (2, 32000), BF16, 90),
        *((name, (1, 128256), BF16, 90) for name in ("dkd", "gdkd", "bdd")),
        ("dkd", (1, 65536), F32, 90),
        ("dkd", (16, 4096), BF16, 80),
        ("gdkd", (2, 16384), F32, 80),
        ("gdkd", (2, 65, 16, 16), BF16, 90),
        ("dkd", (1, 150, 16, 32), BF16, 90),
    ],
    ids=name_of,
)
def test_cost_on_chip(name: str, shape: tuple[int, ...], dtype: torch.dtype, arch: int) -> None:
    moved, coalescing, _ = cost(name, shape, dtype, arch)
    assert moved <= ON_CHIP
    if len(shape) > 2 or shape[1] * dtype.itemsize % 32 == 0:  # whole sectors
        assert coalescing >= COALESCING


@needs_simulator
@pytest.mark.parametrize(
    ("name", "dtype", "sweeps", "most"),
    [("kd", BF16, 3, 106), ("dkd", F32, 3, 120), ("dkd", BF16, 3, 128), ("gdkd", BF16, 5, 235)],
    ids=name_of,
)
def test_cost_of_lanes(name: str, dtype: torch.dtype, sweeps: int, most: float) -> None:
    """Each thread reads its pixels several times and others' never: they are in the L1 cache since the first time.

    ``most``: thread-instructions an element.
    """
    inputs, case = make_inputs((2, 19, 32, 32), dtype), ALL[name]
    _, sim = run(case, inputs.student, inputs.teacher, FUSED, LAST, **needed_target(case, inputs.target))
    assert sim is not None
    assert sum(launch.stats.thread_instrs for launch in sim.log) <= most * inputs.student.numel()
    (stats,) = (launch.stats for launch in sim.log if "lanes" in launch.name)
    matrix, most_blocks, cache = inputs.student.nbytes, 32, 256 << 10  # of a multiprocessor
    for side in (stats.buffers["student"], stats.buffers["teacher"]):
        assert side.distinct_loaded == matrix
        assert side.loaded <= (sweeps + 0.2) * matrix  # with the targets' logits
    assert stats.buffers["gradient"].stored == matrix
    assert 2 * 19 * dtype.itemsize * stats.block[0] * most_blocks <= cache
    if not case.needs_target:  # whose logits are where they are
        assert stats.load.efficiency >= COALESCING


@needs_simulator
@pytest.mark.parametrize(("name", "classes"), [("dkd", 128256), ("gdkd", 128256)])
def test_cost_of_split_rows(name: str, classes: int) -> None:
    moved, coalescing, _ = cost(name, (1, classes), BF16, 80)
    assert moved <= SPLIT
    assert coalescing >= COALESCING


@needs_simulator
@pytest.mark.parametrize(("name", "most"), [("kd", 31), ("dkd", 33), ("gdkd", 47), ("bdd", 38)])
def test_instructions(name: str, most: float) -> None:
    """Of rows that are enough to fill a GPU, here of one multiprocessor: fewer are spread over more threads."""
    assert cost(name, (32, 4096), BF16, limits={"multiprocessors": 1})[2] <= most


@needs_simulator
def test_cost_of_class_standardisation() -> None:
    """Both matrices four times: for the moments, the losses, the sums that the gradients go into, and the gradients.
    Each needs all that came before of all samples or, of the sums, of whole samples at least. The logits of the
    targets, one class in a hundred, are read by themselves, and their gradients written twice; threads beyond the last
    class read that one."""
    inputs = make_inputs((64, 100))
    _, sim = run(ALL["pr_dkd"], inputs.student, inputs.teacher, FUSED, LAST, target=inputs.target)
    assert sim is not None
    read, written = {}, {}
    for name, buffers in ((launch.name, launch.stats.buffers) for launch in sim.log):
        if "student" in buffers:
            read[name] = (buffers["student"].loaded + buffers["teacher"].loaded) / inputs.student.nbytes
            written[name] = sum(buffer.stored for key, buffer in buffers.items() if key == "gradient")
            written[name] /= inputs.student.nbytes
    want = {"class_moments": 2, "class_statistics": 2, "class_settle": 0.02, "class_sums": 2.02, "class_gradient": 2.02}
    got = {name.removeprefix("kdk_").removesuffix("_rows_f32"): share for name, share in read.items()}
    assert got == pytest.approx(want | {"class_statistics": 2.09}, abs=0.005)
    assert written == pytest.approx({name: 1.01 * ("gradient" in name) for name in written})


@needs_simulator
@pytest.mark.parametrize(
    ("name", "options", "forward", "backward"),
    [
        ("kd", {}, ["forward_simple_rows_f32", "row_sum"], []),
        # Which samples count, and so what the mean divides by, is known on the device only.
        ("dkd", {}, ["weight_sum", "forward_simple_rows_f32", "row_sum"], []),
        # Moments, which other processes may have a share in; losses; sums that their gradients go into; gradients.
        (
            "pr_dkd",
            {"reduction": "sum"},
            [
                *("class_moments_rows_f32", "merge_moments", "affines"),
                *("class_statistics_rows_f32", "class_settle_rows_f32", "row_sum"),
                *("class_sums_rows_f32", "add_stretches"),
            ],
            ["affines", "class_gradient_rows_f32"],
        ),
        ("dkd", {"reduction": "sum"}, ["forward_simple_rows_f32", "row_sum"], []),
        ("gdkd", {"reduction": "none"}, ["forward_ranked_rows_f32"], ["scale_rows_f32"]),
    ],
)
def test_launches(name: str, options: dict[str, str], forward: list[str], backward: list[str]) -> None:
    """One launch touches the matrices; the others add up a number a block."""
    inputs = make_inputs((300, 100))
    case = ALL[name]
    options = options | needed_target(case, inputs.target)
    upstream = torch.ones(300) if options.get("reduction") == "none" else None
    _, sim = run(case, inputs.student, inputs.teacher, FUSED, LAST, upstream, **options)
    assert sim is not None
    assert [launch.name.removeprefix("kdk_") for launch in sim.log] == forward + backward
