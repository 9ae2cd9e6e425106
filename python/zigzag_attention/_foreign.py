"""Arrays of other libraries (JAX, CuPy, ...) through DLPack, for the operations that copy rows.

Results are made here, in memory of the library's own, and handed to the array's own library. Work
on a GPU is given to the legacy default stream, behind what the producer says must be done first,
and has ended when the result is handed over.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from zigzag_attention import _core

_CUDA = 2  # DLPack's number of the kind of device
_LEGACY_STREAM = 1  # and its number of the legacy default stream


def is_foreign(x: object) -> bool:
    """True for anything that exports itself through DLPack."""
    return hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__")


def view(x: Any) -> _core.Tensor:
    """The array for the library, not copied."""
    if hasattr(x, "block_until_ready"):
        x.block_until_ready()  # JAX computes in the background
        return _core.Tensor(x)
    if int(x.__dlpack_device__()[0]) == _CUDA and not isinstance(x, _Result):
        return _core.Tensor(x.__dlpack__(stream=_LEGACY_STREAM))
    return _core.Tensor(x)


class _Result:
    """An array of the library's own until it is handed over."""

    def __init__(self, memory: Any, shape: Sequence[int]) -> None:
        self._memory = memory
        self.shape = tuple(shape)

    def __dlpack__(self, **options: Any) -> Any:
        return self._memory.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._memory.__dlpack_device__()


def empty(like: Any, shape: Sequence[int]) -> _Result:
    """An uninitialised row-major array of the type and device of `like`."""
    return _Result(view(like).allocate(list(shape)), shape)


def deliver(out: _Result, like: Any) -> Any:
    """The result as an array of the library that `like` comes from, where it says which."""
    kind, index = out.__dlpack_device__()
    if int(kind) == _CUDA:
        _core.synchronize(int(index))
    namespace: Any
    if hasattr(like, "__array_namespace__"):
        namespace = like.__array_namespace__()
    else:
        namespace = sys.modules.get(type(like).__module__.partition(".")[0])
    if hasattr(namespace, "from_dlpack"):
        return namespace.from_dlpack(out)
    return out
