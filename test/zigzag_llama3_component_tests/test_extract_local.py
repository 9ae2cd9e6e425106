"""extract_local: the zigzag rows of each rank.

torchrun --nproc_per_node 8 test/zigzag_llama3_component_tests/test_extract_local.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seed_support import cu_seqlens_of, main, oracle_rows, report_exact, seeded, world

from zigzag_attention import Plan, extract_local, unshard


def check(title: str, lengths: list[int], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    ranks = world()
    value = torch.randn(sum(lengths), *shape, generator=seeded(3)).to(dtype)
    cu_seqlens = cu_seqlens_of(lengths)
    value_there = value.to(ranks.device)
    parts = [extract_local(value_there, cu_seqlens, rank, ranks.size) for rank in range(ranks.size)]
    local = parts[ranks.rank]
    expected = value[oracle_rows(lengths, ranks.rank, ranks.size)].to(ranks.device)
    whole = unshard(parts, Plan(cu_seqlens, ranks.size))
    report_exact(title, [("Local", local, expected), ("Unshard", whole, value_there)])


def test_extract_local_single_sequence() -> None:
    check("extract_local_single_sequence", [1024], (8, 128), torch.bfloat16)


def test_extract_local_multiple_sequences() -> None:
    check("extract_local_multiple_sequences", [512, 1024, 768], (4, 64), torch.float16)


def test_extract_local_float32_vectors() -> None:
    check("extract_local_float32_vectors", [256, 64, 128], (), torch.float32)


def test_extract_local_uneven_length_raises() -> None:
    ranks = world()
    lengths = [2 * ranks.size + 1, 2 * ranks.size]
    raised = ""
    try:
        extract_local(torch.zeros(sum(lengths)), cu_seqlens_of(lengths), ranks.rank, ranks.size)
    except ValueError as error:
        raised = str(error)
    assert f"multiples of 2 * world_size = {2 * ranks.size}" in raised
    ranks.say("", f"[Rank {ranks.rank}] Test: extract_local_uneven_length_raises", "  ✓ PASSED")


if __name__ == "__main__":
    main(
        [
            test_extract_local_single_sequence,
            test_extract_local_multiple_sequences,
            test_extract_local_float32_vectors,
            test_extract_local_uneven_length_raises,
        ]
    )
