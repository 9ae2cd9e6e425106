#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "comm/agree.h"
#include "zigzag/attention.h"

namespace zigzag {

/// A call of forward or backward with every default resolved.
struct Problem {
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t kv_heads_per_stage = 0;
  double scale = 0;
  Kernels kernels = Kernels::kFused;
};

/// The largest head_dim that attention takes.
inline constexpr std::int64_t kMaxHeadDim = 256;

/// Throws InvalidArgument unless the tensors fit the plan, the rank and one another and the options
/// make sense.
Problem check_forward(const TensorView& q, const TensorView& k, const TensorView& v,
                      const Plan& plan, const Communicator& communicator,
                      const AttentionOptions& options, const TensorView& out,
                      const TensorView& lse);
Problem check_backward(const TensorView& dout, const TensorView& q, const TensorView& k,
                       const TensorView& v, const TensorView& out, const TensorView& lse,
                       const Plan& plan, const Communicator& communicator,
                       const AttentionOptions& options, const TensorView& dq, const TensorView& dk,
                       const TensorView& dv);

/// What the ranks compare; `error` is why this rank's arguments were refused, if they were.
comm::Agreement describe(comm::Direction direction, const TensorView& q, const Plan& plan,
                         const AttentionOptions& options, const Problem& problem,
                         const std::string& error);

namespace reference {

/// The same for a whole pack with float64 results.
void check_reference_forward(const TensorView& q, const TensorView& k, const TensorView& v,
                             std::span<const std::int64_t> cu_seqlens,
                             const AttentionOptions& options, const TensorView& out,
                             const TensorView& lse);
void check_reference_backward(const TensorView& dout, const TensorView& q, const TensorView& k,
                              const TensorView& v, std::span<const std::int64_t> cu_seqlens,
                              const AttentionOptions& options, const TensorView& dq,
                              const TensorView& dk, const TensorView& dv);

}  // namespace reference

}  // namespace zigzag
