#pragma once

#include <cstdint>
#include <span>

#include "zigzag/communicator.h"
#include "zigzag/options.h"
#include "zigzag/plan.h"
#include "zigzag/tensor.h"

namespace zigzag {

/// Exact attention of this rank's queries over the whole pack. A collective call.
///
/// q [local_tokens, heads, head_dim], k and v [local_tokens, kv_heads, head_dim]: the rank's
/// zigzag rows, float32, float16 or bfloat16; strides are free but the last is 1. out like q, lse
/// [local_tokens, heads] float32: natural logarithm of the sum of exp(scale * q.k) over visible
/// keys; a row that sees no key has out 0 and lse -inf. Query head h reads KV head
/// h / (heads / kv_heads). Throws before any rows are exchanged when arguments do
/// not fit: InvalidArgument on the rank that passed them, CommunicationError with the ranks and the
/// difference on the others, and on all when ranks disagree. Throws CommunicationError or Timeout
/// when a peer fails.
void forward(const TensorView& q, const TensorView& k, const TensorView& v, const Plan& plan,
             const Communicator& communicator, const AttentionOptions& options,
             const TensorView& out, const TensorView& lse);

/// The gradients of forward, for the same plan and options. dout like q; out and lse as forward
/// wrote them; dq like q, dk and dv like k. dK and dV are summed over work items and ranks in
/// float32 in a fixed order and rounded once.
void backward(const TensorView& dout, const TensorView& q, const TensorView& k, const TensorView& v,
              const TensorView& out, const TensorView& lse, const Plan& plan,
              const Communicator& communicator, const AttentionOptions& options,
              const TensorView& dq, const TensorView& dk, const TensorView& dv);

/// The stage that `kv_heads_per_stage = 0` stands for; the same on every rank.
std::int64_t auto_kv_heads_per_stage(const Plan& plan, std::int64_t kv_heads, std::int64_t head_dim,
                                     DType dtype, Device device);

namespace reference {

/// Attention of a whole pack in global order by plain loops in float64: it knows no plan, no rank
/// and no tile. q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim] on the CPU; out
/// like q and lse [tokens, heads], both float64.
void forward(const TensorView& q, const TensorView& k, const TensorView& v,
             std::span<const std::int64_t> cu_seqlens, const AttentionOptions& options,
             const TensorView& out, const TensorView& lse);

/// Its gradients: dout, q, k, v as given to forward; dq, dk, dv float64. out and lse are computed
/// anew in float64.
void backward(const TensorView& dout, const TensorView& q, const TensorView& k, const TensorView& v,
              std::span<const std::int64_t> cu_seqlens, const AttentionOptions& options,
              const TensorView& dq, const TensorView& dk, const TensorView& dv);

}  // namespace reference

}  // namespace zigzag
