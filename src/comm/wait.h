#pragma once

#include <chrono>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "comm/transport.h"

namespace zigzag::comm {

/// "gather of K and V, stage 2 of 4"; without the stage when there is only one.
std::string step_text(const Step& step);

/// "rank 3", "ranks 3 and 5", "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more".
std::string ranks_text(std::span<const int> ranks);

/// "1 s", "0.25 s".
std::string seconds_text(double seconds);

/// The moment at which a wait that starts now gives up.
class Deadline {
 public:
  explicit Deadline(double seconds);
  bool passed() const { return std::chrono::steady_clock::now() >= end_; }
  std::chrono::steady_clock::time_point end() const { return end_; }

 private:
  std::chrono::steady_clock::time_point end_;
};

/// Throws Timeout: "rank 0 waited 1 s for rank 3 in gather of K and V, stage 2 of 4 (...)".
[[noreturn]] void throw_timeout(int rank, std::span<const int> missing, std::string_view step,
                                double seconds);

/// Throws CommunicationError: "rank 0 stopped in STEP: rank 3 failed: REASON"; to the rank that
/// failed itself and calls again: "rank 3 cannot take part in STEP: the group ended when ...".
[[noreturn]] void throw_peer_failed(int rank, int peer, std::string_view step,
                                    std::string_view reason);

}  // namespace zigzag::comm
