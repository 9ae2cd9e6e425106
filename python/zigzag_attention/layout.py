"""shard and unshard: the rows of a rank, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zigzag_attention import _core
from zigzag_attention._arrays import ArrayT, bits, deliver, empty, kind_of, same_kind, stream_of
from zigzag_attention.plan import Plan, check_plan


def shard(x: ArrayT, plan: Plan, rank: int) -> ArrayT:
    """The zigzag rows of a rank.

    Args:
        x: `[tokens, ...]` of the whole pack, in global order; any type: a NumPy array, a torch
            tensor (differentiable) or an array with DLPack, such as CuPy's and JAX's.
        plan: the layout.
        rank: 0..world_size - 1.

    Returns:
        `[local_tokens(rank), ...]`: document after document, the early chunk and then the late one.

    Raises:
        ValueError: x has another number of rows than the plan has tokens, or rank is out of range.
    """
    check_plan(plan)
    given: Any = x
    if kind_of(x, "x", foreign=True) == "torch":
        from zigzag_attention import _torch

        _torch.check_transforms(given)
        if given.requires_grad:
            out: Any = _torch.shard(given, plan, rank)
            return out  # type: ignore[no-any-return]
    return shard_rows(x, plan, rank)


def shard_rows(x: ArrayT, plan: Plan, rank: int) -> ArrayT:
    """shard without a gradient."""
    out = empty(x, (plan.local_tokens(rank), *x.shape[1:]))
    _core.shard(bits(x), plan._core, rank, bits(out), stream=stream_of(x))
    return deliver(out, x)


def unshard(parts: Sequence[ArrayT], plan: Plan) -> ArrayT:
    """Puts the shards of all ranks back into global order: the inverse of `shard`.

    Args:
        parts: `parts[r]` `[local_tokens(r), ...]` of every rank, of one type and device.
        plan: the layout.

    Returns:
        `[tokens, ...]` in global order. Differentiable.

    Raises:
        ValueError: there are not world_size parts, or their shapes or types do not fit.
    """
    check_plan(plan)
    if len(parts) == 0:
        raise ValueError(f"unshard was given no parts; the plan has {plan.world_size} ranks")
    kind = same_kind(" ".join(f"parts[{r}]" for r in range(len(parts))), *parts, foreign=True)
    given: Any = parts
    if kind == "torch":
        from zigzag_attention import _torch

        _torch.check_transforms(*given)
        if any(part.requires_grad for part in given):
            out: Any = _torch.unshard(given, plan)
            return out  # type: ignore[no-any-return]
    return unshard_rows(parts, plan)


def unshard_rows(parts: Sequence[ArrayT], plan: Plan) -> ArrayT:
    """unshard without a gradient."""
    out = empty(parts[0], (plan.total_tokens, *parts[0].shape[1:]))
    _core.unshard([bits(part) for part in parts], plan._core, bits(out), stream=stream_of(out))
    return deliver(out, parts[0])


def extract_prefixes(
    gathered: ArrayT, plan: Plan, prefix_chunks: Sequence[int] | NDArray[Any], kernels: str | None
) -> ArrayT:
    """The first prefix_chunks[d] chunks of every document d out of a rank-ordered buffer."""
    chunks = np.ascontiguousarray(prefix_chunks, dtype=np.int64)
    rows = _core.extracted_tokens(plan._core, chunks)
    out = empty(gathered, (rows, *gathered.shape[1:]))
    _core.extract(bits(gathered), plan._core, chunks, bits(out), kernels, stream_of(gathered))
    return deliver(out, gathered)


def scatter_rows(
    grad: ArrayT, plan: Plan, rank: int, kernels: str | None, out: ArrayT | None = None
) -> ArrayT:
    """The rows of a sequence-ordered gradient that belong to `rank`."""
    given = out
    if out is None:
        out = empty(grad, (plan.local_tokens(rank), *grad.shape[1:]))
    _core.scatter(bits(grad), plan._core, rank, bits(out), kernels, stream_of(grad))
    return deliver(out, grad) if given is None else out
