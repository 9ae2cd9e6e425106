#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "backend.h"
#include "zigzag/zigzag.h"

namespace zigzag::gpu_bench {

/// Median, minimum and maximum milliseconds of single calls.
struct Timing {
  double median = 0;
  double low = 0;
  double high = 0;
  nlohmann::json json() const { return {{"ms", median}, {"min_ms", low}, {"max_ms", high}}; }
};

/// Times `call(i)`, given to `stream`, with events around each of `repeats` calls after warm-up.
Timing time_calls(void* stream, int warmup, int repeats, const std::function<void(int)>& call);

/// Launches a kernel that does nothing.
void empty_launch(void* stream);

/// A tensor on a GPU, filled with seeded values near normal ones (never zeros: they run faster).
struct GpuTensor {
  Buffer buffer;
  TensorView view;
};
GpuTensor random_tensor(std::vector<std::int64_t> shape, DType dtype, Device device,
                        std::uint64_t seed);

/// The sections; each adds its part to the report and prints its lines.
void bench_copy(nlohmann::json& report);
void bench_layout(nlohmann::json& report);
void bench_attention(nlohmann::json& report, DType dtype);
/// Attention of each rank of `world_size` by itself on GPU 0, without exchanges.
void bench_compute(nlohmann::json& report, int world_size);
/// The same with packs of real document lengths, and one rank that has the whole pack.
void bench_real_compute(nlohmann::json& report, int world_size);
void bench_ranks(nlohmann::json& report, const std::string& comm, int world_size, int iterations);
void bench_real(nlohmann::json& report, int world_size, std::int64_t stage);
/// For a profiler: prints the number of every phase.
void bench_profile(const std::string& comm, int world_size, std::int64_t stage);

}  // namespace zigzag::gpu_bench
