#include "cpu/peak.h"

#undef HWY_DISABLED_TARGETS
#define HWY_DISABLED_TARGETS \
  (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/peak.cpp"
#include <cstdint>

#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace zigzag::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Floating-point operations done, as the loop counts them. The sums are returned through `sink`, so
// that none is optimised away.
HWY_ATTR double multiply_adds(std::int64_t steps, float* sink) {
  const hn::ScalableTag<float> d;
  // Twelve chains hide a latency of 4 to 6 cycles on two units, and fit 16 registers.
  constexpr int kChains = 12;
  hn::Vec<decltype(d)> sum[kChains];
  for (int i = 0; i < kChains; ++i) sum[i] = hn::Set(d, static_cast<float>(i) + *sink);
  const auto factor = hn::Set(d, 0.5f + *sink);
  for (std::int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sum[i] = hn::MulAdd(sum[i], factor, factor);
  }
  auto total = sum[0];
  for (int i = 1; i < kChains; ++i) total = hn::Add(total, sum[i]);
  *sink = hn::GetLane(hn::SumOfLanes(d, total));
  return 2.0 * kChains * static_cast<double>(hn::Lanes(d)) * static_cast<double>(steps);
}

}  // namespace zigzag::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <algorithm>
#include <chrono>
#include <ctime>
#include <thread>
#include <vector>

#include "cpu/target.h"

namespace zigzag::cpu {
namespace {

HWY_EXPORT(multiply_adds);

double thread_seconds() {
  timespec t{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

double wall_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

Peak fma_peak(int threads, double seconds) {
  hwy::ChosenTarget chosen;
  const Target target = selected_target();
  const std::int64_t wide = target == Target::kAvx2 ? HWY_AVX2 : HWY_AVX3;
#if HWY_ARCH_X86
  chosen.Update(target == Target::kBaseline ? 0 : wide);
#else
  chosen.Update(target == Target::kBaseline ? hwy::SupportedTargets() : wide);
#endif
  const auto work = HWY_DISPATCH_TABLE(multiply_adds)[chosen.GetIndex()];
  std::vector<Peak> peaks(static_cast<std::size_t>(std::max(1, threads)));
  std::vector<std::thread> pool;
  pool.reserve(peaks.size());
  for (Peak& peak : peaks) {
    pool.emplace_back([&peak, work, seconds] {
      float sink = 0;
      // The best of pieces of about 10 ms: a shared machine takes a core away now and then.
      const double end = wall_seconds() + seconds;
      while (wall_seconds() < end) {
        const double wall = wall_seconds();
        const double cpu = thread_seconds();
        sink = 0;
        const double operations = work(5'000'000, &sink);
        peak.cpu = std::max(peak.cpu, operations * 1e-9 / (thread_seconds() - cpu));
        peak.wall = std::max(peak.wall, operations * 1e-9 / (wall_seconds() - wall));
      }
    });
  }
  for (std::thread& thread : pool) thread.join();
  Peak total;
  for (const Peak& peak : peaks) {
    total.cpu += peak.cpu;
    total.wall += peak.wall;
  }
  return total;
}

double fma_peak_gflops(int threads) { return fma_peak(threads, 0.1).wall; }

}  // namespace zigzag::cpu
#endif  // HWY_ONCE
