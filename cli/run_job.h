#pragma once

#include <array>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "group.h"
#include "io/safetensors.h"
#include "pack_source.h"
#include "progress.h"
#include "tensor_memory.h"
#include "zigzag/attention.h"

namespace zigzag::cli {

/// The tensors that a run makes, in the order of output files.
enum Result : std::size_t { kOut, kLse, kDQ, kDK, kDV, kResults };
inline constexpr std::array<std::string_view, kResults> kResultNames{"out", "lse", "dq", "dk",
                                                                     "dv"};

/// Tensors by Result; the gradients are empty without a backward.
using Results = std::array<TensorMemory, kResults>;

/// Memory for the results of `rows` rows.
Results make_results(const PackSource& source, std::int64_t rows, bool backward, Device device);

/// What is run.
struct Job {
  const PackSource* source = nullptr;
  const Plan* plan = nullptr;
  AttentionOptions attention;
  bool backward = true;
  /// Whether this process wants all rows of the results in memory.
  bool keep_results = false;
  /// Where to write the results; empty: nowhere.
  std::string output;
};

/// What a rank measured.
struct RankTimes {
  double forward = 0;     // seconds
  double backward = 0;    // seconds
  double peak_bytes = 0;  // of the rank's process, before any check
};

/// What a job gave.
struct JobResult {
  std::vector<RankTimes> times;  // [ranks]
  Results results;               // global order, when they were kept, in the root process
};

/// Runs the job over the group. The output file, if any, is complete but not yet named: `writer`
/// holds it.
JobResult run_job(const Job& job, const Group& group, Progress& progress,
                  std::unique_ptr<io::SafetensorsWriter>& writer);

}  // namespace zigzag::cli
