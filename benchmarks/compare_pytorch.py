#!/usr/bin/env python3
"""Compares the CPU kernels with PyTorch's scaled_dot_product_attention, interleaved in one run.

Needs an environment of its own with torch==2.13.0 and a build with benchmarks (cpu_kernels).
Each round measures, of every shape, PyTorch and then Zigzag with the multiply-add peak beside it;
the best round counts. FLOPs are causal: 4 x heads x head_dim x L^2 / 2 forward, 3.5 times that
with backward.
"""

import argparse
import json
import os
import pathlib
import subprocess
import time

import torch

HERE = pathlib.Path(__file__).resolve().parent
# documents, length, heads, head_dim; the cases of cpu_kernels.cpp that PyTorch can run as a batch.
SHAPES = ((1, 4096, 8, 128), (1, 2048, 8, 64), (512, 64, 8, 64))
DTYPES = {"float32": (0, torch.float32), "bfloat16": (2, torch.bfloat16)}


def torch_rates(shape: tuple, dtype: torch.dtype) -> tuple:
    """GFLOP/s of a forward, and of forward and backward."""
    documents, length, heads, head_dim = shape
    flops = documents * 2e-9 * heads * head_dim * length * length
    make = lambda grad: torch.randn(  # noqa: E731
        documents, heads, length, head_dim, dtype=dtype, requires_grad=grad
    )
    q, k, v, dout = make(True), make(True), make(True), make(False)
    attention = torch.nn.functional.scaled_dot_product_attention
    forward, both = [], []
    for _ in range(3):
        start = time.perf_counter()
        with torch.no_grad():
            attention(q, k, v, is_causal=True)
        middle = time.perf_counter()
        attention(q, k, v, is_causal=True).backward(dout)
        end = time.perf_counter()
        q.grad = k.grad = v.grad = None
        forward.append(flops / (middle - start))
        both.append(3.5 * flops / (end - middle))
    return max(forward), max(both)


def zigzag_rates(program: pathlib.Path, shape: tuple, number: int, threads: int) -> tuple:
    """GFLOP/s of a forward, of forward and backward, and the peak."""
    documents, length, heads, head_dim = shape
    case = (
        f"/documents:{documents}/length:{length}/heads:{heads}/kv_heads:{heads}"
        f"/head_dim:{head_dim}/dtype:{number}/"
    )
    run = subprocess.run(
        [str(program), f"--benchmark_filter={case}", "--benchmark_format=json"],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ, ZIGZAG_NUM_THREADS=str(threads)),
    )
    rates = {}
    for entry in json.loads(run.stdout)["benchmarks"]:
        rates[entry["name"].split("/")[0]] = (entry["GFLOP/s"], entry["of_peak"])
    forward, of_peak = rates["attention_forward"]
    backward, _ = rates["attention_backward"]
    return forward, 3.5 / (1 / forward + 2.5 / backward), forward / of_peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=pathlib.Path, default=HERE.parent / "build" / "default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, help="write the figures as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    program = options.build / "benchmarks" / "cpu_kernels"
    rows = {}
    for _ in range(options.rounds):
        for name, (number, dtype) in DTYPES.items():
            for shape in SHAPES:
                figures = (
                    *torch_rates(shape, dtype),
                    *zigzag_rates(program, shape, number, options.threads),
                )
                key = (name, *shape)
                rows[key] = tuple(map(max, zip(rows.get(key, figures), figures, strict=True)))
    print(
        "| type | documents x L, heads, d | peak | forward: PyTorch | Zigzag | ratio | of peak "
        "| fwd+bwd: PyTorch | Zigzag | ratio | of peak |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    table = []
    for (name, documents, length, heads, dim), (tf, tb, zf, zb, peak) in rows.items():
        print(
            f"| {name} | {documents} x {length}, {heads}, {dim} | {peak:.0f} | {tf:.0f} | {zf:.0f} "
            f"| {zf / tf:.2f} | {zf / peak:.2f} | {tb:.0f} | {zb:.0f} | {zb / tb:.2f} "
            f"| {zb / peak:.2f} |"
        )
        table.append(
            {
                "dtype": name,
                "documents": documents,
                "length": length,
                "heads": heads,
                "head_dim": dim,
                "peak_gflops": peak,
                "torch_forward": tf,
                "torch_both": tb,
                "zigzag_forward": zf,
                "zigzag_both": zb,
            }
        )
    if options.out:
        options.out.write_text(
            json.dumps(
                {"torch": torch.__version__, "threads": options.threads, "rows": table}, indent=2
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
