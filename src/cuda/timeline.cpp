#include "cuda/timeline.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <utility>

#include "cuda/check.h"

namespace zigzag::cuda {
namespace {

struct Entry {
  TimelineSpan span;
  cudaEvent_t start = nullptr;
  cudaEvent_t end = nullptr;
};

struct Recorder {
  std::atomic<bool> on{false};
  std::mutex mutex;
  std::vector<Entry> entries;
  std::vector<cudaEvent_t> bases;  // by device: an event at a known time
  std::vector<double> base_times;  // microseconds
};

Recorder& recorder() {
  static auto* const one = new Recorder;
  return *one;
}

double now() {
  return std::chrono::duration<double, std::micro>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

cudaEvent_t timed_event() {
  cudaEvent_t event = nullptr;
  check(cudaEventCreate(&event), "cudaEventCreate");
  return event;
}

void destroy(std::vector<cudaEvent_t>& events) {
  for (cudaEvent_t event : events) (void)cudaEventDestroy(event);
  events.clear();
}

}  // namespace

void start_timeline() {
  Recorder& all = recorder();
  const std::lock_guard lock(all.mutex);
  all.entries.clear();
  destroy(all.bases);
  all.base_times.clear();
  int devices = 0;
  check(cudaGetDeviceCount(&devices), "cudaGetDeviceCount");
  for (int device = 0; device < devices; ++device) {
    DeviceGuard guard(device);
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    const cudaEvent_t event = timed_event();
    // Rounds before the last warm up: an event keeps its last record.
    double time = 0;
    for (int i = 0; i < 5; ++i) {
      const double before = now();
      check(cudaEventRecord(event, stream), "cudaEventRecord");
      check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
      time = (before + now()) / 2;
    }
    all.bases.push_back(event);
    all.base_times.push_back(time);
    check(cudaStreamDestroy(stream), "cudaStreamDestroy");
  }
  const double first = *std::min_element(all.base_times.begin(), all.base_times.end());
  for (double& time : all.base_times) time -= first;
  all.on.store(true, std::memory_order_release);
}

std::vector<TimelineSpan> stop_timeline() {
  Recorder& all = recorder();
  all.on.store(false, std::memory_order_release);
  const std::lock_guard lock(all.mutex);
  std::vector<TimelineSpan> spans;
  for (Entry& entry : all.entries) {
    if (entry.end == nullptr) continue;
    const auto device = static_cast<std::size_t>(entry.span.device);
    DeviceGuard guard(entry.span.device);
    check(cudaEventSynchronize(entry.end), "cudaEventSynchronize");
    float start = 0;
    float length = 0;
    check(cudaEventElapsedTime(&start, all.bases[device], entry.start), "cudaEventElapsedTime");
    check(cudaEventElapsedTime(&length, entry.start, entry.end), "cudaEventElapsedTime");
    entry.span.start = all.base_times[device] + 1e3 * static_cast<double>(start);
    entry.span.end = entry.span.start + 1e3 * static_cast<double>(length);
    spans.push_back(std::move(entry.span));
    (void)cudaEventDestroy(entry.start);
    (void)cudaEventDestroy(entry.end);
  }
  all.entries.clear();
  return spans;
}

TimelineScope::TimelineScope(std::string_view name, int rank, int device, Lane lane, void* stream)
    : stream_(stream) {
  Recorder& all = recorder();
  if (!all.on.load(std::memory_order_acquire)) return;
  DeviceGuard guard(device);
  Entry entry;
  entry.span = {std::string(name), rank, device, lane, 0, 0};
  entry.start = timed_event();
  check(cudaEventRecord(entry.start, as_stream(stream)), "cudaEventRecord");
  const std::lock_guard lock(all.mutex);
  index_ = static_cast<int>(all.entries.size());
  all.entries.push_back(std::move(entry));
}

TimelineScope::~TimelineScope() {
  if (index_ < 0) return;
  Recorder& all = recorder();
  const std::lock_guard lock(all.mutex);
  if (static_cast<std::size_t>(index_) >= all.entries.size()) return;
  Entry& entry = all.entries[static_cast<std::size_t>(index_)];
  int previous = 0;
  (void)cudaGetDevice(&previous);
  (void)cudaSetDevice(entry.span.device);
  // Failures show in the work itself; a span without an end is left out.
  if (cudaEventCreate(&entry.end) == cudaSuccess) {
    (void)cudaEventRecord(entry.end, as_stream(stream_));
  }
  (void)cudaSetDevice(previous);
}

}  // namespace zigzag::cuda
