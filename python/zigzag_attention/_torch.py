"""The torch side: one differentiable operation for separate, kv-packed and qkv-packed tensors.

It is registered with torch.library, so that torch.compile keeps it as one node and never looks
inside. Packs travel as tensors and groups by name, so that a new pack is no new graph.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from zigzag_attention import _core, layout
from zigzag_attention._arrays import Indices, index_array, stream_of, view
from zigzag_attention._checks import Options
from zigzag_attention.attention import check_group, check_local, make_options
from zigzag_attention.communicator import Communicator, Group, handle_of, resolve
from zigzag_attention.plan import Plan

_MAX_PLANS = 32
_plans: OrderedDict[tuple[bytes, int], Plan] = OrderedDict()
_plan_of_tensor: dict[tuple[int, int], tuple[weakref.ref[Tensor], int, Plan]] = {}
_checked_locals: dict[tuple[int, int], tuple[weakref.ref[Tensor], int, int, Plan]] = {}


def check_transforms(*tensors: Tensor) -> None:
    """Operations and copies would lose tangents and what torch.func tracks, without a word."""
    # torch.compile cannot trace the question, and meets the transform's own error instead.
    if not torch.compiler.is_compiling():
        functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
        for transform in functorch.get_interpreter_stack() or ():
            kind = transform.key().name
            if kind in ("Grad", "Jvp"):
                raise RuntimeError(
                    f"zigzag attention was called inside torch.func's {kind.lower()}, which is not "
                    "supported; backward() and torch.autograd.grad are"
                )
    unpack: Any = forward_ad.unpack_dual
    if any(unpack(x).tangent is not None for x in tensors):
        raise RuntimeError(
            "zigzag attention was given a tensor with a tangent; forward-mode derivatives are not "
            "supported, backward() and torch.autograd.grad are"
        )


def attention(
    packed: Sequence[Tensor],
    cu_seqlens: Tensor,
    local_cu_seqlens: Tensor | None,
    world_size: int,
    group: Group,
    options: Options,
    kernels: str,
) -> tuple[Tensor, Tensor]:
    """out and lse of (q, k, v), (q, kv) or (qkv,)."""
    causal, scale, (left, right), softcap, stage, deterministic = options
    check_transforms(*packed)
    a, b, c = (*packed, None, None)[:3]
    out, lse = _attention(
        a,
        b,
        c,
        cu_seqlens,
        local_cu_seqlens,
        world_size,
        handle_of(group, world_size),
        causal,
        None if scale is None else float(scale),
        left,
        right,
        float(softcap),
        stage,
        deterministic,
        kernels,
    )
    return out, lse


def world_size_of(group: Group) -> int:
    """The group's ranks: its own, those of the world, or 1 when nothing was initialised."""
    if isinstance(group, Communicator):
        return group.size
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return 1
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        handle_of(group, -1)  # says what a group is
    return int(dist.get_world_size(group))


def as_cu_seqlens(cu_seqlens: Indices, name: str) -> Tensor:
    """The caller's own tensor where there is one, so that later changes to it are noticed."""
    if isinstance(cu_seqlens, Tensor):
        return cu_seqlens
    return torch.from_numpy(index_array(cu_seqlens, name))


def split(a: Tensor, b: Tensor | None, c: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as views of what the caller packed."""
    if b is None:
        return a[:, 0], a[:, 1], a[:, 2]
    if c is None:
        return a, b[:, 0], b[:, 1]
    return a, b, c


def _plan(cu_seqlens: Tensor, world_size: int) -> Plan:
    """The plan of a pack; every layer of a model asks for the same one."""
    key = (id(cu_seqlens), world_size)
    # NumPy changes memory that it shares with a tensor without a new version; reading it is cheap.
    watched = cu_seqlens.is_cuda and not cu_seqlens.is_inference()
    version = cu_seqlens._version if watched else -1
    known = _plan_of_tensor.get(key)
    if known is not None and known[0]() is cu_seqlens and known[1] == version >= 0:
        return known[2]
    values = index_array(cu_seqlens, "cu_seqlens")
    content = (values.tobytes(), world_size)
    plan = _plans.get(content)
    if plan is None:
        plan = Plan(values, world_size)
        _plans[content] = plan
    _plans.move_to_end(content)
    while len(_plans) > _MAX_PLANS:
        _plans.popitem(last=False)
    if len(_plan_of_tensor) > 4 * _MAX_PLANS:
        _plan_of_tensor.clear()
    _plan_of_tensor[key] = (weakref.ref(cu_seqlens), version, plan)
    return plan


def _prepare(
    cu_seqlens: Tensor, local: Tensor | None, q: Tensor, world_size: int, group: str
) -> tuple[Plan, Communicator]:
    """The plan and the group. A rank whose arguments are wrong tells the others."""
    communicator = resolve(group)
    try:
        plan = _plan(cu_seqlens, world_size)
        check_group(communicator, world_size)
        communicator.check_device(q.get_device() if q.is_cuda else None)
        if local is not None:
            _check_local(local, q.shape[0], plan, communicator.rank)
        if q.is_cuda and world_size > 1 and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                f"a CUDA graph is being captured and the plan is for {world_size} ranks; only "
                "attention of one rank can be captured, since ranks exchange messages of the host"
            )
    except ValueError as error:
        _core.refuse(communicator._core, str(error))
        raise
    if q.is_cuda and world_size > 1:
        communicator = communicator.on_gpu(q.get_device())
    return plan, communicator


def _check_local(local: Tensor, rows: int, plan: Plan, rank: int) -> None:
    """Layers ask with one tensor, and each look at one on a GPU would wait for the GPU."""
    key = (id(local), rank)
    version = local._version if local.is_cuda and not local.is_inference() else -1
    known = _checked_locals.get(key)
    same = known is not None and known[0]() is local and known[1:] == (version, rows, plan)
    if same and version >= 0:
        return
    check_local(index_array(local, "cu_seqlens_q"), rows, plan, rank)
    if version >= 0:
        if len(_checked_locals) > 4 * _MAX_PLANS:
            _checked_locals.clear()
        _checked_locals[key] = (weakref.ref(local), version, rows, plan)


@torch.library.custom_op("zigzag::attention", mutates_args=())
def _attention(
    a: Tensor,
    b: Tensor | None,
    c: Tensor | None,
    cu_seqlens: Tensor,
    local_cu_seqlens: Tensor | None,
    world_size: int,
    group: str,
    causal: bool,
    softmax_scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float,
    kv_heads_per_stage: int | None,
    deterministic: bool,
    kernels: str,
) -> tuple[Tensor, Tensor]:
    q, k, v = split(a, b, c)
    plan, communicator = _prepare(cu_seqlens, local_cu_seqlens, q, world_size, group)
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    options = make_options(
        causal,
        softmax_scale,
        (window_left, window_right),
        softcap,
        kv_heads_per_stage,
        deterministic,
        kernels,
        stream_of(q),
    )
    _core.forward(
        view(q), view(k), view(v), plan._core, communicator._core, options, view(out), view(lse)
    )
    return out, lse


@_attention.register_fake
def _(a: Tensor, b: Tensor | None, c: Tensor | None, *_: object) -> tuple[Tensor, Tensor]:
    q, k, v = split(a, b, c)
    if not q.device == k.device == v.device:
        raise ValueError(
            f"q is on {q.device}, k on {k.device} and v on {v.device}; all must be on one device"
        )
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("zigzag::attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    a: Tensor,
    b: Tensor | None,
    c: Tensor | None,
    cu_seqlens: Tensor,
    local_cu_seqlens: Tensor | None,
    world_size: int,
    group: str,
    causal: bool,
    softmax_scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float,
    kv_heads_per_stage: int | None,
    deterministic: bool,
    kernels: str,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = split(a, b, c)
    plan, communicator = _prepare(cu_seqlens, local_cu_seqlens, q, world_size, group)
    da, db, dc = _like(a, b, c)
    dq, dk, dv = split(da, None if b is None else db, None if c is None else dc)
    if dout.stride(-1) != 1:
        # Autograd hands on whatever the next layer made, expanded scalars among it.
        dout = dout.contiguous()
    options = make_options(
        causal,
        softmax_scale,
        (window_left, window_right),
        softcap,
        kv_heads_per_stage,
        deterministic,
        kernels,
        stream_of(q),
    )
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
    return da, db, dc


def _like(a: Tensor, b: Tensor | None, c: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients packed as the inputs are; an operation has no optional results."""
    return (
        a.new_empty(a.shape),
        a.new_empty((0,) if b is None else b.shape),
        a.new_empty((0,) if c is None else c.shape),
    )


@_attention_backward.register_fake
def _(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    a: Tensor,
    b: Tensor | None,
    c: Tensor | None,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(a, b, c)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, b, c, cu_seqlens, local, world_size, *options = inputs
    out, lse = output
    # While a graph is traced, under a mode and with stand-ins for tensors, there are no values.
    traced = type(cu_seqlens) is not Tensor or _get_current_dispatch_mode() is not None
    ctx.plan = None if traced else _plan(cu_seqlens, world_size)
    ctx.options = (world_size, *options)
    # Saved tensors are watched: a cu_seqlens that is changed before the backward is an error.
    ctx.save_for_backward(out, lse, a, b, c, cu_seqlens, local)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, _dlse: Tensor | None) -> tuple[Any, ...]:
    out, lse, a, b, c, cu_seqlens, local = ctx.saved_tensors
    none = (None,) * (2 + len(ctx.options))
    if ctx.plan is not None:
        _check_unchanged(ctx.plan, cu_seqlens, *ctx.options[:2])
    if dout is None:
        # The exchange is collective: the other ranks wait for this one's part.
        dout = torch.zeros_like(out)
    da, db, dc = _attention_backward(dout, out, lse, a, b, c, cu_seqlens, local, *ctx.options)
    return (da, None if b is None else db, None if c is None else dc, *none)


def _check_unchanged(plan: Plan, cu_seqlens: Tensor, world_size: int, group: str) -> None:
    """Autograd watches tensors, but not the memory that one may share with NumPy."""
    if _plan(cu_seqlens, world_size) != plan:
        message = "cu_seqlens was changed between forward and backward; every pack needs its own"
        _core.refuse(resolve(group)._core, message)
        raise ValueError(message)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    del ctx, inputs, output


def _no_double_backward(ctx: Any, *_: object) -> None:
    raise RuntimeError(
        "zigzag attention was differentiated twice; only first derivatives are supported "
        "(create_graph=True asks for the second)"
    )


_attention.register_autograd(_backward, setup_context=_save)
_attention_backward.register_autograd(_no_double_backward, setup_context=_save_nothing)


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan, rank: int) -> Tensor:
        ctx.plan, ctx.rank = plan, rank
        return layout.shard_rows(x, plan, rank)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        out = grad.new_zeros((ctx.plan.total_tokens, *grad.shape[1:]))
        _core.unshard_rank(view(grad), ctx.plan._core, ctx.rank, view(out), stream=stream_of(grad))
        return out, None, None


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, *parts: Tensor) -> Tensor:
        ctx.plan = plan
        return layout.unshard_rows(parts, plan)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan = ctx.plan
        return (None, *(layout.shard_rows(grad, plan, rank) for rank in range(plan.world_size)))


def shard(x: Tensor, plan: Plan, rank: int) -> Tensor:
    """shard with a gradient."""
    result: Tensor = _Shard.apply(x, plan, rank)  # type: ignore[no-untyped-call]
    return result


def unshard(parts: Sequence[Tensor], plan: Plan) -> Tensor:
    """unshard with a gradient."""
    result: Tensor = _Unshard.apply(plan, *parts)  # type: ignore[no-untyped-call]
    return result
