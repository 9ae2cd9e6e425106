#!/usr/bin/env python3
"""Compares `zigzag bench attention` with PyTorch's scaled_dot_product_attention on the CPU.

Needs an environment of its own and a build:

  python3 -m venv .venv-bench
  .venv-bench/bin/pip install torch==2.13.0 matplotlib
  cmake --preset default -B build/default && cmake --build build/default -j2
  .venv-bench/bin/python benchmarks/compare_pytorch.py --out results.json --plot results.png

Each round measures, of every case, PyTorch and then Zigzag with the multiply-add peak beside it;
ratios are taken inside a round and their median counts, so that what else runs on a shared machine
hits both. FLOPs are causal: 4 x heads x head_dim x the sum of L^2 / 2 forward, 3.5 times that with
backward. PyTorch runs documents of equal length as a batch, and a pack of unequal ones document
after document, without padding.
"""

import argparse
import csv
import dataclasses
import json
import os
import pathlib
import platform
import random
import re
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
HISTOGRAM = ROOT / "test" / "data" / "document_lengths.csv"
REAL_TOKENS = 16384
SHORT = 512, 64
TORCH_REPEATS = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """A pack and its heads."""

    name: str
    lengths: tuple
    heads: int
    head_dim: int
    dtype: str

    def gflop(self) -> float:
        return 2e-9 * self.heads * self.head_dim * sum(length**2 for length in self.lengths)


def real_lengths(tokens: int, seed: int) -> tuple:
    """Document lengths drawn from the histogram until `tokens` are there; the last one is cut."""
    with HISTOGRAM.open(newline="") as file:
        rows = list(csv.DictReader(file))
    ranges = [tuple(map(int, re.findall(r"\d+", row["range"]))) for row in rows]
    weights = [int(row["number"]) for row in rows]
    draw = random.Random(seed)
    lengths: list = []
    while sum(lengths) < tokens:
        low, *high = draw.choices(ranges, weights)[0]
        length = draw.randint(max(low, 1), high[0] if high else 2 * low)
        lengths.append(min(length, tokens - sum(lengths)))
    return tuple(lengths)


def cases() -> list:
    """Every pack in both types."""
    packs = (
        ("1 x 2048", (2048,), 8, 64),
        ("1 x 4096", (4096,), 8, 64),
        ("1 x 4096", (4096,), 8, 128),
        ("1 x 8192", (8192,), 4, 128),
        (f"{SHORT[0]} x {SHORT[1]}", (SHORT[1],) * SHORT[0], 8, 64),
        ("real pack", real_lengths(REAL_TOKENS, 1), 8, 128),
    )
    return [Case(*pack, dtype) for dtype in ("float32", "bfloat16") for pack in packs]


def timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def torch_seconds(case: Case) -> tuple:
    """Median seconds of a forward, and of forward and backward."""
    import torch

    attention = torch.nn.functional.scaled_dot_product_attention
    batch = len(case.lengths) if len(set(case.lengths)) == 1 else 1
    lengths = case.lengths[:1] if batch > 1 else case.lengths
    tensors = []
    for length in lengths:
        shape = (batch, case.heads, length, case.head_dim)
        inputs = [torch.randn(shape, dtype=getattr(torch, case.dtype)) for _ in range(4)]
        tensors.append([x.requires_grad_() for x in inputs[:3]] + [inputs[3]])

    def forward():
        with torch.no_grad():
            for q, k, v, _ in tensors:
                attention(q, k, v, is_causal=True)

    def both():
        for q, k, v, dout in tensors:
            attention(q, k, v, is_causal=True).backward(dout)
            q.grad = k.grad = v.grad = None

    both()
    times = [(timed(forward), timed(both)) for _ in range(TORCH_REPEATS)]
    return tuple(statistics.median(column) for column in zip(*times, strict=True))


def masked_seconds() -> float:
    """Seconds of PyTorch's forward over the whole pack of short documents in one masked call."""
    import torch

    documents, length = SHORT
    tokens = documents * length
    q, k, v = (torch.randn(1, 8, tokens, 64) for _ in range(3))
    document = torch.arange(tokens) // length
    mask = (document[:, None] == document[None, :]).tril_()
    with torch.no_grad():
        return timed(
            lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        )


def zigzag_bench(program: pathlib.Path, case: Case, ranks: int, threads: int, repeat: int) -> dict:
    """The benchmark's JSON; raises when a result is wrong."""
    command = [str(program), "bench", "attention", "--json", "--lengths"]
    command += [",".join(map(str, case.lengths)), "--heads", str(case.heads), "--kv-heads"]
    command += [str(case.heads), "--head-dim", str(case.head_dim), "--dtype", case.dtype]
    command += ["--ranks", str(ranks), "--threads", str(threads), "--repeat", str(repeat)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\nended with {run.returncode}: {run.stderr}")
    return json.loads(run.stdout)


def zigzag_seconds(result: dict) -> tuple:
    rows = {row["pass"]: row for row in result["rows"]}
    return rows["forward"]["ms"] / 1e3, rows["both"]["ms"] / 1e3


def measure(options: argparse.Namespace) -> dict:
    """Every round of every case."""
    rounds: dict = {case: [] for case in cases()}
    over_ranks: dict = {case: [] for case in rounds if len(case.lengths) == 1}
    for number in range(options.rounds):
        for case in rounds:
            print(f"round {number + 1}: {case.dtype} {case.name}", end="\r", file=sys.stderr)
            torch_forward, torch_both = torch_seconds(case)
            result = zigzag_bench(options.program, case, 1, options.threads, options.repeat)
            forward, both = zigzag_seconds(result)
            peak = result[f"fma_peak_gflops_{options.threads}_threads"]
            rounds[case].append(
                {
                    "peak_gflops": peak,
                    "torch": [case.gflop() / torch_forward, 3.5 * case.gflop() / torch_both],
                    "zigzag": [case.gflop() / forward, 3.5 * case.gflop() / both],
                }
            )
        for case, shares in over_ranks.items():
            result = zigzag_bench(options.program, case, 4, options.threads, options.repeat)
            rows = {row["pass"]: row for row in result["rows"]}
            shares.append([rows["forward"]["of one rank"], rows["both"]["of one rank"]])
    print(" " * 60, end="\r", file=sys.stderr)
    return {"rounds": rounds, "over_ranks": over_ranks}


def summary(case: Case, rounds: list) -> dict:
    """Medians over the rounds, of rates and of the ratios inside a round."""
    row: dict = dataclasses.asdict(case)
    row["lengths"] = list(case.lengths) if len(case.lengths) < 100 else case.name
    row["peak_gflops"] = statistics.median(r["peak_gflops"] for r in rounds)
    for i, name in enumerate(("forward", "both")):
        ratios = [r["zigzag"][i] / r["torch"][i] for r in rounds]
        row[name] = {
            "torch_gflops": statistics.median(r["torch"][i] for r in rounds),
            "zigzag_gflops": statistics.median(r["zigzag"][i] for r in rounds),
            "of_peak": statistics.median(r["zigzag"][i] / r["peak_gflops"] for r in rounds),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
        }
    return row


def print_table(rows: list) -> None:
    print(
        "| type | pack | heads, d | peak | forward: PyTorch | Zigzag | of peak | ratio (range) "
        "| fwd+bwd: PyTorch | Zigzag | of peak | ratio (range) |\n" + "|---" * 12 + "|"
    )
    for row in rows:
        cells = [row["dtype"], row["name"], f"{row['heads']}, {row['head_dim']}"]
        cells.append(f"{row['peak_gflops']:.0f}")
        for name in ("forward", "both"):
            part = row[name]
            low, high = part["ratio_range"]
            cells += [f"{part['torch_gflops']:.0f}", f"{part['zigzag_gflops']:.0f}"]
            cells += [f"{part['of_peak']:.2f}", f"{part['ratio']:.2f} ({low:.2f}-{high:.2f})"]
        print("| " + " | ".join(cells) + " |")


def save_plot(rows: list, path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 5.5), layout="constrained")
    labels = [f"{row['dtype']}, {row['name']}, d {row['head_dim']}" for row in rows]
    for offset, name, label in ((-0.2, "forward", "forward"), (0.2, "both", "forward + backward")):
        values = [row[name]["ratio"] for row in rows]
        errors = [
            [row[name]["ratio"] - row[name]["ratio_range"][0] for row in rows],
            [row[name]["ratio_range"][1] - row[name]["ratio"] for row in rows],
        ]
        places = [i + offset for i in range(len(rows))]
        axis.barh(places, values, height=0.38, xerr=errors, capsize=2, label=label)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_yticks(range(len(rows)), labels)
    axis.invert_yaxis()
    axis.set_xlabel("speed over PyTorch's scaled_dot_product_attention (1: equal; bars: range)")
    axis.legend()
    figure.savefig(path, dpi=110)


def processor() -> str:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--build",
        type=pathlib.Path,
        default=ROOT / "build" / "default",
        help="the build folder that holds the command [build/default]",
    )
    parser.add_argument(
        "--threads", type=int, default=2, help="threads of both PyTorch and Zigzag [%(default)s]"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds over all cases [%(default)s]")
    parser.add_argument(
        "--repeat", type=int, default=3, help="repetitions of Zigzag in a round [%(default)s]"
    )
    parser.add_argument("--no-masked", action="store_true", help="leave out the masked call")
    parser.add_argument("--out", type=pathlib.Path, help="write the figures as JSON")
    parser.add_argument("--plot", type=pathlib.Path, help="draw the ratios; needs matplotlib")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; it must be at least 1")
    options.program = options.build / "zigzag"
    if not options.program.exists():
        parser.error(f"{options.program} is missing: build the preset 'default' first")
    try:
        import torch
    except ImportError:
        parser.error("torch is missing: pip install torch==2.13.0")
    torch.set_num_threads(options.threads)
    load = [os.getloadavg()[0]]
    measured = measure(options)
    load.append(os.getloadavg()[0])
    rows = [summary(case, rounds) for case, rounds in measured["rounds"].items()]
    print_table(rows)
    over_ranks = [
        {
            **dataclasses.asdict(case),
            "forward": statistics.median(share[0] for share in shares),
            "both": statistics.median(share[1] for share in shares),
        }
        for case, shares in measured["over_ranks"].items()
    ]
    print("\nFour ranks as threads of the same cores, speed over one rank's:\n")
    print("| type | pack | heads, d | forward | fwd+bwd |\n|---|---|---|---|---|")
    for row in over_ranks:
        print(
            f"| {row['dtype']} | {row['name']} | {row['heads']}, {row['head_dim']} "
            f"| {row['forward']:.3f} | {row['both']:.3f} |"
        )
    masked = None
    if not options.no_masked:
        short = next(row for row in rows if row["name"] == f"{SHORT[0]} x {SHORT[1]}")
        flops = Case("", (SHORT[1],) * SHORT[0], 8, 64, "float32").gflop()
        masked = masked_seconds() * short["forward"]["zigzag_gflops"] / flops
        print(
            f"\nOne masked call of PyTorch over the pack of short documents: {masked:.0f} x slower"
        )
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    result = {
        "command": " ".join(["compare_pytorch.py", *sys.argv[1:]]),
        "commit": commit.stdout.strip(),
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "load_before_after": load,
        "torch": torch.__version__,
        "threads": options.threads,
        "rows": rows,
        "four_ranks_over_one": over_ranks,
        "masked_call_slower": masked,
        "rounds": [
            {"name": case.name, "dtype": case.dtype, "head_dim": case.head_dim, "rounds": rounds}
            for case, rounds in measured["rounds"].items()
        ],
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        save_plot(rows, options.plot)


if __name__ == "__main__":
    main()
