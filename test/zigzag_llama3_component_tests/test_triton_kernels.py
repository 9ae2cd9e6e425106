"""The two rearranging kernels: extraction of K/V from the zigzag order, scattering of gradients.

    torchrun --nproc_per_node 8 test/zigzag_llama3_component_tests/test_triton_kernels.py

The names are the seed's; what runs are this library's fused kernels against their plain twins and
against an oracle of the test's own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seed_support import (
    cu_seqlens_of,
    main,
    oracle_rows,
    rank_order,
    report_exact,
    seeded,
    world,
)

from zigzag_attention import (
    extract_zigzag_kv_slices_for_group,
    scatter_grad_to_zigzag,
)


def check_extract(
    title: str, lengths: list[int], heads: int, head_dim: int, dtype: torch.dtype, max_chunk: int
) -> None:
    ranks = world()
    size = ranks.size
    kv = torch.randn(2, sum(lengths), heads, head_dim, generator=seeded(7)).to(dtype)
    buffer = rank_order(kv, lengths, size, dim=1).to(ranks.device)
    cu_seqlens = cu_seqlens_of(lengths).to(ranks.device)
    ranges, rows = [], []
    for start, length in zip(cu_seqlens.tolist(), lengths, strict=False):
        end = start + (max_chunk + 1) * (length // (2 * size))
        ranges.append((start, end, max_chunk))
        rows.append(torch.arange(start, end))
    arguments = (buffer, ranges, cu_seqlens, size, heads, head_dim)
    k, v = extract_zigzag_kv_slices_for_group(*arguments, use_triton_kernel=True)
    plain_k, plain_v = extract_zigzag_kv_slices_for_group(*arguments, use_triton_kernel=False)
    expected = kv.index_select(1, torch.cat(rows)).to(ranks.device)
    assert torch.equal(plain_k, expected[0]) and torch.equal(plain_v, expected[1])
    report_exact(title, [("K", k, plain_k), ("V", v, plain_v)])


def check_scatter(
    title: str, lengths: list[int], heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    ranks = world()
    grad = torch.randn(sum(lengths), heads, head_dim, generator=seeded(11)).to(dtype)
    cu_seqlens = cu_seqlens_of(lengths).to(ranks.device)
    arguments = (grad.to(ranks.device), cu_seqlens, ranks.rank, ranks.size)
    got = scatter_grad_to_zigzag(*arguments, use_triton_kernel=True)
    plain = scatter_grad_to_zigzag(*arguments, use_triton_kernel=False)
    expected = grad[oracle_rows(lengths, ranks.rank, ranks.size)].to(ranks.device)
    assert torch.equal(plain, expected)
    report_exact(title, [("Grad", got, plain)])


def test_extract_zigzag_kv_slices_single_sequence() -> None:
    check_extract(
        "extract_zigzag_kv_slices_single_sequence", [1024], 8, 128, torch.bfloat16, world().size - 1
    )


def test_extract_zigzag_kv_slices_multiple_sequences() -> None:
    check_extract(
        "extract_zigzag_kv_slices_multiple_sequences",
        [512, 1024, 768],
        4,
        64,
        torch.float16,
        world().size - 1,
    )


def test_extract_zigzag_kv_slices_late_chunks() -> None:
    check_extract(
        "extract_zigzag_kv_slices_late_chunks",
        [2048],
        8,
        128,
        torch.bfloat16,
        2 * world().size - 1,
    )


def test_scatter_grad_to_zigzag_single_sequence() -> None:
    check_scatter("scatter_grad_to_zigzag_single_sequence", [1024], 8, 128, torch.bfloat16)


def test_scatter_grad_to_zigzag_multiple_sequences() -> None:
    check_scatter(
        "scatter_grad_to_zigzag_multiple_sequences", [512, 1024, 768], 4, 64, torch.float16
    )


def best_milliseconds(run: Callable[[], object], device: torch.device) -> float:
    best = float("inf")
    for _ in range(4):  # the first warms up; the best of all is taken
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best * 1e3


def test_triton_kernel_performance() -> None:
    ranks = world()
    size, length, heads, head_dim = ranks.size, 8192, 32, 128
    kv = torch.randn(2, length, heads, head_dim, generator=seeded(13)).to(torch.bfloat16)
    buffer = rank_order(kv, [length], size, dim=1).to(ranks.device)
    cu_seqlens = cu_seqlens_of([length])
    ranges = [(0, length, 2 * size - 1)]

    def run(fused: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return extract_zigzag_kv_slices_for_group(
            buffer, ranges, cu_seqlens, size, heads, head_dim, use_triton_kernel=fused
        )

    # One rank at a time, so that ranks that share cores do not time each other.
    fused = plain = 0.0
    for turn in range(size):
        if turn == ranks.rank:
            fused = best_milliseconds(lambda: run(True), ranks.device)
            plain = best_milliseconds(lambda: run(False), ranks.device)
        ranks.barrier()
    speedups = ranks.gather(plain / fused)
    passed = all(speedup > 1.0 for speedup in speedups)
    ranks.say(
        "",
        f"[Rank {ranks.rank}] Performance Comparison:",
        f"  Triton kernel: {fused:.3f} ms",
        f"  Python reference: {plain:.3f} ms",
        f"  Speedup: {plain / fused:.2f}x",
        "  ✓ PASSED (Triton is faster)" if passed else f"  ✗ FAILED (speedups {speedups})",
    )
    assert passed, f"the fused kernel is not faster on every rank: {speedups}"


if __name__ == "__main__":
    main(
        [
            test_extract_zigzag_kv_slices_single_sequence,
            test_extract_zigzag_kv_slices_multiple_sequences,
            test_extract_zigzag_kv_slices_late_chunks,
            test_scatter_grad_to_zigzag_single_sequence,
            test_scatter_grad_to_zigzag_multiple_sequences,
            test_triton_kernel_performance,
        ]
    )
