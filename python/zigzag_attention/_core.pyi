"""Bindings of the C++ library zigzag, without logic of their own."""
# pyright: strict

from collections.abc import Callable, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

_Indices = NDArray[np.int64]
_Bytes = NDArray[np.uint8]
_Window = tuple[int, int]

class EnvironmentFailure(RuntimeError): ...

class CommunicationError(RuntimeError):
    """A rank died, broke the protocol or disagrees with its peers."""

class DeviceError(RuntimeError):
    """A device or one of its libraries failed or is absent."""

class Tensor:
    """A view of an array on the CPU or on CUDA that keeps the array alive."""

    @overload
    def __init__(self, array: Any, dtype: str | None = None) -> None: ...
    @overload
    def __init__(
        self,
        owner: Any,
        address: int,
        dtype: str,
        shape: Sequence[int],
        strides: Sequence[int],
        gpu: int,
    ) -> None: ...
    def allocate(self, shape: Sequence[int]) -> Any: ...
    @property
    def shape(self) -> list[int]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...

class Plan:
    def __init__(self, cu_seqlens: _Indices, world_size: int) -> None: ...
    @property
    def world_size(self) -> int: ...
    @property
    def total_tokens(self) -> int: ...
    @property
    def num_documents(self) -> int: ...
    @property
    def num_chunks(self) -> int: ...
    @property
    def cu_seqlens(self) -> _Indices: ...
    @property
    def fingerprint(self) -> int: ...
    def document_length(self, document: int) -> int: ...
    def chunk(self, document: int, index: int) -> tuple[int, int, int]: ...
    def chunk_table(self, index: int) -> _Indices: ...
    def chunk_indices(self, rank: int) -> tuple[int, int]: ...
    def chunk_owner(self, index: int) -> int: ...
    def local_tokens(self, rank: int) -> int: ...
    def local_cu_seqlens(self, rank: int) -> _Indices: ...
    def token_indices(self, rank: int) -> _Indices: ...
    def position_ids(self, rank: int) -> _Indices: ...
    def local_row(self, token: int) -> tuple[int, int]: ...
    def gathered_tokens(
        self, rank: int, causal: bool = True, window: _Window = (-1, -1)
    ) -> int: ...
    def flops(
        self,
        rank: int,
        heads: int = 1,
        head_dim: int = 1,
        causal: bool = True,
        window: _Window = (-1, -1),
    ) -> float: ...
    def balance(self, causal: bool = True, window: _Window = (-1, -1)) -> float: ...
    def gathered_bytes(
        self,
        rank: int,
        kv_heads: int,
        head_dim: int,
        itemsize: int,
        causal: bool = True,
        window: _Window = (-1, -1),
    ) -> float: ...

class Communicator:
    @staticmethod
    def self() -> Communicator: ...
    @staticmethod
    def threads(size: int) -> list[Communicator]: ...
    @staticmethod
    def mpi(address: int = 0) -> Communicator: ...
    @staticmethod
    def callback(
        rank: int,
        size: int,
        all_gather: Callable[[_Bytes, _Bytes], None],
        all_to_all: Callable[[_Bytes, list[int], _Bytes, list[int]], None],
        abort: Callable[[str], None] | None = None,
    ) -> Communicator: ...
    @staticmethod
    def peer(bootstrap: Communicator, device: int) -> Communicator: ...
    @staticmethod
    def nccl(bootstrap: Communicator, device: int) -> Communicator: ...
    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def name(self) -> str: ...
    def barrier(self) -> None: ...
    def all_gather(self, data: bytes) -> bytes: ...
    def abort(self, reason: str) -> None: ...

class AttentionOptions:
    def __init__(
        self,
        *,
        causal: bool = True,
        window: _Window = (-1, -1),
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        kv_heads_per_stage: int = 0,
        deterministic: bool = False,
        kernels: str | None = None,
        stream: int = 0,
    ) -> None: ...

def refuse(communicator: Communicator, message: str) -> None: ...
def choose_exchange(bootstrap: Communicator, device: int, wanted: str) -> tuple[str, str]: ...
def share_messages(base: Communicator) -> Communicator: ...
def synchronize(device: int) -> None: ...
def timeout_seconds() -> float: ...
def set_default_kernels(name: str | None) -> None: ...
def default_kernels() -> str: ...
def num_threads() -> int: ...
def version() -> str: ...
def components() -> list[tuple[str, bool, str]]: ...
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    communicator: Communicator,
    options: AttentionOptions,
    out: Tensor,
    lse: Tensor,
) -> None: ...
def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Plan,
    communicator: Communicator,
    options: AttentionOptions,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None: ...
def reference_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: _Indices,
    options: AttentionOptions,
    out: Tensor,
    lse: Tensor,
) -> None: ...
def reference_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: _Indices,
    options: AttentionOptions,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None: ...
def shard(
    x: Tensor,
    plan: Plan,
    rank: int,
    out: Tensor,
    kernels: str | None = None,
    stream: int = 0,
) -> None: ...
def unshard(
    parts: Sequence[Tensor],
    plan: Plan,
    out: Tensor,
    kernels: str | None = None,
    stream: int = 0,
) -> None: ...
def unshard_rank(
    part: Tensor,
    plan: Plan,
    rank: int,
    out: Tensor,
    kernels: str | None = None,
    stream: int = 0,
) -> None: ...
def extract(
    gathered: Tensor,
    plan: Plan,
    prefix_chunks: _Indices,
    out: Tensor,
    kernels: str | None = None,
    stream: int = 0,
) -> None: ...
def extracted_tokens(plan: Plan, prefix_chunks: _Indices) -> int: ...
def scatter(
    grad: Tensor,
    plan: Plan,
    rank: int,
    out: Tensor,
    kernels: str | None = None,
    stream: int = 0,
) -> None: ...
