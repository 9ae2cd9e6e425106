"""Which twin of an operation runs."""

from __future__ import annotations

from types import TracebackType

from zigzag_attention import _core


class kernels:
    """Chooses the fast kernels or their plain twins for the whole process.

    `kernels("reference")` sets the default from here on; `with kernels("reference"): ...` sets it
    for a block and then restores what was before. The environment variable `ZIGZAG_KERNELS` gives
    the default at start.

    Args:
        name: "fused" or "reference".

    Raises:
        ValueError: another name.
    """

    def __init__(self, name: str) -> None:
        self._previous = _core.default_kernels()
        _core.set_default_kernels(name)

    def __enter__(self) -> kernels:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _core.set_default_kernels(self._previous)


def kernels_name(use_triton_kernel: bool) -> str | None:
    """What the seed's flag means here: False is the plain twin, True the default."""
    return None if use_triton_kernel else "reference"
