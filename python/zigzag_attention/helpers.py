"""The seed-named helpers: rearrangements for code that brings its own collectives.

They follow the code that they replace: every document's length is a multiple of
`2 * world_size`, and they say so when it is not. What is built on `Plan` needs no such thing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from zigzag_attention._arrays import (
    ArrayT,
    Indices,
    IntArray,
    empty,
    index_array,
    indices_like,
    is_torch,
    kind_of,
)
from zigzag_attention.kernels import kernels_name
from zigzag_attention.layout import extract_prefixes, scatter_rows, shard
from zigzag_attention.plan import Plan


def even_plan(cu_seqlens: Indices, world_size: int, name: str = "cu_seqlens") -> Plan:
    """The plan of a pack whose lengths are all multiples of 2 * world_size."""
    plan = Plan(cu_seqlens, world_size)
    lengths = np.diff(plan._values)
    # Chunks of one document differ by at most a token: equal ones mean that the length divides.
    first = plan._core.chunk_table(0)
    uneven = np.flatnonzero((first[:, 1] - first[:, 0]) * plan._core.num_chunks != lengths)
    if uneven.size:
        document = int(uneven[0])
        raise ValueError(
            f"document {document} of {name} has {int(lengths[document])} tokens; this helper needs "
            f"lengths that are multiples of 2 * world_size = {plan._core.num_chunks} "
            "(attention, shard and unshard take any length)"
        )
    return plan


def _check_rows(x: Any, name: str, axis: int, plan: Plan) -> None:
    kind_of(x, name, foreign=True)
    if len(x.shape) <= axis or x.shape[axis] != plan.total_tokens:
        raise ValueError(
            f"{name} has shape {list(x.shape)}; dimension {axis} must be the pack's "
            f"{plan.total_tokens} tokens, as cu_seqlens (GLOBAL) says"
        )


def _check_pair(kv_buffer: Any, name: str, plan: Plan) -> None:
    _check_rows(kv_buffer, name, 1, plan)
    if kv_buffer.shape[0] != 2:
        raise ValueError(
            f"{name} has shape {list(kv_buffer.shape)}; dimension 0 must be 2, K and V"
        )


def extract_local(value: ArrayT, cu_seqlens: Indices, rank: int, world_size: int) -> ArrayT:
    """A rank's zigzag rows.

    Args:
        value: `[tokens, ...]` of the whole pack.
        cu_seqlens: `[documents + 1]`, GLOBAL; lengths are multiples of 2 * world_size.
        rank: 0..world_size - 1.
        world_size: number of ranks.

    Returns:
        `[tokens / world_size, ...]`: of every document, chunk `rank` and then its mirror image.
    """
    plan = even_plan(cu_seqlens, world_size)
    _check_rows(value, "value", 0, plan)
    return shard(value, plan, rank)


def rearrange_kv_from_zigzag_to_contiguous(
    kv_buffer: ArrayT, world_size: int, cu_seqlens: Indices
) -> ArrayT:
    """Rank order to sequence order.

    Args:
        kv_buffer: `[2, tokens, kv_heads, head_dim]`: K and V as an all-gather of the ranks' rows
            leaves them.
        world_size: number of ranks.
        cu_seqlens: `[documents + 1]`, GLOBAL.

    Returns:
        The same shape, in sequence order.
    """
    plan = even_plan(cu_seqlens, world_size)
    kind_of(kv_buffer, "kv_buffer")
    _check_pair(kv_buffer, "kv_buffer", plan)
    chunks = [plan._core.num_chunks] * plan.num_documents
    out = empty(kv_buffer, kv_buffer.shape)
    for half in range(2):
        out[half] = extract_prefixes(kv_buffer[half], plan, chunks, None)
    return out


def rearrange_grad_from_contiguous_to_zigzag(
    grad_contiguous: ArrayT, world_size: int, cu_seqlens: Indices
) -> ArrayT:
    """Sequence order to rank order: the inverse of `rearrange_kv_from_zigzag_to_contiguous`.

    Args:
        grad_contiguous: `[2, tokens, kv_heads, head_dim]`, or `[tokens, kv_heads, head_dim]`, in
            sequence order.
        world_size: number of ranks.
        cu_seqlens: `[documents + 1]`, GLOBAL.

    Returns:
        The same shape: the rows of rank 0, then those of rank 1, and so on.
    """
    plan = even_plan(cu_seqlens, world_size)
    kind_of(grad_contiguous, "grad_contiguous")
    if grad_contiguous.ndim == 4:
        _check_pair(grad_contiguous, "grad_contiguous", plan)
    else:
        _check_rows(grad_contiguous, "grad_contiguous", 0, plan)
    out = empty(grad_contiguous, grad_contiguous.shape)
    pairs = [(grad_contiguous, out)]
    if grad_contiguous.ndim == 4:
        pairs = [(grad_contiguous[half], out[half]) for half in range(2)]
    for source, target in pairs:
        begin = 0
        for rank in range(world_size):
            end = begin + plan.local_tokens(rank)
            scatter_rows(source, plan, rank, None, target[begin:end])
            begin = end
    return out


def split_q_by_zigzag_chunk_index(
    q: ArrayT, cu_seqlens_q: Indices, world_size: int, rank: int, n_chunks: int = 2
) -> tuple[list[ArrayT], list[Any], list[Any]]:
    """A rank's queries as the early group (chunk `rank` of every document) and the late one.

    Args:
        q: `[local_tokens, ...]`.
        cu_seqlens_q: `[documents + 1]`, LOCAL: the rank's own rows.
        world_size: number of ranks.
        rank: 0..world_size - 1.
        n_chunks: 2, the only number of groups.

    Returns:
        `(q_list, cu_seqlens_q_list, indices_list)`: per group its rows, their cu_seqlens, and the
        local rows that they are.
    """
    check_n_chunks(n_chunks)
    kind_of(q, "q")
    local = index_array(cu_seqlens_q, "cu_seqlens_q")
    plan = even_plan(local * world_size, world_size, "cu_seqlens_q (LOCAL) times world_size")
    if q.shape[0] != plan.local_tokens(rank):
        raise ValueError(
            f"q has {q.shape[0]} rows and cu_seqlens_q ends at {int(local[-1])}; cu_seqlens_q must "
            "be LOCAL: the row ranges of the documents in q"
        )
    q_list, cu_list, indices_list = [], [], []
    for index in plan.chunk_indices(rank):
        table = plan._core.chunk_table(index)
        counts = table[:, 1] - table[:, 0]
        cu = np.concatenate(([0], np.cumsum(counts)))
        rows: IntArray = np.arange(cu[-1]) + np.repeat(table[:, 2] - cu[:-1], counts)
        picked: Any = rows
        if is_torch(q):
            import torch

            picked = torch.from_numpy(rows).to(q.device)
        q_list.append(q[picked])
        cu_list.append(indices_like(cu, cu_seqlens_q))
        indices_list.append(picked)
    return q_list, cu_list, indices_list


def compute_kv_slices_for_groups(
    cu_seqlens_k: Indices,
    chunk_idx_0: int,
    chunk_idx_1: int,
    world_size: int,
    chunk_cu_seqlens_q_list: Sequence[Indices] | None = None,
    n_chunks: int = 2,
) -> list[tuple[list[tuple[int, int]], Any]]:
    """The keys that each group of queries sees under a causal mask.

    Args:
        cu_seqlens_k: `[documents + 1]`, GLOBAL.
        chunk_idx_0: the early group's chunk.
        chunk_idx_1: the late group's chunk.
        world_size: number of ranks.
        chunk_cu_seqlens_q_list: the groups' cu_seqlens as `split_q_by_zigzag_chunk_index` gives
            them; only checked.
        n_chunks: 2, the only number of groups.

    Returns:
        Per group `(seq_ranges, cu_seqlens_k_slice)`: of every document `(start, end)` in the
        sequence-ordered buffer, and the cu_seqlens of those ranges laid end to end.
    """
    check_n_chunks(n_chunks)
    plan = even_plan(cu_seqlens_k, world_size, "cu_seqlens_k")
    groups: list[tuple[list[tuple[int, int]], Any]] = []
    starts = plan._values[:-1]
    for group, index in enumerate((chunk_idx_0, chunk_idx_1)):
        table = plan._core.chunk_table(index)
        if chunk_cu_seqlens_q_list is not None:
            given = np.diff(index_array(chunk_cu_seqlens_q_list[group], "chunk_cu_seqlens_q_list"))
            if not np.array_equal(given, table[:, 1] - table[:, 0]):
                raise ValueError(
                    f"chunk_cu_seqlens_q_list[{group}] has lengths {given.tolist()[:8]}; those of "
                    f"chunk {index} are {(table[:, 1] - table[:, 0]).tolist()[:8]}"
                )
        ends = starts + table[:, 1]
        ranges = list(zip(starts.tolist(), ends.tolist(), strict=True))
        cu = np.concatenate(([0], np.cumsum(table[:, 1])))
        groups.append((ranges, indices_like(cu, cu_seqlens_k)))
    return groups


def extract_zigzag_kv_slices_for_group(
    kv_buffer: ArrayT,
    seq_ranges: Sequence[tuple[int, int, int]],
    cu_seqlens_global: Indices,
    world_size: int,
    nheads_k: int,
    head_dim: int,
    use_triton_kernel: bool = True,
) -> tuple[ArrayT, ArrayT]:
    """The prefix of every document out of a rank-ordered buffer, documents end to end.

    Args:
        kv_buffer: `[2, tokens, nheads_k, head_dim]` as an all-gather leaves it.
        seq_ranges: of every document `(start, end, max_chunk_idx)`: chunks 0..max_chunk_idx, which
            are the tokens [start, end) of the sequence-ordered buffer.
        cu_seqlens_global: `[documents + 1]`, GLOBAL.
        world_size: number of ranks.
        nheads_k: KV heads of kv_buffer.
        head_dim: head dimension of kv_buffer.
        use_triton_kernel: False runs the plain twin.

    Returns:
        `(k, v)`, each `[rows, nheads_k, head_dim]`.

    Raises:
        ValueError: a shape does not fit, or a range is not the prefix that its chunk says.
    """
    plan = even_plan(cu_seqlens_global, world_size, "cu_seqlens_global")
    _check_pair(kv_buffer, "kv_buffer", plan)
    if tuple(kv_buffer.shape[2:]) != (nheads_k, head_dim):
        raise ValueError(
            f"kv_buffer has shape {list(kv_buffer.shape)}; its last dimensions must be "
            f"nheads_k = {nheads_k} and head_dim = {head_dim}"
        )
    chunks = _prefix_chunks(seq_ranges, plan)
    kernels = kernels_name(use_triton_kernel)
    both: Any = kv_buffer
    k: ArrayT = extract_prefixes(both[0], plan, chunks, kernels)
    v: ArrayT = extract_prefixes(both[1], plan, chunks, kernels)
    return k, v


def _prefix_chunks(seq_ranges: Sequence[tuple[int, int, int]], plan: Plan) -> list[int]:
    if len(seq_ranges) != plan.num_documents:
        raise ValueError(
            f"seq_ranges has {len(seq_ranges)} ranges; there must be one a document, "
            f"{plan.num_documents}"
        )
    chunks = []
    for document, given in enumerate(seq_ranges):
        if len(given) != 3:
            raise ValueError(
                f"seq_ranges[{document}] is {given}; it must be (start, end, max_chunk_idx)"
            )
        start, end, index = given
        first = int(plan._values[document])
        last = first + plan.chunk(document, int(index)).end
        if (int(start), int(end)) != (first, last):
            raise ValueError(
                f"seq_ranges[{document}] is ({int(start)}, {int(end)}, {int(index)}); chunks 0 to "
                f"{int(index)} of this document are the tokens {first} to {last}"
            )
        chunks.append(int(index) + 1)
    return chunks


def scatter_grad_to_zigzag(
    grad_contiguous: ArrayT,
    cu_seqlens_global: Indices,
    rank: int,
    world_size: int,
    use_triton_kernel: bool = True,
) -> ArrayT:
    """The rows of a sequence-ordered gradient that belong to a rank.

    Args:
        grad_contiguous: `[tokens, kv_heads, head_dim]` in sequence order.
        cu_seqlens_global: `[documents + 1]`, GLOBAL.
        rank: 0..world_size - 1.
        world_size: number of ranks.
        use_triton_kernel: False runs the plain twin.

    Returns:
        `[tokens / world_size, kv_heads, head_dim]`.
    """
    plan = even_plan(cu_seqlens_global, world_size, "cu_seqlens_global")
    _check_rows(grad_contiguous, "grad_contiguous", 0, plan)
    return scatter_rows(grad_contiguous, plan, rank, kernels_name(use_triton_kernel))


def check_n_chunks(n_chunks: int) -> None:
    """The code being replaced has other numbers of groups; the result would not depend on it."""
    if n_chunks != 2:
        raise ValueError(f"n_chunks is {n_chunks}; only 2 (early and late) is supported")


def llama3_flash_attn_prepare_cu_seqlens(
    cu_seqlens: Indices, causal: bool, rank: int, world_size: int
) -> tuple[Any, Any, int, int, slice]:
    """Arguments for attention over the *contiguous* llama3 layout, where rank r holds the r-th of
    `world_size` equal runs of the pack.

    Args:
        cu_seqlens: `[documents + 1]`, GLOBAL.
        causal: whether queries see only earlier keys.
        rank: 0..world_size - 1.
        world_size: number of ranks; the pack's tokens must be a multiple of it.

    Returns:
        `(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, local_k_slice)`: the documents
        that the rank's run touches, in its own rows and in the slice of the gathered keys that
        they see, the longest of each, and that slice of the pack.
    """
    values = index_array(cu_seqlens, "cu_seqlens")
    Plan(values, world_size)  # the checks of a pack
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}; it must be 0 to {world_size - 1}")
    total = int(values[-1])
    run, rest = divmod(total, world_size)
    if rest:
        raise ValueError(
            f"the pack has {total} tokens; the contiguous layout needs a multiple of world_size, "
            f"{world_size}"
        )
    begin, end = rank * run, (rank + 1) * run
    # Of equal bounds (empty documents) the last one that starts at or before the run.
    first = int(np.searchsorted(values, begin, side="right")) - 1
    last = max(int(np.searchsorted(values, end, side="left")), min(first + 1, len(values) - 1))
    first = min(first, last)
    bounds = values[first : last + 1]
    cu_q = np.clip(bounds, begin, end) - begin
    k_end = end if causal else int(bounds[-1])
    cu_k = np.minimum(bounds, k_end) - bounds[0]
    max_q = int(np.diff(cu_q).max(initial=0))
    max_k = int(np.diff(cu_k).max(initial=0))
    return (
        indices_like(cu_q, cu_seqlens),
        indices_like(cu_k, cu_seqlens),
        max_q,
        max_k,
        slice(int(bounds[0]), k_end),
    )
