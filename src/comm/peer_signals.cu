#include <algorithm>
#include <cstring>

#include <cuda_runtime.h>

#include "comm/peer_signals.h"
#include "comm/wait.h"
#include "cuda/check.h"
#include "cuda/stop.h"
#include "zigzag/error.h"

namespace zigzag::comm {
namespace {

using cuda::check;

constexpr int kSignals = 2;
struct SendParams {
  std::uint64_t* peers[kMaxSignalRanks];  // this rank's flag at every peer
  std::uint64_t* counter;
  int rank;
  int size;
};

struct WaitParams {
  const std::uint64_t* flags;  // [size]
  const std::uint64_t* counter;
  cuda::StopReport* report;
  std::uint64_t behind;
  double seconds;
  int rank;
  int size;
  char step[cuda::StopReport::kText];
};

__device__ std::uint64_t nanoseconds() {
  std::uint64_t time = 0;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  return time;
}

/// Work before this launch is complete; the fence makes it visible to the other GPUs.
__global__ void __launch_bounds__(kMaxSignalRanks)
    send_kernel(const __grid_constant__ SendParams params) {
  __shared__ std::uint64_t count;
  if (threadIdx.x == 0) {
    count = *params.counter + 1;
    *params.counter = count;
  }
  __syncthreads();
  const int peer = static_cast<int>(threadIdx.x);
  if (peer >= params.size || peer == params.rank) return;
  __threadfence_system();
  asm volatile("st.release.sys.global.u64 [%0], %1;"
               :
               : "l"(params.peers[peer]), "l"(count)
               : "memory");
}

__global__ void __launch_bounds__(kMaxSignalRanks)
    wait_kernel(const __grid_constant__ WaitParams params) {
  const int peer = static_cast<int>(threadIdx.x);
  if (peer < params.size && peer != params.rank) {
    const std::uint64_t own = *params.counter;
    const std::uint64_t target = own > params.behind ? own - params.behind : 0;
    const std::uint64_t start = nanoseconds();
    const auto limit = static_cast<std::uint64_t>(params.seconds * 1e9);
    while (true) {
      std::uint64_t seen = 0;
      asm volatile("ld.acquire.sys.global.u64 %0, [%1];"
                   : "=l"(seen)
                   : "l"(params.flags + peer)
                   : "memory");
      if (seen >= target) break;
      if (nanoseconds() - start > limit) {
        if (atomicCAS_system(&params.report->state, 0, 1) == 0) {
          params.report->rank = params.rank;
          params.report->peer = peer;
          params.report->seconds = params.seconds;
          for (std::size_t i = 0; i < cuda::StopReport::kText; ++i)
            params.report->step[i] = params.step[i];
          __threadfence_system();
          atomicExch_system(&params.report->state, 2);
        }
        __threadfence_system();
        // Nothing that waits here may run on with rows that never came.
        __trap();
      }
      __nanosleep(100);
    }
  }
}

}  // namespace

std::int64_t PeerSignals::flag_bytes(int size) {
  return kSignals * size * static_cast<std::int64_t>(sizeof(std::uint64_t));
}

PeerSignals::PeerSignals(int device, int rank, int size, double timeout_seconds, void* flags)
    : device_(device),
      rank_(rank),
      size_(size),
      timeout_(timeout_seconds),
      flags_(static_cast<std::uint64_t*>(flags)) {
  if (size > kMaxSignalRanks) {
    throw DeviceError("peer memory between processes serves " + std::to_string(kMaxSignalRanks) +
                      " ranks at most, not " + std::to_string(size) + "; use NCCL");
  }
  cuda::DeviceGuard guard(device_);
  (void)cuda::stop_report();
  void* memory = nullptr;
  check(cudaMalloc(&memory, kSignals * sizeof(std::uint64_t)), "cudaMalloc");
  counters_ = static_cast<std::uint64_t*>(memory);
  check(cudaMemset(counters_, 0, kSignals * sizeof(std::uint64_t)), "cudaMemset");
}

PeerSignals::~PeerSignals() {
  int previous = 0;
  (void)cudaGetDevice(&previous);
  (void)cudaSetDevice(device_);
  (void)cudaFree(counters_);
  (void)cudaSetDevice(previous);
}

void PeerSignals::connect(int peer, void* flags) {
  peers_[static_cast<std::size_t>(peer)] = static_cast<std::uint64_t*>(flags);
}

void PeerSignals::send(PeerSignal signal, cudaStream_t stream) {
  const int index = static_cast<int>(signal);
  SendParams params{};
  for (int r = 0; r < size_; ++r) {
    if (r == rank_) continue;
    params.peers[r] = peers_[static_cast<std::size_t>(r)] + index * size_ + rank_;
  }
  params.counter = counters_ + index;
  params.rank = rank_;
  params.size = size_;
  send_kernel<<<1, kMaxSignalRanks, 0, stream>>>(params);
  cuda::check_launch("send_kernel");
}

void PeerSignals::wait(PeerSignal signal, PeerSignal counted, int behind, const Step& step,
                       cudaStream_t stream) {
  WaitParams params{};
  params.flags = flags_ + static_cast<int>(signal) * size_;
  params.counter = counters_ + static_cast<int>(counted);
  params.report = cuda::stop_report();
  params.behind = static_cast<std::uint64_t>(behind);
  params.seconds = timeout_;
  params.rank = rank_;
  params.size = size_;
  const std::string text = step_text(step);
  std::memcpy(params.step, text.data(), std::min(text.size(), cuda::StopReport::kText - 1));
  wait_kernel<<<1, kMaxSignalRanks, 0, stream>>>(params);
  cuda::check_launch("wait_kernel");
}

}  // namespace zigzag::comm
