"""The simulator's own tests have passed with the sources that there are."""

from __future__ import annotations

from ptxsim import verified


def test_the_simulator_is_the_verified_one() -> None:
    advice = "its own tests run by default now; once they pass, python tests/ptxsim/verified.py writes VERIFIED anew"
    assert verified.is_verified(), f"tests/ptxsim is not what its tests last passed with: {advice}"
