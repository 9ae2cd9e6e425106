#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "zigzag/plan.h"

namespace zigzag {

/// Which twin of an operation runs: the fast one or the plain one that tests compare it with.
enum class Kernels : std::uint8_t { kFused, kReference };

/// "fused" or "reference".
std::string_view kernels_name(Kernels kernels);

/// The twin of that name. Throws InvalidArgument when there is none.
Kernels parse_kernels(std::string_view name);

/// The default twin: what set_default_kernels was given, else `ZIGZAG_KERNELS`, else fused.
/// Throws InvalidArgument when the variable holds another word.
Kernels default_kernels();

/// Sets the default for the whole process; an empty optional returns to the environment's.
void set_default_kernels(std::optional<Kernels> kernels);

/// What every operation takes.
struct OperationOptions {
  /// Which twin; empty means default_kernels().
  std::optional<Kernels> kernels;
  /// The CUDA stream (a cudaStream_t) that work on CUDA tensors is ordered with.
  void* stream = nullptr;
};

/// What attention computes. The fields that all ranks must share are compared before the first
/// exchange.
struct AttentionOptions : OperationOptions {
  /// Which keys a query sees.
  Mask mask;
  /// Multiplies q.k before the softmax; empty means 1/sqrt(head_dim).
  std::optional<double> softmax_scale;
  /// Scores s become softcap * tanh(s / softcap); 0 means none.
  double softcap = 0;
  /// KV heads gathered at a time, a divisor of the KV heads; 0 lets the library choose. Bounds
  /// memory; the results do not depend on it.
  std::int64_t kv_heads_per_stage = 0;
  /// On CUDA: a bitwise repeatable backward. The CPU is always repeatable.
  bool deterministic = false;
};

}  // namespace zigzag
