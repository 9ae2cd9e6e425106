#include "comm/thread_group.h"

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

#include <fmt/format.h>

#include "comm/wait.h"
#include "zigzag/error.h"

namespace zigzag::comm {
namespace {

// The sentence that `make` writes or, without memory for it, one that fits into the string itself:
// a failure is told whatever happens.
template <typename Make>
std::string sentence_or_short(const Make& make) noexcept {
  try {
    return make();
  } catch (...) {
    return "out of memory";
  }
}

// Waits a little for a number to change: ranks that come to a meeting one after another are not
// put to sleep, which costs more than all else that a meeting does.
void await_change(const std::atomic<std::uint64_t>& number, std::uint64_t before) {
  constexpr std::chrono::microseconds kLongest(50);
  const auto end = std::chrono::steady_clock::now() + kLongest;
  while (number.load(std::memory_order_relaxed) == before &&
         std::chrono::steady_clock::now() < end) {
    std::this_thread::yield();
  }
}

}  // namespace

ThreadGroup::ThreadGroup(int size, double timeout)
    : timeout_(timeout),
      offers_(static_cast<std::size_t>(size)),
      here_(static_cast<std::size_t>(size), 0),
      reading_(static_cast<std::size_t>(size), 0),
      left_(static_cast<std::size_t>(size), 0) {}

std::vector<int> ThreadGroup::missing() const {
  std::vector<int> ranks;
  for (std::size_t r = 0; r < here_.size(); ++r) {
    if (here_[r] == 0) ranks.push_back(static_cast<int>(r));
  }
  return ranks;
}

void ThreadGroup::throw_failure(int rank, const Offer& offer, bool waited) const {
  const std::string step = step_text(offer.step);
  if (failure_->missing.empty()) throw_peer_failed(rank, failure_->rank, step, failure_->reason);
  if (waited) throw_timeout(rank, failure_->missing, step, timeout_);
  if (failure_->rank == rank) {
    throw CommunicationError(fmt::format(
        "rank {} cannot take part in {}: the group ended when this rank gave up waiting for {} in "
        "{} ({})",
        rank, step, ranks_text(failure_->missing), failure_->step, seconds_text(timeout_)));
  }
  throw CommunicationError(fmt::format(
      "rank {} came to {} after rank {} had given up waiting for {} in {} ({})", rank, step,
      failure_->rank, ranks_text(failure_->missing), failure_->step, seconds_text(timeout_)));
}

void ThreadGroup::check_left(const Offer& offer) {
  if (failure_ || arrived_ == 0) return;
  for (std::size_t r = 0; r < left_.size(); ++r) {
    if (left_[r] == 0 || here_[r] != 0) continue;
    std::string reason = sentence_or_short(
        [&] { return fmt::format("it left the group before {}", step_text(offer.step)); });
    failure_ = Failure{static_cast<int>(r), std::move(reason), {}, {}};
    return;
  }
}

void ThreadGroup::meet(int rank, const Offer& offer) {
  const auto self = static_cast<std::size_t>(rank);
  std::unique_lock lock(mutex_);
  if (failure_) throw_failure(rank, offer, false);
  if (here_[self] != 0 || reading_[self] != 0) {
    throw CommunicationError(
        fmt::format("rank {} came to {} while another thread waits in {} with the communicator of "
                    "the same rank; one thread at a time may use it",
                    rank, step_text(offer.step), step_text(offers_[self].step)));
  }
  const std::uint64_t meeting = meetings_;
  offers_[self] = offer;
  here_[self] = 1;
  if (++arrived_ == size()) {
    arrived_ = 0;
    std::fill(here_.begin(), here_.end(), char{0});
    std::fill(reading_.begin(), reading_.end(), char{1});
    readers_ = size();
    ++meetings_;
    lock.unlock();
    met_.notify_all();
    return;
  }
  check_left(offer);
  lock.unlock();
  await_change(meetings_, meeting);
  lock.lock();
  const Deadline deadline(timeout_);
  const auto over = [&] { return meetings_ != meeting || failure_.has_value(); };
  if (!met_.wait_until(lock, deadline.end(), over)) {
    failure_ = Failure{rank, {}, missing(), step_text(offer.step)};
    met_.notify_all();
  }
  // A meeting that took place is not undone by a failure after it.
  if (meetings_ == meeting) throw_failure(rank, offer, true);
}

// Says whether the group was well when the last one came. It holds until this rank has come to the
// next meeting.
bool ThreadGroup::part_together(int rank) noexcept {
  std::unique_lock lock(mutex_);
  reading_[static_cast<std::size_t>(rank)] = 0;
  const std::uint64_t parting = partings_;
  if (--readers_ == 0) {
    ++partings_;
    parted_well_ = !failure_.has_value();
    const bool well = parted_well_;
    lock.unlock();
    parted_.notify_all();
    return well;
  }
  if (offers_[static_cast<std::size_t>(rank)].kind != Offer::Kind::kLoan) {
    lock.unlock();
    await_change(partings_, parting);
    lock.lock();
  }
  parted_.wait(lock, [&] { return partings_ != parting; });
  return parted_well_;
}

void ThreadGroup::part(int rank) noexcept { part_together(rank); }

void ThreadGroup::part_or_throw(int rank) {
  if (part_together(rank)) return;
  const std::scoped_lock lock(mutex_);
  throw_failure(rank, offers_[static_cast<std::size_t>(rank)], false);
}

void ThreadGroup::fail(int rank, std::string_view reason) noexcept {
  {
    const std::scoped_lock lock(mutex_);
    // Also without memory for the sentence: ranks that lend would take unwritten results for good.
    if (!failure_) {
      failure_ = Failure{rank, sentence_or_short([&] { return std::string(reason); }), {}, {}};
    }
  }
  met_.notify_all();
}

void ThreadGroup::leave(int rank) noexcept {
  {
    const std::scoped_lock lock(mutex_);
    left_[static_cast<std::size_t>(rank)] = 1;
    for (std::size_t r = 0; r < here_.size(); ++r) {
      if (here_[r] != 0) {
        check_left(offers_[r]);
        break;
      }
    }
  }
  met_.notify_all();
}

}  // namespace zigzag::comm
