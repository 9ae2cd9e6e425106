"""Options of the wrong type or value raise one sentence, for NumPy arrays and torch tensors."""

import numpy as np
import pytest
import torch

import zigzag_attention as z
from reference import draw
from zigzag_attention import Plan, attention

TENSORS = draw([16])
INPUTS = {"torch": TENSORS[:3], "numpy": tuple(x.numpy() for x in TENSORS[:3])}
PLAN = Plan([0, 16], 1)


@pytest.fixture(params=INPUTS)
def inputs(request):
    return INPUTS[request.param]


def drop_in(inputs, stride=1, **options):
    cu = np.array([0, 16])
    return z.zigzag_llama3_flash_attn_varlen_func(*inputs, cu, cu, 16, 16, stride, None, **options)


def refused(kind, message, call):
    with pytest.raises(kind, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


OPTIONS = [
    ({"window": (2**63, 0)}, ValueError, r"window\[0\] is 9223372036854775808; .* 64 bits"),
    ({"window": (1.5, 0)}, TypeError, r"window\[0\] is 1\.5; it must be an integer"),
    ({"window": (3.0, 0)}, TypeError, r"window\[0\] is 3\.0; it must be an integer"),
    ({"window": 3}, TypeError, r"window is 3; it must be \(left, right\)"),
    ({"window": (3, 0, 0)}, ValueError, r"window is \(3, 0, 0\); it must be \(left, right\)"),
    ({"window": (3, -2)}, ValueError, r"window is \(3, -2\); a side must be -1"),
    ({"softmax_scale": "x"}, TypeError, "softmax_scale is 'x'; it must be a number"),
    ({"softcap": None}, TypeError, "softcap is None; it must be a number"),
    ({"causal": 2}, TypeError, "causal is 2; it must be True or False"),
    ({"causal": None}, TypeError, "causal is None; it must be True or False"),
    ({"causal": "false"}, TypeError, "causal is 'false'; it must be True or False"),
    ({"kv_heads_per_stage": 0}, ValueError, "kv_heads_per_stage is 0; .* divisor of the 2 KV"),
    ({"kv_heads_per_stage": 1.0}, TypeError, "kv_heads_per_stage is 1.0; it must be an integer"),
    ({"group": 3}, TypeError, "group is int"),
]


@pytest.mark.parametrize(("options", "kind", "message"), OPTIONS, ids=str)
def test_attention(inputs, options, kind, message):
    refused(kind, message, lambda: attention(*inputs, PLAN, **options))


DROP_IN = [
    ({"stride": 0}, ValueError, "heads_k_stride is 0; .* divisor of the 2 KV heads"),
    ({"stride": 3}, ValueError, "heads_k_stride is 3; .* divisor of the 2 KV heads"),
    ({"window_size": 3}, TypeError, r"window_size is 3; it must be \(left, right\)"),
    ({"causal": None}, TypeError, "causal is None"),
    ({"softmax_scale": "x"}, TypeError, "softmax_scale is 'x'"),
    ({"group": 3}, TypeError, "group is int"),
]


@pytest.mark.parametrize(("options", "kind", "message"), DROP_IN, ids=str)
def test_drop_in(inputs, options, kind, message):
    refused(kind, message, lambda: drop_in(inputs, **options))


def test_contiguous_drop_in():
    cu = torch.tensor([0, 16])
    refused(
        ValueError,
        "heads_k_stride is 3",
        lambda: z.llama3_flash_attn_varlen_func(
            *INPUTS["torch"], cu, cu, 16, 16, 3, slice(0, 16), causal=True
        ),
    )


def test_options_of_numpy_are_taken(inputs):
    got = attention(
        *inputs, PLAN, causal=np.bool_(True), window=[np.int32(3), -1], softcap=np.float32(2)
    )
    assert (got == attention(*inputs, PLAN, window=(3, 0), softcap=2)).all()


def test_a_key_is_seen_when_causal_and_window_allow_it(inputs):
    expected = attention(*inputs, PLAN, window=(3, 0))
    assert (attention(*inputs, PLAN, window=(3, 5)) == expected).all()
    assert (attention(*inputs, PLAN, window=(3, -1)) == expected).all()
    assert (drop_in(inputs, causal=True, window_size=(3, 5)) == expected).all()
    assert not (attention(*inputs, PLAN, causal=False, window=(3, 5)) == expected).all()
    assert PLAN.flops(0, window=(3, 5)) == PLAN.flops(0, window=(3, 0))
    assert PLAN.flops(0, window=(3, 5)) < PLAN.flops(0, causal=False, window=(3, 5))


def test_ranks_may_write_one_causal_window_differently():
    from ranks import run_threads

    plan = Plan([0, 16], 2)

    def work(rank, group):
        parts = (z.shard(x, plan, rank) for x in INPUTS["numpy"])
        return attention(*parts, plan, group, window=(3, 0 if rank else 7))

    one = attention(*INPUTS["numpy"], PLAN, window=(3, 0))
    assert (z.unshard(run_threads(2, work), plan) == one).all()


PLANS = [
    (lambda: Plan([0, 20], 2.7), TypeError, "world_size is 2.7; it must be an integer"),
    (lambda: Plan([0, 20], "3"), TypeError, "world_size is '3'; it must be an integer"),
    (lambda: Plan([0, 20], True), TypeError, "world_size is True; it must be an integer"),
    (lambda: Plan([0.0, 20.0], 2), ValueError, "float64; it must be .* int32 or int64"),
    (lambda: Plan([[0], [1, 2]], 2), ValueError, "cu_seqlens is not a sequence of integers"),
    (lambda: PLAN.local_tokens(1.0), TypeError, "rank is 1.0; it must be an integer"),
    (lambda: PLAN.balance(window=(-3, 5)), ValueError, r"window is \(-3, 5\); a side must be -1"),
    (
        lambda: Plan([700, 324], 1),
        ValueError,
        r"starts at 700; it must start at 0, being cumulative: .* \(for lengths: Plan.from_lengths",
    ),
    (lambda: Plan([0, 324, 70], 1), ValueError, r"decreases from 324 to 70 at .*from_lengths\("),
    (lambda: Plan([0, -4], 1), ValueError, r"decreases from 0 to -4 at .* L1, \.\.\.\]$"),
    (lambda: PLAN.gathered_bytes(0, 2, -1, 4), ValueError, "head_dim -1 .* at least 1"),
    (lambda: setattr(PLAN, "world_size", 2), AttributeError, "world_size"),
    (lambda: z.shard(np.array([None] * 16), PLAN, 0), ValueError, "holds Python objects"),
    (lambda: z.shard(np.zeros(16), [0, 16], 0), TypeError, "it must be a Plan"),
]


@pytest.mark.parametrize(("call", "kind", "message"), PLANS)
def test_plans_and_shards(call, kind, message):
    refused(kind, message, call)


def test_masked_arrays():
    q, k, v = (np.ma.masked_array(x) for x in INPUTS["numpy"])
    refused(TypeError, "q is a masked array", lambda: attention(q, k, v, PLAN))
    refused(TypeError, "x is a masked array", lambda: z.shard(q, PLAN, 0))
    refused(TypeError, "cu_seqlens is a masked", lambda: Plan(np.ma.masked_array([0, 16]), 1))


def test_an_option_that_is_wrong_on_one_rank_stops_all():
    from concurrent.futures import ThreadPoolExecutor

    communicators = z.Communicator.threads(2)
    plan = Plan([0, 16], 2)

    def work(rank):
        parts = (z.shard(x, plan, rank) for x in INPUTS["numpy"])
        try:
            attention(*parts, plan, communicators[rank], window=(1.5 if rank else 1, 0))
        except (TypeError, RuntimeError, ValueError) as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as pool:
        messages = list(pool.map(work, range(2)))
    assert all("window[0] is 1.5" in message for message in messages), messages
