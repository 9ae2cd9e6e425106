#include "cpu/parallel.h"

#ifdef __linux__
#include <sched.h>
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <charconv>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>

#include "cpu/page_pool.h"
#include "cpu/workers.h"
#include "zigzag/error.h"
#include "zigzag/system.h"

namespace zigzag {
namespace {

constexpr int kMaxThreads = 1024;

}  // namespace

int num_threads() {
  // The affinity of the thread that asks first stands for the process: later callers may be pinned.
  static const int cores = cpu::available_cores();
  const char* variable = std::getenv("ZIGZAG_NUM_THREADS");
  if (variable == nullptr || *variable == '\0') return cores;
  const std::string_view text(variable);
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 1 ||
      value > kMaxThreads) {
    throw InvalidArgument("ZIGZAG_NUM_THREADS is '" + std::string(text) +
                          "', but must be a whole number from 1 to " + std::to_string(kMaxThreads));
  }
  return value;
}

namespace cpu {

int available_cores() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
}

void parallel_for(std::int64_t tasks, const std::function<void(std::int64_t)>& work) {
  if (tasks <= 0) return;
  const int slots = num_threads();
  std::atomic<std::int64_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  // A thread that began a task finishes it before it looks for other work, and claims in order:
  // that is what lets a task wait for an earlier one.
  const auto run = [&] {
    for (;;) {
      const std::int64_t task = next.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks) return;
      try {
        work(task);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(error_mutex);
        if (!error) error = std::current_exception();
      }
    }
  };
  const int workers = static_cast<int>(std::min<std::int64_t>(slots, tasks));
  run_workers(slots, workers, run);
  if (error) std::rethrow_exception(error);
}

void parallel_ranges(std::int64_t count, std::int64_t grain,
                     const std::function<void(std::int64_t, std::int64_t)>& work) {
  grain = std::max<std::int64_t>(1, grain);
  parallel_for((count + grain - 1) / grain, [&](std::int64_t piece) {
    work(piece * grain, std::min(count, (piece + 1) * grain));
  });
}

void* allocate_pages(std::int64_t bytes) {
  constexpr std::int64_t kHugePage = std::int64_t{2} << 20;
  const bool large = bytes >= kHugePage / 2;
  if (large) bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  void* memory = std::aligned_alloc(
      large ? kHugePage : 256,
      static_cast<std::size_t>((std::max<std::int64_t>(bytes, 1) + 255) / 256 * 256));
  if (memory == nullptr) throw std::bad_alloc();
#ifdef __linux__
  // Advice: without it these are small pages, as right but slower.
  if (large) (void)madvise(memory, static_cast<std::size_t>(bytes), MADV_HUGEPAGE);
#endif
  return memory;
}

std::byte* thread_scratch(std::size_t bytes) {
  // From the pool, so that the threads of the next call find it: ranks' threads come and go.
  thread_local std::shared_ptr<void> scratch;
  thread_local std::size_t size = 0;
  if (size < bytes) {
    scratch.reset();
    size = 0;
    scratch = pooled_pages(static_cast<std::int64_t>(bytes));
    size = bytes;
  }
  return static_cast<std::byte*>(scratch.get());
}

}  // namespace cpu
}  // namespace zigzag
