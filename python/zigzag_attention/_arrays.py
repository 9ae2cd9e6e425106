"""NumPy arrays, torch tensors and others behind a few functions; torch is never imported here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from zigzag_attention import _core, _foreign

if TYPE_CHECKING:
    import torch

    ArrayT = TypeVar("ArrayT", NDArray[Any], torch.Tensor)
    Indices: TypeAlias = NDArray[Any] | torch.Tensor | Sequence[int]
else:
    ArrayT = TypeVar("ArrayT")
    Indices = Any

IntArray: TypeAlias = NDArray[np.int64]

# Element types that the library names itself; others travel as integers of their size.
_NAMED = {"float32", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"}
_BITS = {1: "int8", 2: "int16", 4: "int32", 8: "int64"}


def is_torch(x: object) -> bool:
    """True for a torch tensor; a process that never imported torch has none."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def kind_of(x: object, name: str, foreign: bool = False) -> str:
    """ "torch" or "numpy"; TypeError for anything else. With `foreign` arrays of other libraries
    that have DLPack are "dlpack"."""
    if is_torch(x):
        return "torch"
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array; its mask would be lost, give a plain array")
    if isinstance(x, np.ndarray):
        return "numpy"
    if foreign and _foreign.is_foreign(x):
        return "dlpack"
    raise TypeError(
        f"{name} is a {type(x).__module__}.{type(x).__qualname__}; "
        "it must be a NumPy array or a torch tensor"
        + (", or an array with __dlpack__" if foreign else "")
    )


def same_kind(names: str, *arrays: object, foreign: bool = False) -> str:
    """The kind of all arrays; TypeError when they mix."""
    kinds = {kind_of(x, name, foreign) for name, x in zip(names.split(), arrays, strict=True)}
    if len(kinds) > 1:
        raise TypeError(
            f"{', '.join(names.split())} mix NumPy arrays and torch tensors; "
            "all must be of one kind"
        )
    return kinds.pop()


def view(x: Any) -> _core.Tensor:
    """The array for the library, not copied. bfloat16 arrays of NumPy are seen through uint16."""
    if isinstance(x, np.ndarray):
        if not x.dtype.isnative:
            raise ValueError(f"an array of dtype {x.dtype.str} has foreign byte order")
        if x.dtype.name == "bfloat16":
            return _core.Tensor(x.view(np.uint16), "bfloat16")
        return _checked(x, str(x.dtype))
    if x.is_cuda:
        return _on_gpu(x)
    return _checked(x.detach(), str(x.dtype))


def _on_gpu(x: Any) -> _core.Tensor:
    """A CUDA tensor by its address: DLPack would ask for its device to be the current one."""
    if x.layout != sys.modules["torch"].strided or x.is_conj() or x.is_neg():
        raise ValueError(
            f"an array of dtype {x.dtype} and layout {x.layout} cannot be read in place; "
            "it must be a dense float, integer or bool array on the CPU or on CUDA"
        )
    name = str(x.dtype).removeprefix("torch.")
    return _core.Tensor(x, x.data_ptr(), name, x.shape, x.stride(), x.get_device())


def _checked(x: Any, dtype: str) -> _core.Tensor:
    try:
        return _core.Tensor(x)
    except (TypeError, BufferError) as error:
        raise ValueError(
            f"an array of dtype {dtype} and type {type(x).__qualname__} cannot be read in place; "
            "it must be a dense float, integer or bool array on the CPU or on CUDA"
        ) from error


def bits(x: Any) -> _core.Tensor:
    """The array for copies, which move elements of any type."""
    if is_torch(x):
        import torch

        if str(x.dtype).removeprefix("torch.") not in {*_NAMED, "bfloat16"}:
            return view(x.detach().view(getattr(torch, _bits_name(x.element_size(), x.dtype))))
        return view(x)
    if not isinstance(x, np.ndarray):
        return _foreign.view(x)
    if x.dtype.hasobject:
        raise ValueError(f"an array of dtype {x.dtype} holds Python objects; give one of numbers")
    if x.dtype.name not in _NAMED:
        return view(x.view(np.dtype(_bits_name(x.dtype.itemsize, x.dtype))))
    return view(x)


def _bits_name(size: int, dtype: object) -> str:
    if size not in _BITS:
        raise ValueError(f"elements of {dtype} have {size} bytes; allowed are 1, 2, 4 and 8")
    return _BITS[size]


def empty(like: ArrayT, shape: Sequence[int]) -> ArrayT:
    """An uninitialised row-major array of the kind, type and device of `like`."""
    if isinstance(like, np.ndarray):
        return np.empty(tuple(shape), dtype=like.dtype)
    if not is_torch(like):
        out: Any = _foreign.empty(like, shape)
        return out  # type: ignore[no-any-return]
    return like.new_empty(tuple(shape))


def deliver(out: ArrayT, like: ArrayT) -> ArrayT:
    """What `empty` made for `like`, now that it is written, as the caller's kind of array."""
    if isinstance(like, np.ndarray) or is_torch(like):
        return out
    result: Any = out
    return _foreign.deliver(result, like)  # type: ignore[no-any-return]


def stream_of(x: Any) -> int:
    """The caller's current CUDA stream for a CUDA tensor, else 0."""
    if is_torch(x) and x.is_cuda:
        import torch

        return int(torch.cuda.current_stream(x.device).cuda_stream)
    return 0


def index_array(x: Indices, name: str) -> IntArray:
    """Integers of any kind and device as a NumPy int64 array [n]."""
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array; its mask would be lost, give a plain array")
    try:
        array = x.detach().cpu().numpy() if is_torch(x) else np.asarray(x)  # type: ignore[union-attr]
    except ValueError as error:
        raise ValueError(f"{name} is not a sequence of integers") from error
    if array.size == 0 and not is_torch(x) and not isinstance(x, np.ndarray):
        array = array.astype(np.int64)
    if array.ndim != 1 or array.dtype not in (np.int32, np.int64):
        raise ValueError(
            f"{name} has shape {list(array.shape)} and type {array.dtype}; "
            "it must be one-dimensional, of int32 or int64"
        )
    return np.ascontiguousarray(array, dtype=np.int64)


def indices_like(values: IntArray, like: Indices) -> Any:
    """cu_seqlens of the kind, integer type and device of `like`."""
    if is_torch(like):
        import torch

        assert isinstance(like, torch.Tensor)
        return torch.from_numpy(values).to(device=like.device, dtype=like.dtype)
    if isinstance(like, np.ndarray):
        return values.astype(like.dtype)
    return values
