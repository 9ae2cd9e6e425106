#include <cstdio>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <mpi.h>

#include "comm/agree.h"
#include "comm/mpi_environment.h"
#include "comm_agree_cases.h"
#include "comm_groups.h"
#include "comm_model.h"
#include "zigzag/communicator.h"
#include "zigzag/error.h"

// The conformance checks of comm_conformance_test on MPI's processes: run under mpirun -n N. Every
// process runs every test in the same order.
namespace zigzag::test {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

class CommMpi : public ::testing::Test {
 protected:
  // A fresh group a test, as a program that makes several would have.
  Communicator communicator_ = Communicator::mpi();
};

TEST_F(CommMpi, KnowsItsPlace) {
  int rank = -1;
  int size = -1;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  EXPECT_EQ(communicator_.rank(), rank);
  EXPECT_EQ(communicator_.size(), size);
  EXPECT_EQ(communicator_.name(), "mpi");
  communicator_.barrier();
}

TEST_F(CommMpi, GatherPutsEveryRowInItsPlace) {
  for (const ExchangeCase& c : exchange_cases(communicator_.size())) {
    EXPECT_EQ(check_gather(communicator_, c), "");
  }
}

TEST_F(CommMpi, ReduceAddsInRankOrderAndRoundsOnce) {
  for (const ExchangeCase& c : exchange_cases(communicator_.size())) {
    EXPECT_EQ(check_reduce(communicator_, c), "");
  }
}

TEST_F(CommMpi, GivesTheBitsOfThreads) {
  const int size = communicator_.size();
  for (const ExchangeCase& c : exchange_cases(size)) {
    const std::uint64_t mine = exchange_digest(communicator_, c);
    std::vector<std::uint64_t> all(static_cast<std::size_t>(size));
    communicator_.transport().all_gather(std::as_bytes(std::span(&mine, 1)),
                                         std::as_writable_bytes(std::span(all)));
    // Each process plays the whole group of threads once more: no need to share the work.
    if (communicator_.rank() != 0) continue;
    std::vector<std::uint64_t> threads(static_cast<std::size_t>(size));
    ThreadsGroup::run(size, [&](const Communicator& other) {
      threads[static_cast<std::size_t>(other.rank())] = exchange_digest(other, c);
    });
    EXPECT_EQ(all, threads) << c.name;
  }
}

TEST_F(CommMpi, AllGatherReturnsBytesInRankOrder) {
  for (const std::size_t bytes : {std::size_t{0}, std::size_t{1}, std::size_t{300000}}) {
    const std::vector<std::byte> mine(bytes, static_cast<std::byte>(communicator_.rank() + 1));
    const std::vector<std::byte> all = communicator_.all_gather(mine);
    ASSERT_EQ(all.size(), bytes * static_cast<std::size_t>(communicator_.size()));
    bool right = true;
    for (std::size_t i = 0; i < all.size(); ++i) {
      right = right && static_cast<std::size_t>(all[i]) == i / bytes + 1;
    }
    EXPECT_TRUE(right);
  }
}

TEST_F(CommMpi, EveryRankHearsWhatDiffers) {
  const int size = communicator_.size();
  if (size == 1) return;
  for (const Disagreement& d : disagreements()) {
    const std::string got = outcome(
        [&](const Communicator& communicator) {
          comm::Agreement mine = agreed(size);
          if (communicator.rank() == size - 1) d.change(mine);
          comm::agree(communicator.transport(), mine);
        },
        communicator_);
    EXPECT_THAT(got, StartsWith("CommunicationError: rank " + std::to_string(size - 1))) << d.name;
    for (const std::string& word : d.words) EXPECT_THAT(got, HasSubstr(word)) << d.name;
  }
  // The group still works: every rank threw, none was left behind.
  comm::agree(communicator_.transport(), agreed(size));
}

TEST_F(CommMpi, GroupsSmallerThanTheWorldWork) {
  int world_rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &world_rank);
  MPI_Comm half = MPI_COMM_NULL;
  MPI_Comm_split(MPI_COMM_WORLD, world_rank % 2, -world_rank, &half);
  {
    const Communicator group = Communicator::mpi(&half);
    EXPECT_EQ(group.size(), (communicator_.size() + (world_rank % 2 == 0 ? 1 : 0)) / 2);
    for (const ExchangeCase& c : exchange_cases(group.size())) {
      EXPECT_EQ(check_gather(group, c), "");
    }
  }
  MPI_Comm_free(&half);
}

TEST_F(CommMpi, OtherThreadsAreRefused) {
  int level = MPI_THREAD_SINGLE;
  MPI_Query_thread(&level);
  if (level >= MPI_THREAD_SERIALIZED) GTEST_SKIP() << "this MPI allows other threads";
  std::thread([] { EXPECT_THROW(Communicator::mpi(), CommunicationError); }).join();
}

// Only the first rank reports, unless another fails.
class QuietListener : public ::testing::EmptyTestEventListener {
  void OnTestPartResult(const ::testing::TestPartResult& result) override {
    if (result.failed()) {
      std::fprintf(stderr, "%s:%d: %s\n", result.file_name(), result.line_number(),
                   result.message());
    }
  }
};

}  // namespace
}  // namespace zigzag::test

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  const zigzag::comm::MpiEnvironment mpi({});
  if (mpi.rank() != 0) {
    auto& listeners = ::testing::UnitTest::GetInstance()->listeners();
    delete listeners.Release(listeners.default_result_printer());
    listeners.Append(new zigzag::test::QuietListener);
  }
  return RUN_ALL_TESTS();
}
