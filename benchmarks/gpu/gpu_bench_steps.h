#pragma once

#include <cstdint>
#include <vector>

#include "gpu_bench.h"

namespace zigzag::gpu_bench {

struct Heads {
  std::int64_t q = 32;
  std::int64_t kv = 8;
  std::int64_t dim = 128;
};

/// A rank's tensors of one step.
struct Step {
  Step(std::int64_t rows, const Heads& heads, DType dtype, Device device, std::uint64_t seed);

  void forward(const Plan& plan, const Communicator& group, const AttentionOptions& options) const;
  void backward(const Plan& plan, const Communicator& group, const AttentionOptions& options) const;

  GpuTensor q, k, v, dout, out, lse, dq, dk, dv;
};

/// The four packs that steps a second are measured with, for `world_size` ranks.
std::vector<std::vector<std::int64_t>> packs_for(std::int64_t world_size);

/// Documents of the lengths that test/data/document_lengths.csv counts, `tokens` tokens in all.
std::vector<std::int64_t> real_pack(std::int64_t tokens, std::uint64_t seed);

/// Seconds of a steady clock.
double seconds_now();

}  // namespace zigzag::gpu_bench
