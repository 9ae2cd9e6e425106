#pragma once

#include <array>
#include <string>
#include <vector>

#include "progress.h"
#include "run_job.h"

namespace zigzag::cli {

/// How far a tensor is from the float64 reference.
struct Difference {
  double max = 0;                // largest |difference|
  double mean = 0;               // mean |difference|
  double relative_l2 = 0;        // norm of the differences / norm of the reference
  double max_bounded = 0;        // the same without rows that vanish by cancellation
  double max_bound = 0;          // what max_bounded may be at most; 0: no bound
  std::int64_t misplaced = 0;    // elements where one is inf or NaN and the other is not the same
  std::int64_t uncancelled = 0;  // rows that should vanish by cancellation but do not
};

/// The check of one tensor.
struct TensorCheck {
  Difference run;
  Difference one_rank;      // of the same engine on one rank
  double l2_bound = 0;      // what run.relative_l2 may be at most
  double one_rank_max = 0;  // largest |run - one rank|
  bool equal = false;       // run and one rank have the same bits
  bool passed = false;
};

/// The check of a run.
struct CheckReport {
  bool passed = true;
  double seconds = 0;
  std::vector<std::string> notes;  // NaN in the results and what of the inputs it comes with
  std::array<TensorCheck, kResults> tensors;
};

/// Compares the results of a job, in global order on the CPU, with the float64 reference and with
/// the same engine on one rank, against the bounds of docs/cli.md. O(L^2) in float64.
CheckReport check_results(const Job& job, const Results& results, Device device,
                          Progress& progress);

}  // namespace zigzag::cli
