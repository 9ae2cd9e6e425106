import pickle

import numpy as np
import pytest
import torch

from zigzag_attention import Plan

LENGTHS = [[], [0], [1], [7, 0, 64, 3], [512, 1024, 768], list(range(40))]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_local_rows_and_global_tokens_are_inverse(lengths, world_size):
    plan = Plan.from_lengths(lengths, world_size)
    tokens = [plan.token_indices(rank) for rank in range(world_size)]
    assert sorted(np.concatenate(tokens).tolist()) == list(range(sum(lengths)))
    counts = [len(rows) for rows in tokens]
    assert counts == [plan.local_tokens(rank) for rank in range(world_size)]
    assert max(counts) - min(counts) <= 1
    for rank, rows in enumerate(tokens):
        assert plan.local_cu_seqlens(rank)[-1] == len(rows)
        starts = plan.cu_seqlens[np.searchsorted(plan.cu_seqlens, rows, side="right") - 1]
        assert np.array_equal(plan.position_ids(rank), rows - starts)
        for row, token in list(enumerate(rows.tolist()))[:5]:
            assert plan.local_row(token) == (rank, row)


def test_accepts_what_holds_integers():
    expected = Plan([0, 3, 10], 2)
    for values in (
        (0, 3, 10),
        np.array([0, 3, 10], np.int32),
        np.array([0, 3, 10], np.int64),
        np.array([0, 9, 3, 9, 10], np.int64)[::2],
        torch.tensor([0, 3, 10]),
        torch.tensor([0, 3, 10], dtype=torch.int32),
    ):
        assert Plan(values, 2) == expected
        assert Plan(values, 2).fingerprint == expected.fingerprint
    assert Plan([0, 3, 10], 3) != expected
    assert Plan([0, 3, 10], 3).fingerprint != expected.fingerprint
    assert len({expected, Plan([0, 3, 10], 2)}) == 1


def test_is_immutable_from_outside():
    values = torch.tensor([0, 3, 10])
    plan = Plan(values, 2)
    values[1] = 5
    plan.cu_seqlens[1] = 6
    assert plan.cu_seqlens.tolist() == [0, 3, 10]


def test_pickles():
    plan = Plan([0, 3, 10], 2)
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_costs():
    plan = Plan([0, 1024], 4)
    assert plan.balance() == 1.0
    pairs = 1024 * 1025 / 2
    total = sum(plan.flops(rank, heads=2, head_dim=64) for rank in range(4))
    assert total == pytest.approx(4 * 2 * 64 * pairs)
    assert plan.gathered_bytes(0, kv_heads=2, head_dim=64, itemsize=2) > 0
    assert Plan([0, 1024], 1).gathered_bytes(0, 2, 64, 2) == 0
    assert plan.flops(0, window=(15, 0)) < plan.flops(0)


def test_chunks():
    plan = Plan([0, 80], 4)
    assert plan.chunk_indices(1) == (1, 6)
    assert plan.chunk_owner(6) == 1
    assert plan.chunk(0, 6) == (60, 70, 10)
    assert plan.chunk(0, 6).local_row == 10
