"""The compiled kernels of both GPU backends, run: for sm_80 and sm_90 in the simulator, or on the GPU there is.

The host code is the user's: the public API and what is behind it, with nothing changed but where launches go. The
simulator checks every access against the tensors' bounds, shared memory for races (a cluster's blocks included), global
memory for races between blocks, and that nothing is read that nobody wrote; results are held to the accuracy table
against the float64 reference. By default a call that both backends make runs on one of them. What a backend's own tiles
ask for, and what its kernels may cost, is in test_cuda_sim.py and test_triton_sim.py.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import partial
from types import ModuleType

import pytest
import torch
from helpers import INTERPRETED, Path, make_inputs, must_have_native, needed_target
from losses import LOSSES
from simulated import ARCHITECTURES
from simulated_cases import ALL, BACKENDS, Call, made_by

from kdkernels import distillation_loss
from kdkernels.objective import WHOLE, Objective, Term

pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted, not compiled")
GPUS = [pytest.param("cuda"), pytest.param("triton", marks=pytest.mark.triton)]
#: With cases that take the CUDA kernels minutes.
MORE = [pytest.param("cuda", marks=pytest.mark.cuda), GPUS[1]]
of_both = pytest.mark.parametrize("gpu", GPUS)
more_of_cuda = pytest.mark.parametrize("gpu", MORE)


def targets(gpu: str) -> ModuleType:
    """A backend's ``run`` and ``check``."""
    if gpu == "triton":
        pytest.importorskip("triton")
    module = importlib.import_module(f"{gpu}_targets")
    reason = module.missing()
    if reason is not None:
        (pytest.fail if must_have_native() else pytest.skip)(reason)
    return module


@pytest.mark.parametrize(("gpu", "call"), [case for gpu in BACKENDS for case in made_by(gpu)])
def test_call(gpu: str, call: Call) -> None:
    of, case = targets(gpu), ALL[call.loss]
    if call.older and len(ARCHITECTURES) == 1:
        pytest.skip("a GPU is one architecture")
    inputs = make_inputs(call.shape, *call.dtypes)
    path, arch = Path(gpu, call.mode), of.FIRST if call.older else of.LAST
    of.check(case, inputs.student, inputs.teacher, path, arch, target=inputs.target, **call.options)


# What does not count, and what is extreme --------------------------------------------------------------------------

#: One of each way to share a sample out: among the threads of a warp, among the blocks of a cluster or, where there is
#: none, in parts that are merged; and one thread for each.
LAYOUTS = {"rows": (21, 90), "split rows": (5, 17001), "pixels": (2, 21, 5, 7), "older": (3, 33001)}
of_layouts = pytest.mark.parametrize("layout", LAYOUTS)


def architecture(of: ModuleType, layout: str) -> int:
    return of.FIRST if layout == "older" else of.LAST


@more_of_cuda
@of_layouts
@pytest.mark.parametrize("name", ["dkd", "pr_dkd"])
def test_samples_that_do_not_count(name: str, layout: str, gpu: str) -> None:
    """Ignored samples and such of weight 0 hold NaN and inf, and are neither read into anything nor left unwritten."""
    student, teacher, target = make_inputs(LAYOUTS[layout])
    target, weight = target.flatten(), torch.rand(target.numel()) + 0.5
    target[::3] = -100
    weight[1::5] = 0.0
    nothing = (target == -100) | (weight == 0)
    samples = student[:, 0].shape
    for logits, value in ((student, torch.nan), (teacher, torch.inf)):
        logits.movedim(1, -1)[nothing.reshape(samples)] = value
    options = {"target": target.reshape(samples), "sample_weight": weight.reshape(samples)}
    of = targets(gpu)
    of.check(ALL[name], student, teacher, Path(gpu, "fused"), architecture(of, layout), **options)


@more_of_cuda
@of_layouts
@pytest.mark.parametrize("name", ["dkd", "gdkd3", "bdd", "lskd"])
def test_masked_classes(name: str, layout: str, gpu: str) -> None:
    """Classes of -inf in both add nothing; in the teacher alone they add nothing to forward divergences."""
    student, teacher, target = make_inputs(LAYOUTS[layout])
    for logits in (student, teacher):
        logits[:, 3:6] = -torch.inf
    if name != "bdd":  # the reverse divergence would be infinite
        teacher[:, 7] = -torch.inf
    of, options = targets(gpu), needed_target(ALL[name], target.clamp(min=9))
    of.check(ALL[name], student, teacher, Path(gpu, "fused"), architecture(of, layout), **options)


@more_of_cuda
@of_layouts
def test_target_far_above_the_rest(layout: str, gpu: str) -> None:
    student, teacher, target = make_inputs(LAYOUTS[layout], scale=1.0)
    index = target.unsqueeze(1)
    for logits in (student, teacher):
        logits.scatter_add_(1, index, torch.full(index.shape, 1e4))
    of, path = targets(gpu), Path(gpu, "fused")
    of.check(ALL["dkd"], student, teacher, path, architecture(of, layout), target=target, reduction="sum")


@more_of_cuda
@of_layouts
def test_ties_of_the_top_k(layout: str, gpu: str) -> None:
    """The lowest index wins: the student's logits differ where the teacher's are alike."""
    student, teacher, _ = make_inputs(LAYOUTS[layout])
    teacher = (teacher / 2).round() * 2
    of = targets(gpu)
    of.check(ALL["gdkd"], student, teacher, Path(gpu, "fused"), architecture(of, layout))


@of_both
@pytest.mark.xfail(strict=True, raises=AssertionError, reason="what underflows in float32 adds nothing")
def test_masked_in_the_teacher_alone_where_the_student_underflows(gpu: str) -> None:
    """The reverse divergence is infinite, however little the student's probability is."""
    student, teacher, _ = make_inputs((3, 40))
    student[:, 7], teacher[:, 7] = -300.0, -torch.inf
    value = Objective((Term(1.0, WHOLE, (0.0, 0.0), ((0.0, 1.0),)),))
    case, of = replace(ALL["kd"], objective=value, call=partial(distillation_loss, objective=value)), targets(gpu)
    got, _ = of.run(case, student, teacher, Path(gpu, "fused"), of.LAST, reduction="none")
    assert torch.equal(got.loss, torch.full((3,), torch.inf))


# Views and numbers --------------------------------------------------------------------------------------------------


@of_both
def test_targets_out_of_range(gpu: str) -> None:
    """No access out of bounds; the sample's loss is NaN and others are untouched: rows of whole vectors are added up
    in the same order wherever they are."""
    student, teacher, target = make_inputs((6, 92))
    target[2], target[4] = 92, -1
    of, path = targets(gpu), Path(gpu, "fused")
    got, _ = of.run(ALL["dkd"], student, teacher, path, of.LAST, torch.ones(6), target=target, reduction="none")
    right = torch.tensor([0, 1, 3, 5])
    assert got.loss.isnan().tolist() == [False, False, True, False, True, False]
    part = student[right], teacher[right], path, of.LAST, torch.ones(4)
    want, _ = of.run(ALL["dkd"], *part, target=target[right], reduction="none")
    assert torch.equal(got.loss[right], want.loss)
    assert torch.equal(got.gradient[right], want.gradient)


@of_both
def test_views(gpu: str) -> None:
    """Strides and offsets: each view's bounds are its own, not its storage's."""
    student, teacher, target = make_inputs((13, 40))
    wide = torch.full((13, 50), torch.nan)
    wide[:, 3:43] = student
    tall = torch.full((40, 13), torch.nan).t()
    tall.copy_(teacher)
    of = targets(gpu)
    of.check(LOSSES["dkd"], wide[:, 3:43], teacher, Path(gpu, "fused"), of.LAST, target=target)
    of.check(LOSSES["dkd"], wide[:, 3:43], tall, Path(gpu, "recompute"), of.LAST, target=target)


@of_both
def test_padded_vocabularies(gpu: str) -> None:
    """``num_classes``: the padding is never read (it holds NaN) and its gradient is 0."""
    student, teacher, target = make_inputs((7, 100))
    student[:, 90:], teacher = torch.nan, teacher[:, :96].contiguous()
    teacher[:, 90:] = torch.nan
    case, target, of, path = LOSSES["dkd"], target.clamp(max=89), targets(gpu), Path(gpu, "fused")
    got, _ = of.run(case, student, teacher, path, of.LAST, target=target, num_classes=90)
    whole, _ = of.run(case, student[:, :90], teacher[:, :90], path, of.LAST, target=target)
    assert torch.equal(got.loss, whole.loss)
    # Triton's sweep is the same for both; the CUDA kernels' vectors begin elsewhere.
    rtol, atol = (1e-6, 1e-9) if gpu == "cuda" else (0.0, 0.0)
    torch.testing.assert_close(got.gradient[:, :90], whole.gradient, rtol=rtol, atol=atol)
    assert not got.gradient[:, 90:].any()


@of_both
def test_denominator_and_factor(gpu: str) -> None:
    student, teacher, target = make_inputs((7, 90))
    options, of = {"target": target, "denominator": torch.tensor(11.0)}, targets(gpu)
    of.check(LOSSES["dkd"], student, teacher, Path(gpu, "fused"), of.LAST, torch.tensor(3.0), **options)
