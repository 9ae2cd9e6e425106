#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "zigzag/zigzag.h"

namespace zigzag::gpu_test {

/// One attention problem.
struct Problem {
  std::vector<std::int64_t> lengths;
  std::int64_t heads = 4;
  std::int64_t kv_heads = 2;
  std::int64_t head_dim = 64;
  DType dtype = DType::kFloat32;
  Mask mask;
  double softcap = 0;
  std::uint64_t seed = 1;
};

/// How a problem is run.
struct RunOptions {
  std::int64_t world_size = 1;
  std::string comm = "peer";  // "peer" or "nccl"
  std::int64_t kv_heads_per_stage = 0;
  bool deterministic = false;
  Kernels kernels = Kernels::kFused;
  bool packed = false;  // q, k, v are slices of one [rows, heads + 2 kv_heads, head_dim] tensor
};

/// Whole-pack results in global order, as float64.
struct Results {
  std::vector<double> out, lse, dq, dk, dv;
};

/// Relative L2 errors against the float64 reference; infinite where inf or NaN stand in other
/// places than in the reference, or where memory around an output was written.
struct Errors {
  double out = 0, lse = 0, dq = 0, dk = 0, dv = 0;
};

/// "[1024,7] 4/2 heads x 64 bfloat16 causal".
std::string describe(const Problem& problem);

/// The float64 reference of a problem, computed once and kept.
std::shared_ptr<const Results> reference_of(const Problem& problem);

/// Runs forward and backward on the GPUs (rank r on GPU r modulo their number); outputs start as
/// NaN and inputs have NaN around them. `fences_held` tells whether memory around outputs stayed.
Results run_on_gpus(const Problem& problem, const RunOptions& run, bool& fences_held);

/// run_on_gpus compared with the reference.
Errors errors_of(const Problem& problem, const RunOptions& run);

/// Relative L2 distance, infinite where special values differ.
double distance(const std::vector<double>& got, const std::vector<double>& want);

/// Calls `body(rank)` on a thread a rank and rethrows the first exception.
void on_ranks(std::int64_t world_size, const std::function<void(int)>& body);

/// Tokens of a rank as bytes: x [tokens, row] of the whole pack -> the rank's rows, and back.
std::vector<std::byte> shard_bytes(const std::vector<std::byte>& x, DType dtype,
                                   const std::vector<std::int64_t>& shape, const Plan& plan,
                                   std::int64_t rank);

/// Seeded normal values of a type, as bytes, and their values.
std::vector<std::byte> random_bytes(std::int64_t count, DType dtype, std::uint64_t seed);
std::vector<double> to_doubles(const std::byte* bytes, std::int64_t count, DType dtype);

}  // namespace zigzag::gpu_test
