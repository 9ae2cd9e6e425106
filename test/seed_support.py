"""What the tests at the seed's paths share: ranks, devices, oracles and a comparator.

Runs as a torchrun script, under `torchrun -m pytest`, and without torchrun as one rank.
"""

from __future__ import annotations

import datetime
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

import zigzag_attention


@dataclass(frozen=True)
class World:
    """This process among the ranks."""

    rank: int
    size: int
    device: torch.device

    def gather(self, value: object) -> list[object]:
        """A small object of every rank, in rank order."""
        if self.size == 1:
            return [value]
        values: list[object] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def say(self, *lines: str) -> None:
        """Prints on rank 0, in one piece."""
        if self.rank == 0:
            print("\n".join(lines), flush=True)


def _has_cuda(size: int) -> bool:
    built = any(name == "CUDA" and ok for name, ok, _ in zigzag_attention.components())
    return built and torch.cuda.is_available() and torch.cuda.device_count() >= size


_world: World | None = None


def world() -> World:
    """The ranks of torchrun: NCCL and a GPU each where there are enough, else gloo on the CPU."""
    global _world
    if _world is None:
        size = int(os.environ.get("WORLD_SIZE", "1"))
        rank = int(os.environ.get("RANK", "0"))
        device = torch.device("cpu")
        if _has_cuda(size):
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        if "WORLD_SIZE" in os.environ:
            # Bytes of the control plane travel on the host.
            # Ranks tell each other how a test ended; one that failed alone must not wait long.
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                timeout=datetime.timedelta(seconds=300),
            )
        else:
            torch.set_num_threads(os.cpu_count() or 1)
        _world = World(rank, size, device)
    return _world


def close() -> None:
    """Leaves the group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def main(tests: list[Callable[[], None]]) -> None:
    """Runs tests in order as a script; exits 1 when one failed on any rank."""
    ranks = world()
    failed = []
    for test in tests:
        error = ""
        try:
            test()
        except Exception:
            error = traceback.format_exc()
            print(f"[Rank {ranks.rank}] {test.__name__} FAILED\n{error}", flush=True)
        if any(ranks.gather(error)):
            failed.append(test.__name__)
    if failed:
        ranks.say(f"FAILED: {', '.join(failed)}")
    else:
        ranks.say(f"All {len(tests)} tests passed on {ranks.size} ranks ({ranks.device.type}).")
    close()
    sys.exit(1 if failed else 0)


def seeded(seed: int) -> torch.Generator:
    """Every rank draws the same inputs, so no oracle needs communication."""
    return torch.Generator().manual_seed(seed)


def cu_seqlens_of(lengths: list[int]) -> torch.Tensor:
    """int32, GLOBAL."""
    ends = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
    return ends.to(torch.int32)


def oracle_rows(lengths: list[int], rank: int, size: int) -> torch.Tensor:
    """The global tokens of a rank by the seed's own formula; lengths divide by 2 * size."""
    rows, start = [], 0
    for length in lengths:
        chunk = length // (2 * size)
        for index in (rank, 2 * size - 1 - rank):
            begin = start + index * chunk
            rows.append(torch.arange(begin, begin + chunk))
        start += length
    return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)


def rank_order(x: torch.Tensor, lengths: list[int], size: int, dim: int) -> torch.Tensor:
    """Sequence order to what an all-gather of the ranks' rows leaves."""
    rows = torch.cat([oracle_rows(lengths, rank, size) for rank in range(size)])
    return x.index_select(dim, rows)


def differences(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """Largest and mean absolute difference; NaN anywhere, or another shape, is infinite."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf"), float("inf")
    if a.numel() == 0:
        return 0.0, 0.0
    diff = (a.double() - b.double()).abs()
    if not bool(torch.isfinite(diff).all()):
        return float("inf"), float("inf")
    return float(diff.max()), float(diff.mean())


def report_exact(title: str, pairs: list[tuple[str, torch.Tensor, torch.Tensor]]) -> None:
    """Prints the seed's lines and fails unless all pairs are bitwise equal on every rank."""
    ranks = world()
    lines = [f"[Rank {ranks.rank}] Test: {title}"]
    wrong = []
    for name, got, expected in pairs:
        largest, mean = differences(got, expected)
        lines += [f"  {name} max diff: {largest:.6e}", f"  {name} mean diff: {mean:.6e}"]
        if largest != 0.0 or not torch.equal(got, expected):
            wrong.append(f"rank {ranks.rank}: {name} differs by up to {largest:.6e}")
    failures = [text for texts in ranks.gather(wrong) for text in texts]  # type: ignore[attr-defined]
    lines.append("  ✗ FAILED: " + "; ".join(failures) if failures else "  ✓ PASSED")
    ranks.say("", *lines)
    assert not failures, "; ".join(failures)
