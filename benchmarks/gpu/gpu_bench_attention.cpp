// Attention on one GPU, and over ranks with exchanges.
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <exception>
#include <numeric>
#include <random>
#include <thread>

#include "comm/transport.h"
#include "cuda/runtime.h"
#include "gpu_bench.h"
#include "gpu_bench_compute.h"
#include "gpu_bench_steps.h"

namespace zigzag::gpu_bench {
namespace {

using std::int64_t;

double tflops(double flops, double ms) { return flops / ms / 1e9; }

/// What every rank measures.
struct RankTimes {
  double forward = 0;          // seconds an iteration, by the clock
  double both = 0;             // forward and backward
  double attend = 0;           // attention of a forward alone, mean over the packs
  double attend_backward = 0;  // likewise
  double enqueue_forward = 0;  // seconds of the host an iteration
  double enqueue_both = 0;
};

RankTimes time_rank(const std::vector<Plan>& plans, const Heads& heads, const Communicator& threads,
                    const std::string& comm, int rank, int iterations, int64_t stage, bool parts) {
  const Device device{DeviceType::kCuda, rank % cuda::device_count()};
  cuda::use_device(device);
  const Communicator group = threads.size() == 1 ? Communicator::self()
                             : comm == "nccl"    ? Communicator::nccl(threads, device.index)
                                                 : Communicator::peer(threads, device.index);
  const auto stream = cuda::make_stream(device);
  AttentionOptions options;
  options.stream = stream.get();
  options.kv_heads_per_stage = stage;
  const Step step(plans[0].local_tokens(rank), heads, DType::kBFloat16, device,
                  static_cast<std::uint64_t>(rank) * 16 + 1);
  RankTimes times;
  const auto clocked = [&](bool backward, double& per_iteration, double& enqueue) {
    const auto once = [&](int i) {
      const Plan& plan = plans[static_cast<std::size_t>(i) % plans.size()];
      step.forward(plan, group, options);
      if (backward) step.backward(plan, group, options);
    };
    for (int i = 0; i < 2 * static_cast<int>(plans.size()); ++i) once(i);
    std::vector<double> rounds;
    for (int round = 0; round < (parts ? 5 : 3); ++round) {
      cuda::synchronize(device, stream.get());
      group.barrier();
      const double start = seconds_now();
      for (int i = 0; i < iterations; ++i) once(i);
      const double enqueued = seconds_now();
      cuda::synchronize(device, stream.get());
      rounds.push_back((seconds_now() - start) / iterations);
      enqueue = (enqueued - start) / iterations;
    }
    std::sort(rounds.begin(), rounds.end());
    per_iteration = rounds[rounds.size() / 2];
  };
  clocked(false, times.forward, times.enqueue_forward);
  clocked(true, times.both, times.enqueue_both);
  group.barrier();
  if (parts) {
    const ComputeTimes alone = compute_times(plans, heads, rank, device, step, stream.get());
    times.attend = alone.forward;
    times.attend_backward = alone.backward;
  }
  cuda::synchronize(device, stream.get());
  group.barrier();
  return times;
}

}  // namespace

void bench_attention(nlohmann::json& report, DType dtype) {
  const Device device{DeviceType::kCuda, 0};
  const auto stream = cuda::make_stream(device);
  AttentionOptions options;
  options.stream = stream.get();
  std::vector<std::vector<int64_t>> packs = packs_for(1);
  if (dtype != DType::kFloat32) packs.push_back({32768});
  for (const std::vector<int64_t>& lengths : packs) {
    const Plan plan = Plan::from_lengths(lengths, 1);
    const Heads heads;
    const Step step(plan.total_tokens(), heads, dtype, device, 1);
    const Communicator group = Communicator::self();
    const bool slow = dtype == DType::kFloat32;
    const Timing forward = time_calls(stream.get(), 3, slow ? 5 : 30,
                                      [&](int) { step.forward(plan, group, options); });
    const Timing backward = time_calls(stream.get(), 3, slow ? 5 : 30,
                                       [&](int) { step.backward(plan, group, options); });
    const double flops = plan.flops(0, heads.q, heads.dim);
    nlohmann::json line;
    line["forward"] = forward.json();
    line["forward"]["tflops"] = tflops(flops, forward.median);
    line["backward"] = backward.json();
    line["backward"]["tflops"] = tflops(2.5 * flops, backward.median);
    report["attention"][std::string(dtype_name(dtype))][shape_text(lengths)] = line;
    std::printf("attention  %-9s %-30s fwd %8.3f ms %6.1f TFLOP/s  bwd %8.3f ms %6.1f TFLOP/s\n",
                std::string(dtype_name(dtype)).c_str(), shape_text(lengths).c_str(), forward.median,
                tflops(flops, forward.median), backward.median,
                tflops(2.5 * flops, backward.median));
  }
}

namespace {

/// Every rank's thread; the slowest rank's times.
RankTimes time_ranks(const std::vector<Plan>& plans, const Heads& heads, const std::string& comm,
                     int world_size, int iterations, int64_t stage, bool parts) {
  const auto groups = Communicator::threads(world_size);
  std::vector<RankTimes> times(static_cast<std::size_t>(world_size));
  std::vector<std::exception_ptr> failures(static_cast<std::size_t>(world_size));
  std::vector<std::thread> threads;
  for (int r = 0; r < world_size; ++r) {
    threads.emplace_back([&, r] {
      const auto at = static_cast<std::size_t>(r);
      try {
        times[at] = time_rank(plans, heads, groups[at], comm, r, iterations, stage, parts);
      } catch (const std::exception& error) {
        groups[at].abort(error.what());
        failures[at] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& failure : failures) {
    if (failure) std::rethrow_exception(failure);
  }
  RankTimes worst;
  for (const RankTimes& one : times) {
    worst.forward = std::max(worst.forward, one.forward);
    worst.both = std::max(worst.both, one.both);
    worst.attend = std::max(worst.attend, one.attend);
    worst.attend_backward = std::max(worst.attend_backward, one.attend_backward);
    worst.enqueue_forward = std::max(worst.enqueue_forward, one.enqueue_forward);
    worst.enqueue_both = std::max(worst.enqueue_both, one.enqueue_both);
  }
  return worst;
}

}  // namespace

void bench_real(nlohmann::json& report, int world_size, int64_t stage) {
  const Heads heads{64, 8, 128};
  for (const std::uint64_t seed : {1, 2}) {
    for (const int64_t tokens_a_gpu : {int64_t{32768}, int64_t{65536}}) {
      const std::vector<int64_t> pack = real_pack(tokens_a_gpu * world_size, seed);
      const std::vector<Plan> alone{Plan::from_lengths(pack, 1)};
      const std::vector<Plan> shared{Plan::from_lengths(pack, world_size)};
      const RankTimes one = time_ranks(alone, heads, "peer", 1, 3, 0, false);
      const RankTimes all = time_ranks(shared, heads, "peer", world_size, 5, stage, false);
      const double flops = alone[0].flops(0, heads.q, heads.dim);
      const double backward = all.both - all.forward;
      const double forward_share = one.forward / world_size / all.forward;
      const double backward_share = (one.both - one.forward) / world_size / backward;
      const std::string name = "W" + std::to_string(world_size) + " " +
                               std::to_string(tokens_a_gpu) + " tokens a GPU, pack " +
                               std::to_string(seed);
      report["real"][name] = {{"documents", pack.size()},
                              {"longest", *std::max_element(pack.begin(), pack.end())},
                              {"forward_ms", all.forward * 1e3},
                              {"backward_ms", backward * 1e3},
                              {"one_gpu_forward_ms", one.forward * 1e3},
                              {"one_gpu_backward_ms", (one.both - one.forward) * 1e3},
                              {"forward_tflops_a_gpu", flops / world_size / all.forward / 1e12},
                              {"backward_tflops_a_gpu", 2.5 * flops / world_size / backward / 1e12},
                              {"forward_of_one_gpu", forward_share},
                              {"backward_of_one_gpu", backward_share}};
      std::printf(
          "real       %-34s %4zu documents  fwd %6.1f TFLOP/s a GPU (%.1f%% of one GPU / W)  bwd "
          "%6.1f (%.1f%%)\n",
          name.c_str(), pack.size(), flops / world_size / all.forward / 1e12, 100 * forward_share,
          2.5 * flops / world_size / backward / 1e12, 100 * backward_share);
      std::fflush(stdout);
    }
  }
}

void bench_ranks(nlohmann::json& report, const std::string& comm, int world_size, int iterations) {
  std::vector<Plan> plans;
  for (const std::vector<int64_t>& pack : packs_for(world_size)) {
    plans.push_back(Plan::from_lengths(pack, world_size));
  }
  for (const int64_t stage : {0, 8, 4, 2}) {
    const RankTimes worst = time_ranks(plans, Heads{}, comm, world_size, iterations, stage, true);
    const std::string name = comm + " W" + std::to_string(world_size) + " stage " +
                             (stage == 0 ? "auto" : std::to_string(stage));
    report["ranks"][name] = {{"forward_per_s", 1 / worst.forward},
                             {"forward_backward_per_s", 1 / worst.both},
                             {"forward_ms", worst.forward * 1e3},
                             {"forward_backward_ms", worst.both * 1e3},
                             {"attention_forward_ms", worst.attend * 1e3},
                             {"attention_backward_ms", worst.attend_backward * 1e3},
                             {"host_forward_ms", worst.enqueue_forward * 1e3},
                             {"host_forward_backward_ms", worst.enqueue_both * 1e3}};
    std::printf(
        "ranks      %-20s fwd %6.1f it/s (%.3f ms, attention %.3f, host %.3f)  fwd+bwd %6.1f it/s "
        "(%.3f ms, attention %.3f, host %.3f)\n",
        name.c_str(), 1 / worst.forward, worst.forward * 1e3, worst.attend * 1e3,
        worst.enqueue_forward * 1e3, 1 / worst.both, worst.both * 1e3,
        (worst.attend + worst.attend_backward) * 1e3, worst.enqueue_both * 1e3);
    std::fflush(stdout);
  }
}

}  // namespace zigzag::gpu_bench
