// The CPU attention kernels alone: rate, and its ratio to the multiply-add peak that the same
// threads reached just before. ZIGZAG_NUM_THREADS and ZIGZAG_CPU_TARGET choose threads and kernels.
#include <benchmark/benchmark.h>

#include "cpu/peak.h"
#include "kernel_cases.h"
#include "zigzag/system.h"

namespace zigzag::benchmarks {
namespace {

constexpr std::int64_t kFloat32 = static_cast<std::int64_t>(DType::kFloat32);
constexpr std::int64_t kFloat16 = static_cast<std::int64_t>(DType::kFloat16);
constexpr std::int64_t kBFloat16 = static_cast<std::int64_t>(DType::kBFloat16);

KernelCase make_case(const benchmark::State& state) {
  return KernelCase(state.range(0), state.range(1), state.range(2), state.range(3), state.range(4),
                    static_cast<DType>(state.range(5)));
}

void report(benchmark::State& state, double flops, double peak) {
  state.SetLabel(std::string(dtype_name(static_cast<DType>(state.range(5)))));
  using benchmark::Counter;
  constexpr auto kRate = Counter::kIsIterationInvariantRate;
  state.counters["GFLOP/s"] = Counter(flops * 1e-9, kRate);
  state.counters["of_peak"] = Counter(flops * 1e-9 / peak, kRate);
}

void attention_forward(benchmark::State& state) {
  KernelCase problem = make_case(state);
  problem.forward();
  const double peak = cpu::fma_peak_gflops(num_threads());
  for (auto _ : state) problem.forward();
  report(state, problem.flops(), peak);
}

void attention_backward(benchmark::State& state) {
  KernelCase problem = make_case(state);
  problem.forward();
  problem.backward();
  const double peak = cpu::fma_peak_gflops(num_threads());
  for (auto _ : state) problem.backward();
  report(state, 2.5 * problem.flops(), peak);
}

void shapes(benchmark::internal::Benchmark* bench) {
  bench->ArgNames({"documents", "length", "heads", "kv_heads", "head_dim", "dtype"});
  for (const std::int64_t dtype : {kFloat32, kBFloat16, kFloat16}) {
    bench->Args({1, 2048, 8, 8, 64, dtype});
    bench->Args({1, 4096, 8, 8, 128, dtype});
    bench->Args({1, 4096, 8, 2, 128, dtype});
    bench->Args({512, 64, 8, 8, 64, dtype});
  }
  bench->UseRealTime()->MinWarmUpTime(0)->Unit(benchmark::kMillisecond);
}

BENCHMARK(attention_forward)->Apply(shapes);
BENCHMARK(attention_backward)->Apply(shapes);

}  // namespace
}  // namespace zigzag::benchmarks
