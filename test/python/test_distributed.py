"""Groups of torch.distributed over gloo: processes that are ranks."""

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
alone = model(**zigzag.inputs(pack, z.Plan(pack.cu_seqlens, 1))).loss
alone.backward()
assert abs(float(alone) - float(total)) < 1e-5, (float(alone), float(total))
for mine, parameter in zip(grads, model.parameters()):
    torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-6)
share, mean = z.token_mean(torch.tensor(float(rank + 1)), rank + 1)
assert abs(float(mean) - 1.0) < 1e-6
dist.destroy_process_group()
"""
        ),
    )
