// Attention of single ranks on one GPU, without exchanges.
#include "gpu_bench_compute.h"

#include <algorithm>
#include <cstdio>

#include <cuda_runtime_api.h>

#include "cuda/check.h"
#include "cuda/runtime.h"
#include "gpu_bench.h"

namespace zigzag::gpu_bench {

using std::int64_t;

namespace {

/// A rank's attention over one pack, with keys of its own instead of gathered ones.
class RankAlone {
 public:
  RankAlone(const Plan& plan, const Heads& heads, int rank, Device device, const Step& step,
            void* stream)
      : backend_(make_cuda_backend(device, Kernels::kFused, stream)),
        stream_(stream),
        items_(plan.work_items(rank, Mask{})),
        step_(step) {
    const int64_t rows = plan.gathered_tokens(rank, Mask{});
    // The backend's own memory: rows behind the last one are finite there.
    const auto buffer = [&](DType dtype) {
      TensorView view = TensorView::contiguous(nullptr, dtype, {rows, heads.kv, heads.dim}, device);
      Buffer memory =
          backend_->allocate(view.num_elements() * item_size(dtype), backend_->compute_queue());
      view.data = memory.memory.get();
      return GpuTensor{std::move(memory), view};
    };
    // A rank alone gets the gradients themselves, others their parts of the sums.
    const DType sums = plan.world_size() == 1 ? DType::kBFloat16 : DType::kFloat32;
    k_ = buffer(DType::kBFloat16);
    v_ = buffer(DType::kBFloat16);
    dk_ = buffer(sums);
    dv_ = buffer(sums);
    const GpuTensor values =
        random_tensor({rows, heads.kv, heads.dim}, DType::kBFloat16, device, 5);
    for (const GpuTensor* tensor : {&k_, &v_}) {
      cuda::check(cudaMemcpyAsync(tensor->view.data, values.view.data,
                                  static_cast<std::size_t>(values.view.num_elements() * 2),
                                  cudaMemcpyDeviceToDevice, cuda::as_stream(stream)),
                  "cudaMemcpyAsync");
    }
    cuda::synchronize(device, stream);
    args_.q = step.q.view;
    args_.k = k_.view;
    args_.v = v_.view;
    args_.out = step.out.view;
    args_.lse = step.lse.view;
    args_.plan = &plan;
    args_.rank = rank;
    args_.items = items_;
    args_.scale = 0.08838834764831845;
    args_.dout = step.dout.view;
    args_.dq = step.dq.view;
    args_.dk = dk_.view;
    args_.dv = dv_.view;
  }

  double forward() {
    return median([this] { backend_->attend(args_); });
  }
  double backward() {
    return median([this] { backend_->attend_backward(args_); });
  }
  double backward_in_parts() {
    return median([this] {
      AttendBackwardArgs own = args_;
      own.k = step_.k.view;
      own.v = step_.v.view;
      backend_->attend_backward_early(own);
      (void)backend_->attend_backward_others(args_);
      backend_->attend_backward(args_);
    });
  }

 private:
  /// Seconds of a call; of calls that take long only a few are made.
  template <typename Call>
  double median(const Call& call) {
    const double once = time_calls(stream_, 1, 1, [&](int) { call(); }).median / 1e3;
    const int repeats = std::clamp(static_cast<int>(0.4 / once), 3, 10);
    return time_calls(stream_, std::min(repeats, 3), repeats, [&](int) { call(); }).median / 1e3;
  }

  std::unique_ptr<Backend> backend_;
  void* stream_;
  std::vector<WorkItem> items_;
  const Step& step_;
  GpuTensor k_, v_, dk_, dv_;
  AttendBackwardArgs args_;
};

}  // namespace

ComputeTimes compute_times(const std::vector<Plan>& plans, const Heads& heads, int rank,
                           Device device, const Step& step, void* stream) {
  ComputeTimes times;
  const auto packs = static_cast<double>(plans.size());
  for (const Plan& plan : plans) {
    RankAlone alone(plan, heads, rank, device, step, stream);
    times.forward += alone.forward() / packs;
    times.backward += alone.backward() / packs;
    times.in_parts += (plan.world_size() == 1 ? 0 : alone.backward_in_parts()) / packs;
  }
  return times;
}

void bench_compute(nlohmann::json& report, int world_size) {
  const Device device{DeviceType::kCuda, 0};
  const auto stream = cuda::make_stream(device);
  const Heads heads;
  std::vector<Plan> plans;
  for (const std::vector<int64_t>& lengths : packs_for(world_size)) {
    plans.push_back(Plan::from_lengths(lengths, world_size));
  }
  nlohmann::json ranks = nlohmann::json::array();
  ComputeTimes worst;
  for (int rank = 0; rank < world_size; ++rank) {
    const Step step(plans[0].local_tokens(rank), heads, DType::kBFloat16, device, 1);
    const ComputeTimes times = compute_times(plans, heads, rank, device, step, stream.get());
    worst.forward = std::max(worst.forward, times.forward);
    worst.backward = std::max(worst.backward, times.backward);
    worst.in_parts = std::max(worst.in_parts, times.in_parts);
    ranks.push_back(times.json());
  }
  report["compute"]["W" + std::to_string(world_size)] = {
      {"ranks", ranks},
      {"forward_per_s", 1 / worst.forward},
      {"both_per_s", 1 / (worst.forward + worst.backward)}};
  std::printf(
      "compute    W %d, a rank alone on the GPU: fwd %.3f ms bwd %.3f ms (in parts %.3f); "
      "without exchanges %.0f and %.1f steps a second\n",
      world_size, 1e3 * worst.forward, 1e3 * worst.backward, 1e3 * worst.in_parts,
      1 / worst.forward, 1 / (worst.forward + worst.backward));
}

void bench_real_compute(nlohmann::json& report, int world_size) {
  const Heads heads{64, 8, 128};
  const Device device{DeviceType::kCuda, 0};
  const auto stream = cuda::make_stream(device);
  for (const std::uint64_t seed : {1, 2}) {
    for (const int64_t tokens_a_gpu : {int64_t{32768}, int64_t{65536}}) {
      const std::vector<int64_t> pack = real_pack(tokens_a_gpu * world_size, seed);
      const auto times_of = [&](int ranks, int rank) {
        const std::vector<Plan> plans{Plan::from_lengths(pack, ranks)};
        const Step step(plans[0].local_tokens(rank), heads, DType::kBFloat16, device, 1);
        return compute_times(plans, heads, rank, device, step, stream.get());
      };
      const ComputeTimes one = times_of(1, 0);
      const double flops = Plan::from_lengths(pack, 1).flops(0, heads.q, heads.dim) / world_size;
      const std::string name = "W" + std::to_string(world_size) + " " +
                               std::to_string(tokens_a_gpu) + " tokens a GPU, pack " +
                               std::to_string(seed);
      nlohmann::json ranks = nlohmann::json::array();
      for (int rank = 0; rank < world_size; ++rank) {
        const ComputeTimes times = times_of(world_size, rank);
        ranks.push_back(times.json());
        const auto shown = [&](double seconds, double alone, double factor) {
          return std::pair{factor * flops / seconds / 1e12, 100 * alone / world_size / seconds};
        };
        const auto [forward, forward_share] = shown(times.forward, one.forward, 1);
        const auto [backward, backward_share] = shown(times.backward, one.backward, 2.5);
        const auto [in_parts, parts_share] = shown(times.in_parts, one.backward, 2.5);
        std::printf(
            "rank alone %-34s %4zu documents, rank %d  fwd %6.1f TFLOP/s (%.1f%% of one GPU / W)  "
            "bwd %6.1f (%.1f%%), in parts %6.1f (%.1f%%)\n",
            name.c_str(), pack.size(), rank, forward, forward_share, backward, backward_share,
            in_parts, parts_share);
        std::fflush(stdout);
      }
      report["real_compute"][name] = {{"documents", pack.size()},
                                      {"one_gpu_forward_ms", one.forward * 1e3},
                                      {"one_gpu_backward_ms", one.backward * 1e3},
                                      {"ranks", ranks}};
    }
  }
}

}  // namespace zigzag::gpu_bench
