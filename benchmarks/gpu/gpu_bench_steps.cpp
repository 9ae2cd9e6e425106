#include "gpu_bench_steps.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <numeric>
#include <random>

namespace zigzag::gpu_bench {

using std::int64_t;

Step::Step(int64_t rows, const Heads& heads, DType dtype, Device device, std::uint64_t seed)
    : q(random_tensor({rows, heads.q, heads.dim}, dtype, device, seed)),
      k(random_tensor({rows, heads.kv, heads.dim}, dtype, device, seed + 1)),
      v(random_tensor({rows, heads.kv, heads.dim}, dtype, device, seed + 2)),
      dout(random_tensor({rows, heads.q, heads.dim}, dtype, device, seed + 3)),
      out(random_tensor({rows, heads.q, heads.dim}, dtype, device, seed + 4)),
      lse(random_tensor({rows, heads.q}, DType::kFloat32, device, seed + 5)),
      dq(random_tensor({rows, heads.q, heads.dim}, dtype, device, seed + 6)),
      dk(random_tensor({rows, heads.kv, heads.dim}, dtype, device, seed + 7)),
      dv(random_tensor({rows, heads.kv, heads.dim}, dtype, device, seed + 8)) {}

void Step::forward(const Plan& plan, const Communicator& group,
                   const AttentionOptions& options) const {
  zigzag::forward(q.view, k.view, v.view, plan, group, options, out.view, lse.view);
}
void Step::backward(const Plan& plan, const Communicator& group,
                    const AttentionOptions& options) const {
  zigzag::backward(dout.view, q.view, k.view, v.view, out.view, lse.view, plan, group, options,
                   dq.view, dk.view, dv.view);
}

std::vector<std::vector<int64_t>> packs_for(int64_t world_size) {
  std::vector<std::vector<int64_t>> packs{
      {8192}, {256, 7392, 544}, {4096, 4096}, {3104, 3200, 1600, 160, 128}};
  for (std::vector<int64_t>& pack : packs) {
    for (int64_t& length : pack) length *= world_size;
  }
  return packs;
}

std::vector<int64_t> real_pack(int64_t tokens, std::uint64_t seed) {
  constexpr std::array<int64_t, 15> kBounds{0,    10,   50,    100,   200,   500,    1024,  2048,
                                            4096, 8192, 16384, 32768, 65536, 131072, 196608};
  constexpr std::array<double, 14> kCounts{30254,   391188,  699596, 1377757, 3794735,
                                           3316785, 2106566, 988525, 410002,  173574,
                                           115007,  18428,   22513,  18284};
  std::mt19937_64 engine(seed);
  std::vector<int64_t> lengths;
  while (tokens > 0) {
    const double total = std::accumulate(kCounts.begin(), kCounts.end(), 0.0);
    double at = static_cast<double>(engine() >> 11) * 0x1p-53 * total;
    std::size_t bin = 0;
    while (bin + 1 < kCounts.size() && at >= kCounts[bin]) at -= kCounts[bin++];
    const int64_t width = kBounds[bin + 1] - kBounds[bin];
    const int64_t length =
        kBounds[bin] + 1 + static_cast<int64_t>(engine() % static_cast<std::uint64_t>(width));
    lengths.push_back(std::min(length, tokens));
    tokens -= lengths.back();
  }
  return lengths;
}

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace zigzag::gpu_bench
