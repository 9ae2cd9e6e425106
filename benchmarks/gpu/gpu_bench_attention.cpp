// Attention on one GPU, and over ranks with exchanges.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <mutex>
#include <thread>

#include <cuda_runtime_api.h>

#include "comm/transport.h"
#include "cuda/check.h"
#include "cuda/runtime.h"
#include "gpu_bench.h"

namespace zigzag::gpu_bench {
namespace {

using std::int64_t;

constexpr int64_t kHeads = 32;
constexpr int64_t kKvHeads = 8;
constexpr int64_t kHeadDim = 128;

/// A rank's tensors of one step.
struct Step {
  Step(int64_t rows, DType dtype, Device device, std::uint64_t seed)
      : q(random_tensor({rows, kHeads, kHeadDim}, dtype, device, seed)),
        k(random_tensor({rows, kKvHeads, kHeadDim}, dtype, device, seed + 1)),
        v(random_tensor({rows, kKvHeads, kHeadDim}, dtype, device, seed + 2)),
        dout(random_tensor({rows, kHeads, kHeadDim}, dtype, device, seed + 3)),
        out(random_tensor({rows, kHeads, kHeadDim}, dtype, device, seed + 4)),
        lse(random_tensor({rows, kHeads}, DType::kFloat32, device, seed + 5)),
        dq(random_tensor({rows, kHeads, kHeadDim}, dtype, device, seed + 6)),
        dk(random_tensor({rows, kKvHeads, kHeadDim}, dtype, device, seed + 7)),
        dv(random_tensor({rows, kKvHeads, kHeadDim}, dtype, device, seed + 8)) {}

  void forward(const Plan& plan, const Communicator& group, const AttentionOptions& options) const {
    zigzag::forward(q.view, k.view, v.view, plan, group, options, out.view, lse.view);
  }
  void backward(const Plan& plan, const Communicator& group,
                const AttentionOptions& options) const {
    zigzag::backward(dout.view, q.view, k.view, v.view, out.view, lse.view, plan, group, options,
                     dq.view, dk.view, dv.view);
  }

  GpuTensor q, k, v, dout, out, lse, dq, dk, dv;
};

double tflops(double flops, double ms) { return flops / ms / 1e9; }

/// The packs that gpu.md's table is made of, for `world_size` ranks.
std::vector<std::vector<int64_t>> packs_for(int64_t world_size) {
  std::vector<std::vector<int64_t>> packs{
      {8192}, {256, 7392, 544}, {4096, 4096}, {3104, 3200, 1600, 160, 128}};
  for (std::vector<int64_t>& pack : packs) {
    for (int64_t& length : pack) length *= world_size;
  }
  return packs;
}

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// What every rank measures.
struct RankTimes {
  double forward = 0;          // seconds an iteration, by the clock
  double both = 0;             // forward and backward
  double attend = 0;           // attention of a forward alone, mean over the packs
  double attend_backward = 0;  // likewise
  double enqueue_forward = 0;  // seconds of the host an iteration
  double enqueue_both = 0;
};

/// Attention of the schedule's one stage without any exchange, by CUDA events, mean over packs.
void time_compute_only(const std::vector<Plan>& plans, int rank, Device device, const Step& step,
                       void* stream, RankTimes& times) {
  for (const Plan& plan : plans) {
    const Mask mask;
    const int64_t rows = plan.gathered_tokens(rank, mask);
    const auto backend = make_cuda_backend(device, Kernels::kFused, stream);
    // The backend's own memory: rows behind the last one are finite there.
    const auto buffer = [&](DType dtype) {
      TensorView view = TensorView::contiguous(nullptr, dtype, {rows, kKvHeads, kHeadDim}, device);
      Buffer memory = backend->allocate(view.num_elements() * item_size(dtype));
      view.data = memory.memory.get();
      return GpuTensor{std::move(memory), view};
    };
    const GpuTensor k = buffer(DType::kBFloat16);
    const GpuTensor v = buffer(DType::kBFloat16);
    const GpuTensor dk = buffer(DType::kFloat32);
    const GpuTensor dv = buffer(DType::kFloat32);
    const GpuTensor k_values =
        random_tensor({rows, kKvHeads, kHeadDim}, DType::kBFloat16, device, 5);
    for (const GpuTensor* tensor : {&k, &v}) {
      cuda::check(cudaMemcpyAsync(tensor->view.data, k_values.view.data,
                                  static_cast<std::size_t>(k_values.view.num_elements() * 2),
                                  cudaMemcpyDeviceToDevice, cuda::as_stream(stream)),
                  "cudaMemcpyAsync");
    }
    const std::vector<WorkItem> items = plan.work_items(rank, mask);
    AttendBackwardArgs args;
    args.q = step.q.view;
    args.k = k.view;
    args.v = v.view;
    args.out = step.out.view;
    args.lse = step.lse.view;
    args.plan = &plan;
    args.rank = rank;
    args.items = items;
    args.scale = 0.08838834764831845;
    args.dout = step.dout.view;
    args.dq = step.dq.view;
    args.dk = dk.view;
    args.dv = dv.view;
    times.attend += time_calls(stream, 3, 10, [&](int) { backend->attend(args); }).median / 1e3;
    times.attend_backward +=
        time_calls(stream, 3, 10, [&](int) { backend->attend_backward(args); }).median / 1e3;
  }
  times.attend /= static_cast<double>(plans.size());
  times.attend_backward /= static_cast<double>(plans.size());
}

RankTimes time_rank(const std::vector<Plan>& plans, const Communicator& threads,
                    const std::string& comm, int rank, int iterations, int64_t stage) {
  const Device device{DeviceType::kCuda, rank % cuda::device_count()};
  cuda::use_device(device);
  const Communicator group = threads.size() == 1 ? Communicator::self()
                             : comm == "nccl"    ? Communicator::nccl(threads, device.index)
                                                 : Communicator::peer(threads, device.index);
  const auto stream = cuda::make_stream(device);
  AttentionOptions options;
  options.stream = stream.get();
  options.kv_heads_per_stage = stage;
  const Step step(plans[0].local_tokens(rank), DType::kBFloat16, device,
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
    for (int round = 0; round < 5; ++round) {
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
  time_compute_only(plans, rank, device, step, stream.get(), times);
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
    const Step step(plan.total_tokens(), dtype, device, 1);
    const Communicator group = Communicator::self();
    const bool slow = dtype == DType::kFloat32;
    const Timing forward = time_calls(stream.get(), 3, slow ? 5 : 30,
                                      [&](int) { step.forward(plan, group, options); });
    const Timing backward = time_calls(stream.get(), 3, slow ? 5 : 30,
                                       [&](int) { step.backward(plan, group, options); });
    const double flops = plan.flops(0, kHeads, kHeadDim);
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

void bench_ranks(nlohmann::json& report, const std::string& comm, int world_size, int iterations) {
  std::vector<Plan> plans;
  for (const std::vector<int64_t>& pack : packs_for(world_size)) {
    plans.push_back(Plan::from_lengths(pack, world_size));
  }
  for (const int64_t stage : {int64_t{0}, kKvHeads, kKvHeads / 2, kKvHeads / 4}) {
    const auto groups = Communicator::threads(world_size);
    std::vector<RankTimes> times(static_cast<std::size_t>(world_size));
    std::vector<std::exception_ptr> failures(static_cast<std::size_t>(world_size));
    std::vector<std::thread> threads;
    for (int r = 0; r < world_size; ++r) {
      threads.emplace_back([&, r] {
        const auto at = static_cast<std::size_t>(r);
        try {
          times[at] = time_rank(plans, groups[at], comm, r, iterations, stage);
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
