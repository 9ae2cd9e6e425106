"""A training script as a user of ring_flash_attn has it; only the import line is changed.

torchrun --nproc_per_node 4 test/python/user_script.py

It trains nothing: it does what a trainer does with each of the three packings, and compares the
gathered results with attention in float64. Prints one line for each, and exits 1 above the bounds.
"""

import os
import sys

import torch
import torch.distributed as dist

import zigzag_attention.ring_flash_attn as ring_flash_attn
from reference import attend

LENGTHS = [
    512,
    64,
    1024,
    16,
    256,
]  # multiples of 2 x 8 ranks, as the library it was written for asks
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64


def gather(local, cu_seqlens, world_size):
    """The rows of all ranks in the order of the pack."""
    parts = [torch.empty_like(local) for _ in range(world_size)]
    dist.all_gather(parts, local.contiguous())
    full = torch.empty(int(cu_seqlens[-1]), *local.shape[1:], dtype=local.dtype)
    rows = torch.arange(int(cu_seqlens[-1]))
    for rank, part in enumerate(parts):
        full[ring_flash_attn.extract_local(rows, cu_seqlens, rank, world_size)] = part
    return full


def step(packing, tensors, dout, cu_seqlens, rank, world_size):
    """out, lse and the gradients of q, k and v, of the whole pack."""
    q, k, v, dout = (
        ring_flash_attn.extract_local(x, cu_seqlens, rank, world_size) for x in (*tensors, dout)
    )
    arguments = {
        "cu_seqlens_q": cu_seqlens // world_size,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": max(LENGTHS) // world_size,
        "max_seqlen_k": max(LENGTHS),
        "heads_k_stride": 1,
        "local_k_slice": None,
        "dropout_p": 0.0,
        "causal": True,
        "window_size": (-1, -1),
        "alibi_slopes": None,
        "deterministic": False,
        "return_attn_probs": True,
        "group": dist.group.WORLD,
    }
    if packing == "qkvpacked":
        qkv = torch.stack([q, k, v], dim=1).requires_grad_()
        function = ring_flash_attn.zigzag_llama3_flash_attn_varlen_qkvpacked_func
        out, lse, _ = function(qkv, **arguments)
        out.backward(dout)
        grads = qkv.grad.unbind(1)
    elif packing == "kvpacked":
        q.requires_grad_()
        kv = torch.stack([k, v], dim=1).requires_grad_()
        function = ring_flash_attn.zigzag_llama3_flash_attn_varlen_kvpacked_func
        out, lse, _ = function(q, kv, **arguments)
        out.backward(dout)
        grads = (q.grad, *kv.grad.unbind(1))
    else:
        leaves = [x.requires_grad_() for x in (q, k, v)]
        function = ring_flash_attn.zigzag_llama3_flash_attn_varlen_func
        out, lse, _ = function(*leaves, **arguments)
        out.backward(dout)
        grads = [x.grad for x in leaves]
    return [gather(x.detach(), cu_seqlens, world_size) for x in (out, lse.T, *grads)]


def main():
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    torch.manual_seed(0)  # the same pack on every rank
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    tokens = sum(LENGTHS)
    wrong = 0
    for packing in ("separate", "kvpacked", "qkvpacked"):
        kv_heads = HEADS if packing == "qkvpacked" else KV_HEADS
        shapes = [(tokens, heads, HEAD_DIM) for heads in (HEADS, kv_heads, kv_heads, HEADS)]
        *tensors, dout = (torch.randn(shape) for shape in shapes)
        got = step(packing, tensors, dout, cu_seqlens, rank, world_size)
        q, k, v = (x.double().requires_grad_() for x in tensors)
        want_out, want_lse = attend(q, k, v, LENGTHS)
        want_out.backward(dout.double())
        wanted = (want_out.detach(), want_lse.detach(), q.grad, k.grad, v.grad)
        line = []
        for name, mine, want in zip(("out", "lse", "dq", "dk", "dv"), got, wanted, strict=True):
            difference = mine.double() - want
            relative = float(difference.norm() / want.norm())
            largest = float(difference.abs().max() / want.abs().max())
            line.append(f"{name} {relative:.2e}")
            good = relative <= (3e-6 if name in ("dk", "dv") else 2e-6) and largest <= 2e-5
            wrong += not good
        if rank == 0:
            print(f"W = {world_size}, {packing}: relative L2 {', '.join(line)}", flush=True)
    dist.destroy_process_group()
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
