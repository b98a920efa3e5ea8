"""The CUDA backend's launch configuration, which is a function of shapes and of the device's limits: no GPU is needed.

The public API is called on CPU tensors, and its launches are written down in place of run.
"""

from __future__ import annotations

import pytest
import torch
from cuda_simulator import DEVICES, Launch, recorded
from helpers import must_have_native, name_of
from losses import LOSSES, STANDARDIZED

import kdkernels
from kdkernels import Objective, Partition, Term, dispatch, ops

ALL = LOSSES | STANDARDIZED
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def backend_is_there() -> None:
    if ops.cuda_unavailable is not None:
        (pytest.fail if must_have_native() else pytest.skip)(ops.cuda_unavailable)


def launches(name: str, shape: tuple[int, ...], dtype: torch.dtype, arch: int, **options: object) -> list[Launch]:
    """Those of a training step."""
    student = torch.zeros(shape, dtype=dtype, requires_grad=True)
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64)
    with recorded(arch) as recorder:
        loss = ALL[name].call(student, torch.zeros_like(student), target=target, backend="cuda", **options)
        loss.backward(torch.full_like(loss, 2.0))
    return recorder.log


ROWS = [(3, c) for c in (2, 10, 100, 1000, 1024, 1025, 4096, 16384, 32000, 70000, 128256, 300000)]
PIXELS = [(2, c, 5, 7) for c in (2, 19, 150, 1000, 5000)] + [(1, 19, 64, 64)]


@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize("dtype", [BF16, F32, F64], ids=name_of)
@pytest.mark.parametrize("name", ["dkd", "everything", "gdkd_k20", "ls_gdkd", "pr_dkd"])
def test_every_launch_is_within_the_limits(name: str, dtype: torch.dtype, arch: int) -> None:
    block = DEVICES[arch].shared_bytes
    for shape in ROWS + PIXELS:
        if shape[1] <= ALL[name].smallest:
            continue
        log = launches(name, shape, dtype, arch)
        assert log, shape
        for launch in log:
            assert launch.grid > 0, (shape, launch)
            assert launch.threads % 32 == 0, (shape, launch)
            assert 32 <= launch.threads <= 256, (shape, launch)
            assert launch.shared_bytes <= block, (shape, launch)
            assert launch.cluster in (1, 2, 4, 8), (shape, launch)
            assert launch.grid % launch.cluster == 0, (shape, launch)
            assert launch.cluster == 1 or arch >= 90, (shape, launch)


@pytest.mark.parametrize(
    ("shape", "dtype", "arch", "kernel", "blocks", "threads", "cluster"),
    [
        ((16384, 100), BF16, 90, "forward_simple_rows_bf16", 512, 128, 1),  # 32 rows a block, 4 threads each
        ((8192, 1000), BF16, 90, "forward_simple_rows_bf16", 512, 128, 1),  # 8 threads
        ((2048, 4096), BF16, 90, "forward_simple_rows_bf16", 512, 128, 1),  # a warp
        ((2048, 4096), F32, 90, "forward_simple_rows_f32", 1024, 128, 1),  # two warps
        ((512, 16384), BF16, 90, "forward_simple_rows_bf16", 512, 128, 1),  # a block a row
        ((256, 1000), F32, 90, "forward_simple_rows_f32", 256, 64, 1),  # few rows: more threads each, in more blocks
        ((64, 100), BF16, 90, "forward_simple_rows_bf16", 8, 32, 1),
        ((4, 16384), BF16, 90, "forward_simple_rows_bf16", 4, 224, 1),
        ((4, 16384), F32, 90, "forward_rows_f32", 8, 224, 2),  # a cluster of two blocks a row
        ((64, 16384), F32, 90, "forward_rows_f32", 128, 224, 2),
        ((2, 65536), F32, 90, "forward_rows_f32", 16, 224, 8),
        ((2, 128256), BF16, 90, "forward_rows_bf16", 16, 224, 8),
        ((64, 128256), BF16, 100, "forward_rows_bf16", 512, 128, 8),
        ((4, 16384), F32, 80, "forward_simple_rows_f32", 4, 224, 1),  # nearly all of a multiprocessor's shared memory
        ((2, 32000), BF16, 80, "forward_simple_rows_bf16", 2, 224, 1),
        ((2, 32000), BF16, 86, "part_statistics_rows_bf16", 16, 128, 1),  # with less of it, and without clusters
        ((2, 128256), BF16, 80, "part_statistics_rows_bf16", 64, 128, 1),
        ((2, 19, 64, 64), F32, 90, "lanes_simple_pixels_f32", 64, 32, 1),  # a thread a pixel, and four pixels a thread
        ((2, 65, 64, 64), F32, 90, "forward_simple_pixels_f32", 256, 128, 1),
        ((2, 1000, 64, 64), F32, 90, "forward_pixels_f32", 2048, 128, 8),  # 32 pixels a cluster
    ],
    ids=name_of,
)
def test_which_kernel(
    shape: tuple[int, ...], dtype: torch.dtype, arch: int, kernel: str, blocks: int, threads: int, cluster: int
) -> None:
    """The statistics' launch of each class of shapes."""
    steps = ("kdk_forward", "kdk_lanes", "kdk_part_statistics")
    log = launches("dkd", shape, dtype, arch)
    (launch,) = (launch for launch in log if launch.name.startswith(steps))
    got = launch.name.removeprefix("kdk_"), launch.grid, launch.threads, launch.cluster
    assert got == (kernel, blocks, threads, cluster)


@pytest.mark.parametrize(
    ("name", "options", "kernel"),
    [
        ("gdkd", {}, "lanes_ranked_pixels_f32"),
        ("gdkd", {"k": 9}, "forward_ranked_pixels_f32"),
        ("ls_dkd", {}, "forward_pixels_f32"),
        ("bdd", {}, "forward_simple_pixels_f32"),  # two terms
        ("dkd", {"mode": "recompute"}, "forward_simple_pixels_f32"),  # what backward needs is kept
    ],
)
def test_which_kernel_for_what(name: str, options: dict[str, str], kernel: str) -> None:
    """Among kernels for the same shape."""
    assert f"kdk_{kernel}" in [launch.name for launch in launches(name, (2, 19, 64, 64), F32, 90, **options)]


def test_different_dtypes_are_held_in_the_arithmetics() -> None:
    student, teacher = torch.zeros(2, 100, dtype=BF16), torch.zeros(2, 100)
    with recorded(90) as recorder:
        ALL["kd"].call(student, teacher, backend="cuda")
    assert "kdk_forward_simple_rows_f32" in [launch.name for launch in recorder.log]


def test_targets_and_gpus() -> None:
    """Binaries serve later GPUs of the same generation; the newest target is there as PTX for those to come."""
    serves = torch.ops.kdkernels_cuda.serves.default
    targets = ops.cuda_targets()
    assert targets
    assert all(serves(target) for target in targets)
    assert serves(max(targets) + 25)
    assert not serves(min(targets) - 10)
    if {80, 90, 100} <= set(targets):
        assert serves(86)
        assert serves(103)
        assert not serves(75)


def test_cuda_tensors_go_to_the_cuda_backend() -> None:
    assert dispatch.preference("cuda")[0] == "cuda"
    assert dispatch.why_not("cuda", "cpu") == "it serves CUDA tensors, and the logits are on cpu"
    if not torch.cuda.is_available():
        assert dispatch.why_not("cuda", "cuda") == "torch has no CUDA device"
    with recorded(90):
        assert dispatch.why_not("cuda", "cpu") is None


#: Shapes, dtypes and leading classes of each term, which fill a block's shared memory.
MANY_LEADS = [
    ((1, 1025, 32), F32, (1024,)),
    ((1, 1025, 32), F64, (1024,)),
    ((1, 1025, 32), F32, (512, 512)),
    ((1, 20000), F32, (1024,)),
    ((1, 20000), F64, (512, 512)),
    ((1, 128256), BF16, (1000,)),
    ((1, 128256), F64, (1024,)),
]


def ranked(*ks: int) -> Objective:
    """A term for each number of leading classes."""
    return Objective(tuple(Term(4.0, Partition("topk", k), (1.0, 0.0), ((1.0, 0.0), (8.0, 0.0))) for k in ks))


@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize(("shape", "dtype", "ks"), MANY_LEADS, ids=name_of)
def test_many_leading_classes_fit(shape: tuple[int, ...], dtype: torch.dtype, ks: tuple[int, ...], arch: int) -> None:
    """Where whole pieces of a sample beside their leading classes are too much, blocks hold less of it."""
    for mode in ("fused", "recompute"):
        student = torch.zeros(shape, dtype=dtype, requires_grad=True)
        with recorded(arch) as recorder:
            kdkernels.distillation_loss(
                student, torch.zeros_like(student), ranked(*ks), class_dim=1, backend="cuda", mode=mode
            ).backward()
        assert recorder.log
        for launch in recorder.log:
            assert launch.shared_bytes <= DEVICES[arch].shared_bytes, launch


def test_too_many_leading_classes() -> None:
    student = torch.zeros(2, 2000)
    with recorded(90), pytest.raises(RuntimeError, match="up to 1024 leading classes on this GPU, and these are 1025"):
        kdkernels.gdkd_loss(student, student, k=1025, backend="cuda")


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name of what does not, with the device's own limit, before anything is launched."""
    student, target = torch.zeros(2, 2000, dtype=F64), torch.zeros(2, dtype=torch.int64)
    little = {"shared_bytes": 24576, "shared_bytes_of_all": 25600}
    with recorded(80, little) as recorder:
        most = ops.cuda_most_leads()
        assert 100 < most < 1024
        kdkernels.gdkd_loss(student, student, k=most, target=target, ce_weight=1.0, backend="cuda")
        assert recorder.log
        assert max(launch.shared_bytes for launch in recorder.log) <= little["shared_bytes"]
    with recorded(80, little) as recorder:
        refused = f"up to {most} leading classes on this GPU, and these are {most + 1}"
        with pytest.raises(RuntimeError, match=refused):
            kdkernels.gdkd_loss(student, student, k=most + 1, backend="cuda")
        assert refused in (dispatch.why_not("cuda", "cpu", objective=ranked(most + 1)) or "")
        # The kernels' host code does not rely on that.
        monkeypatch.setattr(ops, "cuda_most_leads", lambda: 2000)
        with pytest.raises(ValueError, match="leading classes of a sample do not fit in the GPU's shared memory"):
            kdkernels.gdkd_loss(student, student, k=1000, target=target, ce_weight=1.0, backend="cuda")
        assert not recorder.log
