"""Class statistics over the batches of all processes, for ``standardize="class"`` with ``process_group=``.

One collective in forward (every process's moments, merged exactly) and one in backward (a sum), as in synchronised
batch normalisation. Every process of the group has to make the same calls; its batch may be empty.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ProcessGroup = Any  # torch.distributed.ProcessGroup, which a torch built without distributed lacks


def is_process_group(value: object) -> bool:
    """Whether ``value`` is a group of this process's."""
    return dist.is_available() and isinstance(value, dist.ProcessGroup)


def name_of(group: ProcessGroup | None) -> str | None:
    """The name by which ops know a group."""
    return None if group is None else group.group_name


class GroupReference:
    """Holds a process group in an object that is copied and pickled.

    Copies share the group. A group cannot be pickled: the loaded reference holds :data:`NOT_PICKLED` in its place,
    which no loss takes for a group.
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group

    def __copy__(self) -> GroupReference:
        return GroupReference(self.group)

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupReference:
        return GroupReference(self.group)

    def __reduce__(self) -> tuple[type[GroupReference], tuple[str | None]]:
        return GroupReference, (None if self.group is None else NOT_PICKLED,)


#: In the place of a process group in what was unpickled.
NOT_PICKLED = "not pickled: set process_group again"


def merged_moments(moments: Tensor, group: ProcessGroup | None) -> Tensor:
    """The moments over all processes of ``group`` from each one's, ``(sides, 3, classes)``: count, mean and M2.

    The merge is that of Chan et al., from means and not from sums of squares. None for the group: ``moments``.
    """
    if group is None:
        return moments
    world = dist.get_world_size(group)
    ops = torch.ops._c10d_functional
    parts = ops.wait_tensor(ops.all_gather_into_tensor(moments, world, group.group_name))
    counts, means, m2s = parts.view(world, *moments.shape).unbind(2)
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count.clamp(min=1)
    return torch.stack([count, mean, (m2s + counts * (means - mean).square()).sum(0)], 1)


def summed(values: Tensor, group: str | None) -> Tensor:
    """``values`` summed over all processes of the group of this name; None: as they are."""
    if group is None:
        return values
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(values, "sum", group))


class Sum(torch.autograd.Function):
    """:func:`summed`, differentiable: the gradient of a sum over processes is a sum over processes."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: str | None) -> Tensor:
        ctx.group = group
        return values.clone() if group is None else summed(values, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return Sum.apply(gradient, ctx.group), None
