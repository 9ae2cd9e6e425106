"""The seed-named helpers on NumPy and torch, and the contiguous layout's arguments."""

import numpy as np
import pytest
import torch

from zigzag_attention import (
    Plan,
    compute_kv_slices_for_groups,
    extract_local,
    extract_zigzag_kv_slices_for_group,
    llama3_flash_attn_prepare_cu_seqlens,
    rearrange_grad_from_contiguous_to_zigzag,
    rearrange_kv_from_zigzag_to_contiguous,
    scatter_grad_to_zigzag,
    split_q_by_zigzag_chunk_index,
)

CU = np.array([0, 32, 96, 112], np.int32)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_helpers_agree_with_one_another(kind, size):
    kv = np.random.default_rng(0).standard_normal((2, 112, 3, 8)).astype(np.float32)
    cu = CU
    if kind == "torch":
        kv, cu = torch.from_numpy(kv), torch.from_numpy(CU)

    def equal(a, b):
        assert type(a) is type(b)
        assert np.array_equal(np.asarray(a), np.asarray(b))

    zigzag = rearrange_grad_from_contiguous_to_zigzag(kv, size, cu)
    equal(rearrange_kv_from_zigzag_to_contiguous(zigzag, size, cu), kv)
    equal(rearrange_grad_from_contiguous_to_zigzag(kv[0], size, cu), zigzag[0])
    for rank in range(size):
        local = extract_local(kv[0], cu, rank, size)
        rows = 112 // size
        equal(local, zigzag[0][rank * rows : (rank + 1) * rows])
        equal(scatter_grad_to_zigzag(kv[0], cu, rank, size), local)
        qs, cus, indices = split_q_by_zigzag_chunk_index(local, cu // size, size, rank)
        early, late = Plan(CU, size).chunk_indices(rank)
        groups = compute_kv_slices_for_groups(cu, early, late, size, cus)
        for (ranges, cu_k), q, cu_q, picked in zip(groups, qs, cus, indices, strict=True):
            equal(q, local[picked])
            assert len(q) == int(cu_q[-1])
            assert len(ranges) == 3
            assert int(cu_k[-1]) == sum(end - start for start, end in ranges)
        for (ranges, _), index in zip(groups, (early, late), strict=True):
            slices = [(start, end, index) for start, end in ranges]
            k, v = extract_zigzag_kv_slices_for_group(zigzag, slices, cu, size, 3, 8)
            rows_seen = np.concatenate([np.arange(start, end) for start, end in ranges])
            equal(k, kv[0][rows_seen])
            equal(v, kv[1][rows_seen])


def test_second_document_starts_at_its_local_offset():
    """Trap 1: the rows of document s of a rank start at its local offset."""
    x = torch.arange(112)
    local = extract_local(x, CU, 1, 4)
    plan = Plan(CU, 4)
    assert local.tolist() == plan.token_indices(1).tolist()
    assert plan.local_cu_seqlens(1).tolist() == [0, 8, 24, 28]


CONTIGUOUS = [
    ([0, 16], 4),
    ([0, 5, 16], 4),
    ([0, 4, 8, 12, 16], 4),
    ([0, 3, 3, 9, 16], 4),
    ([0, 1, 2, 3, 15, 16], 2),
    ([0, 8], 1),
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("cu", "size"), CONTIGUOUS)
def test_llama3_arguments_describe_each_ranks_run(cu, size, causal):
    total = cu[-1]
    document = np.searchsorted(cu, np.arange(total), side="right") - 1
    run = total // size
    for rank in range(size):
        cu_q, cu_k, max_q, max_k, keys = llama3_flash_attn_prepare_cu_seqlens(
            torch.tensor(cu, dtype=torch.int32), causal, rank, size
        )
        assert cu_q.dtype == torch.int32 and cu_q[0] == 0 and cu_k[0] == 0
        assert len(cu_q) == len(cu_k)
        assert int(cu_q[-1]) == run and int(cu_k[-1]) == keys.stop - keys.start
        assert max_q == int(cu_q.diff().max()) and max_k == int(cu_k.diff().max())
        for s in range(len(cu_q) - 1):
            rows = np.arange(int(cu_q[s]), int(cu_q[s + 1])) + rank * run
            seen = np.arange(int(cu_k[s]), int(cu_k[s + 1])) + keys.start
            if len(rows) == 0:
                continue
            assert len(set(document[rows])) == 1
            own = np.flatnonzero(document == document[rows[0]])
            expected = own[own <= rows[-1]] if causal else own
            assert np.array_equal(seen, expected)


def test_llama3_needs_equal_runs():
    with pytest.raises(ValueError, match=r"17 tokens.*multiple of world_size, 4"):
        llama3_flash_attn_prepare_cu_seqlens([0, 17], True, 0, 4)
    with pytest.raises(ValueError, match="rank is 4; it must be 0 to 3"):
        llama3_flash_attn_prepare_cu_seqlens([0, 16], True, 4, 4)
