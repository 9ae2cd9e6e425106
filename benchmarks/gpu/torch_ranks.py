"""Attention through torch over ranks with a GPU each: iterations a second and the host's share.

    torchrun --nproc_per_node 2 benchmarks/gpu/torch_ranks.py [--json FILE] [--backend nccl]

The packs are the four that the C++ benchmark (gpu_bench peer) takes in turn: 8192 tokens a rank,
32 query and 8 KV heads, head_dim 128, bfloat16. `host_ms` is the time in which a call returns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import zigzag_attention as zz

SMALL = ([384, 128],)  # the GPUs have next to nothing to do: what remains is the host's time
PACKS = ([8192], [256, 7392, 544], [4096, 4096], [3104, 3200, 1600, 160, 128])
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
REPEATS, ITERATIONS, WARM_UP = 5, 24, 8


def steps(
    packs: Any, group: Any, rank: int, size: int, device: torch.device
) -> list[tuple[Any, ...]]:
    """Of every pack the plan and this rank's q, k, v, dout."""
    result = []
    for pack in packs:
        plan = zz.Plan.from_lengths([size * length for length in pack], size)
        rows = plan.local_tokens(rank)
        tensors = [
            torch.randn(rows, heads, HEAD_DIM, device=device, dtype=torch.bfloat16)
            for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
        ]
        for tensor in tensors[:3]:
            tensor.requires_grad_()
        result.append((plan, group, *tensors))
    return result


def forward(plan: Any, group: Any, q: Any, k: Any, v: Any, dout: Any) -> None:
    del dout
    with torch.no_grad():
        zz.attention(q, k, v, plan, group)


def both(plan: Any, group: Any, q: Any, k: Any, v: Any, dout: Any) -> None:
    out = zz.attention(q, k, v, plan, group)
    torch.autograd.grad(out, (q, k, v), dout)


def measure(step: Callable[..., None], inputs: list[tuple[Any, ...]], barrier: Any) -> Any:
    """Median and best iterations a second over the packs in turn, and the median host time."""
    for i in range(WARM_UP):
        step(*inputs[i % len(inputs)])
    rates, hosts = [], []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        begun = time.perf_counter()
        for i in range(ITERATIONS):
            step(*inputs[i % len(inputs)])
        hosts.append((time.perf_counter() - begun) / ITERATIONS * 1e3)
        end.record()
        end.synchronize()
        rates.append(ITERATIONS / start.elapsed_time(end) * 1e3)
    return {
        "iterations_per_s": statistics.median(rates),
        "best": max(rates),
        "host_ms": statistics.median(hosts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--backend", default="nccl")
    options = parser.parse_args()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    dist.init_process_group(options.backend)
    rows = []

    def report(name: str, group: Any, ranks: int, mine: int) -> None:
        large = steps(PACKS, group, mine, ranks, device)
        small = steps(SMALL, group, mine, ranks, device)
        for what, step, inputs in (
            ("forward", forward, large),
            ("forward+backward", both, large),
            ("forward, 512 tokens", forward, small),
            ("forward+backward, 512 tokens", both, small),
        ):
            row = {"group": name, "ranks": ranks, "what": what}
            row.update(measure(step, inputs, dist.barrier))
            rows.append(row)
            if rank == 0:
                print(
                    f"{name:12} {ranks} ranks  {what:28} {row['iterations_per_s']:7.1f} it/s "
                    f"(best {row['best']:.1f}), host {row['host_ms']:.3f} ms",
                    flush=True,
                )

    report("self", zz.Communicator.self(), 1, 0)
    if size > 1:
        host = zz.Communicator.from_torch(dist.group.WORLD)
        chosen = host.on_gpu(device)
        report(chosen.name, dist.group.WORLD, size, rank)
    else:
        chosen = zz.Communicator.self()
    if rank == 0:
        result = {
            "gpu": torch.cuda.get_device_name(device),
            "torch": torch.__version__,
            "backend": options.backend,
            "exchange": chosen.name,
            "reason": chosen.reason,
            "rows": rows,
        }
        print(f"exchange: {chosen.name}, because {chosen.reason}")
        if options.json is not None:
            options.json.write_text(json.dumps(result, indent=1))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
