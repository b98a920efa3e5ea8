"""The table of losses that every test iterates over. A new loss gets its tests by one more row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

import kdkernels
from kdkernels import objective
from kdkernels.objective import TARGET, WHOLE, Objective, Partition, Term


@dataclass(frozen=True)
class Case:
    """One loss: what it is, how a user calls it, and what it cannot do without."""

    name: str
    objective: Objective
    #: ``call(student, teacher, target=..., **options)``, the public function with this loss's arguments.
    call: Callable[..., Any]
    #: Keys of ``return_parts=True``, written out here so that the names cannot drift.
    parts: tuple[str, ...]
    needs_target: bool = False

    @property
    def smallest(self) -> int:
        """The least class count for which the loss is defined."""
        return self.objective.smallest_class_count


def _by_objective(name: str, value: Objective, parts: tuple[str, ...], needs_target: bool = False) -> Case:
    """A loss without a function of its own."""
    return Case(name, value, partial(kdkernels.distillation_loss, objective=value), parts, needs_target)


_GDKD = ("mass", "top", "rest")
_GDKD3 = ("mass", "top1", "top", "rest")
_DKD = ("mass", "target", "rest")
_BDD = ("whole_forward", "whole_reverse")

# Every weight of a term at once, all different, so that no two of them can be mistaken for each other.
_EVERYTHING = Objective(
    (
        Term(1.5, Partition("top1_topk", 3), (0.7, 0.4), ((0.3, 0.6), (1.1, 0.2), (0.9, 1.3))),
        Term(3.0, TARGET, (0.25, 0.5), ((0.1, 0.8), (1.2, 0.35)), square_temperature=False),
    ),
    ce_weight=0.45,
)

_CASES = (
    Case("kd", objective.kd(4.0), partial(kdkernels.kd_loss, temperature=4.0), ("whole",)),
    Case(
        "kd_ce",
        objective.adjust(objective.kd(2.0), ce_weight=0.1),
        partial(kdkernels.kd_loss, temperature=2.0, ce_weight=0.1),
        ("ce", "whole"),
        needs_target=True,
    ),
    _by_objective("kd_unscaled", Objective((Term(3.0, WHOLE, square_temperature=False),)), ("whole",)),
    Case("reverse_kd", objective.reverse_kd(4.0), partial(kdkernels.reverse_kd_loss, temperature=4.0), ("whole",)),
    _by_objective("symmetric_kd", objective.symmetric_kd(4.0), ("whole",)),
    Case("bdd", objective.bdd(), kdkernels.bdd_loss, _BDD),
    Case(
        "bdd_two_temperatures",
        objective.bdd(0.7, 1.5, 4.0, 2.0),
        partial(
            kdkernels.bdd_loss,
            forward_weight=0.7,
            reverse_weight=1.5,
            forward_temperature=4.0,
            reverse_temperature=2.0,
        ),
        _BDD,
    ),
    Case("dkd", objective.dkd(), kdkernels.dkd_loss, _DKD, needs_target=True),
    Case(
        "dkd_imagenet",
        objective.dkd(1.0, 0.5, 1.0),
        partial(kdkernels.dkd_loss, alpha=1.0, beta=0.5, temperature=1.0),
        _DKD,
        needs_target=True,
    ),
    Case(
        "dkd_reverse",
        objective.dkd(kl_type="reverse"),
        partial(kdkernels.dkd_loss, kl_type="reverse"),
        _DKD,
        needs_target=True,
    ),
    Case(
        "dkd_both",
        objective.dkd(0.5, 2.0, 3.0, kl_type="both"),
        partial(kdkernels.dkd_loss, alpha=0.5, beta=2.0, temperature=3.0, kl_type="both"),
        _DKD,
        needs_target=True,
    ),
    _by_objective("dkd_top1", objective.dkd_top1(), _GDKD),
    Case("gdkd", objective.gdkd(), kdkernels.gdkd_loss, _GDKD),
    Case("gdkd_k1", objective.gdkd(k=1), partial(kdkernels.gdkd_loss, k=1), _GDKD),
    Case(
        "gdkd_worst",
        objective.gdkd(3, 0.5, 2.0, 1.0, 2.0, "worst"),
        partial(kdkernels.gdkd_loss, k=3, w0=0.5, w1=2.0, w2=1.0, temperature=2.0, strategy="worst"),
        _GDKD,
    ),
    Case("gdkd_reverse", objective.gdkd(kl_type="reverse"), partial(kdkernels.gdkd_loss, kl_type="reverse"), _GDKD),
    Case(
        "gdkd_both_ce",
        objective.adjust(objective.gdkd(kl_type="both"), ce_weight=1.0),
        partial(kdkernels.gdkd_loss, kl_type="both", ce_weight=1.0),
        ("ce", *_GDKD),
        needs_target=True,
    ),
    # k = 20 is past the class counts a register can hold and past any small fixed-size list of leaders.
    Case("gdkd_k20", objective.gdkd(k=20), partial(kdkernels.gdkd_loss, k=20), _GDKD),
    Case("gdkd3", objective.gdkd3(), kdkernels.gdkd3_loss, _GDKD3),
    Case(
        "gdkd3_worst_both",
        objective.gdkd3(2, 1.0, 2.0, 3.0, 2.0, "worst", "both"),
        partial(kdkernels.gdkd3_loss, k=2, w0=1.0, w1=2.0, w2=3.0, temperature=2.0, strategy="worst", kl_type="both"),
        _GDKD3,
    ),
    _by_objective(
        "reverse_mass",
        Objective((Term(2.0, Partition("topk", 2), (0.0, 1.0), ((0.0, 2.0), (0.0, 3.0))),)),
        _GDKD,
    ),
    _by_objective(
        "whole_and_topk",
        Objective((Term(2.0, WHOLE), Term(4.0, Partition("topk", 3), (1.0, 0.5), ((1.0, 0.0), (0.0, 2.0))))),
        ("whole_1", "mass_2", "top_2", "rest_2"),
    ),
    # Two selections of the teacher's classes from opposite ends: neither may disturb what the other left.
    _by_objective(
        "best_and_worst",
        Objective(
            (
                Term(4.0, Partition("topk", 4), (1.0, 0.0), ((1.0, 0.0), (2.0, 0.0))),
                Term(2.0, Partition("topk", 2, largest=False), (1.0, 0.0), ((0.0, 1.0), (0.0, 2.0))),
            )
        ),
        ("mass_1", "top_1", "rest_1", "mass_2", "top_2", "rest_2"),
    ),
    # Its temperature is a power of two, so that the divergence's exponentials serve the cross entropy, leaders' too.
    Case(
        "gdkd_ce",
        objective.adjust(objective.gdkd(), ce_weight=1.0),
        partial(kdkernels.gdkd_loss, ce_weight=1.0),
        ("ce", *_GDKD),
        needs_target=True,
    ),
    # The cooler term comes first and takes squares of the other's exponentials; the cross entropy has its own.
    _by_objective(
        "dkd_two_temperatures",
        Objective(
            (
                Term(1.5, TARGET, (1.0, 0.3), ((0.0, 0.0), (2.0, 0.5))),
                Term(3.0, TARGET, (0.5, 0.0), ((0.0, 0.0), (0.7, 1.2))),
            ),
            ce_weight=0.3,
        ),
        ("ce", "mass_1", "target_1", "rest_1", "mass_2", "target_2", "rest_2"),
        needs_target=True,
    ),
    _by_objective(
        "everything",
        _EVERYTHING,
        ("ce", "mass_1", "top1_1", "top_1", "rest_1", "mass_2", "target_2", "rest_2"),
        needs_target=True,
    ),
)

LOSSES: dict[str, Case] = {case.name: case for case in _CASES}

_STANDARDIZED = (
    Case(
        "pr_kd",
        objective.pr_kd(4.0),
        partial(kdkernels.kd_loss, temperature=4.0, standardize="class"),
        ("whole",),
    ),
    # The divergences see the standardised logits, the cross entropy the raw ones.
    Case(
        "pr_dkd",
        objective.adjust(objective.pr_dkd(), ce_weight=1.0),
        partial(kdkernels.dkd_loss, standardize="class", ce_weight=1.0),
        ("ce", *_DKD),
        needs_target=True,
    ),
    Case("pr_gdkd", objective.pr_gdkd(), partial(kdkernels.gdkd_loss, standardize="class"), _GDKD),
    Case(
        "pr_bdd",
        objective.adjust(objective.bdd(0.7, 1.5, 4.0, 2.0), standardize="class", correction=1),
        partial(
            kdkernels.bdd_loss,
            forward_weight=0.7,
            reverse_weight=1.5,
            forward_temperature=4.0,
            reverse_temperature=2.0,
            standardize="class",
            correction=1,
        ),
        _BDD,
    ),
    _by_objective("lskd", objective.lskd(), ("whole",)),
    Case(
        "ls_dkd",
        objective.ls_dkd(),
        partial(kdkernels.dkd_loss, temperature=2.0, standardize="sample"),
        _DKD,
        needs_target=True,
    ),
    Case(
        "ls_gdkd",
        objective.ls_gdkd(),
        partial(kdkernels.gdkd_loss, temperature=2.0, standardize="sample"),
        _GDKD,
    ),
    Case(
        "ls_reverse",
        objective.adjust(objective.reverse_kd(3.0), standardize="sample"),
        partial(kdkernels.reverse_kd_loss, temperature=3.0, standardize="sample"),
        ("whole",),
    ),
)

#: The losses that standardise the logits first, by class (a batch at a time) or by sample.
STANDARDIZED: dict[str, Case] = {case.name: case for case in _STANDARDIZED}

#: For tests in which the loss is not what varies: one, two and three groups, both directions, one and two terms, CE.
SOME_LOSSES: dict[str, Case] = {
    name: LOSSES[name]
    for name in ("kd", "reverse_kd", "bdd_two_temperatures", "dkd", "gdkd", "gdkd_ce", "gdkd3", "everything")
}


def each(cases: dict[str, Case]) -> pytest.MarkDecorator:
    """``@each(LOSSES)``: the test runs once a loss, with the loss's name as its id."""
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())
