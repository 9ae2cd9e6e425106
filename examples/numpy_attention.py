"""Exact attention over four ranks in plain NumPy: the ranks are threads of this process.

    python examples/numpy_attention.py

Three documents of lengths that nothing divides are laid end to end. Each rank takes its zigzag
rows, computes attention and its gradients together with the others, and the shards put together
are those of one rank: out, lse and dq bit for bit, dk and dv up to float32 rounding.
"""

import threading

import numpy as np

import zigzag_attention as zz

RANKS, HEADS, KV_HEADS, HEAD_DIM = 4, 8, 2, 64


def forward_backward(q, k, v, dout, plan, group):
    """out, lse, dq, dk, dv of one rank's rows."""
    out, lse = zz.attention(q, k, v, plan, group, return_lse=True)
    return (out, lse, *zz.attention_backward(dout, q, k, v, out, lse, plan, group))


def main():
    rng = np.random.default_rng(0)
    lengths = [1009, 3, 500]
    tokens = sum(lengths)
    q, dout = rng.standard_normal((2, tokens, HEADS, HEAD_DIM), dtype=np.float32)
    k, v = rng.standard_normal((2, tokens, KV_HEADS, HEAD_DIM), dtype=np.float32)

    plan = zz.Plan.from_lengths(lengths, RANKS)
    for rank in range(RANKS):
        received = plan.gathered_bytes(rank, KV_HEADS, HEAD_DIM, itemsize=4)
        print(f"rank {rank}: {plan.local_tokens(rank)} rows, receives {received / 1e6:.2f} MB")
    print(f"balance {plan.balance():.4f}")

    parts = [None] * RANKS

    def work(rank, group):
        mine = [zz.shard(x, plan, rank) for x in (q, k, v, dout)]
        parts[rank] = forward_backward(*mine, plan, group)

    threads = [
        threading.Thread(target=work, args=pair)
        for pair in enumerate(zz.Communicator.threads(RANKS))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    alone = forward_backward(q, k, v, dout, zz.Plan.from_lengths(lengths, 1), None)
    for name, one, shards in zip(
        ("out", "lse", "dq", "dk", "dv"), alone, zip(*parts, strict=True), strict=True
    ):
        many = zz.unshard(list(shards), plan)
        largest = float(np.abs(many - one).max())
        print(f"{name:>3}: largest difference to one rank {largest:.1e}")
        assert largest <= (2e-5 if name in ("dk", "dv") else 0.0), name


if __name__ == "__main__":
    main()
