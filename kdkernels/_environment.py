"""Environment variables. An empty one is one that is not set; any other unexpected value is a ValueError by name."""

from __future__ import annotations

import os

_SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def choice(name: str, choices: tuple[str, ...], default: str) -> str:
    """The variable's value, one of ``choices``; ``default`` if it is not set."""
    value = os.environ.get(name, "").strip() or default
    if value not in choices:
        raise ValueError(f"the environment variable {name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def switch(name: str) -> bool:
    """Whether the variable is 1, true, yes or on, in upper or lower case, and not 0, false, no, off or not set."""
    value = os.environ.get(name, "").strip() or "0"
    if value.lower() not in _SWITCH:
        raise ValueError(f"the environment variable {name} must be one of {', '.join(_SWITCH)}, got {value!r}")
    return _SWITCH[value.lower()]
