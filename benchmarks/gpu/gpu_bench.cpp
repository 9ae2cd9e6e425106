// Benchmarks on GPUs: gpu_bench [--json FILE] SECTION..., with sections copy, layout, attention,
// float32, compute[:W], real_compute[:W], peer[:W], nccl[:W], real[:W[,STAGE]],
// profile[:W[,STAGE]]. Prints a short table and writes every number to the file.
#include "gpu_bench.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <fstream>
#include <random>

#include <cuda_runtime_api.h>

#include "cuda/check.h"
#include "cuda/runtime.h"
#include "half.h"

namespace zigzag::gpu_bench {

Timing time_calls(void* stream, int warmup, int repeats, const std::function<void(int)>& call) {
  const cudaStream_t queue = cuda::as_stream(stream);
  std::vector<cudaEvent_t> events(static_cast<std::size_t>(repeats) + 1);
  for (cudaEvent_t& event : events) cuda::check(cudaEventCreate(&event), "cudaEventCreate");
  for (int i = 0; i < warmup; ++i) call(i);
  cuda::check(cudaEventRecord(events[0], queue), "cudaEventRecord");
  for (int i = 0; i < repeats; ++i) {
    call(i);
    cuda::check(cudaEventRecord(events[static_cast<std::size_t>(i) + 1], queue), "cudaEventRecord");
  }
  cuda::check(cudaStreamSynchronize(queue), "cudaStreamSynchronize");
  std::vector<double> times;
  for (int i = 0; i < repeats; ++i) {
    float ms = 0;
    cuda::check(cudaEventElapsedTime(&ms, events[static_cast<std::size_t>(i)],
                                     events[static_cast<std::size_t>(i) + 1]),
                "cudaEventElapsedTime");
    times.push_back(static_cast<double>(ms));
  }
  for (cudaEvent_t event : events) cuda::check(cudaEventDestroy(event), "cudaEventDestroy");
  std::sort(times.begin(), times.end());
  return {times[times.size() / 2], times.front(), times.back()};
}

GpuTensor random_tensor(std::vector<std::int64_t> shape, DType dtype, Device device,
                        std::uint64_t seed) {
  GpuTensor tensor;
  tensor.view = TensorView::contiguous(nullptr, dtype, std::move(shape), device);
  const std::int64_t count = tensor.view.num_elements();
  const std::int64_t size = item_size(dtype);
  tensor.buffer = cuda::allocate(device, count * size);
  tensor.view.data = tensor.buffer.memory.get();
  // One block of values, copied over the whole tensor: values matter, not their length.
  const std::int64_t block = std::min<std::int64_t>(count, (1 << 20) + 77);
  std::vector<std::byte> bytes(static_cast<std::size_t>(block * size));
  std::mt19937_64 engine(seed);
  for (std::int64_t i = 0; i < block; ++i) {
    const std::uint64_t bits = engine();
    float x = -131070.0f;
    for (int part = 0; part < 4; ++part) x += static_cast<float>((bits >> (16 * part)) & 0xffffu);
    x *= 1.7f / 65535.0f;
    if (dtype == DType::kFloat32) {
      std::memcpy(bytes.data() + i * 4, &x, 4);
    } else {
      const std::uint16_t half = dtype == DType::kFloat16 ? to_float16(x) : to_bfloat16(x);
      std::memcpy(bytes.data() + i * 2, &half, 2);
    }
  }
  for (std::int64_t at = 0; at < count; at += block) {
    cuda::copy(tensor.view.as<char>() + at * size, bytes.data(),
               std::min(block, count - at) * size);
  }
  return tensor;
}

namespace {

int run(int argc, char** argv) {
  nlohmann::json report;
  std::string file;
  std::vector<std::string> sections;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--json" && i + 1 < argc) {
      file = argv[++i];
    } else {
      sections.push_back(word);
    }
  }
  if (cuda::device_count() == 0) {
    std::fprintf(stderr, "gpu_bench: no GPU can be used here\n");
    return 3;
  }
  for (const Component& component : cuda::components()) {
    report["machine"][component.name] = component.detail;
  }
  int failures = 0;
  for (const std::string& section : sections) {
    const std::size_t colon = section.find(':');
    const std::string name = section.substr(0, colon);
    const int world_size =
        colon == std::string::npos ? cuda::device_count() : std::stoi(section.substr(colon + 1));
    const std::size_t comma = section.find(',');
    const std::int64_t stage =
        comma == std::string::npos ? 0 : std::stoll(section.substr(comma + 1));
    try {
      if (name == "copy") {
        bench_copy(report);
      } else if (name == "layout") {
        bench_layout(report);
      } else if (name == "attention") {
        bench_attention(report, DType::kBFloat16);
      } else if (name == "float32") {
        bench_attention(report, DType::kFloat32);
      } else if (name == "compute") {
        bench_compute(report, world_size);
      } else if (name == "real_compute") {
        bench_real_compute(report, world_size);
      } else if (name == "real") {
        bench_real(report, world_size, stage);
      } else if (name == "profile") {
        bench_profile("peer", world_size, stage);
      } else if (name == "peer" || name == "nccl") {
        bench_ranks(report, name, world_size, 40);
      } else {
        std::fprintf(stderr, "gpu_bench: no section '%s'\n", section.c_str());
        return 2;
      }
    } catch (const std::exception& error) {
      std::printf("%-10s FAILED: %s\n", section.c_str(), error.what());
      report["failures"][section] = error.what();
      ++failures;
    }
    std::fflush(stdout);
    if (!file.empty()) std::ofstream(file) << report.dump(1) << '\n';
  }
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace zigzag::gpu_bench

int main(int argc, char** argv) {
  try {
    return zigzag::gpu_bench::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "gpu_bench: %s\n", error.what());
    return 3;
  }
}
