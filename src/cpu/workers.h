#pragma once

#include <functional>

namespace zigzag::cpu {

/// Cores that this process may run on, at least 1.
int available_cores();

/// Runs `run` on up to `workers` threads at once, of which at most `slots` work over all calls, and
/// returns when every started one is done. `run` must not throw and takes its work from a shared
/// counter, so that it does not matter how many threads come.
void run_workers(int slots, int workers, const std::function<void()>& run);

}  // namespace zigzag::cpu
