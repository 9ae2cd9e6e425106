#include "comm/shared_messages.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <limits>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <fmt/format.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "comm/liveness.h"
#include "comm/transport.h"
#include "comm/wait.h"
#include "zigzag/error.h"

namespace zigzag::comm {
namespace {

constexpr std::size_t kMessageBytes = std::size_t{16} << 10;
constexpr std::uint64_t kBarrier = std::numeric_limits<std::uint64_t>::max();
constexpr std::string_view kStep = "the exchange of a few bytes";
constexpr auto kLook = std::chrono::milliseconds(5);   // for a dead peer
constexpr auto kIdle = std::chrono::milliseconds(50);  // between calls of idle

/// What the first rank that fails says.
struct Failure {
  std::atomic<std::uint32_t> state{0};  // 0: none, 1: being written, 2: there
  std::int32_t rank = 0;
  char reason[496] = {};
};

/// A rank's part of the memory. Message n lies in data[n % 2]: whoever has come to message n has
/// read all of message n - 2.
struct Slot {
  alignas(64) std::atomic<std::uint64_t> arrived{0};
  std::uint64_t bytes[2];  // of the message; kBarrier: it is a barrier
  std::byte data[2][kMessageBytes];
};
static_assert(std::atomic<std::uint64_t>::is_always_lock_free &&
              std::atomic<std::uint32_t>::is_always_lock_free);

/// Where a process finds the memory, and the number that then stands in it.
struct Place {
  char path[64] = {};
  std::uint64_t mark = 0;
};

/// What the memory begins with; the ranks' slots follow.
struct Head {
  std::uint64_t mark = 0;
  Failure failure;
};

/// Memory that processes share, of a file that it takes over; unmapped and closed with its owner.
class Mapping {
 public:
  Mapping(int file, std::size_t bytes, bool create) : file_(file), bytes_(bytes) {
    if (file < 0) return;
    struct stat status {};
    // posix_fallocate: a file system that is full says so here and not by a signal later.
    const bool there = create ? posix_fallocate(file, 0, static_cast<off_t>(bytes)) == 0
                              : fstat(file, &status) == 0 && S_ISREG(status.st_mode) &&
                                    status.st_size == static_cast<off_t>(bytes);
    if (!there) return;
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory != MAP_FAILED) memory_ = memory;  // NOLINT: a macro of the system's
  }
  ~Mapping() {
    if (memory_ != nullptr) munmap(memory_, bytes_);
    close_file();
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  Head* head() const { return static_cast<Head*>(memory_); }
  Slot* slots() const {
    auto address = reinterpret_cast<std::uintptr_t>(memory_) + sizeof(Head);
    address = (address + alignof(Slot) - 1) / alignof(Slot) * alignof(Slot);
    return reinterpret_cast<Slot*>(address);  // NOLINT
  }
  /// The memory stays; nobody finds it through this process any more.
  void close_file() {
    if (file_ >= 0) close(std::exchange(file_, -1));
  }

 private:
  int file_;
  std::size_t bytes_;
  void* memory_ = nullptr;
};

std::uint64_t random_mark() {
  std::random_device random;
  return std::uint64_t{random()} << 32U | random();
}

/// A file of memory: with a name in /dev/shm, or without one, to be reached through this process.
int create_file(Place& place, bool named) {
  place.mark = random_mark();
  const auto write = [&](std::string_view text) {
    std::memcpy(place.path, text.data(), std::min(text.size(), sizeof(place.path) - 1));
  };
  if (named) {
    write(fmt::format("/zigzag-{}-{:016x}", getpid(), place.mark));
    return shm_open(place.path, O_RDWR | O_CREAT | O_EXCL, 0600);
  }
#ifdef MFD_CLOEXEC
  const int file = memfd_create("zigzag", MFD_CLOEXEC);
  write(fmt::format("/proc/{}/fd/{}", getpid(), file));
  return file;
#else
  return -1;
#endif
}

int open_file(const Place& place, bool named) {
  return named ? shm_open(place.path, O_RDWR, 0600) : open(place.path, O_RDWR | O_CLOEXEC);
}

class SharedMessages final : public Transport {
 public:
  SharedMessages(const Communicator& base, double timeout, std::function<void()> idle)
      : base_(base), timeout_(timeout), idle_(std::move(idle)) {}

  int rank() const override { return base_.rank(); }
  int size() const override { return base_.size(); }
  std::string_view name() const override { return base_.name(); }

  void all_gather(std::span<const std::byte> in, std::span<std::byte> out) override {
    if (!decided_) share();
    throw_failure();
    if (slots_ == nullptr) return base_.transport().all_gather(in, out);
    meet(in.size(), in.size() > kMessageBytes ? std::span<const std::byte>() : in);
    if (in.size() > kMessageBytes) return base_.transport().all_gather(in, out);
    for (int r = 0; r < size() && !in.empty(); ++r) {
      std::memcpy(out.data() + in.size() * static_cast<std::size_t>(r), slots_[r].data[round_ % 2],
                  in.size());
    }
  }

  void barrier() override {
    if (!decided_) share();
    throw_failure();
    if (slots_ == nullptr) return base_.transport().barrier();
    meet(kBarrier, {});
  }

  void abort(std::string_view reason) noexcept override {
    reason = cause_of(reason);
    std::uint32_t none = 0;
    if (failure_ != nullptr && failure_->state.compare_exchange_strong(none, 1)) {
      failure_->rank = rank();
      std::memcpy(failure_->reason, reason.data(),
                  std::min(reason.size(), sizeof(failure_->reason) - 1));
      failure_->state.store(2, std::memory_order_release);
    }
    base_.abort(reason);
  }
  void settle() noexcept override { base_.transport().settle(); }

  void gather(std::span<const TensorView> sources, std::span<const TensorView> destinations,
              const ExchangeTable& table, const Step& step, Queue queue) override {
    base_.transport().gather(sources, destinations, table, step, queue);
  }
  void reduce(std::span<const TensorView> partials, std::span<const TensorView> destinations,
              const ExchangeTable& table, const Step& step, Queue queue) override {
    base_.transport().reduce(partials, destinations, table, step, queue);
  }

 private:
  /// What a traceback of Python ends in; any other text as it is.
  static std::string_view cause_of(std::string_view reason) {
    if (!reason.starts_with("Traceback")) return reason;
    while (reason.ends_with('\n')) reason.remove_suffix(1);
    const std::size_t blank = reason.rfind("\n\n");
    const std::size_t line = reason.rfind('\n');
    return reason.substr(blank != std::string_view::npos ? blank + 2 : line + 1);
  }

  static std::string text_of(std::uint64_t bytes) {
    return bytes == kBarrier ? "came to a barrier" : fmt::format("gave {} bytes", bytes);
  }

  /// Gives this rank's message, waits for the others' and throws when they are of another kind or
  /// size: then the ranks make different calls.
  void meet(std::uint64_t bytes, std::span<const std::byte> data) {
    const std::uint64_t half = ++round_ % 2;
    Slot& mine = slots_[rank()];
    mine.bytes[half] = bytes;
    if (!data.empty()) std::memcpy(mine.data[half], data.data(), data.size());
    mine.arrived.store(round_, std::memory_order_release);
    const Deadline deadline(timeout_);
    for (int r = 0; r < size(); ++r) wait_for(r, deadline);
    for (int r = 1; r < size(); ++r) {
      if (slots_[r].bytes[half] == slots_[0].bytes[half]) continue;
      throw CommunicationError(fmt::format(
          "rank {} stopped in {}: rank {} {} while rank 0 {}; all ranks must make the same calls",
          rank(), kStep, r, text_of(slots_[r].bytes[half]), text_of(slots_[0].bytes[half])));
    }
  }

  /// Maps memory that all ranks share, or finds that there is none for them.
  void share() {
    Transport& transport = base_.transport();
    const std::vector<ProcessIdentity> all = comm::all_gather(transport, this_process());
    bool together = true;
    for (std::size_t r = 0; r < all.size(); ++r) {
      together = together && all[r].machine != 0 && all[r].machine == all[0].machine;
      for (std::size_t s = 0; s < r; ++s) together = together && all[r].pid != all[s].pid;
    }
    // Memory without a name leaves nothing behind, whenever a rank dies. Where processes may not
    // look at one another's files, a name serves.
    if (together && (map(false) || map(true))) watch_ = PeerWatch(all, rank());
    decided_ = true;
  }

  /// True on all ranks or on none: /dev/shm may be full or absent.
  bool map(bool named) {
    Transport& transport = base_.transport();
    const std::size_t bytes =
        sizeof(Head) + alignof(Slot) + sizeof(Slot) * static_cast<std::size_t>(size());
    Place place;
    // The name goes when all have mapped the memory, or when one of them could not say so.
    const std::unique_ptr<Place, void (*)(Place*)> unlink(
        named && rank() == 0 ? &place : nullptr, [](Place* used) { shm_unlink(used->path); });
    std::unique_ptr<Mapping> mapping;
    if (rank() == 0) {
      mapping = std::make_unique<Mapping>(create_file(place, named), bytes, true);
      if (mapping->head() != nullptr) {
        new (mapping->head()) Head;
        mapping->head()->mark = place.mark;
        for (int r = 0; r < size(); ++r) {
          new (&mapping->slots()[r].arrived) std::atomic<std::uint64_t>(0);
        }
      }
    }
    place = comm::all_gather(transport, place)[0];
    if (rank() != 0) mapping = std::make_unique<Mapping>(open_file(place, named), bytes, false);
    const bool mapped = mapping->head() != nullptr && mapping->head()->mark == place.mark;
    const std::vector<std::uint8_t> every =
        comm::all_gather(transport, static_cast<std::uint8_t>(mapped));
    mapping->close_file();
    if (std::find(every.begin(), every.end(), 0) != every.end()) return false;
    mapping_ = std::move(mapping);
    failure_ = &mapping_->head()->failure;
    slots_ = mapping_->slots();
    return true;
  }

  bool arrived(int peer) const {
    return slots_[peer].arrived.load(std::memory_order_acquire) >= round_;
  }

  void throw_failure() const {
    if (failure_ == nullptr || failure_->state.load(std::memory_order_acquire) != 2) return;
    throw_peer_failed(rank(), failure_->rank, kStep, failure_->reason);
  }

  /// Spins for some microseconds, then lets others run, then sleeps: peers on a GPU come within
  /// microseconds of one another, and ranks that share cores must not keep each other from them.
  void wait_for(int peer, const Deadline& deadline) {
    for (int i = 0; i < 2000; ++i) {
      if (arrived(peer)) return;
    }
    auto looked = std::chrono::steady_clock::now();
    auto idled = looked;
    for (int i = 0; !arrived(peer); ++i) {
      if (i < 200) {
        sched_yield();
        continue;
      }
      std::this_thread::sleep_for(std::chrono::microseconds(i < 400 ? 20 : 200));
      const auto now = std::chrono::steady_clock::now();
      if (now - looked < kLook) continue;
      looked = now;
      throw_failure();
      if (watch_.dead(peer) && !arrived(peer)) {
        throw CommunicationError(fmt::format("rank {} stopped in {}: {} has died", rank(), kStep,
                                             watch_.describe(peer)));
      }
      if (deadline.passed()) give_up();
      if (now - idled >= kIdle) {
        idled = now;
        if (idle_) idle_();
      }
    }
  }

  [[noreturn]] void give_up() {
    std::vector<int> missing;
    for (int r = 0; r < size(); ++r) {
      if (!arrived(r)) missing.push_back(r);
    }
    try {
      throw_timeout(rank(), missing, kStep, timeout_);
    } catch (const Timeout& timeout) {
      abort(timeout.what());  // whoever comes late finds this rank's message, but not this rank
      throw;
    }
  }

  Communicator base_;
  bool decided_ = false;
  std::unique_ptr<Mapping> mapping_;
  Failure* failure_ = nullptr;
  Slot* slots_ = nullptr;  // null: no shared memory
  PeerWatch watch_;
  double timeout_;
  std::function<void()> idle_;
  std::uint64_t round_ = 0;
};

}  // namespace

Communicator share_messages(const Communicator& base, double timeout, std::function<void()> idle) {
  if (base.size() == 1) return base;
  return Communicator(std::make_shared<SharedMessages>(base, timeout, std::move(idle)));
}

}  // namespace zigzag::comm
