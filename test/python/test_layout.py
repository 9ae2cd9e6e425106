import ml_dtypes
import numpy as np
import pytest
import torch

from zigzag_attention import Plan, kernels, shard, unshard

LENGTHS = [5, 0, 64, 1, 130]
NUMPY_TYPES = [
    *("float16", "float32", "float64", "int8", "int16", "int32", "int64", "bool"),
    *("uint8", "uint16", "uint32", "uint64", "complex64"),
    *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn),
]
TORCH_TYPES = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float8_e4m3fn, torch.complex64),
]


@pytest.mark.parametrize("dtype", NUMPY_TYPES, ids=str)
@pytest.mark.parametrize("world_size", [1, 3])
def test_numpy_round_trip(dtype, world_size):
    plan = Plan.from_lengths(LENGTHS, world_size)
    x = np.random.default_rng(0).integers(0, 2, (plan.total_tokens, 3, 2)).astype(dtype)
    parts = [shard(x, plan, rank) for rank in range(world_size)]
    for rank, part in enumerate(parts):
        assert part.dtype == x.dtype
        assert part.tobytes() == x[plan.token_indices(rank)].tobytes()
    assert unshard(parts, plan).tobytes() == x.tobytes()


@pytest.mark.parametrize("dtype", TORCH_TYPES, ids=str)
def test_torch_round_trip(dtype):
    plan = Plan.from_lengths(LENGTHS, 4)
    x = torch.randint(0, 2, (plan.total_tokens, 4)).to(dtype)
    parts = [shard(x, plan, rank) for rank in range(4)]
    for rank, part in enumerate(parts):
        rows = torch.from_numpy(plan.token_indices(rank))
        assert part.dtype == dtype
        assert part.view(torch.uint8).equal(x[rows].view(torch.uint8))
    assert unshard(parts, plan).view(torch.uint8).equal(x.view(torch.uint8))


def test_strided_inputs_are_read_in_place():
    plan = Plan.from_lengths(LENGTHS, 2)
    whole = np.arange(plan.total_tokens * 12).reshape(plan.total_tokens, 4, 3)
    for x in (whole[:, 1], whole[..., ::-1], whole.transpose(0, 2, 1), np.asfortranarray(whole)):
        assert np.array_equal(shard(x, plan, 1), x[plan.token_indices(1)])
    vector = np.arange(plan.total_tokens)
    assert np.array_equal(shard(vector, plan, 0), plan.token_indices(0))


def test_read_only_inputs():
    plan = Plan.from_lengths(LENGTHS, 2)
    x = np.arange(plan.total_tokens)
    x.flags.writeable = False
    assert np.array_equal(shard(x, plan, 1), plan.token_indices(1))


def test_reference_twin_is_equal():
    plan = Plan.from_lengths(LENGTHS, 3)
    x = torch.randn(plan.total_tokens, 7)
    fused = [shard(x, plan, rank) for rank in range(3)]
    with kernels("reference"):
        plain = [shard(x, plan, rank) for rank in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(fused, plain, strict=True))


def test_shard_and_unshard_are_differentiable():
    plan = Plan.from_lengths(LENGTHS, 3)
    x = torch.randn(plan.total_tokens, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(plan.local_tokens(1), 2, dtype=torch.float64)
    (shard(x, plan, 1) * weight).sum().backward()
    expected = torch.zeros_like(x)
    expected[torch.from_numpy(plan.token_indices(1))] = weight
    assert torch.equal(x.grad, expected)

    parts = [shard(x.detach(), plan, rank).requires_grad_() for rank in range(3)]
    weight = torch.randn_like(x)
    (unshard(parts, plan) * weight).sum().backward()
    for rank, part in enumerate(parts):
        assert torch.equal(part.grad, shard(weight, plan, rank))
