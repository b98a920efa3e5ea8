"""The losses as functions. Each builds an :class:`~kdkernels.objective.Objective` and hands it to a backend."""

from __future__ import annotations

from typing import Any, TypedDict

from torch import Tensor
from typing_extensions import Unpack

from kdkernels import autograd, dispatch, objective, reference
from kdkernels.backends import BACKENDS
from kdkernels.distributed import ProcessGroup
from kdkernels.objective import Objective, check_choice
from kdkernels.validation import MODES, check_call, check_sample_values

Loss = Tensor | tuple[Tensor, dict[str, Tensor]]


class LossOptions(TypedDict, total=False):
    """Keyword arguments that every loss takes. See :func:`distillation_loss`."""

    target: Tensor | None
    weight: float
    square_temperature: bool
    standardize: str | None
    correction: int | None
    eps: float | None
    ce_weight: float | None
    reduction: str
    denominator: float | Tensor | None
    sample_weight: Tensor | None
    ignore_index: int
    class_dim: int | None
    num_classes: int | None
    process_group: ProcessGroup | None
    mode: str
    backend: str
    return_parts: bool


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    objective: Objective,
    *,
    target: Tensor | None = None,
    weight: float = 1.0,
    square_temperature: bool = True,
    standardize: str | None = None,
    correction: int | None = None,
    eps: float | None = None,
    ce_weight: float | None = None,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    class_dim: int | None = None,
    num_classes: int | None = None,
    process_group: ProcessGroup | None = None,
    mode: str = "fused",
    backend: str = "auto",
    return_parts: bool = False,
) -> Loss:
    """The distillation loss that ``objective`` describes; every other loss of this module is a preset of it.

    Args:
        student_logits: raw logits, float32, float64, float16 or bfloat16, any shape with a class dimension, any
            strides. The gradient flows here, in this dtype; the arithmetic is float32 (float64 if either side is).
        teacher_logits: the same shape and device, any of those dtypes; must not require grad.
        objective: an :class:`~kdkernels.objective.Objective`.
        target: integer classes in the sample dimensions' shape. Required by target partitions and by ``ce_weight``;
            for other losses it only marks ignored samples, and its other values may be anything.
        weight: multiplies the distillation terms, from 0 to 1e24; ``ce_weight`` and the parts are not multiplied.
            ``weight=1 - alpha, ce_weight=alpha`` is alpha * CE + (1 - alpha) * KD.
        square_temperature: False drops the factor T^2 from loss and parts; True keeps what the objective has.
        standardize: None keeps the objective's; ``"class"`` or ``"sample"`` standardise the logits the divergences
            see. ``correction`` and ``eps`` as in :class:`~kdkernels.objective.Objective`.
        ce_weight: weight of the cross entropy of the raw student logits with the target; None keeps the
            objective's (0 in the presets).
        reduction: ``"mean"`` (weighted mean over valid samples), ``"batchmean"`` (sum / size of dimension 0),
            ``"sum"`` or ``"none"`` (one value a sample, in the sample dimensions' shape).
        denominator: number >= 0 or 0-d tensor on the logits' device that replaces the mean's own count, for gradient
            accumulation and data parallelism over tokens. The loss is 0 where it is 0.
        sample_weight: weight >= 0 of each sample. Samples of weight 0 count nowhere and may hold NaN.
        ignore_index: samples with this target count nowhere either; a 64-bit integer.
        class_dim: the class dimension of both logits; every other dimension counts samples. None is 1, with a
            UserWarning, once, for logits of three dimensions without a target: those of tokens need -1.
        num_classes: compare only the first ``num_classes`` classes (padded vocabularies).
        process_group: a ``torch.distributed.ProcessGroup`` whose processes share the statistics of
            ``standardize="class"``, forward and backward, as in synchronised batch normalisation (one collective each).
            The gradient is that of the sum of all processes' losses; each loss is reduced over its own batch, which may
            be empty. None: each process has its own statistics.
        mode: ``"fused"`` computes the gradient together with the loss and keeps it (one buffer of the student's
            size); ``"recompute"`` keeps a few numbers a sample and reads the logits again in backward, as both do with
            ``standardize="class"`` where other processes or an upstream gradient of each sample have a share in the
            sums over the batch. A fused bfloat16 gradient is rounded when written and again by an upstream factor that
            is no power of two.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``. ``auto`` follows the environment
            variable ``KDKERNELS_BACKEND`` if it was set at import, else picks the fastest that can serve the call.
        return_parts: also return the unweighted parts of the loss.

    Temperatures (from 1e-6 to 1e6), weights (from 0 to 1e24), k and every other number may be a NumPy scalar or a 0-d
    CPU tensor too, but in a full graph of torch.compile, which knows no value of theirs. A tensor that requires grad is
    refused, as is one on a GPU, which the host would have to wait for.

    Returns:
        The loss, float32 (float64 if either side is); with ``return_parts`` a pair ``(loss, parts)``, parts a dict of
        detached tensors under the same reduction, each with its T^2 (if any): ``"ce"``, ``"mass"`` and the groups'
        names, in objectives of several terms with a suffix: ``_forward`` / ``_reverse`` where that tells two terms
        apart, else ``_1``, ``_2`` and so on.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or value, DTensors included; nothing was computed.
        IndexError: a target is out of range (on a GPU only with the environment variable ``KDKERNELS_DEBUG=1``; else
            that sample's loss is NaN).
        RuntimeError: the requested backend cannot serve this call, or a second derivative is asked for.

    Shape:
        ``(N, C)``, or any shape with ``class_dim``, e.g. ``(N, C, H, W)`` with 1 and ``(B, T, V)`` with -1.
    """
    reweighted = not (isinstance(weight, float) and weight == 1.0) or square_temperature is not True
    if reweighted or standardize is not None or correction is not None or eps is not None or ce_weight is not None:
        objective = _adjusted(objective, standardize, correction, eps, ce_weight, weight, square_temperature)
    check_choice("mode", mode, MODES)
    call = check_call(
        student_logits,
        teacher_logits,
        objective,
        target,
        sample_weight,
        denominator,
        reduction,
        class_dim,
        num_classes,
        ignore_index,
        process_group,
    )
    backend = dispatch.choose(call, backend)
    if dispatch.checks_samples(backend, call):
        check_sample_values(call)
    if backend == "reference":
        loss, parts = reference.distillation_loss(call)
        return (loss, parts) if return_parts else loss
    loss, values = autograd.loss_of(call, BACKENDS[backend], recompute=mode == "recompute", parts=return_parts)
    return loss if values is None else (loss, _named_parts(call.objective, values))


def _adjusted(base: Objective, *changes: Any) -> Objective:
    if not isinstance(base, Objective):
        return base  # check_call says what is wrong
    return objective.adjust(base, *changes)


def _named_parts(objective: Objective, values: Tensor) -> dict[str, Tensor]:
    """The kernels' parts (last dimension: CE, then each term's mass and groups) by their names."""
    names = ["ce" if objective.ce_weight else ""]
    names += [name for term in objective.part_names() for name in term]
    return {name: value for name, value in zip(names, values.unbind(-1), strict=True) if name}


def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0, **options: Unpack[LossOptions]
) -> Loss:
    """Knowledge distillation, T^2 * KL(teacher || student) at temperature T (Hinton et al. 2015, eq. 2-4).

    ``options``: the keyword arguments of :func:`distillation_loss`, which also names shapes, dtypes and errors.
    """
    return distillation_loss(student_logits, teacher_logits, objective.kd(temperature), **options)


def reverse_kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0, **options: Unpack[LossOptions]
) -> Loss:
    """Reverse KD, T^2 * KL(student || teacher). ``options`` as in :func:`distillation_loss`."""
    return distillation_loss(student_logits, teacher_logits, objective.reverse_kd(temperature), **options)


def bdd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    forward_weight: float = 1.0,
    reverse_weight: float = 1.0,
    forward_temperature: float = 4.0,
    reverse_temperature: float = 4.0,
    **options: Unpack[LossOptions],
) -> Loss:
    """Balance Divergence (Qi et al., arXiv 2501.07804): forward KL plus a compensating reverse KL.

    ``forward_weight * T_f^2 * KL(teacher || student) + reverse_weight * T_r^2 * KL(student || teacher)``, each at its
    own temperature. ``options`` as in :func:`distillation_loss`.
    """
    preset = objective.bdd(forward_weight, reverse_weight, forward_temperature, reverse_temperature)
    return distillation_loss(student_logits, teacher_logits, preset, **options)


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    *,
    kl_type: str = "forward",
    **options: Unpack[LossOptions],
) -> Loss:
    """Decoupled KD (Zhao et al., CVPR 2022, eq. 7): ``T^2 * (alpha * TCKD + beta * NCKD)``.

    TCKD is the KL of the binary (target, rest) masses, NCKD the KL among the non-target classes.

    Args:
        target: integer classes in the sample dimensions' shape.
        alpha: weight >= 0 of TCKD (paper: 1).
        beta: weight >= 0 of NCKD (paper: 8 on CIFAR-100; 0.5 with T = 1 on ImageNet).
        temperature: T, from 1e-6 to 1e6.
        kl_type: direction of NCKD, ``"forward"``, ``"reverse"`` or ``"both"`` (half of each); TCKD stays forward.
        options: as in :func:`distillation_loss`.
    """
    preset = objective.dkd(alpha, beta, temperature, kl_type)
    return distillation_loss(student_logits, teacher_logits, preset, target=target, **options)


def gdkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    k: int = 5,
    w0: float = 1.0,
    w1: float = 1.0,
    w2: float = 8.0,
    temperature: float = 4.0,
    *,
    strategy: str = "best",
    kl_type: str = "forward",
    **options: Unpack[LossOptions],
) -> Loss:
    """Generalised DKD (Zheng & Cheng, arXiv 2512.04625): the teacher's top k classes against the rest.

    ``T^2 * (w0 * KL of the (top, rest) masses + w1 * KL inside the top + w2 * KL inside the rest)``.

    Args:
        k: 1 <= k < C classes lead; ties go to the lowest index.
        w0: weight >= 0 of the mass.
        w1: weight >= 0 of the top.
        w2: weight >= 0 of the rest.
        temperature: T, from 1e-6 to 1e6.
        strategy: ``"best"`` takes the k largest teacher logits, ``"worst"`` the k smallest.
        kl_type: direction inside the groups, ``"forward"``, ``"reverse"`` or ``"both"``; the mass stays forward.
        options: as in :func:`distillation_loss`.
    """
    preset = objective.gdkd(k, w0, w1, w2, temperature, strategy, kl_type)
    return distillation_loss(student_logits, teacher_logits, preset, **options)


def gdkd3_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    k: int = 4,
    w0: float = 1.0,
    w1: float = 1.0,
    w2: float = 8.0,
    temperature: float = 4.0,
    *,
    strategy: str = "best",
    kl_type: str = "forward",
    **options: Unpack[LossOptions],
) -> Loss:
    """GDKD with three groups (GDKD's repository): the teacher's top 1, its top 2..k and the rest, 2 <= k < C.

    ``T^2 * (w0 * KL of the three masses + w1 * KL inside top 2..k + w2 * KL inside the rest)``. Arguments as in
    :func:`gdkd_loss`, ``options`` as in :func:`distillation_loss`.
    """
    preset = objective.gdkd3(k, w0, w1, w2, temperature, strategy, kl_type)
    return distillation_loss(student_logits, teacher_logits, preset, **options)
