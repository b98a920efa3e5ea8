"""A call as a row of features, what it gives, and what it has to give: for tests that cross features with each other.

A :class:`Crossing` says all there is to a call, its random numbers included; :func:`check_crossing` makes the call and
holds loss, gradient and parts to the float64 reference. ``tests/test_crossings.py`` takes every pair of features,
``tests/test_fuzz.py`` takes random ones. A failure prints the Crossing: ``check_crossing(Crossing(...), "cpu")`` is the
whole reproducer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import oracle
import torch
from helpers import GRADIENT_TOLERANCE, Outcome, Path, arithmetic_dtype, measured
from torch import Tensor

import kdkernels
from kdkernels import reference
from kdkernels.objective import TARGET, WHOLE, Objective, Partition, Term
from kdkernels.validation import check_call

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

#: The partitions of an objective's terms.
PARTITIONS: dict[str, tuple[str, ...]] = {
    "whole": ("whole",),
    "target": ("target",),
    "topk": ("topk",),
    "top1_topk": ("top1_topk",),
    "worst": ("worst",),
    "whole_whole": ("whole", "whole"),
    "target_whole": ("target", "whole"),
    "target_topk": ("target", "topk"),
    "topk_top1_topk": ("topk", "top1_topk"),
    "worst_topk": ("worst", "topk"),
}
_RANKING = ("topk", "top1_topk", "worst")


@dataclass(frozen=True)
class Crossing:
    """One call. Every field is a feature, with the plainest value as its default."""

    standardize: str | None = None
    #: A key of PARTITIONS.
    partition: str = "whole"
    #: How many classes lead: "least", "some" or "most", which leaves a rest of one class.
    k: str = "some"
    #: "forward", "reverse", "both"; "mixed": forward for masses and first groups, reverse in the others.
    direction: str = "forward"
    #: Of the first term.
    temperature: float = 4.0
    #: The second term's temperature over the first one's.
    ratio: float = 1.0
    square_temperature: bool = True
    ce_weight: float = 0.0
    #: None: the objective's default.
    eps: float | None = None
    samples: int = 3
    classes: int = 10
    #: A method of _LAYOUTS.
    layout: str = "rows"
    dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32)
    #: "fused", "recompute" or "no_grad".
    mode: str = "fused"
    #: A reduction, or "number" / "tensor": a mean over a denominator of that type.
    reduction: str = "mean"
    #: Samples that do not count: "none", "ignore_index", "sample_weight", "both" or "all".
    mask: str = "none"
    #: Classes masked by -inf: "none", "both" sides, "teacher"; "lowest": by finfo.min on both sides.
    masked: str = "none"
    #: The gradient that comes from above: "ones", "random", "strided", "expanded", "inf" for samples that do not count.
    upstream: str = "ones"
    #: Added to all logits.
    offset: float = 0.0
    #: Standard deviation of the logits.
    spread: float = 3.0
    #: Standard deviation of student - teacher; None: they are independent.
    gap: float | None = None
    #: Logits have classes beyond num_classes, and there they are NaN.
    padded: bool = False
    seed: int = 0

    def __repr__(self) -> str:
        """Only what is not the default, in an expression that builds it again."""
        given = ((f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default)
        return f"Crossing({', '.join(f'{name}={value!r}' for name, value in given)})"

    @property
    def terms(self) -> tuple[str, ...]:
        return PARTITIONS[self.partition]

    @property
    def ranks(self) -> bool:
        """Whether the teacher's top k matter."""
        return any(kind in _RANKING for kind in self.terms)

    @property
    def needs_target(self) -> bool:
        return bool(self.ce_weight) or "target" in self.terms

    def leaders(self, kind: str) -> int:
        """k of a ranking partition."""
        least = 2 if kind == "top1_topk" else 1
        return {"least": least, "some": max(least, min(5, self.classes // 2)), "most": self.classes - 1}[self.k]

    def objective(self) -> Objective:
        terms = (
            self._term(kind, temperature)
            for kind, temperature in zip(self.terms, (self.temperature, self.temperature * self.ratio), strict=False)
        )
        return Objective(tuple(terms), self.standardize, eps=self.eps, ce_weight=self.ce_weight)

    def _term(self, kind: str, temperature: float) -> Term:
        """All weights differ, so that no two can be taken for each other."""
        mass, groups = (0.7, 0.4), [(0.3, 0.6), (1.1, 0.2), (0.9, 1.3)]
        partition = WHOLE if kind == "whole" else TARGET
        if kind in _RANKING:
            name = "topk" if kind == "worst" else kind
            partition = Partition(name, self.leaders(kind), largest=kind != "worst")
        kept = {"forward": (1, 0), "reverse": (0, 1), "both": (1, 1), "mixed": (1, 0)}[self.direction]
        others = (0, 1) if self.direction == "mixed" else kept
        groups = [_times(pair, others if i else kept) for i, pair in enumerate(groups[: len(partition.groups)])]
        mass = _times(mass, kept) if len(groups) > 1 else (0.0, 0.0)
        return Term(temperature, partition, mass, tuple(groups), self.square_temperature)


def _times(pair: tuple[float, float], by: tuple[float, float]) -> tuple[float, float]:
    return pair[0] * by[0], pair[1] * by[1]


def legal(given: dict[str, Any]) -> bool:
    """Whether a Crossing may have these values; what is not among them is not asked for."""
    of = given.get
    kinds = PARTITIONS[of("partition", "whole")]
    ranks = any(kind in _RANKING for kind in kinds)
    samples, classes = of("samples", 65), of("classes", 1000)
    least = 3 if "top1_topk" in kinds else 2 if ranks else 1
    half = any(dtype in (F16, BF16) for dtype in of("dtypes", ()))
    by_class = of("standardize") == "class"
    return (
        classes >= least
        and (of("masked", "none") == "none" or classes >= 3)
        and (of("mask", "none") in ("none", "all") or samples >= 3)
        and (of("upstream", "ones") == "ones" or of("mode", "fused") != "no_grad")
        and (of("upstream", "ones") in ("ones", "random") or of("reduction", "none") == "none")
        and (of("upstream") != "inf" or of("mask", "all") != "none")
        # Standardised by class, what ranks as equal in exact arithmetic is told apart by rounding: two samples' values
        # are +-1, rounded logits far from 0 have few values, and beside finfo.min all others are one.
        and not (by_class and ranks and (1 < samples < 8 or of("layout") == "expanded" or of("masked") == "lowest"))
        and not (by_class and ranks and half and of("offset", 0.0))
        and not (by_class and ranks and abs(of("offset", 0.0)) > 1e4 * of("spread", 3.0))
        # Of a constant column nothing is left but rounding, which eps = 0 would divide by.
        and not (by_class and of("eps") == 0.0 and (of("layout") == "expanded" or of("offset", 0.0)))
        and not (of("eps") == 0.0 and samples == 1)
    )


# The tensors ------------------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    student: Tensor
    teacher: Tensor
    #: Keyword arguments of ``expected`` and of the public function.
    options: dict[str, Any]
    upstream: Tensor | None


def make(crossing: Crossing) -> Inputs:
    """The tensors of a call. Near ties of ranks that rounding could swap are drawn anew."""
    for attempt in range(100):
        generator = torch.Generator().manual_seed(crossing.seed * 100 + attempt)
        student, teacher, valid, options = _draw(crossing, generator)
        if not _near_tie(crossing, teacher, valid):
            break
    else:
        raise AssertionError(f"no inputs without a near tie for {crossing!r}")
    upstream = _upstream(crossing, valid, generator)
    samples = _sample_shape(crossing)
    class_dim = {"middle": 2}.get(crossing.layout, len(samples) if crossing.layout in _ROWS else 1)
    options |= {name: options[name].reshape(samples) for name in ("target", "sample_weight") if name in options}
    options["class_dim"] = class_dim
    if crossing.padded:
        options["num_classes"] = crossing.classes
        student, teacher = (
            torch.nn.functional.pad(logits, (0, extra), value=math.nan)
            for logits, extra in ((student, 3), (teacher, 2))
        )
    return Inputs(
        _laid_out(student.to(crossing.dtypes[0]), crossing.layout, samples, class_dim, expand=False),
        _laid_out(teacher.to(crossing.dtypes[1]), crossing.layout, samples, class_dim, expand=True),
        options,
        upstream,
    )


def _draw(crossing: Crossing, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Student and teacher logits ``(N, C)``, which samples count, and options."""
    shape = crossing.samples, crossing.classes
    largest = [min(torch.finfo(dtype).max / 2, 1e30) for dtype in crossing.dtypes]
    student, teacher = (torch.randn(shape, generator=generator, dtype=F64) * crossing.spread for _ in range(2))
    if crossing.layout == "expanded":
        teacher = teacher[:1].expand(shape).clone()
    if crossing.gap is not None:
        student = teacher + torch.randn(shape, generator=generator, dtype=F64) * crossing.gap
    student, teacher = (
        (logits + crossing.offset).clamp(-limit, limit)
        for logits, limit in zip((student, teacher), largest, strict=True)
    )
    target = torch.randint(crossing.classes, shape[:1], generator=generator)
    valid, options = _masks(crossing, target, generator)
    _mask_classes(crossing, student, teacher, target, generator)
    student[~valid] = math.nan
    if crossing.layout != "expanded":
        teacher[~valid] = math.nan
    options["reduction"] = "mean" if crossing.reduction in ("number", "tensor") else crossing.reduction
    if crossing.reduction == "number":
        options["denominator"] = 7.5
    if crossing.reduction == "tensor":
        options["denominator"] = torch.tensor(7.5 if valid.any() else 0.0)
    return student, teacher, valid, options


def _masks(crossing: Crossing, target: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
    """Which samples count, and the target and weights that say so."""
    count, mask = crossing.samples, crossing.mask
    weight = torch.rand(count, generator=generator) + 0.25
    ignored, weightless = torch.rand(2, count, generator=generator) < 0.3
    ignored[0], ignored[-1], weightless[0], weightless[-1] = False, count > 1, False, count > 2
    options: dict[str, Any] = {}
    by_target = mask in ("ignore_index", "both") or (mask == "all" and crossing.needs_target)
    by_weight = mask in ("sample_weight", "both") or (mask == "all" and not crossing.needs_target)
    valid = torch.ones(count, dtype=torch.bool)
    if mask == "all":
        ignored[:], weightless[:] = True, True
    if by_target:
        valid &= ~ignored
    if by_weight:
        valid &= ~weightless
        options["sample_weight"] = weight.where(~weightless, 0.0)
    if by_target or crossing.needs_target:
        options["target"] = target.where(~ignored, -100) if by_target else target
    return valid, options


def _mask_classes(
    crossing: Crossing, student: Tensor, teacher: Tensor, target: Tensor, generator: torch.Generator
) -> None:
    """Masks a third of the classes in place: whole columns and, in every other sample, some of its own."""
    if crossing.masked == "none":
        return
    count, classes = student.shape
    hidden = (torch.rand(classes, generator=generator) < 0.2).expand(count, classes).clone()
    hidden[::2] |= torch.rand(len(hidden[::2]), classes, generator=generator) < 0.2
    hidden[0, int(target[0]) if not crossing.ce_weight else 0] = True  # a whole group, where it is {target}
    hidden[torch.arange(count), torch.randint(classes, (count,), generator=generator)] = False
    if crossing.masked != "teacher":  # a masked target has an infinite cross entropy
        hidden[torch.arange(count), target] &= not crossing.ce_weight
    if crossing.layout == "expanded":
        hidden = hidden[:1].expand(count, classes).clone()
        if crossing.ce_weight:
            hidden[:] = False if crossing.masked != "teacher" else hidden
    sides = [(teacher, crossing.dtypes[1])]
    if crossing.masked != "teacher":
        sides.append((student, crossing.dtypes[0]))
    for logits, dtype in sides:
        logits[hidden] = torch.finfo(dtype).min if crossing.masked == "lowest" else -math.inf


def _near_tie(crossing: Crossing, teacher: Tensor, valid: Tensor) -> bool:
    """Whether rounding in float32 could swap the classes beside a partition's border, after a standardisation by class.

    Equal logits stay equal under the others, and different ones stay different.
    """
    if not (crossing.ranks and crossing.standardize == "class" and valid.any()):
        return False
    teacher = teacher.to(crossing.dtypes[1]).double().where(valid[:, None], 0.0)
    ranked = reference.standardize(teacher, valid, crossing.objective())[valid].sort(1, descending=True).values
    borders = set()
    for kind in crossing.terms:
        if kind in _RANKING:
            k = crossing.leaders(kind)
            borders |= {crossing.classes - k if kind == "worst" else k, *([1] if kind == "top1_topk" else [])}
    above, below = (ranked[:, [border - side for border in borders]] for side in (1, 0))
    gaps = torch.where(above == below, math.inf, above - below)
    return bool((gaps < 1e-5 * (1 + crossing.offset / crossing.spread / 100)).any())


_ROWS = ("rows", "transposed", "crop", "expanded", "channels_last_rows")
#: Every layout that :func:`_laid_out` knows.
LAYOUTS = ("rows", "channels", "channels_last", "transposed", "crop", "expanded", "middle")


def _sample_shape(crossing: Crossing) -> tuple[int, ...]:
    if crossing.layout in _ROWS:
        return (crossing.samples,)
    batch = next((b for b in (5, 2) if crossing.samples % b == 0), 1)
    pixels = crossing.samples // batch
    return (1, batch, pixels) if crossing.layout == "middle" else (batch, pixels, 1)


def _laid_out(logits: Tensor, layout: str, samples: tuple[int, ...], class_dim: int, expand: bool) -> Tensor:
    """``(N, C)`` logits in the sample dimensions' shape, with the layout's strides."""
    if layout == "expanded" and expand:
        return logits[:1].expand(logits.shape)
    if layout == "transposed":
        return logits.t().contiguous().t()
    if layout == "crop":
        count, classes = logits.shape
        whole = torch.full((count + 2, 2 * classes + 5), math.nan, dtype=logits.dtype)
        view = whole[1 : count + 1, 3 : 3 + 2 * classes : 2]
        view.copy_(logits)
        return view
    shaped = logits.reshape(*samples, logits.shape[1]).movedim(-1, class_dim)
    return shaped if layout == "channels_last" else shaped.contiguous()


def _upstream(crossing: Crossing, valid: Tensor, generator: torch.Generator) -> Tensor | None:
    dtype = arithmetic_dtype(torch.empty(0, dtype=crossing.dtypes[0]), torch.empty(0, dtype=crossing.dtypes[1]))
    if crossing.reduction != "none":
        return None if crossing.upstream == "ones" else torch.tensor(1.7, dtype=dtype)
    samples = _sample_shape(crossing)
    if crossing.upstream == "ones":
        return torch.ones(samples, dtype=dtype)
    if crossing.upstream == "expanded":
        return torch.tensor(0.3, dtype=dtype).expand(samples)
    values = (torch.rand(crossing.samples, generator=generator, dtype=F64) * 2 - 0.5).to(dtype)
    if crossing.upstream == "inf":
        values[~valid] = math.inf
    values = values.reshape(samples)
    return torch.stack([values, values * math.nan], -1)[..., 0] if crossing.upstream == "strided" else values


# The comparison -------------------------------------------------------------------------------------------------------


def check_crossing(crossing: Crossing, backend: str) -> None:
    """Makes the call on a backend and holds it to the accuracy table; AssertionError names what is off."""
    inputs = make(crossing)
    got = run(crossing, inputs, backend)
    try:
        compare(crossing, inputs, got)
    except AssertionError as error:
        raise AssertionError(f"check_crossing({crossing!r}, {backend!r}): {error}") from None


def run(crossing: Crossing, inputs: Inputs, backend: str) -> Outcome:
    """What a user gets; without a gradient, a gradient of zero elements."""
    wide = F64 in crossing.dtypes and backend == "cpu"  # the CPU kernels leave float64 to the reference
    path = Path("auto" if wide else backend, crossing.mode if crossing.mode != "no_grad" else "fused")
    options = path.options | inputs.options | {"objective": crossing.objective()}
    if crossing.mode != "no_grad":
        call = kdkernels.distillation_loss
        return measured(call, inputs.student, inputs.teacher, inputs.upstream, return_parts=True, **options)
    with torch.no_grad():
        loss, parts = kdkernels.distillation_loss(inputs.student, inputs.teacher, return_parts=True, **options)
    return Outcome(loss, torch.empty(0), parts)


class Wanted(NamedTuple):
    """The reference's loss and parts under the call's reduction and "none", and its gradient."""

    reduced: Outcome
    rows: Outcome


def _by_reference(crossing: Crossing, inputs: Inputs, arithmetic: torch.dtype) -> Wanted:
    """The reference on inputs of one precision, in an arithmetic of another or the same."""
    student = inputs.student.detach().to(arithmetic).requires_grad_()
    options = {"sample_weight": None, "denominator": None, "num_classes": None, "ignore_index": -100, "target": None}
    options |= inputs.options
    results = []
    for reduction in (options["reduction"], "none"):
        denominator = options["denominator"] if reduction != "none" else None
        call = check_call(
            student,
            inputs.teacher.to(arithmetic),
            crossing.objective(),
            **options | {"reduction": reduction, "denominator": denominator},
        )
        results.append(reference.distillation_loss(call, arithmetic))
    (loss, parts), (rows, part_rows) = results
    upstream = inputs.upstream.to(loss.dtype) if inputs.upstream is not None else None
    (gradient,) = torch.autograd.grad(loss, student, upstream)
    return Wanted(Outcome(loss.detach(), gradient, parts), Outcome(rows.detach(), torch.empty(0), part_rows))


def compare(crossing: Crossing, inputs: Inputs, got: Outcome) -> None:
    """Holds an outcome to the accuracy table."""
    dtype = arithmetic_dtype(inputs.student, inputs.teacher)
    want = _by_reference(crossing, inputs, F64)
    assert got.loss.dtype == dtype
    assert got.loss.shape == want.reduced.loss.shape
    weight = rounding_weight(crossing.objective())
    reducer = _Reducer(crossing, inputs)
    # As exact as float32's own eager formula is right: with what the logits themselves lose, no more is left.
    eager = functools.cache(lambda: _by_reference(crossing, _shifted(crossing, inputs), F32).reduced)
    of_logits = _rounding_of_standardized(crossing, inputs, reducer.weight.flatten() > 0) if dtype == F32 else 0.0
    bound = _Bound(reducer.bound(want.rows.loss, weight, dtype, of_logits), lambda: eager().loss)
    _compare_values("loss", got.loss, want.reduced.loss, bound)
    assert set(got.parts) == set(want.reduced.parts)
    for name, part in got.parts.items():
        assert part.dtype == dtype
        assert not part.requires_grad
        largest = max(1.0, *(term.scale for term in crossing.objective().terms))
        # The table's own is that of a loss.
        table = 2 * reducer.bound(want.rows.parts[name], largest, dtype, of_logits)
        bound = _Bound(table, lambda name=name: eager().parts[name])
        _compare_values(f"part {name!r}", part, want.reduced.parts[name], bound)
    if crossing.mode != "no_grad":
        finite = want.rows.loss.isfinite().flatten()
        if crossing.standardize == "class":
            finite[:] = finite.all()
        _compare_gradients(crossing, inputs, reducer, finite, got.gradient, want.reduced.gradient)


def rounding_weight(objective: Objective) -> float:
    """W of the documentation: what roundings of a probability are multiplied by."""
    weights = (term.scale * (sum(term.mass) + sum(map(sum, term.groups))) for term in objective.terms)
    return objective.ce_weight + sum(weights)


def _rounding_of_standardized(crossing: Crossing, inputs: Inputs, valid: Tensor) -> float:
    """What a loss may be off by as standardised logits are float32.

    Two roundings of the largest, over T: they change log-ratios by as much, and probabilities, which multiply
    log-ratios of up to twice the largest over T.
    """
    objective = crossing.objective()
    if objective.standardize is None or not valid.any():
        return 0.0
    largest = 0.0
    for logits in (inputs.student, inputs.teacher):
        rows = _rows(logits, inputs.options["class_dim"])[:, : crossing.classes].double()
        standard = reference.standardize(rows.where(valid[:, None], 0.0), valid, objective)[valid]
        largest = max(largest, standard[standard.isfinite()].abs().amax().item() if standard.isfinite().any() else 0.0)
    exponents = [largest / term.temperature for term in objective.terms]
    weights = [term.scale * (sum(term.mass) + sum(map(sum, term.groups))) for term in objective.terms]
    return sum(2 * 2.0**-24 * x * (1 + 2 * x) * weight for x, weight in zip(exponents, weights, strict=True))


class _Reducer:
    """The bounds of samples under a call's reduction."""

    def __init__(self, crossing: Crossing, inputs: Inputs) -> None:
        self.reduction = crossing.reduction
        target, weight = inputs.options.get("target"), inputs.options.get("sample_weight")
        samples = _sample_shape(crossing)
        self.weight = torch.ones(samples, dtype=F64) if weight is None else weight.double()
        if target is not None:
            self.weight = self.weight.where(target != -100, 0.0)
        denominator = float(inputs.options.get("denominator", 1.0))
        counts = {"none": 1.0, "sum": 1.0, "batchmean": inputs.student.shape[0], "mean": float(self.weight.sum())}
        self.count = counts.get(self.reduction, denominator) or 1.0
        upstream = torch.tensor(1.0) if inputs.upstream is None else inputs.upstream
        #: What each sample's gradient is multiplied by, ``(N,)``.
        self.factor = torch.where(self.weight > 0, self.weight * upstream.double() / self.count, 0.0).flatten()

    def bound(self, rows: Tensor, weight: float, dtype: torch.dtype, of_logits: float) -> Tensor:
        """What the reduced loss may be off by, given each sample's weighted loss, and by its logits' own roundings."""
        relative, unit = (2e-6, 2.0**-24) if dtype == F32 else (1e-12, 2.0**-49)
        units = 1 if int((self.weight > 0).sum()) >= 256 and self.reduction != "none" else 8
        rows = rows.double().abs().nan_to_num(0.0, 0.0)
        each = relative * torch.maximum(self.weight, rows) + (units * unit * weight + of_logits) * self.weight
        return each if self.reduction == "none" else each.sum() / self.count


class _Bound(NamedTuple):
    """What values may be off by: the table's, or twice what the eager float32 formula's worst is."""

    table: Tensor
    eager: Callable[[], Tensor]


def _compare_values(what: str, got: Tensor, want: Tensor, bound: _Bound) -> None:
    got, want = got.double(), want.double()
    same = (got == want) | (got.isnan() & want.isnan())
    error = torch.where(same, 0.0, (got - want).abs()).nan_to_num(math.inf, math.inf)
    excess = torch.where(same, 0.0, error / bound.table)
    if not (excess <= 1).all():
        of_eager = (bound.eager().double() - want).abs()
        excess = torch.where(same, 0.0, error / torch.maximum(bound.table, 2 * of_eager[of_eager.isfinite()].amax()))
    if not (excess <= 1).all():
        worst = int(excess.flatten().argmax())
        values = f"{got.flatten()[worst]:.9g}, expected {want.flatten()[worst]:.9g}"
        raise AssertionError(f"{what} is {values}: {excess.max():.3g} times the bound")


def _rows(logits: Tensor, class_dim: int) -> Tensor:
    return logits.movedim(class_dim, -1).flatten(0, -2)


def _compare_gradients(
    crossing: Crossing, inputs: Inputs, reducer: _Reducer, finite: Tensor, got: Tensor, want: Tensor
) -> None:
    """norm(error) <= tolerance * norm(want), and where that is less than rounding leaves, what rounding leaves.

    That is twice the eager float32 formula's error, 4 roundings of the gradient's terms before they cancel (saturated
    and nearly equal pairs), and what underflows in the student's dtype. ``finite`` are samples with a finite loss.
    """
    assert got.dtype == inputs.student.dtype
    class_dim = inputs.options["class_dim"]
    got, want = (_rows(x, class_dim).double() for x in (got, want))
    beyond = got[:, crossing.classes :]
    assert (beyond == 0).all(), f"gradient beyond num_classes is {beyond[beyond != 0][:3].tolist()}"
    got, want = (x[:, : crossing.classes] for x in (got, want))
    valid = reducer.weight.flatten() > 0
    outside = got[~valid]
    assert (outside == 0).all(), f"gradient of samples that do not count is {outside[outside != 0][:3].tolist()}"
    # Of an infinite loss there is no gradient to compare, nor of one that the student's dtype has no room for.
    known = want.to(inputs.student.dtype).isfinite().all(1) & valid & finite
    strange = (known & ~got.isfinite().all(1)).nonzero().flatten().tolist()
    assert not strange, f"gradient is not finite in samples {strange[:9]}"
    error, norm = (got - want)[known].norm().item(), want[known].norm().item()
    dtype = inputs.student.dtype
    unit = 2.0**-24 if arithmetic_dtype(inputs.student, inputs.teacher) == F32 else 2.0**-53
    bound = GRADIENT_TOLERANCE[dtype] * norm
    if error > bound:
        size = (gradient_size(crossing, inputs, valid) * reducer.factor[:, None])[known].norm().item()
        smallest = torch.finfo(dtype).smallest_normal * (torch.finfo(dtype).eps if dtype == F16 else 1)
        if arithmetic_dtype(inputs.student, inputs.teacher) == F32:  # float64 has no such excuse
            eager = _rows(_by_reference(crossing, _shifted(crossing, inputs), F32).reduced.gradient, class_dim).double()
            bound += 2 * (eager[:, : crossing.classes] - want)[known].norm().nan_to_num(0.0, 0.0).item()
        if crossing.standardize == "sample":
            # Without deviation the kernels multiply by 1e-30, which keeps -inf what it is.
            smallest = max(smallest, 1e-29)
        if dtype in (F16, BF16) and crossing.mode == "fused" and crossing.upstream != "ones":
            # A gradient that waits in 16 bits for its factor is rounded twice, of few numbers both times unluckily.
            bound += torch.finfo(dtype).eps / 2 * norm
        bound += 4 * unit * size + smallest * math.sqrt(got.numel())
    assert error <= bound, f"gradient: error {error:.3g} of {norm:.3g} is {error / bound:.3g} times the bound"


def gradient_size(crossing: Crossing, inputs: Inputs, valid: Tensor) -> Tensor:
    """The size of the terms of each logit's gradient before they cancel, ``(N, C)``.

    Standardised logits are themselves rounded, which an exponential multiplies by their size over the temperature.
    """
    objective = crossing.objective()
    sides = []
    for logits in (inputs.student, inputs.teacher):
        rows = _rows(logits.detach(), inputs.options["class_dim"])[:, : crossing.classes].double()
        sides.append(rows.where(valid[:, None], 0.0))
    target = inputs.options.get("target", torch.zeros(len(valid))).flatten().long().clamp(min=0)
    size = torch.zeros_like(sides[0])
    if objective.ce_weight:
        size += objective.ce_weight * (sides[0].softmax(1) + torch.nn.functional.one_hot(target, crossing.classes))
    standard = [reference.standardize(rows, valid, objective) for rows in sides]
    terms = torch.zeros_like(size)
    for term in objective.terms:
        groups = reference.partition_masks(term.partition, standard[1], target)
        terms += _term_size(term, *(rows / term.temperature for rows in standard), groups)
    if objective.standardize is None or not valid.any():
        return size + terms
    largest = torch.stack([rows.where(rows.isfinite(), 0.0).abs().amax(1) for rows in standard]).amax(0)
    terms *= 1 + largest[:, None] / min(term.temperature for term in objective.terms)
    counted = sides[0][valid] if objective.standardize == "class" else sides[0]
    deviation = torch.from_numpy(oracle.deviation(objective, counted.numpy()))
    deviation = deviation.where(deviation != 0, math.inf)
    if F64 in crossing.dtypes:  # float32's kernels have their moments in double
        known = sides[0].where(sides[0].isfinite(), 0.0)
        terms *= 1 + known.abs().amax(0 if objective.standardize == "class" else 1, keepdim=True) / deviation
    return size + terms / deviation


def _term_size(term: Term, a: Tensor, b: Tensor, groups: list[Tensor]) -> Tensor:
    """Of one term, in the student's standardised logits: each probability by what it is weighted with."""

    def size(log_q: Tensor, log_p: Tensor, weights: tuple[float, float]) -> Tensor:
        q, p = log_q.exp(), log_p.exp()
        # A gap is a difference of rounded logits even where a probability underflows, of saturated pairs say.
        gap = (log_q - log_p).nan_to_num(0.0, 0.0, 0.0).abs()
        return sum(weights) * (q + p) + weights[1] * q * (gap + (q * gap).sum(1, keepdim=True))

    def logs(x: Tensor, group: Tensor) -> Tensor:
        masked = x.masked_fill(~group, -math.inf)
        shifted = masked - masked.amax(1, keepdim=True).nan_to_num(neginf=0.0)
        return shifted.log_softmax(1).nan_to_num(nan=-math.inf, neginf=-math.inf)

    masses = [
        torch.stack([x.masked_fill(~group, -math.inf).logsumexp(1) for group in groups], 1).log_softmax(1)
        for x in (a, b)
    ]
    of_mass, total = size(*masses, term.mass), torch.zeros_like(a)
    for g, (group, weights) in enumerate(zip(groups, term.groups, strict=True)):
        log_q, log_p = (logs(x, group) for x in (a, b))
        several = group.sum(1, keepdim=True) > 1
        total += torch.where(several, size(log_q, log_p, weights), 0.0) + log_q.exp() * of_mass[:, g : g + 1]
    return total * term.scale / term.temperature


def check_reference(crossing: Crossing) -> None:
    """Holds the float64 reference to formulas that share nothing with it, for fewer samples where those take long."""
    if crossing.classes > 100:
        crossing = replace(crossing, samples=min(crossing.samples, 8))
    inputs = make(crossing)
    got = _by_reference(crossing, inputs, F64)
    reducer = _Reducer(crossing, inputs)
    valid = reducer.weight.flatten() > 0
    if not valid.any():
        assert all((x == 0).all() for x in (got.reduced.loss, *got.reduced.parts.values(), got.reduced.gradient))
        return
    sides = []
    for logits in (inputs.student, inputs.teacher):
        rows = _rows(logits.detach(), inputs.options["class_dim"])[:, : crossing.classes]
        sides.append(rows.double()[valid].numpy())
    target = inputs.options.get("target", torch.zeros(len(valid))).flatten().long()[valid].numpy()
    want = oracle.losses(crossing.objective(), *sides, target, reducer.factor[valid].numpy())
    weights = reducer.weight.flatten()[valid].numpy()
    close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11 * max(1.0, rounding_weight(crossing.objective())))
    for what, rows, reduced, expected in [
        ("loss", got.rows.loss, got.reduced.loss, want.loss),
        *((f"part {name!r}", part, got.reduced.parts[name], want.parts[name]) for name, part in got.rows.parts.items()),
    ]:
        close(rows.flatten()[valid].numpy(), expected * weights, err_msg=what)
        if crossing.reduction != "none":
            close(reduced.numpy(), (expected * weights).sum() / reducer.count, err_msg=what)
    gradient = _rows(got.reduced.gradient, inputs.options["class_dim"])
    finite = np.isfinite(want.loss)
    if crossing.standardize == "class":
        finite[:] = finite.all()
    known = want.gradient[finite].astype(np.float64)
    error = np.linalg.norm(gradient[valid][finite, : crossing.classes].numpy() - known)
    size = float((gradient_size(crossing, inputs, valid) * reducer.factor[:, None])[valid][finite].norm())
    norm = float(np.linalg.norm(known))
    assert error <= 1e-9 * norm + 1e-11 * size, f"gradient: error {error:.3g} of {norm:.3g}, of terms of {size:.3g}"
    assert (gradient[~valid] == 0).all()
    assert (gradient[:, crossing.classes :] == 0).all()


def _shifted(crossing: Crossing, inputs: Inputs) -> Inputs:
    """The same call for float32's eager formula: what a softmax takes off anyway is taken off exactly."""
    sides = []
    for logits in (inputs.student.detach().double(), inputs.teacher.double()):
        known = logits.where(logits.isfinite(), -math.inf)
        shift = known.amax(inputs.options["class_dim"], keepdim=True)
        shifts = crossing.standardize != "class"
        sides.append(logits - shift.where(shift.isfinite(), 0.0) if shifts else logits)
    return inputs._replace(student=sides[0], teacher=sides[1])
