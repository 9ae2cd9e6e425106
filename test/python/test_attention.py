"""attention over ranks that are threads, against float64."""

import ml_dtypes
import numpy as np
import pytest
import torch
from ranks import run_threads

from reference import attend, close, draw
from zigzag_attention import Communicator, Plan, attention, attention_backward, shard, unshard

MIXED = [0, 1, 2, 7, 8, 9, 127, 128, 129, 61]
NAMES = ("out", "lse", "dq", "dk", "dv")
OPTIONS = [
    {},
    {"causal": False},
    {"window": (20, 0)},
    {"window": (9, 30), "causal": False},
    {"softcap": 4.0},
    {"softmax_scale": 0.3},
    {"kv_heads_per_stage": 1},
]


def over_ranks(inputs, lengths, size, **options):
    """out, lse and gradients in global order."""
    plan = Plan.from_lengths(lengths, size)

    def work(rank, communicator):
        q, k, v, dout = (shard(x, plan, rank) for x in inputs)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        out, lse = attention(q, k, v, plan, communicator, return_lse=True, **options)
        out.backward(dout)
        return out.detach(), lse, q.grad, k.grad, v.grad

    parts = run_threads(size, work)
    return dict(
        zip(NAMES, (unshard(list(group), plan) for group in zip(*parts, strict=True)), strict=True)
    )


def in_float64(inputs, lengths, **options):
    q, k, v = (x.double().requires_grad_() for x in inputs[:3])
    options["scale"] = options.pop("softmax_scale", None)
    options.pop("kv_heads_per_stage", None)
    out, lse = attend(q, k, v, lengths, **options)
    out.backward(inputs[3].double())
    return dict(zip(NAMES, (out, lse, q.grad, k.grad, v.grad), strict=True))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [1, 3, 4])
def test_float32(size, options):
    inputs = draw(MIXED)
    got = over_ranks(inputs, MIXED, size, **options)
    want = in_float64(inputs, MIXED, **dict(options))
    for name in NAMES:
        close(got[name], want[name], 3e-6 if name in ("dk", "dv") else 2e-6)


def test_same_bits_for_every_world_size():
    inputs = draw(MIXED)
    one = over_ranks(inputs, MIXED, 1)
    for size in (2, 3, 4, 8):
        many = over_ranks(inputs, MIXED, size)
        for name in ("out", "lse", "dq"):
            assert torch.equal(one[name], many[name]), f"{name} at {size} ranks"
        again = over_ranks(inputs, MIXED, size)
        assert all(torch.equal(many[name], again[name]) for name in NAMES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_do_not_lose_with_ranks(dtype):
    inputs = [x.to(dtype) for x in draw(MIXED, heads=4, kv_heads=1, seed=5)]
    want = in_float64(inputs, MIXED)

    def error(got, name):
        return float((got[name].double() - want[name].detach()).norm())

    one = over_ranks(inputs, MIXED, 1)
    for size in (4, 8):
        many = over_ranks(inputs, MIXED, size)
        for name in NAMES:
            bound = 1.1 if name in ("dk", "dv") else 1.05
            assert error(many, name) <= bound * error(one, name) + 1e-9, name


def test_numpy_arrays_in_and_out():
    lengths = [40, 25]
    plan = Plan.from_lengths(lengths, 1)
    inputs = draw(lengths)
    want = in_float64(inputs, lengths)
    q, k, v, dout = (x.numpy() for x in inputs)
    out, lse = attention(q, k, v, plan, return_lse=True)
    assert isinstance(out, np.ndarray) and isinstance(lse, np.ndarray)
    dq, dk, dv = attention_backward(dout, q, k, v, out, lse, plan)
    for name, got in zip(NAMES, (out, lse, dq, dk, dv), strict=True):
        close(torch.from_numpy(got), want[name], 3e-6)


def test_numpy_bfloat16_equals_torch():
    lengths = [40, 25]
    plan = Plan.from_lengths(lengths, 1)
    q, k, v, _ = draw(lengths)
    arrays = [x.numpy().astype(ml_dtypes.bfloat16) for x in (q, k, v)]
    out = attention(*arrays, plan)
    assert out.dtype == ml_dtypes.bfloat16
    expected = attention(*(x.to(torch.bfloat16) for x in (q, k, v)), plan)
    assert np.array_equal(out.astype(np.float32), expected.float().numpy())


def test_a_row_that_sees_no_key():
    """An empty row has out 0 and lse -inf."""
    q, k, v, _ = draw([8])
    out, lse = attention(q, k, v, Plan([0, 8], 1), window=(0, 0), return_lse=True)
    close(out, v.repeat_interleave(2, 1).double(), 1e-6)
    empty = Plan([0], 1)
    out, lse = attention(q[:0], k[:0], v[:0], empty, return_lse=True)
    assert out.shape == (0, 4, 32) and lse.shape == (0, 4)


def test_numpy_ranks_without_tokens():
    """NumPy gives arrays without elements strides of 0."""
    empty = np.zeros((0, 2, 16), np.float32)
    assert attention(empty, empty, empty, Plan([0], 1)).shape == (0, 2, 16)
    plan = Plan([0, 1], 2)
    x = np.ones((1, 2, 16), np.float32)

    def work(rank, communicator):
        mine = shard(x, plan, rank)
        out, lse = attention(mine, mine, mine, plan, communicator, return_lse=True)
        return out, *attention_backward(out, mine, mine, mine, out, lse, plan, communicator)

    parts = run_threads(2, work)
    assert np.array_equal(unshard([part[0] for part in parts], plan), x)
    assert all(len(y) == plan.local_tokens(r) for r in range(2) for y in parts[r])


def test_inputs_are_views_of_packed_tensors():
    lengths = [33, 64]
    plan = Plan.from_lengths(lengths, 1)
    qkv = torch.randn(97, 3, 4, 32)
    expected = attention(*(qkv[:, i].contiguous() for i in range(3)), plan)
    assert torch.equal(attention(qkv[:, 0], qkv[:, 1], qkv[:, 2], plan), expected)
    head_first = [qkv[:, i].transpose(0, 1).contiguous().transpose(0, 1) for i in range(3)]
    assert not head_first[0].is_contiguous()
    assert torch.equal(attention(*head_first, plan), expected)


def test_one_rank_needs_no_group():
    q, k, v, _ = draw([16])
    plan = Plan([0, 16], 1)
    assert torch.equal(attention(q, k, v, plan), attention(q, k, v, plan, Communicator.self()))


def test_two_groups_in_one_process():
    """Ranks 0..3 as two groups of two, each with its own pack."""
    packs = [draw([20, 13], seed=1), draw([50], seed=2)]
    lengths = [[20, 13], [50]]
    groups = [Communicator.threads(2), Communicator.threads(2)]

    def work(rank, _):
        which = rank // 2
        plan = Plan.from_lengths(lengths[which], 2)
        q, k, v, _dout = (shard(x, plan, rank % 2) for x in packs[which])
        return attention(q, k, v, plan, groups[which][rank % 2])

    parts = run_threads(4, work)
    for which in range(2):
        plan = Plan.from_lengths(lengths[which], 2)
        out = unshard(parts[2 * which : 2 * which + 2], plan)
        close(out, attend(*packs[which][:3], lengths[which])[0], 2e-6)


def test_backward_reads_results_of_any_strides():
    plan = Plan([0, 8], 1)
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((8, 4, 32), dtype=np.float32) for _ in range(4))
    out, lse = attention(q, k, v, plan, return_lse=True)
    out, lse = np.broadcast_to(out[:, :1], (8, 4, 32)), np.broadcast_to(lse[:, :1], (8, 4))
    got = attention_backward(dout, q, k, v, out, lse, plan)
    expected = attention_backward(dout, q, k, v, out.copy(), lse.copy(), plan)
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_array_equal(x, y)
