"""What the modules of this package share: targets as those repositories take them, and putting functions into them."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

from torch import Tensor

from kdkernels._describe import describe

Function = Callable[..., Any]

#: The replaced functions, by their full names.
_originals: dict[str, Function] = {}


def flat_target(target: Tensor | None, logits: Tensor) -> Tensor | None:
    """``target`` as one class a sample: for ``(N, C)`` logits the repositories flatten whatever shape it has."""
    flat = isinstance(target, Tensor) and isinstance(logits, Tensor) and logits.dim() == 2
    return target.reshape(-1) if flat else target


def install(package: str, functions: Mapping[str, Function]) -> list[str]:
    """Replaces functions of an importable package wherever its modules hold them; returns their full names.

    Args:
        package: name of the package, imported here if it is not yet.
        functions: the replacements, by the replaced function's module and name inside ``package``. Those that the
            package does not have are left out.

    Raises:
        ImportError: the package cannot be imported.
        RuntimeError: it has none of the functions, or one with other parameters; nothing was replaced.
    """
    found = _find(package, functions)
    for name, (original, function) in found.items():
        if original is not function:
            _check_parameters(name, original, function)
    for name, (original, function) in found.items():
        if original is not function:
            _originals[name] = original
            _swap(package, original, function)
    return sorted(found)


def uninstall(package: str, functions: Mapping[str, Function]) -> list[str]:
    """Puts back what :func:`install` replaced; returns the full names of what was put back."""
    restored = []
    for path, function in functions.items():
        original = _originals.pop(f"{package}.{path}", None)
        if original is not None and _swap(package, function, original):
            restored.append(f"{package}.{path}")
    return sorted(restored)


def _find(package: str, functions: Mapping[str, Function]) -> dict[str, tuple[Function, Function]]:
    """What the package has of ``functions``, by full name: the present function and its replacement."""
    if not isinstance(package, str):
        raise TypeError(f"package must be the name of a package, got {describe(package)}")
    try:
        root = importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"package {package!r} must be a checkout on Python's path, got: {error}") from error
    found = {}
    for path, function in functions.items():
        module_path, name = path.rsplit(".", 1)
        original = getattr(_import_if_there(f"{package}.{module_path}"), name, None)
        if original is not None:
            found[f"{package}.{path}"] = (original, function)
    if not found:
        where = getattr(root, "__file__", None) or "a namespace package"
        raise RuntimeError(f"package {package!r} ({where}) must have one of {', '.join(functions)}, and has none")
    return found


def _import_if_there(name: str) -> ModuleType | None:
    """The module, or None where the package lacks it; modules whose own imports fail raise.

    The module is not looked up as an attribute: these repositories hide ``distillers.DKD`` behind the class DKD.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            return None
        raise


def _check_parameters(name: str, original: Function, function: Function) -> None:
    theirs, ours = (tuple(inspect.signature(each).parameters) for each in (original, function))
    if theirs != ours:
        raise RuntimeError(
            f"{name} must take ({', '.join(ours)}) to be replaced by {function.__module__}.{function.__name__}, "
            f"got ({', '.join(theirs)}): another version of the repository"
        )


def _swap(package: str, old: Function, new: Function) -> bool:
    """Puts ``new`` wherever modules of the package hold ``old``, imported or defined; whether one did."""
    places = [(module, name) for module in _modules(package) for name, value in vars(module).items() if value is old]
    for module, name in places:
        setattr(module, name, new)
    return bool(places)


def _modules(package: str) -> Iterator[ModuleType]:
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and f"{name}.".startswith(f"{package}."):
            yield module
