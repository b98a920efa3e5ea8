"""The losses as ``torch.nn`` modules: arguments at construction, tensors in ``forward``."""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import Unpack

from kdkernels import objective
from kdkernels.functional import Loss, LossOptions, distillation_loss
from kdkernels.objective import Objective

_PER_CALL = ("target", "sample_weight")


class DistillationLoss(nn.Module):
    """Any :class:`~kdkernels.objective.Objective` as a module.

    Args:
        objective: what to compute.
        options: the keyword arguments of :func:`~kdkernels.functional.distillation_loss`, except ``target`` and
            ``sample_weight``, which belong to the call.
    """

    def __init__(self, objective: Objective, **options: Unpack[LossOptions]) -> None:
        super().__init__()
        if not isinstance(objective, Objective):
            raise TypeError(f"objective must be a kdkernels.Objective, got {objective!r}")
        for name in options:
            if name in _PER_CALL:
                raise TypeError(f"{name} is an argument of forward(), not of {type(self).__name__}()")
            if name not in LossOptions.__annotations__:
                raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {name!r}")
        self.objective = objective
        self.options = options

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Loss:
        """The loss of :func:`~kdkernels.functional.distillation_loss` for these tensors."""
        return distillation_loss(
            student_logits,
            teacher_logits,
            self.objective,
            target=target,
            sample_weight=sample_weight,
            **self.options,
        )

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"{self.objective}{options}"


class KDLoss(DistillationLoss):
    """Module of :func:`~kdkernels.functional.kd_loss`."""

    def __init__(self, temperature: float = 4.0, **options: Unpack[LossOptions]) -> None:
        super().__init__(objective.kd(temperature), **options)


class ReverseKDLoss(DistillationLoss):
    """Module of :func:`~kdkernels.functional.reverse_kd_loss`."""

    def __init__(self, temperature: float = 4.0, **options: Unpack[LossOptions]) -> None:
        super().__init__(objective.reverse_kd(temperature), **options)


class BDDLoss(DistillationLoss):
    """Module of :func:`~kdkernels.functional.bdd_loss`."""

    def __init__(
        self,
        forward_weight: float = 1.0,
        reverse_weight: float = 1.0,
        forward_temperature: float = 4.0,
        reverse_temperature: float = 4.0,
        **options: Unpack[LossOptions],
    ) -> None:
        preset = objective.bdd(forward_weight, reverse_weight, forward_temperature, reverse_temperature)
        super().__init__(preset, **options)


class DKDLoss(DistillationLoss):
    """Module of :func:`~kdkernels.functional.dkd_loss`."""

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        *,
        kl_type: str = "forward",
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(objective.dkd(alpha, beta, temperature, kl_type), **options)


class GDKDLoss(DistillationLoss):
    """Module of :func:`~kdkernels.functional.gdkd_loss`."""

    def __init__(
        self,
        k: int = 5,
        w0: float = 1.0,
        w1: float = 1.0,
        w2: float = 8.0,
        temperature: float = 4.0,
        *,
        strategy: str = "best",
        kl_type: str = "forward",
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(objective.gdkd(k, w0, w1, w2, temperature, strategy, kl_type), **options)


class GDKD3Loss(DistillationLoss):
    """Module of :func:`~kdkernels.functional.gdkd3_loss`."""

    def __init__(
        self,
        k: int = 4,
        w0: float = 1.0,
        w1: float = 1.0,
        w2: float = 8.0,
        temperature: float = 4.0,
        *,
        strategy: str = "best",
        kl_type: str = "forward",
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(objective.gdkd3(k, w0, w1, w2, temperature, strategy, kl_type), **options)
