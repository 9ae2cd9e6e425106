#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "comm/transport.h"
#include "zigzag/tensor.h"

namespace zigzag::comm {

/// What a rank thread offers its peers while they exchange.
struct Offer {
  enum class Kind : std::uint8_t { kBarrier, kAllGather, kGather, kLoan, kReduce };
  Kind kind = Kind::kBarrier;
  Step step;
  std::span<const std::byte> bytes;
  std::span<const TensorView> views;
};

/// Rank threads of one process that meet, read each other's memory and part. Every exchange is
/// meet(), reading the peers' offers, part(). A failure (a deadline, an abort, a rank that left)
/// ends the group for good.
class ThreadGroup {
 public:
  ThreadGroup(int size, double timeout);

  int size() const { return static_cast<int>(offers_.size()); }

  /// Publishes the offer and waits until every rank has published its own. On return all offers
  /// can be read until part(). Throws Timeout or CommunicationError, and then nobody reads this
  /// rank's offer.
  void meet(int rank, const Offer& offer);
  /// Any rank's offer, between meet() and part().
  const Offer& offer(int rank) const { return offers_[static_cast<std::size_t>(rank)]; }
  /// Waits until all ranks have read what they came for. Never throws, so that memory on offer is
  /// not freed under a reader: readers only copy or compute, which ends.
  void part(int rank) noexcept;
  /// The same, but throws CommunicationError when the group had failed before all came.
  void part_or_throw(int rank);
  /// Ends the group: all waits throw with this reason.
  void fail(int rank, std::string_view reason) noexcept;
  /// The rank's thread is done with the group; whoever still waits for it fails.
  void leave(int rank) noexcept;

 private:
  struct Failure {
    int rank = 0;              // that failed, or that gave up waiting
    std::string reason;        // for an abort
    std::vector<int> missing;  // for a deadline: who had not come
    std::string step;
  };

  bool part_together(int rank) noexcept;
  std::vector<int> missing() const;
  [[noreturn]] void throw_failure(int rank, const Offer& offer, bool waited) const;
  void check_left(const Offer& offer);

  const double timeout_;
  std::mutex mutex_;
  std::condition_variable met_;
  std::condition_variable parted_;
  std::vector<Offer> offers_;
  std::vector<char> here_;     // by rank: has come to the meeting under way
  std::vector<char> reading_;  // by rank: between meet() and part()
  std::vector<char> left_;
  std::atomic<std::uint64_t> meetings_ = 0;  // changed with the mutex held
  std::atomic<std::uint64_t> partings_ = 0;  // likewise
  int arrived_ = 0;
  int readers_ = 0;
  bool parted_well_ = true;  // the last time
  std::optional<Failure> failure_;
};

}  // namespace zigzag::comm
