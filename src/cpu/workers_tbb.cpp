#include <algorithm>
#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include <oneapi/tbb/global_control.h>
#include <oneapi/tbb/parallel_for.h>
#include <oneapi/tbb/partitioner.h>
#include <oneapi/tbb/task_arena.h>

#include "cpu/workers.h"

namespace zigzag::cpu {
namespace {

// One arena for each number of slots that was ever asked for: one, but for tests that change
// ZIGZAG_NUM_THREADS. Never destroyed: rank threads may outlive static objects.
tbb::task_arena& shared_arena(int slots) {
  static std::mutex& mutex = *new std::mutex;
  static auto& arenas = *new std::map<int, std::unique_ptr<tbb::task_arena>>;
  static int most_slots = available_cores();
  static tbb::global_control* control = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (slots > most_slots) {
    // More threads than cores need oneTBB's leave; of several leaves the smallest counts.
    delete std::exchange(control, nullptr);
    control = new tbb::global_control(tbb::global_control::max_allowed_parallelism,
                                      static_cast<std::size_t>(slots));
    most_slots = slots;
  }
  std::unique_ptr<tbb::task_arena>& entry = arenas[slots];
  if (!entry) {
    // Kept only once it stands: whoever uses an arena whose start threw waits for ever.
    auto arena = std::make_unique<tbb::task_arena>(slots);
    arena->initialize();
    entry = std::move(arena);
  }
  return *entry;
}

}  // namespace

void run_workers(int slots, int workers, const std::function<void()>& run) {
  shared_arena(slots).execute([&] {
    if (workers == 1) {
      run();
    } else {
      tbb::parallel_for(
          0, workers, 1, [&](int) { run(); }, tbb::simple_partitioner());
    }
  });
}

}  // namespace zigzag::cpu
