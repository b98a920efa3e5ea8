"""Which backend serves a call, what it says when it cannot, and life without the extension."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import instruction_sets, make_inputs, require

import kdkernels
from kdkernels import _environment, autograd, dispatch, ops, reference

PACKAGE = Path(kdkernels.__file__).parent
STUDENT, TEACHER, Y = make_inputs((3, 7))
MISSING = "the native extension was not built"


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which kind of backend served each call: "reference" or "native"."""
    calls: list[str] = []

    def spy(module: object, name: str, what: str) -> None:
        original = getattr(module, name)

        def spied(*args: object, **kwargs: object) -> object:
            calls.append(what)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, spied)

    spy(reference, "distillation_loss", "reference")
    spy(autograd, "loss_of", "native")
    monkeypatch.setattr(dispatch, "default_backend", "auto")
    monkeypatch.setattr(dispatch, "_logged", set())
    return calls


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "unavailable", MISSING)


def test_a_named_backend_serves(backend: str, served: list[str]) -> None:
    kdkernels.kd_loss(STUDENT, TEACHER, backend=backend)
    assert served == ["reference" if backend == "reference" else "native"]


def test_auto_takes_the_kernels(served: list[str]) -> None:
    require("cpu")
    kdkernels.kd_loss(STUDENT, TEACHER)
    kdkernels.dkd_loss(STUDENT.bfloat16(), TEACHER.half(), Y, mode="recompute")
    assert served == ["native", "native"]


@pytest.mark.parametrize("sides", [(torch.float64, torch.float32), (torch.float16, torch.float64)], ids=str)
def test_auto_leaves_float64_to_the_reference(sides: tuple[torch.dtype, torch.dtype], served: list[str]) -> None:
    kdkernels.kd_loss(STUDENT.to(sides[0]), TEACHER.to(sides[1]))
    assert served == ["reference"]


@pytest.mark.usefixtures("no_extension")
def test_auto_falls_back_and_says_so_once(served: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="kdkernels"):
        for _ in range(3):
            kdkernels.kd_loss(STUDENT, TEACHER)
    assert served == ["reference"] * 3
    assert [record.getMessage() for record in caplog.records] == [f"backend 'cpu' is passed over: {MISSING}"]


def test_more_dimensions_than_the_kernels_hold(served: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """auto serves them all the same; the kernels asked for by name say what is too much."""
    require("cpu")
    student, teacher = (logits.reshape(3, 7, *[1] * 8) for logits in (STUDENT, TEACHER))
    with caplog.at_level(logging.WARNING, logger="kdkernels"):
        loss = kdkernels.kd_loss(student, teacher)
    assert served == ["reference"]
    assert "up to 9 dimensions, and these have 10" in caplog.text
    assert torch.allclose(loss, kdkernels.kd_loss(STUDENT, TEACHER))
    with pytest.raises(RuntimeError, match="up to 9 dimensions, and these have 10"):
        kdkernels.kd_loss(student, teacher, backend="cpu")


@pytest.mark.parametrize("sides", [(torch.float64, torch.float32), (torch.float16, torch.float64)], ids=str)
def test_the_cpu_kernels_refuse_float64(sides: tuple[torch.dtype, torch.dtype], served: list[str]) -> None:
    require("cpu")
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot serve this call: it computes in float32, and the ref"):
        kdkernels.kd_loss(STUDENT.to(sides[0]), TEACHER.to(sides[1]), backend="cpu")
    assert served == []


@pytest.mark.parametrize("backend_name", ["cuda", "triton"])
def test_gpu_kernels_serve_two_terms(backend_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "cuda_unavailable", None)
    monkeypatch.setattr(ops, "triton_unavailable", None)
    term = kdkernels.Term(2.0, kdkernels.Partition("whole"))
    two, three = (kdkernels.Objective((term,) * count) for count in (2, 3))
    reason = "it serves objectives of up to 2 terms, and this one has 3"
    assert dispatch.why_not(backend_name, "cuda", 2, three) == reason
    assert dispatch.why_not(backend_name, "cuda", 2, two) != reason
    assert dispatch.why_not("cpu", "cpu", 2, three) == ops.unavailable
    assert dispatch.why_not("reference", "cuda", 2, three) is None


def test_auto_is_silent_where_the_fastest_serves(served: list[str], caplog: pytest.LogCaptureFixture) -> None:
    require("cpu")
    with caplog.at_level(logging.DEBUG, logger="kdkernels"):
        kdkernels.kd_loss(STUDENT, TEACHER)
    assert not caplog.records


@pytest.mark.usefixtures("no_extension")
def test_a_named_backend_that_cannot_serve_raises(served: list[str]) -> None:
    with pytest.raises(RuntimeError, match=rf"backend 'cpu' cannot serve this call: {MISSING}"):
        kdkernels.kd_loss(STUDENT, TEACHER, backend="cpu")
    assert served == []


def test_a_named_backend_for_another_device(served: list[str]) -> None:
    student, teacher = STUDENT.to("meta"), TEACHER.to("meta")
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot serve this call: .*the logits are on meta"):
        kdkernels.kd_loss(student, teacher, backend="cpu")
    assert served == []


def test_other_devices_go_to_the_reference(served: list[str]) -> None:
    loss = kdkernels.kd_loss(STUDENT.to("meta"), TEACHER.to("meta"))
    assert served == ["reference"]
    assert loss.device.type == "meta"


@pytest.mark.parametrize("value", ["reference", "auto"])
def test_the_environment_chooses(value: str, served: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "default_backend", value)
    kdkernels.kd_loss(STUDENT, TEACHER)
    native = value == "auto" and dispatch.why_not("cpu", "cpu") is None
    assert served == ["native" if native else "reference"]


def test_a_named_backend_overrules_the_environment(
    backend: str, served: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "default_backend", "reference" if backend != "reference" else "cpu")
    kdkernels.kd_loss(STUDENT, TEACHER, backend=backend)
    assert served == ["reference" if backend == "reference" else "native"]


@pytest.mark.usefixtures("no_extension")
def test_the_environments_choice_raises_too(served: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "default_backend", "cpu")
    with pytest.raises(RuntimeError, match=rf"backend 'cpu' cannot serve this call: {MISSING}"):
        kdkernels.kd_loss(STUDENT, TEACHER)
    assert served == []


def test_nonsense_in_the_environment(served: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "default_backend", "fastest")
    with pytest.raises(ValueError, match=r"KDKERNELS_BACKEND must be one of .*got 'fastest'"):
        kdkernels.kd_loss(STUDENT, TEACHER)
    assert served == []


# Instruction sets ---------------------------------------------------------------------------------------------------


def test_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match=r"instruction set must be .*got 'sse9'"):
        kdkernels.set_cpu_instruction_set("sse9")


def test_auto_is_the_best_instruction_set() -> None:
    require("cpu")
    kdkernels.set_cpu_instruction_set("baseline")
    assert kdkernels.cpu_instruction_set() == "baseline"
    kdkernels.set_cpu_instruction_set("auto")
    assert kdkernels.cpu_instruction_set() == instruction_sets()[-1]


def test_an_instruction_set_the_cpu_lacks() -> None:
    require("cpu")
    before = kdkernels.cpu_instruction_set()
    for name in set(ops.INSTRUCTION_SETS) - set(instruction_sets()):
        with pytest.raises(ValueError, match=rf"instruction set '{name}' is not supported"):
            kdkernels.set_cpu_instruction_set(name)
    assert kdkernels.cpu_instruction_set() == before
    assert instruction_sets()[0] == "baseline"


# Other processes ----------------------------------------------------------------------------------------------------


def run(*arguments: str, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python process that finds the package in ``directory``."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("KDKERNELS_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env=inherited | {"PYTHONPATH": str(directory)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_report() -> None:
    require("cpu")
    asked = {"KDKERNELS_BACKEND": "reference", "KDKERNELS_DEBUG": "1", "KDKERNELS_CPU_ISA": "baseline"}
    done = run("-m", "kdkernels", directory=PACKAGE.parent, **asked)
    assert done.returncode == 0, done.stderr
    for piece in (
        f"kdkernels    {kdkernels.__version__}",
        torch.__version__,
        f"CPU kernels for {', '.join(instruction_sets())}; in use: baseline",
        "float64      logits are served by the reference backend",
        "KDKERNELS_BACKEND=reference, KDKERNELS_DEBUG=1",
        "cpu  tensors -> cpu",
        f"cuda tensors -> {next(name for name in dispatch.preference('cuda') if not dispatch.why_not(name, 'cuda'))}",
    ):
        assert piece in done.stdout


def test_the_report_without_an_environment() -> None:
    done = run("-m", "kdkernels", directory=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    assert "KDKERNELS_BACKEND=auto, KDKERNELS_DEBUG=0" in done.stdout


@pytest.mark.parametrize("name", ["KDKERNELS_BACKEND", "KDKERNELS_DEBUG", "KDKERNELS_CPU_ISA", "KDKERNELS_TRITON_CPU"])
def test_nonsense_in_the_environment_at_import(name: str) -> None:
    """The report does not say that all is well where every call would raise, nor does the import."""
    done = run("-m", "kdkernels", directory=PACKAGE.parent, **{name: "fastest"})
    assert done.returncode != 0
    assert f"ValueError: the environment variable {name} must be one of " in done.stderr
    assert "got 'fastest'" in done.stderr
    assert "->" not in done.stdout


def test_empty_variables_are_not_set() -> None:
    names = ("KDKERNELS_BACKEND", "KDKERNELS_DEBUG", "KDKERNELS_CPU_ISA", "KDKERNELS_TRITON_CPU")
    program = """
import runpy, torch, kdkernels
kdkernels.kd_loss(torch.randn(2, 3), torch.randn(2, 3))
runpy.run_module("kdkernels", run_name="__main__")
"""
    done = run("-c", program, directory=PACKAGE.parent, **dict.fromkeys(names, ""))
    assert done.returncode == 0, done.stderr
    assert "KDKERNELS_BACKEND=auto, KDKERNELS_DEBUG=0" in done.stdout
    if dispatch.why_not("cpu", "cpu") is None:
        assert f"in use: {instruction_sets()[-1]}" in done.stdout


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        *[(value, True) for value in ("1", "True", "YES", "on")],
        *[(value, False) for value in ("0", "false", "no", "OFF", "", " ")],
    ],
)
def test_switches(value: str, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.TRITON_CPU, value)
    assert _environment.switch(dispatch.TRITON_CPU) is wanted
    assert (dispatch.why_not("triton", "cpu") == ops.triton_unavailable) is wanted


def test_an_instruction_set_that_the_cpu_lacks_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One environment may serve several machines: the variable is named, and the kernels go without."""
    require("cpu")

    def refuse(name: str) -> None:
        raise ValueError(f"instruction set {name!r} is not supported")

    monkeypatch.setenv("KDKERNELS_CPU_ISA", "avx512")
    monkeypatch.setattr(ops, "set_cpu_instruction_set", refuse)
    with caplog.at_level("WARNING", "kdkernels"):
        ops._heed_environment()
    (record,) = caplog.records
    assert "KDKERNELS_CPU_ISA cannot be followed: instruction set 'avx512' is not supported" in record.message
    assert f"{kdkernels.cpu_instruction_set()!r} is used" in record.message


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a copy of the package that has no extension."""
    directory = tmp_path_factory.mktemp("bare")
    shutil.copytree(PACKAGE, directory / "kdkernels", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    return directory


def test_without_the_extension_everything_else_works(bare: Path) -> None:
    """Import, every loss with its gradient, one warning; the kernels by name raise."""
    program = """
import logging, torch, kdkernels
logging.basicConfig(format="LOG %(message)s")
student, teacher = torch.randn(2, 3, 7)
student.requires_grad_()
for loss in (kdkernels.KDLoss(), kdkernels.DKDLoss(mode="recompute"), kdkernels.GDKDLoss(k=3, ce_weight=1.0)):
    loss(student, teacher, torch.tensor([1, 2, 3])).backward()
assert student.grad.isfinite().all() and student.grad.any()
for call in (lambda: kdkernels.kd_loss(student, teacher, backend="cpu"),
             lambda: kdkernels.set_cpu_instruction_set("baseline")):
    try:
        call()
    except RuntimeError as error:
        print("RAISED", error)
"""
    done = run("-c", program, directory=bare)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("RAISED") == 2
    assert done.stdout.count("the native extension was not built") == 2
    assert done.stderr.count("LOG backend 'cpu' is passed over: the native extension was not built") == 1


def test_the_report_without_the_extension(bare: Path) -> None:
    done = run("-m", "kdkernels", directory=bare)
    assert done.returncode == 0, done.stderr
    assert "extension    missing: the native extension was not built" in done.stdout
    assert "cpu  tensors -> reference" in done.stdout


def test_an_extension_that_does_not_load(bare: Path, tmp_path: Path) -> None:
    """A file that is no library is reported, and does not break the import."""
    shutil.copytree(bare / "kdkernels", tmp_path / "kdkernels")
    (tmp_path / "kdkernels" / "_C.abi3.so").write_text("not a library")
    done = run("-m", "kdkernels", directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "extension    missing: the native extension _C.abi3.so could not be loaded" in done.stdout
