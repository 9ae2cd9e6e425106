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

struct Name {
  char text[64] = {};
};

/// Memory that processes share; unmapped with its owner.
class Mapping {
 public:
  Mapping(const char* name, std::size_t bytes, bool create) : bytes_(bytes) {
    const int file = shm_open(name, O_RDWR | (create ? O_CREAT | O_EXCL : 0), 0600);
    if (file < 0) return;
    // posix_fallocate: a file system that is full says so here and not by a signal later.
    if (!create || posix_fallocate(file, 0, static_cast<off_t>(bytes)) == 0) {
      void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
      if (memory != MAP_FAILED) memory_ = memory;  // NOLINT: a macro of the system's
    }
    close(file);
  }
  ~Mapping() {
    if (memory_ != nullptr) munmap(memory_, bytes_);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  void* memory() const { return memory_; }

 private:
  std::size_t bytes_;
  void* memory_ = nullptr;
};

Name make_name() {
  std::random_device random;
  Name name;
  fmt::format_to_n(name.text, sizeof(name.text) - 1, "/zigzag-{}-{:08x}{:08x}", getpid(), random(),
                   random());
  return name;
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
    if (together) map(all);
    decided_ = true;
  }

  void map(std::span<const ProcessIdentity> processes) {
    Transport& transport = base_.transport();
    const std::size_t bytes =
        sizeof(Failure) + alignof(Slot) + sizeof(Slot) * static_cast<std::size_t>(size());
    Name name;
    // The name goes when all have mapped the memory, or when one of them could not say so.
    const std::unique_ptr<Name, void (*)(Name*)> unlink(&name, [](Name* used) {
      if (used->text[0] != '\0') (void)shm_unlink(used->text);
    });
    std::unique_ptr<Mapping> mapping;
    if (rank() == 0) {
      name = make_name();
      mapping = std::make_unique<Mapping>(name.text, bytes, true);
      if (mapping->memory() != nullptr) {
        new (mapping->memory()) Failure;
        Slot* const slots = slots_of(*mapping);
        for (int r = 0; r < size(); ++r) new (&slots[r].arrived) std::atomic<std::uint64_t>(0);
      }
    }
    const Name given = comm::all_gather(transport, name)[0];
    if (rank() != 0) mapping = std::make_unique<Mapping>(given.text, bytes, false);
    // Where one rank could not map it, /dev/shm being full or absent, nobody uses it.
    const std::uint8_t mapped = mapping->memory() != nullptr ? 1 : 0;
    const std::vector<std::uint8_t> every = comm::all_gather(transport, mapped);
    if (std::find(every.begin(), every.end(), 0) != every.end()) return;
    mapping_ = std::move(mapping);
    failure_ = static_cast<Failure*>(mapping_->memory());
    slots_ = slots_of(*mapping_);
    watch_ = PeerWatch(processes, rank());
  }

  static Slot* slots_of(const Mapping& mapping) {
    auto address = reinterpret_cast<std::uintptr_t>(mapping.memory()) + sizeof(Failure);
    address = (address + alignof(Slot) - 1) / alignof(Slot) * alignof(Slot);
    return reinterpret_cast<Slot*>(address);  // NOLINT
  }

  bool arrived(int peer) const {
    return slots_[peer].arrived.load(std::memory_order_acquire) >= round_;
  }

  void throw_failure() const {
    if (failure_ == nullptr || failure_->state.load(std::memory_order_acquire) != 2) return;
    throw CommunicationError(fmt::format("rank {} stopped in {}: rank {} failed: {}", rank(), kStep,
                                         failure_->rank, failure_->reason));
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
