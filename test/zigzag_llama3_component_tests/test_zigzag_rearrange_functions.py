"""The rearranging helpers: rank order <-> sequence order, query groups and their key slices.

torchrun --nproc_per_node 8 test/zigzag_llama3_component_tests/test_zigzag_rearrange_functions.py
"""

from __future__ import annotations

import sys
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
    compute_kv_slices_for_groups,
    rearrange_grad_from_contiguous_to_zigzag,
    rearrange_kv_from_zigzag_to_contiguous,
    split_q_by_zigzag_chunk_index,
)

LENGTHS = [512, 1024, 768]


def test_rearrange_kv_from_zigzag_to_contiguous() -> None:
    ranks = world()
    kv = torch.randn(2, sum(LENGTHS), 4, 64, generator=seeded(5)).to(torch.float16)
    buffer = rank_order(kv, LENGTHS, ranks.size, dim=1).to(ranks.device)
    got = rearrange_kv_from_zigzag_to_contiguous(buffer, ranks.size, cu_seqlens_of(LENGTHS))
    report_exact(
        "rearrange_kv_from_zigzag_to_contiguous",
        [("K", got[0].cpu(), kv[0]), ("V", got[1].cpu(), kv[1])],
    )


def test_rearrange_grad_from_contiguous_to_zigzag() -> None:
    ranks = world()
    grad = torch.randn(2, sum(LENGTHS), 4, 64, generator=seeded(6)).to(torch.bfloat16)
    there = grad.to(ranks.device)
    got = rearrange_grad_from_contiguous_to_zigzag(there, ranks.size, cu_seqlens_of(LENGTHS))
    expected = rank_order(grad, LENGTHS, ranks.size, dim=1)
    report_exact(
        "rearrange_grad_from_contiguous_to_zigzag",
        [("dK", got[0].cpu(), expected[0]), ("dV", got[1].cpu(), expected[1])],
    )


def test_rearrange_round_trip() -> None:
    ranks = world()
    kv = torch.randn(2, sum(LENGTHS), 4, 64, generator=seeded(8)).to(ranks.device)
    cu_seqlens = cu_seqlens_of(LENGTHS)
    there = rearrange_grad_from_contiguous_to_zigzag(kv, ranks.size, cu_seqlens)
    back = rearrange_kv_from_zigzag_to_contiguous(there, ranks.size, cu_seqlens)
    report_exact("rearrange_round_trip", [("KV", back, kv)])


def test_split_q_by_zigzag_chunk_index() -> None:
    ranks = world()
    size, rank = ranks.size, ranks.rank
    q = torch.randn(sum(LENGTHS), 4, 64, generator=seeded(9))
    local = q[oracle_rows(LENGTHS, rank, size)].to(ranks.device)
    local_cu = cu_seqlens_of([length // size for length in LENGTHS])
    q_list, cu_list, indices_list = split_q_by_zigzag_chunk_index(local, local_cu, size, rank)
    pairs = []
    for group, index in enumerate((rank, 2 * size - 1 - rank)):
        rows, start = [], 0
        for length in LENGTHS:
            chunk = length // (2 * size)
            rows.append(torch.arange(start + index * chunk, start + (index + 1) * chunk))
            start += length
        expected_cu = cu_seqlens_of([length // (2 * size) for length in LENGTHS])
        pairs += [
            (f"Q{group}", q_list[group].cpu(), q[torch.cat(rows)]),
            (f"cu{group}", cu_list[group], expected_cu),
            (f"indices{group}", local[indices_list[group]], q_list[group]),
        ]
    report_exact("split_q_by_zigzag_chunk_index", pairs)


def test_compute_kv_slices_for_groups() -> None:
    ranks = world()
    size, rank = ranks.size, ranks.rank
    cu_seqlens = cu_seqlens_of(LENGTHS)
    early, late = rank, 2 * size - 1 - rank
    groups = compute_kv_slices_for_groups(cu_seqlens, early, late, size)
    pairs = []
    for group, index in enumerate((early, late)):
        counts = [(index + 1) * (length // (2 * size)) for length in LENGTHS]
        starts = cu_seqlens[:-1].tolist()
        expected = [(start, start + count) for start, count in zip(starts, counts, strict=True)]
        ranges, cu_slice = groups[group]
        pairs += [
            (f"ranges{group}", torch.tensor(ranges), torch.tensor(expected)),
            (f"cu{group}", cu_slice, cu_seqlens_of(counts)),
        ]
    report_exact("compute_kv_slices_for_groups", pairs)


if __name__ == "__main__":
    main(
        [
            test_rearrange_kv_from_zigzag_to_contiguous,
            test_rearrange_grad_from_contiguous_to_zigzag,
            test_rearrange_round_trip,
            test_split_q_by_zigzag_chunk_index,
            test_compute_kv_slices_for_groups,
        ]
    )
