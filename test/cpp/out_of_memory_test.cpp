// Every allocation of a call of rank threads refused in turn, once or from then on: all ranks end
// with an error, or all with the right results; nobody waits.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "zigzag/attention.h"
#include "zigzag/error.h"

namespace {

// More than a string holds in itself.
struct LongBadAlloc : std::bad_alloc {
  const char* what() const noexcept override {
    return "an allocator has no memory left for the tasks of this call";
  }
};

constexpr std::int64_t kNever = -1;
std::atomic<std::int64_t> allocations_left{kNever};
std::atomic<bool> refuse_for_ever{false};
std::atomic<bool> refused{false};

void refuse_or_go_on() {
  if (allocations_left.load() == kNever) return;
  const std::int64_t left = allocations_left.fetch_sub(1);
  if (left > 0) return;
  allocations_left = left == 0 && refuse_for_ever ? 0 : kNever;
  if (left < 0) return;
  refused = true;
  throw LongBadAlloc();
}

}  // namespace

// NOLINTBEGIN(misc-new-delete-overloads, cppcoreguidelines-no-malloc)
[[gnu::noinline]] void* operator new(std::size_t bytes) {
  refuse_or_go_on();
  void* memory = std::malloc(bytes == 0 ? 1 : bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t /*bytes*/) noexcept {
  std::free(memory);
}
// NOLINTEND(misc-new-delete-overloads, cppcoreguidelines-no-malloc)

namespace zigzag {
namespace {

using std::int64_t;

constexpr int kRanks = 3;
constexpr int64_t kHeads = 2;
constexpr int64_t kDim = 16;

struct Rank {
  int64_t rows = 0;
  std::vector<float> q, out, dq, dk, dv, lse;

  explicit Rank(int64_t count)
      : rows(count),
        q(static_cast<std::size_t>(count * kHeads * kDim), 0.5f),
        out(q.size()),
        dq(q.size()),
        dk(q.size()),
        dv(q.size()),
        lse(static_cast<std::size_t>(count * kHeads)) {
    for (std::size_t i = 0; i < q.size(); ++i) q[i] = std::sin(static_cast<float>(i));
  }
  TensorView view(std::vector<float>& x) const {
    return TensorView::contiguous(x.data(), DType::kFloat32, {rows, kHeads, kDim});
  }
  TensorView lse_view() {
    return TensorView::contiguous(lse.data(), DType::kFloat32, {rows, kHeads});
  }
  bool operator==(const Rank&) const = default;
};

// A rank's tensors as views, which take memory of their own.
struct Views {
  TensorView q, out, lse, dq, dk, dv;

  explicit Views(Rank& rank)
      : q(rank.view(rank.q)),
        out(rank.view(rank.out)),
        lse(rank.lse_view()),
        dq(rank.view(rank.dq)),
        dk(rank.view(rank.dk)),
        dv(rank.view(rank.dv)) {}

  void call(const Plan& plan, const Communicator& communicator) const {
    forward(q, q, q, plan, communicator, {}, out, lse);
    backward(q, q, q, q, out, lse, plan, communicator, {}, dq, dk, dv);
  }
};

enum class End : std::uint8_t { kWell, kOutOfMemory, kTold, kTimeout, kOther };

// Runs the ranks, which keep their communicators until all have ended.
std::vector<End> run(std::vector<Rank>& ranks, const Plan& plan, int64_t allocations) {
  const std::vector<Communicator> group = Communicator::threads(kRanks);
  std::vector<End> ends(kRanks, End::kOther);
  std::vector<std::thread> threads;
  std::atomic<int> ended{0};
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  for (std::size_t r = 0; r < kRanks; ++r) {
    threads.emplace_back([&, r] {
      const Views views(ranks[r]);
      ++ready;
      while (!go) std::this_thread::yield();
      try {
        views.call(plan, group[r]);
        ends[r] = End::kWell;
      } catch (const std::bad_alloc&) {
        ends[r] = End::kOutOfMemory;
      } catch (const CommunicationError&) {
        ends[r] = End::kTold;
      } catch (const Timeout&) {
        ends[r] = End::kTimeout;
      } catch (...) {
      }
      if (++ended == kRanks) allocations_left = kNever;
    });
  }
  while (ready < kRanks) std::this_thread::yield();
  allocations_left = allocations;
  go = true;
  for (std::thread& thread : threads) thread.join();
  return ends;
}

TEST(OutOfMemory, AllRanksEndAlike) {
  ASSERT_EQ(setenv("ZIGZAG_TIMEOUT_S", "20", 1), 0);
  const Plan plan = Plan::from_lengths(std::vector<int64_t>{150, 0, 31, 1}, kRanks);
  std::vector<Rank> ranks;
  for (int r = 0; r < kRanks; ++r) ranks.emplace_back(plan.local_tokens(r));
  std::vector<Rank> good = ranks;
  ASSERT_EQ(run(good, plan, kNever), std::vector<End>(kRanks, End::kWell));
  for (const bool for_ever : {false, true}) {
    refuse_for_ever = for_ever;
    refused = true;
    for (int64_t allocations = 0; refused; ++allocations) {
      SCOPED_TRACE(std::to_string(allocations) + (for_ever ? ", for ever" : ", once"));
      refused = false;
      std::vector<Rank> tried = ranks;
      const std::vector<End> ends = run(tried, plan, allocations);
      for (std::size_t r = 0; r < kRanks; ++r) {
        EXPECT_NE(ends[r], End::kTimeout);
        EXPECT_NE(ends[r], End::kOther);
        EXPECT_EQ(ends[r] == End::kWell, ends[0] == End::kWell);
        EXPECT_TRUE(ends[r] != End::kWell || tried[r] == good[r]);
      }
      if (testing::Test::HasFailure()) return;
    }
  }
}

}  // namespace
}  // namespace zigzag
