"""The plan: which rank holds which tokens of a pack."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from zigzag_attention import _core
from zigzag_attention._arrays import Indices, IntArray, index_array
from zigzag_attention._checks import integer, mask

if TYPE_CHECKING:
    import torch

Window = tuple[int, int]


class Chunk(NamedTuple):
    """Positions [begin, end) inside a document; their rows start at `local_row` of the shard."""

    begin: int
    end: int
    local_row: int


class Plan:
    """The zigzag layout of one pack of documents over `world_size` ranks.

    Every document is cut into `2 * world_size` chunks; rank r owns one early and one late chunk,
    so that all ranks do the same work. Any document length works, and local token counts differ
    by at most one. Immutable; build it once a pack and share it between layers.

    Args:
        cu_seqlens: `[documents + 1]` int32 or int64, NumPy, torch (any device) or a list: 0, then
            the end of each document in tokens. GLOBAL: the whole pack, the same on all ranks.
        world_size: number of ranks, at least 1.

    Raises:
        ValueError: cu_seqlens is empty, does not start at 0, decreases or is not of integers, or
            world_size is less than 1.
        TypeError: world_size is not an integer.
    """

    def __init__(self, cu_seqlens: Indices, world_size: int) -> None:
        values = index_array(cu_seqlens, "cu_seqlens")
        world_size = integer(world_size, "world_size")
        if len(values) > 0 and (values[0] != 0 or (np.diff(values) < 0).any()):
            raise ValueError(_not_cumulative(values))
        self._core = _core.Plan(values, world_size)
        # Kept here, because compiled code cannot trace calls into the library.
        self._world_size = self._core.world_size
        self._total_tokens = self._core.total_tokens
        self._num_documents = self._core.num_documents
        self._values = self._core.cu_seqlens
        # Compiled code hands the pack on as a tensor, so that a new pack is no new graph.
        self._tensor: torch.Tensor | None = None
        if "torch" in sys.modules:
            self.as_tensor()

    @classmethod
    def from_lengths(cls, lengths: Indices, world_size: int) -> Plan:
        """The plan of documents of these lengths, in tokens."""
        return cls(np.concatenate(([0], np.cumsum(index_array(lengths, "lengths")))), world_size)

    def as_tensor(self) -> torch.Tensor:
        """The global cu_seqlens as a torch int64 tensor `[documents + 1]` on the CPU."""
        if self._tensor is None:
            import torch

            self._tensor = torch.from_numpy(self._values.copy())
        return self._tensor

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._world_size

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole pack."""
        return self._total_tokens

    @property
    def num_documents(self) -> int:
        """Documents of the pack, empty ones included."""
        return self._num_documents

    @property
    def cu_seqlens(self) -> IntArray:
        """The global cu_seqlens `[documents + 1]`; a copy."""
        return self._values.copy()

    @property
    def fingerprint(self) -> int:
        """A 64-bit hash of cu_seqlens and world_size that ranks compare before an exchange."""
        return self._core.fingerprint

    def chunk(self, document: int, index: int) -> Chunk:
        """Chunk `index` in 0..2 * world_size - 1 of a document."""
        return Chunk(*self._core.chunk(integer(document, "document"), integer(index, "index")))

    def chunk_indices(self, rank: int) -> tuple[int, int]:
        """The chunks that a rank owns of every document: (early, late)."""
        return self._core.chunk_indices(integer(rank, "rank"))

    def chunk_owner(self, index: int) -> int:
        """The rank that owns chunk `index` of every document."""
        return self._core.chunk_owner(integer(index, "index"))

    def local_tokens(self, rank: int) -> int:
        """Rows of a rank's shard."""
        return self._core.local_tokens(integer(rank, "rank"))

    def local_cu_seqlens(self, rank: int) -> IntArray:
        """Row ranges of the documents in a rank's shard `[documents + 1]`."""
        return self._core.local_cu_seqlens(integer(rank, "rank"))

    def token_indices(self, rank: int) -> IntArray:
        """The global token of each local row `[local_tokens]`."""
        return self._core.token_indices(integer(rank, "rank"))

    def position_ids(self, rank: int) -> IntArray:
        """The position inside its document of each local row, as RoPE wants it `[local_tokens]`."""
        return self._core.position_ids(integer(rank, "rank"))

    def local_row(self, token: int) -> tuple[int, int]:
        """The rank and the local row that hold a global token."""
        return self._core.local_row(integer(token, "token"))

    def flops(
        self,
        rank: int,
        heads: int = 1,
        head_dim: int = 1,
        *,
        causal: bool = True,
        window: Window = (-1, -1),
    ) -> float:
        """FLOPs of a rank's forward: 4 x heads x head_dim x visible (query, key) pairs."""
        return self._core.flops(
            integer(rank, "rank"),
            integer(heads, "heads"),
            integer(head_dim, "head_dim"),
            *mask(causal, window),
        )

    def balance(self, *, causal: bool = True, window: Window = (-1, -1)) -> float:
        """Mean over ranks of the FLOPs divided by their maximum; 1 is perfect."""
        return self._core.balance(*mask(causal, window))

    def gathered_bytes(
        self,
        rank: int,
        kv_heads: int,
        head_dim: int,
        itemsize: int,
        *,
        causal: bool = True,
        window: Window = (-1, -1),
    ) -> float:
        """Bytes of K and V that a rank receives from other ranks in one forward."""
        return self._core.gathered_bytes(
            integer(rank, "rank"),
            integer(kv_heads, "kv_heads"),
            integer(head_dim, "head_dim"),
            integer(itemsize, "itemsize"),
            *mask(causal, window),
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        return self.world_size == other.world_size and np.array_equal(self._values, other._values)

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __reduce__(self) -> tuple[type[Plan], tuple[IntArray, int]]:
        return Plan, (self._values, self.world_size)

    def __repr__(self) -> str:
        return (
            f"Plan({self.num_documents} documents, {self.total_tokens} tokens, "
            f"world_size={self.world_size})"
        )


def _not_cumulative(values: IntArray) -> str:
    """What is wrong with cu_seqlens, and what to do when they are lengths."""
    if values[0] != 0:
        wrong = f"starts at {values[0]}; it must start at 0"
    else:
        at = int(np.argmax(np.diff(values) < 0)) + 1
        wrong = (
            f"decreases from {values[at - 1]} to {values[at]} at index {at}; it must never decrease"
        )
    meant = "" if (values < 0).any() else " (for lengths: Plan.from_lengths(lengths, world_size))"
    return f"cu_seqlens {wrong}, being cumulative: [0, L0, L0 + L1, ...]{meant}"


def check_plan(plan: object) -> None:
    """cu_seqlens in place of a plan are a likely mistake."""
    if not isinstance(plan, Plan):
        raise TypeError(
            f"plan is a {type(plan).__qualname__}; it must be a Plan(cu_seqlens, world_size)"
        )
