"""Data parallel training with class statistics of the global batch: two processes give what one gives.

``standardize="class"`` (PR-KD, LumiNet) standardises each class over the batch, so a sample's loss depends on the
whole batch. ``process_group=`` shares these statistics as ``SyncBatchNorm`` does, forward and backward. The
processes' batches may differ in size: here 5 and 3 samples.

The mean: DistributedDataParallel averages the gradients over the processes. So that this is the mean over the global
batch, each process divides by its share of the global count: ``denominator=global_count / world_size``.

Compared below with one process that has the whole batch: loss, gradients, and the weights after a step. And against
the formula in plain PyTorch, float64.

    python examples/recipes/ddp_shared_statistics.py
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import check
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import kdkernels

SIZES = (5, 3)
FEATURES, CLASSES, TEMPERATURE = 12, 10, 4.0


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """The global batch: inputs, teacher logits, labels."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(sum(SIZES), FEATURES, generator=generator)
    teacher_logits = 3 * torch.randn(sum(SIZES), CLASSES, generator=generator)
    return inputs, teacher_logits, torch.randint(CLASSES, (sum(SIZES),), generator=generator)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(FEATURES, CLASSES)


def work(rank: int, folder: str) -> None:
    """One process: a step on its part of the batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=len(SIZES))
    inputs, teacher_logits, labels = (tensor.split(SIZES)[rank] for tensor in batch())
    model = DistributedDataParallel(network())
    count = torch.tensor(float(len(labels)))
    dist.all_reduce(count)
    loss = kdkernels.kd_loss(
        model(inputs),
        teacher_logits,
        TEMPERATURE,
        target=labels,
        ce_weight=1.0,
        standardize="class",
        process_group=dist.group.WORLD,
        denominator=count / dist.get_world_size(),
    )
    loss.backward()
    torch.save((loss.detach(), check.gradients(model)), Path(folder) / f"{rank}.pt")
    dist.barrier()  # a process that leaves early takes the others' connection along
    dist.destroy_process_group()


def formula(logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """PR-KD with the cross entropy, in plain PyTorch."""
    standard = [F.batch_norm(z, None, None, training=True, eps=1e-5) for z in (logits, teacher_logits)]
    logs, soft = F.log_softmax(standard[0] / TEMPERATURE, 1), F.softmax(standard[1] / TEMPERATURE, 1)
    return F.cross_entropy(logits, labels) + F.kl_div(logs, soft, reduction="batchmean") * TEMPERATURE**2


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (folder,), nprocs=len(SIZES))
        results = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(len(SIZES))]
    inputs, teacher_logits, labels = batch()

    single = network()
    loss = kdkernels.kd_loss(
        single(inputs), teacher_logits, TEMPERATURE, target=labels, ce_weight=1.0, standardize="class"
    )
    loss.backward()
    mean = torch.stack([result[0] for result in results]).mean()
    check.same("mean of the two processes' losses and one process's loss", mean, loss)
    for rank, (_, gradient) in enumerate(results):
        check.same(f"gradients in process {rank} and in one process", gradient, check.gradients(single))

    exact = network().double()
    expected = formula(exact(inputs.double()), teacher_logits.double(), labels)
    expected.backward()
    check.same("loss and the formula in PyTorch", mean, expected)
    check.same("gradients and the formula's", results[0][1], check.gradients(exact))


if __name__ == "__main__":
    main()
