#include <atomic>
#include <chrono>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "comm_groups.h"
#include "comm_model.h"
#include "support/ranks.h"
#include "zigzag/communicator.h"
#include "zigzag/error.h"

namespace zigzag::test {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::StartsWith;
using namespace std::chrono_literals;

// Sets ZIGZAG_TIMEOUT_S for a test.
class TimeoutVariable {
 public:
  explicit TimeoutVariable(const char* value) { setenv("ZIGZAG_TIMEOUT_S", value, 1); }
  ~TimeoutVariable() { unsetenv("ZIGZAG_TIMEOUT_S"); }
};

// Runs a body on threads that all keep their communicator until the last has ended, so that a
// rank that stays away is a silent one and not one that left.
std::vector<std::string> run_and_stay(int size, const RankBody& body) {
  const std::vector<Communicator> group = Communicator::threads(size);
  std::vector<std::string> outcomes(group.size());
  std::vector<std::thread> threads;
  for (std::size_t r = 0; r < group.size(); ++r) {
    threads.emplace_back([&, r] { outcomes[r] = outcome(body, group[r]); });
  }
  for (std::thread& thread : threads) thread.join();
  return outcomes;
}

ExchangeCase small_case() { return {.name = "small", .lengths = {40, 3}, .mask = {}}; }

TEST(CommTimeout, VariableIsReadAndNonsenseRefused) {
  EXPECT_EQ(timeout_seconds(), 300);
  {
    const TimeoutVariable variable("0.25");
    EXPECT_EQ(timeout_seconds(), 0.25);
  }
  for (const char* nonsense : {"0", "-1", "x", "1s", "nan", "inf", " "}) {
    const TimeoutVariable variable(nonsense);
    EXPECT_THROW(timeout_seconds(), InvalidArgument) << nonsense;
    EXPECT_THROW(Communicator::threads(2), InvalidArgument) << nonsense;
  }
}

TEST(CommTimeout, NamesRanksThatNeverCome) {
  const TimeoutVariable variable("0.3");
  const auto start = std::chrono::steady_clock::now();
  const auto outcomes = run_and_stay(4, [](const Communicator& communicator) {
    if (communicator.rank() == 1 || communicator.rank() == 3) return;
    check_gather(communicator, small_case());
  });
  EXPECT_LT(std::chrono::steady_clock::now() - start, 10s);
  for (const int r : {0, 2}) {
    EXPECT_EQ(outcomes[static_cast<std::size_t>(r)],
              "Timeout: rank " + std::to_string(r) +
                  " waited 0.3 s for ranks 1 and 3 in gather of K and V, stage 1 of 2; "
                  "ZIGZAG_TIMEOUT_S sets the limit");
  }
}

TEST(CommTimeout, ALateRankHearsThatOthersGaveUp) {
  const TimeoutVariable variable("0.2");
  std::atomic<bool> gave_up{false};
  const auto outcomes = run_and_stay(2, [&](const Communicator& communicator) {
    if (communicator.rank() == 1) {
      while (!gave_up) std::this_thread::sleep_for(1ms);
    }
    try {
      communicator.barrier();
    } catch (...) {
      gave_up = true;
      throw;
    }
  });
  EXPECT_THAT(outcomes[0], StartsWith("Timeout: rank 0 waited 0.2 s for rank 1 in barrier"));
  EXPECT_THAT(outcomes[1], AllOf(StartsWith("CommunicationError: rank 1 came to barrier after"),
                                 HasSubstr("rank 0 had given up waiting for rank 1")));
}

TEST(CommTimeout, ARankThatGaveUpAndCallsAgainHearsSo) {
  const TimeoutVariable variable("0.2");
  const auto outcomes = run_and_stay(2, [&](const Communicator& communicator) {
    if (communicator.rank() == 1) return;
    EXPECT_THROW(communicator.barrier(), Timeout);
    communicator.barrier();
  });
  EXPECT_EQ(
      outcomes[0],
      "CommunicationError: rank 0 cannot take part in barrier: the group ended when this rank "
      "gave up waiting for rank 1 in barrier (0.2 s)");
}

TEST(CommAbort, WakesWaitingRanksWithTheReason) {
  const auto outcomes = run_and_stay(3, [](const Communicator& communicator) {
    if (communicator.rank() == 2) {
      std::this_thread::sleep_for(20ms);
      communicator.abort("out of memory: 5 GB");
      throw std::runtime_error("own");
    }
    check_gather(communicator, small_case());
  });
  for (const int r : {0, 1}) {
    EXPECT_EQ(
        outcomes[static_cast<std::size_t>(r)],
        "CommunicationError: rank " + std::to_string(r) +
            " stopped in gather of K and V, stage 1 of 2: rank 2 failed: out of memory: 5 GB");
  }
  EXPECT_EQ(outcomes[2], "exception: own");
}

TEST(CommAbort, ALoanEndsOnlyWhenAllHaveEndedIt) {
  std::atomic<int> ended{0};
  const auto outcomes = run_and_stay(3, [&](const Communicator& communicator) {
    const auto loan = communicator.transport().lend({}, {.name = "a loan"});
    if (communicator.rank() == 0) {
      std::this_thread::sleep_for(20ms);
      EXPECT_EQ(ended, 0);
    }
    loan->end();
    ++ended;
  });
  EXPECT_THAT(outcomes, testing::Each(""));
}

TEST(CommAbort, RanksThatLendHearOfTheFailureOfTheOneThatComputes) {
  const auto outcomes = run_and_stay(3, [](const Communicator& communicator) {
    const auto loan = communicator.transport().lend({}, {.name = "a loan"});
    if (communicator.rank() == 0) {
      communicator.abort("out of memory: 5 GB");
      throw std::runtime_error("own");
    }
    loan->end();
  });
  EXPECT_EQ(outcomes[0], "exception: own");
  for (const int r : {1, 2}) {
    EXPECT_EQ(outcomes[static_cast<std::size_t>(r)],
              "CommunicationError: rank " + std::to_string(r) +
                  " stopped in a loan: rank 0 failed: out of memory: 5 GB");
  }
}

TEST(CommAbort, LaterCallsFailAtOnce) {
  const auto outcomes = run_and_stay(2, [](const Communicator& communicator) {
    if (communicator.rank() == 1) communicator.abort("broken");
    for (int i = 0; i < 3; ++i) {
      EXPECT_THROW(communicator.barrier(), CommunicationError);
    }
    communicator.barrier();
  });
  EXPECT_THAT(outcomes[0], HasSubstr("rank 1 failed: broken"));
  EXPECT_EQ(
      outcomes[1],
      "CommunicationError: rank 1 cannot take part in barrier: the group ended when this rank "
      "failed: broken");
}

TEST(CommLeave, ARankThatEndsIsNoticedAtOnce) {
  const auto start = std::chrono::steady_clock::now();
  const auto outcomes = collect_ranks(3, [](const Communicator& communicator) {
    communicator.barrier();
    if (communicator.rank() == 0) return;
    communicator.barrier();
  });
  EXPECT_LT(std::chrono::steady_clock::now() - start, 60s);
  EXPECT_EQ(outcomes[0], "");
  for (const int r : {1, 2}) {
    EXPECT_THAT(outcomes[static_cast<std::size_t>(r)],
                HasSubstr("in barrier: rank 0 failed: it left the group before barrier"));
  }
}

TEST(CommMismatch, DifferentCallsAreNamedOnEveryRank) {
  const auto outcomes = run_and_stay(3, [](const Communicator& communicator) {
    if (communicator.rank() == 1) {
      communicator.barrier();
    } else {
      communicator.all_gather({});
    }
  });
  for (const std::string& outcome : outcomes) {
    EXPECT_THAT(outcome, AllOf(StartsWith("CommunicationError: "),
                               HasSubstr("rank 1 came to barrier while rank 0 came to")));
  }
}

TEST(CommMismatch, DifferentBytesAndTensorsAreNamed) {
  auto outcomes = run_and_stay(2, [](const Communicator& communicator) {
    communicator.all_gather(std::vector<std::byte>(communicator.rank() == 0 ? 4 : 8));
  });
  for (const std::string& outcome : outcomes) {
    EXPECT_THAT(outcome, HasSubstr("rank 1 gave 8 bytes while rank 0 gave 4"));
  }
  outcomes = run_and_stay(2, [](const Communicator& communicator) {
    ExchangeCase c = small_case();
    if (communicator.rank() == 1) c.dtype = DType::kBFloat16;
    check_gather(communicator, c);
  });
  for (const std::string& outcome : outcomes) {
    EXPECT_THAT(outcome, HasSubstr("rank 1 gave bfloat16"));
  }
}

TEST(CommCallback, ExceptionsOfTheCallerPassUnchanged) {
  struct Own : std::runtime_error {
    using std::runtime_error::runtime_error;
  };
  CallbackCollectives collectives;
  collectives.rank = 0;
  collectives.size = 2;
  collectives.all_gather = [](const void*, std::size_t, void*) { throw Own("gone"); };
  collectives.all_to_all = [](const void*, std::span<const std::int64_t>, void*,
                              std::span<const std::int64_t>) { throw Own("away"); };
  const Communicator communicator = Communicator::callback(collectives);
  EXPECT_THROW(communicator.barrier(), Own);
  EXPECT_THROW(check_gather(communicator, small_case()), Own);
  EXPECT_THROW(check_reduce(communicator, small_case()), Own);
}

TEST(CommCallback, NonsenseIsRefused) {
  CallbackCollectives none;
  EXPECT_THROW(Communicator::callback(none), InvalidArgument);
  none.all_gather = [](const void*, std::size_t, void*) {};
  EXPECT_THROW(Communicator::callback(none), InvalidArgument);
  none.all_to_all = [](const void*, std::span<const std::int64_t>, void*,
                       std::span<const std::int64_t>) {};
  EXPECT_NO_THROW(Communicator::callback(none));
  for (const auto& [rank, size] : {std::pair{-1, 2}, {2, 2}, {0, 0}}) {
    none.rank = rank;
    none.size = size;
    EXPECT_THROW(Communicator::callback(none), InvalidArgument) << rank << " of " << size;
  }
}

TEST(CommThreads, NonsenseIsRefused) {
  EXPECT_THROW(Communicator::threads(0), InvalidArgument);
  EXPECT_THROW(Communicator::threads(-3), InvalidArgument);
  EXPECT_THROW(Communicator(nullptr), InvalidArgument);
}

// Ranks that come at random moments, again and again through the same buffers: a rank that reads
// too late, or a source reused too early, breaks the bytes. The suite runs under ThreadSanitizer.
TEST(CommStress, RanksAtRandomMoments) {
  const auto outcomes = collect_ranks(5, [](const Communicator& plain) {
    const Communicator communicator = delayed(plain, 17);
    for (std::int64_t i = 0; i < 25; ++i) {
      const ExchangeCase c{.name = "stress", .lengths = {30 + i, 1, 0, 7 * i, 64}, .mask = {}};
      std::string difference = check_gather(communicator, c);
      if (difference.empty()) difference = check_reduce(communicator, c);
      if (!difference.empty()) throw std::runtime_error(difference);
    }
  });
  for (const std::string& outcome : outcomes) EXPECT_EQ(outcome, "");
}

}  // namespace
}  // namespace zigzag::test
