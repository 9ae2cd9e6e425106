"""End to end: forward and backward over the ranks against a reference in float64.

    torchrun --nproc_per_node 8 test/test_zigzag_llama3_flash_attn_varlen_func.py

Every rank draws the whole pack from a seed, computes the reference alone, and compares all rows.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent))

from seed_support import cu_seqlens_of, main, seeded, world

import zigzag_attention.ring_flash_attn as ring_flash_attn
from zigzag_attention import Communicator, Plan, attention, shard, unshard

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """Inputs of one call, in global order."""

    lengths: tuple[int, ...]
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    stage: int | None = None
    seed: int = 17

    def inputs(self) -> Tensors:
        generator, tokens = seeded(self.seed), sum(self.lengths)

        def draw(heads: int) -> torch.Tensor:
            return torch.randn(tokens, heads, self.head_dim, generator=generator).to(self.dtype)

        return {
            "q": draw(self.heads),
            "k": draw(self.kv_heads),
            "v": draw(self.kv_heads),
            "dout": draw(self.heads),
        }


def reference(case: Case, inputs: Tensors) -> Tensors:
    """Plain attention, document by document, in float64 with autograd."""
    q, k, v = (inputs[name].double().requires_grad_() for name in "qkv")
    repeat = case.heads // case.kv_heads
    outs, lses, start = [], [], 0
    for length in case.lengths:
        rows = slice(start, start + length)
        start += length
        keys, values = (x[rows].repeat_interleave(repeat, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[rows], keys) / math.sqrt(case.head_dim)
        if case.softcap:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        i, j = torch.arange(length)[:, None], torch.arange(length)[None]
        seen = torch.ones(length, length, dtype=torch.bool)
        if case.causal:
            seen &= j <= i
        left, right = case.window
        if left >= 0:
            seen &= j >= i - left
        if right >= 0:
            seen &= j <= i + right
        scores = scores.masked_fill(~seen, -torch.inf)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        lses.append(scores.logsumexp(-1).T)
    out = torch.cat(outs)
    out.backward(inputs["dout"].double())
    return {"out": out, "lse": torch.cat(lses), "dq": q.grad, "dk": k.grad, "dv": v.grad}


def errors(got: Tensors, expected: Tensors) -> dict[str, tuple[float, float]]:
    """Relative L2 and largest error over the tensor's largest value; NaN counts as infinite."""
    table = {}
    for name, want in expected.items():
        have = got[name].detach().cpu().double()
        assert have.shape == want.shape, f"{name} has shape {list(have.shape)}"
        diff = (have - want.detach()).nan_to_num(nan=torch.inf, posinf=torch.inf)
        scale = float(want.detach().abs().max()) if want.numel() else 1.0
        norm = max(float(want.detach().norm()), 1e-30)
        if scale < 1e-12:
            # A document of one token has dq = dk = 0: what is left is measured against dv.
            scale, norm = 1.0, float(expected["dv"].norm()) + 1e-30
        largest = float(diff.abs().max()) / scale if want.numel() else 0.0
        table[name] = (float(diff.norm()) / norm, largest)
    return table


def alone(case: Case, inputs: Tensors) -> Tensors:
    """The same engine on one rank: what 16-bit types are measured against."""
    device = world().device
    q, k, v = (inputs[name].detach().to(device).requires_grad_() for name in "qkv")
    plan = Plan.from_lengths(list(case.lengths), 1)
    out, lse = attention(
        q,
        k,
        v,
        plan,
        Communicator.self(),
        causal=case.causal,
        window=case.window,
        softcap=case.softcap,
        return_lse=True,
    )
    out.backward(inputs["dout"].to(device))
    return {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}


def collect(parts: Tensors, plan: Plan) -> Tensors:
    """The shards of all ranks in global order."""
    ranks = world()
    mine = {name: part.detach().cpu() for name, part in parts.items()}
    everyone = ranks.gather(mine)
    return {name: unshard([part[name] for part in everyone], plan) for name in mine}


def check(title: str, case: Case, run: Callable[[Tensors, Plan], Tensors]) -> None:
    ranks = world()
    plan = Plan.from_lengths(list(case.lengths), ranks.size)
    inputs = case.inputs()
    local = {name: shard(x, plan, ranks.rank).to(ranks.device) for name, x in inputs.items()}
    got = collect(run(local, plan), plan)
    expected = reference(case, inputs)
    table = errors(got, expected)
    exact = case.dtype == torch.float32
    baseline = None if exact else errors(alone(case, inputs), expected)
    on_cpu = ranks.device.type == "cpu"
    wrong, lines = [], []
    for name, (relative, largest) in table.items():
        summed = name in ("dk", "dv")
        if baseline is None:
            bound = (3e-6 if summed else 2e-6) if on_cpu else (2e-5 if summed else 1e-5)
            if not (relative <= bound and (largest <= 2e-5 or not on_cpu)):
                wrong.append(f"{name}: relative L2 {relative:.2e} over {bound:.0e}")
        else:
            bound = max(baseline[name][0] * (1.1 if summed else 1.05), 1e-7)
            if not on_cpu:
                # cuDNN hands over the parts of a rank's gradients in 16 bits, so that a sum of
                # parts is rounded once more than the one part of a rank alone.
                bound += 0.1 * 2 ** (-8 if case.dtype == torch.bfloat16 else -11)
            if not relative <= bound:
                wrong.append(f"{name}: relative L2 {relative:.2e}, one rank has {bound:.2e}")
        lines += [f"  {name} max diff: {largest:.6e}", f"  {name} relative L2: {relative:.6e}"]
    verdict = "  ✗ FAILED: " + "; ".join(wrong) if wrong else "  ✓ PASSED"
    ranks.say("", f"[Rank {ranks.rank}] Test: {title}", *lines, verdict)
    assert not wrong, "; ".join(wrong)


def by_drop_in(case: Case, packing: str) -> Callable[[Tensors, Plan], Tensors]:
    """A user's call, written as for the code that is replaced."""

    def run(local: Tensors, plan: Plan) -> Tensors:
        ranks = world()
        cu_seqlens_k = cu_seqlens_of(list(case.lengths)).to(ranks.device)
        cu_seqlens_q = cu_seqlens_k // ranks.size
        longest = max(case.lengths, default=0)
        common = (cu_seqlens_q, cu_seqlens_k, longest // ranks.size, longest, case.stage or 1, None)
        options = {
            "causal": case.causal,
            "window_size": case.window,
            "return_attn_probs": True,
            "group": dist.group.WORLD if ranks.size > 1 else None,
        }
        q, k, v = (local[name] for name in "qkv")
        if packing == "qkvpacked":
            qkv = torch.stack([q, k, v], dim=1).requires_grad_()
            function = ring_flash_attn.zigzag_llama3_flash_attn_varlen_qkvpacked_func
            out, lse, _ = function(qkv, *common, **options)
            out.backward(local["dout"])
            dq, dk, dv = qkv.grad.unbind(1)
        elif packing == "kvpacked":
            kv = torch.stack([k, v], dim=1).requires_grad_()
            q = q.clone().requires_grad_()
            function = ring_flash_attn.zigzag_llama3_flash_attn_varlen_kvpacked_func
            out, lse, _ = function(q, kv, *common, **options)
            out.backward(local["dout"])
            dq, (dk, dv) = q.grad, kv.grad.unbind(1)
        else:
            q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
            function = ring_flash_attn.zigzag_llama3_flash_attn_varlen_func
            out, lse, _ = function(q, k, v, *common, **options)
            out.backward(local["dout"])
            dq, dk, dv = q.grad, k.grad, v.grad
        return {"out": out, "lse": lse.T, "dq": dq, "dk": dk, "dv": dv}

    return run


def by_attention(case: Case) -> Callable[[Tensors, Plan], Tensors]:
    def run(local: Tensors, plan: Plan) -> Tensors:
        q, k, v = (local[name].clone().requires_grad_() for name in "qkv")
        out, lse = attention(
            q,
            k,
            v,
            plan,
            causal=case.causal,
            window=case.window,
            softcap=case.softcap,
            kv_heads_per_stage=case.stage,
            return_lse=True,
        )
        out.backward(local["dout"])
        return {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}

    return run


EVEN = (256, 512, 384, 64)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_separate_tensors() -> None:
    for dtype in DTYPES:
        case = Case(EVEN, dtype=dtype)
        check(f"varlen_func {dtype}", case, by_drop_in(case, "separate"))


def test_kvpacked() -> None:
    for dtype in DTYPES:
        case = Case(EVEN, dtype=dtype, stage=2)
        check(f"varlen_kvpacked_func {dtype}", case, by_drop_in(case, "kvpacked"))


def test_qkvpacked() -> None:
    for dtype in DTYPES:
        case = Case(EVEN, heads=4, kv_heads=4, dtype=dtype, stage=2)
        check(f"varlen_qkvpacked_func {dtype}", case, by_drop_in(case, "qkvpacked"))


def test_full_attention_sees_all_keys() -> None:
    case = Case(EVEN, causal=False)
    check("varlen_func causal=False", case, by_drop_in(case, "separate"))


def test_window() -> None:
    for window in ((31, 0), (100, 17)):
        case = Case(EVEN, causal=window[1] == 0, window=window)
        check(f"varlen_func window={window}", case, by_drop_in(case, "separate"))


def test_softcap() -> None:
    case = Case(EVEN, softcap=5.0)
    check("attention softcap=5", case, by_attention(case))


def test_lengths_that_do_not_divide() -> None:
    size = world().size
    mixed = (0, 1, 2, 2 * size - 1, 2 * size, 2 * size + 1, 127, 128, 129, 311)
    for dtype in DTYPES:
        case = Case(mixed, dtype=dtype)
        check(f"attention uneven lengths {dtype}", case, by_attention(case))
    short = tuple(1 + (7 * i) % 5 for i in range(200))
    check("attention 200 short documents", Case(short), by_attention(Case(short)))


def test_a_rank_may_hold_nothing() -> None:
    for lengths in ((1,), (0,), (1, 0, 1)):
        case = Case(lengths)
        check(f"attention lengths={lengths}", case, by_attention(case))


def test_head_counts_and_sizes() -> None:
    shapes = ((1, 1, 8), (8, 8, 32), (8, 1, 80), (5, 5, 96), (6, 3, 128), (32, 8, 64), (2, 1, 256))
    for heads, kv_heads, head_dim in shapes:
        case = Case((65, 130), heads, kv_heads, head_dim)
        check(f"attention heads={heads}/{kv_heads} d={head_dim}", case, by_attention(case))


def test_every_stage() -> None:
    for stage in (1, 2, 4, 8):
        case = Case((96, 33), heads=8, kv_heads=8, head_dim=32, stage=stage)
        check(f"attention kv_heads_per_stage={stage}", case, by_attention(case))


if __name__ == "__main__":
    main(
        [
            test_separate_tensors,
            test_kvpacked,
            test_qkvpacked,
            test_full_attention_sees_all_keys,
            test_window,
            test_softcap,
            test_lengths_that_do_not_divide,
            test_a_rank_may_hold_nothing,
            test_head_counts_and_sizes,
            test_every_stage,
        ]
    )
