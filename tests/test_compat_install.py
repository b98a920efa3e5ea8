"""compat's install(): functions put into stand-ins for the repositories, with those repositories' files."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kdkernels.compat import gdkd, luminet, mdistiller

STUDENT, TEACHER = torch.randn(2, 4, 9)
Y = torch.tensor([[0], [3], [8], [5]])

#: Of each file of a repository: the loss it defines, how its distiller calls it, and what serves it here.
FILES = {
    "KD": ("kd_loss(logits_student, logits_teacher, temperature)", "kd_loss(s, t, 4.0)", mdistiller),
    "DKD": (
        "dkd_loss(logits_student, logits_teacher, target, alpha, beta, temperature)",
        "dkd_loss(s, t, y, 1.0, 8.0, 4.0)",
        mdistiller,
    ),
    "DKDMod": (
        "dkd_loss(logits_student, logits_teacher, target, alpha, beta, temperature, mask_magnitude, kl_type, "
        'strategy="target")',
        'dkd_loss(s, t, y, 1.0, 8.0, temperature=4.0, mask_magnitude=1000, kl_type="both", strategy="target")',
        gdkd,
    ),
    "GDKD": (
        "gdkd_loss(logits_student, logits_teacher, target, k, strategy, w0, w1, w2, temperature, kl_type)",
        'gdkd_loss(s, t, y, 5, "best", 1.0, 1.0, 8.0, 4.0, kl_type="forward")',
        gdkd,
    ),
    "GDKD3": (
        "gdkd_loss(logits_student, logits_teacher, target, k, w0, w1, w2, temperature)",
        "gdkd_loss(s, t, y, 4, 1.0, 1.0, 8.0, 4.0)",
        gdkd,
    ),
    "LSKD": ("kd_loss(logits_student, logits_teacher, temperature)", "kd_loss(s, t, 2.0)", gdkd),
    "Luminet": (
        "luminet_loss(logits_student, logits_teacher, target, alpha, temperature)",
        "luminet_loss(s, t, y, 33.0, 4.0)",
        luminet,
    ),
}
VALUES = {"KD": 0, "DKD": 0, "DKDMod": 3, "GDKD": 4, "GDKD3": 4, "LSKD": 5, "Luminet": 0}  # 0: the loss alone


def write(root: Path, package: str, names: list[str]) -> None:
    """A package with a file for each name, in which a class of the same name calls the loss that the file defines."""
    folder = root / package / "distillers"
    folder.mkdir(parents=True)
    (root / package / "__init__.py").write_text("")
    (folder / "__init__.py").write_text("".join(f"from .{name} import {name}\n" for name in names))
    for name in names:
        signature, call, _ = FILES[name]
        (folder / f"{name}.py").write_text(f"""
table = [[]]  # neither hashable nor a function


def {signature}:
    return "theirs"


class {name}:
    def forward_train(self, s, t, y):
        return {call}
""")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ModuleType]]:
    """Writes a stand-in for a repository onto the path; its package is forgotten after the test."""
    monkeypatch.syspath_prepend(tmp_path)
    written: list[str] = []

    def make(*names: str, package: str = "mdistiller") -> ModuleType:
        written.append(package)
        write(tmp_path, package, list(names))
        importlib.invalidate_caches()
        return importlib.import_module(f"{package}.distillers")

    yield make
    for package in written:
        for name in [name for name in sys.modules if f"{name}.".startswith(f"{package}.")]:
            del sys.modules[name]


def loss_of(distillers: ModuleType, name: str) -> Any:
    return getattr(distillers, name)().forward_train(STUDENT, TEACHER, Y)


@pytest.mark.parametrize(
    ("module", "names", "functions"),
    [
        (mdistiller, ["KD", "DKD"], ["DKD.dkd_loss", "KD.kd_loss"]),
        (
            gdkd,
            ["DKDMod", "GDKD", "GDKD3", "LSKD"],
            ["DKDMod.dkd_loss", "GDKD.gdkd_loss", "GDKD3.gdkd_loss", "LSKD.kd_loss"],
        ),
        (luminet, ["Luminet"], ["Luminet.luminet_loss"]),
    ],
    ids=["mdistiller", "gdkd", "luminet"],
)
def test_install_and_uninstall(
    checkout: Callable[..., ModuleType], module: ModuleType, names: list[str], functions: list[str]
) -> None:
    """Classes already imported call these functions with the repository's own call, until they are taken out again."""
    distillers = checkout(*FILES)
    wanted = [f"mdistiller.distillers.{function}" for function in functions]
    assert module.install() == wanted
    assert module.install() == wanted  # nothing more is replaced, and what was there first is not forgotten
    for name in FILES:
        got = loss_of(distillers, name)
        if name not in names:
            assert got == "theirs"
            continue
        loss, *parts = got if VALUES[name] else (got,)
        assert loss.shape == ()
        assert loss > 0
        assert len(parts) == max(VALUES[name] - 1, 0)
    assert module.uninstall() == wanted
    assert module.uninstall() == []
    assert all(loss_of(distillers, name) == "theirs" for name in FILES)


def test_all_of_them_together(checkout: Callable[..., ModuleType]) -> None:
    """The repositories made from mdistiller have its package's name and files: each install() has its own."""
    distillers = checkout(*FILES)
    for module in (mdistiller, gdkd, luminet):
        module.install()
    assert not any(isinstance(loss_of(distillers, name), str) for name in FILES)
    gdkd.uninstall()
    assert [name for name in FILES if isinstance(loss_of(distillers, name), str)] == ["DKDMod", "GDKD", "GDKD3", "LSKD"]


def test_modules_that_imported_the_function(checkout: Callable[..., ModuleType], tmp_path: Path) -> None:
    """Before install() or after it, and under another name, too."""
    checkout("GDKD")
    for name in ("before", "after"):
        (tmp_path / f"mdistiller/{name}.py").write_text("from .distillers.GDKD import gdkd_loss as the_loss\n")
    importlib.invalidate_caches()
    before = importlib.import_module("mdistiller.before")
    theirs = before.the_loss
    gdkd.install()
    after = importlib.import_module("mdistiller.after")
    assert before.the_loss is gdkd.gdkd_loss
    assert after.the_loss is gdkd.gdkd_loss
    gdkd.uninstall()
    assert before.the_loss is theirs
    assert after.the_loss is theirs


def test_another_name_of_the_package(checkout: Callable[..., ModuleType]) -> None:
    distillers = checkout("DKD", package="my_distiller")
    assert mdistiller.install("my_distiller") == ["my_distiller.distillers.DKD.dkd_loss"]
    assert loss_of(distillers, "DKD") > 0
    assert mdistiller.uninstall("my_distiller") == ["my_distiller.distillers.DKD.dkd_loss"]


def test_no_such_package() -> None:
    with pytest.raises(
        ImportError, match="package 'no_such_distiller' must be a checkout on Python's path, got: No mod"
    ):
        gdkd.install("no_such_distiller")
    with pytest.raises(TypeError, match="package must be the name of a package, got None"):
        gdkd.install(None)  # type: ignore[arg-type]


def test_a_package_without_the_functions(checkout: Callable[..., ModuleType]) -> None:
    checkout("KD")
    with pytest.raises(RuntimeError, match=r"'mdistiller' \(.*\) must have one of distillers.Luminet.luminet_loss"):
        luminet.install()


def test_a_module_that_cannot_be_imported(checkout: Callable[..., ModuleType], tmp_path: Path) -> None:
    """What the checkout itself lacks is named, and not taken for a missing loss."""
    checkout("KD")
    (tmp_path / "mdistiller/distillers/DKD.py").write_text("import a_module_that_is_not_installed\n")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_installed"):
        mdistiller.install()


def test_another_version_of_the_repository(checkout: Callable[..., ModuleType], tmp_path: Path) -> None:
    """A function with other parameters is refused, and then none is replaced."""
    distillers = checkout("GDKD3", "GDKD")
    module = importlib.import_module("mdistiller.distillers.GDKD")
    older = "logits_student, logits_teacher, target, k, strategy, w0, w1, w2, temperature"
    exec(f"def gdkd_loss({older}): return 'older'", vars(module))
    with pytest.raises(RuntimeError, match=rf"GDKD.gdkd_loss must take \(.*kl_type\) .*, got \({older}\)"):
        gdkd.install()
    assert loss_of(distillers, "GDKD3") == "theirs"
    assert gdkd.uninstall() == []
