// Copies and layout operations.
#include <cstdio>
#include <utility>

#include <cuda_runtime_api.h>

#include "cuda/check.h"
#include "cuda/runtime.h"
#include "gpu_bench.h"

namespace zigzag::gpu_bench {
namespace {

using std::int64_t;

const Device kGpu{DeviceType::kCuda, 0};
constexpr int kSets = 4;  // buffers in turn, so that repeats do not read the cache

/// TB/s of copies of `bytes` bytes from and to the memory that `ends(set)` gives.
double device_copy_rate(int64_t bytes, void* stream,
                        const std::function<std::pair<void*, void*>(std::size_t)>& ends) {
  const Timing timing = time_calls(stream, 10, 100, [&](int i) {
    const auto [from, to] = ends(static_cast<std::size_t>(i % kSets));
    cuda::check(cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), cudaMemcpyDeviceToDevice,
                                cuda::as_stream(stream)),
                "cudaMemcpyAsync");
  });
  return 2.0 * static_cast<double>(bytes) / timing.median / 1e9;
}

double device_copy_rate(int64_t bytes, void* stream) {
  std::vector<Buffer> from;
  std::vector<Buffer> to;
  for (int i = 0; i < kSets; ++i) {
    from.push_back(cuda::allocate(kGpu, bytes));
    to.push_back(cuda::allocate(kGpu, bytes));
  }
  return device_copy_rate(bytes, stream, [&](std::size_t set) {
    return std::pair(from[set].memory.get(), to[set].memory.get());
  });
}

struct Case {
  const char* name;
  std::vector<int64_t> lengths;
  int64_t heads;
  int64_t head_dim;
};

}  // namespace

void bench_copy(nlohmann::json& report) {
  const auto stream = cuda::make_stream(kGpu);
  for (const int64_t megabytes : {64, 256, 1024}) {
    const double rate = device_copy_rate(megabytes << 20, stream.get());
    report["copy"][std::to_string(megabytes) + " MiB"] = {{"tb_per_s", rate}};
    std::printf("copy       %5lld MiB device to device      %6.2f TB/s\n",
                static_cast<long long>(megabytes), rate);
  }
}

void bench_layout(nlohmann::json& report) {
  const auto stream = cuda::make_stream(kGpu);
  OperationOptions options;
  options.stream = stream.get();
  std::vector<int64_t> short_documents;
  for (int64_t i = 0, total = 0; total < 32768; ++i) {
    short_documents.push_back(16 + i * 37 % 200);
    total += short_documents.back();
  }
  const Case cases[] = {{"[8192]", {8192}, 32, 128},
                        {"[32768]", {32768}, 32, 128},
                        {"[512,1024,768]", {512, 1024, 768}, 4, 64},
                        {"[12416,12800,6400,640,512]", {12416, 12800, 6400, 640, 512}, 32, 128},
                        {"short documents", short_documents, 32, 128},
                        {"[32]", {32}, 2, 64}};
  constexpr int64_t kRanks = 4;
  for (const Case& entry : cases) {
    const Plan plan = Plan::from_lengths(entry.lengths, kRanks);
    const int64_t tokens = plan.total_tokens();
    const std::vector<int64_t> shape{tokens, entry.heads, entry.head_dim};
    std::vector<GpuTensor> whole;
    std::vector<GpuTensor> other;
    std::vector<std::vector<GpuTensor>> parts;
    for (int i = 0; i < kSets; ++i) {
      const auto seed = static_cast<std::uint64_t>(i);
      whole.push_back(random_tensor(shape, DType::kBFloat16, kGpu, seed));
      other.push_back(random_tensor(shape, DType::kBFloat16, kGpu, seed + 100));
      parts.emplace_back();
      for (int64_t r = 0; r < kRanks; ++r) {
        parts.back().push_back(random_tensor({plan.local_tokens(r), entry.heads, entry.head_dim},
                                             DType::kBFloat16, kGpu, seed + 200));
      }
    }
    const std::vector<int64_t> all_chunks(entry.lengths.size(), 2 * kRanks);
    const double whole_bytes =
        2.0 * static_cast<double>(tokens * entry.heads * entry.head_dim) * 2.0;
    // `to`: what an operation writes; a copy into it comes from as many bytes of `whole`.
    const auto measure = [&](const char* name, double bytes,
                             const std::function<const TensorView&(std::size_t)>& to,
                             const std::function<void(std::size_t)>& call) {
      const Timing timing = time_calls(stream.get(), 10, 100,
                                       [&](int i) { call(static_cast<std::size_t>(i % kSets)); });
      const double rate = bytes / timing.median / 1e9;
      // Copies that move as many bytes: between tensors of their own, and where this one moves
      // them.
      const int64_t copied = static_cast<int64_t>(bytes / 2);
      const double copy_rate = device_copy_rate(copied, stream.get());
      const double same_rate = device_copy_rate(copied, stream.get(), [&](std::size_t set) {
        return std::pair(whole[set].view.data, to(set).data);
      });
      nlohmann::json line = timing.json();
      line["tb_per_s"] = rate;
      line["copy_tb_per_s"] = copy_rate;
      line["of_copy"] = rate / copy_rate;
      line["same_copy_tb_per_s"] = same_rate;
      line["of_same_copy"] = rate / same_rate;
      report["layout"][entry.name][name] = line;
      std::printf("layout     %-28s %-8s %8.4f ms %6.2f TB/s %5.1f%% of a copy, %5.1f%% there\n",
                  entry.name, name, timing.median, rate, 100 * rate / copy_rate,
                  100 * rate / same_rate);
    };
    const auto all = [&](std::size_t i) -> const TensorView& { return other[i].view; };
    const auto mine = [&](std::size_t i) -> const TensorView& { return parts[i][1].view; };
    measure("extract", whole_bytes, all, [&](std::size_t i) {
      extract(whole[i].view, plan, all_chunks, other[i].view, options);
    });
    measure("unshard", whole_bytes, all, [&](std::size_t i) {
      std::vector<TensorView> views;
      for (const GpuTensor& part : parts[i]) views.push_back(part.view);
      unshard(views, plan, other[i].view, options);
    });
    measure("scatter", whole_bytes / kRanks, mine,
            [&](std::size_t i) { scatter(whole[i].view, plan, 1, parts[i][1].view, options); });
    const Timing empty =
        time_calls(stream.get(), 10, 100, [&](int) { empty_launch(stream.get()); });
    report["layout"][entry.name]["empty launch"] = empty.json();
    std::printf("layout     %-28s empty launch %.4f ms\n", entry.name, empty.median);
  }
}

}  // namespace zigzag::gpu_bench
