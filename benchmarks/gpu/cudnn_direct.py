"""cuDNN's attention called directly through PyTorch, one dense causal document: the yardstick of
gpu_bench's section `attention`. Prints a table and writes JSON to the file given."""

import itertools
import json
import statistics
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


def median_ms(call, warmup, repeats):
    for _ in range(warmup):
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def measure(tokens):
    def tensor(heads):
        # Rows are tokens, as in a pack: [batch, tokens, heads, head_dim] seen head-major.
        x = torch.randn(1, tokens, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        return x.transpose(1, 2).requires_grad_()

    q, k, v = tensor(HEADS), tensor(KV_HEADS), tensor(KV_HEADS)
    dout = torch.randn_like(q)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):

        def forward():
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            )

        with torch.no_grad():
            forward_ms = median_ms(forward, 5, 30)
        out = forward()
        backward_ms = median_ms(
            lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True), 5, 30
        )
    flops = 2 * tokens * (tokens + 1) * HEADS * HEAD_DIM
    return {
        "forward_ms": forward_ms,
        "forward_tflops": flops / forward_ms / 1e9,
        "backward_ms": backward_ms,
        "backward_tflops": 2.5 * flops / backward_ms / 1e9,
    }


def main():
    results = {"cudnn": torch.backends.cudnn.version(), "torch": torch.__version__}
    for tokens in (8192, 32768):
        results[f"[{tokens}]"] = line = measure(tokens)
        print(
            f"cuDNN direct [{tokens}] fwd {line['forward_ms']:.3f} ms"
            f" {line['forward_tflops']:.1f} TFLOP/s"
            f"  bwd {line['backward_ms']:.3f} ms {line['backward_tflops']:.1f} TFLOP/s"
        )
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
