"""Attention of a whole pack in float64, with torch's autograd; it knows no plan."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: Sequence[int],
    causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [tokens, heads, head_dim] and lse [tokens, heads] in float64."""
    q, k, v = q.double(), k.double(), v.double()
    repeat = q.shape[1] // k.shape[1]
    outs, lses, start = [], [], 0
    for length in lengths:
        rows = slice(start, start + length)
        start += length
        keys, values = (x[rows].repeat_interleave(repeat, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[rows], keys)
        scores = scores * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        i, j = torch.arange(length)[:, None], torch.arange(length)[None]
        seen = torch.ones(length, length, dtype=torch.bool)
        if causal:
            seen &= j <= i
        if window[0] >= 0:
            seen &= j >= i - window[0]
        if window[1] >= 0:
            seen &= j <= i + window[1]
        scores = scores.masked_fill(~seen, -torch.inf)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        lses.append(scores.logsumexp(-1).T)
    return torch.cat(outs), torch.cat(lses)


def close(got: torch.Tensor, want: torch.Tensor, bound: float) -> None:
    """Relative L2 error within `bound`; NaN fails."""
    assert got.shape == want.shape
    error = (got.detach().double() - want.detach()).norm()
    assert bool(error <= bound * max(float(want.detach().norm()), 1.0)), (
        f"L2 error {float(error):.2e} of {float(want.detach().norm()):.2e}, bound {bound:.0e}"
    )


def draw(
    lengths: Sequence[int], heads: int = 4, kv_heads: int = 2, head_dim: int = 32, seed: int = 1
):
    """q, k, v and dout of a pack, in float32."""
    generator, tokens = torch.Generator().manual_seed(seed), sum(lengths)
    return tuple(
        torch.randn(tokens, count, head_dim, generator=generator)
        for count in (heads, kv_heads, kv_heads, heads)
    )
