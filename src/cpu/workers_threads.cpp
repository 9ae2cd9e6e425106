// For ThreadSanitizer, which cannot see into libtbb: every worker is a thread of its own.
#include <thread>
#include <vector>

#include "cpu/workers.h"

namespace zigzag::cpu {

void run_workers(int /*slots*/, int workers, const std::function<void()>& run) {
  std::vector<std::thread> threads;
  threads.reserve(static_cast<std::size_t>(workers));
  for (int i = 1; i < workers; ++i) threads.emplace_back(run);
  run();
  for (std::thread& thread : threads) thread.join();
}

}  // namespace zigzag::cpu
