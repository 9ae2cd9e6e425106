#include <atomic>
#include <mutex>

#include <cuda_runtime.h>

#include "cuda/check.h"
#include "cuda/stop.h"

namespace zigzag::cuda {
namespace {

struct Stops {
  std::atomic<StopReport*> report{nullptr};
  std::mutex mutex;
  std::string reason;
};

Stops& stops() {
  static auto* const one = new Stops;
  return *one;
}

template <typename T>
T* page_locked() {
  void* memory = nullptr;
  check(cudaHostAlloc(&memory, sizeof(T), cudaHostAllocPortable | cudaHostAllocMapped),
        "cudaHostAlloc");
  return new (memory) T{};
}

__global__ void stop_kernel(const int* flag) {
  if (*static_cast<const volatile int*>(flag) != 0) __trap();
}

}  // namespace

StopReport* stop_report() {
  Stops& all = stops();
  const std::lock_guard lock(all.mutex);
  if (all.report.load() == nullptr) all.report.store(page_locked<StopReport>());
  context_report = stop_text;
  return all.report.load();
}

int* make_stop_flag() {
  (void)stop_report();
  return page_locked<int>();
}

void stop_if_set(const int* flag, cudaStream_t stream) {
  stop_kernel<<<1, 1, 0, stream>>>(flag);
  check_launch("stop_kernel");
}

void note_stop(const std::string& reason) {
  Stops& all = stops();
  const std::lock_guard lock(all.mutex);
  if (all.reason.empty()) all.reason = reason;
}

std::string stop_text() {
  Stops& all = stops();
  const StopReport* report = all.report.load();
  if (report != nullptr && *static_cast<const volatile int*>(&report->state) != 0) {
    std::string seconds = std::to_string(report->seconds);
    seconds.erase(seconds.find_last_not_of('0') + 1);
    if (seconds.back() == '.') seconds.pop_back();
    return "rank " + std::to_string(report->rank) + " waited " + seconds + " s for rank " +
           std::to_string(report->peer) + " in " + report->step +
           ", on the GPU; ZIGZAG_TIMEOUT_S sets the limit";
  }
  const std::lock_guard lock(all.mutex);
  return all.reason;
}

}  // namespace zigzag::cuda
