"""Cases, errors and ranks as processes, for the tests of this folder."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from reference import attend

ROOT = Path(__file__).resolve().parents[2]
ON_CPU = not torch.cuda.is_available()
# Relative L2 against float64: out, dq and dk, dv. 16-bit engines round the probabilities.
BOUNDS = {
    torch.float32: (1e-5, 2e-5),
    torch.bfloat16: (6e-3, 8e-3),
    torch.float16: (1e-3, 2e-3),
}


def draw(lengths, heads=8, kv_heads=2, head_dim=64, dtype=torch.float32, seed=1):
    """q, k, v and dout of a pack on the CPU."""
    generator, tokens = torch.Generator().manual_seed(seed), sum(lengths)
    return tuple(
        torch.randn(tokens, count, head_dim, generator=generator).to(dtype)
        for count in (heads, kv_heads, kv_heads, heads)
    )


def wanted(inputs, lengths, **options):
    """out, lse, dq, dk, dv in float64."""
    q, k, v = (x.detach().double().requires_grad_() for x in inputs[:3])
    out, lse = attend(q, k, v, lengths, **options)
    out.backward(inputs[3].double())
    return out.detach(), lse.detach(), q.grad, k.grad, v.grad


def check(name, got, want, bound):
    """Relative L2 within the bound; NaN fails."""
    assert got.shape == want.shape, (name, got.shape, want.shape)
    got = got.detach().cpu().double()
    norm = float(want.norm())
    error = float((got - want).norm()) / (norm if norm > 1e-9 else 1.0)
    assert error <= bound, f"{name}: relative L2 {error:.2e}, bound {bound:.0e}"
    return error


def check_all(got, want, dtype):
    """out, lse, dq, dk, dv against float64; the largest error over its bound."""
    rows, sums = BOUNDS[dtype]
    bounds = (rows, 1e-5 if dtype == torch.float32 else 1e-4, rows, sums, sums)
    names = ("out", "lse", "dq", "dk", "dv")
    return max(
        check(name, x, y, bound) / bound
        for name, x, y, bound in zip(names, got, want, bounds, strict=True)
    )


PREAMBLE = """
import datetime, json, os, sys, time
sys.path[:0] = [{root!r} + "/test/python", {root!r} + "/test/gpu_python"]
import torch, torch.distributed as dist
import zigzag_attention as z
from support import BOUNDS, ON_CPU, check, check_all, draw, wanted
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
device = torch.device("cpu") if ON_CPU else torch.device("cuda", rank % torch.cuda.device_count())
torch.set_num_threads(1)
if not ON_CPU:
    torch.cuda.set_device(device)

def start(backend):
    backend = "gloo" if ON_CPU else backend
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=60))

def step(lengths, group=None, dtype=torch.float32, heads=8, kv_heads=2, head_dim=64, **options):
    mine = dist.get_rank(group) if not isinstance(group, z.Communicator) else group.rank
    ranks = dist.get_world_size(group) if not isinstance(group, z.Communicator) else group.size
    inputs = draw(lengths, heads, kv_heads, head_dim, dtype, seed=sum(lengths))
    plan = z.Plan.from_lengths(lengths, ranks)
    q, k, v, dout = (z.shard(x.to(device), plan, mine) for x in inputs)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out, lse = z.attention(q, k, v, plan, group, return_lse=True, **options)
    out.backward(dout)
    return (out, lse, q.grad, k.grad, v.grad), plan, inputs

def verify(lengths, group=None, dtype=torch.float32, **options):
    got, plan, inputs = step(lengths, group, dtype, **options)
    shape = {{"kv_heads_per_stage", "deterministic", "heads", "kv_heads", "head_dim"}}
    masks = {{key: value for key, value in options.items() if key not in shape}}
    mine = dist.get_rank(group) if not isinstance(group, z.Communicator) else group.rank
    want = tuple(z.shard(x, plan, mine) for x in wanted(inputs, lengths, **masks))
    return check_all(got, want, dtype)

def refused(kind, words, call):
    try:
        call()
    except kind as error:
        assert words in str(error), f"{{words!r}} is not in {{error}}"
        return str(error)
    raise AssertionError(f"nothing was raised; expected {{words!r}}")
"""


class Ranks:
    """Python processes that are ranks; `start(backend)` in the script joins them."""

    def __init__(self, size, script, **environment):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes = []
        for rank in range(size):
            variables = {
                **os.environ,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "ZIGZAG_TIMEOUT_S": "30",
                "NCCL_NVLS_ENABLE": "0",
                **environment,
            }
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", PREAMBLE.format(root=str(ROOT)) + script],
                    env=variables,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )

    def wait(self, seconds=150):
        """(exit code, output) of every rank; one that does not end is killed."""
        ended = []
        try:
            for process in self.processes:
                output, _ = process.communicate(timeout=seconds)
                ended.append((process.returncode, output))
        finally:
            for process in self.processes:
                if process.poll() is None:
                    process.kill()
        return ended


def run_ranks(size, script, **environment):
    """Runs the script on every rank; all must exit with 0. Returns the outputs."""
    ended = Ranks(size, script, **environment).wait()
    for rank, (code, output) in enumerate(ended):
        assert code == 0, f"rank {rank} of {size} exited with {code}:\n{output[-6000:]}"
    for rank, (_, output) in enumerate(ended):
        print(f"--- rank {rank}\n{output[-3000:]}")
    return [output for _, output in ended]
