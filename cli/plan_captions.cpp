#include "plan_captions.h"

#include <algorithm>

#include <fmt/format.h>

#include "plan_report.h"
#include "text.h"

namespace zigzag::cli {
namespace {

std::string tokens_of_ranks(const Plan& plan) {
  std::int64_t least = plan.local_tokens(0);
  std::int64_t most = least;
  for (std::int64_t r = 1; r < plan.world_size(); ++r) {
    least = std::min(least, plan.local_tokens(r));
    most = std::max(most, plan.local_tokens(r));
  }
  const std::string tokens = plural(most, "token");
  return least == most ? tokens : fmt::format("{} to {}", count_text(least), tokens);
}

}  // namespace

bool divides_evenly(const Plan& plan) {
  for (std::int64_t d = 0; d < plan.num_documents(); ++d) {
    if (plan.document_length(d) % plan.num_chunks() != 0) return false;
  }
  return true;
}

bool sees_all_before(const Mask& mask) { return mask.causal && mask.window_left < 0; }

std::string cut_caption(const Plan& plan) {
  return fmt::format(
      "Every document is cut into {} chunks {}; a rank holds {}.", count_text(plan.num_chunks()),
      divides_evenly(plan) ? "of equal length" : "whose lengths differ by at most a token",
      tokens_of_ranks(plan));
}

std::string owner_caption(const Plan& plan, const Mask& mask, double balance) {
  const std::string last = count_text(plan.num_chunks() - 1);
  return fmt::format("Rank r owns {}. Mask: {}. Balance of the work: {:.4f} (mean / most FLOPs).",
                     sees_all_before(mask)
                         ? fmt::format("chunk r, early and cheap, and chunk {} - r, late and "
                                       "costly",
                                       last)
                         : fmt::format("chunks r and {} - r", last),
                     mask_text(mask), balance);
}

std::string choice_caption(const Plan& plan, std::size_t shown) {
  const std::int64_t documents = plan.num_documents();
  const auto drawn = static_cast<std::int64_t>(shown);
  if (drawn == documents) return "";
  std::int64_t filled = 0;
  for (std::int64_t d = 0; d < documents; ++d) filled += plan.document_length(d) > 0 ? 1 : 0;
  return fmt::format("Shown: {} of {} documents, {}. ", drawn, count_text(documents),
                     drawn == filled ? "all that are not empty" : "longest and shortest included");
}

}  // namespace zigzag::cli
