"""The simulator's sources by which its own tests last passed.

They test the simulator, not the kernels, so they run by default only where its sources are others than those: VERIFIED
has their digest. ``pytest -m simulator`` and ``pytest -m full`` run them always; once they pass after a change,
``python tests/ptxsim/verified.py`` writes VERIFIED anew.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

FOLDER = Path(__file__).parent
VERIFIED = FOLDER / "VERIFIED"


def digest() -> str:
    """Of the names and contents of the simulator's sources and of its tests."""
    total = hashlib.sha256()
    for path in sorted(path for pattern in ("*.py", "*.cu", "*.h", "*.cuh") for path in FOLDER.rglob(pattern)):
        total.update(str(path.relative_to(FOLDER)).encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


def is_verified() -> bool:
    """Whether the sources are those that VERIFIED says."""
    return VERIFIED.exists() and VERIFIED.read_text().strip() == digest()


if __name__ == "__main__":
    VERIFIED.write_text(digest() + "\n")
