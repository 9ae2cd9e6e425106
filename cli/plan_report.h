#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "pack_options.h"
#include "zigzag/plan.h"

namespace zigzag::cli {

/// One rank's part of a pack.
struct RankReport {
  std::int64_t tokens = 0;
  double flops = 0;           // of a forward
  double gathered_bytes = 0;  // received in a forward
};

/// What `zigzag plan` prints.
struct PlanReport {
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
  std::int64_t head_dim = 0;
  DType dtype = DType::kFloat32;
  Mask mask;
  double balance = 1;
  std::int64_t segments = 0;  // non-empty chunks of all ranks
  std::vector<RankReport> ranks;
  std::optional<CostModel> model;
  PredictedTime predicted;
  std::vector<std::string> notes;
};

/// Segments above which they are listed on demand only.
inline constexpr std::int64_t kManySegments = 10'000;

/// Evaluates a plan; O(documents + ranks) without a window.
PlanReport make_report(const Plan& plan, const ShapeOptions& shape, const Mask& mask,
                       const std::optional<CostModel>& model, std::vector<std::string> notes);

/// Prints the JSON object of `zigzag plan --json` on stdout.
void print_json(const Plan& plan, const PlanReport& report, bool all_segments);

/// Prints the tables of `zigzag plan` on stdout.
void print_table(const Plan& plan, const PlanReport& report, bool all_segments);

/// "causal", "causal, window 4096 to the left", "full".
std::string mask_text(const Mask& mask);

}  // namespace zigzag::cli
