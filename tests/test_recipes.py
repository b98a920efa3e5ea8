"""Every script of examples/recipes runs and finds kdkernels equal to its framework's own formula."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import must_have_native

FOLDER = Path(__file__).parents[1] / "examples" / "recipes"
DOCUMENT = Path(__file__).parents[1] / "docs" / "recipes.md"
#: The scripts, and the packages of the extra "recipes" that each imports.
RECIPES: dict[str, tuple[str, ...]] = {
    "cwd": (),
    "ddp_shared_statistics": (),
    "huggingface_trainer": ("accelerate", "transformers"),
    "lightning_amp": ("lightning",),
    "segmentation": (),
    "several_teachers": (),
    "timm_mixup": ("timm",),
    "torchdistill_yaml": ("torchdistill",),
    "trl_gkd": ("datasets", "tokenizers", "transformers", "trl"),
}
#: What the scripts import of each other.
SHARED = {"check", "torchdistill_losses"}
#: Runs a script with a forward KL that is a thousandth too large.
WRONG = """
import runpy, sys, kdkernels
right = kdkernels.kd_loss
kdkernels.kd_loss = lambda *args, **options: 1.001 * right(*args, **options)
script, folder = sys.argv[1:]
sys.argv[1:] = []
sys.path.insert(0, folder)
runpy.run_path(script, run_name="__main__")
"""

pytestmark = pytest.mark.recipes


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def require_packages(name: str) -> None:
    """Skips the test without the packages of a recipe; where native backends are mandatory, fails it."""
    missing = [package for package in RECIPES[name] if find_spec(package) is None]
    if not missing:
        return
    reason = f"{name}.py needs {', '.join(missing)}: pip install '.[recipes]'"
    if must_have_native():
        pytest.fail(reason)
    pytest.skip(reason)


def shown_code() -> list[str]:
    """The Python blocks of docs/recipes.md that are not run there, without indentation."""
    blocks = re.findall(r"^```python\n# docs: not run\n(.*?)^```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    return [flush_left(block) for block in blocks]


def flush_left(code: str) -> str:
    return "\n".join(line.strip() for line in code.strip().splitlines())


def test_code_of_the_docs_is_that_of_the_scripts() -> None:
    scripts = [flush_left(path.read_text()) for path in FOLDER.glob("*.py")]
    blocks = shown_code()
    assert blocks
    for block in blocks:
        assert any(block in script for script in scripts), f"in no script:\n{block}"


def test_all_scripts_are_listed() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == RECIPES.keys() | SHARED


@pytest.mark.parametrize("name", RECIPES)
def test_equals_the_frameworks_formula(name: str) -> None:
    require_packages(name)
    result = run(str(FOLDER / f"{name}.py"))
    assert result.returncode == 0, result.stdout + result.stderr
    compared = [line for line in result.stdout.splitlines() if line.startswith("same ")]
    assert any("loss" in line for line in compared), result.stdout
    assert any("gradient" in line for line in compared), result.stdout


@pytest.mark.parametrize("name", ["cwd", "segmentation", "several_teachers"])
def test_a_wrong_loss_is_noticed(name: str) -> None:
    result = run("-c", WRONG, str(FOLDER / f"{name}.py"), str(FOLDER))
    assert result.returncode == 1
    assert "FAILED" in result.stderr, result.stderr
