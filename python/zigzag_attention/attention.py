"""attention: the entry point for code that starts fresh, and its backward for NumPy."""

from __future__ import annotations

from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from zigzag_attention import _core
from zigzag_attention._arrays import ArrayT, IntArray, same_kind, view
from zigzag_attention._checks import Names, Options, attention_options, refuses_unknown, tell_group
from zigzag_attention.communicator import Communicator, Group, handle_of, resolve
from zigzag_attention.plan import Plan, Window, check_plan

_NAMES = Names("window", "kv_heads_per_stage")


def check_group(communicator: Communicator, world_size: int) -> None:
    """A plan and a group of different sizes do not fit; the group's ranks all see it."""
    if communicator.size != world_size:
        raise ValueError(
            f"the plan is for {world_size} ranks and the group has {communicator.size}; "
            "they must be equal"
        )


def check_local(local: IntArray, rows: int, plan: Plan, rank: int) -> None:
    """cu_seqlens_q is LOCAL and cu_seqlens_k GLOBAL in the drop-ins; they look alike."""
    expected = plan.local_cu_seqlens(rank)
    pack = f"the pack in cu_seqlens_k (GLOBAL, {_short(plan._values)})"
    if not np.array_equal(local, expected):
        hint = ""
        if np.array_equal(local, plan._values):
            hint = "; what was given is the GLOBAL one"
        raise ValueError(
            f"cu_seqlens_q is {_short(local)}; rank {rank} of {plan.world_size} holds of {pack} "
            f"the rows {_short(expected)} (LOCAL){hint}"
        )
    if rows != plan.local_tokens(rank):
        raise ValueError(
            f"q has {rows} rows; rank {rank} of {plan.world_size} holds "
            f"{plan.local_tokens(rank)} rows of {pack}"
        )


def check_options(
    options: Options, last: Any, names: Names, group: Group, world_size: int
) -> Options:
    """The options; a rank whose own are wrong tells the others."""
    try:
        return attention_options(options, last, names)
    except (TypeError, ValueError) as error:
        if world_size > 1:
            _core.refuse(resolve(handle_of(group, world_size))._core, str(error))
        raise


def _short(values: IntArray) -> str:
    if len(values) <= 6:
        return str(values.tolist())
    return f"[{', '.join(map(str, values[:4].tolist()))}, ..., {values[-1]}]"


@overload
def attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    plan: Plan,
    group: Group = ...,
    *,
    causal: bool = ...,
    softmax_scale: float | None = ...,
    window: Window = ...,
    softcap: float = ...,
    kv_heads_per_stage: int | None = ...,
    deterministic: bool = ...,
    return_lse: Literal[False] = ...,
) -> ArrayT: ...


@overload
def attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    plan: Plan,
    group: Group = ...,
    *,
    causal: bool = ...,
    softmax_scale: float | None = ...,
    window: Window = ...,
    softcap: float = ...,
    kv_heads_per_stage: int | None = ...,
    deterministic: bool = ...,
    return_lse: Literal[True],
) -> tuple[ArrayT, ArrayT]: ...


@refuses_unknown
def attention(
    q: Any,
    k: Any,
    v: Any,
    plan: Plan,
    group: Group = None,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    window: Window = (-1, -1),
    softcap: float = 0.0,
    kv_heads_per_stage: int | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Any:
    """Exact attention of this rank's queries over the whole pack. All ranks call it together.

    Torch tensors are differentiated (once; lse is not); for NumPy arrays there is
    `attention_backward`. Nothing is copied: strides are free but the last, which is 1.

    Args:
        q: `[local_tokens, heads, head_dim]`, the rank's zigzag rows; float32, float16 or bfloat16.
        k: `[local_tokens, kv_heads, head_dim]`; query head h reads KV head
            h / (heads / kv_heads).
        v: like k.
        plan: the layout, the same on all ranks.
        group: a torch.distributed group, a `Communicator`, or None: the world group of
            torch.distributed, or no group at all when the plan is for one rank.
        causal: a query sees keys up to its own position in its document.
        softmax_scale: multiplies q.k; None means 1 / sqrt(head_dim).
        window: (left, right): how many keys before and after its own position a query sees; -1 is
            no bound. A key is seen when `causal` allows it, too, so that (w, w) is then (w, 0).
        softcap: scores s become softcap * tanh(s / softcap); 0 means none.
        kv_heads_per_stage: KV heads gathered at a time, a divisor of kv_heads; bounds memory and
            changes no result. None lets the library choose.
        deterministic: a bitwise repeatable backward on CUDA; the CPU's always is.
        return_lse: also return lse.

    Returns:
        out like q, and with `return_lse` `(out, lse)`, lse `[local_tokens, heads]` float32: natural
        log of the sum of exp(scale * q.k). A row that sees no key has out 0 and lse -inf.

    Raises:
        ValueError: an argument does not fit; before any exchange, on every rank.
        RuntimeError: ranks disagree, or a peer or a device failed.
        TimeoutError: a peer did not come within `ZIGZAG_TIMEOUT_S` seconds.
        TypeError: q, k, v are not all NumPy arrays or all torch tensors, or an option is of a
            wrong type or has no such name.
    """
    options = (causal, softmax_scale, window, softcap, kv_heads_per_stage, deterministic)
    check_plan(plan)
    try:
        kind = same_kind("q k v", q, k, v)
    except (TypeError, ValueError) as error:
        if plan.world_size > 1:
            tell_group(error, group)
        raise
    options = check_options(options, v, _NAMES, group, plan.world_size)
    out: Any
    lse: Any
    if kind == "torch":
        from zigzag_attention import _torch

        out, lse = _torch.attention(
            (q, k, v), plan.as_tensor(), None, plan.world_size, group, options, ""
        )
    else:
        communicator = resolve(handle_of(group, plan.world_size))
        out, lse = numpy_forward(q, k, v, plan, communicator, make_options(*options))
    return (out, lse) if return_lse else out


def make_options(
    causal: bool,
    softmax_scale: float | None,
    window: Window,
    softcap: float,
    kv_heads_per_stage: int | None,
    deterministic: bool,
    kernels: str = "",
    stream: int = 0,
) -> _core.AttentionOptions:
    """The library's options."""
    return _core.AttentionOptions(
        causal=causal,
        window=window,
        softmax_scale=softmax_scale,
        softcap=softcap,
        # 0 is the library's word for "choose"; a caller's 0 was refused.
        kv_heads_per_stage=kv_heads_per_stage or 0,
        deterministic=deterministic,
        kernels=kernels or None,
        stream=stream,
    )


def numpy_forward(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    plan: Plan,
    communicator: Communicator,
    options: _core.AttentionOptions,
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """out and lse of NumPy arrays."""
    check_group(communicator, plan.world_size)
    communicator.check_device(None)
    out = np.empty(q.shape, dtype=q.dtype)
    lse = np.empty(q.shape[:2], dtype=np.float32)
    _core.forward(
        view(q), view(k), view(v), plan._core, communicator._core, options, view(out), view(lse)
    )
    return out, lse


@refuses_unknown
def attention_backward(
    dout: NDArray[Any],
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    out: NDArray[Any],
    lse: NDArray[Any],
    plan: Plan,
    group: Group = None,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    window: Window = (-1, -1),
    softcap: float = 0.0,
    kv_heads_per_stage: int | None = None,
    deterministic: bool = False,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """The gradients of `attention` for NumPy arrays, which have no autograd.

    Args:
        dout: the gradient of out, like q.
        q: as given to `attention`, and so are k, v, plan, group and the options.
        k: see `attention`.
        v: see `attention`.
        out: what `attention` returned.
        lse: what `attention` returned with `return_lse=True`.
        plan: see `attention`.
        group: see `attention`.
        causal: see `attention`.
        softmax_scale: see `attention`.
        window: see `attention`.
        softcap: see `attention`.
        kv_heads_per_stage: see `attention`.
        deterministic: see `attention`.

    Returns:
        `(dq, dk, dv)` like q, k, v. dk and dv are summed over ranks in float32 and rounded once.

    Raises:
        ValueError, RuntimeError, TimeoutError, TypeError: as `attention`.
    """
    if same_kind("dout q k v out lse", dout, q, k, v, out, lse) == "torch":
        raise TypeError("attention_backward is for NumPy arrays; torch tensors have autograd")
    check_plan(plan)
    given = (causal, softmax_scale, window, softcap, kv_heads_per_stage, deterministic)
    options = make_options(*check_options(given, v, _NAMES, group, plan.world_size))
    communicator = resolve(handle_of(group, plan.world_size))
    check_group(communicator, plan.world_size)
    communicator.check_device(None)
    dq, dk, dv = (np.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    _core.backward(
        view(dout),
        view(q),
        view(k),
        view(v),
        view(out),
        view(lse),
        plan._core,
        communicator._core,
        options,
        view(dq),
        view(dk),
        view(dv),
    )
    return dq, dk, dv
