#pragma once

#include <functional>
#include <span>
#include <string>
#include <string_view>

namespace zigzag::comm {

/// Watches, from a thread of its own, over MPI calls that never return. Open MPI 4.1 spins for ever
/// inside MPI_Testsome when the connection to a process of another machine breaks while rows
/// travel; no deadline that is looked at between calls helps then.
///
/// `last_words` gets one sentence that names rank, step and peers, half a second after the deadline
/// of the wait or 0.15 s after SIGTERM, if MPI has not returned meanwhile. The thread that is stuck
/// cannot be freed: the function should end the process. At most one guard lives at a time.
class MpiGuard {
 public:
  explicit MpiGuard(std::function<void(const std::string&)> last_words);
  ~MpiGuard();
  MpiGuard(const MpiGuard&) = delete;
  MpiGuard& operator=(const MpiGuard&) = delete;
};

/// A stretch of MPI calls of this thread, for the guard to watch. Does nothing without a guard.
/// Stretches may be nested; the innermost counts.
class InsideMpi {
 public:
  /// `step` and `peers` must outlive the stretch; it should not last longer than `limit` seconds.
  InsideMpi(int rank, std::string_view step, std::span<const int> peers, double limit);
  ~InsideMpi();
  InsideMpi(const InsideMpi&) = delete;
  InsideMpi& operator=(const InsideMpi&) = delete;

  /// MPI has returned from a call.
  static void returned() noexcept;
  /// What to say if MPI does not return any more; from here on within half a second.
  static void will_say(std::string_view sentence) noexcept;

 private:
  InsideMpi* outer_ = nullptr;
  bool watched_ = false;
  int rank_;
  std::string_view step_;
  std::span<const int> peers_;
  double limit_;
  std::string sentence_;
  double since_ = 0;  // seconds of the steady clock
  friend struct GuardState;
};

}  // namespace zigzag::comm
