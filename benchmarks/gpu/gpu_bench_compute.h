#pragma once

#include <cstdint>
#include <vector>

#include "gpu_bench_steps.h"

namespace zigzag::gpu_bench {

/// Seconds of a rank's attention by itself, as if its keys were gathered already.
struct ComputeTimes {
  double forward = 0;
  double backward = 0;  // in one part
  double in_parts = 0;  // the backward as it is given when ranks exchange: see backend.h

  nlohmann::json json() const {
    return {{"forward_ms", 1e3 * forward},
            {"backward_ms", 1e3 * backward},
            {"backward_in_parts_ms", 1e3 * in_parts}};
  }
};

/// Medians by CUDA events, mean over the packs. `step` has the rank's rows of one pack.
ComputeTimes compute_times(const std::vector<Plan>& plans, const Heads& heads, int rank,
                           Device device, const Step& step, void* stream);

}  // namespace zigzag::gpu_bench
