"""The choice of cases that run by default."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from covering import covering


def case(name: str, whole: bool = False, **params: Any) -> Any:
    callspec = {"callspec": SimpleNamespace(params=params)} if params else {}

    class Item(SimpleNamespace):
        __hash__ = object.__hash__

    nodeid = f"{name}[{params}]" if params else name
    return Item(nodeid=nodeid, get_closest_marker=lambda marker: whole or None, **callspec)


def product(name: str) -> list[Any]:
    return [case(name, a=a, b=b, c=c) for a in "uvwxyz" for b in (1, 2, 3) for c in (True, False)]


def test_every_value_of_every_parameter_runs() -> None:
    chosen = covering(product("f"))
    assert {item.callspec.params["a"] for item in chosen} == set("uvwxyz")
    assert {item.callspec.params["b"] for item in chosen} == {1, 2, 3}
    assert {item.callspec.params["c"] for item in chosen} == {True, False}
    assert len(chosen) <= 9


def test_a_test_marked_whole_runs_whole() -> None:
    cases = [case("f", whole=True, a=a, b=b) for a in (1, 2) for b in (1, 2)]
    assert covering(cases) == set(cases)


def test_functions_are_covered_each_for_itself_and_differently() -> None:
    both = [*product("f"), *product("g"), case("h")]
    chosen = covering(both)
    of = {name: {str(item.callspec.params) for item in chosen if item.nodeid.startswith(f"{name}[")} for name in "fg"}
    assert of["f"] != of["g"]
    assert both[-1] in chosen
    assert covering(both) == chosen
