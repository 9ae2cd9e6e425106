"""Groups of torch.distributed over gloo: processes that are ranks."""

import pytest
from ranks import run_processes

CHECK = """
sys.path.insert(0, {folder!r})
from reference import attend, close, draw

def check(lengths, group, options):
    inputs = draw(lengths, seed=sum(lengths))
    mine = dist.get_rank(group)
    plan = z.Plan.from_lengths(lengths, dist.get_world_size(group))
    q, k, v, dout = (z.shard(x, plan, mine) for x in inputs)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = z.attention(q, k, v, plan, group, **options)
    out.backward(dout)
    a, b, c = (x.double().requires_grad_() for x in inputs[:3])
    want = attend(a, b, c, lengths, **dict(options, **{{}}))[0]
    want.backward(inputs[3].double())
    for got, full in ((out, want), (q.grad, a.grad), (k.grad, b.grad), (v.grad, c.grad)):
        close(got, z.shard(full.detach(), plan, mine), 3e-6)
"""


def script(body):
    from ranks import ROOT

    return CHECK.format(folder=str(ROOT / "test" / "python")) + body


def test_world_subsets_and_two_groups_at_once():
    run_processes(
        4,
        script(
            """
check([30, 1, 0, 77], None, {})
check([30, 1, 0, 77], dist.group.WORLD, {"causal": False})
odd = dist.new_group([1, 3])
three = dist.new_group([3, 0, 2])
if rank in (1, 3):
    check([13, 40], odd, {})
if rank != 1:
    check([64, 3], three, {"softcap": 3.0})
if rank == 3:
    check([5], dist.new_group([3], use_local_synchronization=True), {})
# Both of rank 3's groups between one another's forward and backward.
check([13, 41], odd, {}) if rank in (1, 3) else None
check([2], None, {})
check([0], None, {})
dist.destroy_process_group()
"""
        ),
    )


def test_groups_made_again_after_destruction():
    run_processes(
        2,
        script(
            """
check([20, 3], None, {})
dist.barrier()
dist.destroy_process_group()
os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
dist.init_process_group("gloo")
check([20, 4], None, {})
dist.destroy_process_group()
"""
        ),
    )


class Work:
    """Ends between a wait that is too short and the question whether it ended."""

    def __init__(self, failure=None):
        self.failure = failure
        self.waits = 0

    def is_completed(self):
        return True

    def wait(self, timeout=None):
        self.waits += 1
        if self.waits == 1:
            raise RuntimeError("Operation timed out!")
        if self.failure:
            raise self.failure


def test_an_exchange_that_ends_just_after_a_short_wait():
    from zigzag_attention._distributed import _wait_briefly

    assert _wait_briefly(Work())
    with pytest.raises(RuntimeError, match="a peer closed"):
        _wait_briefly(Work(RuntimeError("a peer closed the connection")))


def test_one_rank_plans_need_no_exchange():
    """Trap 14: in a world of two, a plan for one rank is this process's own."""
    run_processes(
        2,
        script(
            """
q, k, v, _ = draw([9 + rank])
if rank == 0:
    z.attention(q, k, v, z.Plan([0, 9], 1))
dist.barrier()
dist.destroy_process_group()
"""
        ),
    )


def test_hugging_face_and_helpers_over_processes():
    run_processes(
        2,
        script(
            """
import transformers
from zigzag_attention import hf
torch.manual_seed(0)
config = transformers.LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48,
    num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
model = transformers.LlamaForCausalLM(config)
pack = z.collate([torch.arange(n) % 61 for n in (20, 3, 41)])
zigzag = hf.register()
model.set_attn_implementation("zigzag")
share = model(**zigzag.inputs(pack, z.Plan(pack.cu_seqlens, size))).loss
share.backward()
hf.sum_gradients(model)
grads = [p.grad.clone() for p in model.parameters()]
total = share.detach().clone()
dist.all_reduce(total)
model.zero_grad()
import warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    alone = model(**zigzag.inputs(pack, z.Plan(pack.cu_seqlens, 1))).loss
    assert any("for 1 rank and torch.distributed has 2: each" in str(x.message) for x in seen), seen
alone.backward()
with warnings.catch_warnings():
    warnings.simplefilter("error")
    hf.register(z.Communicator.self(), name="alone").inputs(pack, z.Plan(pack.cu_seqlens, 1))
assert abs(float(alone) - float(total)) < 1e-5, (float(alone), float(total))
for mine, parameter in zip(grads, model.parameters()):
    torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-6)
share, mean = z.token_mean(torch.tensor(float(rank + 1)), rank + 1)
assert abs(float(mean) - 1.0) < 1e-6
dist.destroy_process_group()
"""
        ),
    )


CONTIGUOUS = """
import numpy as np
import zigzag_attention.ring_flash_attn as ring_flash_attn

def runs(lengths, options, packing, dtype=torch.float32):
    heads = 4 if packing == "qkv" else 2
    inputs = [x.to(dtype) for x in draw(lengths, kv_heads=heads, seed=sum(lengths))]
    cu = torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32)
    run = int(cu[-1]) // size
    causal = options.get("causal", True)
    arguments = ring_flash_attn.llama3_flash_attn_prepare_cu_seqlens(cu, causal, rank, size)
    *arguments, k_slice = arguments
    q, k, v, dout = (x[rank * run : (rank + 1) * run] for x in inputs)
    keywords = dict(causal=causal, return_attn_probs=True,
                    window_size=options.get("window", (-1, -1)))
    if packing == "qkv":
        x = torch.stack([q, k, v], 1).requires_grad_()
        call, tensors = ring_flash_attn.llama3_flash_attn_varlen_qkvpacked_func, [x]
    elif packing == "kv":
        q, x = q.clone().requires_grad_(), torch.stack([k, v], 1).requires_grad_()
        call, tensors = ring_flash_attn.llama3_flash_attn_varlen_kvpacked_func, [q, x]
    else:
        tensors = [x.clone().requires_grad_() for x in (q, k, v)]
        call = ring_flash_attn.llama3_flash_attn_varlen_func
    out, lse, _ = call(*tensors, *arguments, 1, k_slice, **keywords)
    out.backward(dout)
    if packing == "qkv":
        grads = x.grad.unbind(1)
    elif packing == "kv":
        grads = (q.grad, *x.grad.unbind(1))
    else:
        grads = [x.grad for x in tensors]
    a, b, c = (x.double().requires_grad_() for x in inputs[:3])
    want, want_lse = attend(a, b, c, lengths, **options)
    want.backward(inputs[3].double())
    bound = 3e-6 if dtype == torch.float32 else 1e-2
    for got, full in zip((out, lse.T, *grads), (want, want_lse, a.grad, b.grad, c.grad)):
        close(got, full.detach()[rank * run : (rank + 1) * run], bound)

for lengths in ([48], [5, 20, 0, 23], [1, 1, 1, 45], [16, 16, 16]):
    for packing in ("separate", "kv", "qkv"):
        runs(lengths, {}, packing)
runs([5, 20, 0, 23], {"causal": False}, "separate")
runs([5, 43], {"window": (7, 0)}, "separate")
runs([5, 43], {}, "kv", torch.bfloat16)
q = torch.randn(16, 2, 32)
good = torch.tensor([0, 16], dtype=torch.int32)
try:
    which = slice(0, 16) if rank else slice(1, 17)
    ring_flash_attn.llama3_flash_attn_varlen_func(q, q, q, good, good, 16, 16, 1, which)
    raise SystemExit("nothing was raised")
except (ValueError, RuntimeError) as error:
    assert "llama3_flash_attn_prepare_cu_seqlens" in str(error), error
dist.destroy_process_group()
"""


def test_the_contiguous_layout_of_llama3():
    for size in (1, 3):
        run_processes(size, script(CONTIGUOUS))
