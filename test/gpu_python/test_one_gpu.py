"""One GPU: values, streams, copies, autograd, torch.compile, checkpointing, graphs, bad input."""

import os
import subprocess
import sys

import pytest
import torch
import torch.utils.checkpoint
from support import check_all, draw, wanted

import zigzag_attention as z

LENGTHS = [300, 1, 0, 129, 64]
CASES = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16, d 128": {"dtype": torch.float16, "head_dim": 128},
    "bfloat16, full": {"dtype": torch.bfloat16, "causal": False},
    "bfloat16, window": {"dtype": torch.bfloat16, "window": (31, 0)},
    "bfloat16, softcap": {"dtype": torch.bfloat16, "softcap": 5.0},
    "float32, window of both sides": {"window": (20, 7), "causal": False},
    "float32, d 80, heads 6/3": {"head_dim": 80, "heads": 6, "kv_heads": 3},
}


def run(inputs, plan, device, group=None, **options):
    q, k, v, dout = (x.to(device) for x in inputs)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out, lse = z.attention(q, k, v, plan, group, return_lse=True, **options)
    out.backward(dout)
    return out, lse, q.grad, k.grad, v.grad


@pytest.mark.parametrize("name", CASES)
def test_values(name, device):
    case = dict(CASES[name])
    dtype = case.pop("dtype", torch.float32)
    shape = {key: case.pop(key) for key in ("heads", "kv_heads", "head_dim") if key in case}
    inputs = draw(LENGTHS, dtype=dtype, **shape)
    got = run(inputs, z.Plan.from_lengths(LENGTHS, 1), device, **case)
    assert all(x.device == device for x in got)
    print(name, check_all(got, wanted(inputs, LENGTHS, **case), dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_packings_one_gradient(dtype, device):
    cu = torch.tensor([0, 300, 301, 494], dtype=torch.int32, device=device)
    qkv, dout = torch.randn(494, 3, 4, 64, dtype=dtype, device=device), torch.randn(494, 4, 64)
    dout = dout.to(device, dtype)
    arguments = (cu, cu, 300, 300, 2, None)
    a = qkv.clone().requires_grad_()
    out_a = z.zigzag_llama3_flash_attn_varlen_qkvpacked_func(a, *arguments, causal=True)
    out_a.backward(dout)
    q, kv = qkv[:, 0].clone().requires_grad_(), qkv[:, 1:].clone().requires_grad_()
    out_b = z.zigzag_llama3_flash_attn_varlen_kvpacked_func(q, kv, *arguments, causal=True)
    out_b.backward(dout)
    parts = [qkv[:, i].clone().requires_grad_() for i in range(3)]
    out_c = z.zigzag_llama3_flash_attn_varlen_func(*parts, *arguments, causal=True)
    out_c.backward(dout)
    assert torch.equal(out_a, out_b) and torch.equal(out_a, out_c)
    tolerance = {"rtol": 0, "atol": 0.05} if dtype == torch.bfloat16 else {"rtol": 0, "atol": 1e-4}
    torch.testing.assert_close(a.grad, torch.stack([x.grad for x in parts], 1), **tolerance)
    torch.testing.assert_close(a.grad, torch.cat([q.grad[:, None], kv.grad], 1), **tolerance)


@pytest.mark.real
def test_the_callers_stream_is_used_and_nothing_waits(device):
    """Inputs are still being made when the call returns; a steady call waits for no GPU."""
    plan = z.Plan.from_lengths([1500, 548], 1)
    inputs = [x.to(device) for x in draw([1500, 548], dtype=torch.bfloat16)]
    expected = run(inputs, plan, device)
    cu = torch.tensor([0, 1500, 2048], dtype=torch.int32, device=device)
    side = torch.cuda.Stream(device)
    for repeat in range(3):
        torch.cuda.synchronize(device)
        with torch.cuda.stream(side):
            torch.cuda._sleep(400_000_000)  # about 0.2 s
            late = [x.clone().requires_grad_() for x in inputs[:3]]
            out = z.zigzag_llama3_flash_attn_varlen_func(
                *late, cu, cu, 1500, 1500, 2, None, causal=True
            )
            out.backward(inputs[3])
            ended = side.query()
        if repeat:  # the first one builds plans
            assert not ended, "the call waited for the GPU"
        side.synchronize()
        assert torch.equal(out, expected[0])


@pytest.mark.real
def test_nothing_is_copied(device):
    plan = z.Plan.from_lengths([16384], 1)
    qkv = torch.randn(16384, 3, 16, 128, dtype=torch.bfloat16, device=device)
    for _ in range(2):
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        out, lse = z.attention(*qkv.unbind(1), plan, return_lse=True)
        grown = torch.cuda.max_memory_allocated(device) - before
        assert grown <= out.nbytes + lse.nbytes + 4096, (grown, out.nbytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic(dtype, device):
    lengths = [777, 50, 197]
    inputs, plan = draw(lengths, dtype=dtype, head_dim=128), z.Plan.from_lengths(lengths, 1)
    first = run(inputs, plan, device, deterministic=True)
    for _ in range(4):
        again = run(inputs, plan, device, deterministic=True)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(64, 3 * 4 * 32, bias=False)

    def forward(self, x, plan):
        q, k, v = self.qkv(x).view(-1, 3, 4, 32).unbind(1)
        return z.attention(q, k, v, plan, deterministic=True).flatten(1)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_models(backend, device):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = Layer().to(device)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for lengths in ([50, 1, 77], [128], [32, 32, 32, 32]):
        x = torch.randn(128, 64, device=device)
        plan = z.Plan.from_lengths(lengths, 1)
        layer(x, plan).square().sum().backward()
        expected, layer.qkv.weight.grad = layer.qkv.weight.grad, None
        compiled(x, plan).square().sum().backward()
        torch.testing.assert_close(layer.qkv.weight.grad, expected, rtol=1e-3, atol=1e-3)
        layer.qkv.weight.grad = None


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant, device):
    lengths = [100, 28]
    plan = z.Plan.from_lengths(lengths, 1)
    q, k, v, dout = (x.to(device) for x in draw(lengths, dtype=torch.bfloat16))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def layer(*x):
        return z.attention(*x, plan, deterministic=True) * 2

    layer(*leaves).backward(dout)
    expected = [x.grad.clone() for x in leaves]
    for x in leaves:
        x.grad = None
    torch.utils.checkpoint.checkpoint(layer, *leaves, use_reentrant=reentrant).backward(dout)
    assert all(torch.equal(x.grad, y) for x, y in zip(leaves, expected, strict=True))


@pytest.mark.real
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[1024], [300, 1, 0, 129, 594], [8] * 128])
def test_a_step_in_a_cuda_graph(dtype, lengths, device):
    """Captured by torch.cuda.graph in its strictest mode; replays see new inputs."""
    plan = z.Plan.from_lengths(lengths, 1)
    q, k, v, dout = (x.to(device) for x in draw(lengths, dtype=dtype, head_dim=128))
    q, k, v = (x.requires_grad_() for x in (q, k, v))

    def step():
        out = z.attention(q, k, v, plan, deterministic=True)
        return out, *torch.autograd.grad(out, (q, k, v), dout)

    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (5, 6):
        fresh = draw(lengths, dtype=dtype, head_dim=128, seed=seed)
        with torch.no_grad():
            for old, new in zip((q, k, v, dout), fresh, strict=True):
                old.copy_(new)
        graph.replay()
        expected = step()
        assert all(torch.equal(x, y) for x, y in zip(captured, expected, strict=True))


DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 3, 4])
def test_layout_is_exact(dtype, size, device):
    lengths = [37, 0, 1, 200, 5]
    plan = z.Plan.from_lengths(lengths, size)
    x = torch.randn(243, 5, 6, device=device).mul(50).to(dtype)
    for rows in (x, x[:, 1:4, ::2], x.transpose(1, 2)):
        parts = [z.shard(rows, plan, rank) for rank in range(size)]
        for rank, part in enumerate(parts):
            picked = torch.from_numpy(plan.token_indices(rank)).to(device)
            assert torch.equal(part, rows[picked])
        assert torch.equal(z.unshard(parts, plan), rows)
        with z.kernels("reference"):
            plain = [z.shard(rows, plan, rank) for rank in range(size)]
            assert torch.equal(z.unshard(plain, plan), rows)
        assert all(torch.equal(a, b) for a, b in zip(parts, plain, strict=True))


def test_layout_gradients(device):
    plan = z.Plan.from_lengths([30, 34], 4)
    x = torch.randn(64, 3, device=device, requires_grad=True)
    z.unshard([z.shard(x, plan, rank) * (rank + 1) for rank in range(4)], plan).sum().backward()
    for rank in range(4):
        picked = torch.from_numpy(plan.token_indices(rank)).to(device)
        assert torch.equal(x.grad[picked], torch.full((16, 3), rank + 1.0, device=device))


class Exported:
    """An array of some other library."""

    def __init__(self, tensor):
        self.tensor, self.shape = tensor, tuple(tensor.shape)

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_arrays_of_other_libraries(dtype, device):
    plan = z.Plan.from_lengths([40, 24, 64], 2)
    x = torch.randn(128, 6, 5, device=device).mul(9).to(dtype)
    got = [z.shard(Exported(x), plan, rank) for rank in range(2)]
    parts = [torch.from_dlpack(part) for part in got]
    assert all(torch.equal(part, z.shard(x, plan, rank)) for rank, part in enumerate(parts))
    whole = torch.from_dlpack(z.unshard([Exported(part) for part in parts], plan))
    assert whole.device == device and torch.equal(whole, x)
    cu = [0, 40, 64, 128]
    grad = torch.from_dlpack(z.scatter_grad_to_zigzag(Exported(x), cu, 1, 2))
    assert torch.equal(grad, parts[1])


def test_cupy(device):
    cupy = pytest.importorskip("cupy")
    plan = z.Plan.from_lengths([40, 24, 64], 2)
    x = cupy.random.standard_normal((128, 6, 5)).astype(cupy.float32)
    parts = [z.shard(x, plan, rank) for rank in range(2)]
    assert all(isinstance(part, cupy.ndarray) for part in parts)
    for rank, part in enumerate(parts):
        assert bool((part == x[cupy.asarray(plan.token_indices(rank))]).all())
    assert bool((z.unshard(parts, plan) == x).all())
    with cupy.cuda.Stream(non_blocking=True):  # the producer's stream is waited for
        y = x * 2
        assert bool((z.unshard([z.shard(y, plan, r) for r in range(2)], plan) == y).all())


JAX = """
import jax, jax.numpy as jnp, numpy as np
import zigzag_attention as z
kind = jax.devices()[0].platform
plan = z.Plan.from_lengths([40, 24, 64], 2)
for dtype in (jnp.float32, jnp.bfloat16, jnp.int32):
    x = (jnp.arange(128 * 6 * 5).reshape(128, 6, 5) % 251).astype(dtype)
    parts = [z.shard(x, plan, rank) for rank in range(2)]
    for rank, part in enumerate(parts):
        assert isinstance(part, jax.Array) and part.devices() == x.devices(), part.devices()
        assert bool((part == x[plan.token_indices(rank)]).all())
    assert bool((z.unshard(parts, plan) == x).all())
print("jax on", kind)
"""


def test_jax(device):
    pytest.importorskip("jax")
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    ended = subprocess.run(
        [sys.executable, "-c", JAX], env=environment, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    print(ended.stdout)
    if device.type == "cuda":
        assert "jax on gpu" in ended.stdout or "jax on cuda" in ended.stdout


def tensors(device, tokens=64, dtype=torch.float32):
    return tuple(torch.randn(tokens, heads, 32, device=device, dtype=dtype) for heads in (4, 2, 2))


@pytest.mark.real
def test_tensors_on_different_devices(device):
    plan = z.Plan.from_lengths([64], 1)
    q, k, v = tensors(device)
    with pytest.raises(ValueError, match="k is on cpu and q on cuda:0; all tensors must be on one"):
        z.attention(q, k.cpu(), v, plan)
    with pytest.raises(ValueError, match="v is on cpu"):
        z.attention(q, k, v.cpu(), plan)
    parts = [torch.zeros(64, 2, device=device)]
    with pytest.raises(ValueError, match="they must be on one device"):
        z.unshard([parts[0][:32], parts[0][32:].cpu()], z.Plan.from_lengths([64], 2))


@pytest.mark.real
@pytest.mark.gpus(2)
def test_a_gpu_that_is_not_the_current_one():
    plan = z.Plan.from_lengths([64], 1)
    inputs = draw([64], dtype=torch.bfloat16)
    first = run(inputs, plan, torch.device("cuda", 0), deterministic=True)
    other = run(inputs, plan, torch.device("cuda", 1), deterministic=True)
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(first, other, strict=True))
    q, k, v = tensors("cuda:0")
    with pytest.raises(ValueError, match="k is on cuda:1 and q on cuda:0"):
        z.attention(q, k.to("cuda:1"), v.to("cuda:1"), plan)


@pytest.mark.parametrize(
    ("dtype", "words"),
    [(torch.float64, "q is float64; attention takes"), (torch.int32, "q is int32")],
)
def test_types(dtype, words, device):
    q, k, v = (x.to(dtype) for x in tensors(device))
    with pytest.raises(ValueError, match=words):
        z.attention(q, k, v, z.Plan.from_lengths([64], 1))


def test_other_bad_inputs(device):
    plan = z.Plan.from_lengths([64], 1)
    q, k, v = tensors(device)
    with pytest.raises(ValueError, match="rows"):
        z.attention(q[:63], k[:63], v[:63], plan)
    with pytest.raises(ValueError, match="last stride of q"):
        z.attention(torch.randn(64, 4, 64, device=device)[..., ::2], k, v, plan)
    with pytest.raises(ValueError, match="dense"):
        z.shard(torch.eye(64, device=device).to_sparse(), plan, 0)
    with pytest.raises(ValueError, match="a divisor of the 2 KV heads"):
        z.attention(q, k, v, plan, kv_heads_per_stage=3)


@pytest.mark.real
@pytest.mark.hog
def test_too_little_memory_says_how_much(device):
    """The library's memory is its own: what torch holds is not there for it."""
    length = 32768
    plan = z.Plan.from_lengths([length], 1)
    q, k, v = (
        torch.randn(length, h, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
        for h in (32, 8, 8)
    )
    out = z.attention(q, k, v, plan)
    torch.cuda.synchronize(device)
    free, _ = torch.cuda.mem_get_info(device)
    hold = torch.empty(free - (64 << 20), dtype=torch.uint8, device=device)
    with pytest.raises((z.DeviceError, torch.OutOfMemoryError), match="memory") as caught:
        z.attention(q, k, v, plan, deterministic=True).backward(out.detach())
    print(caught.value)
    del hold
    torch.cuda.empty_cache()
    z.attention(q, k, v, plan).backward(out.detach())  # the GPU still works
    assert bool(torch.isfinite(q.grad).all())


def python(script, **environment):
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_no_gpu():
    ended = python(
        """
import threading
import zigzag_attention as z
errors = [None, None]
def work(rank, group):
    try:
        group.on_gpu(0)
    except z.DeviceError as error:
        errors[rank] = str(error)
threads = [threading.Thread(target=work, args=p) for p in enumerate(z.Communicator.threads(2))]
for t in threads: t.start()
for t in threads: t.join()
print(errors)
assert errors[0] == errors[1] and ("no GPU" in errors[0] or "no CUDA" in errors[0])
""",
        CUDA_VISIBLE_DEVICES="",
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.real
def test_no_cudnn(tmp_path):
    """The library's own kernels serve, and the components say so."""
    ended = python(
        """
import torch
import zigzag_attention as z
rows = {name: (ok, why) for name, ok, why in z.components()}
print(rows["cuDNN"])
assert not rows["cuDNN"][0]
q, k, v = (torch.randn(100, h, 64, device="cuda", dtype=torch.bfloat16) for h in (4, 2, 2))
out = z.attention(q, k, v, z.Plan.from_lengths([100], 1))
k, v = (x.repeat_interleave(2, 1) for x in (k, v))
want = torch.nn.functional.scaled_dot_product_attention(
    *(x.float().transpose(0, 1) for x in (q, k, v)), is_causal=True
)
assert (out.transpose(0, 1).float() - want).norm() < 1e-2 * want.norm()
""",
        ZIGZAG_CUDNN_PATH=str(tmp_path / "nothing"),
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    print(ended.stdout)
