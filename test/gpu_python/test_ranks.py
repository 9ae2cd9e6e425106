"""Ranks that are processes with a GPU each, or several a GPU: groups of torch.distributed."""

import pytest
from support import ON_CPU, Ranks, run_ranks

GROUPS = """
start(os.environ["BACKEND"])
wanted_name = os.environ.get("EXPECT", "callback" if ON_CPU else "peer")
worst = 0.0
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    worst = max(worst, verify([300, 1, 0, 129, 64], None, dtype, head_dim=128))
    worst = max(worst, verify([400, 77], None, dtype, causal=False, kv_heads_per_stage=1))
worst = max(worst, verify([300, 90], None, torch.bfloat16, window=(50, 0)))
worst = max(worst, verify([300, 90], None, torch.bfloat16, softcap=5.0))
for lengths in ([1], [0], [2, 3], [7] * 60):
    worst = max(worst, verify(lengths, None, torch.float32))
group = z.Communicator.from_torch(dist.group.WORLD)
chosen = group if ON_CPU else group.on_gpu(device)
assert chosen.name == wanted_name, chosen
again = [step([700, 68], None, torch.bfloat16, deterministic=True)[0] for _ in range(3)]
for got in again[1:]:
    assert all(torch.equal(x, y) for x, y in zip(got, again[0])), "deterministic"
if not ON_CPU:
    assert chosen.device == device.index and chosen.reason
    print(chosen, "because", chosen.reason)
# Packs that change, 60 steps: memory of the GPU stays where it is.
def used():
    torch.cuda.synchronize(); torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(); return total - free
generator = torch.Generator().manual_seed(3)
marks = []
for i in range(60):
    count = int(torch.randint(1, 9, (1,), generator=generator))
    lengths = torch.randint(0, 300, (count,), generator=generator).tolist()
    dtype = (torch.float32, torch.bfloat16)[i % 2]
    if i % 10 == 0:
        worst = max(worst, verify(lengths, None, dtype))
    else:
        step(lengths, None, dtype)
    if i % 20 == 19 and os.environ.get("ZIGZAG_GPU_ALONE"):  # nobody else on the GPUs
        marks.append(used())
print("largest error over its bound", worst, "memory", marks)
assert not marks or marks[-1] <= marks[0] + (96 << 20), marks
dist.barrier()
dist.destroy_process_group()
"""

TWO = [
    ("nccl", {}),
    ("gloo", {}),
    ("cpu:gloo,cuda:nccl", {"ZIGZAG_GPU_COMM": "nccl", "EXPECT": "nccl"}),
]


@pytest.mark.gpus(2)
@pytest.mark.parametrize(("backend", "environment"), TWO)
def test_two_gpus(backend, environment):
    run_ranks(2, GROUPS, BACKEND=backend, **({} if ON_CPU else environment))


@pytest.mark.parametrize("size", [3, 4])
def test_several_ranks_a_gpu(size):
    run_ranks(size, GROUPS, BACKEND="gloo")


CHOICES = """
start("gloo")
group = z.Communicator.from_torch(dist.group.WORLD)
shared = torch.cuda.device_count() < size
# Ranks that disagree, and words that are none, are errors on every rank.
refused(RuntimeError, "asks for the exchange" if rank == 0 else "exchange",
        lambda: group.on_gpu(device, "peer" if rank else "nccl"))
refused(ValueError if rank == 0 else z.CommunicationError, "it must be auto, peer or nccl",
        lambda: group.on_gpu(device, "pear" if rank == 0 else "auto"))
words = refused(z.DeviceError if rank == 1 else z.CommunicationError, "does not exist",
                lambda: group.on_gpu(99 if rank == 1 else device))
print(words)
if shared:
    print(refused(z.DeviceError, "share the GPU", lambda: group.on_gpu(device, "nccl")))
peer = group.on_gpu(device, "peer")
assert peer.name == "peer" and peer.reason == "it was asked for" and group.on_gpu(device) is peer
refused(ValueError, "cannot become 'nccl'", lambda: group.on_gpu(device, "nccl"))
verify([100, 28], peer, torch.bfloat16)  # a communicator is a group like any other
# A rank whose tensors are elsewhere: all ranks raise before anything is exchanged.
plan = z.Plan.from_lengths([64], size)
rows = plan.local_tokens(rank)
def call(where, group=None, **options):
    q, k, v = (torch.randn(rows, h, 32, device=where) for h in (4, 2, 2))
    return z.attention(q, k, v, plan, group, **options)
odd = rank == size - 1
message = refused((ValueError, RuntimeError), "cpu", lambda: call("cpu" if odd else device, peer))
print(message)
message = refused(RuntimeError, "cpu", lambda: call("cpu" if odd else device))
print(message)
call(device)  # the group still works
if torch.cuda.device_count() > 1:
    other = torch.device("cuda", (device.index + 1) % torch.cuda.device_count())
    where = other if odd else device
    print(refused((ValueError, RuntimeError), "cuda:", lambda: call(where, peer)))
    # Without a communicator of its own, a rank that moves alone is told of as well.
    print(refused(RuntimeError, "does not exchange through yet", lambda: call(where)))
call(device)
# Other mistakes of one rank.
refused((ValueError, RuntimeError), "divisor" if odd else "invalid arguments",
        lambda: call(device, kv_heads_per_stage=3 if odd else 1))
refused(RuntimeError, "softcap", lambda: call(device, softcap=3.0 if odd else 2.0))
graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
torch.cuda.synchronize()
def capture():
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        call(device)
print(refused((ValueError, RuntimeError), "CUDA graph", capture))
torch.cuda.synchronize()
call(device)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.real
@pytest.mark.parametrize("size", [2, 4])
def test_choices_and_mistakes(size):
    run_ranks(size, CHOICES)


SUBSETS = """
start("gloo")
odd = dist.new_group([1, 3])
three = dist.new_group([3, 0, 2])
for _ in range(2):
    if rank in (1, 3):
        verify([130, 40], odd, torch.bfloat16)
    if rank != 1:
        verify([64, 3, 200], three, torch.float32, softcap=3.0)
    verify([200, 2], None, torch.bfloat16)
dist.barrier()
dist.destroy_process_group()
os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
start("gloo")
verify([20, 4], None, torch.float32)
dist.destroy_process_group()
"""


def test_subsets_and_groups_made_again():
    run_ranks(4, SUBSETS)


THREADS = """
import threading
errors = []
def work(mine, group):
    try:
        global_device = device if ON_CPU else torch.device("cuda", mine % torch.cuda.device_count())
        lengths = [300, 1, 90]
        inputs = draw(lengths, dtype=torch.bfloat16)
        plan = z.Plan.from_lengths(lengths, 4)
        q, k, v, dout = (z.shard(x.to(global_device), plan, mine) for x in inputs)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        # Autograd has one thread a GPU, in which the backward of one rank would wait for another's.
        with torch.autograd.set_multithreading_enabled(False):
            for _ in range(3):
                out, lse = z.attention(*leaves, plan, group, return_lse=True)
                grads = torch.autograd.grad(out, leaves, dout)
        want = tuple(z.shard(x, plan, mine) for x in wanted(inputs, lengths))
        check_all((out, lse, *grads), want, torch.bfloat16)
        if not ON_CPU:
            assert group.on_gpu(global_device).name == "peer"
    except BaseException as error:
        errors.append((mine, repr(error)))
        group.abort(str(error))
threads = [threading.Thread(target=work, args=p) for p in enumerate(z.Communicator.threads(4))]
for t in threads: t.start()
for t in threads: t.join()
assert not errors, errors
"""


def test_ranks_that_are_threads():
    run_ranks(1, THREADS)


HUGGING_FACE = """
import transformers
from zigzag_attention import hf
start(os.environ["BACKEND"])
SIZES = dict(vocab_size=97, hidden_size=128, intermediate_size=96, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
generator = torch.Generator().manual_seed(3)
documents = [torch.randint(0, 97, (n,), generator=generator) for n in (137, 5, 1, 300)]
pack = z.collate(documents)
worst = 0.0
hf.register()
MODELS = {"Llama": {}, "Mistral": {"sliding_window": 16}, "Qwen2": {}, "Qwen3": {"head_dim": 32}}
for name, extra in MODELS.items():
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        config = getattr(transformers, name + "Config")(
            **SIZES, **extra, attn_implementation="zigzag")
        model = getattr(transformers, name + "ForCausalLM")(config).to(device, dtype).train()
        results = []
        for group, ranks in ((z.Communicator.self(), 1), (dist.group.WORLD, size)):
            registration = hf.register(group)
            plan = z.Plan(pack.cu_seqlens, ranks)
            share = model(**registration.inputs(pack, plan, device)).loss
            share.backward()
            hf.sum_gradients(model, group)
            shares = torch.tensor([float(share.detach())], device="cpu", dtype=torch.float64)
            if ranks > 1:
                everyone = [None] * size
                dist.all_gather_object(everyone, float(share.detach()))
                shares = torch.tensor(everyone, dtype=torch.float64)
            grads = {n: p.grad.clone() for n, p in model.named_parameters()}
            results.append((float(shares.sum()), grads))
            model.zero_grad()
        (loss, grads), (shared_loss, shared_grads) = results
        bound = 1e-5 if dtype == torch.float32 else 2e-2
        assert abs(shared_loss - loss) <= bound * abs(loss), (name, loss, shared_loss)
        norm = sum(float(g.double().square().sum()) for g in grads.values()) ** 0.5
        error = sum(float((shared_grads[n].double() - g.double()).square().sum())
                    for n, g in grads.items()) ** 0.5
        assert error <= bound * norm, (name, dtype, error / norm)
        worst = max(worst, error / norm / bound)
        print(name, dtype, "loss", loss, shared_loss, "gradients", error / norm)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.gpus(2)
def test_hugging_face():
    pytest.importorskip("transformers")
    run_ranks(2, HUGGING_FACE, BACKEND="nccl")


COMPILED = """
start(os.environ["BACKEND"])
class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(64, 3 * 4 * 32, bias=False)
    def forward(self, x, plan):
        q, k, v = self.qkv(x).view(-1, 3, 4, 32).unbind(1)
        return z.attention(q, k, v, plan, deterministic=True).flatten(1)
torch.manual_seed(0)
layer = Layer().to(device)
compiled = torch.compile(layer, fullgraph=True)
for lengths in ([50, 1, 77], [128]):
    plan = z.Plan.from_lengths(lengths, size)
    x = torch.randn(plan.local_tokens(rank), 64, device=device)
    layer(x, plan).square().sum().backward()
    expected, layer.qkv.weight.grad = layer.qkv.weight.grad, None
    compiled(x, plan).square().sum().backward()
    torch.testing.assert_close(layer.qkv.weight.grad, expected, rtol=1e-3, atol=1e-3)
    layer.qkv.weight.grad = None
    again = torch.utils.checkpoint.checkpoint(layer, x, plan, use_reentrant=False)
    again.square().sum().backward()
    torch.testing.assert_close(layer.qkv.weight.grad, expected, rtol=1e-3, atol=1e-3)
    layer.qkv.weight.grad = None
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.gpus(2)
def test_compiled_and_checkpointed():
    run_ranks(2, "import torch.utils.checkpoint\n" + COMPILED, BACKEND="nccl")


FULL = """
start("gloo")
length = 32768
plan = z.Plan.from_lengths([length], size)
rows = plan.local_tokens(rank)
q, k, v = (torch.randn(rows, h, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
           for h in (32, 8, 8))
out = z.attention(q, k, v, plan)
torch.cuda.synchronize()
if rank == 0:
    free, _ = torch.cuda.mem_get_info(device)
    hold = torch.empty(free - (64 << 20), dtype=torch.uint8, device=device)
dist.barrier()
began = time.monotonic()
message = refused((RuntimeError,), "memory" if rank == 0 else "rank 0 failed", lambda: (
    z.attention(q, k, v, plan, deterministic=True, softcap=3.0).backward(out.detach())))
print(message)
assert time.monotonic() - began < 15, "the others waited for their deadline"
time.sleep(3)  # rank 0 keeps the store
os._exit(0)
"""


@pytest.mark.real
@pytest.mark.hog
@pytest.mark.gpus(2)
def test_a_rank_without_memory_tells_the_others():
    run_ranks(2, FULL)


DYING = """
start(os.environ["BACKEND"])
lengths = [3000, 200]
plan = z.Plan.from_lengths(lengths, size)
rows = plan.local_tokens(rank)
q, k, v = (torch.randn(rows, h, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
           for h in (8, 2, 2))
began = None
try:
    for i in range(10**6):
        out = z.attention(q, k, v, plan)
        if rank == 1 and i == 3:
            if os.environ["HOW"] == "dies":
                os.kill(os.getpid(), 9)
            time.sleep(60)
        if i == 3:
            began = time.monotonic()
        out.sum().backward()
except (RuntimeError, TimeoutError) as error:
    print(type(error).__name__, error, f"after {time.monotonic() - began:.1f} s", flush=True)
    assert "rank" in str(error)
    os._exit(17)
"""


@pytest.mark.gpus(2)
@pytest.mark.parametrize("backend", ["nccl", "gloo"])
@pytest.mark.parametrize("how", ["dies", "stalls"])
def test_a_rank_that_dies_or_stalls(how, backend):
    ranks = Ranks(2, DYING, BACKEND=backend, HOW=how, ZIGZAG_TIMEOUT_S="10")
    output, _ = ranks.processes[0].communicate(timeout=60)
    ranks.processes[1].kill()
    ranks.processes[1].communicate()
    print(output[-1500:])
    assert ranks.processes[0].returncode == 17, output
