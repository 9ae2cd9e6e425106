"""What this build is and what it found."""

from __future__ import annotations

from zigzag_attention import _core


def version() -> str:
    """The library's version, "major.minor.patch"."""
    return _core.version()


def components() -> list[tuple[str, bool, str]]:
    """The parts of this build and machine: (name, whether it can be used, what was found)."""
    return _core.components()
