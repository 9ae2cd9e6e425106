"""Autograd, torch.compile, checkpointing, and what cannot be differentiated."""

import pytest
import torch
import torch.utils.checkpoint
from torch.autograd import forward_ad

from reference import attend, close, draw
from zigzag_attention import (
    Plan,
    attention,
    kernels,
    shard,
    unshard,
    zigzag_llama3_flash_attn_varlen_func,
    zigzag_llama3_flash_attn_varlen_kvpacked_func,
    zigzag_llama3_flash_attn_varlen_qkvpacked_func,
)

LENGTHS = [5, 1, 8]
CU = torch.tensor([0, 5, 6, 14], dtype=torch.int32)


def test_gradcheck():
    """Finite differences; float32 is the widest type that attention takes, hence the bounds."""
    plan = Plan(CU, 1)
    q, k, v, _ = (x.requires_grad_() for x in draw(LENGTHS, 2, 1, 8))
    with pytest.warns(UserWarning, match="double precision"):
        assert torch.autograd.gradcheck(
            lambda *x: attention(*x, plan, softcap=3.0), (q, k, v), eps=1e-2, atol=2e-3, rtol=2e-2
        )


@pytest.mark.parametrize("name", ["fused", "reference"])
def test_three_packings_one_gradient(name):
    qkv = torch.randn(14, 3, 4, 32)
    dout = torch.randn(14, 4, 32)
    arguments = (CU, CU, 8, 8, 2, None)
    with kernels(name):
        a = qkv.clone().requires_grad_()
        out_a = zigzag_llama3_flash_attn_varlen_qkvpacked_func(a, *arguments, causal=True)
        out_a.backward(dout)
        q, kv = qkv[:, 0].clone().requires_grad_(), qkv[:, 1:].clone().requires_grad_()
        out_b = zigzag_llama3_flash_attn_varlen_kvpacked_func(q, kv, *arguments, causal=True)
        out_b.backward(dout)
        x, y, z = (qkv[:, i].clone().requires_grad_() for i in range(3))
        out_c = zigzag_llama3_flash_attn_varlen_func(x, y, z, *arguments, causal=True)
        out_c.backward(dout)
    assert torch.equal(out_a, out_b) and torch.equal(out_a, out_c)
    assert torch.equal(a.grad, torch.stack([x.grad, y.grad, z.grad], 1))
    assert torch.equal(a.grad, torch.cat([q.grad[:, None], kv.grad], 1))
    want = qkv.double().requires_grad_()
    attend(*want.unbind(1), LENGTHS)[0].backward(dout.double())
    close(a.grad, want.grad, 3e-6)


def test_only_some_inputs_need_gradients():
    q, k, v, dout = draw(LENGTHS)
    plan = Plan(CU, 1)
    attention(q.requires_grad_(), k, v, plan).backward(dout)
    assert q.grad is not None and k.grad is None
    with torch.no_grad():
        assert not attention(q, k, v, plan).requires_grad
    with torch.inference_mode():
        attention(q, k, v, plan)


def test_gradients_that_are_expanded_or_transposed():
    q, k, v, _ = (x.requires_grad_() for x in draw(LENGTHS))
    plan = Plan(CU, 1)
    attention(q, k, v, plan).sum().backward()
    expected = q.grad.clone()
    q.grad = None
    attention(q, k, v, plan).transpose(0, 2).contiguous().sum().backward()
    assert torch.equal(q.grad, expected)


def test_lse_is_not_differentiable():
    q, k, v, _ = (x.requires_grad_() for x in draw(LENGTHS))
    out, lse = attention(q, k, v, Plan(CU, 1), return_lse=True)
    assert out.requires_grad and not lse.requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    plan = Plan(CU, 1)
    q, k, v, dout = (x.requires_grad_() for x in draw(LENGTHS))

    def layer(*x):
        return attention(*x, plan) * 2

    layer(q, k, v).backward(dout)
    expected = [x.grad.clone() for x in (q, k, v)]
    for x in (q, k, v):
        x.grad = None
    torch.utils.checkpoint.checkpoint(layer, q, k, v, use_reentrant=reentrant).backward(dout)
    assert all(torch.equal(x.grad, y) for x, y in zip((q, k, v), expected, strict=True))


def test_double_backward_raises():
    q, k, v, _ = (x.requires_grad_() for x in draw(LENGTHS))
    out = attention(q, k, v, Plan(CU, 1))
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="only first derivatives are supported"):
        dq.sum().backward()


def test_forward_mode_raises():
    q, k, v, _ = draw(LENGTHS)
    plan = Plan(CU, 1)
    calls = [lambda x: attention(x, k, v, plan), lambda x: shard(x, plan, 0)]
    for call in (*calls, lambda x: unshard([x], plan)):
        with pytest.raises(RuntimeError, match=r"inside torch\.func's jvp, which is not supported"):
            torch.func.jvp(call, (q,), (torch.ones_like(q),))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(q, torch.ones_like(q))
            with pytest.raises(RuntimeError, match="forward-mode derivatives are not supported"):
                call(dual)


def test_torch_func_grad_raises():
    q, k, v, _ = draw(LENGTHS)
    plan = Plan(CU, 1)
    with pytest.raises(RuntimeError, match=r"inside torch\.func's grad, which is not supported"):
        torch.func.grad(lambda x: attention(x, k, v, plan).sum())(q)


def test_pack_changed_before_the_backward_raises():
    qkv = torch.randn(14, 3, 4, 32, requires_grad=True)
    cu = CU.clone()
    out = zigzag_llama3_flash_attn_varlen_qkvpacked_func(qkv, cu, cu, 8, 8, 1, None, causal=True)
    cu[1] = 3
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_new_pack_in_the_same_tensor_is_seen():
    q, k, v, _ = draw(LENGTHS)
    cu = CU.clone()
    arguments = (8, 8, 1, None)
    first = zigzag_llama3_flash_attn_varlen_func(q, k, v, cu, cu, *arguments, causal=True)
    cu[1] = 3
    second = zigzag_llama3_flash_attn_varlen_func(q, k, v, cu, cu, *arguments, causal=True)
    assert not torch.equal(first, second)
    close(second, attend(q, k, v, [3, 3, 8])[0], 2e-6)


def test_a_new_pack_in_memory_shared_with_numpy_is_seen():
    q, k, v, _ = draw(LENGTHS)
    memory = CU.numpy().copy()
    cu = torch.from_numpy(memory)
    zigzag_llama3_flash_attn_varlen_func(q, k, v, cu, cu, 8, 8, 1, None, causal=True)
    memory[1] = 3
    second = zigzag_llama3_flash_attn_varlen_func(q, k, v, cu, cu, 8, 8, 1, None, causal=True)
    close(second, attend(q, k, v, [3, 3, 8])[0], 2e-6)
    q.requires_grad_()
    third = zigzag_llama3_flash_attn_varlen_func(q, k, v, cu, cu, 8, 8, 1, None, causal=True)
    memory[1] = 5
    with pytest.raises(ValueError, match="changed between forward and backward"):
        third.sum().backward()


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(32, 96, bias=False)

    def forward(self, x, plan):
        q, k, v = self.qkv(x).view(-1, 3, 4, 8).unbind(1)
        return attention(q, k, v, plan).flatten(1)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_models(backend, tmp_path, monkeypatch):
    # Graphs that an earlier build of the package left in the cache would run instead.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    torch._dynamo.utils.counters.clear()
    for lengths in ([5, 1, 8], [14], [2, 2, 2, 8], [3, 4, 7], [1] * 14):
        x = torch.randn(14, 32)
        plan = Plan.from_lengths(lengths, 1)
        layer(x, plan).square().sum().backward()
        expected, layer.qkv.weight.grad = layer.qkv.weight.grad, None
        compiled(x, plan).square().sum().backward()
        torch.testing.assert_close(layer.qkv.weight.grad, expected)
        layer.qkv.weight.grad = None
    # One graph for the first pack and one for packs of any number of documents.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_compiled_drop_in():
    torch._dynamo.reset()
    qkv = torch.randn(14, 3, 4, 32)

    def call(x, cu):
        return zigzag_llama3_flash_attn_varlen_qkvpacked_func(x, cu, cu, 8, 8, 1, None, causal=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(qkv, CU), call(qkv, CU))


def test_meta_tensors_give_shapes():
    q, k, v, _ = (x.to("meta") for x in draw(LENGTHS))
    out, lse = attention(q, k, v, Plan(CU, 1), return_lse=True)
    assert out.device.type == "meta" and out.shape == q.shape and lse.shape == q.shape[:2]


def test_operation_is_registered_well():
    from zigzag_attention import _torch

    q, k, v, _ = (x.requires_grad_() for x in draw(LENGTHS))
    plan = Plan(CU, 1)
    from zigzag_attention.communicator import handle_of

    arguments = (q, k, v, plan.as_tensor(), None, 1, handle_of(None, 1), True, None, -1, -1, 0.0)
    torch.library.opcheck(
        _torch._attention,
        (*arguments, None, False, ""),
        # The others compare a second call with float64 gradients of their own.
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
