#include <cstddef>
#include <cstring>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "comm/agree.h"
#include "comm_agree_cases.h"
#include "comm_groups.h"
#include "comm_model.h"
#include "zigzag/communicator.h"

namespace zigzag::test {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

void expect_no_failure(const std::vector<std::string>& outcomes, const std::string& where) {
  for (std::size_t r = 0; r < outcomes.size(); ++r) {
    EXPECT_EQ(outcomes[r], "") << where << ", rank " << r << " of " << outcomes.size();
  }
}

// What every transport does alike. comm_mpi_test runs the same checks on MPI's processes.
template <typename Group>
class CommConformance : public ::testing::Test {
 protected:
  template <typename Check>
  void run_cases(const Check& check) {
    for (const int size : Group::sizes()) {
      for (const ExchangeCase& c : exchange_cases(size)) {
        const auto outcomes = Group::run(size, [&](const Communicator& communicator) {
          const std::string difference = check(communicator, c);
          if (!difference.empty()) throw std::runtime_error(difference);
        });
        expect_no_failure(outcomes, c.name);
      }
    }
  }
};

using Groups = ::testing::Types<SelfGroup, ThreadsGroup, CallbackGroup>;
TYPED_TEST_SUITE(CommConformance, Groups);

TYPED_TEST(CommConformance, GatherPutsEveryRowInItsPlace) { this->run_cases(check_gather); }

TYPED_TEST(CommConformance, ReduceAddsInRankOrderAndRoundsOnce) { this->run_cases(check_reduce); }

TYPED_TEST(CommConformance, AllGatherReturnsBytesInRankOrder) {
  for (const int size : TypeParam::sizes()) {
    for (const std::size_t bytes : {std::size_t{0}, std::size_t{1}, std::size_t{100000}}) {
      const auto outcomes = TypeParam::run(size, [&](const Communicator& communicator) {
        const std::vector<std::byte> mine(bytes, static_cast<std::byte>(communicator.rank() + 1));
        const std::vector<std::byte> all = communicator.all_gather(mine);
        ASSERT_EQ(all.size(), bytes * static_cast<std::size_t>(size));
        for (std::size_t i = 0; i < all.size(); ++i) {
          ASSERT_EQ(static_cast<std::size_t>(all[i]), i / bytes + 1);
        }
      });
      expect_no_failure(outcomes, "all_gather");
    }
  }
}

TYPED_TEST(CommConformance, RanksKnowTheirPlace) {
  for (const int size : TypeParam::sizes()) {
    std::vector<int> seen(static_cast<std::size_t>(size), 0);
    const auto outcomes = TypeParam::run(size, [&](const Communicator& communicator) {
      EXPECT_EQ(communicator.size(), size);
      seen[static_cast<std::size_t>(communicator.rank())] += 1;
      communicator.barrier();
      const Communicator copy = communicator;
      copy.barrier();
    });
    expect_no_failure(outcomes, "barrier");
    EXPECT_EQ(seen, std::vector<int>(static_cast<std::size_t>(size), 1));
  }
}

TYPED_TEST(CommConformance, AgreementPassesWhenAllAreEqual) {
  for (const int size : TypeParam::sizes()) {
    const auto outcomes = TypeParam::run(size, [&](const Communicator& communicator) {
      comm::agree(communicator.transport(), agreed(size));
    });
    expect_no_failure(outcomes, "agree");
  }
}

TYPED_TEST(CommConformance, EveryRankHearsWhatDiffers) {
  for (const int size : TypeParam::sizes()) {
    if (size == 1) continue;
    for (const Disagreement& d : disagreements()) {
      const int odd = size - 1;
      const auto outcomes = TypeParam::run(size, [&](const Communicator& communicator) {
        comm::Agreement mine = agreed(size);
        if (communicator.rank() == odd) d.change(mine);
        comm::agree(communicator.transport(), mine);
      });
      for (const std::string& outcome : outcomes) {
        EXPECT_THAT(outcome, StartsWith("CommunicationError: rank " + std::to_string(odd)))
            << d.name;
        EXPECT_THAT(outcome, HasSubstr("rank 0 ")) << d.name;
        EXPECT_THAT(outcome, HasSubstr("all ranks must pass the same")) << d.name;
        for (const std::string& word : d.words) EXPECT_THAT(outcome, HasSubstr(word)) << d.name;
        EXPECT_EQ(outcome, outcomes[0]) << "the sentence is the same on every rank";
      }
    }
  }
}

TYPED_TEST(CommConformance, ARankWithInvalidArgumentsStopsAll) {
  for (const int size : TypeParam::sizes()) {
    const int bad = size / 2;
    const auto outcomes = TypeParam::run(size, [&](const Communicator& communicator) {
      comm::Agreement mine = agreed(size);
      if (communicator.rank() == bad) mine = {.error = "head_dim is 7; it must be 8 to 256"};
      comm::agree(communicator.transport(), mine);
    });
    for (int r = 0; r < size; ++r) {
      const std::string& outcome = outcomes[static_cast<std::size_t>(r)];
      if (r == bad) {
        EXPECT_EQ(outcome, "InvalidArgument: head_dim is 7; it must be 8 to 256");
      } else {
        EXPECT_THAT(outcome, StartsWith("CommunicationError: rank " + std::to_string(bad)));
        EXPECT_THAT(outcome, HasSubstr("head_dim is 7; it must be 8 to 256"));
      }
    }
  }
}

TYPED_TEST(CommConformance, ViewsThatDoNotFitAreRefused) {
  const auto outcomes = TypeParam::run(1, [](const Communicator& communicator) {
    const std::int64_t lengths[] = {8};
    const Plan plan = Plan::from_lengths(lengths, 1);
    const comm::ExchangeTable table = comm::make_exchange_table(plan, 0, {});
    std::vector<float> memory(64);
    const auto view = [&](std::int64_t rows, DType dtype) {
      return TensorView::contiguous(memory.data(), dtype, {rows, 1, 4});
    };
    const auto gather = [&](const TensorView& from, const TensorView& to) {
      communicator.transport().gather({&from, 1}, {&to, 1}, table, {"gather"}, {});
    };
    const auto reduce = [&](const TensorView& from, const TensorView& to) {
      communicator.transport().reduce({&from, 1}, {&to, 1}, table, {"reduction"}, {});
    };
    EXPECT_THROW(gather(view(7, DType::kFloat32), view(8, DType::kFloat32)), std::invalid_argument);
    EXPECT_THROW(gather(view(8, DType::kFloat32), view(9, DType::kFloat32)), std::invalid_argument);
    EXPECT_THROW(gather(view(8, DType::kFloat32), view(8, DType::kFloat16)), std::invalid_argument);
    EXPECT_THROW(reduce(view(8, DType::kFloat16), view(8, DType::kFloat16)), std::invalid_argument);
    EXPECT_THROW(reduce(view(8, DType::kFloat32), view(8, DType::kInt32)), std::invalid_argument);
    TensorView device = view(8, DType::kFloat32);
    device.device = {DeviceType::kCuda, 0};
    EXPECT_THROW(gather(device, view(8, DType::kFloat32)), std::invalid_argument);
    TensorView strided = view(4, DType::kFloat32);
    strided.shape = {8, 1, 2};
    strided.strides = {4, 4, 2};
    EXPECT_THROW(gather(strided, TensorView::contiguous(memory.data(), DType::kFloat32, {8, 1, 2})),
                 std::invalid_argument);
  });
  expect_no_failure(outcomes, "refusals");
}

TEST(CommTransports, GiveTheSameBits) {
  for (const int size : {2, 4}) {
    for (const ExchangeCase& c : exchange_cases(size)) {
      std::vector<std::uint64_t> first(static_cast<std::size_t>(size));
      std::vector<std::uint64_t> second(static_cast<std::size_t>(size));
      const auto into = [&](std::vector<std::uint64_t>& digests) {
        return [&](const Communicator& communicator) {
          digests[static_cast<std::size_t>(communicator.rank())] = exchange_digest(communicator, c);
        };
      };
      expect_no_failure(ThreadsGroup::run(size, into(first)), c.name);
      expect_no_failure(CallbackGroup::run(size, into(second)), c.name);
      EXPECT_EQ(first, second) << c.name;
    }
  }
}

}  // namespace
}  // namespace zigzag::test
