"""Trains a small byte-level language model on real text, over any number of processes.

    python examples/train_tiny_llama.py                       # this repository's own text
    python examples/train_tiny_llama.py --ranks 1,2,8 book.txt other.txt

The same run is made for each number of ranks: each step's pack of documents, laid end to end and of
any lengths, is sharded over the ranks, which are processes over torch.distributed (gloo). The loss
curves are drawn over one another, and their largest relative difference is printed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import socket
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.nn import functional

import zigzag_attention as zz

ROOT = Path(__file__).resolve().parents[1]


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """RoPE: x [tokens, heads, head_dim] at positions [tokens] inside their documents."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * 10000.0 ** (-torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Block(nn.Module):
    """Attention and a gated layer, each behind a norm."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, plan: zz.Plan) -> torch.Tensor:
        qkv = self.qkv(self.norms[0](x)).view(len(x), -1, self.head_dim)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], 1)
        # The only line that knows of other ranks.
        attended = zz.attention(rotate(q, positions), rotate(k, positions), v, plan)
        x = x + self.out(attended.flatten(1))
        gate, up = self.up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(functional.silu(gate) * up)


class TinyLlama(nn.Module):
    """Bytes in, scores of the next byte out."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width, 4, 2) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.05)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, plan: zz.Plan) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, positions, plan)
        return self.head(self.norm(x))


def draw_pack(text: np.ndarray, tokens: int, rng: np.random.Generator) -> zz.Pack:
    """Documents of random lengths from random places, `tokens` bytes in all."""
    documents, left = [], tokens
    while left > 0:
        length = min(left, int(rng.integers(1, tokens // 2)))
        start = int(rng.integers(0, len(text) - length))
        documents.append(torch.from_numpy(text[start : start + length].astype(np.int64)))
        left -= length
    return zz.collate(documents)


def train(rank: int, ranks: int, port: int, text: np.ndarray, options, result: str) -> None:
    """One rank's training; rank 0 writes the losses."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    torch.manual_seed(0)  # the same weights on every rank
    model = TinyLlama(options.width, options.layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate)
    rng = np.random.default_rng(0)  # and the same packs
    losses = []
    for step in range(options.steps):
        pack = draw_pack(text, options.tokens, rng)
        plan = zz.Plan(pack.cu_seqlens, ranks)
        ids, labels = (zz.shard(x, plan, rank) for x in (pack.input_ids, pack.labels))
        scores = model(ids, zz.position_ids(plan, rank)[0], plan)
        loss_sum = functional.cross_entropy(scores, labels, ignore_index=-100, reduction="sum")
        share, mean = zz.token_mean(loss_sum, int((labels != -100).sum()))
        optimizer.zero_grad()
        share.backward()
        zz.sum_gradients(model)
        optimizer.step()
        losses.append(float(mean))
        if rank == 0 and step % 20 == 0:
            print(f"{ranks} ranks, step {step}: loss {losses[-1]:.4f}", file=sys.stderr)
    if rank == 0:
        Path(result).write_text(json.dumps(losses))
    dist.destroy_process_group()


def run(ranks: int, text: np.ndarray, options) -> list[float]:
    """The losses of a run over that many processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        result = str(Path(folder) / "losses.json")
        arguments = (ranks, port, text, options, result)
        torch.multiprocessing.spawn(train, arguments, nprocs=ranks)
        return json.loads(Path(result).read_text())


def draw_plot(curves: dict[int, list[float]], difference: float, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(7, 6), sharex=True, height_ratios=(3, 1), constrained_layout=True
    )
    first = np.array(next(iter(curves.values())))
    for index, (ranks, losses) in enumerate(curves.items()):
        style = {"linewidth": 4, "alpha": 0.35} if index == 0 else {"linewidth": 1.2}
        top.plot(losses, label=f"W = {ranks}", **style)
        if index > 0:
            gap = np.abs(np.array(losses) - first) / first
            bottom.semilogy(np.maximum(gap, 1e-9), label=f"W = {ranks}", color=f"C{index}")
    top.set_ylabel("loss (nats a byte)")
    top.set_title(f"The same training over W ranks; largest relative difference {difference:.1e}")
    top.legend()
    bottom.axhline(1e-4, color="gray", linestyle=":", label="bound 1e-4")
    bottom.set_ylabel("relative\ndifference")
    bottom.set_xlabel("step")
    bottom.legend()
    figure.savefig(path, dpi=120)


def read_text(files: list[str]) -> np.ndarray:
    """The files' bytes; without files, this repository's headers, sources and pages."""
    paths = [Path(name) for name in files]
    if not paths:
        found = (ROOT / folder for folder in ("include", "src", "docs", "python"))
        paths = sorted(
            path
            for folder in found
            for path in folder.rglob("*")
            if path.suffix in (".h", ".cpp", ".md", ".py")
        )
    data = b"\n".join(path.read_bytes() for path in paths)
    if len(data) < 4096:
        raise SystemExit(f"{len(data)} bytes of text are too few; give files of 4096 or more")
    return np.frombuffer(data, dtype=np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="text to train on")
    parser.add_argument("--ranks", default="1,4", help="numbers of processes to compare")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=1000, help="bytes a pack")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--plot", default="train_tiny_llama.png", help="'' draws none")
    options = parser.parse_args()
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib, or --plot '' for no plot")
    text = read_text(options.files)
    curves = {int(ranks): run(int(ranks), text, options) for ranks in options.ranks.split(",")}
    first = np.array(next(iter(curves.values())))
    difference = max(float((np.abs(np.array(x) - first) / first).max()) for x in curves.values())
    for ranks, losses in curves.items():
        print(f"W = {ranks}: loss {losses[0]:.6f} -> {losses[-1]:.6f} in {len(losses)} steps")
    print(f"largest relative difference: {difference:.2e}")
    if options.plot:
        draw_plot(curves, difference, options.plot)
        print(f"plot: {options.plot}")


if __name__ == "__main__":
    main()
