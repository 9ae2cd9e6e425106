#include "cuda/runtime.h"

#include <memory>

#include "cuda/check.h"
#include "cuda/cudnn_engine.h"
#include "cuda/device.h"
#include "cuda/hopper/engine.h"
#include "cuda/library.h"
#include "zigzag/error.h"

namespace zigzag::cuda {
namespace {

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

Component driver_component() {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    (void)cudaGetLastError();
    return {"CUDA", false, "no CUDA driver is loaded"};
  }
  int runtime = 0;
  (void)cudaRuntimeGetVersion(&runtime);
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    (void)cudaGetLastError();
    return {"CUDA", false,
            "the driver speaks CUDA " + version_text(driver) + ", the library was built with " +
                version_text(runtime) + ": " + cudaGetErrorString(status)};
  }
  return {"CUDA", count > 0,
          std::to_string(count) + (count == 1 ? " GPU" : " GPUs") + ", driver for CUDA " +
              version_text(driver) + ", built with " + version_text(runtime)};
}

Component device_component(int index) {
  cudaDeviceProp properties{};
  if (cudaGetDeviceProperties(&properties, index) != cudaSuccess) {
    (void)cudaGetLastError();
    return {"cuda:" + std::to_string(index), false, "its properties cannot be read"};
  }
  return {"cuda:" + std::to_string(index), true,
          std::string(properties.name) + ", sm_" + std::to_string(properties.major) +
              std::to_string(properties.minor) + ", " +
              std::to_string(properties.totalGlobalMem >> 30) + " GiB, " +
              std::to_string(properties.multiProcessorCount) + " multiprocessors"};
}

Component peer_component(int count) {
  std::string missing;
  for (int a = 0; a < count; ++a) {
    for (int b = 0; b < count; ++b) {
      const int pair[] = {a, b};
      if (a < b && !peers_reach(pair)) {
        missing += (missing.empty() ? "" : ", ") + std::to_string(a) + "-" + std::to_string(b);
      }
    }
  }
  if (count < 2) return {"peer memory", count == 1, "one GPU: ranks may share it"};
  return {"peer memory", missing.empty(),
          missing.empty() ? "all GPUs reach each other" : "GPUs out of reach: " + missing};
}

}  // namespace

int device_count() noexcept {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    (void)cudaGetLastError();
    return 0;
  }
  return count;
}

std::vector<Component> components() {
  std::vector<Component> all{driver_component()};
  const int count = device_count();
  for (int index = 0; index < count; ++index) all.push_back(device_component(index));
  if (count > 0) {
    try {
      const std::string missing = hopper::unavailable(0);
      all.push_back({"tensor-core kernels", missing.empty(),
                     missing.empty() ? "the library's own, float16 and bfloat16" : missing});
    } catch (const std::exception& error) {
      all.push_back({"tensor-core kernels", false, error.what()});
    }
    const CudnnEngine::Presence& cudnn = CudnnEngine::presence();
    all.push_back({"cuDNN", cudnn.available, cudnn.detail});
    all.push_back(peer_component(count));
  }
  const OpenedLibrary nccl = open_library("ZIGZAG_NCCL_PATH", "libnccl.so.2", "nvidia/nccl/lib");
  all.push_back({"NCCL", nccl.handle != nullptr, nccl.detail});
  return all;
}

bool peers_reach(std::span<const int> devices) noexcept {
  for (const int a : devices) {
    for (const int b : devices) {
      int reach = 0;
      if (a != b && (cudaDeviceCanAccessPeer(&reach, a, b) != cudaSuccess || reach == 0)) {
        (void)cudaGetLastError();
        return false;
      }
    }
  }
  return true;
}

std::string bus_id(Device device) {
  (void)DeviceState::get(device.index);
  char text[32] = {};
  check(cudaDeviceGetPCIBusId(text, sizeof(text), device.index), "cudaDeviceGetPCIBusId");
  return text;
}

std::string why_unreachable(Device device, const std::string& bus) noexcept {
  int index = 0;
  if (cudaDeviceGetByPCIBusId(&index, bus.c_str()) != cudaSuccess) {
    (void)cudaGetLastError();
    return "it is hidden from this process (CUDA_VISIBLE_DEVICES)";
  }
  const int pair[] = {device.index, index};
  return peers_reach(pair) ? "" : "they have no peer access";
}

std::string attention_engine(Device device) {
  (void)DeviceState::get(device.index);
  const CudnnEngine::Presence& cudnn = CudnnEngine::presence();
  std::string text =
      cudnn.available ? cudnn.detail : "the library's own kernels, because " + cudnn.detail;
  if (hopper::unavailable(device.index).empty()) text += "; tensor-core kernels of the library";
  return text;
}

Buffer allocate(Device device, std::int64_t bytes) {
  DeviceState& state = DeviceState::get(device.index);
  DeviceGuard guard(device.index);
  // Plain memory, not the pool's: whoever gets it may hand it to any library.
  void* memory = nullptr;
  const cudaError_t status = cudaMalloc(&memory, static_cast<std::size_t>(bytes > 0 ? bytes : 1));
  if (status == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();
    std::size_t free_bytes = 0;
    std::size_t total_bytes = 0;
    (void)cudaMemGetInfo(&free_bytes, &total_bytes);
    throw DeviceError("cuda:" + std::to_string(state.index()) + " has too little memory: " +
                      std::to_string(bytes) + " bytes are needed, " + std::to_string(free_bytes) +
                      " of " + std::to_string(total_bytes) + " are free");
  }
  check(status, "cudaMalloc");
  Buffer buffer;
  buffer.bytes = bytes;
  buffer.memory = std::shared_ptr<void>(memory, [](void* pointer) { (void)cudaFree(pointer); });
  return buffer;
}

void copy(void* destination, const void* source, std::int64_t bytes) {
  check(cudaMemcpy(destination, source, static_cast<std::size_t>(bytes), cudaMemcpyDefault),
        "cudaMemcpy");
  // A copy between two places on a GPU may return before it has happened.
  check(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");
}

std::shared_ptr<void> make_stream(Device device) {
  (void)DeviceState::get(device.index);
  DeviceGuard guard(device.index);
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  return {static_cast<void*>(stream), [](void* used) { (void)cudaStreamDestroy(as_stream(used)); }};
}

void synchronize(Device device, void* stream) {
  DeviceGuard guard(device.index);
  check(cudaStreamSynchronize(as_stream(stream)), "cudaStreamSynchronize");
}

void use_device(Device device) {
  (void)DeviceState::get(device.index);
  check(cudaSetDevice(device.index), "cudaSetDevice");
}

}  // namespace zigzag::cuda
