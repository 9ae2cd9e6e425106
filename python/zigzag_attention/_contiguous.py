"""Rows between the contiguous layout and the zigzag one, over torch.distributed."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from zigzag_attention import _core, _torch
from zigzag_attention._arrays import Indices, IntArray, index_array
from zigzag_attention._checks import Options
from zigzag_attention._distributed import keep
from zigzag_attention.communicator import Communicator, Group, communicator_of
from zigzag_attention.helpers import llama3_flash_attn_prepare_cu_seqlens
from zigzag_attention.plan import Plan


class Table(NamedTuple):
    """A rank's part of the exchange from runs to zigzag rows; backwards it is the reverse."""

    run_rows: IntArray
    """Rows of the run, by the rank that they go to and then in that rank's order."""
    zigzag_rows: IntArray
    """Zigzag rows, by the rank that they come from and then in order."""
    run_counts: list[int]
    zigzag_counts: list[int]


@lru_cache(maxsize=16)
def _table(plan: Plan, rank: int, run: int) -> Table:
    sent, run_counts = [], []
    for peer in range(plan.world_size):
        tokens = plan.token_indices(peer)
        mine = tokens[(tokens >= rank * run) & (tokens < (rank + 1) * run)] - rank * run
        sent.append(mine)
        run_counts.append(len(mine))
    sources = plan.token_indices(rank) // run
    counts = np.bincount(sources, minlength=plan.world_size)
    return Table(
        np.concatenate(sent),
        np.argsort(sources, kind="stable"),
        run_counts,
        [int(count) for count in counts],
    )


class _Reshard(torch.autograd.Function):
    """x [rows, ...] of one layout -> [rows of the other, ...]; the gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Table, to_zigzag: bool, group: Any) -> Tensor:
        ctx.table, ctx.to_zigzag, ctx.group = table, to_zigzag, group
        return _exchange(x, table, to_zigzag, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad, ctx.table, not ctx.to_zigzag, ctx.group), None, None, None


def _exchange(x: Tensor, table: Table, to_zigzag: bool, group: Any) -> Tensor:
    run = (table.run_rows, table.run_counts)
    zigzag = (table.zigzag_rows, table.zigzag_counts)
    (taken, taken_counts), (placed, placed_counts) = (run, zigzag) if to_zigzag else (zigzag, run)
    # Bytes, because not every backend moves every type.
    send = x.index_select(0, torch.from_numpy(taken).to(x.device)).contiguous()
    received = x.new_empty((len(placed), *x.shape[1:]))
    on_host = x.device.type == "cpu"
    work = dist.all_to_all_single(
        received.view(torch.uint8),
        send.view(torch.uint8),
        placed_counts,
        taken_counts,
        group=group,
        async_op=on_host,
    )
    if on_host:
        keep(work).wait()
    out = torch.empty_like(received)
    out[torch.from_numpy(placed).to(x.device)] = received
    if on_host:
        # The work holds the tensors, but their memory it needs no more.
        send.untyped_storage().resize_(0)
        received.untyped_storage().resize_(0)
    return out


def _reshard(x: Tensor, table: Table, to_zigzag: bool, group: Any) -> Tensor:
    result: Tensor = _Reshard.apply(x, table, to_zigzag, group)  # type: ignore[no-untyped-call]
    return result


def _whole_pack(
    cu_seqlens_q: IntArray, first: int, run: int, communicator: Communicator
) -> tuple[IntArray, str]:
    """The GLOBAL cu_seqlens, put together from what every rank knows of its run; and a sentence,
    the same on all ranks, when the runs do not fit."""
    inner = np.unique(cu_seqlens_q[1:-1] + communicator.rank * run)
    head = np.array([run, len(inner), first], dtype=np.int64)
    heads = np.frombuffer(communicator.all_gather(head.tobytes()), np.int64).reshape(-1, 3)
    longest = int(heads[:, 1].max())
    mine = np.full(longest, first, dtype=np.int64)
    mine[: len(inner)] = inner
    bounds = np.frombuffer(communicator.all_gather(mine.tobytes()), np.int64)
    if len({int(rows) for rows in heads[:, 0]}) > 1:
        return bounds, (
            f"the ranks hold {heads[:, 0].tolist()[:8]} rows; in the contiguous layout every rank "
            "holds as many"
        )
    total = run * communicator.size
    values = np.unique(np.concatenate([bounds, heads[:, 2], [0, total]]))
    if values[0] < 0 or values[-1] > total:
        return values, f"local_k_slice or cu_seqlens_q of a rank leave the pack's {total} tokens"
    return values, ""


def _check_own(
    values: IntArray,
    pack: tuple[Indices, Indices, slice],
    causal: bool,
    communicator: Communicator,
) -> str:
    """A sentence when this rank's arguments are not those of the pack."""
    own = llama3_flash_attn_prepare_cu_seqlens(values, causal, communicator.rank, communicator.size)
    cu_q, cu_k = (
        np.unique(index_array(x, name))
        for x, name in zip(pack[:2], ("cu_seqlens_q", "cu_seqlens_k"), strict=True)
    )
    slices = (pack[2].start, pack[2].stop), (own[4].start, own[4].stop)
    for name, given, wanted in (
        ("cu_seqlens_q", cu_q.tolist(), own[0].tolist()),
        ("cu_seqlens_k", cu_k.tolist(), own[1].tolist()),
        ("local_k_slice", *slices),
    ):
        if given != wanted:
            return (
                f"{name} is {given}; for rank {communicator.rank} of {communicator.size} of a pack "
                f"with these documents it is {wanted} (llama3_flash_attn_prepare_cu_seqlens with "
                f"causal={causal})"
            )
    return ""


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attention(
    packed: tuple[Tensor, ...], pack: tuple[Indices, Indices, slice], options: Options, group: Group
) -> tuple[Tensor, Tensor]:
    """out [local_tokens, heads, head_dim] and lse [local_tokens, heads] of the rank's run."""
    communicator = communicator_of(group)
    if isinstance(group, Communicator) and group.size > 1:
        raise ValueError(
            "the contiguous layout needs a torch.distributed group; with a Communicator shard by "
            "a Plan and call attention"
        )
    q, k, v = _torch.split(packed[0], *(*packed[1:], None, None)[:2])
    run = q.shape[0]
    cu_q = index_array(pack[0], "cu_seqlens_q")
    first = pack[2].start if isinstance(pack[2], slice) else None
    error = ""
    if first is None or len(cu_q) < 2 or int(cu_q[-1]) != run:
        error = (
            f"cu_seqlens_q ends at {int(cu_q[-1])} for {run} rows of q and local_k_slice is "
            f"{pack[2]}; both come from llama3_flash_attn_prepare_cu_seqlens"
        )
        cu_q, first = np.array([0, run]), 0
    values, trouble = _whole_pack(cu_q, int(first or 0), run, communicator)
    error = error or trouble or _check_own(values, pack, options[0], communicator)
    # All ranks learn here of a mistake that one of them made.
    failed = communicator.all_gather(b"\1" if error else b"\0")
    if error:
        raise ValueError(error)
    if any(failed):
        raise _core.CommunicationError(
            f"rank {failed.index(1)} of {communicator.size} was given arguments that do not fit "
            "its run"
        )
    plan = Plan(values, communicator.size)
    if communicator.size == 1:
        return _torch.attention(packed, plan.as_tensor(), None, 1, group, options, "")
    table = _table(plan, communicator.rank, run)
    rows = _reshard(torch.cat([q, k, v], 1), table, True, group)
    parts = torch.split(rows, [q.shape[1], k.shape[1], v.shape[1]], 1)
    out, lse = _torch.attention(parts, plan.as_tensor(), None, plan.world_size, group, options, "")
    return _reshard(out, table, False, group), _exchange(lse, table, False, group)
