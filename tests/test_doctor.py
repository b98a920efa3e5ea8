"""``python -m kdkernels``: that it notices wrong results, and what it says to do."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import device_of, require
from torch import Tensor

from kdkernels import dispatch, doctor, ops
from kdkernels.backends import BACKENDS


@pytest.mark.parametrize("case", doctor.CASES)
def test_right(case: str, native_backend: str) -> None:
    done = doctor.check(native_backend, device_of(native_backend).type, case)
    assert done.problem is None
    assert done.gradient_error > 0  # rounding is seen: the kernels were compared, not the reference with itself


def test_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    require("cpu")
    assert doctor.main() == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "cpu on cpu" in line)
    assert "right" in line
    assert all(case in line for case in doctor.CASES)


class Outputs(NamedTuple):
    """What the op ``fused`` returns."""

    loss: Tensor
    parts: Tensor | None
    gradient: Tensor
    sums: Tensor | None


def raises(outputs: Outputs) -> None:
    raise RuntimeError("no kernel image\nis available")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda outputs: outputs._replace(loss=1.1 * outputs.loss), "KD is "),
        (lambda outputs: outputs._replace(loss=outputs.loss * torch.nan), "KD is nan where the reference is "),
        (lambda outputs: outputs._replace(gradient=1.1 * outputs.gradient), "its gradient off by 1.0e-01"),
        (lambda outputs: outputs._replace(gradient=outputs.gradient * torch.nan), "its gradient off by nan"),
        (raises, "KD raised RuntimeError: no kernel image;"),
    ],
    ids=["loss", "loss of NaN", "gradient", "gradient of NaN", "error"],
)
def test_a_wrong_result(
    change: Callable[[Outputs], Any],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of kernels whose outputs are changed."""
    require("cpu")
    way = copy.copy(BACKENDS["cpu"]._fused)
    op = way.op
    way.op = lambda *inputs: change(Outputs(*op(*inputs)))
    monkeypatch.setattr(BACKENDS["cpu"], "_fused", way)
    assert doctor.main() == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "cpu on cpu" in line)
    assert "WRONG" in line
    assert said in line


def test_the_exit_status() -> None:
    """Triton without its interpreter takes CPU tensors where told to, and then cannot serve them."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "kdkernels"],
        cwd=Path(doctor.__file__).parent.parent,
        env=os.environ | {dispatch.TRITON_CPU: "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "check        triton on cpu: WRONG: KD raised " in done.stdout


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A machine without a GPU and with the CPU kernels."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ops, "unavailable", None)
    monkeypatch.setattr(doctor, "_NVIDIA_DRIVER", tmp_path / "none")
    monkeypatch.setattr(dispatch, "default_backend", "auto")
    return monkeypatch


def test_no_advice(healthy: pytest.MonkeyPatch) -> None:
    assert doctor.advice() == []


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("the native extension was not built (no C++ compiler at installation)", "install a C++20 compiler"),
        ("the native extension _C.abi3.so could not be loaded: undefined symbol", "it needs torch 2.10 or later"),
    ],
)
def test_advice_without_the_extension(healthy: pytest.MonkeyPatch, reason: str, said: str) -> None:
    healthy.setattr(ops, "unavailable", reason)
    (sentence,) = doctor.advice()
    assert said in sentence


def test_advice_on_a_gpu(healthy: pytest.MonkeyPatch) -> None:
    """How to get what is missing; Triton is asked for only where no kernels serve the GPU."""
    healthy.setattr(torch.cuda, "is_available", lambda: True)
    healthy.setattr(torch.version, "cuda", "13.0")
    healthy.setattr(ops, "cuda_unavailable", "the extension was built without CUDA kernels")
    healthy.setattr(ops, "triton_unavailable", None)
    (sentence,) = doctor.advice()
    assert "install nvcc" in sentence
    healthy.setattr(ops, "triton_unavailable", "triton is not installed")
    assert "`pip install triton`" in doctor.advice()[1]


@pytest.mark.parametrize(("version", "said"), [(None, "built for no CUDA"), ("13.0", "built for CUDA 13.0")])
def test_advice_for_a_driver_that_torch_does_not_use(
    healthy: pytest.MonkeyPatch, tmp_path: Path, version: str | None, said: str
) -> None:
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module")
    healthy.setattr(doctor, "_NVIDIA_DRIVER", tmp_path / "version")
    healthy.setattr(torch.version, "cuda", version)
    (sentence,) = doctor.advice()
    assert said in sentence


def test_advice_for_a_chosen_backend(healthy: pytest.MonkeyPatch) -> None:
    healthy.setattr(dispatch, "default_backend", "reference")
    (sentence,) = doctor.advice()
    assert f"unset {dispatch.ENVIRONMENT}" in sentence
