"""Drop-ins for the contiguous llama3 layout: rank r holds the r-th of equal runs of the pack.

The rows go to the zigzag layout, attention runs there with every rank doing the same work, and the
result comes back: callers keep their sharding, positions and labels. q, k, v and out of a rank
travel once each way more than they would if the caller sharded by `extract_local`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zigzag_attention._arrays import Indices, same_kind
from zigzag_attention._checks import refuses_unknown, tell_group
from zigzag_attention.attention import check_options
from zigzag_attention.communicator import Group
from zigzag_attention.drop_in import NAMES, check_packed, check_supported
from zigzag_attention.plan import Window

if TYPE_CHECKING:
    import torch


@refuses_unknown
def llama3_flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: Indices,
    cu_seqlens_k: Indices,
    max_seqlen_q: int,
    max_seqlen_k: int,
    heads_k_stride: int,
    local_k_slice: slice,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Any:
    """Attention over packed documents in the contiguous layout; torch tensors.

    Args:
        q: `[local_tokens, heads, head_dim]`: the rank's run of the pack, as long on every rank.
        k: `[local_tokens, kv_heads, head_dim]`.
        v: like k.
        cu_seqlens_q: as `llama3_flash_attn_prepare_cu_seqlens` gives it for this rank.
        cu_seqlens_k: likewise.
        max_seqlen_q: accepted, unused.
        max_seqlen_k: accepted, unused.
        heads_k_stride: KV heads gathered at a time, a divisor of kv_heads.
        local_k_slice: as `llama3_flash_attn_prepare_cu_seqlens` gives it.
        dropout_p: must be 0.
        softmax_scale: multiplies q.k; None means 1 / sqrt(head_dim).
        causal: a query sees keys up to its own position in its document.
        window_size: (left, right), -1 is no bound; with `causal` (w, w) is (w, 0).
        alibi_slopes: must be None.
        deterministic: a bitwise repeatable backward on CUDA; the CPU's always is.
        return_attn_probs: return `(out, lse, None)`.
        group: a torch.distributed group, or None for the world.

    Returns:
        out like q; with `return_attn_probs` `(out, lse, None)`, lse `[heads, local_tokens]`.

    Raises:
        ValueError: an argument does not fit, or the ranks' runs and documents do not.
        RuntimeError: ranks disagree, or a peer or a device failed.
        TimeoutError: a peer did not come within `ZIGZAG_TIMEOUT_S` seconds.
    """
    return _call(
        "q k v",
        (q, k, v),
        (cu_seqlens_q, cu_seqlens_k, local_k_slice),
        heads_k_stride,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        group,
    )


@refuses_unknown
def llama3_flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: Indices,
    cu_seqlens_k: Indices,
    max_seqlen_q: int,
    max_seqlen_k: int,
    heads_k_stride: int,
    local_k_slice: slice,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Any:
    """`llama3_flash_attn_varlen_func` for kv `[local_tokens, 2, kv_heads, head_dim]`."""
    return _call(
        "q kv",
        (q, kv),
        (cu_seqlens_q, cu_seqlens_k, local_k_slice),
        heads_k_stride,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        group,
    )


@refuses_unknown
def llama3_flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens_q: Indices,
    cu_seqlens_k: Indices,
    max_seqlen_q: int,
    max_seqlen_k: int,
    heads_k_stride: int,
    local_k_slice: slice,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Any:
    """`llama3_flash_attn_varlen_func` for qkv `[local_tokens, 3, heads, head_dim]`."""
    return _call(
        "qkv",
        (qkv,),
        (cu_seqlens_q, cu_seqlens_k, local_k_slice),
        heads_k_stride,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        group,
    )


def _call(
    names: str,
    packed: tuple[torch.Tensor, ...],
    pack: tuple[Indices, Indices, slice],
    heads_k_stride: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    alibi_slopes: object,
    deterministic: bool,
    return_attn_probs: bool,
    group: Group,
) -> Any:
    """All three drop-ins; `pack` is (cu_seqlens_q, cu_seqlens_k, local_k_slice)."""
    try:
        check_supported(dropout_p, alibi_slopes)
        if same_kind(names, *packed) != "torch":
            raise TypeError(
                "the contiguous layout is for torch tensors; shard NumPy arrays by a Plan"
            )
        check_packed(names, packed)
    except (TypeError, ValueError) as error:
        tell_group(error, group)
        raise
    from zigzag_attention import _contiguous, _torch

    world_size = _torch.world_size_of(group)
    given = (causal, softmax_scale, window_size, 0.0, heads_k_stride, deterministic)
    options = check_options(given, packed[-1], NAMES, group, world_size)
    exchanged: Any = _contiguous.attention
    out, lse = exchanged(packed, pack, options, group)
    return (out, lse.T, None) if return_attn_probs else out
