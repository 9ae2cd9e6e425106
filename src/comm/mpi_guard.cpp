#include "comm/mpi_guard.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdint>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "comm/mpi_environment.h"
#include "comm/wait.h"

namespace zigzag::comm {
namespace {

constexpr double kAfterDeadline = 0.5;
constexpr double kAfterSentence = 0.5;
constexpr double kAfterSignal = 0.15;
constexpr auto kPeriod = std::chrono::milliseconds(50);

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

struct GuardState {
  std::mutex mutex;
  std::condition_variable changed;
  bool ends = false;
  InsideMpi* innermost = nullptr;
  std::thread thread;
  std::function<void(const std::string&)> last_words;

  // The beat counts returns of MPI: it is the one thing that a busy wait touches.
  std::atomic<bool> active{false};
  std::atomic<std::uint64_t> beat{0};

  void watch();
  std::optional<std::string> verdict(double still_since, double terminated_since) const;
};

namespace {

GuardState& state() {
  // Never destroyed: a program may exit while its guard still watches.
  static auto* instance = new GuardState;
  return *instance;
}

}  // namespace

std::optional<std::string> GuardState::verdict(double still_since, double terminated_since) const {
  if (innermost == nullptr) return std::nullopt;
  const InsideMpi& stretch = *innermost;
  const double time = now();
  const double still = time - std::max(still_since, stretch.since_);
  if (!stretch.sentence_.empty()) {
    return still >= kAfterSentence ? std::optional(stretch.sentence_) : std::nullopt;
  }
  const bool terminated = std::min(still, time - terminated_since) >= kAfterSignal;
  const bool late =
      still >= kAfterDeadline && time - stretch.since_ >= stretch.limit_ + kAfterDeadline;
  if (!terminated && !late) return std::nullopt;
  std::vector<int> peers(stretch.peers_.begin(), stretch.peers_.end());
  std::sort(peers.begin(), peers.end());
  peers.erase(std::unique(peers.begin(), peers.end()), peers.end());
  std::erase_if(peers, [](int peer) { return peer < 0; });
  const std::string why =
      terminated ? fmt::format("signal {} asked it to end", detail::termination_signal())
                 : fmt::format("{} have passed", seconds_text(stretch.limit_));
  return fmt::format(
      "rank {} stopped in {} while it waited for {}: {} and MPI does not return, as Open MPI does "
      "when a connection to another machine breaks",
      stretch.rank_, stretch.step_, ranks_text(peers), why);
}

void GuardState::watch() {
  std::unique_lock lock(mutex);
  std::uint64_t last_beat = beat;
  double still_since = now();
  double terminated_since = 1e300;
  while (!changed.wait_for(lock, kPeriod, [this] { return ends; })) {
    if (std::exchange(last_beat, beat.load()) != last_beat) still_since = now();
    if (detail::termination_signal() != 0) terminated_since = std::min(terminated_since, now());
    if (const auto sentence = verdict(still_since, terminated_since)) {
      // Without the lock: should MPI return at this moment, the stuck thread may go on.
      lock.unlock();
      last_words(*sentence);
      return;
    }
  }
}

MpiGuard::MpiGuard(std::function<void(const std::string&)> last_words) {
  GuardState& guard = state();
  guard.ends = false;
  guard.last_words = std::move(last_words);
  // Signals are for the thread that works.
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  guard.thread = std::thread([&guard] { guard.watch(); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  guard.active = true;
}

MpiGuard::~MpiGuard() {
  GuardState& guard = state();
  guard.active = false;
  {
    const std::lock_guard lock(guard.mutex);
    guard.ends = true;
  }
  guard.changed.notify_all();
  guard.thread.join();
}

InsideMpi::InsideMpi(int rank, std::string_view step, std::span<const int> peers, double limit)
    : rank_(rank), step_(step), peers_(peers), limit_(limit) {
  GuardState& guard = state();
  if (!guard.active) return;
  watched_ = true;
  since_ = now();
  const std::lock_guard lock(guard.mutex);
  outer_ = std::exchange(guard.innermost, this);
}

InsideMpi::~InsideMpi() {
  if (!watched_) return;
  GuardState& guard = state();
  const std::lock_guard lock(guard.mutex);
  guard.innermost = outer_;
  guard.beat.fetch_add(1, std::memory_order_relaxed);
}

void InsideMpi::returned() noexcept { state().beat.fetch_add(1, std::memory_order_relaxed); }

void InsideMpi::will_say(std::string_view sentence) noexcept {
  GuardState& guard = state();
  if (!guard.active) return;
  try {
    const std::lock_guard lock(guard.mutex);
    if (guard.innermost != nullptr) guard.innermost->sentence_ = sentence;
  } catch (...) {
    // Without memory for it the guard has another sentence.
  }
}

}  // namespace zigzag::comm
