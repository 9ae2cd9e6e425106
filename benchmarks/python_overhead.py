#!/usr/bin/env python3
"""What `attention` through torch costs over `zigzag bench attention`, and the memory it takes.

Needs torch==2.13.0, the package installed from the same sources as the command, and the command
itself. Every round times the command and then torch, both the median of the same repetitions on
the same pack, shapes and threads, so that what else the machine does meets both; the overhead is
the median over the rounds of the ratio in a round. Backward is autograd's, with q, k and v as
leaves whose gradients are dropped between repetitions, as an optimizer does.

Memory is the growth of the resident set's peak (Linux) over a call whose inputs are there already;
what has to grow are the results. A copy of q, k or v would add its bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from typing import Any, NamedTuple

HERE = pathlib.Path(__file__).resolve().parent
MEBI = 2**20


class Case(NamedTuple):
    """One document and its types."""

    length: int
    dtype: str
    repeat: int
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 128


CASES = (
    Case(4096, "float32", 5),
    Case(8192, "float32", 3),
    Case(4096, "bfloat16", 7),
    Case(8192, "bfloat16", 5),
)


def command_times(program: pathlib.Path, case: Case, threads: int) -> tuple[float, float]:
    """Milliseconds of a forward and a backward by the command."""
    ended = subprocess.run(
        [
            *(program, "bench", "attention", "--json", "--ranks", "1"),
            *("--lengths", str(case.length), "--dtype", case.dtype, "--heads", str(case.heads)),
            *("--kv-heads", str(case.kv_heads), "--head-dim", str(case.head_dim)),
            *("--threads", str(threads), "--repeat", str(case.repeat)),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = {row["pass"]: row["ms"] for row in json.loads(ended.stdout)["rows"]}
    return rows["forward"], rows["backward"]


def torch_times(case: Case) -> tuple[float, float]:
    """Milliseconds of a forward and a backward through torch."""
    import torch

    import zigzag_attention as zz

    dtype = getattr(torch, case.dtype)
    shape = (case.length, case.heads, case.head_dim)
    kv_shape = (case.length, case.kv_heads, case.head_dim)
    q, k, v = (torch.randn(x, dtype=dtype, requires_grad=True) for x in (shape, kv_shape, kv_shape))
    dout = torch.randn(shape, dtype=dtype)
    plan = zz.Plan.from_lengths([case.length], 1)
    forward, backward = [], []
    for _ in range(case.repeat + 1):
        start = time.perf_counter()
        out = zz.attention(q, k, v, plan)
        middle = time.perf_counter()
        out.backward(dout)
        end = time.perf_counter()
        forward.append(1e3 * (middle - start))
        backward.append(1e3 * (end - middle))
        q.grad = k.grad = v.grad = None
    # As in the command, one repetition that is not timed.
    return statistics.median(forward[1:]), statistics.median(backward[1:])


def overhead(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each case: medians of times and of ratios."""
    rows = []
    for case in CASES:
        rounds = []
        for _ in range(options.rounds):
            ours = command_times(options.program, case, options.threads)
            rounds.append((*ours, *torch_times(case)))
        command_forward, command_backward, forward, backward = (
            statistics.median(column) for column in zip(*rounds, strict=True)
        )
        rows.append(
            {
                **case._asdict(),
                "rounds": options.rounds,
                "command_forward_ms": command_forward,
                "command_backward_ms": command_backward,
                "torch_forward_ms": forward,
                "torch_backward_ms": backward,
                "forward_overhead": statistics.median(x[2] / x[0] for x in rounds) - 1,
                "both_overhead": statistics.median((x[2] + x[3]) / (x[0] + x[1]) for x in rounds)
                - 1,
            }
        )
        print(
            f"L {case.length:6} {case.dtype:9} forward {command_forward:8.2f} ms by the command, "
            f"{forward:8.2f} ms through torch: {100 * rows[-1]['forward_overhead']:+5.1f} %; "
            f"with backward {100 * rows[-1]['both_overhead']:+5.1f} %",
            flush=True,
        )
    return rows


def peak_growth(work: Any) -> float:
    """MiB that the resident set's peak grows while work runs."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now

    def value(key: str) -> int:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(key)).split()[1])

    before = value("VmRSS:")
    work()
    return (value("VmHWM:") - before) / 1024


def memory(kind: str) -> dict[str, Any]:
    """The growth over a forward, and over a backward, of inputs packed as `kind` says."""
    import torch

    import zigzag_attention as zz

    tokens, heads, head_dim = 65536, 8, 128
    plan = zz.Plan.from_lengths([1024] * 64, 1)
    packed = torch.randn(tokens, 3, heads, head_dim)
    result: dict[str, Any] = {"kind": kind, "input_mib": packed.nbytes / MEBI}
    small = zz.Plan.from_lengths([2048], 1)
    warm = torch.randn(2048, heads, head_dim, requires_grad=True)
    zz.attention(warm, warm, warm, small).sum().backward()  # thread pools and their buffers
    if kind == "numpy slices":
        q, k, v = (packed.numpy()[:, i] for i in range(3))
        kept = []
        result["forward_mib"] = peak_growth(
            lambda: kept.extend(zz.attention(q, k, v, plan, return_lse=True))
        )
        dout = kept[0].copy()
        result["backward_mib"] = peak_growth(
            lambda: kept.extend(zz.attention_backward(dout, q, k, v, *kept, plan))
        )
    else:
        # Detached slices are leaves that share the packed memory.
        q, k, v = (packed[:, i].detach() for i in range(3))
        if kind == "torch":
            q, k, v = (x.contiguous() for x in (q, k, v))
            del packed
        for x in (q, k, v):
            x.requires_grad_()
        kept = []
        result["forward_mib"] = peak_growth(lambda: kept.append(zz.attention(q, k, v, plan)))
        dout = torch.randn_like(kept[0])
        result["backward_mib"] = peak_growth(lambda: kept[0].backward(dout))
    out_mib = tokens * heads * head_dim * 4 / MEBI
    result["results_forward_mib"] = out_mib + tokens * heads * 4 / MEBI
    result["results_backward_mib"] = 3 * out_mib
    return result


def processor() -> str:
    """The processor's name as Linux gives it."""
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def commit() -> str:
    """The commit that is checked out; marked when files differ from it."""
    git = ["git", "-C", str(HERE.parent)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, check=False)
    return head.stdout.strip() + (" with changes" if changed.returncode == 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--program",
        type=pathlib.Path,
        default=HERE.parent / "build" / "default" / "zigzag",
        help="the command [build/default/zigzag]",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=os.cpu_count() or 1,
        help="threads of the command and of torch [all cores]",
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds over all cases [%(default)s]")
    parser.add_argument("--out", type=pathlib.Path, help="write the figures as JSON")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    # Read by the library when it starts its threads, in this process and in those below.
    os.environ["ZIGZAG_NUM_THREADS"] = str(options.threads)
    if options.memory:
        print(json.dumps(memory(options.memory)))
        return
    import torch

    torch.set_num_threads(options.threads)
    figures = {
        "command": " ".join(["python_overhead.py", *sys.argv[1:]]),
        "commit": commit(),
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "load_before": os.getloadavg()[0],
        "torch": torch.__version__,
        "threads": options.threads,
        "overhead": overhead(options),
        "memory": [],
    }
    for kind in ("torch", "torch slices", "numpy slices"):
        # A fresh process each: memory that was given back is not always taken from the peak.
        ended = subprocess.run(
            [sys.executable, __file__, "--memory", kind, "--threads", str(options.threads)],
            capture_output=True,
            text=True,
            check=True,
        )
        row = json.loads(ended.stdout)
        figures["memory"].append(row)
        print(
            f"{kind:12} inputs {row['input_mib']:.0f} MiB; forward {row['forward_mib']:.0f} MiB "
            f"({row['results_forward_mib']:.0f} of them results), backward "
            f"{row['backward_mib']:.0f} MiB ({row['results_backward_mib']:.0f})"
        )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
