"""Drop-in replacements for ring-flash-attention's zigzag_llama3_flash_attn_varlen functions."""

from __future__ import annotations

from typing import Any

from zigzag_attention._arrays import Indices, index_array, same_kind
from zigzag_attention._checks import Names, Options, refuses_unknown, tell_group
from zigzag_attention.attention import check_local, check_options, make_options, numpy_forward
from zigzag_attention.communicator import Group, communicator_of
from zigzag_attention.helpers import check_n_chunks
from zigzag_attention.kernels import kernels_name
from zigzag_attention.plan import Plan, Window

NAMES = Names("window_size", "heads_k_stride")


@refuses_unknown
def zigzag_llama3_flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Indices,
    cu_seqlens_k: Indices,
    max_seqlen_q: int,
    max_seqlen_k: int,
    heads_k_stride: int,
    local_k_slice: slice | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
    n_chunks: int = 2,
    use_triton_kernel: bool = True,
    use_fused_kernel_forward: bool = True,
    use_fused_kernel_backward: bool = True,
) -> Any:
    """Zigzag attention over packed documents, called as in the code that it replaces.

    Args:
        q: `[local_tokens, heads, head_dim]`, the rank's zigzag rows (`extract_local`).
        k: `[local_tokens, kv_heads, head_dim]`.
        v: like k.
        cu_seqlens_q: `[documents + 1]`, LOCAL: the documents' rows in q. Checked.
        cu_seqlens_k: `[documents + 1]`, GLOBAL: the whole pack. The plan comes from it.
        max_seqlen_q: accepted, unused.
        max_seqlen_k: accepted, unused.
        heads_k_stride: KV heads gathered at a time, a divisor of kv_heads.
        local_k_slice: accepted, unused.
        dropout_p: must be 0.
        softmax_scale: multiplies q.k; None means 1 / sqrt(head_dim).
        causal: a query sees keys up to its own position in its document.
        window_size: (left, right), -1 is no bound; with `causal` (w, w) is (w, 0).
        alibi_slopes: must be None.
        deterministic: a bitwise repeatable backward on CUDA; the CPU's always is.
        return_attn_probs: return `(out, lse, None)`.
        group: a torch.distributed group, a `Communicator`, or None for the world.
        n_chunks: must be 2.
        use_triton_kernel: False runs the plain twin of the kernels.
        use_fused_kernel_forward: accepted; chose among kernels that do not exist here.
        use_fused_kernel_backward: likewise.

    Returns:
        out like q; with `return_attn_probs` `(out, lse, None)`, lse `[heads, local_tokens]`.

    Raises:
        ValueError: an argument does not fit or asks for what is not supported; before any
            exchange.
        RuntimeError: ranks disagree, or a peer or a device failed.
        TimeoutError: a peer did not come within `ZIGZAG_TIMEOUT_S` seconds.
    """
    return _call(
        "q k v",
        (q, k, v),
        cu_seqlens_q,
        cu_seqlens_k,
        heads_k_stride,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        group,
        n_chunks,
        use_triton_kernel,
    )


@refuses_unknown
def zigzag_llama3_flash_attn_varlen_kvpacked_func(
    q: Any,
    kv: Any,
    cu_seqlens_q: Indices,
    cu_seqlens_k: Indices,
    max_seqlen_q: int,
    max_seqlen_k: int,
    heads_k_stride: int,
    local_k_slice: slice | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
    n_chunks: int = 2,
    use_triton_kernel: bool = True,
    use_fused_kernel_forward: bool = True,
    use_fused_kernel_backward: bool = True,
) -> Any:
    """`zigzag_llama3_flash_attn_varlen_func` for kv `[local_tokens, 2, kv_heads, head_dim]`.

    K and V are read, and their gradient is written, in place of the packed tensor.
    """
    return _call(
        "q kv",
        (q, kv),
        cu_seqlens_q,
        cu_seqlens_k,
        heads_k_stride,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        group,
        n_chunks,
        use_triton_kernel,
    )


@refuses_unknown
def zigzag_llama3_flash_attn_varlen_qkvpacked_func(
    qkv: Any,
    cu_seqlens_q: Indices,
    cu_seqlens_k: Indices,
    max_seqlen_q: int,
    max_seqlen_k: int,
    heads_k_stride: int,
    local_k_slice: slice | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
    n_chunks: int = 2,
    use_triton_kernel: bool = True,
    use_fused_kernel_forward: bool = True,
    use_fused_kernel_backward: bool = True,
) -> Any:
    """`zigzag_llama3_flash_attn_varlen_func` for qkv `[local_tokens, 3, heads, head_dim]`.

    Q, K and V are read, and their gradient is written, in place of the packed tensor.
    """
    return _call(
        "qkv",
        (qkv,),
        cu_seqlens_q,
        cu_seqlens_k,
        heads_k_stride,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        group,
        n_chunks,
        use_triton_kernel,
    )


def check_supported(dropout_p: float, alibi_slopes: object, n_chunks: int = 2) -> None:
    """What would be silently different elsewhere is refused here."""
    if dropout_p != 0:
        raise ValueError(f"dropout_p is {dropout_p}; attention dropout is not supported, only 0")
    if alibi_slopes is not None:
        raise ValueError("alibi_slopes was given; ALiBi is not supported, it must be None")
    check_n_chunks(n_chunks)


def check_packed(names: str, packed: tuple[Any, ...]) -> None:
    """The shape of a packed tensor."""
    if names == "q k v":
        return
    name, count = names.split()[-1], 2 if names == "q kv" else 3
    if packed[-1].ndim != 4 or packed[-1].shape[1] != count:
        raise ValueError(
            f"{name} has shape {list(packed[-1].shape)}; it must be "
            f"[local_tokens, {count}, heads, head_dim]"
        )


def _split_numpy(packed: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """q, k and v as views of what the caller packed."""
    if len(packed) == 3:
        return packed
    *first, last = packed
    q, k, v = (*first, *(last[:, i] for i in range(last.shape[1])))
    return q, k, v


def _call(
    names: str,
    packed: tuple[Any, ...],
    cu_seqlens_q: Indices,
    cu_seqlens_k: Indices,
    heads_k_stride: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    alibi_slopes: object,
    deterministic: bool,
    return_attn_probs: bool,
    group: Group,
    n_chunks: int,
    use_triton_kernel: bool,
) -> Any:
    """All three drop-ins."""
    try:
        check_supported(dropout_p, alibi_slopes, n_chunks)
        kind = same_kind(names, *packed)
        check_packed(names, packed)
        kernels = kernels_name(use_triton_kernel) or ""
    except (TypeError, ValueError) as error:
        tell_group(error, group)
        raise
    options: Options = (causal, softmax_scale, window_size, 0.0, heads_k_stride, deterministic)
    out: Any
    lse: Any
    if kind == "torch":
        from zigzag_attention import _torch

        world_size = _torch.world_size_of(group)
        out, lse = _torch.attention(
            packed,
            _torch.as_cu_seqlens(cu_seqlens_k, "cu_seqlens_k"),
            _torch.as_cu_seqlens(cu_seqlens_q, "cu_seqlens_q"),
            world_size,
            group,
            check_options(options, packed[-1], NAMES, group, world_size),
            kernels,
        )
    else:
        communicator = communicator_of(group)
        options = check_options(options, packed[-1], NAMES, group, communicator.size)
        chosen = make_options(*options, kernels=kernels)
        plan = Plan(cu_seqlens_k, communicator.size)
        q, k, v = _split_numpy(packed)
        local = index_array(cu_seqlens_q, "cu_seqlens_q")
        check_local(local, q.shape[0], plan, communicator.rank)
        out, lse = numpy_forward(q, k, v, plan, communicator, chosen)
    return (out, lse.T, None) if return_attn_probs else out
