#include "comm/wait.h"

#include <algorithm>

#include <fmt/format.h>

#include "zigzag/error.h"

namespace zigzag::comm {

std::string step_text(const Step& step) {
  if (step.stages <= 1) return std::string(step.name);
  return fmt::format("{}, stage {} of {}", step.name, step.stage + 1, step.stages);
}

std::string ranks_text(std::span<const int> ranks) {
  constexpr std::size_t kShown = 8;
  if (ranks.empty()) return "the other ranks";
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  const std::size_t shown = std::min(ranks.size(), kShown);
  for (std::size_t i = 0; i < shown; ++i) {
    if (i > 0) text += i + 1 == ranks.size() ? " and " : ", ";
    text += fmt::format("{}", ranks[i]);
  }
  if (shown < ranks.size()) text += fmt::format(" and {} more", ranks.size() - shown);
  return text;
}

std::string seconds_text(double seconds) { return fmt::format("{:g} s", seconds); }

Deadline::Deadline(double seconds) {
  // Far more than any run, and still a representable time point.
  constexpr double kLongest = 1e9;
  const std::chrono::duration<double> wait(std::min(seconds, kLongest));
  end_ = std::chrono::steady_clock::now() +
         std::chrono::duration_cast<std::chrono::steady_clock::duration>(wait);
}

void throw_timeout(int rank, std::span<const int> missing, std::string_view step, double seconds) {
  throw Timeout(fmt::format("rank {} waited {} for {} in {}; ZIGZAG_TIMEOUT_S sets the limit", rank,
                            seconds_text(seconds), ranks_text(missing), step));
}

void throw_peer_failed(int rank, int peer, std::string_view step, std::string_view reason) {
  if (peer == rank) {
    throw CommunicationError(
        fmt::format("rank {} cannot take part in {}: the group ended when this rank failed: {}",
                    rank, step, reason));
  }
  throw CommunicationError(
      fmt::format("rank {} stopped in {}: rank {} failed: {}", rank, step, peer, reason));
}

}  // namespace zigzag::comm
