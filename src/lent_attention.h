#pragma once

#include <cstdint>
#include <span>

#include "attention_check.h"
#include "backend.h"
#include "zigzag/options.h"
#include "zigzag/plan.h"

namespace zigzag {

/// The tensors of one rank's call; those of the backward are unset in a forward.
struct CallTensors {
  TensorView q, k, v, out, lse;
  TensorView dout, dq, dk, dv;
};

/// Attention of all ranks at once, in the thread of one of them, where the others have lent their
/// tensors: `ranks` in rank order. Nothing is gathered, and every bit is what the ranks would
/// compute for themselves.
void forward_for_all(std::span<const CallTensors> ranks, const Plan& plan,
                     const AttentionOptions& options, const Problem& problem, Backend& backend);

/// Likewise the backward.
void backward_for_all(std::span<const CallTensors> ranks, const Plan& plan,
                      const AttentionOptions& options, const Problem& problem, Backend& backend);

}  // namespace zigzag
