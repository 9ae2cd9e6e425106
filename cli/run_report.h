#pragma once

#include <optional>

#include "check.h"
#include "run_job.h"

namespace zigzag::cli {

/// Memory of a run on the host by what it holds, in bytes, of all ranks of one process together.
struct MemoryReport {
  double peak = 0;         // resident, measured before any check
  double inputs = 0;       // q, k, v, dout
  double results = 0;      // out, lse, dq, dk, dv
  double whole = 0;        // results in global order for a check, which are not in the peak
  double gathered = 0;     // K and V of a stage
  double partials = 0;     // dK and dV of a stage in float32
  std::int64_t stage = 0;  // KV heads of a stage

  /// What of the peak has no name above.
  double rest() const;
};

/// What a run says at its end.
struct RunReport {
  const Job* job = nullptr;
  const Group* group = nullptr;
  std::vector<RankTimes> times;
  MemoryReport memory;
  std::optional<CheckReport> check;
};

/// Sizes of what the ranks of this process hold.
MemoryReport measure_memory(const Job& job, const Group& group,
                            const std::vector<RankTimes>& times);

/// Prints the JSON object of `zigzag run --json` on stdout.
void print_run_json(const RunReport& report);

/// Prints the summary of `zigzag run` on stdout.
void print_run_summary(const RunReport& report);

}  // namespace zigzag::cli
