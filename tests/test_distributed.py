"""Class statistics shared by the processes of a group: K processes give what one gives on the concatenated batch."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import BACKENDS, GPU_BACKENDS, make_inputs, needed_target, require
from losses import STANDARDIZED
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch was built without torch.distributed")

#: Gloo's processes have CPU tensors.
ON_CPUS = [backend for backend in BACKENDS if backend not in GPU_BACKENDS]
#: Sizes of the processes' batches.
SPLITS = {"two": (4, 4), "uneven": (5, 2, 6), "empty": (5, 0, 3), "two, one empty": (0, 6)}
LOSSES = ("pr_kd", "pr_dkd", "pr_gdkd", "pr_bdd")


def run(processes: int, folder: FilePath, body: Callable[..., None], *arguments: Any) -> list[Any]:
    """``body(rank, *arguments)`` in each of some processes of one group; what each of them returned."""
    torch.multiprocessing.spawn(_in_group, (processes, folder, body, arguments), nprocs=processes)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def _in_group(
    rank: int, processes: int, folder: FilePath, body: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=processes)
    try:
        torch.save(body(rank, *arguments), folder / f"{rank}.pt")
        dist.barrier()  # a process that leaves early takes the others' connection along
    finally:
        dist.destroy_process_group()


def dtype_of(backend: str) -> torch.dtype:
    """What shows the most: float64, which the CPU kernels leave to the reference."""
    return torch.float32 if backend == "cpu" else torch.float64


def assert_together(got: Tensor, want: Tensor) -> None:
    """Equal but for the order of sums."""
    precision = 1e-11 if got.dtype == torch.float64 else 2e-6
    assert (got - want).norm() <= precision * want.norm()


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student, teacher, target = make_inputs((13, 20), dtype, scale=2.0)
    weight = torch.tensor([1.0, 2.0, 0.0, 1.0, 0.5, 1.0, 1.0, 3.0, 1.0, 1.0, 1.0, 0.25, 1.0])
    target[1] = -100
    return student + 3.0, teacher, target, weight


def evaluate(
    name: str, rows: slice, group: dist.ProcessGroup | None, reduction: str, backend: str, mode: str
) -> tuple[Tensor, Tensor]:
    """Loss and gradient of some rows, each weighted by a factor of its own where they are not reduced."""
    case = STANDARDIZED[name]
    student, teacher, target, weight = (tensor[rows] for tensor in inputs(dtype_of(backend)))
    student.requires_grad_()
    options = needed_target(case, target) or {"target": target}
    options |= {"sample_weight": weight, "reduction": reduction, "backend": backend, "mode": mode}
    loss = case.call(student, teacher, process_group=group, **options)
    upstream = torch.linspace(0.5, 2.0, 13, dtype=torch.float64)[rows] if reduction == "none" else torch.tensor(1.7)
    loss.backward(upstream.to(loss.dtype))
    assert student.grad is not None
    return loss.detach(), student.grad


def evaluate_split(rank: int, sizes: tuple[int, ...], backend: str) -> dict[tuple[str, str, str], Any]:
    start = sum(sizes[:rank])
    rows = slice(start, start + sizes[rank])
    group = dist.group.WORLD
    return {
        (name, reduction, mode): evaluate(name, rows, group, reduction, backend, mode)
        for name in LOSSES
        for reduction in ("sum", "none")
        for mode in ("fused", "recompute")
    }


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("backend", ON_CPUS)
def test_processes_give_what_one_gives(backend: str, split: str, tmp_path: FilePath) -> None:
    require(backend)
    sizes = SPLITS[split]
    found = run(len(sizes), tmp_path, evaluate_split, sizes, backend)
    for name, reduction, mode in found[0]:
        losses, gradients = zip(*(part[name, reduction, mode] for part in found), strict=True)
        loss, gradient = evaluate(name, slice(0, sum(sizes)), None, reduction, backend, mode)
        together = torch.cat(losses) if reduction == "none" else torch.stack(losses).sum()
        assert_together(together, loss)
        assert_together(torch.cat(gradients), gradient)


def evaluate_images(rank: int, sizes: tuple[int, ...], backend: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Losses and gradients of some images, per pixel, in a group if there are several processes."""
    start = sum(sizes[:rank])
    found = {}
    for name in LOSSES:
        case = STANDARDIZED[name]
        tensors = make_inputs((sum(sizes), 20, 9, 11), dtype_of(backend))
        student, teacher, target = (tensor[start : start + sizes[rank]] for tensor in tensors)
        target[:, 2:4] = -100
        student.requires_grad_()
        group = dist.group.WORLD if len(sizes) > 1 else None
        loss = case.call(student, teacher, target=target, process_group=group, reduction="sum", backend=backend)
        loss.backward()
        found[name] = loss.detach(), student.grad
    return found


@pytest.mark.parametrize("backend", ON_CPUS)
def test_pixels_of_several_processes(backend: str, tmp_path: FilePath) -> None:
    require(backend)
    parts = run(2, tmp_path, evaluate_images, (3, 1), backend)
    for name, (loss, gradient) in evaluate_images(0, (4,), backend).items():
        losses, gradients = zip(*(part[name] for part in parts), strict=True)
        assert_together(torch.stack(losses).sum(), loss)
        assert_together(torch.cat(gradients), gradient)


def evaluate_alone(rank: int, backend: str) -> tuple[Tensor, Tensor]:
    return evaluate("pr_dkd", slice(5 * rank, 5 * rank + 5), None, "sum", backend, "fused")


@pytest.mark.parametrize("backend", ON_CPUS)
def test_without_a_group_statistics_are_local(backend: str, tmp_path: FilePath) -> None:
    """Also where torch.distributed is initialised."""
    require(backend)
    for rank, (loss, gradient) in enumerate(run(2, tmp_path, evaluate_alone, backend)):
        want_loss, want_gradient = evaluate_alone(rank, backend)
        assert torch.equal(loss, want_loss)
        assert torch.equal(gradient, want_gradient)


class Collectives(TorchDispatchMode):
    """Counts the collectives that are started."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += op.namespace in ("c10d", "_c10d_functional") and "wait_tensor" not in str(op)
        return op(*args, **(kwargs or {}))


def count_collectives(rank: int, backend: str) -> tuple[int, int]:
    """Collectives of a forward and of a backward."""
    student, teacher, _, _ = inputs()
    student.requires_grad_()
    options = {"standardize": "class", "process_group": dist.group.WORLD, "backend": backend, "reduction": "sum"}
    with Collectives() as collectives:
        loss = kdkernels.kd_loss(student, teacher, **options)
        forward = collectives.count
        loss.backward()
    return forward, collectives.count - forward


def test_one_collective_each_way(tmp_path: FilePath) -> None:
    require("cpu")
    assert run(2, tmp_path, count_collectives, "cpu") == [(1, 1), (1, 1)]


# Training -----------------------------------------------------------------------------------------------------------


def digits() -> tuple[Tensor, Tensor]:
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    return torch.from_numpy(images[:96] / 16.0), torch.from_numpy(labels[:96]).long()


def train(rank: int, processes: int, backend: str) -> list[Tensor]:
    """Some steps on the digits, every process with every ``processes``-th image of a batch."""
    images, labels = digits()
    dtype = dtype_of(backend)
    images = images.to(dtype)
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).to(dtype)
    student = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)).to(dtype)
    model = nn.parallel.DistributedDataParallel(student) if processes > 1 else student
    group = dist.group.WORLD if processes > 1 else None
    loss_function = kdkernels.DKDLoss(
        standardize="class", process_group=group, reduction="sum", ce_weight=1.0, backend=backend
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for batch in torch.arange(96).split(24):
        mine = batch[rank::processes]
        with torch.no_grad():
            teacher_logits = teacher(images[mine])
        # Data parallel training averages gradients over the processes; a sum over the batch is what one process has.
        loss = processes * loss_function(model(images[mine]), teacher_logits, labels[mine])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in student.parameters()]


@pytest.mark.parametrize("backend", ON_CPUS)
def test_data_parallel_training(backend: str, tmp_path: FilePath) -> None:
    """Under DistributedDataParallel a student learns what it would learn from the whole batch in one process."""
    require(backend)
    want = train(0, 1, backend)
    for parameters in run(2, tmp_path, train, 2, backend):
        for got, alone in zip(parameters, want, strict=True):
            assert_together(got, alone)


# Modules --------------------------------------------------------------------------------------------------------------


def copy_and_pickle(rank: int) -> str:
    group = dist.group.WORLD
    student, teacher, _, _ = inputs()
    model = nn.Sequential()
    model.add_module("loss", kdkernels.KDLoss(standardize="class", process_group=group))
    want = model.loss(student, teacher)
    for duplicate in (copy.copy, copy.deepcopy):
        twin = duplicate(model)
        assert twin.loss.process_group is group
        assert torch.equal(twin.loss(student, teacher), want)
    file = io.BytesIO()
    torch.save(model.loss, file)
    file.seek(0)
    for loaded in (pickle.loads(pickle.dumps(model)).loss, torch.load(file, weights_only=True)):
        with pytest.raises(TypeError, match=r"process_group must be None or a .*set process_group again") as error:
            loaded(student, teacher)
        loaded.process_group = group
        assert torch.equal(loaded(student, teacher), want)
    return str(error.value)


def test_modules_with_a_group_are_copied_and_pickled(tmp_path: FilePath) -> None:
    """Copies share the group. A pickled one is gone, and statistics of this process alone would be silently others."""
    assert "not pickled" in run(1, tmp_path, copy_and_pickle)[0]


def refuse_dtensors(rank: int) -> list[str]:
    tensor = importlib.import_module("torch.distributed.tensor")
    mesh = tensor.init_device_mesh("cpu", (1,))
    student, teacher, target, weight = inputs()
    good = {"student_logits": student, "teacher_logits": teacher, "target": target, "sample_weight": weight}
    said = []
    for name, value in (good | {"denominator": torch.tensor(3.0)}).items():
        spread = tensor.distribute_tensor(value, mesh, [tensor.Shard(0)] if value.dim() else None)
        with pytest.raises(TypeError, match=f"{name} must be a plain tensor, got a DTensor") as error:
            kdkernels.kd_loss(**good | {name: spread})
        said.append(str(error.value))
    return said


def test_dtensors_are_refused(tmp_path: FilePath) -> None:
    """And it is said what to give in their place."""
    for message in run(1, tmp_path, refuse_dtensors)[0]:
        assert ".to_local()" in message
        assert ".full_tensor()" in message


# Arguments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["world", 3, object()], ids=["string", "integer", "object"])
def test_what_is_no_group_is_refused(group: object) -> None:
    student, teacher, _, _ = inputs()
    with pytest.raises(TypeError, match="process_group must be None or a"):
        kdkernels.kd_loss(student, teacher, standardize="class", process_group=group)


def refuse_without_class_statistics(rank: int) -> str:
    student, teacher, _, _ = inputs()
    with pytest.raises(ValueError, match="process_group shares the statistics of standardize='class'") as error:
        kdkernels.kd_loss(student, teacher, standardize="sample", process_group=dist.group.WORLD)
    return str(error.value)


def test_a_group_without_class_statistics_is_refused(tmp_path: FilePath) -> None:
    assert "standardize='sample'" in run(1, tmp_path, refuse_without_class_statistics)[0]
